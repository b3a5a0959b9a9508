//! Identities of a sysfs that the test makes.

use std::os::unix::fs::symlink;

use tempfile::TempDir;
use uuid::Uuid;

use super::*;

/// A sysfs with devices that do not exist.
pub(crate) struct FakeSysfs {
    root: TempDir,
}

impl FakeSysfs {
    pub(crate) fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        for directory in ["dev/block", "class/block", "devices"] {
            fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        Self { root }
    }

    pub(crate) fn path(&self) -> &Path {
        self.root.path()
    }

    /// Adds a device at `place` below `devices`, with these attributes besides the usual ones.
    pub(crate) fn add(&self, id: DeviceId, place: &str, attributes: &[(&str, &str)]) {
        let directory = self.root.path().join("devices").join(place);
        fs::create_dir_all(&directory).unwrap();
        self.set(place, &[("dev", &id.to_string()), ("size", "2048")]);
        if !attributes.iter().any(|(name, _)| *name == "partition") {
            self.set(
                place,
                &[
                    ("queue/logical_block_size", "512"),
                    ("queue/iostats", "1"),
                    ("removable", "0"),
                ],
            );
        }
        self.set(
            place,
            &[("stat", &stat([0; 17])), ("inflight", "       0        0\n")],
        );
        self.set(place, attributes);
        let name = place.rsplit('/').next().unwrap();
        for link in [format!("dev/block/{id}"), format!("class/block/{name}")] {
            symlink(
                Path::new("../../devices").join(place),
                self.root.path().join(link),
            )
            .unwrap();
        }
    }

    /// Writes attributes of the device at `place`.
    pub(crate) fn set(&self, place: &str, attributes: &[(&str, &str)]) {
        for (name, value) in attributes {
            let path = self.root.path().join("devices").join(place).join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value).unwrap();
        }
    }

    /// Makes `below` a slave of the device at `place`.
    pub(crate) fn stack(&self, place: &str, below: &str) {
        let devices = self.root.path().join("devices");
        let slaves = devices.join(place).join("slaves");
        fs::create_dir_all(&slaves).unwrap();
        let name = below.rsplit('/').next().unwrap();
        symlink(devices.join(below), slaves.join(name)).unwrap();
    }
}

/// The text of a `stat` attribute.
pub(crate) fn stat(fields: [u64; 17]) -> String {
    fields.map(|field| format!("{field:8}")).join(" ") + "\n"
}

pub(crate) fn device(major: u32, minor: u32) -> DeviceId {
    DeviceId { major, minor }
}

const SDA: &str = "pci0000:00/0000:00:1f.2/ata1/host0/target0:0:0/0:0:0:0/block/sda";

fn sda(attributes: &[(&str, &str)]) -> DeviceIdentity {
    let sysfs = FakeSysfs::new();
    sysfs.add(device(8, 0), SDA, attributes);
    DeviceIdentity::of(sysfs.path(), device(8, 0)).unwrap()
}

#[test]
fn every_kind_of_device_is_read() {
    let sysfs = FakeSysfs::new();
    sysfs.add(
        device(8, 0),
        SDA,
        &[
            ("device/wwid", "naa.5000c5002ea341bc\n"),
            ("device/model", "ST2000DM001-1CH1\n"),
            ("queue/logical_block_size", "4096\n"),
            ("size", "3907029168\n"),
        ],
    );
    let page: Vec<u8> = [&[0, 0x80, 0, 8][..], b"  Z1E0AB"].concat();
    fs::write(
        sysfs.path().join("devices").join(SDA).join("device/vpd_pg80"),
        page,
    )
    .unwrap();
    sysfs.add(
        device(8, 3),
        &format!("{SDA}/sda3"),
        &[
            ("partition", "3\n"),
            ("start", "2048\n"),
            ("size", "8192\n"),
            (
                "uevent",
                "DEVTYPE=partition\nPARTN=3\nPARTUUID=8DA63339-0007-60c0-c436-083ac8230908\n",
            ),
        ],
    );
    let disk = DeviceIdentity::of(sysfs.path(), device(8, 0)).unwrap();
    let want = DeviceIdentity {
        wwid: Some("naa.5000c5002ea341bc".to_owned()),
        serial: Some("Z1E0AB".to_owned()),
        model: Some("ST2000DM001-1CH1".to_owned()),
        dm_uuid: None,
        md_uuid: None,
        backing_file: None,
        partition: None,
        capacity: Sectors::new(3_907_029_168),
        logical_block: 4096,
    };
    assert_eq!(disk, want);
    let partition = DeviceIdentity::of(sysfs.path(), device(8, 3)).unwrap();
    let place = PartitionIdentity {
        number: 3,
        start: Sectors::new(2048),
        uuid: Some("8da63339-0007-60c0-c436-083ac8230908".to_owned()),
    };
    assert_eq!(
        partition,
        DeviceIdentity {
            partition: Some(place),
            capacity: Sectors::new(8192),
            ..want
        }
    );

    sysfs.add(
        device(254, 0),
        "pci0000:00/virtio1/block/vda",
        &[("serial", "disk-7")],
    );
    sysfs.add(
        device(259, 1),
        "pci0000:00/nvme/nvme0/nvme0n1",
        &[
            ("wwid", "eui.0025388b710116a1"),
            ("device/serial", "S466  "),
            ("device/model", "Samsung  "),
        ],
    );
    sysfs.add(device(253, 0), "virtual/block/dm-0", &[("dm/uuid", "LVM-abc\n")]);
    sysfs.add(device(9, 0), "virtual/block/md0", &[("md/uuid", "1:2:3:4\n")]);
    sysfs.add(
        device(7, 0),
        "virtual/block/loop0",
        &[("loop/backing_file", "/a/disk.img\n"), ("serial", "\n")],
    );
    let of = |major, minor| DeviceIdentity::of(sysfs.path(), device(major, minor)).unwrap();
    assert_eq!(of(254, 0).serial.as_deref(), Some("disk-7"));
    assert_eq!(of(259, 1).wwid.as_deref(), Some("eui.0025388b710116a1"));
    assert_eq!(of(259, 1).serial.as_deref(), Some("S466"));
    assert_eq!(of(253, 0).dm_uuid.as_deref(), Some("LVM-abc"));
    assert_eq!(of(9, 0).md_uuid.as_deref(), Some("1:2:3:4"));
    assert_eq!(of(7, 0).backing_file.as_deref(), Some("/a/disk.img"));
    for (unique, id) in [
        (true, (254, 0)),
        (true, (259, 1)),
        (true, (253, 0)),
        (true, (9, 0)),
        (false, (7, 0)),
    ] {
        assert_eq!(of(id.0, id.1).is_unique(), unique, "{id:?}");
    }
    assert!(DeviceIdentity::of(sysfs.path(), device(8, 1)).is_err());
    sysfs.set(SDA, &[("size", "many")]);
    let error = DeviceIdentity::of(sysfs.path(), device(8, 0)).unwrap_err();
    assert!(error.to_string().contains("size"), "{error}");
}

#[test]
fn a_page_that_is_none_is_no_serial_number() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vpd_pg80");
    for page in [
        &b""[..],
        b"\0\x80",
        b"\0\x80\0\x04abc",
        b"\0\x83\0\x03abc",
        b"\0\x80\0\x03  \0",
    ] {
        fs::write(&path, page).unwrap();
        assert_eq!(unit_serial(&path), None, "{page:?}");
    }
}

#[test]
fn same_is_only_what_is_the_same_in_everything_told() {
    let was = sda(&[("serial", "A"), ("device/model", "M")]);
    assert_eq!(was.same_as(&was.clone()), Ok(()));
    let unknown = |what, was: Option<&str>, is: Option<&str>| Difference::Unknown {
        what,
        was: was.map(str::to_owned),
        is: is.map(str::to_owned),
    };
    let other = |what, was: &str, is: &str| Difference::Other {
        what,
        was: was.to_owned(),
        is: is.to_owned(),
    };
    for (now, want) in [
        (
            sda(&[("serial", "B"), ("device/model", "M")]),
            other("serial number", "A", "B"),
        ),
        (
            sda(&[("serial", "A"), ("device/model", "N")]),
            other("model", "M", "N"),
        ),
        (sda(&[("serial", "A")]), unknown("model", Some("M"), None)),
        (
            sda(&[("serial", "A"), ("device/model", "M"), ("wwid", "W")]),
            unknown("world-wide identifier", None, Some("W")),
        ),
        (
            sda(&[("device/model", "M")]),
            unknown("serial number", Some("A"), None),
        ),
        (
            sda(&[("serial", "A"), ("device/model", "M"), ("size", "4096")]),
            Difference::Capacity { was: 2048, is: 4096 },
        ),
        (
            sda(&[
                ("serial", "A"),
                ("device/model", "M"),
                ("queue/logical_block_size", "4096"),
            ]),
            other("logical block size", "512", "4096"),
        ),
    ] {
        assert_eq!(was.same_as(&now), Err(want), "{now:?}");
        assert!(now.same_as(&was).is_err());
    }
    let longer = sda(&[("serial", "A"), ("device/model", "M"), ("size", "4096")]);
    assert_eq!(was.same_device(&longer), Ok(()));

    let plain = sda(&[("device/model", "M")]);
    assert_eq!(plain.same_as(&plain.clone()), Err(Difference::Unidentified));

    let text = serde_json::to_string(&was).unwrap();
    assert_eq!(serde_json::from_str::<DeviceIdentity>(&text).unwrap(), was);
}

#[test]
fn partitions_are_told_apart_by_table_number_and_place() {
    let partition = |number: &str, start: &str, uevent: &str| {
        let sysfs = FakeSysfs::new();
        sysfs.add(device(8, 0), SDA, &[]);
        let place = format!("{SDA}/sda1");
        sysfs.add(
            device(8, 1),
            &place,
            &[("partition", number), ("start", start), ("uevent", uevent)],
        );
        DeviceIdentity::of(sysfs.path(), device(8, 1)).unwrap()
    };
    let was = partition("1", "64", "PARTUUID=a-1\n");
    assert!(was.is_unique() && was.same_as(&was.clone()).is_ok());
    for (now, what) in [
        (partition("1", "64", "PARTUUID=a-2\n"), "partition UUID"),
        (partition("1", "64", "PARTUUID=\n"), "partition UUID"),
        (partition("2", "64", "PARTUUID=a-1\n"), "partition number"),
        (partition("1", "65", "PARTUUID=a-1\n"), "first sector"),
    ] {
        let difference = was.same_as(&now).unwrap_err().to_string();
        assert!(difference.contains(what), "{difference}");
    }
}

#[test]
fn partition_tables_are_read_where_the_kernel_does_not_tell() {
    let directory = tempfile::tempdir().unwrap();
    let uuid = Uuid::from_u128(0x8da6_3339_0007_60c0_c436_083a_c823_0908);
    let of = |disk: &[u8], block: u32, number: u32, start: u64| {
        let path = directory.path().join("disk");
        fs::write(&path, disk).unwrap();
        let partition = PartitionIdentity {
            number,
            start: Sectors::new(start),
            uuid: None,
        };
        partuuid_of_table(&File::open(&path).unwrap(), block, &partition)
    };
    for block in [512_usize, 4096] {
        let mut disk = vec![0; block * 8];
        disk[block..block + 8].copy_from_slice(b"EFI PART");
        disk[block + 72..block + 80].copy_from_slice(&2_u64.to_le_bytes());
        disk[block + 80..block + 84].copy_from_slice(&4_u32.to_le_bytes());
        disk[block + 84..block + 88].copy_from_slice(&128_u32.to_le_bytes());
        let entry = block * 2 + 128;
        disk[entry] = 1;
        disk[entry + 16..entry + 32].copy_from_slice(&uuid.to_bytes_le());
        disk[entry + 32..entry + 40].copy_from_slice(&6_u64.to_le_bytes());
        let start = 6 * block as u64 / 512;
        let size = u32::try_from(block).unwrap();
        assert_eq!(of(&disk, size, 2, start).unwrap(), Some(uuid.to_string()));
        assert_eq!(of(&disk, size, 2, start + 1).unwrap(), None);
        // A table somewhere else, or entries of no size.
        disk[block + 72..block + 80].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(of(&disk, size, 2, start).unwrap(), None);
        disk[block + 84..block + 88].copy_from_slice(&0_u32.to_le_bytes());
        assert_eq!(of(&disk, size, 2, start).unwrap(), None);
        assert!(of(&disk[..block + 50], size, 2, start).is_err());
    }
    let mut disk = vec![0; 4096];
    assert_eq!(of(&disk, 512, 5, 63).unwrap(), None);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    assert_eq!(of(&disk, 512, 5, 63).unwrap(), None);
    disk[440..444].copy_from_slice(&0x00d4_f1a2_u32.to_le_bytes());
    assert_eq!(of(&disk, 512, 5, 63).unwrap().as_deref(), Some("00d4f1a2-05"));
}

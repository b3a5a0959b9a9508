//! Stack: the disks that a device is made of, itself and everything beneath it, and what drives them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::units::DeviceId;

/// What drives a disk, as far as it decides about its commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// A SCSI disk, SATA and USB included.
    Scsi,
    /// An NVMe namespace.
    Nvme,
    /// An NVMe namespace over several paths, each of which is a hidden disk.
    NvmeMultipath,
    /// Anything else.
    Other,
}

/// A disk of a [`Stack`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Its number.
    pub id: DeviceId,
    /// What drives it.
    pub driver: Driver,
}

/// The disks of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stack {
    /// In the order of their numbers; a partition counts as its disk.
    pub disks: Vec<Disk>,
}

impl Stack {
    /// The disk of `device`, and the disks of everything that it stands on (`slaves` in sysfs: device-mapper, md,
    /// bcache). `sysfs` is `/sys/dev/block`, or a copy of it.
    #[must_use]
    pub fn beneath(sysfs: &Path, device: DeviceId) -> Self {
        let mut seen = BTreeSet::new();
        let mut disks = Vec::new();
        let mut queue = vec![device];
        while let Some(id) = queue.pop() {
            let Some((id, directory)) = disk_of(sysfs, id) else {
                continue;
            };
            if !seen.insert(id) {
                continue;
            }
            disks.push(Disk {
                id,
                driver: driver(&directory),
            });
            for slave in fs::read_dir(directory.join("slaves"))
                .into_iter()
                .flatten()
                .flatten()
            {
                queue.extend(read_id(&slave.path()));
            }
        }
        disks.sort_by_key(|disk| disk.id);
        Self { disks }
    }

    /// Whether one of the disks is driven so.
    #[must_use]
    pub fn any(&self, driver: Driver) -> bool {
        self.disks.iter().any(|disk| disk.driver == driver)
    }
}

/// The whole disk of a device, and its directory.
fn disk_of(sysfs: &Path, id: DeviceId) -> Option<(DeviceId, PathBuf)> {
    let directory = sysfs.join(id.to_string()).canonicalize().ok()?;
    if !directory.join("partition").exists() {
        return Some((id, directory));
    }
    let disk = directory.parent()?;
    Some((read_id(disk)?, disk.to_owned()))
}

fn read_id(directory: &Path) -> Option<DeviceId> {
    fs::read_to_string(directory.join("dev"))
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// By the subsystem of the device that the disk belongs to: `scsi` of a logical unit, `nvme` of a controller,
/// `nvme-subsystem` of a multipath disk.
fn driver(directory: &Path) -> Driver {
    let subsystem = directory
        .join("device/subsystem")
        .canonicalize()
        .unwrap_or_default();
    match subsystem.file_name().and_then(|name| name.to_str()) {
        Some("scsi") => Driver::Scsi,
        Some("nvme") => Driver::Nvme,
        Some("nvme-subsystem") => Driver::NvmeMultipath,
        _ => Driver::Other,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A made-up sysfs: directories of disks below `devices`, links to them in `dev`.
    struct Sysfs(tempfile::TempDir);

    impl Sysfs {
        fn new() -> Self {
            let sysfs = Self(tempfile::tempdir().unwrap());
            fs::create_dir(sysfs.0.path().join("dev")).unwrap();
            sysfs
        }

        fn add(&self, place: &str, id: &str) -> PathBuf {
            let directory = self.0.path().join("devices").join(place);
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("dev"), format!("{id}\n")).unwrap();
            symlink(&directory, self.0.path().join("dev").join(id)).unwrap();
            directory
        }

        fn partition(&self, place: &str, id: &str) -> PathBuf {
            let directory = self.add(place, id);
            fs::write(directory.join("partition"), "1\n").unwrap();
            directory
        }

        fn drive(&self, directory: &Path, subsystem: &str) {
            let class = self.0.path().join("class").join(subsystem);
            fs::create_dir_all(&class).unwrap();
            fs::create_dir_all(directory.join("device")).unwrap();
            symlink(class, directory.join("device/subsystem")).unwrap();
        }

        fn slave(&self, upper: &Path, lower: &Path) {
            fs::create_dir_all(upper.join("slaves")).unwrap();
            symlink(lower, upper.join("slaves").join(lower.file_name().unwrap())).unwrap();
        }

        fn beneath(&self, id: &str) -> Vec<(String, Driver)> {
            Stack::beneath(&self.0.path().join("dev"), id.parse().unwrap())
                .disks
                .iter()
                .map(|disk| (disk.id.to_string(), disk.driver))
                .collect()
        }
    }

    #[test]
    fn a_volume_on_partitions_stands_on_their_disks() {
        let sysfs = Sysfs::new();
        let sda = sysfs.add("sda", "8:0");
        let sda1 = sysfs.partition("sda/sda1", "8:1");
        let sda2 = sysfs.partition("sda/sda2", "8:2");
        let nvme = sysfs.add("nvme0n1", "259:0");
        let crypt = sysfs.add("dm-1", "253:1");
        let lv = sysfs.add("dm-0", "253:0");
        sysfs.drive(&sda, "scsi");
        sysfs.drive(&nvme, "nvme-subsystem");
        sysfs.slave(&crypt, &sda1);
        sysfs.slave(&lv, &crypt);
        sysfs.slave(&lv, &sda2);
        sysfs.slave(&lv, &nvme);
        assert_eq!(
            sysfs.beneath("253:0"),
            [
                ("8:0".to_owned(), Driver::Scsi),
                ("253:0".to_owned(), Driver::Other),
                ("253:1".to_owned(), Driver::Other),
                ("259:0".to_owned(), Driver::NvmeMultipath),
            ]
        );
        assert_eq!(sysfs.beneath("8:2"), [("8:0".to_owned(), Driver::Scsi)]);
        // What is gone stands on nothing.
        assert!(sysfs.beneath("7:0").is_empty());
    }

    #[test]
    fn a_circle_ends() {
        let sysfs = Sysfs::new();
        let (a, b) = (sysfs.add("a", "1:0"), sysfs.add("b", "1:1"));
        sysfs.drive(&b, "nvme");
        sysfs.slave(&a, &b);
        sysfs.slave(&b, &a);
        assert_eq!(
            sysfs.beneath("1:0"),
            [
                ("1:0".to_owned(), Driver::Other),
                ("1:1".to_owned(), Driver::Nvme)
            ]
        );
    }
}

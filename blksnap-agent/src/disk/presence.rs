//! Presence: whether the device is still the one that it was, with the same content behind the same number.
//!
//! What is compared, all from sysfs:
//!
//! | fact | tells |
//! |---|---|
//! | the directory itself | a device that is gone |
//! | its inode number, new for each registration of a disk | another disk under the same name |
//! | `diskseq`, counted up by each new disk, each change of a medium, each file behind a loop device | another medium |
//! | `start` of a partition | another partition under the same name |
//! | `size` | a resize; 0 is a device without a medium |
//! | `loop/offset` | other bytes of the same file (`LOOP_SET_STATUS` leaves `diskseq` as it is) |
//! | `stat` | completed I/O that gets less: zram starts it anew when it is reset, and leaves `diskseq` as it is |
//!
//! A zram disk that is reset and written more often than ever before between two looks is not noticed.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::BlockDevice;
use crate::units::DeviceId;

/// `/sys/dev/block`.
pub const SYSFS: &str = "/sys/dev/block";

/// Sectors of I/O that a disk completed, from its `stat` (`Documentation/block/stat.rst`). They only grow while the
/// disk lives. The numbers of requests count flushes as writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Completed {
    /// Read.
    pub reads: u64,
    /// Written.
    pub writes: u64,
    /// Discarded (Linux 4.18).
    pub discards: u64,
}

impl Completed {
    fn parse(text: &str) -> Option<Self> {
        let mut fields = text.split_whitespace().map(str::parse);
        let mut nth = |n: usize| fields.nth(n)?.ok();
        Some(Self {
            reads: nth(2)?,
            writes: nth(3)?,
            discards: nth(6).unwrap_or_default(),
        })
    }

    fn is_less(&self, before: &Self) -> bool {
        self.reads < before.reads || self.writes < before.writes || self.discards < before.discards
    }
}

/// What is known of a device at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Presence {
    /// Inode number of the disk's directory in sysfs.
    directory: u64,
    diskseq: Option<u64>,
    first_sector: u64,
    /// Sectors of the device.
    capacity: u64,
    /// `loop/offset`.
    loop_offset: Option<u64>,
    /// What the disk completed; `None` if it does not count.
    pub completed: Option<Completed>,
}

/// What became of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is gone, or has no medium.
    Gone,
    /// Another one is there.
    Replaced,
    /// The medium, or the file behind it, is another one.
    Medium,
    /// It has another capacity.
    Resized,
}

impl Presence {
    /// Looks at `device` in the directory `sysfs`; `None` if it is gone.
    #[must_use]
    pub fn look(sysfs: &Path, device: &BlockDevice) -> Option<Self> {
        let node = directory(sysfs, device.id)?;
        let disk = if device.is_whole_disk() {
            node.clone()
        } else {
            directory(sysfs, device.disk_id)?
        };
        let number = |directory: &Path, name: &str| -> Option<u64> {
            fs::read_to_string(directory.join(name)).ok()?.trim().parse().ok()
        };
        Some(Self {
            directory: fs::metadata(&disk).ok()?.ino(),
            diskseq: number(&disk, "diskseq"),
            first_sector: number(&node, "start").unwrap_or_default(),
            capacity: number(&node, "size")?,
            loop_offset: number(&disk, "loop/offset"),
            completed: fs::read_to_string(disk.join("stat"))
                .ok()
                .and_then(|text| Completed::parse(&text)),
        })
    }

    /// What became of the device since `before`, if anything did. The graver one is given.
    #[must_use]
    pub fn change_since(&self, before: &Self) -> Option<Change> {
        if self.capacity == 0 {
            return Some(Change::Gone);
        }
        if self.directory != before.directory || self.first_sector != before.first_sector {
            return Some(Change::Replaced);
        }
        let reset = match (&self.completed, &before.completed) {
            (Some(now), Some(before)) => now.is_less(before),
            _ => false,
        };
        if self.diskseq != before.diskseq || self.loop_offset != before.loop_offset || reset {
            return Some(Change::Medium);
        }
        (self.capacity != before.capacity).then_some(Change::Resized)
    }
}

fn directory(sysfs: &Path, id: DeviceId) -> Option<PathBuf> {
    sysfs.join(id.to_string()).canonicalize().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Sectors;

    /// A made-up disk with one partition.
    struct Fake {
        root: tempfile::TempDir,
        device: BlockDevice,
    }

    const STAT: &str = "  1  0  10  1  2  0  20  1  0  2  2  3  0  30  1  9  0\n";

    impl Fake {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            let id = |minor| DeviceId { major: 8, minor };
            let fake = Self {
                device: BlockDevice {
                    path: "/dev/sdz1".into(),
                    name: "sdz1".to_owned(),
                    id: id(1),
                    disk_id: id(0),
                    disk_name: "sdz".to_owned(),
                    disk_path: "/dev/sdz".into(),
                    first_sector: Sectors::new(2048),
                    capacity: Sectors::new(4096),
                    logical_block: 512,
                    physical_block: 512,
                    minimum_io: 512,
                    diskseq: Some(7),
                    read_only: false,
                },
                root,
            };
            fake.plug();
            fake
        }

        fn plug(&self) {
            for (place, name) in [("sdz", "8:0"), ("sdz/sdz1", "8:1")] {
                let directory = self.root.path().join("devices").join(place);
                fs::create_dir_all(&directory).unwrap();
                let _ = std::os::unix::fs::symlink(&directory, self.root.path().join(name));
            }
            for (file, text) in [
                ("sdz/diskseq", "7\n"),
                ("sdz/stat", STAT),
                ("sdz/sdz1/start", "2048\n"),
                ("sdz/sdz1/size", "4096\n"),
            ] {
                self.write(file, text);
            }
        }

        fn write(&self, file: &str, text: &str) {
            let path = self.root.path().join("devices").join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn unplug(&self) {
            fs::remove_dir_all(self.root.path().join("devices/sdz")).unwrap();
        }

        fn look(&self) -> Option<Presence> {
            Presence::look(self.root.path(), &self.device)
        }
    }

    #[test]
    fn each_fact_tells_its_change() {
        for (file, text, change) in [
            ("sdz/diskseq", "8\n", Change::Medium),
            ("sdz/sdz1/start", "4096\n", Change::Replaced),
            ("sdz/sdz1/size", "8192\n", Change::Resized),
            ("sdz/sdz1/size", "0\n", Change::Gone),
            ("sdz/loop/offset", "4096\n", Change::Medium),
            ("sdz/stat", &STAT.replace("20", "19"), Change::Medium),
            ("sdz/stat", &STAT.replace("30", "0"), Change::Medium),
        ] {
            let fake = Fake::new();
            let before = fake.look().unwrap();
            assert_eq!(fake.look().unwrap().change_since(&before), None);
            fake.write(file, text);
            assert_eq!(
                fake.look().unwrap().change_since(&before),
                Some(change),
                "{file} {text}"
            );
        }
    }

    #[test]
    fn more_io_is_no_change_and_a_disk_need_not_count() {
        let fake = Fake::new();
        let before = fake.look().unwrap();
        assert_eq!(
            before.completed,
            Some(Completed {
                reads: 10,
                writes: 20,
                discards: 30
            })
        );
        fake.write("sdz/stat", &STAT.replace("20", "21"));
        assert_eq!(fake.look().unwrap().change_since(&before), None);
        // Before 4.18 there were no discards.
        fake.write("sdz/stat", "1 0 11 1 2 0 20 1 0 2 2\n");
        assert_eq!(fake.look().unwrap().completed.unwrap().discards, 0);
        fake.write("sdz/stat", "\n");
        let without = fake.look().unwrap();
        assert_eq!((without.completed, without.change_since(&before)), (None, None));
    }

    #[test]
    fn gone_and_back_is_another_one() {
        let fake = Fake::new();
        let before = fake.look().unwrap();
        fake.unplug();
        assert_eq!(fake.look(), None);
        // Keeps the inode number from being given out again at once.
        fs::create_dir(fake.root.path().join("devices/other")).unwrap();
        fake.plug();
        let after = fake.look().unwrap();
        assert_eq!(after.change_since(&before), Some(Change::Replaced));
    }
}

//! DAX: file systems that write to memory, past every block device request.
//!
//! A file system on a persistent memory device that is mounted with `dax` changes the device by stores of the
//! processor. Nothing of that goes through the block layer, so it can't be tracked. Whether it happens:
//!
//! - The device says whether it could at all: `queue/dax`. Without it no mount can (ext4 refuses `dax`, XFS turns
//!   it off), whatever the options say.
//! - `dax` and `dax=always` do it for all files, `dax=never` for none. Without an option, or with `dax=inode`, each
//!   file decides by an attribute (`FS_XFLAG_DAX`) that no table shows, and can be set at any time: that counts, too.
//! - What a device that could do it is stacked under may use it itself (dm-writecache does), unless it is a device
//!   that shows `queue/dax` in turn, whose mounts are looked at.
//! - Mounts in other mount namespaces are not in our table, but the file system's directory below `/sys/fs` is
//!   named after the device.

use std::fs;
use std::path::Path;

use super::mounts::{self, Mount};
use super::{BlockDevice, DiskError};
use crate::units::DeviceId;

/// Where a device is written past the block layer, or may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dax {
    /// By the file system mounted there.
    Mount {
        /// Where.
        mountpoint: std::path::PathBuf,
        /// Whether all files are written so; otherwise each file decides.
        always: bool,
    },
    /// By a file system mounted where we can't see it.
    HiddenMount,
    /// By the device stacked on it, of this name.
    Holder(String),
}

impl std::fmt::Display for Dax {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Mount {
                mountpoint,
                always: true,
            } => write!(f, "it is mounted at {} with dax", mountpoint.display()),
            Self::Mount {
                mountpoint,
                always: false,
            } => write!(
                f,
                "it is mounted at {}, where each file may use dax",
                mountpoint.display()
            ),
            Self::HiddenMount => {
                f.write_str("it is mounted in another mount namespace, where files may use dax")
            }
            Self::Holder(name) => write!(f, "{name} is stacked on it, and may use dax"),
        }
    }
}

/// What the options of a mount say about DAX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    Always,
    Never,
    ByFile,
}

/// Reads the options of a superblock, as in `/proc/self/mountinfo`; the last one counts.
fn choice(options: &str) -> Choice {
    options
        .split(',')
        .filter_map(|option| match option {
            "dax" | "dax=always" => Some(Choice::Always),
            "dax=never" => Some(Choice::Never),
            "dax=inode" => Some(Choice::ByFile),
            _ => None,
        })
        .next_back()
        .unwrap_or(Choice::ByFile)
}

/// File systems that know DAX at all; others ignore that the device does.
const WITH_DAX: [&str; 5] = ["ext4", "ext2", "xfs", "erofs", "fuseblk"];

/// Where and how `device` is written past the block layer, if it is or may be.
///
/// # Errors
/// The mount table can't be read.
pub fn of(device: &BlockDevice) -> Result<Option<Dax>, DiskError> {
    let sysfs = Path::new(super::presence::SYSFS);
    let above = mounts::stack_above(device.id);
    if !above.iter().any(|id| is_capable(sysfs, *id)) {
        return Ok(None);
    }
    let table = mounts::Table::read()?;
    Ok(judge(
        sysfs,
        Path::new("/sys/fs"),
        &above.into_iter().collect::<Vec<_>>(),
        &table.on_device(device),
    ))
}

/// As [`of`], from the devices `stack` (the device itself and what is above it) and the mounts on them.
fn judge(sysfs: &Path, fs: &Path, stack: &[DeviceId], mounts: &[Mount]) -> Option<Dax> {
    let capable: Vec<DeviceId> = stack
        .iter()
        .copied()
        .filter(|id| is_capable(sysfs, *id))
        .collect();
    if capable.is_empty() {
        return None;
    }
    let by_mount = |always: bool| {
        mounts
            .iter()
            .filter(|mount| {
                // A file system over several devices does not say which ones: it is taken to be on this one.
                mount.superblock.major == 0 || capable.contains(&mount.superblock)
            })
            .find(|mount| match choice(&mount.options) {
                Choice::Always => always,
                Choice::ByFile => !always && WITH_DAX.contains(&mount.fs_type.as_str()),
                Choice::Never => false,
            })
            .map(|mount| Dax::Mount {
                mountpoint: mount.mountpoint.clone(),
                always,
            })
    };
    by_mount(true)
        .or_else(|| by_mount(false))
        .or_else(|| capable.iter().find_map(|id| holder(sysfs, *id)))
        .or_else(|| {
            capable
                .iter()
                .any(|id| {
                    let seen = mounts.iter().any(|mount| mount.superblock == *id);
                    !seen && name(sysfs, *id).is_some_and(|name| is_mounted(fs, &name))
                })
                .then_some(Dax::HiddenMount)
        })
}

/// Whether the device can be reached as memory; a partition as its disk.
fn is_capable(sysfs: &Path, id: DeviceId) -> bool {
    let Ok(directory) = sysfs.join(id.to_string()).canonicalize() else {
        return false;
    };
    let disk = if directory.join("partition").exists() {
        directory.parent().unwrap_or(&directory)
    } else {
        &directory
    };
    fs::read_to_string(disk.join("queue/dax")).is_ok_and(|text| text.trim() == "1")
}

/// What is stacked on the device and does not say itself whether it can.
fn holder(sysfs: &Path, id: DeviceId) -> Option<Dax> {
    let holders = fs::read_dir(sysfs.join(id.to_string()).join("holders")).ok()?;
    holders.flatten().find_map(|entry| {
        let upper: DeviceId = fs::read_to_string(entry.path().join("dev"))
            .ok()?
            .trim()
            .parse()
            .ok()?;
        (!is_capable(sysfs, upper)).then(|| Dax::Holder(entry.file_name().to_string_lossy().into_owned()))
    })
}

fn name(sysfs: &Path, id: DeviceId) -> Option<String> {
    let directory = sysfs.join(id.to_string()).canonicalize().ok()?;
    Some(directory.file_name()?.to_string_lossy().into_owned())
}

fn is_mounted(fs: &Path, name: &str) -> bool {
    ["ext4", "xfs"]
        .iter()
        .any(|kind| fs.join(kind).join(name).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_option_counts() {
        for (options, wanted) in [
            ("rw,noatime,dax", Choice::Always),
            ("rw,attr2,dax=always,inode64", Choice::Always),
            ("rw,dax=never", Choice::Never),
            ("rw,dax=inode", Choice::ByFile),
            ("rw,daxctl=always,nodax", Choice::ByFile),
            ("rw,dax=never,dax=always", Choice::Always),
            ("", Choice::ByFile),
        ] {
            assert_eq!(choice(options), wanted, "{options}");
        }
    }

    /// A made-up sysfs and mount table.
    struct Fake(tempfile::TempDir);

    impl Fake {
        /// Disks `pmemN` with number `259:N`, capable or not; `pmem0` has a partition, 259:10.
        fn new(capable: &[bool]) -> Self {
            let fake = Self(tempfile::tempdir().unwrap());
            for (number, capable) in capable.iter().enumerate() {
                let disk = fake.disk(&format!("pmem{number}"), &format!("259:{number}"));
                fs::create_dir_all(disk.join("queue")).unwrap();
                fs::write(disk.join("queue/dax"), format!("{}\n", u8::from(*capable))).unwrap();
            }
            let partition = fake.disk("pmem0/pmem0p1", "259:10");
            fs::write(partition.join("partition"), "1\n").unwrap();
            fake
        }

        fn disk(&self, place: &str, id: &str) -> std::path::PathBuf {
            let directory = self.0.path().join("devices").join(place);
            fs::create_dir_all(directory.join("holders")).unwrap();
            fs::write(directory.join("dev"), format!("{id}\n")).unwrap();
            fs::create_dir_all(self.0.path().join("dev")).unwrap();
            std::os::unix::fs::symlink(&directory, self.0.path().join("dev").join(id)).unwrap();
            directory
        }

        fn judge(&self, stack: &[&str], mountinfo: &str) -> Option<Dax> {
            let stack: Vec<DeviceId> = stack.iter().map(|id| id.parse().unwrap()).collect();
            let mounts = mounts::Table::parse(mountinfo).all().to_vec();
            judge(
                &self.0.path().join("dev"),
                &self.0.path().join("fs"),
                &stack,
                &mounts,
            )
        }
    }

    fn line(id: &str, kind: &str, options: &str) -> String {
        format!("41 27 {id} / /mnt/data rw - {kind} /dev/pmem0 {options}\n")
    }

    #[test]
    fn a_mount_with_dax_is_told_and_one_without_is_not() {
        let fake = Fake::new(&[true]);
        let always = |always| {
            Some(Dax::Mount {
                mountpoint: "/mnt/data".into(),
                always,
            })
        };
        for (kind, options, wanted) in [
            ("ext4", "rw,dax=always", always(true)),
            ("xfs", "rw,attr2,dax", always(true)),
            ("xfs", "rw,attr2", always(false)),
            ("ext4", "rw,dax=inode", always(false)),
            ("ext4", "rw,dax=never", None),
            ("btrfs", "rw,ssd", None),
            ("unheard_of", "rw,dax=always", always(true)),
        ] {
            assert_eq!(
                fake.judge(&["259:0"], &line("259:0", kind, options)),
                wanted,
                "{kind} {options}"
            );
            // The partition's file system counts for the disk.
            assert_eq!(
                fake.judge(&["259:0", "259:10"], &line("259:10", kind, options)),
                wanted,
                "{kind} {options} on the partition"
            );
        }
        assert_eq!(fake.judge(&["259:0"], ""), None);
    }

    #[test]
    fn a_device_that_can_not_is_never_in_doubt() {
        let fake = Fake::new(&[false]);
        assert_eq!(
            fake.judge(&["259:0"], &line("259:0", "ext4", "rw,dax=always")),
            None
        );
        // Nor one without the attribute, or one that is gone.
        assert_eq!(fake.judge(&["8:0"], &line("8:0", "ext4", "rw,dax")), None);
    }

    #[test]
    fn what_is_stacked_on_it_may_use_it() {
        let fake = Fake::new(&[true, false, true]);
        let link = |upper: &str| {
            let target = fake.0.path().join("devices").join(upper);
            std::os::unix::fs::symlink(target, fake.0.path().join("devices/pmem0/holders").join(upper))
                .unwrap();
        };
        link("pmem2");
        assert_eq!(fake.judge(&["259:0", "259:2"], ""), None);
        assert_eq!(
            fake.judge(&["259:0", "259:2"], &line("259:2", "xfs", "rw,dax=always")),
            Some(Dax::Mount {
                mountpoint: "/mnt/data".into(),
                always: true
            })
        );
        link("pmem1");
        assert_eq!(
            fake.judge(&["259:0", "259:1", "259:2"], ""),
            Some(Dax::Holder("pmem1".to_owned()))
        );
    }

    #[test]
    fn a_mount_that_is_not_in_our_table_counts() {
        let fake = Fake::new(&[true]);
        fs::create_dir_all(fake.0.path().join("fs/xfs/pmem0")).unwrap();
        assert_eq!(fake.judge(&["259:0"], ""), Some(Dax::HiddenMount));
        assert_eq!(
            fake.judge(&["259:0"], &line("259:0", "xfs", "rw,dax=never")),
            None
        );
    }
}

//! Mounts: the file systems on a device, and what a file system stands on.
//!
//! A mount names its *superblock* by a device number. For most file systems that is the block device; btrfs and
//! others over several devices have an anonymous number, and are found by their source and, for btrfs, by the
//! members listed in `/sys/fs/btrfs`. What is stacked on a device (partitions, LVM, crypt, md: sysfs `holders`)
//! counts as on it. Downwards ([`Table::beneath`]) goes through `slaves` and, for loop devices, through the file
//! they are made of: a file system there must be frozen after the ones on top, and thawed before them.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::device::{device_number, sysfs_directory};
use super::{BlockDevice, DiskError};
use crate::units::DeviceId;

const MOUNTINFO: &str = "/proc/self/mountinfo";

/// One mount of a file system, as in `/proc/self/mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Number of the mount.
    pub id: u64,
    /// Device number of the superblock, the same for all mounts of a file system.
    pub superblock: DeviceId,
    /// Where.
    pub mountpoint: PathBuf,
    /// Kind of file system.
    pub fs_type: String,
    /// What is mounted, as given to mount.
    pub source: PathBuf,
    /// Options of the superblock.
    pub options: String,
}

impl Mount {
    /// True if the file system itself, not just this mount, is read-only.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.options.split(',').any(|option| option == "ro")
    }

    fn parse(line: &str) -> Option<Self> {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ');
        let id = fields.next()?.parse().ok()?;
        let _parent = fields.next()?;
        let superblock = fields.next()?.parse().ok()?;
        let _root = fields.next()?;
        let mountpoint = unescape(fields.next()?);
        let mut fields = after.split(' ');
        Some(Self {
            id,
            superblock,
            mountpoint,
            fs_type: fields.next()?.to_owned(),
            source: unescape(fields.next()?),
            options: fields.next()?.to_owned(),
        })
    }

    /// Opens the file system at its mount point, so that ioctls on it reach this one and no other.
    ///
    /// # Errors
    /// No permission, or something else is mounted over it.
    pub fn open(&self) -> Result<File, DiskError> {
        let failed = |why: String| DiskError::MountPoint {
            mountpoint: self.mountpoint.clone(),
            why,
        };
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(&self.mountpoint)
            .map_err(|source| failed(source.to_string()))?;
        match mount_of(&file) {
            Ok(id) if id == self.id => Ok(file),
            Ok(_) => Err(failed("something else is mounted over it".to_owned())),
            Err(source) => Err(failed(source.to_string())),
        }
    }
}

/// All mounts of this process at one moment.
#[derive(Clone, Debug)]
pub struct Table {
    mounts: Vec<Mount>,
}

impl Table {
    /// Reads the table.
    ///
    /// # Errors
    /// `/proc` is not mounted.
    pub fn read() -> Result<Self, DiskError> {
        let text = fs::read(MOUNTINFO).map_err(|source| DiskError::MountTable {
            path: MOUNTINFO.into(),
            source,
        })?;
        Ok(Self::parse(&String::from_utf8_lossy(&text)))
    }

    pub(super) fn parse(text: &str) -> Self {
        Self {
            mounts: text.lines().filter_map(Mount::parse).collect(),
        }
    }

    /// All mounts, in the table's order.
    #[must_use]
    pub fn all(&self) -> &[Mount] {
        &self.mounts
    }

    /// The mounts of file systems on `device` or stacked on it, in the table's order.
    #[must_use]
    pub fn on_device(&self, device: &BlockDevice) -> Vec<Mount> {
        let members = stack_above(device.id);
        let on_it = |mount: &&Mount| block_devices_of(mount).iter().any(|id| members.contains(id));
        self.mounts.iter().filter(on_it).cloned().collect()
    }

    /// The mount that holds `file`.
    ///
    /// # Errors
    /// `/proc` is not mounted, or the file's mount is not in the table.
    pub fn of_file(&self, file: impl AsFd) -> io::Result<&Mount> {
        let id = mount_of(file)?;
        self.mounts
            .iter()
            .find(|mount| mount.id == id)
            .ok_or_else(|| io::Error::other(format!("mount {id} is not in {MOUNTINFO}")))
    }

    /// The superblocks that a file system stands on, itself included: through device-mapper and md to disks,
    /// and through loop devices to the file systems that hold their files.
    #[must_use]
    pub fn beneath(&self, mount: &Mount) -> BTreeSet<DeviceId> {
        self.foundations(mount).0
    }

    /// The block devices that a file system stands on, by the same ways; a partition stands on its disk.
    #[must_use]
    pub fn devices_beneath(&self, mount: &Mount) -> BTreeSet<DeviceId> {
        self.foundations(mount).1
    }

    fn foundations(&self, mount: &Mount) -> (BTreeSet<DeviceId>, BTreeSet<DeviceId>) {
        let mut superblocks = BTreeSet::from([mount.superblock]);
        let mut devices = BTreeSet::new();
        let mut queue = block_devices_of(mount);
        while let Some(id) = queue.pop() {
            if !devices.insert(id) {
                continue;
            }
            let Ok(sysfs) = sysfs_directory(id) else { continue };
            queue.extend(links_to_devices(&sysfs.join("slaves")));
            queue.extend(disk_of_partition(&sysfs));
            let Some(lower) = self.of_loop_device(&sysfs) else {
                continue;
            };
            if superblocks.insert(lower.superblock) {
                queue.extend(block_devices_of(lower));
            }
        }
        (superblocks, devices)
    }

    /// The mount that holds the file of a loop device.
    fn of_loop_device(&self, sysfs: &Path) -> Option<&Mount> {
        let text = fs::read(sysfs.join("loop/backing_file")).ok()?;
        let path = PathBuf::from(OsString::from_vec(
            text.strip_suffix(b"\n").unwrap_or(&text).to_vec(),
        ));
        // Never opened for writing, nor waited for.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(path)
            .ok()?;
        self.of_file(&file).ok()
    }
}

impl BlockDevice {
    /// The mounts of file systems on this device, or on what is stacked on it.
    ///
    /// # Errors
    /// `/proc` is not mounted.
    pub fn mounts(&self) -> Result<Vec<Mount>, DiskError> {
        Ok(Table::read()?.on_device(self))
    }
}

/// Number of the mount through which `file` was opened, from `/proc/self/fdinfo`.
fn mount_of(file: impl AsFd) -> io::Result<u64> {
    let path = format!("/proc/self/fdinfo/{}", file.as_fd().as_raw_fd());
    let text = fs::read_to_string(&path)?;
    text.lines()
        .find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("no mnt_id in {path}")))
}

/// The block devices that the file system of a mount is directly on.
pub(crate) fn block_devices_of(mount: &Mount) -> Vec<DeviceId> {
    if mount.superblock.major != 0 {
        return vec![mount.superblock];
    }
    let source = block_device_at(&mount.source);
    let mut devices: Vec<DeviceId> = source.into_iter().collect();
    if mount.fs_type == "btrfs" {
        // One directory for each file system, with a link for each member.
        for entry in fs::read_dir("/sys/fs/btrfs").into_iter().flatten().flatten() {
            let members = links_to_devices(&entry.path().join("devices"));
            if source.is_some_and(|source| members.contains(&source)) {
                devices.extend(members);
            }
        }
    } else if source.is_none() {
        // bcachefs lists its members with colons between.
        let text = mount.source.to_string_lossy();
        devices.extend(
            text.split(':')
                .filter_map(|part| block_device_at(Path::new(part))),
        );
    }
    devices
}

/// The disk of a partition, by its directory in sysfs; none for what is no partition.
pub(crate) fn disk_of_partition(sysfs: &Path) -> Option<DeviceId> {
    sysfs
        .join("partition")
        .exists()
        .then(|| read_id(&sysfs.parent()?.join("dev")))
        .flatten()
}

fn block_device_at(path: &Path) -> Option<DeviceId> {
    let metadata = fs::metadata(path).ok()?;
    metadata
        .file_type()
        .is_block_device()
        .then(|| device_number(metadata.rdev()))
}

/// `id`, its partitions, and everything that holds one of them.
pub(super) fn stack_above(id: DeviceId) -> BTreeSet<DeviceId> {
    let mut members = BTreeSet::new();
    let mut queue = vec![id];
    while let Some(id) = queue.pop() {
        if !members.insert(id) {
            continue;
        }
        let Ok(sysfs) = sysfs_directory(id) else { continue };
        queue.extend(links_to_devices(&sysfs.join("holders")));
        for entry in fs::read_dir(&sysfs).into_iter().flatten().flatten() {
            if entry.path().join("partition").exists() {
                queue.extend(read_id(&entry.path().join("dev")));
            }
        }
    }
    members
}

/// The devices to which the entries of a directory in sysfs lead.
fn links_to_devices(directory: &Path) -> Vec<DeviceId> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| read_id(&entry.path().join("dev")))
        .collect()
}

fn read_id(path: &Path) -> Option<DeviceId> {
    fs::read_to_string(path).ok()?.parse().ok()
}

/// Space, tab, newline and backslash are written as `\040` and so on.
fn unescape(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = (bytes[at] == b'\\')
            .then(|| text.get(at + 1..at + 4))
            .flatten()
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        plain.push(octal.unwrap_or(bytes[at]));
        at += if octal.is_some() { 4 } else { 1 };
    }
    PathBuf::from(OsString::from_vec(plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
41 27 7:1 / /mnt/a\\040b\\134c ro,relatime shared:2 master:3 - xfs /dev/loop1 rw,attr2
broken
42 27 7:1 /sub /mnt/ro rw - xfs /dev/loop1 ro
";

    #[test]
    fn lines_are_taken_apart() {
        let table = Table::parse(TABLE);
        assert_eq!(table.mounts.len(), 4);
        let mount = &table.mounts[2];
        assert_eq!(mount.mountpoint, Path::new("/mnt/a b\\c"));
        assert_eq!((mount.id, mount.fs_type.as_str()), (41, "xfs"));
        assert_eq!(mount.superblock, DeviceId { major: 7, minor: 1 });
        assert_eq!(mount.source, Path::new("/dev/loop1"));
        // The mount is read-only, the file system is not.
        assert!(!mount.read_only());
        assert!(table.mounts[3].read_only());
    }

    #[test]
    fn escapes_that_are_none_stay() {
        for (text, plain) in [
            ("a\\", "a\\"),
            ("\\04", "\\04"),
            ("\\999", "\\999"),
            ("\\011x", "\tx"),
        ] {
            assert_eq!(unescape(text), Path::new(plain));
        }
    }

    #[test]
    fn an_open_file_knows_its_mount() {
        let table = Table::read().unwrap();
        let proc = File::open("/proc/self/status").unwrap();
        assert_eq!(table.of_file(&proc).unwrap().mountpoint, Path::new("/proc"));
    }
}

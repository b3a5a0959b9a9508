//! Block device: what the kernel knows about a disk or a partition.
//!
//! A [`BlockDevice`] is a description, read once from the node's ioctls and from sysfs (`/sys/dev/block/M:m`);
//! it holds nothing open. A partition also names its whole disk, because that is what tracepoints speak of and
//! what is read: sectors are absolute there. Partition numbers are never derived from minors, which are not
//! related for `259:x` devices.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::DiskError;
use crate::sys::ioctl;
use crate::units::{DeviceId, Sectors};

/// A disk or partition as it was when it was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockDevice {
    /// The node, symbolic links resolved (`/dev/dm-0`, not `/dev/mapper/root`).
    pub path: PathBuf,
    /// The kernel's name (`sdb1`, `cciss!c0d0`), which is the name in sysfs.
    pub name: String,
    /// The device's number.
    pub id: DeviceId,
    /// The number of the whole disk; [`Self::id`] if this is one.
    pub disk_id: DeviceId,
    /// The kernel's name of the whole disk.
    pub disk_name: String,
    /// The node of the whole disk.
    pub disk_path: PathBuf,
    /// Where the device begins on the whole disk.
    pub first_sector: Sectors,
    /// Length of the device.
    pub capacity: Sectors,
    /// Logical block size in bytes, the unit of direct I/O.
    pub logical_block: u32,
    /// Physical block size in bytes.
    pub physical_block: u32,
    /// Smallest preferred I/O in bytes.
    pub minimum_io: u32,
    /// The disk's sequence number (Linux 5.15), never used twice until the next boot. Tells a loop device from
    /// the one that had its number before.
    pub diskseq: Option<u64>,
    /// The device refuses writes.
    pub read_only: bool,
}

impl BlockDevice {
    /// Describes the device at `path`, which may be a symbolic link.
    ///
    /// # Errors
    /// Nothing there, not a block device, no permission, or no capacity.
    pub fn open(path: &Path) -> Result<Self, DiskError> {
        let node = path.canonicalize().map_err(|source| DiskError::NoDevice {
            path: path.to_owned(),
            source,
        })?;
        let metadata = fs::metadata(&node).map_err(|source| DiskError::NoDevice {
            path: path.to_owned(),
            source,
        })?;
        if !metadata.file_type().is_block_device() {
            return Err(DiskError::NotBlock {
                path: path.to_owned(),
            });
        }
        let id = device_number(metadata.rdev());
        let file = File::open(&node).map_err(|source| DiskError::Open {
            path: node.clone(),
            source,
        })?;
        let of_ioctl = |what: &'static str| {
            let node = &node;
            move |errno: nix::errno::Errno| DiskError::attribute(node, what, errno)
        };
        let bytes = ioctl::blkgetsize64(&file).map_err(of_ioctl("BLKGETSIZE64"))?;
        let capacity = Sectors::new(bytes / crate::units::SECTOR_BYTES);
        if capacity.count() == 0 {
            return Err(DiskError::Empty { path: node });
        }

        let sysfs = sysfs_directory(id)
            .map_err(|source| DiskError::attribute(&node, &format!("/sys/dev/block/{id}"), source))?;
        let place =
            Place::of(&sysfs, id).map_err(|(what, source)| DiskError::attribute(&node, &what, source))?;
        let disk_path = if place.disk_id == id {
            node.clone()
        } else {
            disk_node(&place)?
        };
        Ok(Self {
            logical_block: ioctl::blksszget(&file).map_err(of_ioctl("BLKSSZGET"))?,
            physical_block: ioctl::blkpbszget(&file).map_err(of_ioctl("BLKPBSZGET"))?,
            minimum_io: ioctl::blkiomin(&file).map_err(of_ioctl("BLKIOMIN"))?,
            read_only: ioctl::blkroget(&file).map_err(of_ioctl("BLKROGET"))?,
            path: node,
            name: place.name,
            id,
            disk_id: place.disk_id,
            disk_name: place.disk_name,
            disk_path,
            first_sector: place.first_sector,
            capacity,
            diskseq: place.diskseq,
        })
    }

    /// True if this is a whole disk, false if it is a partition.
    #[must_use]
    pub fn is_whole_disk(&self) -> bool {
        self.id == self.disk_id
    }

    /// The capacity in sectors that the kernel reports now. Unlike [`Self::capacity`] it follows a device that
    /// was resized.
    ///
    /// # Errors
    /// The device is gone, or its number now belongs to another one.
    pub fn capacity_now(&self) -> Result<Sectors, DiskError> {
        let sysfs = PathBuf::from(format!("/sys/dev/block/{}", self.id));
        if self.diskseq.is_some() && read_diskseq(&sysfs) != self.diskseq {
            return Err(DiskError::Replaced {
                path: self.path.clone(),
            });
        }
        read_number(&sysfs, "size")
            .map(Sectors::new)
            .map_err(|(what, source)| DiskError::attribute(&self.path, &what, source))
    }

    /// Writes that the driver holds now, from `/sys/dev/block/M:m/inflight`: those of this node, so that a
    /// partition does not count what goes to others or through the disk's node.
    ///
    /// # Errors
    /// The device is gone.
    pub fn writes_in_driver(&self) -> Result<u64, DiskError> {
        let path = format!("/sys/dev/block/{}/inflight", self.id);
        // Two numbers: reads, then writes.
        let parse = |text: String| {
            let writes = text.split_whitespace().nth(1).and_then(|word| word.parse().ok());
            writes.ok_or_else(|| malformed(&text))
        };
        fs::read_to_string(&path)
            .and_then(parse)
            .map_err(|source| DiskError::attribute(&self.path, &path, source))
    }
}

/// Where a device is in sysfs and on its disk.
struct Place {
    name: String,
    disk_id: DeviceId,
    disk_name: String,
    first_sector: Sectors,
    diskseq: Option<u64>,
}

type AttributeError = (String, io::Error);

impl Place {
    fn of(sysfs: &Path, id: DeviceId) -> Result<Self, AttributeError> {
        let name = file_name(sysfs);
        if !sysfs.join("partition").exists() {
            return Ok(Self {
                disk_name: name.clone(),
                name,
                disk_id: id,
                first_sector: Sectors::new(0),
                diskseq: read_diskseq(sysfs),
            });
        }
        let disk = sysfs
            .parent()
            .ok_or_else(|| (sysfs.display().to_string(), malformed("no parent")))?;
        let dev = read_attribute(disk, "dev")?;
        Ok(Self {
            name,
            disk_id: dev
                .parse()
                .map_err(|_| (disk.join("dev").display().to_string(), malformed(&dev)))?,
            disk_name: file_name(disk),
            first_sector: Sectors::new(read_number(sysfs, "start")?),
            diskseq: read_diskseq(disk),
        })
    }
}

/// The node of the place's whole disk: named as the disk, `!` standing for a slash, and with its number.
fn disk_node(place: &Place) -> Result<PathBuf, DiskError> {
    let node = Path::new("/dev").join(place.disk_name.replace('!', "/"));
    let right = fs::metadata(&node).is_ok_and(|metadata| {
        metadata.file_type().is_block_device() && device_number(metadata.rdev()) == place.disk_id
    });
    if right {
        Ok(node)
    } else {
        Err(DiskError::NoDiskNode {
            name: place.disk_name.clone(),
            id: place.disk_id.to_string(),
        })
    }
}

/// The device number in user space's `dev_t`, as `stat` gives it.
pub(crate) fn device_number(dev: u64) -> DeviceId {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the kernel's majors have 12 bits, its minors 20"
    )]
    DeviceId {
        major: nix::sys::stat::major(dev) as u32,
        minor: nix::sys::stat::minor(dev) as u32,
    }
}

/// The directory of a device in sysfs, symbolic links resolved, so that its parent is the disk of a partition.
pub(crate) fn sysfs_directory(id: DeviceId) -> io::Result<PathBuf> {
    Path::new("/sys/dev/block").join(id.to_string()).canonicalize()
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

fn read_attribute(directory: &Path, name: &str) -> Result<String, AttributeError> {
    let path = directory.join(name);
    fs::read_to_string(&path)
        .map(|text| text.trim().to_owned())
        .map_err(|source| (path.display().to_string(), source))
}

fn read_number(directory: &Path, name: &str) -> Result<u64, AttributeError> {
    let text = read_attribute(directory, name)?;
    text.parse()
        .map_err(|_| (directory.join(name).display().to_string(), malformed(&text)))
}

/// The sequence number of the disk, whose directory is `sysfs` or its parent (for a partition).
fn read_diskseq(sysfs: &Path) -> Option<u64> {
    let of_disk = |directory: &Path| read_number(directory, "diskseq").ok();
    of_disk(sysfs).or_else(|| of_disk(sysfs.canonicalize().ok()?.parent()?))
}

fn malformed(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("unexpected content {text:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_device_is_refused_with_the_remedy() {
        let text = |path: &str| BlockDevice::open(Path::new(path)).unwrap_err().to_string();
        assert!(text("/dev/no/such").starts_with("no device at /dev/no/such: "));
        for path in ["/dev", "/dev/null", "/proc/self/mountinfo"] {
            assert_eq!(
                text(path),
                format!("{path} is not a block device: give a disk or partition such as /dev/sdb1")
            );
        }
    }

    #[test]
    fn device_numbers_of_stat() {
        assert_eq!(
            device_number(nix::sys::stat::makedev(259, 70_000)),
            DeviceId {
                major: 259,
                minor: 70_000
            }
        );
    }
}

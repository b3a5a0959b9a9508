//! Disk errors: what was tried on which device, and the remedy.

use std::io;
use std::path::{Path, PathBuf};

/// Something about a block device or its file systems failed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Nothing is at the path.
    #[error("no device at {path}: {source}; `lsblk --paths` lists what there is")]
    NoDevice {
        /// The path as given.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The path is a file, a directory or a character device.
    #[error("{path} is not a block device: give a disk or partition such as /dev/sdb1")]
    NotBlock {
        /// The path as given.
        path: PathBuf,
    },
    /// The node can't be opened.
    #[error("can't open {path}: {source}{}", remedy_of_open(source))]
    Open {
        /// The node.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The device has no sectors.
    #[error("{path} has a capacity of 0 bytes: put a medium in, or bind the loop device to a file")]
    Empty {
        /// The node.
        path: PathBuf,
    },
    /// The kernel does not say what is needed about the device.
    #[error("can't read {what} of {path}: {source}")]
    Attribute {
        /// The node.
        path: PathBuf,
        /// The ioctl or the sysfs attribute.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// The whole disk of a partition has no node.
    #[error("no node for disk {name} ({id}) below /dev: mount devtmpfs on /dev, or create it with mknod")]
    NoDiskNode {
        /// The disk's kernel name.
        name: String,
        /// Its number, `major:minor`.
        id: String,
    },
    /// Direct reads can't reach the last bytes, or any.
    #[error(
        "{path} does not begin and end on a block of its disk ({logical_block} bytes): set a right partition table or size"
    )]
    Unaligned {
        /// The node.
        path: PathBuf,
        /// Logical block size of the disk in bytes.
        logical_block: u32,
    },
    /// The mount table can't be read.
    #[error("can't read {path}: {source}; mount /proc and /sys")]
    MountTable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A mount point can't be opened, or another file system is mounted over it.
    #[error("can't open the file system mounted at {mountpoint}: {why}")]
    MountPoint {
        /// The mount point.
        mountpoint: PathBuf,
        /// Why.
        why: String,
    },
    /// A directory, a character device, a socket.
    #[error("{path} is neither a regular file nor a block device: give an image file, a disk or a partition")]
    NotDisk {
        /// The path as given.
        path: PathBuf,
    },
    /// Somebody else uses it.
    #[error("{path} is in use: {holder}; end that first")]
    Busy {
        /// The path as given.
        path: PathBuf,
        /// Who, as far as that can be found.
        holder: String,
    },
    /// Whether somebody else uses it can't be found.
    #[error("can't take {path} for exclusive use: {source}")]
    Claim {
        /// The path as given.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The device that is there now is not the one that was opened, or it shrank.
    #[error("{path} is another device than before, or smaller: attach it again")]
    Replaced {
        /// The node.
        path: PathBuf,
    },
}

impl DiskError {
    pub(super) fn attribute(path: &Path, what: &str, source: impl Into<io::Error>) -> Self {
        Self::Attribute {
            path: path.to_owned(),
            what: what.to_owned(),
            source: source.into(),
        }
    }
}

fn remedy_of_open(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied => "; run as root",
        io::ErrorKind::ResourceBusy => "; another program holds it exclusively",
        _ => "",
    }
}

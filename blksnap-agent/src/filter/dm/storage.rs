//! Storage: where the kernel puts the old data of one origin.
//!
//! A file in a directory is a loop device: device-mapper claims what it stands on for itself, and a disk with a mounted
//! file system is claimed by that. The loop device does direct I/O, so that the kernel's copying needs no page cache, and
//! lets the file go when the last device on it is removed: whatever ends, nothing of it stays but the file, which the
//! journal names. A device, or ranges of one, that nobody else uses are used as they are.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statfs::{EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, fstatfs};
use nix::sys::statvfs::fstatvfs;

use super::error::DmError;
use crate::disk::device::device_number;
use crate::disk::mounts::Table;
use crate::disk::stack::Stack;
use crate::storage::DeviceExtent;
use crate::sys::{AlignedBuffer, loopdev};
use crate::units::{DeviceId, SECTOR_BYTES};

/// The part of a file system that stays free.
const RESERVE: u64 = 20;
/// How often a loop device is asked for: another one may be given the same.
const ATTEMPTS: u32 = 64;
/// What lengths are rounded up to, in bytes.
const UNIT: u64 = PIECE as u64;
/// Bytes that are written at once.
const PIECE: usize = 1 << 20;
/// How long a file is written ahead of its use.
const AHEAD: Duration = Duration::from_secs(2);

/// Where old data may be kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A file of its own in this directory, which grows.
    Directory(PathBuf),
    /// These ranges.
    Ranges(Vec<DeviceExtent>),
}

impl Place {
    /// For messages.
    #[must_use]
    pub fn shown(&self) -> String {
        match self {
            Self::Directory(path) => path.display().to_string(),
            Self::Ranges(ranges) => ranges
                .first()
                .map_or_else(String::new, |one| one.device.to_string()),
        }
    }

    /// All block devices that it stands on.
    ///
    /// # Errors
    /// It is not there, or nobody can tell.
    pub fn beneath(&self) -> Result<BTreeSet<DeviceId>, DmError> {
        match self {
            Self::Directory(path) => beneath_file(path),
            Self::Ranges(ranges) => Ok(ranges
                .iter()
                .flat_map(|range| beneath_device(range.device))
                .collect()),
        }
    }
}

/// The devices that a device stands on, itself included.
pub(super) fn beneath_device(device: DeviceId) -> BTreeSet<DeviceId> {
    let stack = Stack::beneath(Path::new("/sys/dev/block"), device);
    let disks = stack.disks.iter().map(|disk| disk.id);
    disks.chain([device]).collect()
}

/// The devices that the file system of a file stands on.
///
/// # Errors
/// It is not there, or nobody can tell.
pub(super) fn beneath_file(path: &Path) -> Result<BTreeSet<DeviceId>, DmError> {
    let file = File::open(path).map_err(failed("open", path))?;
    let table = Table::read()?;
    let mount = table.of_file(&file).map_err(failed("find the mount of", path))?;
    Ok(table.devices_beneath(mount))
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> DmError + 'a {
    move |source| DmError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

/// Storage of one origin in one snapshot.
#[derive(Debug)]
pub(super) struct Storage {
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    File {
        path: PathBuf,
        file: File,
        device: File,
        number: DeviceId,
        bytes: u64,
    },
    Ranges(Vec<DeviceExtent>),
}

impl Storage {
    /// Storage of at least `bytes` bytes in `place`; `name` is that of the file.
    ///
    /// # Errors
    /// There is no room, or the kernel has no loop devices.
    pub(super) fn make(place: &Place, name: &str, bytes: u64) -> Result<Self, DmError> {
        let directory = match place {
            Place::Ranges(ranges) => {
                return Ok(Self {
                    kind: Kind::Ranges(ranges.clone()),
                });
            }
            Place::Directory(directory) => directory,
        };
        let path = directory.join(name);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .map_err(failed("create", &path))?;
        let made = Self::over(&path, file, bytes);
        if made.is_err() {
            // The first error counts.
            let _ = fs::remove_file(&path);
        }
        made
    }

    fn over(path: &Path, file: File, bytes: u64) -> Result<Self, DmError> {
        let bytes = bytes.max(UNIT).next_multiple_of(UNIT);
        allocate(path, &file, bytes)?;
        write_ahead(path, &file, 0..bytes)?;
        let (device, number) = attach(&file).map_err(failed("make a loop device of", path))?;
        Ok(Self {
            kind: Kind::File {
                path: path.to_owned(),
                file,
                device,
                number,
                bytes,
            },
        })
    }

    /// The storage of an agent before this one, in a file that is a loop device already.
    ///
    /// # Errors
    /// The file or the loop device is gone.
    pub(super) fn adopt(path: &Path, number: DeviceId) -> Result<Self, DmError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)
            .map_err(failed("open", path))?;
        let node = PathBuf::from(format!("/dev/loop{}", number.minor));
        let device = open_node(&node).map_err(failed("open", &node))?;
        let bytes = file.metadata().map_err(failed("look at", path))?.len();
        Ok(Self {
            kind: Kind::File {
                path: path.to_owned(),
                file,
                device,
                number,
                bytes,
            },
        })
    }

    /// Ranges that an agent before this one used.
    pub(super) const fn of_ranges(ranges: Vec<DeviceExtent>) -> Self {
        Self {
            kind: Kind::Ranges(ranges),
        }
    }

    /// Where it is now, in the order of its bytes.
    pub(super) fn extents(&self) -> Vec<DeviceExtent> {
        match &self.kind {
            Kind::Ranges(ranges) => ranges.clone(),
            Kind::File { number, bytes, .. } => vec![DeviceExtent {
                device: *number,
                sector: 0,
                count: bytes / SECTOR_BYTES,
            }],
        }
    }

    /// Makes it longer by `bytes` bytes.
    ///
    /// # Errors
    /// It is of a fixed size, or there is no room.
    pub(super) fn grow(&mut self, by: u64) -> Result<(), DmError> {
        match &mut self.kind {
            Kind::Ranges(ranges) => {
                let device = ranges
                    .first()
                    .map_or_else(String::new, |range| range.device.to_string());
                Err(DmError::storage(device, "ranges of a device do not grow"))
            }
            Kind::File {
                path,
                file,
                device,
                bytes,
                ..
            } => {
                let length = bytes.saturating_add(by).next_multiple_of(UNIT);
                allocate(path, file, length)?;
                write_ahead(path, file, *bytes..length)?;
                loopdev::set_capacity(device)
                    .map_err(|errno| failed("tell the new length of", path)(errno.into()))?;
                *bytes = length;
                Ok(())
            }
        }
    }

    /// Removes the file. The loop device goes with its last user.
    ///
    /// # Errors
    /// It can't be removed.
    pub(super) fn remove(self) -> Result<(), DmError> {
        match self.kind {
            Kind::Ranges(_) => Ok(()),
            Kind::File { path, .. } => remove_file(&path),
        }
    }
}

/// Removes a file of storage, if it is there.
///
/// # Errors
/// It stays.
pub(super) fn remove_file(path: &Path) -> Result<(), DmError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Makes the file so long, with room for all of it, and leaves the file system its reserve.
fn allocate(path: &Path, file: &File, length: u64) -> Result<(), DmError> {
    let of_errno = |action| move |errno: Errno| failed(action, path)(errno.into());
    let space = fstatvfs(file).map_err(of_errno("ask for the space of"))?;
    let has = file.metadata().map_err(failed("look at", path))?.blocks() * SECTOR_BYTES;
    let available = space.blocks_available().saturating_mul(space.fragment_size());
    let reserve = space.blocks().saturating_mul(space.fragment_size()) / RESERVE;
    let more = length.saturating_sub(has);
    if more > available.saturating_sub(reserve) {
        return Err(DmError::storage(
            path.display(),
            format_args!(
                "{more} bytes more are wanted, its file system has {available} left, and {reserve} are kept free; free some space, or give another place"
            ),
        ));
    }
    let bytes = i64::try_from(length).unwrap_or(i64::MAX);
    match fallocate(file.as_fd(), FallocateFlags::empty(), 0, bytes) {
        // A hole then; what is written finds room, or the snapshot is given up.
        Err(Errno::EOPNOTSUPP) => file.set_len(length).map_err(failed("lengthen", path)),
        other => other.map_err(of_errno("allocate")),
    }
}

/// Writes zeros to these bytes of the file, as far as that goes in [`AHEAD`].
///
/// ext4 and XFS note of space that was allocated and never written that it was written, with each piece of old data; whoever
/// writes to an origin for the first time would wait for that. Other file systems put what is written again elsewhere,
/// or have no direct I/O: nothing is gained there.
fn write_ahead(path: &Path, file: &File, bytes: Range<u64>) -> Result<(), DmError> {
    let kind = fstatfs(file).map_err(|errno| failed("look at the file system of", path)(errno.into()))?;
    if ![EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC].contains(&kind.filesystem_type()) {
        return Ok(());
    }
    let direct = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_DIRECT)
        .open(path)
        .map_err(failed("open", path))?;
    let zeros = AlignedBuffer::zeroed(PIECE);
    let started = Instant::now();
    for at in bytes.step_by(PIECE) {
        if started.elapsed() > AHEAD {
            break;
        }
        direct
            .write_all_at(zeros.as_slice(), at)
            .map_err(failed("write", path))?;
    }
    direct.sync_data().map_err(failed("flush", path))
}

fn open_node(node: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(node)
}

/// Makes a loop device of `file`.
fn attach(file: &File) -> io::Result<(File, DeviceId)> {
    let control = open_node(Path::new("/dev/loop-control"))?;
    for _ in 0..ATTEMPTS {
        let number = loopdev::get_free(&control)?;
        let device = open_node(Path::new(&format!("/dev/loop{number}")))?;
        match loopdev::configure(&device, file) {
            Ok(()) => {
                let id = device_number(device.metadata()?.rdev());
                return Ok((device, id));
            }
            Err(Errno::EBUSY) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(io::Error::from(Errno::EBUSY))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::fiemap::{ExtentFlags, fiemap};

    #[test]
    fn a_file_is_written_before_it_is_used() {
        // Whatever file system this is on: a file of ours is as it should be there, or is left alone.
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("old");
        let file = File::create_new(&path).unwrap();
        allocate(&path, &file, 3 * UNIT).unwrap();
        write_ahead(&path, &file, UNIT..3 * UNIT).unwrap();
        assert_eq!(fs::read(&path).unwrap(), vec![0; 3 * PIECE]);
        let kind = fstatfs(&file).unwrap().filesystem_type();
        if ![EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC].contains(&kind) {
            return;
        }
        for extent in fiemap(&file).unwrap() {
            let is_unwritten = extent.flags.contains(ExtentFlags::UNWRITTEN);
            assert_eq!(is_unwritten, extent.logical < UNIT, "{extent:?}");
        }
    }
}

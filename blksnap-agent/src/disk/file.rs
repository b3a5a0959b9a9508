//! File disk: a regular file or a block device, through the page cache.
//!
//! It is read and written at offsets, so that nobody's file position matters, though it is moved by asking for holes.
//! Other programs that use the same file see the same bytes. A file that is shorter than the disk is an error of the
//! bytes that are missing, never zeroes.
//!
//! # Zeroes
//! fallocate(2) makes them: a hole, or zeroes that stay allocated. Where neither is offered (file system, device,
//! alignment) they are written, unless speed was asked for.
//!
//! # Durability
//! fdatasync(2). Once that failed it fails for good: the kernel tells of a write that was lost only once, and to whom
//! is chance.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};
use nix::unistd::{Whence, lseek};

use super::claim::Claim;
use super::device::{device_number, sysfs_directory};
use super::{Allocation, Disk, DiskError, Zero};
use crate::sys::{cached, ioctl};

/// Most pieces that are looked for in one answer about allocation: each is two system calls.
const MAX_SEEKS: usize = 1 << 12;

/// Zeroes written at once where nothing faster is offered.
static ZEROES: [u8; 1 << 20] = [0; 1 << 20];

/// A regular file or a block device.
#[derive(Debug)]
pub struct FileDisk {
    name: String,
    file: Arc<File>,
    size: u64,
    logical_block: u32,
    minimum_io: u32,
    /// A block device, not a regular file.
    device: bool,
    /// What was written is lost: fdatasync(2) or [`FileDisk::written_back`] said so, and the kernel will not say it again.
    lost: AtomicBool,
    claim: OnceLock<Claim>,
}

impl FileDisk {
    /// Opens the regular file or block device at `path`, all of it; for writing, too, if `writable` is set.
    ///
    /// # Errors
    /// It can't be opened so, its size can't be found, or it is something else.
    pub fn open(path: &Path, writable: bool) -> Result<Self, DiskError> {
        let opened = |source| DiskError::Open {
            path: path.to_owned(),
            source,
        };
        let file = File::options()
            .read(true)
            .write(writable)
            .open(path)
            .map_err(opened)?;
        let metadata = file.metadata().map_err(opened)?;
        let size = if metadata.is_file() {
            metadata.len()
        } else if metadata.file_type().is_block_device() {
            ioctl::blkgetsize64(&file).map_err(|errno| DiskError::attribute(path, "BLKGETSIZE64", errno))?
        } else {
            return Err(DiskError::NotDisk {
                path: path.to_owned(),
            });
        };
        Ok(Self::new(path.display().to_string(), Arc::new(file), size))
    }

    /// The first `size` bytes of `file`, which is open for reading, and for writing if it is to be written.
    #[must_use]
    pub fn new(name: impl Into<String>, file: Arc<File>, size: u64) -> Self {
        let metadata = file.metadata().ok();
        let device = metadata
            .as_ref()
            .is_some_and(|metadata| metadata.file_type().is_block_device());
        let power = |bytes: u32| bytes.is_power_of_two().then_some(bytes);
        let (logical_block, minimum_io) = if device {
            (ioctl::blksszget(&file).ok(), ioctl::blkiomin(&file).ok())
        } else {
            let block = metadata.and_then(|metadata| u32::try_from(metadata.blksize()).ok());
            (None, block)
        };
        let logical_block = logical_block.and_then(power).unwrap_or(512).max(512);
        Self {
            name: name.into(),
            file,
            size,
            logical_block,
            minimum_io: minimum_io.and_then(power).unwrap_or(512).max(logical_block),
            device,
            lost: AtomicBool::new(false),
            claim: OnceLock::new(),
        }
    }

    /// Takes it for exclusive use, as long as this disk lives: other programs that ask for that (file systems, LVM,
    /// qemu, another agent) are refused. It is not when it was claimed already by this disk.
    ///
    /// # Errors
    /// Somebody else has it: the error says who, as far as that can be found.
    pub fn claim(&self) -> Result<(), DiskError> {
        if self.claim.get().is_none() {
            let claim = Claim::new(self)?;
            // Another thread's claim is as good.
            let _ = self.claim.set(claim);
        }
        Ok(())
    }

    /// The file.
    #[must_use]
    pub const fn shared(&self) -> &Arc<File> {
        &self.file
    }

    /// Whether it is a block device.
    #[must_use]
    pub const fn is_device(&self) -> bool {
        self.device
    }

    /// Whether sysfs calls the device rotational; a partition's disk has the queue.
    #[must_use]
    pub fn is_rotational(&self) -> bool {
        let Ok(metadata) = self.file.metadata() else {
            return false;
        };
        self.device
            && sysfs_directory(device_number(metadata.rdev())).is_ok_and(|directory| {
                ["queue", "../queue"]
                    .iter()
                    .find_map(|queue| std::fs::read_to_string(directory.join(queue).join("rotational")).ok())
                    .is_some_and(|told| told.trim() == "1")
            })
    }

    /// Hints that a range will be read soon.
    ///
    /// # Errors
    /// The hint can't be followed.
    pub fn read_ahead(&self, offset: u64, length: u64) -> io::Result<()> {
        let (Ok(position), Ok(bytes)) = (i64::try_from(offset), i64::try_from(length)) else {
            return Ok(());
        };
        let advice = PosixFadviseAdvice::POSIX_FADV_WILLNEED;
        Ok(posix_fadvise(&*self.file, position, bytes, advice)?)
    }

    /// What the file is known by: its name, where that is a path.
    pub(super) fn path(&self) -> &str {
        &self.name
    }

    fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        let within = offset.checked_add(length).is_some_and(|end| end <= self.size);
        within.then_some(()).ok_or_else(|| Errno::EINVAL.into())
    }

    /// The first data (`SeekData`) or hole (`SeekHole`) from `offset` on; `None` if there is none, and an error if
    /// the file system can't tell.
    fn seek(&self, offset: u64, whence: Whence) -> Result<Option<u64>, Errno> {
        let position = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        match lseek(&*self.file, position, whence) {
            Ok(found) => Ok(u64::try_from(found).ok()),
            Err(Errno::ENXIO) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// fallocate(2) that keeps the file's size; false if it is not offered here.
    fn allocate(&self, offset: u64, length: u64, flags: FallocateFlags) -> Result<bool, Errno> {
        let (Ok(offset), Ok(length)) = (i64::try_from(offset), i64::try_from(length)) else {
            return Err(Errno::EFBIG);
        };
        let flags = flags | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        loop {
            return match fallocate(&*self.file, flags, offset, length) {
                Ok(()) => Ok(true),
                Err(Errno::EINTR) => continue,
                // A block device takes whole blocks only, which it says with EINVAL.
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL | Errno::ENODEV) => Ok(false),
                Err(errno) => Err(errno),
            };
        }
    }

    /// Zeroes by what the file system or device offers; false if it offers nothing.
    fn zero_by_allocation(&self, offset: u64, length: u64, zero: Zero, fast: bool) -> Result<bool, Errno> {
        if zero == Zero::Deallocate && self.allocate(offset, length, FallocateFlags::FALLOC_FL_PUNCH_HOLE)? {
            return Ok(true);
        }
        // The kernel may write zeroes to a block device one by one here.
        let slow = fast && self.device;
        Ok(!slow && self.allocate(offset, length, FallocateFlags::FALLOC_FL_ZERO_RANGE)?)
    }

    /// Writes zeroes as bytes.
    fn zero_by_writing(&self, offset: u64, length: u64) -> io::Result<()> {
        let mut done = 0;
        while done < length {
            let piece = usize::try_from(length - done)
                .unwrap_or(usize::MAX)
                .min(ZEROES.len());
            self.file.write_all_at(&ZEROES[..piece], offset + done)?;
            done += piece as u64;
        }
        Ok(())
    }

    /// Makes sure that the kernel has lost nothing of what was written through its page cache: a page whose write-back
    /// failed looks right until it is dropped from memory, and then the disk has what was there before. Who reads what
    /// must be what was written asks this after the data came.
    ///
    /// # Errors
    /// Something is lost; this says so for good.
    pub fn written_back(&self) -> io::Result<()> {
        if self.lost.load(Ordering::Acquire) {
            return Err(Errno::EIO.into());
        }
        match cached::written_back(&self.file) {
            // A file system that knows no such thing.
            Ok(()) | Err(Errno::ESPIPE | Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP) => Ok(()),
            Err(errno) => {
                self.lost.store(true, Ordering::Release);
                Err(errno.into())
            }
        }
    }

    /// Data and holes of a regular file.
    fn look_for_holes(&self, offset: u64, end: u64, most: usize) -> io::Result<Vec<Allocation>> {
        if self.file.metadata()?.len() < end {
            // Behind the end of the file everything looks like a hole, which would pass for zeroes.
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut pieces = Vec::new();
        let mut position = offset;
        while position < end && pieces.len() < most {
            let data = self.seek(position, Whence::SeekData)?.unwrap_or(end).min(end);
            let hole = data > position;
            let next = if hole {
                data
            } else {
                // The end of the file counts as a hole, so there always is one.
                let hole = self.seek(position, Whence::SeekHole)?.unwrap_or(end).min(end);
                hole.max(position + 1)
            };
            pieces.push(Allocation {
                length: next - position,
                hole,
            });
            position = next;
        }
        Ok(pieces)
    }
}

impl Disk for FileDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn logical_block(&self) -> u32 {
        self.logical_block
    }

    fn minimum_io(&self) -> u32 {
        self.minimum_io
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.check(offset, buffer.len() as u64)?;
        self.file.read_exact_at(buffer, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.check(offset, data.len() as u64)?;
        self.file.write_all_at(data, offset)
    }

    fn zero_at(&self, offset: u64, length: u64, zero: Zero, fast: bool) -> io::Result<()> {
        self.check(offset, length)?;
        if length == 0 || self.zero_by_allocation(offset, length, zero, fast)? {
            return Ok(());
        }
        if fast {
            return Err(Errno::EOPNOTSUPP.into());
        }
        self.zero_by_writing(offset, length)
    }

    fn discard_at(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check(offset, length)?;
        if length == 0 || self.allocate(offset, length, FallocateFlags::FALLOC_FL_PUNCH_HOLE)? || !self.device
        {
            return Ok(());
        }
        // A device that discards, but does not promise zeroes.
        match ioctl::blkdiscard(&self.file, offset, length) {
            Ok(()) | Err(Errno::EOPNOTSUPP | Errno::EINVAL) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn flush(&self) -> io::Result<()> {
        if self.lost.load(Ordering::Acquire) {
            return Err(Errno::EIO.into());
        }
        self.file
            .sync_data()
            .inspect_err(|_| self.lost.store(true, Ordering::Release))
    }

    fn allocation(&self, offset: u64, length: u64, most: usize) -> io::Result<Vec<Allocation>> {
        self.check(offset, length)?;
        let unknown = || vec![Allocation { length, hole: false }];
        if self.device {
            return Ok(unknown());
        }
        match self.look_for_holes(offset, offset + length, most.clamp(1, MAX_SEEKS)) {
            Err(error)
                if [Errno::EINVAL, Errno::EOPNOTSUPP]
                    .iter()
                    .any(|errno| error.raw_os_error() == Some(*errno as i32)) =>
            {
                Ok(unknown())
            }
            pieces => pieces,
        }
    }

    fn file(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }
}

#[cfg(test)]
mod tests;

//! File: an export over a raw image file or a block device.
//!
//! The file is read at offsets; nobody's file position matters, though it is moved by asking for holes. A file that is
//! shorter than the image is an error of that image, never zeroes. A read-only export's file must not change while
//! it is exported; a writable one ([`FileExport::writable`]) is changed through the export.
//!
//! # Writes
//! A write is a pwrite(2), made durable by fdatasync(2) where FUA asks for it; a flush is fdatasync(2). All clients
//! share the page cache and the file, so a flush on one connection covers the writes of all.
//!
//! Zeroes and trims use fallocate(2): a hole where the client allows one, else zeroes that stay allocated. Where
//! neither is offered (file system, block device, alignment) zeroes are written, unless the client asked for speed;
//! a trim is then left alone.
//!
//! # Contexts
//! `base:allocation` comes from `SEEK_DATA` and `SEEK_HOLE` (lseek(2)): a hole is not allocated and reads as zeroes.
//! A file system without them, and a block device, reports one extent of data, which is always right.
//! What changed comes from [`super::changes`].

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};
use nix::sys::stat::{major, minor};
use nix::unistd::{Whence, lseek};

use super::changes::Changes;
use super::export::{Export, ExportError, ZeroOptions};
use super::proto::context::BASE_ALLOCATION;
use super::proto::wire::AllocationState;
use super::proto::{BlockSizes, ContextName, StatusExtent};
use crate::cbt::ReadMap;
use crate::sys::ioctl;
use crate::units::Extent;

/// Most extents that are looked for in one answer about allocation: each is two system calls.
const MAX_SEEKS: usize = 1 << 12;

/// Zeroes written at once where nothing faster is offered.
static ZEROES: [u8; 1 << 20] = [0; 1 << 20];

/// A raw image file or a block device.
#[derive(Debug)]
pub struct FileExport {
    name: String,
    description: String,
    file: Arc<File>,
    size: u64,
    block_sizes: BlockSizes,
    writable: bool,
    rotational: bool,
    /// fdatasync(2) failed once: what it did not write is lost, and it will not say so again.
    lost: AtomicBool,
    changes: Option<Changes>,
}

/// A file that can't be exported.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A call to the kernel failed.
    #[error("export {path}: {action}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("export {0}: only a regular file or a block device can be served")]
    Kind(PathBuf),
}

impl FileExport {
    /// Exports the whole of the regular file or block device `path` as `name`, for reading, and for writing if
    /// `writable` is set.
    ///
    /// # Errors
    /// It can't be opened so, its size can't be found, or it is something else.
    pub fn open(name: impl Into<String>, path: &Path, writable: bool) -> Result<Self, OpenError> {
        let failed = |action, source| OpenError::Io {
            path: path.to_owned(),
            action,
            source,
        };
        let file = File::options()
            .read(true)
            .write(writable)
            .open(path)
            .map_err(|source| failed("open it", source))?;
        let metadata = file
            .metadata()
            .map_err(|source| failed("ask what it is", source))?;
        let (size, rotational) = if metadata.is_file() {
            (metadata.len(), false)
        } else if metadata.file_type().is_block_device() {
            let size =
                ioctl::blkgetsize64(&file).map_err(|errno| failed("ask for its size", errno.into()))?;
            (size, is_rotational(metadata.rdev()))
        } else {
            return Err(OpenError::Kind(path.to_owned()));
        };
        let export = Self::new(name, Arc::new(file), size).with_rotational(rotational);
        Ok(if writable { export.writable() } else { export })
    }

    /// Exports the first `size` bytes of `file` as `name`, read-only.
    #[must_use]
    pub fn new(name: impl Into<String>, file: Arc<File>, size: u64) -> Self {
        Self {
            name: name.into(),
            description: String::new(),
            file,
            size,
            block_sizes: BlockSizes::DEFAULT,
            writable: false,
            rotational: false,
            lost: AtomicBool::new(false),
            changes: None,
        }
    }

    /// With this sentence for people.
    #[must_use]
    pub fn with_description(mut self, description: impl Into<String>) -> Self {
        self.description = description.into();
        self
    }

    /// With these block sizes.
    #[must_use]
    pub const fn with_block_sizes(mut self, sizes: BlockSizes) -> Self {
        self.block_sizes = sizes;
        self
    }

    /// With writes of every kind. The file must be open for reading and writing.
    #[must_use]
    pub const fn writable(mut self) -> Self {
        self.writable = true;
        self
    }

    /// With the hint that the medium rotates.
    #[must_use]
    pub const fn with_rotational(mut self, rotational: bool) -> Self {
        self.rotational = rotational;
        self
    }

    /// With the context `qemu:dirty-bitmap:last` that tells these extents as dirty: ascending, without overlaps.
    /// Without this or the next call there is no such context, and a client can't mistake "not known" for "nothing
    /// changed".
    #[must_use]
    pub fn with_dirty(mut self, dirty: impl Into<Arc<[Extent]>>) -> Self {
        self.changes = Some(Changes::last(dirty, self.size));
        self
    }

    /// With the contexts of all changes that `map` knows of; the file is the device at the instant of the map.
    #[must_use]
    pub fn with_changes(mut self, map: Arc<ReadMap>) -> Self {
        self.changes = Some(Changes::of(map, self.size));
        self
    }

    fn failed(&self, action: &'static str, offset: u64, source: io::Error) -> ExportError {
        ExportError::Io {
            name: self.name.clone(),
            action,
            offset,
            source,
        }
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

    /// Refuses what would change a read-only export; the server does so too.
    fn check_writable(&self) -> Result<(), ExportError> {
        if self.writable {
            Ok(())
        } else {
            Err(ExportError::ReadOnly(self.name.clone()))
        }
    }

    /// Makes what was written durable if `fua` is set. Once that failed it fails for good: the kernel reports a
    /// write that was lost only once, to whom is chance.
    fn persist(&self, fua: bool, offset: u64) -> Result<(), ExportError> {
        if !fua {
            return Ok(());
        }
        let synced = match self.lost.load(Ordering::Acquire) {
            true => Err(io::Error::from(Errno::EIO)),
            false => self.file.sync_data(),
        };
        synced.map_err(|source| {
            self.lost.store(true, Ordering::Release);
            self.failed("make durable", offset, source)
        })
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
    fn zero_by_allocation(&self, offset: u64, length: u64, options: ZeroOptions) -> Result<bool, Errno> {
        if !options.no_hole && self.allocate(offset, length, FallocateFlags::FALLOC_FL_PUNCH_HOLE)? {
            return Ok(true);
        }
        // The kernel may write zeroes to a block device one by one here.
        let slow = options.fast && !self.file.metadata().is_ok_and(|metadata| metadata.is_file());
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

    fn allocation(&self, offset: u64, end: u64, most: usize) -> io::Result<Vec<StatusExtent>> {
        let metadata = self.file.metadata()?;
        if !metadata.is_file() {
            return Err(Errno::EOPNOTSUPP.into());
        }
        if metadata.len() < end {
            // Behind the end of the file everything looks like a hole, which would pass for zeroes.
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let hole = (AllocationState::HOLE | AllocationState::ZERO).bits();
        let mut extents = Vec::new();
        let mut position = offset;
        while position < end && extents.len() < most {
            let data = self.seek(position, Whence::SeekData)?.unwrap_or(end).min(end);
            let (next, flags) = if data > position {
                (data, hole)
            } else {
                // The end of the file counts as a hole, so there always is one.
                let hole = self.seek(position, Whence::SeekHole)?.unwrap_or(end).min(end);
                (hole.max(position + 1), AllocationState::empty().bits())
            };
            extents.push(StatusExtent {
                length: next - position,
                flags,
            });
            position = next;
        }
        Ok(extents)
    }
}

/// Whether sysfs calls the device rotational; a partition's disk has the queue.
fn is_rotational(device: u64) -> bool {
    let directory = format!("/sys/dev/block/{}:{}", major(device), minor(device));
    ["queue", "../queue"]
        .iter()
        .find_map(|queue| std::fs::read_to_string(format!("{directory}/{queue}/rotational")).ok())
        .is_some_and(|told| told.trim() == "1")
}

impl Export for FileExport {
    fn name(&self) -> &str {
        &self.name
    }

    fn description(&self) -> &str {
        &self.description
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn block_sizes(&self) -> BlockSizes {
        self.block_sizes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), ExportError> {
        self.file
            .read_exact_at(buffer, offset)
            .map_err(|source| self.failed("read", offset, source))
    }

    fn contexts(&self) -> Vec<ContextName> {
        let mut contexts = vec![ContextName::base_allocation()];
        contexts.extend(self.changes.iter().flat_map(Changes::contexts));
        contexts
    }

    fn refuse_context(&self, query: &str) -> Option<String> {
        Some(self.changes.as_ref()?.refusal(query)?.to_string())
    }

    fn block_status(
        &self,
        context: &ContextName,
        offset: u64,
        length: u64,
        most: usize,
    ) -> Result<Vec<StatusExtent>, ExportError> {
        let end = offset.saturating_add(length).min(self.size);
        match (context.as_str(), &self.changes) {
            (BASE_ALLOCATION, _) => match self.allocation(offset, end, most.min(MAX_SEEKS)) {
                Ok(extents) => Ok(extents),
                Err(error)
                    if [Errno::EINVAL, Errno::EOPNOTSUPP]
                        .iter()
                        .any(|errno| error.raw_os_error() == Some(*errno as i32)) =>
                {
                    Ok(vec![StatusExtent {
                        length,
                        flags: AllocationState::empty().bits(),
                    }])
                }
                Err(error) => Err(self.failed("look for holes", offset, error)),
            },
            (context, Some(changes)) => {
                changes
                    .status(context, offset, end, most)
                    .map_err(|error| ExportError::Changes {
                        name: self.name.clone(),
                        reason: error.to_string(),
                    })
            }
            _ => Err(ExportError::NoContext {
                name: self.name.clone(),
                context: context.as_str().to_owned(),
            }),
        }
    }

    fn read_only(&self) -> bool {
        !self.writable
    }

    fn rotational(&self) -> bool {
        self.rotational
    }

    fn file(&self) -> Option<&Arc<File>> {
        Some(&self.file)
    }

    fn write_at(&self, data: Bytes, offset: u64, fua: bool) -> Result<(), ExportError> {
        self.check_writable()?;
        self.file
            .write_all_at(&data, offset)
            .map_err(|source| self.failed("write", offset, source))?;
        self.persist(fua, offset)
    }

    fn trim(&self, offset: u64, length: u64, fua: bool) -> Result<(), ExportError> {
        self.check_writable()?;
        if length > 0 {
            self.allocate(offset, length, FallocateFlags::FALLOC_FL_PUNCH_HOLE)
                .map_err(|errno| self.failed("discard", offset, errno.into()))?;
        }
        self.persist(fua, offset)
    }

    fn write_zeroes(&self, offset: u64, length: u64, options: ZeroOptions) -> Result<(), ExportError> {
        self.check_writable()?;
        let failed = |source| self.failed("write zeroes", offset, source);
        let zeroed = length == 0
            || self
                .zero_by_allocation(offset, length, options)
                .map_err(|errno| failed(errno.into()))?;
        if !zeroed && options.fast {
            return Err(ExportError::NotFast {
                name: self.name.clone(),
                offset,
            });
        }
        if !zeroed {
            self.zero_by_writing(offset, length).map_err(failed)?;
        }
        self.persist(options.fua, offset)
    }

    fn flush(&self) -> Result<(), ExportError> {
        // Nothing is written through a read-only export, so there is nothing to make durable.
        self.persist(self.writable, 0)
    }

    fn cache(&self, offset: u64, length: u64) -> Result<(), ExportError> {
        let (Ok(position), Ok(bytes)) = (i64::try_from(offset), i64::try_from(length)) else {
            return Ok(());
        };
        posix_fadvise(
            &*self.file,
            position,
            bytes,
            PosixFadviseAdvice::POSIX_FADV_WILLNEED,
        )
        .map_err(|errno| self.failed("read ahead", offset, errno.into()))
    }
}

#[cfg(test)]
mod tests;

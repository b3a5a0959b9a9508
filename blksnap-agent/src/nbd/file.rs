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
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use super::changes::Changes;
use super::export::{Export, ExportError, ZeroOptions};
use super::proto::context::BASE_ALLOCATION;
use super::proto::wire::AllocationState;
use super::proto::{BlockSizes, ContextName, StatusExtent};
use crate::cbt::ReadMap;
use crate::disk::{Disk, DiskError, FileDisk, Zero};
use crate::units::Extent;

/// A raw image file or a block device.
#[derive(Debug)]
pub struct FileExport {
    name: String,
    description: String,
    disk: FileDisk,
    block_sizes: BlockSizes,
    writable: bool,
    rotational: bool,
    changes: Option<Changes>,
}

impl FileExport {
    /// Exports the whole of the regular file or block device `path` as `name`, for reading, and for writing if
    /// `writable` is set.
    ///
    /// # Errors
    /// It can't be opened so, its size can't be found, or it is something else.
    pub fn open(name: impl Into<String>, path: &Path, writable: bool) -> Result<Self, DiskError> {
        let disk = FileDisk::open(path, writable)?;
        let rotational = disk.is_rotational();
        let export = Self::over(name.into(), disk).with_rotational(rotational);
        Ok(if writable { export.writable() } else { export })
    }

    /// Exports the first `size` bytes of `file` as `name`, read-only.
    #[must_use]
    pub fn new(name: impl Into<String>, file: Arc<File>, size: u64) -> Self {
        let name = name.into();
        Self::over(name.clone(), FileDisk::new(name, file, size))
    }

    fn over(name: String, disk: FileDisk) -> Self {
        Self {
            name,
            description: String::new(),
            disk,
            block_sizes: BlockSizes::DEFAULT,
            writable: false,
            rotational: false,
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
        self.changes = Some(Changes::last(dirty, self.disk.size()));
        self
    }

    /// With the contexts of all changes that `map` knows of; the file is the device at the instant of the map.
    #[must_use]
    pub fn with_changes(mut self, map: Arc<ReadMap>) -> Self {
        self.changes = Some(Changes::of(map, self.disk.size()));
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

    /// Refuses what would change a read-only export; the server does so too.
    fn check_writable(&self) -> Result<(), ExportError> {
        if self.writable {
            Ok(())
        } else {
            Err(ExportError::ReadOnly(self.name.clone()))
        }
    }

    /// Makes what was written durable if `fua` is set.
    fn persist(&self, fua: bool, offset: u64) -> Result<(), ExportError> {
        if !fua {
            return Ok(());
        }
        self.disk
            .flush()
            .map_err(|source| self.failed("make durable", offset, source))
    }

    /// What `base:allocation` tells of a range.
    fn allocation(&self, offset: u64, length: u64, most: usize) -> io::Result<Vec<StatusExtent>> {
        let flags = |hole| match hole {
            true => AllocationState::HOLE | AllocationState::ZERO,
            false => AllocationState::empty(),
        };
        let pieces = self.disk.allocation(offset, length, most)?;
        Ok(pieces
            .into_iter()
            .map(|piece| StatusExtent {
                length: piece.length,
                flags: flags(piece.hole).bits(),
            })
            .collect())
    }
}

impl Export for FileExport {
    fn name(&self) -> &str {
        &self.name
    }

    fn description(&self) -> &str {
        &self.description
    }

    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn block_sizes(&self) -> BlockSizes {
        self.block_sizes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), ExportError> {
        self.disk
            .read_at(buffer, offset)
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
        let end = offset.saturating_add(length).min(self.disk.size());
        match (context.as_str(), &self.changes) {
            (BASE_ALLOCATION, _) => self
                .allocation(offset, end.saturating_sub(offset), most)
                .map_err(|source| self.failed("look for holes", offset, source)),
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
        Some(self.disk.shared())
    }

    fn write_at(&self, data: Bytes, offset: u64, fua: bool) -> Result<(), ExportError> {
        self.check_writable()?;
        self.disk
            .write_at(&data, offset)
            .map_err(|source| self.failed("write", offset, source))?;
        self.persist(fua, offset)
    }

    fn trim(&self, offset: u64, length: u64, fua: bool) -> Result<(), ExportError> {
        self.check_writable()?;
        self.disk
            .discard_at(offset, length)
            .map_err(|source| self.failed("discard", offset, source))?;
        self.persist(fua, offset)
    }

    fn write_zeroes(&self, offset: u64, length: u64, options: ZeroOptions) -> Result<(), ExportError> {
        self.check_writable()?;
        let zero = if options.no_hole {
            Zero::Keep
        } else {
            Zero::Deallocate
        };
        match self.disk.zero_at(offset, length, zero, options.fast) {
            Err(error) if options.fast && error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                return Err(ExportError::NotFast {
                    name: self.name.clone(),
                    offset,
                });
            }
            zeroed => zeroed.map_err(|source| self.failed("write zeroes", offset, source))?,
        }
        self.persist(options.fua, offset)
    }

    fn flush(&self) -> Result<(), ExportError> {
        // Nothing is written through a read-only export, so there is nothing to make durable.
        self.persist(self.writable, 0)
    }

    fn cache(&self, offset: u64, length: u64) -> Result<(), ExportError> {
        self.disk
            .read_ahead(offset, length)
            .map_err(|source| self.failed("read ahead", offset, source))
    }
}

#[cfg(test)]
mod tests;

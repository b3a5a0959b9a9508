//! File: an export over a raw image file.
//!
//! The file is read at offsets; nobody's file position matters, though it is moved by asking for holes. It must not
//! change while it is exported. A file that is shorter than the image is an error of that image, never zeroes.
//!
//! `base:allocation` comes from `SEEK_DATA` and `SEEK_HOLE` (lseek(2)): a hole is not allocated and reads as zeroes.
//! A file system without them reports one extent of data, which is always right. `qemu:dirty-bitmap:last` is served
//! when the extents that changed are given.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::unistd::{Whence, lseek};

use super::export::{Export, ExportError};
use super::proto::context::{BASE_ALLOCATION, DIRTY_BITMAP_LAST};
use super::proto::wire::{AllocationState, BitmapState};
use super::proto::{BlockSizes, ContextName, StatusExtent};
use crate::units::Extent;

/// A raw image file, read-only.
#[derive(Debug)]
pub struct FileExport {
    name: String,
    description: String,
    file: Arc<File>,
    size: u64,
    block_sizes: BlockSizes,
    dirty: Option<Arc<[Extent]>>,
}

impl FileExport {
    /// Exports the first `size` bytes of `file` as `name`.
    #[must_use]
    pub fn new(name: impl Into<String>, file: Arc<File>, size: u64) -> Self {
        Self {
            name: name.into(),
            description: String::new(),
            file,
            size,
            block_sizes: BlockSizes::DEFAULT,
            dirty: None,
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

    /// With the context `qemu:dirty-bitmap:last` that tells these extents as dirty: ascending, without overlaps.
    /// Without this call there is no such context, and a client can't mistake "not known" for "nothing changed".
    #[must_use]
    pub fn with_dirty(mut self, dirty: impl Into<Arc<[Extent]>>) -> Self {
        self.dirty = Some(dirty.into());
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

/// The range from `offset` to `end` as dirty and clean extents, at most `most`.
fn dirty_status(dirty: &[Extent], offset: u64, end: u64, most: usize) -> Vec<StatusExtent> {
    let mut extents = Vec::new();
    let mut position = offset;
    let mut push = |until: u64, flags: BitmapState, position: &mut u64| {
        if until > *position {
            extents.push(StatusExtent {
                length: until - *position,
                flags: flags.bits(),
            });
            *position = until;
        }
        extents.len() < most
    };
    let first = dirty.partition_point(|extent| extent.end() <= offset);
    for extent in &dirty[first..] {
        if extent.offset >= end
            || !push(extent.offset, BitmapState::empty(), &mut position)
            || !push(extent.end().min(end), BitmapState::DIRTY, &mut position)
        {
            break;
        }
    }
    push(end, BitmapState::empty(), &mut position);
    extents.truncate(most);
    extents
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
        if self.dirty.is_some() {
            contexts.push(ContextName::dirty_bitmap_last());
        }
        contexts
    }

    fn block_status(
        &self,
        context: &ContextName,
        offset: u64,
        length: u64,
        most: usize,
    ) -> Result<Vec<StatusExtent>, ExportError> {
        let end = offset.saturating_add(length).min(self.size);
        match (context.as_str(), &self.dirty) {
            (BASE_ALLOCATION, _) => match self.allocation(offset, end, most) {
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
            (DIRTY_BITMAP_LAST, Some(dirty)) => Ok(dirty_status(dirty, offset, end, most)),
            _ => Err(ExportError::NoContext {
                name: self.name.clone(),
                context: context.as_str().to_owned(),
            }),
        }
    }

    fn flush(&self) -> Result<(), ExportError> {
        // Nothing is ever written through the export, so there is nothing to make durable.
        Ok(())
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
mod tests {
    use proptest::prelude::*;

    use super::super::proto::ErrorCode;
    use super::*;

    const CLEAN: u32 = 0;
    const DIRTY: u32 = 1;

    fn status(extents: &[(u64, u32)]) -> Vec<StatusExtent> {
        extents
            .iter()
            .map(|&(length, flags)| StatusExtent { length, flags })
            .collect()
    }

    #[test]
    fn dirty_extents_become_a_gapless_list() {
        let dirty = [
            Extent {
                offset: 10,
                length: 10,
            },
            Extent {
                offset: 30,
                length: 5,
            },
        ];
        assert_eq!(
            dirty_status(&dirty, 0, 40, 9),
            status(&[(10, CLEAN), (10, DIRTY), (10, CLEAN), (5, DIRTY), (5, CLEAN)])
        );
        assert_eq!(
            dirty_status(&dirty, 15, 33, 9),
            status(&[(5, DIRTY), (10, CLEAN), (3, DIRTY)])
        );
        assert_eq!(dirty_status(&dirty, 35, 40, 9), status(&[(5, CLEAN)]));
        assert_eq!(
            dirty_status(&dirty, 0, 40, 2),
            status(&[(10, CLEAN), (10, DIRTY)])
        );
        assert_eq!(dirty_status(&dirty, 0, 40, 1), status(&[(10, CLEAN)]));
        assert_eq!(dirty_status(&[], 0, 40, 9), status(&[(40, CLEAN)]));
    }

    proptest! {
        /// Oracle: a byte for each position.
        #[test]
        fn dirty_status_tells_each_byte_rightly(
            bytes in prop::collection::vec(any::<bool>(), 1..200),
            from in 0_usize..200,
            length in 1_usize..200,
        ) {
            let mut dirty: Vec<Extent> = Vec::new();
            for (offset, _) in bytes.iter().enumerate().filter(|(_, byte)| **byte) {
                let offset = offset as u64;
                match dirty.last_mut() {
                    Some(last) if last.end() == offset => last.length += 1,
                    _ => dirty.push(Extent { offset, length: 1 }),
                }
            }
            let from = from % bytes.len();
            let end = (from + length).min(bytes.len());
            let told: Vec<bool> = dirty_status(&dirty, from as u64, end as u64, usize::MAX)
                .iter()
                .flat_map(|extent| (0..extent.length).map(|_| extent.flags == DIRTY))
                .collect();
            prop_assert_eq!(told, bytes[from..end].to_vec());
        }
    }

    fn sparse(size: u64, data: &[(u64, u64)]) -> Arc<File> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        for &(offset, length) in data {
            file.write_all_at(&vec![7; usize::try_from(length).unwrap()], offset)
                .unwrap();
        }
        Arc::new(file)
    }

    #[test]
    fn holes_are_told_by_the_file_system() {
        let block = 64 << 10;
        let file = sparse(10 * block, &[(2 * block, block), (5 * block, 2 * block)]);
        let export = FileExport::new("image", file, 10 * block);
        let allocation = ContextName::base_allocation();
        let all = export
            .block_status(&allocation, 0, 10 * block, usize::MAX)
            .unwrap();
        assert_eq!(
            all,
            status(&[
                (2 * block, 3),
                (block, 0),
                (2 * block, 3),
                (2 * block, 0),
                (3 * block, 3)
            ])
        );
        let inside = export
            .block_status(&allocation, 5 * block + 512, block, usize::MAX)
            .unwrap();
        assert_eq!(inside, status(&[(block, 0)]));
        let one = export.block_status(&allocation, 0, 10 * block, 1).unwrap();
        assert_eq!(one, status(&[(2 * block, 3)]));
    }

    #[test]
    fn a_short_file_is_an_error_not_zeroes() {
        let export = FileExport::new("image", sparse(4096, &[]), 8192);
        let mut buffer = [1; 4096];
        export.read_at(&mut buffer, 0).unwrap();
        assert_eq!(buffer, [0; 4096]);
        let error = export.read_at(&mut buffer, 2048).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Io);
        assert_eq!(error.to_string(), "export \"image\": read at 2048");
        let allocation = ContextName::base_allocation();
        let error = export.block_status(&allocation, 0, 8192, 9).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Io, "missing bytes are no hole");
        assert!(export.block_status(&allocation, 0, 4096, 9).is_ok());
    }

    #[test]
    fn only_known_contexts_are_answered() {
        let export = FileExport::new("image", sparse(4096, &[]), 4096);
        assert_eq!(export.contexts(), [ContextName::base_allocation()]);
        let last = ContextName::dirty_bitmap_last();
        let error = export.block_status(&last, 0, 4096, 1).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Invalid);
        let export = export.with_dirty(Vec::new());
        assert_eq!(export.contexts().len(), 2);
        assert_eq!(
            export.block_status(&last, 0, 4096, 1).unwrap(),
            status(&[(4096, CLEAN)])
        );
    }

    #[test]
    fn errors_map_to_those_of_the_protocol() {
        let export = FileExport::new("image", sparse(0, &[]), 0);
        for (errno, code) in [
            (Errno::EIO, ErrorCode::Io),
            (Errno::EINVAL, ErrorCode::Io),
            (Errno::EROFS, ErrorCode::NotPermitted),
            (Errno::EDQUOT, ErrorCode::NoSpace),
            (Errno::EFBIG, ErrorCode::NoSpace),
            (Errno::ENOMEM, ErrorCode::NoMemory),
        ] {
            assert_eq!(export.failed("read", 0, errno.into()).code(), code, "{errno}");
        }
        assert_eq!(ExportError::Removed("a".into()).code(), ErrorCode::Shutdown);
        let corrupted = ExportError::Corrupted {
            name: "a".into(),
            reason: "no space".into(),
        };
        assert_eq!(corrupted.code(), ErrorCode::Io);
    }
}

//! Sparse image: a snapshot's image file as a source of a copy, with what is data in it told from what is not.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::engine::Source;
use crate::sys::AlignedBuffer;
use crate::units::Extent;

/// An image file, read through the page cache.
#[derive(Debug)]
pub(super) struct SparseImage<'a> {
    file: &'a File,
    name: String,
    length: u64,
}

impl<'a> SparseImage<'a> {
    pub(super) fn new(file: &'a File, name: String, length: u64) -> Self {
        Self { file, name, length }
    }

    /// Cuts ascending extents into those that hold data and those that are holes.
    ///
    /// # Errors
    /// The file system fails.
    pub(super) fn split(
        &self,
        extents: impl IntoIterator<Item = Extent>,
    ) -> io::Result<(Vec<Extent>, Vec<Extent>)> {
        let (mut data, mut holes) = (Vec::new(), Vec::new());
        // What is known of the file: from where to where it is all data, or all hole.
        let (mut is_data, mut known) = (false, 0..0);
        for extent in extents {
            let mut at = extent.offset;
            while at < extent.end() {
                if !known.contains(&at) {
                    (is_data, known) = self.kind_at(at)?;
                }
                let end = known.end.min(extent.end());
                let part = Extent {
                    offset: at,
                    length: end - at,
                };
                if is_data { &mut data } else { &mut holes }.push(part);
                at = end;
            }
        }
        Ok((data, holes))
    }

    /// Whether there is data at `at`, and how far that goes.
    fn kind_at(&self, at: u64) -> io::Result<(bool, std::ops::Range<u64>)> {
        match self.seek(at, Whence::SeekData)? {
            // Holes can't be told here: all counts as data.
            None => Ok((true, at..self.length)),
            Some(data) if data > at => Ok((false, at..data)),
            Some(_) => {
                let hole = self.seek(at, Whence::SeekHole)?.unwrap_or(self.length);
                Ok((true, at..hole.max(at + 1)))
            }
        }
    }

    /// The position of the next data or hole; the end if there is none, `None` if the file system can't tell.
    ///
    /// Others may use the same open file with positions of their own; nobody relies on the file's.
    fn seek(&self, at: u64, whence: Whence) -> io::Result<Option<u64>> {
        match lseek(self.file, at.cast_signed(), whence) {
            Ok(found) => Ok(Some(found.cast_unsigned().min(self.length))),
            Err(Errno::ENXIO) => Ok(Some(self.length)),
            Err(Errno::EINVAL) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Source for SparseImage<'_> {
    fn name(&self) -> &str {
        &self.name
    }

    fn aligned(&self, extent: Extent) -> Extent {
        let end = extent.end().min(self.length);
        Extent {
            offset: extent.offset,
            length: end.saturating_sub(extent.offset),
        }
    }

    fn read(&self, buffer: &mut AlignedBuffer, offset: u64, length: usize) -> io::Result<()> {
        let Some(buffer) = buffer.as_mut_slice().get_mut(..length) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        self.file.read_exact_at(buffer, offset)
    }

    fn raw(&self, offset: u64) -> Option<(BorrowedFd<'_>, u64)> {
        Some((self.file.as_fd(), offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(offset: u64, length: u64) -> Extent {
        Extent { offset, length }
    }

    #[test]
    fn data_and_holes_are_told_apart() {
        const MIB: u64 = 1 << 20;
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 * MIB).unwrap();
        file.write_all_at(&[1; 2 << 20], MIB).unwrap();
        file.write_all_at(&[1; 1 << 20], 6 * MIB).unwrap();
        let image = SparseImage::new(&file, "x".to_owned(), 8 * MIB);
        let (data, holes) = image.split([extent(0, 8 * MIB)]).unwrap();
        assert_eq!(data, [extent(MIB, 2 * MIB), extent(6 * MIB, MIB)]);
        assert_eq!(
            holes,
            [extent(0, MIB), extent(3 * MIB, 3 * MIB), extent(7 * MIB, MIB)]
        );
        let (data, holes) = image
            .split([
                extent(MIB + 512, 512),
                extent(2 * MIB, 2 * MIB),
                extent(5 * MIB, MIB),
            ])
            .unwrap();
        assert_eq!(data, [extent(MIB + 512, 512), extent(2 * MIB, MIB)]);
        assert_eq!(holes, [extent(3 * MIB, MIB), extent(5 * MIB, MIB)]);
        assert_eq!(image.split([]).unwrap(), (vec![], vec![]));
    }
}

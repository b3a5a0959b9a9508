//! Sink: where a copy goes.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

/// Where a copy goes: bytes at the offsets that they have on the device.
///
/// The caller keeps within [`Sink::length`], and never has two operations on the same bytes at a time; others
/// may run in parallel. Nothing is durable before the owner of what is behind the sink makes it so.
pub trait Sink: fmt::Debug + Send + Sync {
    /// Name for messages.
    fn name(&self) -> String;

    /// Length in bytes.
    fn length(&self) -> u64;

    /// Writes all of `data`.
    ///
    /// # Errors
    /// Of what is behind it; how much was written is then unknown.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Makes `length` bytes read as zero, as a hole where that is possible.
    ///
    /// # Errors
    /// Of what is behind it.
    fn zero_at(&self, offset: u64, length: u64) -> io::Result<()>;

    /// A file to which the engine may write by itself, at the same offsets, after a call of
    /// [`Sink::will_write`] for the range.
    fn file(&self) -> Option<&File> {
        None
    }

    /// The engine is about to write these bytes to [`Sink::file`].
    fn will_write(&self, offset: u64, length: u64) {
        let _ = (offset, length);
    }
}

/// Bytes for which a [`FileSink`] remembers together whether something was written.
const REGION: u64 = 1 << 20;

/// Length of the zeroes written at a time where holes are not possible.
const ZERO_WRITE: usize = 1 << 16;

/// A sparse file.
///
/// It remembers for each MiB whether data was ever written there, so that zeroes on top of nothing cost no system
/// call: most of a first copy is such.
#[derive(Debug)]
pub struct FileSink {
    file: Arc<File>,
    name: String,
    length: u64,
    /// One bit for each region that may hold data.
    written: Box<[AtomicU64]>,
    /// Punching holes is not supported.
    no_holes: AtomicBool,
}

impl FileSink {
    /// A file that has its final length and holds no data: all of it is one hole.
    ///
    /// # Errors
    /// The file has another length or its length can't be read.
    pub fn fresh(file: Arc<File>, name: String, length: u64) -> io::Result<Self> {
        Self::new(file, name, length, 0)
    }

    /// A file that may hold anything.
    ///
    /// # Errors
    /// As [`FileSink::fresh`].
    pub fn existing(file: Arc<File>, name: String, length: u64) -> io::Result<Self> {
        Self::new(file, name, length, u64::MAX)
    }

    fn new(file: Arc<File>, name: String, length: u64, written: u64) -> io::Result<Self> {
        let metadata = file.metadata()?;
        if metadata.is_file() && metadata.len() != length {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{name} has {} bytes, not {length}", metadata.len()),
            ));
        }
        let words = usize::try_from(length.div_ceil(REGION).div_ceil(64)).expect("a word is 64 MiB");
        Ok(Self {
            file,
            name,
            length,
            written: (0..words).map(|_| AtomicU64::new(written)).collect(),
            no_holes: AtomicBool::new(false),
        })
    }

    /// The words and bits of the regions that a range touches.
    fn bits(offset: u64, length: u64) -> impl Iterator<Item = (usize, u64)> {
        let regions = offset / REGION..(offset + length).div_ceil(REGION);
        regions.map(|region| {
            let word = usize::try_from(region / 64).expect("a word is 64 MiB");
            (word, 1 << (region % 64))
        })
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        static ZEROES: [u8; ZERO_WRITE] = [0; ZERO_WRITE];
        let end = offset + length;
        for start in (offset..end).step_by(ZERO_WRITE) {
            let count = usize::try_from(end - start).map_or(ZERO_WRITE, |left| left.min(ZERO_WRITE));
            self.file.write_all_at(&ZEROES[..count], start)?;
        }
        Ok(())
    }
}

impl Sink for FileSink {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn length(&self) -> u64 {
        self.length
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.will_write(offset, data.len() as u64);
        self.file.write_all_at(data, offset)
    }

    fn zero_at(&self, offset: u64, length: u64) -> io::Result<()> {
        let may_hold_data = Self::bits(offset, length)
            .any(|(word, bit)| self.written[word].load(Ordering::Acquire) & bit != 0);
        if !may_hold_data {
            return Ok(());
        }
        if self.no_holes.load(Ordering::Relaxed) {
            return self.write_zeroes(offset, length);
        }
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        loop {
            return match fallocate(&*self.file, flags, offset.cast_signed(), length.cast_signed()) {
                Ok(()) => Ok(()),
                Err(Errno::EINTR) => continue,
                Err(Errno::EOPNOTSUPP | Errno::ENODEV) => {
                    self.no_holes.store(true, Ordering::Relaxed);
                    self.write_zeroes(offset, length)
                }
                Err(errno) => Err(errno.into()),
            };
        }
    }

    fn file(&self) -> Option<&File> {
        Some(&self.file)
    }

    fn will_write(&self, offset: u64, length: u64) {
        for (word, bit) in Self::bits(offset, length) {
            self.written[word].fetch_or(bit, Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn file(length: u64) -> Arc<File> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(length).unwrap();
        Arc::new(file)
    }

    #[test]
    fn zeroes_are_holes_whatever_was_there() {
        let file = file(8 << 20);
        let sink = FileSink::fresh(Arc::clone(&file), "image".into(), 8 << 20).unwrap();
        sink.zero_at(0, 8 << 20).unwrap();
        sink.write_at(REGION - 4096, &[7; 8192]).unwrap();
        sink.zero_at(REGION, 4096).unwrap();
        let mut content = [1; 8192];
        file.read_exact_at(&mut content, REGION - 4096).unwrap();
        assert!(content[..4096] == [7; 4096] && content[4096..] == [0; 4096]);
        // Old content of a file that was not ours before.
        let sink = FileSink::existing(Arc::clone(&file), "image".into(), 8 << 20).unwrap();
        sink.zero_at(0, 8 << 20).unwrap();
        assert_eq!(file.metadata().unwrap().blocks(), 0);
    }

    #[test]
    fn where_holes_are_not_possible_zeroes_are_written() {
        let file = file(1 << 20);
        let sink = FileSink::fresh(Arc::clone(&file), "image".into(), 1 << 20).unwrap();
        sink.no_holes.store(true, Ordering::Relaxed);
        sink.write_at(0, &[9; 200_000]).unwrap();
        sink.zero_at(10, 199_000).unwrap();
        let mut content = vec![0; 200_000];
        file.read_exact_at(&mut content, 0).unwrap();
        assert!(content[10..199_010].iter().all(|byte| *byte == 0));
        assert!(
            content[..10]
                .iter()
                .chain(&content[199_010..])
                .all(|byte| *byte == 9)
        );
    }

    #[test]
    fn the_length_must_be_right() {
        let error = FileSink::fresh(file(4096), "image".into(), 8192).unwrap_err();
        assert_eq!(error.to_string(), "image has 4096 bytes, not 8192");
    }
}

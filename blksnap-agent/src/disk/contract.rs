//! Contract: what the copy-on-write engine expects of a disk: the origin it protects, or difference storage.
//!
//! Calls block, and come from several threads at once. Ranges are within [`Disk::size`]: who calls has checked them; a
//! disk answers others with an error, never a panic. A read or write moves all its bytes or fails. Bytes of a write
//! that failed are unknown until they are written again.
//!
//! # Durability
//! A write that has returned is seen by every later read. It is durable, so that it survives a power cut, once a
//! [`Disk::flush`] that began afterwards has returned. A flush that failed once fails for good: the kernel tells of a
//! lost write only once.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;

/// How zeroes are to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zero {
    /// The room may be given back.
    Deallocate,
    /// The room is kept: later writes need no new space.
    Keep,
}

/// What a range of a disk is known to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// Bytes.
    pub length: u64,
    /// Nothing is stored for it: it reads as zeroes.
    pub hole: bool,
}

/// A disk, or something that can be used as one.
pub trait Disk: fmt::Debug + Send + Sync {
    /// Name for messages.
    fn name(&self) -> &str;

    /// Size in bytes.
    fn size(&self) -> u64;

    /// Bytes of the smallest write that the device itself can do; 512 or more, a power of two. Others still work where
    /// the page cache is between.
    fn logical_block(&self) -> u32;

    /// Bytes of the smallest write that costs no read, as the device says (`minimum_io_size`); a power of two.
    fn minimum_io(&self) -> u32 {
        self.logical_block()
    }

    /// Fills `buffer` from byte `offset` on.
    ///
    /// # Errors
    /// The bytes can't be had, all of them.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes `data` at byte `offset`.
    ///
    /// # Errors
    /// Not all of it was written.
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()>;

    /// Makes a range read as zeroes. With `fast` it must be quicker than writing them.
    ///
    /// # Errors
    /// `EOPNOTSUPP` if `fast` is set and nothing quicker is offered here: nothing was changed. Others as for a write.
    fn zero_at(&self, offset: u64, length: u64, zero: Zero, fast: bool) -> io::Result<()>;

    /// Hints that a range is not needed any more; it may read as anything afterwards.
    ///
    /// # Errors
    /// The disk failed. That the hint can't be followed is none.
    fn discard_at(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Makes durable what was written before.
    ///
    /// # Errors
    /// It is not.
    fn flush(&self) -> io::Result<()>;

    /// What is known of a range: pieces without gaps from `offset` on, at least one, at most `most`; they may end
    /// before the range does.
    ///
    /// # Errors
    /// The disk failed. Where nothing is known everything is data.
    fn allocation(&self, offset: u64, length: u64, most: usize) -> io::Result<Vec<Allocation>>;

    /// The file whose byte N is byte N of this disk, where there is one: the engine may read and write it by other
    /// means.
    fn file(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

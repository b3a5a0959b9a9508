//! Store: a place of difference storage, open.
//!
//! Several regions may be in one store: ranges of a device. A store knows whether it was written since it was flushed
//! last, so that a flush of the pool costs only what it has to.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::disk::{Allocation, Disk, FileDisk, MemoryDisk, Zero};

/// An open place.
#[derive(Debug)]
pub(super) struct Store {
    backing: Backing,
    /// Written since the last flush.
    dirty: AtomicBool,
    /// Somebody has the descriptor, and writes to it unseen.
    lent: AtomicBool,
}

#[derive(Debug)]
enum Backing {
    File(FileDisk),
    Memory(MemoryDisk),
    /// Behind something that knows who may write.
    Other(Arc<dyn Disk>),
}

impl Store {
    pub(super) fn file(disk: FileDisk) -> Arc<Self> {
        Arc::new(Self::new(Backing::File(disk)))
    }

    pub(super) fn memory(disk: MemoryDisk) -> Arc<Self> {
        Arc::new(Self::new(Backing::Memory(disk)))
    }

    pub(super) fn other(disk: Arc<dyn Disk>) -> Arc<Self> {
        Arc::new(Self::new(Backing::Other(disk)))
    }

    const fn new(backing: Backing) -> Self {
        Self {
            backing,
            dirty: AtomicBool::new(false),
            lent: AtomicBool::new(false),
        }
    }

    /// The file or device; `None` for memory.
    pub(super) const fn file_disk(&self) -> Option<&FileDisk> {
        match &self.backing {
            Backing::File(disk) => Some(disk),
            Backing::Memory(_) | Backing::Other(_) => None,
        }
    }

    /// Makes durable what was written since the last time.
    pub(super) fn flush_if_written(&self) -> io::Result<()> {
        if !self.is_unflushed() {
            return Ok(());
        }
        self.dirty.store(false, Ordering::Release);
        self.disk()
            .flush()
            .inspect_err(|_| self.dirty.store(true, Ordering::Release))
    }

    /// Whether something may have been written since the last flush.
    pub(super) fn is_unflushed(&self) -> bool {
        self.dirty.load(Ordering::Acquire) || self.lent.load(Ordering::Acquire)
    }

    fn disk(&self) -> &dyn Disk {
        match &self.backing {
            Backing::File(disk) => disk,
            Backing::Memory(disk) => disk,
            Backing::Other(disk) => &**disk,
        }
    }

    /// Makes sure that no write was lost on its way from the page cache to the disk.
    fn is_whole(&self) -> io::Result<()> {
        self.file_disk().map_or(Ok(()), FileDisk::written_back)
    }

    /// After a write, whether it failed or not. Before it a flush could come between and take the mark away.
    fn written<T>(&self, result: io::Result<T>) -> io::Result<T> {
        self.dirty.store(true, Ordering::Release);
        result
    }
}

impl Disk for Store {
    fn name(&self) -> &str {
        self.disk().name()
    }

    fn size(&self) -> u64 {
        self.disk().size()
    }

    fn logical_block(&self) -> u32 {
        self.disk().logical_block()
    }

    fn minimum_io(&self) -> u32 {
        self.disk().minimum_io()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.disk().read_at(buffer, offset)?;
        // The data first: it may have come from the disk because what was written is lost.
        self.is_whole()
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.written(self.disk().write_at(data, offset))?;
        self.is_whole()
    }

    fn zero_at(&self, offset: u64, length: u64, zero: Zero, fast: bool) -> io::Result<()> {
        self.written(self.disk().zero_at(offset, length, zero, fast))
    }

    fn discard_at(&self, offset: u64, length: u64) -> io::Result<()> {
        self.written(self.disk().discard_at(offset, length))
    }

    fn flush(&self) -> io::Result<()> {
        self.flush_if_written()
    }

    fn allocation(&self, offset: u64, length: u64, most: usize) -> io::Result<Vec<Allocation>> {
        self.disk().allocation(offset, length, most)
    }

    fn file(&self) -> Option<BorrowedFd<'_>> {
        self.lent.store(true, Ordering::Release);
        self.disk().file()
    }
}

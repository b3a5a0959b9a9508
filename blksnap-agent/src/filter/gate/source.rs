//! Source: reads an origin past its own page cache, and says when what it read is no longer the instant's.
//!
//! A direct read first writes back the dirty pages of the node that it goes through. Of the origin's own node these are
//! the pages of the very writers that may wait for this read. So the read goes another way:
//!
//! | origin | way |
//! |---|---|
//! | partition | its whole disk, at absolute offsets |
//! | loop device | its backing file |
//! | another whole disk | a partition over all of it, which the kernel knows and the disk does not ([`Alias`]) |
//!
//! Each of these nodes has a page cache of its own, which nobody fills. Who writes to a whole disk through its page
//! cache while one of its partitions has a gate is the one exception: such a write can wait until the deadline.

use std::cell::RefCell;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use nix::errno::Errno;

use super::GateError;
use super::object::{States, Word};
use crate::disk::{Allocation, BlockDevice, Disk, Zero};
use crate::sys::mman::SharedWords;
use crate::sys::{AlignedBuffer, ioctl};

/// Number of the partition over a whole disk: the last that the kernel knows (`DISK_MAX_PARTS` of
/// include/linux/blkdev.h is 256, and 0 is the disk).
const ALIAS: i32 = 255;

/// The way to the origin's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reading {
    /// Through this node of the whole disk.
    WholeDisk(PathBuf),
    /// Through this partition over the whole disk.
    Alias(PathBuf),
    /// From this file behind a loop device.
    Backing(PathBuf),
}

impl Reading {
    /// What is opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::WholeDisk(path) | Self::Alias(path) | Self::Backing(path) => path,
        }
    }
}

/// A partition over all of a disk, which is in no partition table. Taken back when dropped.
#[derive(Debug)]
pub(super) struct Alias {
    disk: PathBuf,
    node: PathBuf,
}

impl Alias {
    /// Adds it; one that an agent left behind is taken over.
    fn add(device: &BlockDevice) -> io::Result<Self> {
        let disk = File::open(&device.path)?;
        let length = device.capacity.bytes();
        match ioctl::blkpg_add(&disk, ALIAS, 0, length) {
            // Overlaps itself, if it was left behind. Another one over the whole disk does as well.
            Ok(()) => {}
            Err(Errno::EBUSY) if is_whole(device) => {}
            Err(Errno::EBUSY) => {
                return Err(io::Error::other(
                    "it has partitions; hold their writes, one by one",
                ));
            }
            Err(errno) => return Err(errno.into()),
        }
        let name = alias_name(&device.name);
        let alias = Self {
            disk: device.path.clone(),
            node: Path::new("/dev").join(name),
        };
        if alias.node.exists() {
            Ok(alias)
        } else {
            Err(io::Error::other(format!(
                "the kernel made no node {}; mount devtmpfs on /dev",
                alias.node.display()
            )))
        }
    }
}

impl Drop for Alias {
    fn drop(&mut self) {
        let removed = File::open(&self.disk)
            .and_then(|disk| ioctl::blkpg_delete(&disk, ALIAS).map_err(io::Error::from));
        if let Err(error) = removed {
            tracing::warn!(node = %self.node.display(), %error, "a partition that only this agent uses stays");
        }
    }
}

/// Takes back the partitions of ours that agents before have left. One that is in use stays.
pub fn remove_left_aliases() {
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !entry.path().join(alias_name(&name)).exists() {
            continue;
        }
        let Ok(device) = BlockDevice::open(&Path::new("/dev").join(&name)) else {
            continue;
        };
        if is_whole(&device) {
            let removed = File::open(&device.path)
                .and_then(|disk| ioctl::blkpg_delete(&disk, ALIAS).map_err(io::Error::from));
            match removed {
                Ok(()) => tracing::info!(
                    disk = name,
                    "a partition that an agent before has left is removed"
                ),
                Err(error) => tracing::debug!(disk = name, %error, "a partition of an agent stays"),
            }
        }
    }
}

/// Whether the disk has a partition of our number from its first sector to its last.
fn is_whole(device: &BlockDevice) -> bool {
    let of = |what: &str| -> Option<u64> {
        let path = format!("/sys/block/{0}/{1}/{what}", device.name, alias_name(&device.name));
        fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    of("start") == Some(0) && of("size") == Some(device.capacity.count())
}

/// The kernel's name of a partition (`disk_name` in block/partitions/core.c).
fn alias_name(disk: &str) -> String {
    let separator = if disk.ends_with(|last: char| last.is_ascii_digit()) {
        "p"
    } else {
        ""
    };
    format!("{disk}{separator}{ALIAS}")
}

/// An origin, to be read.
pub struct Source {
    name: String,
    /// None when the gate is gone: who still has an image must not keep the alias.
    way: RwLock<Option<Way>>,
    reading: Reading,
    /// First byte of the device in the file.
    start: u64,
    size: u64,
    logical_block: u32,
    minimum_io: u32,
    direct: bool,
    gate: u32,
    states: Arc<States>,
    /// Of all gates: armings and beginnings of an audit.
    epoch: Arc<SharedWords>,
}

/// Where bytes of the device are to be read: what is asked for, made as wide as direct reads are.
pub(super) struct Reach {
    pub(super) file: Arc<File>,
    /// First byte in the file.
    pub(super) position: u64,
    pub(super) length: usize,
    /// First byte of the device.
    pub(super) start: u64,
}

/// Bytes of the device that were read in an epoch.
pub(super) struct Ahead<'a> {
    pub(super) epoch: u64,
    /// First byte of the device.
    pub(super) start: u64,
    pub(super) data: &'a [u8],
}

/// A copy of them, for reads of this thread.
#[derive(Default)]
struct Kept {
    gate: u32,
    epoch: u64,
    start: u64,
    data: Vec<u8>,
}

thread_local! {
    static AHEAD: RefCell<Kept> = RefCell::default();
}

/// How long the end of reads in flight is waited for, at most, and how often.
const LAST_READS: (Duration, u32) = (Duration::from_millis(1), 2000);

/// An open way to the bytes, in the order in which it is given up.
#[derive(Debug)]
struct Way {
    file: Arc<File>,
    /// The same, for difference storage on the origin itself.
    writer: Option<File>,
    _alias: Option<Alias>,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source")
            .field("name", &self.name)
            .field("reading", &self.reading)
            .finish_non_exhaustive()
    }
}

impl Source {
    /// Finds a way to the bytes of `device`, whose gate is `gate`.
    pub(super) fn open(
        device: &BlockDevice,
        gate: u32,
        states: Arc<States>,
        epoch: Arc<SharedWords>,
    ) -> Result<Self, GateError> {
        let failed = |error: io::Error| GateError::Source {
            device: device.path.clone(),
            reason: error.to_string(),
        };
        let (reading, file, start, direct, alias) = Self::way(device).map_err(failed)?;
        Ok(Self {
            name: device.path.display().to_string(),
            way: RwLock::new(Some(Way {
                file: Arc::new(file),
                writer: None,
                _alias: alias,
            })),
            reading,
            start,
            size: device.capacity.bytes(),
            logical_block: device.logical_block,
            minimum_io: device.minimum_io.max(device.logical_block),
            direct,
            gate,
            states,
            epoch,
        })
    }

    fn way(device: &BlockDevice) -> io::Result<(Reading, File, u64, bool, Option<Alias>)> {
        let start = device.first_sector.bytes();
        let directly = |path: &Path| {
            OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_DIRECT)
                .open(path)
        };
        if let Some((path, offset)) = backing(&device.disk_name)? {
            let file = File::open(&path).map_err(|error| {
                io::Error::new(error.kind(), format!("open its file {}: {error}", path.display()))
            })?;
            return Ok((Reading::Backing(path), file, offset + start, false, None));
        }
        if !device.is_whole_disk() {
            let path = device.disk_path.clone();
            let file = directly(&path)?;
            return Ok((Reading::WholeDisk(path), file, start, true, None));
        }
        let alias = Alias::add(device)?;
        let path = alias.node.clone();
        let file = directly(&path)?;
        Ok((Reading::Alias(path), file, 0, true, Some(alias)))
    }

    /// How it is read.
    #[must_use]
    pub const fn reading(&self) -> &Reading {
        &self.reading
    }

    /// Gives the way up. Reads fail from now on.
    pub(super) fn close(&self) {
        let way = self.way.write().unwrap_or_else(PoisonError::into_inner).take();
        let Some(way) = way else { return };
        // A partition that is being read can't be taken back.
        for _ in 0..LAST_READS.1 {
            if Arc::strong_count(&way.file) == 1 {
                break;
            }
            std::thread::sleep(LAST_READS.0);
        }
        drop(way);
    }

    /// Changes with every arming of a gate, and every beginning of an audit.
    pub(super) fn epoch(&self) -> u64 {
        self.epoch.words()[0].load(Ordering::SeqCst)
    }

    /// Where to read bytes that are within the device; `None` if the gate is gone.
    pub(super) fn reach(&self, offset: u64, length: u64) -> Option<Reach> {
        let way = self.way.read().unwrap_or_else(PoisonError::into_inner);
        let file = Arc::clone(&way.as_ref()?.file);
        let block = if self.direct {
            u64::from(self.logical_block)
        } else {
            1
        };
        let start = offset - offset % block;
        let end = (offset + length).next_multiple_of(block).min(self.size);
        Some(Reach {
            file,
            position: self.start + start,
            length: usize::try_from(end.checked_sub(start)?).ok()?,
            start,
        })
    }

    /// Does `work`, whose reads on this thread are answered from `ahead`, if they are within it and its epoch is still
    /// this one.
    pub(super) fn with(&self, ahead: &Ahead<'_>, work: impl FnOnce()) {
        AHEAD.with_borrow_mut(|kept| {
            kept.gate = self.gate;
            kept.epoch = ahead.epoch;
            kept.start = ahead.start;
            kept.data.clear();
            kept.data.extend_from_slice(ahead.data);
        });
        work();
        AHEAD.with_borrow_mut(|kept| kept.data.clear());
    }

    /// Fills the buffer from what this thread has read before; `false` if it has not.
    fn read_ahead(&self, buffer: &mut [u8], offset: u64) -> bool {
        AHEAD.with_borrow(|kept| {
            let from = offset
                .checked_sub(kept.start)
                .and_then(|from| usize::try_from(from).ok());
            let data = from.and_then(|from| kept.data.get(from..)?.get(..buffer.len()));
            match data {
                Some(data) if kept.gate == self.gate && kept.epoch == self.epoch() => {
                    buffer.copy_from_slice(data);
                    true
                }
                _ => false,
            }
        })
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let way = self.way.read().unwrap_or_else(PoisonError::into_inner);
        let Some(Way { file, .. }) = &*way else {
            return Err(Errno::ENODEV.into());
        };
        if !self.direct {
            return file.read_exact_at(buffer, self.start + offset);
        }
        let block = u64::from(self.logical_block);
        let first = offset - offset % block;
        let end = (offset + buffer.len() as u64)
            .next_multiple_of(block)
            .min(self.size);
        let skipped = usize::try_from(offset - first).map_err(io::Error::other)?;
        let length = usize::try_from(end - first).map_err(io::Error::other)?;
        let mut bounce = AlignedBuffer::zeroed(length);
        let aligned = &mut bounce.as_mut_slice()[..length];
        file.read_exact_at(aligned, self.start + first)?;
        buffer.copy_from_slice(&aligned[skipped..][..buffer.len()]);
        Ok(())
    }

    /// Lets [`Source::write_storage`] through.
    pub(super) fn open_for_storage(&self) -> io::Result<()> {
        let mut way = self.way.write().unwrap_or_else(PoisonError::into_inner);
        let way = way.as_mut().ok_or(Errno::ENODEV)?;
        if way.writer.is_none() {
            let flags = if self.direct { libc::O_DIRECT } else { 0 };
            let writer = OpenOptions::new()
                .write(true)
                .custom_flags(flags)
                .open(self.reading.path())?;
            way.writer = Some(writer);
        }
        Ok(())
    }

    /// Reads what was stored on the origin: nothing of the gate has to do with it.
    pub(super) fn read_storage(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.check(offset, buffer.len() as u64)?;
        if buffer.is_empty() {
            return Ok(());
        }
        self.read(buffer, offset)
    }

    /// Stores on the origin, the way that it is read: past the page cache and the file system.
    pub(super) fn write_storage(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let length = data.len() as u64;
        self.check(offset, length)?;
        if data.is_empty() {
            return Ok(());
        }
        let write = |data: &[u8], offset: u64| {
            let way = self.way.read().unwrap_or_else(PoisonError::into_inner);
            let writer = way.as_ref().and_then(|way| way.writer.as_ref());
            writer
                .ok_or(Errno::ENODEV)?
                .write_all_at(data, self.start + offset)
        };
        if !self.direct {
            return write(data, offset);
        }
        let block = u64::from(self.logical_block);
        let first = offset - offset % block;
        let end = (offset + length).next_multiple_of(block).min(self.size);
        let whole = usize::try_from(end - first).map_err(io::Error::other)?;
        let mut bounce = AlignedBuffer::zeroed(whole);
        let aligned = &mut bounce.as_mut_slice()[..whole];
        if (first, end) != (offset, offset + length) {
            // Whoever writes a part of a block has all of its unit for itself.
            self.read(aligned, first)?;
        }
        let from = usize::try_from(offset - first).map_err(io::Error::other)?;
        aligned[from..from + data.len()].copy_from_slice(data);
        write(aligned, first)
    }

    /// Makes durable what was stored.
    pub(super) fn flush_storage(&self) -> io::Result<()> {
        let way = self.way.read().unwrap_or_else(PoisonError::into_inner);
        let writer = way.as_ref().and_then(|way| way.writer.as_ref());
        writer.ok_or(Errno::ENODEV)?.sync_data()
    }

    fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        match offset.checked_add(length) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(Errno::EINVAL.into()),
        }
    }

    fn refused<T>() -> io::Result<T> {
        Err(io::Error::from(Errno::EROFS))
    }
}

/// The file behind a loop device and the byte that it begins at; `None` for another device.
fn backing(disk: &str) -> io::Result<Option<(PathBuf, u64)>> {
    let attribute = |name: &str| fs::read_to_string(format!("/sys/block/{disk}/loop/{name}"));
    let path = match attribute("backing_file") {
        Ok(path) => path,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let offset = attribute("offset")?
        .trim()
        .parse::<u64>()
        .map_err(io::Error::other)?;
    Ok(Some((PathBuf::from(path.trim_end_matches('\n')), offset)))
}

impl Disk for Source {
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

    /// Reads, and looks at the gate afterwards: data of a broken one may be newer than the instant.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.check(offset, buffer.len() as u64)?;
        if !buffer.is_empty() && !self.read_ahead(buffer, offset) {
            self.read(buffer, offset)?;
        }
        // The data first: nothing of this look may come before it.
        std::sync::atomic::fence(Ordering::SeqCst);
        match self.states.word(self.gate, Word::Broken).load(Ordering::SeqCst) {
            0 => Ok(()),
            reasons => Err(io::Error::other(format!(
                "writes are no longer held: {}",
                super::serve::reasons_of(reasons)
            ))),
        }
    }

    fn write_at(&self, _data: &[u8], _offset: u64) -> io::Result<()> {
        Self::refused()
    }

    fn zero_at(&self, _offset: u64, _length: u64, _zero: Zero, _fast: bool) -> io::Result<()> {
        Self::refused()
    }

    fn discard_at(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Self::refused()
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn allocation(&self, offset: u64, length: u64, _most: usize) -> io::Result<Vec<Allocation>> {
        self.check(offset, length)?;
        Ok(vec![Allocation { length, hole: false }])
    }
}

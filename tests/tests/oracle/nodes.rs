//! Nodes: random writes of every kind to a block device.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use anyhow::{Context as _, Result};
use blksnap_agent::sys::{AlignedBuffer, ioctl};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use rand::Rng;
use rand::rngs::StdRng;

use crate::{KIB, MIB};

/// Longest write.
const LONGEST: u64 = 4 * MIB;

/// A block device to write to.
pub(crate) struct Node {
    direct: File,
    buffered: File,
    /// Where writes go.
    area: Range<u64>,
    /// Logical block: the unit of all but buffered writes.
    unit: u64,
    /// Random bytes, aligned.
    content: AlignedBuffer,
}

impl Node {
    /// Opens the node at `path`; the first and last `margin` bytes are left alone.
    pub(crate) fn open(path: &Path, margin: u64) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let buffered = options
            .open(path)
            .with_context(|| format!("open {}", path.display()))?;
        let direct = options.custom_flags(libc::O_DIRECT).open(path)?;
        let length = ioctl::blkgetsize64(&buffered)?;
        let unit = u64::from(ioctl::blksszget(&buffered)?);
        Ok(Self {
            direct,
            buffered,
            area: margin..length - margin,
            unit,
            content: AlignedBuffer::zeroed(usize::try_from(LONGEST)?),
        })
    }

    /// Makes `count` random writes and brings them all to the disk.
    pub(crate) fn write(&mut self, random: &mut StdRng, count: u32) -> Result<()> {
        self.fresh_content(random);
        for _ in 0..count {
            let range = self.range(random);
            match random.random_range(0..1000) {
                0..870 => self.write_direct(random, &range)?,
                870..940 => self.write_buffered(random, &range)?,
                940..945 => self.buffered.sync_all()?,
                945..965 => busy_is_fine(ioctl::blkdiscard(&self.direct, range.start, length(&range)))?,
                965..985 => busy_is_fine(ioctl::blkzeroout(&self.direct, range.start, length(&range)))?,
                _ => self.allocate(random, &range)?,
            }
        }
        self.buffered.sync_all()?;
        Ok(())
    }

    /// Writes the first and the last sectors of the area in each way.
    pub(crate) fn write_edges(&mut self, random: &mut StdRng) -> Result<()> {
        self.fresh_content(random);
        let Range { start, end } = self.area;
        let unit = self.unit;
        for range in [start..start + unit, end - unit..end] {
            match random.random_range(0..4) {
                0 => self.write_direct(random, &range)?,
                1 => self.write_buffered(random, &(range.end - 1..range.end))?,
                2 => busy_is_fine(ioctl::blkdiscard(&self.direct, range.start, unit))?,
                _ => busy_is_fine(ioctl::blkzeroout(&self.direct, range.start, unit))?,
            }
        }
        self.buffered.sync_all()?;
        Ok(())
    }

    fn fresh_content(&mut self, random: &mut StdRng) {
        // A window that moves over these bytes is as good as fresh ones for every write, and quicker.
        let start = random.random_range(0..self.content.len() - 64 * 1024);
        random.fill(&mut self.content.as_mut_slice()[start..start + 64 * 1024]);
    }

    /// Whole units in the area: mostly short, mostly anywhere, some around the borders of tracking blocks.
    fn range(&self, random: &mut StdRng) -> Range<u64> {
        let units = match random.random_range(0..1000) {
            0..920 => random.random_range(1..=(8 * KIB / self.unit)),
            920..998 => random.random_range(1..=(96 * KIB / self.unit)),
            _ => random.random_range(1..=(LONGEST / self.unit)),
        };
        let (first, end) = (
            self.area.start.div_ceil(self.unit),
            self.area.end / self.unit - units,
        );
        let mut at = random.random_range(first..=end);
        if random.random_ratio(1, 4) {
            // Ends or begins right at a border of 64 KiB, or is one unit off.
            let border = (at * self.unit).next_multiple_of(64 * KIB) / self.unit;
            let shift = random.random_range(0..=2);
            let back = if random.random() { units } else { 0 };
            at = (border + shift).saturating_sub(back + 1).clamp(first, end);
        }
        at * self.unit..(at + units) * self.unit
    }

    fn bytes(&self, random: &mut StdRng, range: &Range<u64>) -> Result<&[u8]> {
        let length = usize::try_from(length(range))?;
        let last_page = (self.content.len() - length) / AlignedBuffer::ALIGNMENT;
        let start = random.random_range(0..=last_page) * AlignedBuffer::ALIGNMENT;
        Ok(&self.content.as_slice()[start..start + length])
    }

    fn write_direct(&self, random: &mut StdRng, range: &Range<u64>) -> Result<()> {
        let bytes = self.bytes(random, range)?;
        self.direct
            .write_all_at(bytes, range.start)
            .with_context(|| format!("write {range:?} directly"))
    }

    /// Any bytes inside the range.
    fn write_buffered(&self, random: &mut StdRng, range: &Range<u64>) -> Result<()> {
        let start = random.random_range(range.start..range.end);
        let range = start..random.random_range(start..range.end) + 1;
        let bytes = self.bytes(random, &range)?;
        self.buffered
            .write_all_at(bytes, range.start)
            .with_context(|| format!("write {range:?} through the page cache"))
    }

    /// `fallocate` of a block device: zeroes kept allocated, or a hole.
    fn allocate(&self, random: &mut StdRng, range: &Range<u64>) -> Result<()> {
        let how = if random.random() {
            FallocateFlags::FALLOC_FL_ZERO_RANGE
        } else {
            FallocateFlags::FALLOC_FL_PUNCH_HOLE
        };
        busy_is_fine(fallocate(
            &self.direct,
            how | FallocateFlags::FALLOC_FL_KEEP_SIZE,
            i64::try_from(range.start)?,
            i64::try_from(length(range))?,
        ))
    }
}

fn length(range: &Range<u64>) -> u64 {
    range.end - range.start
}

/// The kernel refuses these where it can't drop the page cache of the range at once: nothing was written then.
fn busy_is_fine(outcome: Result<(), Errno>) -> Result<()> {
    match outcome {
        Ok(()) | Err(Errno::EBUSY) => Ok(()),
        Err(errno) => Err(io::Error::from(errno).into()),
    }
}

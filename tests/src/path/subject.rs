//! Subject: tracked devices, and the comparison of what changed on them with what their maps report.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::read_device;
use anyhow::{Result, bail, ensure};
use blksnap_agent::disk::BlockDevice;
use blksnap_agent::tracker::{DirtyBlocks, Granularity, TrackedDevice, Tracker, TrackerConfig};
use blksnap_agent::units::{BlockSize, DeviceId};
use blksnap_common::track::OP_KINDS;

/// The unit of the comparison.
const SECTOR: usize = 512;
/// What is compared at a time.
const CHUNK: usize = 1 << 20;

/// A tracked node and its content.
#[derive(Debug)]
struct Slot {
    device: Arc<TrackedDevice>,
    before: Vec<u8>,
    /// Blocks written while that was read.
    late: DirtyBlocks,
}

/// Tracked nodes of one or more disks.
#[derive(Debug)]
pub struct Subject {
    slots: Vec<Slot>,
    /// The programs live as long as this.
    tracker: Arc<Tracker>,
}

/// What became of a node in what [`Subject::observe`] was given to do.
#[derive(Debug)]
pub struct Seen {
    /// The node.
    pub node: PathBuf,
    disk: DeviceId,
    /// Bytes that differ, as sectors: offset of each.
    pub changed: Vec<u64>,
    /// What the map reports, as (offset, length).
    pub reported: Vec<(u64, u64)>,
    /// Operations by kind.
    pub operations: [u64; OP_KINDS],
    block: u64,
    first: u64,
    capacity: u64,
}

impl Subject {
    /// Tracks `nodes`, each in blocks of its size.
    ///
    /// # Errors
    /// This kernel can't track, or a node is none that can be tracked.
    pub fn new<'p>(nodes: impl IntoIterator<Item = (&'p Path, u64)>) -> Result<Self> {
        Self::with(Tracker::load(&TrackerConfig::default())?, nodes)
    }

    /// The same with programs that are loaded already: that takes a while where the processor is slow.
    ///
    /// # Errors
    /// A node is none that can be tracked.
    pub fn with<'p>(tracker: Arc<Tracker>, nodes: impl IntoIterator<Item = (&'p Path, u64)>) -> Result<Self> {
        let mut subject = Self {
            slots: Vec::new(),
            tracker,
        };
        for (node, block) in nodes {
            let granularity = Granularity::Fixed(BlockSize::from_bytes(block)?);
            let device = subject.tracker.attach(BlockDevice::open(node)?, granularity)?;
            subject.slots.push(Slot {
                device,
                before: Vec::new(),
                late: DirtyBlocks::default(),
            });
        }
        Ok(subject)
    }

    /// Lets `change` change the nodes, which it must not leave dirty in any cache, and compares. A period begins before
    /// the content is read and ends after that, so that what a driver writes by itself meanwhile is reported, too.
    ///
    /// # Errors
    /// A byte changed that is not reported, a map is in doubt, or `change` failed.
    pub fn observe<T>(&mut self, change: impl FnOnce() -> Result<T>) -> Result<(T, Vec<Seen>)> {
        for slot in &mut self.slots {
            slot.device.close_period()?;
            slot.before = read_device(slot.device.path())?;
            slot.late = slot.device.close_period()?;
        }
        self.observe_more(change)
    }

    /// The same, of what changed since the last look.
    ///
    /// # Errors
    /// As [`Self::observe`].
    pub fn observe_more<T>(&mut self, change: impl FnOnce() -> Result<T>) -> Result<(T, Vec<Seen>)> {
        let mut operations = Vec::new();
        for slot in &self.slots {
            operations.push(slot.device.counters()?.ops);
        }
        let outcome = change()?;
        let mut seen = Vec::new();
        for (slot, before) in self.slots.iter_mut().zip(operations) {
            let mut dirty = slot.device.close_period()?;
            let now = read_device(slot.device.path())?;
            // What is written during the read belongs to this look and to the next.
            let late = slot.device.close_period()?;
            dirty.union(&slot.late);
            dirty.union(&late);
            slot.late = late;
            if let Some(doubt) = slot.device.check_doubt() {
                bail!("{} is in doubt: {doubt:?}", slot.device.path().display());
            }
            seen.push(slot.seen(&now, &dirty, before)?);
            slot.before = now;
        }
        for seen in &seen {
            seen.check_nothing_is_missing()?;
        }
        Ok((outcome, seen))
    }

    /// The tracked devices.
    pub fn devices(&self) -> impl Iterator<Item = &Arc<TrackedDevice>> {
        self.slots.iter().map(|slot| &slot.device)
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        for slot in &self.slots {
            if let Err(error) = self.tracker.detach(slot.device.device().id) {
                crate::complain(format_args!(
                    "{} stays tracked: {error}",
                    slot.device.path().display()
                ));
            }
        }
    }
}

impl Slot {
    fn seen(&self, now: &[u8], dirty: &DirtyBlocks, before: [u64; OP_KINDS]) -> Result<Seen> {
        let device = self.device.device();
        ensure!(
            now.len() == self.before.len(),
            "{} was resized",
            device.path.display()
        );
        let changed = differences(now, &self.before);
        let counters = self.device.counters()?.ops;
        Ok(Seen {
            node: device.path.clone(),
            disk: device.disk_id,
            changed,
            reported: dirty
                .extents(self.device.block_size(), device.capacity)
                .map(|extent| (extent.offset, extent.length))
                .collect(),
            operations: std::array::from_fn(|kind| counters[kind] - before[kind]),
            block: self.device.block_size().bytes(),
            first: device.first_sector.bytes(),
            capacity: device.capacity.bytes(),
        })
    }
}

impl Seen {
    /// Every byte that changed is reported.
    fn check_nothing_is_missing(&self) -> Result<()> {
        let mut reported = self.reported.iter().peekable();
        for sector in &self.changed {
            while reported
                .next_if(|(offset, length)| offset + length <= *sector)
                .is_some()
            {}
            ensure!(
                reported.peek().is_some_and(|(offset, _)| offset <= sector),
                "byte {sector} of {} changed, and only {:?} is reported",
                self.node.display(),
                self.reported
            );
        }
        Ok(())
    }

    /// The blocks of `length` bytes from `offset` on of `node` are reported, as far as they are of this one; with
    /// `exact`, no others are.
    ///
    /// # Errors
    /// They are not.
    pub fn check(&self, exact: bool, node: &BlockDevice, offset: u64, length: u64) -> Result<()> {
        ensure!(
            node.disk_id == self.disk,
            "nodes of different disks have nothing in common"
        );
        // In bytes of the disk, then of this node.
        let start = node.first_sector.bytes() + offset;
        let end = (start + length).min(self.first + self.capacity);
        let start = start.max(self.first);
        let wanted = (start < end).then(|| {
            let from = (start - self.first) / self.block * self.block;
            let to = (end - self.first).next_multiple_of(self.block).min(self.capacity);
            (from, to - from)
        });
        let right = if exact {
            self.reported.iter().eq(&wanted)
        } else {
            wanted.is_none_or(|(from, length)| {
                self.reported
                    .iter()
                    .any(|(offset, reported)| *offset <= from && from + length <= offset + reported)
            })
        };
        ensure!(
            right,
            "{} reports {:?}, and {wanted:?} was written",
            self.node.display(),
            self.reported
        );
        Ok(())
    }
}

/// Offsets of the sectors in which the two differ.
fn differences(now: &[u8], before: &[u8]) -> Vec<u64> {
    let chunks = now
        .chunks(CHUNK)
        .zip(before.chunks(CHUNK))
        .zip((0..).step_by(CHUNK));
    // Whole chunks are compared much quicker than their sectors.
    chunks
        .filter(|((now, before), _)| now != before)
        .flat_map(|((now, before), start)| {
            now.chunks(SECTOR)
                .zip(before.chunks(SECTOR))
                .zip((start..).step_by(SECTOR))
                .filter(|((now, before), _)| now != before)
                .map(|(_, offset)| offset)
        })
        .collect()
}

//! Live change map ("write map"): a byte per tracking block, the numbers, and what a take does to them.
//!
//! Invariants: every byte is at most `active`; inside a generation no byte ever decreases; `dirty` is the number of
//! bytes equal to `active`. A map that might miss a change is marked corrupted, answers nothing, and starts over at
//! the next take.

use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use super::blocks::Blocks;
use super::read_map::ReadMap;
use super::reason::{FullNeeded, FullReason, ResetReason};
use crate::units::{BlockSize, Generation, Sectors};

/// Number of the first period of a generation.
pub(super) const FIRST_PERIOD: u8 = 1;

/// Something was asked of a map that it can't do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// Sectors past the end of the device.
    #[error("{count} sectors at sector {start} reach past the end of the device at sector {capacity}")]
    OutOfRange {
        /// First sector.
        start: u64,
        /// Number of sectors.
        count: u64,
        /// Sectors of the device.
        capacity: u64,
    },
    /// The map would take more memory than a map may.
    #[error(
        "a map of {blocks} blocks of {block_size} bytes exceeds the limit of {limit} blocks: use a larger block size"
    )]
    TooManyBlocks {
        /// Blocks needed.
        blocks: u64,
        /// Bytes in a block.
        block_size: u64,
        /// Blocks allowed.
        limit: u64,
    },
}

/// Outcome of a take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Number of the take: what a client keeps as its next base, with `generation`.
    pub number: u8,
    /// Generation of the map.
    pub generation: Generation,
    /// Why the map started over at this take, if it did: then no older base is of use.
    pub reset: Option<ResetReason>,
}

/// The facts about a map.
#[doc(alias = "blksnap_cbtinfo")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CbtInfo {
    /// Bytes of the device.
    pub device_capacity: u64,
    /// Bytes of a tracking block.
    pub block_size: u64,
    /// Number of tracking blocks.
    pub block_count: u64,
    /// Generation of the map.
    pub generation: Generation,
    /// Number of the last take, 0 if there was none in this generation.
    pub changes_number: u8,
    /// Blocks that changed since the last take.
    pub dirty_blocks: u64,
    /// Why the generation began.
    pub began: ResetReason,
    /// Why the map can't be relied on until the next take.
    pub corrupted: Option<ResetReason>,
}

/// The change map of a device.
#[derive(Debug)]
pub struct CbtMap {
    pub(super) generation: Generation,
    pub(super) began: ResetReason,
    pub(super) block_size: BlockSize,
    pub(super) capacity: Sectors,
    pub(super) active: u8,
    pub(super) blocks: Blocks,
    pub(super) dirty: u64,
    pub(super) read: Option<Arc<ReadMap>>,
    pub(super) doubt: Arc<OnceLock<ResetReason>>,
}

impl CbtMap {
    /// Most blocks a map may have; it costs as many bytes, twice while a snapshot is held.
    pub const MAX_BLOCKS: u64 = 1 << 30;

    /// An empty map with the first period open. Everything written from now on has to be marked.
    ///
    /// # Errors
    /// More than [`CbtMap::MAX_BLOCKS`] blocks would be needed.
    pub fn new(generation: Generation, block_size: BlockSize, capacity: Sectors) -> Result<Self, MapError> {
        Self::begin(generation, ResetReason::NewAttach, block_size, capacity)
    }

    /// As [`CbtMap::new`], with the reason why this generation begins.
    ///
    /// # Errors
    /// As [`CbtMap::new`].
    pub fn begin(
        generation: Generation,
        began: ResetReason,
        block_size: BlockSize,
        capacity: Sectors,
    ) -> Result<Self, MapError> {
        let blocks = Blocks::unchanged(block_count(block_size, capacity)?);
        Ok(Self {
            generation,
            began,
            block_size,
            capacity,
            active: FIRST_PERIOD,
            blocks,
            dirty: 0,
            read: None,
            doubt: Arc::default(),
        })
    }

    /// Generation of the map.
    #[must_use]
    pub const fn generation(&self) -> Generation {
        self.generation
    }

    /// Why the generation began.
    #[must_use]
    pub const fn began(&self) -> ResetReason {
        self.began
    }

    /// Number of the last take, 0 if there was none in this generation.
    #[doc(alias = "snap_number_previous")]
    #[must_use]
    pub const fn previous(&self) -> u8 {
        self.active - 1
    }

    /// Number of the open period, which blocks written now are marked with.
    #[doc(alias = "snap_number_active")]
    #[must_use]
    pub const fn active(&self) -> u8 {
        self.active
    }

    /// Tracking block size.
    #[must_use]
    pub const fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// Capacity of the device that the map covers.
    #[must_use]
    pub const fn capacity(&self) -> Sectors {
        self.capacity
    }

    /// Number of tracking blocks.
    #[must_use]
    pub fn block_count(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// Number of blocks that changed in the open period.
    #[must_use]
    pub const fn dirty_blocks(&self) -> u64 {
        self.dirty
    }

    /// Why the map can't be relied on until the next take.
    #[must_use]
    pub fn corrupted(&self) -> Option<ResetReason> {
        self.doubt.get().copied()
    }

    /// The facts about the map.
    #[must_use]
    pub fn info(&self) -> CbtInfo {
        CbtInfo {
            device_capacity: self.capacity.bytes(),
            block_size: self.block_size.bytes(),
            block_count: self.block_count(),
            generation: self.generation,
            changes_number: self.previous(),
            dirty_blocks: self.dirty,
            began: self.began,
            corrupted: self.corrupted(),
        }
    }

    /// Marks a write to the blocks `first..=last`. Blocks past the end corrupt the map.
    pub fn mark_blocks(&mut self, first: u64, last: u64) {
        if first > last {
            return;
        }
        let count = self.block_count();
        if last >= count {
            self.corrupt(ResetReason::OutOfRange);
        }
        if first < count {
            let (first, last) = (index(first), index(last.min(count - 1)));
            self.dirty += self.blocks.mark(first, last, self.active);
        }
    }

    /// Marks a write to `count` sectors from `start` on, relative to the device.
    ///
    /// # Errors
    /// They reach past the end. What is inside is marked, and the map is corrupted.
    pub fn mark_extent(&mut self, start: Sectors, count: Sectors) -> Result<(), MapError> {
        let Some((first, last)) = self.blocks_of(start, count) else {
            return Ok(());
        };
        self.mark_blocks(first, last);
        self.check_range(start, count).inspect_err(|_| {
            // The last block may be short: the sectors can be outside where the block is not.
            self.corrupt(ResetReason::OutOfRange);
        })
    }

    /// Marks a write to every block whose bit is set: bit `b` of word `w` is block 64 `w` + `b`. Bits past the end
    /// corrupt the map.
    pub fn mark_bits(&mut self, words: &[u64]) {
        self.mark_bits_at(0, words);
    }

    /// As [`CbtMap::mark_bits`], where the first word is word `MARK_WORDS` * `chunk` of all: for who has the words
    /// in pieces.
    pub(crate) fn mark_bits_at(&mut self, chunk: usize, words: &[u64]) {
        let (dirty, beyond) = self.blocks.mark_bits(chunk, words, self.active);
        self.dirty += dirty;
        if beyond {
            self.corrupt(ResetReason::OutOfRange);
        }
    }

    /// Marks sectors because somebody asked for it, or because an image was written: in the open period, and in the
    /// read map as changed in the period before, so that the next copy takes them again whichever map it reads.
    /// Read maps already handed out stay as they are.
    ///
    /// # Errors
    /// The sectors reach past the end; nothing was marked.
    #[doc(alias = "blksnap_cbtdirty")]
    pub fn mark_both(&mut self, start: Sectors, count: Sectors) -> Result<(), MapError> {
        let Some((first, last)) = self.blocks_of(start, count) else {
            return Ok(());
        };
        self.check_range(start, count)?;
        self.mark_blocks(first, last);
        if let Some(read) = &mut self.read {
            let read = Arc::make_mut(read);
            let number = read.number;
            read.blocks.mark(index(first), index(last), number);
        }
        Ok(())
    }

    /// Declares that the map may miss changes. It and all read maps of its generation answer [`FullNeeded`], and
    /// the next take starts over. The first reason given stays.
    pub fn corrupt(&mut self, reason: ResetReason) {
        // A reason that is already there is the better one.
        let _ = self.doubt.set(reason);
    }

    /// The map as of the last take; `None` if there was none in this generation or the map is corrupted.
    #[must_use]
    pub fn read_map(&self) -> Option<Arc<ReadMap>> {
        self.frozen().ok()
    }

    /// As [`CbtMap::read_map`], saying why there is none.
    ///
    /// # Errors
    /// The map is corrupted or was not taken.
    pub fn frozen(&self) -> Result<Arc<ReadMap>, FullNeeded> {
        match self.corrupted() {
            Some(reason) => Err(FullReason::Corrupted(reason).into()),
            None => self.read.clone().ok_or_else(|| FullReason::NotTaken.into()),
        }
    }

    /// The map as it is now, the open period included, without a take: what to copy before the take that will name
    /// the copy. Its number is the one that the next take would get.
    ///
    /// # Errors
    /// The map is corrupted.
    pub fn live_map(&self) -> Result<Arc<ReadMap>, FullNeeded> {
        match self.corrupted() {
            Some(reason) => Err(FullReason::Corrupted(reason).into()),
            None => Ok(Arc::new(self.freeze_as(self.active))),
        }
    }

    /// The bytes: cheap to copy.
    #[must_use]
    pub const fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    /// Closes the period: its number becomes the number of this take, the map is copied to the read map, and a new
    /// period opens. The caller has marked everything written up to this instant.
    ///
    /// The map starts over first, as generation `fresh`, if it is corrupted, the device no longer has the capacity
    /// it had, or the numbers ran out.
    ///
    /// # Errors
    /// A map for the new capacity would be too large. The map is corrupted then.
    pub fn take(&mut self, fresh: Generation, capacity_now: Sectors) -> Result<Taken, MapError> {
        let reset = if capacity_now != self.capacity {
            Some(ResetReason::Resized)
        } else if let Some(reason) = self.corrupted() {
            Some(reason)
        } else if self.active == u8::MAX {
            Some(ResetReason::Wrapped)
        } else {
            None
        };
        if let Some(reason) = reset {
            let count = block_count(self.block_size, capacity_now).inspect_err(|_| self.corrupt(reason))?;
            self.capacity = capacity_now;
            self.blocks = Blocks::unchanged(count);
            self.generation = fresh;
            self.began = reason;
            self.active = FIRST_PERIOD;
            self.read = None;
            // Read maps of the generation before keep theirs.
            self.doubt = Arc::default();
        }
        let number = self.active;
        self.active += 1;
        self.dirty = 0;
        self.read = Some(Arc::new(self.freeze_as(number)));
        Ok(Taken {
            number,
            generation: self.generation,
            reset,
        })
    }

    fn freeze_as(&self, number: u8) -> ReadMap {
        ReadMap {
            generation: self.generation,
            number,
            began: self.began,
            block_size: self.block_size,
            capacity: self.capacity,
            blocks: self.blocks.clone(),
            doubt: Arc::clone(&self.doubt),
        }
    }

    /// First and last block of a range of sectors; `None` for an empty one.
    fn blocks_of(&self, start: Sectors, count: Sectors) -> Option<(u64, u64)> {
        let shift = self.block_size.sector_shift();
        let last = start.count().saturating_add(count.count().checked_sub(1)?);
        Some((start.count() >> shift, last >> shift))
    }

    /// Whether the sectors are of the device.
    ///
    /// # Errors
    /// They reach past its end.
    pub fn check_range(&self, start: Sectors, count: Sectors) -> Result<(), MapError> {
        start
            .count()
            .checked_add(count.count())
            .filter(|end| *end <= self.capacity.count())
            .map(|_| ())
            .ok_or(MapError::OutOfRange {
                start: start.count(),
                count: count.count(),
                capacity: self.capacity.count(),
            })
    }
}

/// The blocks of a map, checked against its limit.
pub(super) fn block_count(block_size: BlockSize, capacity: Sectors) -> Result<usize, MapError> {
    let blocks = block_size.blocks_in(capacity);
    usize::try_from(blocks)
        .ok()
        .filter(|_| blocks <= CbtMap::MAX_BLOCKS)
        .ok_or(MapError::TooManyBlocks {
            blocks,
            block_size: block_size.bytes(),
            limit: CbtMap::MAX_BLOCKS,
        })
}

/// A block that is known to be in the map, as an index.
#[expect(
    clippy::cast_possible_truncation,
    reason = "a map has at most MAX_BLOCKS = 2^30 blocks"
)]
const fn index(block: u64) -> usize {
    block as usize
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

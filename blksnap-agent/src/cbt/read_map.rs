//! Read map: the change map as it was when a snapshot was taken; immutable and shared.

use std::fmt;
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use super::CbtInfo;
use super::blocks::Blocks;
use super::extents::{ChangedExtents, Condition};
use super::reason::{FullNeeded, FullReason, ResetReason};
use crate::units::{BlockSize, Generation, Sectors};

/// The name of an instant that a client has a copy of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Base {
    /// Generation of the map at the take.
    pub generation: Generation,
    /// Number of the take in it; 0 is the beginning of the generation, see the module's page.
    pub number: u8,
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.generation, self.number)
    }
}

/// The map at the instant of a take.
///
/// Bytes are at most `number`. All that was handed out of one generation shares its doubt: once the live map is
/// known to be wrong, no read map of the generation answers with extents any more.
#[derive(Clone)]
pub struct ReadMap {
    pub(super) generation: Generation,
    pub(super) number: u8,
    pub(super) began: ResetReason,
    pub(super) block_size: BlockSize,
    pub(super) capacity: Sectors,
    pub(super) blocks: Blocks,
    pub(super) doubt: Arc<OnceLock<ResetReason>>,
}

impl ReadMap {
    /// Generation of the map.
    #[must_use]
    pub const fn generation(&self) -> Generation {
        self.generation
    }

    /// Number of the take.
    #[must_use]
    pub const fn number(&self) -> u8 {
        self.number
    }

    /// The name of this instant, to be kept with a copy of the device.
    #[must_use]
    pub const fn base(&self) -> Base {
        Base {
            generation: self.generation,
            number: self.number,
        }
    }

    /// Why the generation began.
    #[must_use]
    pub const fn began(&self) -> ResetReason {
        self.began
    }

    /// Tracking block size.
    #[must_use]
    pub const fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// Capacity of the device at the take.
    #[must_use]
    pub const fn capacity(&self) -> Sectors {
        self.capacity
    }

    /// The facts about the map; nothing is dirty in it.
    #[must_use]
    pub fn info(&self) -> CbtInfo {
        CbtInfo {
            device_capacity: self.capacity.bytes(),
            block_size: self.block_size.bytes(),
            block_count: self.blocks.len() as u64,
            generation: self.generation,
            changes_number: self.number,
            dirty_blocks: 0,
            began: self.began,
            corrupted: self.doubt(),
        }
    }

    /// A byte per block: the number of the period in which it last changed, 0 for never in this generation.
    #[must_use]
    pub const fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    /// Marks bytes that were written to a copy of this instant: they are not what the device had then.
    pub fn mark(&mut self, offset: u64, length: u64) {
        let end = offset.saturating_add(length).min(self.capacity.bytes());
        if offset >= end {
            return;
        }
        let block = self.block_size.bytes();
        let index = |offset: u64| usize::try_from(offset / block).unwrap_or(usize::MAX);
        self.blocks.mark(index(offset), index(end - 1), self.number);
    }

    /// What makes the map unreliable, if anything.
    #[must_use]
    pub fn doubt(&self) -> Option<ResetReason> {
        self.doubt.get().copied()
    }

    /// The extents that changed after `base` was taken and before this map was.
    ///
    /// # Errors
    /// The base is of another generation or of a number not reached, or the map became doubtful, also after it was
    /// taken. Who copies for long asks [`ReadMap::doubt`] again at the end.
    pub fn changed_since(self: &Arc<Self>, base: &Base) -> Result<ChangedExtents, FullNeeded> {
        if base.generation != self.generation {
            return Err(FullReason::GenerationEnded {
                base: base.generation,
                current: self.generation,
                began: self.began,
            }
            .into());
        }
        if base.number > self.number {
            return Err(FullReason::FutureNumber {
                base: base.number,
                number: self.number,
            }
            .into());
        }
        self.changed(Condition::Above(base.number))
    }

    /// The extents that changed in the last period: between the take before and this one, or since the generation
    /// began if this is its first take.
    ///
    /// # Errors
    /// The map became doubtful.
    pub fn changed_in_last(self: &Arc<Self>) -> Result<ChangedExtents, FullNeeded> {
        self.changed(Condition::Equal(self.number))
    }

    fn changed(self: &Arc<Self>, condition: Condition) -> Result<ChangedExtents, FullNeeded> {
        match self.doubt() {
            Some(reason) => Err(FullReason::Corrupted(reason).into()),
            None => Ok(ChangedExtents::new(Arc::clone(self), condition)),
        }
    }
}

impl fmt::Debug for ReadMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadMap")
            .field("generation", &self.generation)
            .field("number", &self.number)
            .field("began", &self.began)
            .field("block_size", &self.block_size)
            .field("capacity", &self.capacity)
            .field("doubt", &self.doubt())
            .finish_non_exhaustive()
    }
}

//! Saved form of a change map: what a file or the next agent needs to go on with it.
//!
//! A small header and the bytes of the live map, and of the read map if there is one. [`CbtMap::restore`] believes
//! nothing: it checks every invariant of a map, so that one put together from parts that do not belong together
//! is refused and a new generation begins instead. Whether nothing was written since the map was saved is for the
//! caller to know.

use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use super::blocks::Blocks;
use super::map::{FIRST_PERIOD, block_count};
use super::read_map::ReadMap;
use super::reason::ResetReason;
use super::{CbtMap, MapError};
use crate::units::{BlockSize, Generation, Sectors, UnitError};

/// What a saved map says besides its bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedHeader {
    /// Generation of the map.
    pub generation: Generation,
    /// Why the generation began.
    pub began: ResetReason,
    /// Bytes of a tracking block.
    pub block_size: u64,
    /// Sectors of the device.
    pub capacity: Sectors,
    /// Number of the open period.
    pub active: u8,
    /// Why the map can't be relied on, if it can't.
    pub corrupted: Option<ResetReason>,
    /// Number of the read map, if there is one.
    pub read: Option<u8>,
}

/// A map as it is saved, its bytes shared with it.
#[derive(Clone, Debug)]
pub struct SavedMap {
    /// The header.
    pub header: SavedHeader,
    /// A byte per block of the live map.
    pub bytes: Blocks,
    /// A byte per block of the read map, if there is one.
    pub read: Option<Blocks>,
}

impl SavedMap {
    /// The bytes in the order in which they are stored: the live map, then the read map if there is one.
    #[must_use]
    pub fn sections(&self) -> Vec<Blocks> {
        std::iter::once(&self.bytes).chain(&self.read).cloned().collect()
    }
}

/// A saved map is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// The block size is none.
    #[error("saved map: {0}")]
    BlockSize(#[from] UnitError),
    /// The map is larger than one may be.
    #[error("saved map: {0}")]
    Size(#[from] MapError),
    /// The parts do not belong together.
    #[error("saved map: {0}")]
    Inconsistent(&'static str),
}

impl CbtMap {
    /// The map to be saved, as it is now: whatever becomes of this one while it is written.
    #[must_use]
    pub fn save(&self) -> SavedMap {
        SavedMap {
            header: SavedHeader {
                generation: self.generation,
                began: self.began,
                block_size: self.block_size.bytes(),
                capacity: self.capacity,
                active: self.active,
                corrupted: self.corrupted(),
                read: self.read.as_ref().map(|read| read.number),
            },
            bytes: self.blocks.clone(),
            read: self.read.as_ref().map(|read| read.blocks.clone()),
        }
    }

    /// The map that was saved: it gives the same answers.
    ///
    /// # Errors
    /// No map looks so. It begins anew with [`ResetReason::StateDamaged`] then.
    pub fn restore(
        header: &SavedHeader,
        bytes: Vec<u8>,
        read: Option<Vec<u8>>,
    ) -> Result<Self, RestoreError> {
        let wrong = |why| Err(RestoreError::Inconsistent(why));
        let block_size = BlockSize::from_bytes(header.block_size)?;
        let count = block_count(block_size, header.capacity)?;
        if header.active < FIRST_PERIOD {
            return wrong("period 0 is open");
        }
        if bytes.len() != count {
            return wrong("its length is not the device's number of blocks");
        }
        if bytes.iter().any(|byte| *byte > header.active) {
            return wrong("a block changed in a period that was not reached");
        }
        let previous = header.active - 1;
        // Every take makes a read map, and nothing else does.
        if header.read != (previous >= FIRST_PERIOD).then_some(previous) {
            return wrong("the read map is not of the last take");
        }
        if header.read.is_some() != read.is_some() {
            return wrong("the read map is missing, or there should be none");
        }
        let doubt: Arc<OnceLock<ResetReason>> =
            Arc::new(header.corrupted.map_or_else(OnceLock::new, OnceLock::from));
        let blocks = Blocks::from(bytes);
        let read = match read {
            Some(read) => {
                if read.len() != count {
                    return wrong("the read map has another length");
                }
                // A block is as it was at the take, or was marked since.
                let changed = read
                    .iter()
                    .zip(blocks.iter())
                    .any(|(read, live)| *read > previous || (live != *read && live != header.active));
                if changed {
                    return wrong("the read map is not of this map");
                }
                let mut read = Blocks::from(read);
                read.share(&blocks);
                Some(Arc::new(ReadMap {
                    generation: header.generation,
                    number: previous,
                    began: header.began,
                    block_size,
                    capacity: header.capacity,
                    blocks: read,
                    doubt: Arc::clone(&doubt),
                }))
            }
            None => None,
        };
        let dirty = blocks.iter().filter(|byte| *byte == header.active).count() as u64;
        Ok(Self {
            generation: header.generation,
            began: header.began,
            block_size,
            capacity: header.capacity,
            active: header.active,
            blocks,
            dirty,
            read,
            doubt,
        })
    }

    /// As [`CbtMap::restore`], from the sections in the order of [`SavedMap::sections`].
    ///
    /// # Errors
    /// As [`CbtMap::restore`].
    pub fn restore_sections(header: &SavedHeader, sections: Vec<Vec<u8>>) -> Result<Self, RestoreError> {
        let mut sections = sections.into_iter();
        let (bytes, read) = (sections.next(), sections.next());
        match (bytes, sections.next()) {
            (Some(bytes), None) => Self::restore(header, bytes, read),
            _ => Err(RestoreError::Inconsistent("its number of sections is wrong")),
        }
    }
}

#[cfg(test)]
mod tests;

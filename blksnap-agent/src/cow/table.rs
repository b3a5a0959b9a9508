//! Table: what was preserved of one device in one snapshot, and where it is.

use std::collections::HashMap;

use super::layout::{ChunkLayout, ChunkRange, UnitSet};
use super::space::{RegionId, Slot};

/// Name of a buffer in memory; who gives it out decides what it means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BufferId(pub u64);

/// How far the preserving of a chunk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkState {
    /// Nothing of it was preserved.
    New,
    /// Some of what was preserved waits to be stored.
    InMemory,
    /// All that was preserved is in the difference storage.
    Stored,
    /// The snapshot is broken.
    Failed,
}

/// Where bytes of an image are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the origin, at the same offset.
    Origin,
    /// In a buffer.
    Memory {
        /// The buffer.
        buffer: BufferId,
        /// First byte in it: the offset in the chunk.
        offset: u64,
    },
    /// In the difference storage.
    Storage {
        /// The region.
        region: RegionId,
        /// First byte in it.
        offset: u64,
    },
}

/// A piece of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which bytes of the image.
    pub range: ChunkRange,
    /// Where they are.
    pub place: Place,
}

#[derive(Clone, Debug, Default)]
struct Entry {
    slot: Option<Slot>,
    stored: UnitSet,
    /// Buffers that wait to be stored; no unit is in two of them, or stored.
    memory: Vec<(BufferId, UnitSet)>,
}

impl Entry {
    fn preserved(&self) -> UnitSet {
        self.memory
            .iter()
            .fold(self.stored, |all, (_, units)| all.union(*units))
    }
}

/// The preserved units of one device in one snapshot.
#[derive(Clone, Debug)]
pub struct Table {
    layout: ChunkLayout,
    chunks: HashMap<u64, Entry>,
    failed: Option<i32>,
}

impl Table {
    /// A table in which nothing was preserved.
    #[must_use]
    pub fn new(layout: ChunkLayout) -> Self {
        Self {
            layout,
            chunks: HashMap::new(),
            failed: None,
        }
    }

    /// The layout.
    #[must_use]
    pub const fn layout(&self) -> &ChunkLayout {
        &self.layout
    }

    /// The error number that broke the snapshot, if one did.
    #[must_use]
    pub const fn failed(&self) -> Option<i32> {
        self.failed
    }

    /// Breaks it. The first error stays. What was preserved is forgotten.
    pub fn fail(&mut self, errno: i32) {
        self.failed.get_or_insert(errno);
        self.chunks = HashMap::new();
    }

    /// How far a chunk is.
    #[must_use]
    pub fn state(&self, chunk: u64) -> ChunkState {
        match (self.failed, self.chunks.get(&chunk)) {
            (Some(_), _) => ChunkState::Failed,
            (None, None) => ChunkState::New,
            (None, Some(entry)) if entry.preserved().is_empty() => ChunkState::New,
            (None, Some(entry)) if entry.memory.is_empty() => ChunkState::Stored,
            (None, Some(_)) => ChunkState::InMemory,
        }
    }

    /// Those of `units` that were not preserved; none once it has failed.
    #[must_use]
    pub fn missing(&self, chunk: u64, units: UnitSet) -> UnitSet {
        if self.failed.is_some() {
            return UnitSet::EMPTY;
        }
        self.chunks
            .get(&chunk)
            .map_or(units, |entry| units.without(entry.preserved()))
    }

    /// The chunk's place in the difference storage, if it has one.
    #[must_use]
    pub fn slot(&self, chunk: u64) -> Option<Slot> {
        self.chunks.get(&chunk)?.slot
    }

    /// Gives the chunk its place.
    pub fn place(&mut self, chunk: u64, slot: Slot) {
        if self.failed.is_none() {
            self.chunks.entry(chunk).or_default().slot = Some(slot);
        }
    }

    /// Those of `units` that are in the chunk's slot.
    #[must_use]
    pub fn in_slot(&self, chunk: u64, units: UnitSet) -> UnitSet {
        self.chunks
            .get(&chunk)
            .map_or(UnitSet::EMPTY, |entry| entry.stored.and(units))
    }

    /// Units of the chunk are in a buffer, at their offsets in the chunk.
    pub fn stage(&mut self, chunk: u64, units: UnitSet, buffer: BufferId) {
        let fresh = self.missing(chunk, units);
        if !fresh.is_empty() {
            self.chunks.entry(chunk).or_default().memory.push((buffer, fresh));
        }
    }

    /// The units of the chunk that wait in a buffer.
    #[must_use]
    pub fn waiting(&self, chunk: u64, buffer: BufferId) -> UnitSet {
        let entry = self.chunks.get(&chunk);
        let mut buffers = entry.iter().flat_map(|entry| &entry.memory);
        buffers
            .find(|(id, _)| *id == buffer)
            .map_or(UnitSet::EMPTY, |(_, units)| *units)
    }

    /// Units of the chunk are in its slot.
    pub fn store(&mut self, chunk: u64, units: UnitSet) {
        if self.failed.is_some() {
            return;
        }
        let entry = self.chunks.entry(chunk).or_default();
        debug_assert!(entry.slot.is_some(), "a chunk is placed before it is stored");
        entry.stored = entry.stored.union(units);
        for (_, waiting) in &mut entry.memory {
            *waiting = waiting.without(units);
        }
        entry.memory.retain(|(_, waiting)| !waiting.is_empty());
    }

    /// Where the bytes of a range are, in order and without gaps. `None` once it has failed.
    #[must_use]
    pub fn resolve(&self, offset: u64, length: u64) -> Option<Vec<Piece>> {
        if self.failed.is_some() {
            return None;
        }
        let mut pieces: Vec<Piece> = Vec::new();
        for part in self.layout.split(offset, length) {
            let Some(entry) = self.chunks.get(&part.chunk) else {
                push(&mut pieces, part, Place::Origin);
                continue;
            };
            let start = self.layout.start_of(part.chunk);
            let mut next = part.offset;
            while next < part.end() {
                let unit_end = (next / self.layout.unit_bytes() + 1) * self.layout.unit_bytes();
                let range = ChunkRange {
                    chunk: part.chunk,
                    offset: next,
                    length: unit_end.min(part.end()) - next,
                };
                let unit = self.layout.touched(&range);
                let within = next - start;
                let waiting = entry.memory.iter().find(|(_, units)| !units.and(unit).is_empty());
                let place = match (waiting, entry.slot) {
                    (Some((buffer, _)), _) => Place::Memory {
                        buffer: *buffer,
                        offset: within,
                    },
                    (None, Some(slot)) if !entry.stored.and(unit).is_empty() => Place::Storage {
                        region: slot.region,
                        offset: slot.offset + within,
                    },
                    _ => Place::Origin,
                };
                push(&mut pieces, range, place);
                next = range.end();
            }
        }
        Some(pieces)
    }

    /// All chunks of which something is stored, in no order: their slots and units.
    pub fn stored(&self) -> impl Iterator<Item = (u64, Slot, UnitSet)> + '_ {
        self.chunks
            .iter()
            .filter_map(|(chunk, entry)| Some((*chunk, entry.slot?, entry.stored)))
            .filter(|(_, _, units)| !units.is_empty())
    }
}

/// Adds a piece, to the one before it where that goes on in the same place and chunk.
fn push(pieces: &mut Vec<Piece>, range: ChunkRange, place: Place) {
    if let Some(last) = pieces.last_mut()
        && last.range.chunk == range.chunk
        && last.range.end() == range.offset
        && follows(&last.place, last.range.length, &place)
    {
        last.range.length += range.length;
        return;
    }
    pieces.push(Piece { range, place });
}

/// Whether `next` is where the bytes after `length` bytes at `place` are.
fn follows(place: &Place, length: u64, next: &Place) -> bool {
    match (place, next) {
        (Place::Origin, Place::Origin) => true,
        (
            Place::Memory { buffer, offset },
            Place::Memory {
                buffer: other,
                offset: at,
            },
        ) => buffer == other && offset + length == *at,
        (
            Place::Storage { region, offset },
            Place::Storage {
                region: other,
                offset: at,
            },
        ) => region == other && offset + length == *at,
        _ => false,
    }
}

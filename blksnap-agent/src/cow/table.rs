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
    /// Where the chunk has places, and which units are in each; no unit is in two. More than one where the region of
    /// the first had no room for more of the chunk.
    slots: Vec<(Slot, UnitSet)>,
    /// Buffers that wait to be stored; no unit is in two of them, or stored.
    memory: Vec<(BufferId, UnitSet)>,
}

impl Entry {
    fn stored(&self) -> UnitSet {
        self.slots
            .iter()
            .fold(UnitSet::EMPTY, |all, (_, units)| all.union(*units))
    }

    fn preserved(&self) -> UnitSet {
        self.memory
            .iter()
            .fold(self.stored(), |all, (_, units)| all.union(*units))
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

    /// The chunk's place in the difference storage for what is not stored yet, if it has one.
    #[must_use]
    pub fn slot(&self, chunk: u64) -> Option<Slot> {
        self.chunks.get(&chunk)?.slots.last().map(|(slot, _)| *slot)
    }

    /// Gives the chunk its place, or another one for what is not stored yet.
    pub fn place(&mut self, chunk: u64, slot: Slot) {
        if self.failed.is_some() {
            return;
        }
        let slots = &mut self.chunks.entry(chunk).or_default().slots;
        if !slots.iter().any(|(known, _)| *known == slot) {
            slots.push((slot, UnitSet::EMPTY));
        }
    }

    /// Those of `units` that are stored, by their places.
    pub fn stored_in(&self, chunk: u64, units: UnitSet) -> impl Iterator<Item = (Slot, UnitSet)> + '_ {
        let slots = self.chunks.get(&chunk).into_iter().flat_map(|entry| &entry.slots);
        slots
            .map(move |(slot, stored)| (*slot, stored.and(units)))
            .filter(|(_, units)| !units.is_empty())
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

    /// Units of the chunk are in a place of it. Those that were stored elsewhere before stay there.
    pub fn store(&mut self, chunk: u64, slot: Slot, units: UnitSet) {
        if self.failed.is_some() {
            return;
        }
        self.place(chunk, slot);
        let entry = self.chunks.entry(chunk).or_default();
        let fresh = units.without(entry.stored());
        if let Some((_, stored)) = entry.slots.iter_mut().find(|(known, _)| *known == slot) {
            *stored = stored.union(fresh);
        }
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
                let stored = entry.slots.iter().find(|(_, units)| !units.and(unit).is_empty());
                let place = match (waiting, stored) {
                    (Some((buffer, _)), _) => Place::Memory {
                        buffer: *buffer,
                        offset: within,
                    },
                    (None, Some((slot, _))) => Place::Storage {
                        region: slot.region,
                        offset: slot.offset + within,
                    },
                    (None, None) => Place::Origin,
                };
                push(&mut pieces, range, place);
                next = range.end();
            }
        }
        Some(pieces)
    }

    /// All places in which something is stored, in no order: chunks, their slots and units.
    pub fn stored(&self) -> impl Iterator<Item = (u64, Slot, UnitSet)> + '_ {
        let slots = |(chunk, entry): (&u64, &'_ Entry)| {
            let chunk = *chunk;
            let slots = entry.slots.clone();
            slots.into_iter().map(move |(slot, units)| (chunk, slot, units))
        };
        self.chunks
            .iter()
            .flat_map(slots)
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

//! Hold: the writes of one origin, and the tables of all snapshots of it.
//!
//! # Use
//! For every part of a write ([`ChunkLayout::split`]) the engine calls [`Hold::begin`] until it says go:
//! - [`Decision::Copy`]: read the job's units from the origin, put them where each need says, [`Hold::settle`];
//! - [`Decision::Wait`]: wait until the job with that ticket is settled.
//!
//! Then it writes to the origin, and calls [`Hold::end`]. A snapshot can be armed only while no write is between go and
//! end: the engine keeps new ones back for that moment.

use std::collections::{BTreeMap, HashMap};

use super::layout::{ChunkLayout, ChunkRange, UnitSet};
use super::space::Slot;
use super::table::{BufferId, Piece, Place, Table};
use crate::units::Extent;

/// A snapshot, as the hold knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SnapshotKey(pub u64);

/// A job under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(u64);

/// What a write has to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Write.
    Go,
    /// Preserve this, settle it, ask again.
    Copy(Job),
    /// Somebody preserves what this write needs: ask again when that is settled.
    Wait(Ticket),
}

/// Units that have to be preserved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// Names it.
    pub ticket: Ticket,
    /// The chunk.
    pub chunk: u64,
    /// Units to be read from the origin.
    pub units: UnitSet,
    /// Who wants which of them.
    pub needs: Vec<Need>,
}

/// Units that a snapshot lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    /// The snapshot.
    pub snapshot: SnapshotKey,
    /// What it lacks.
    pub units: UnitSet,
}

/// Where the old data of a need was put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// In a buffer.
    Memory(BufferId),
    /// In a place of the chunk.
    Slot(Slot),
    /// Nowhere: the snapshot is gone or broken.
    Nowhere,
}

/// A call that can't be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HoldError {
    /// Writes are under way.
    #[error("writes to the origin are under way")]
    Writing,
    /// The snapshot is armed already.
    #[error("the snapshot holds the device already")]
    Armed,
    /// No such snapshot.
    #[error("the snapshot does not hold the device")]
    Unknown,
    /// The snapshot is broken.
    #[error("the snapshot is broken by error {0}")]
    Broken(i32),
}

/// All writes and snapshots of one origin.
#[derive(Clone, Debug)]
pub struct Hold {
    layout: ChunkLayout,
    tables: BTreeMap<SnapshotKey, Table>,
    /// Jobs under way, by chunk: no unit is in two of them.
    busy: HashMap<u64, Vec<(Ticket, UnitSet)>>,
    /// Difference storage of a snapshot on the origin itself.
    reserved: Vec<(SnapshotKey, Extent)>,
    /// Units that are wholly in it, by chunk: they belong to nobody's image.
    excluded: HashMap<u64, UnitSet>,
    /// What was nobody's at the instant of a snapshot: its image may show anything there. Ascending and apart.
    free: BTreeMap<SnapshotKey, Vec<Extent>>,
    next: u64,
    writing: u64,
}

impl Hold {
    /// An origin without snapshots.
    #[must_use]
    pub fn new(layout: ChunkLayout) -> Self {
        Self {
            layout,
            tables: BTreeMap::new(),
            busy: HashMap::new(),
            reserved: Vec::new(),
            excluded: HashMap::new(),
            free: BTreeMap::new(),
            next: 0,
            writing: 0,
        }
    }

    /// The layout.
    #[must_use]
    pub const fn layout(&self) -> &ChunkLayout {
        &self.layout
    }

    /// Begins a snapshot: from here on what it lacks is preserved. This moment is its instant for this device.
    ///
    /// # Errors
    /// Writes are under way, or it is armed.
    pub fn arm(&mut self, snapshot: SnapshotKey) -> Result<(), HoldError> {
        self.resume(snapshot, Table::new(self.layout))
    }

    /// Goes on with a snapshot that was armed by somebody who is gone: `table` has all that was preserved since.
    ///
    /// # Errors
    /// As [`Hold::arm`].
    pub fn resume(&mut self, snapshot: SnapshotKey, table: Table) -> Result<(), HoldError> {
        if self.writing > 0 {
            return Err(HoldError::Writing);
        }
        if self.tables.contains_key(&snapshot) {
            return Err(HoldError::Armed);
        }
        self.tables.insert(snapshot, table);
        Ok(())
    }

    /// Takes a range out of all images until [`Hold::include`], or until the snapshot is released: its bytes need no
    /// preserving, and an image may show anything there. For difference storage of a snapshot that is on the origin
    /// itself. Units that are in the range in part only are still preserved.
    pub fn exclude(&mut self, snapshot: SnapshotKey, range: Extent) {
        self.reserved.push((snapshot, range));
        exclude(&self.layout, &mut self.excluded, range);
    }

    /// Takes back [`Hold::exclude`].
    pub fn include(&mut self, snapshot: SnapshotKey, range: Extent) {
        if let Some(at) = self.reserved.iter().position(|known| *known == (snapshot, range)) {
            self.reserved.swap_remove(at);
            self.exclude_anew();
        }
    }

    /// The snapshots whose difference storage is within a range: a write to it by anybody else destroys them.
    #[must_use]
    pub fn stored_in(&self, range: Extent) -> Vec<SnapshotKey> {
        let overlaps = |other: &Extent| other.offset < range.end() && range.offset < other.end();
        let mut snapshots: Vec<SnapshotKey> = self
            .reserved
            .iter()
            .filter(|(_, reserved)| overlaps(reserved))
            .map(|(snapshot, _)| *snapshot)
            .collect();
        snapshots.dedup();
        snapshots
    }

    /// What was nobody's at the instant of a snapshot, ascending and apart.
    pub fn set_free(&mut self, snapshot: SnapshotKey, ranges: Vec<Extent>) {
        self.free.insert(snapshot, ranges);
    }

    /// As [`Hold::set_free`] was told.
    #[must_use]
    pub fn free_of(&self, snapshot: SnapshotKey) -> &[Extent] {
        self.free.get(&snapshot).map_or(&[], Vec::as_slice)
    }

    /// The parts of a range that may become difference storage now, ascending: no image shows them from the origin, or
    /// it may show anything there, and they are no storage yet. While no write is under way.
    #[must_use]
    pub fn usable(&self, range: Extent) -> Vec<Extent> {
        let mut usable: Vec<Extent> = Vec::new();
        for part in self.layout.split(range.offset, range.length) {
            let subject = self.subject(&part);
            for (unit, of_part) in self.layout.units_of(&part) {
                let bytes = Extent {
                    offset: of_part.offset,
                    length: of_part.length,
                };
                let busy = self.busy.get(&part.chunk);
                let is_busy =
                    busy.is_some_and(|jobs| jobs.iter().any(|(_, units)| !units.and(unit).is_empty()));
                let is_needed = self.tables.iter().any(|(snapshot, table)| {
                    let missing = table.missing(part.chunk, subject.and(unit));
                    !missing.is_empty() && !self.was_free(*snapshot, bytes)
                });
                if is_busy || is_needed || !self.stored_in(bytes).is_empty() {
                    continue;
                }
                match usable.last_mut() {
                    Some(last) if last.end() == bytes.offset => last.length += bytes.length,
                    _ => usable.push(bytes),
                }
            }
        }
        usable
    }

    fn was_free(&self, snapshot: SnapshotKey, range: Extent) -> bool {
        self.free.get(&snapshot).is_some_and(|free| {
            let at = free.partition_point(|free| free.end() <= range.offset);
            free.get(at)
                .is_some_and(|free| free.offset <= range.offset && range.end() <= free.end())
        })
    }

    /// Takes back all that [`Hold::exclude`] was told under this key.
    pub fn give_back(&mut self, snapshot: SnapshotKey) {
        if self.reserved.iter().any(|(owner, _)| *owner == snapshot) {
            self.reserved.retain(|(owner, _)| *owner != snapshot);
            self.exclude_anew();
        }
    }

    /// The units that belong to nobody's image, by chunk.
    pub fn excluded(&self) -> impl Iterator<Item = (u64, UnitSet)> + '_ {
        self.excluded.iter().map(|(chunk, units)| (*chunk, *units))
    }

    /// Whether difference storage is on the origin.
    #[must_use]
    pub const fn has_storage(&self) -> bool {
        !self.reserved.is_empty()
    }

    fn exclude_anew(&mut self) {
        self.excluded.clear();
        for (_, range) in &self.reserved {
            exclude(&self.layout, &mut self.excluded, *range);
        }
    }

    /// Ends a snapshot. Jobs under way for it settle in vain.
    ///
    /// # Errors
    /// It is not armed.
    pub fn release(&mut self, snapshot: SnapshotKey) -> Result<Table, HoldError> {
        self.give_back(snapshot);
        self.free.remove(&snapshot);
        self.tables.remove(&snapshot).ok_or(HoldError::Unknown)
    }

    /// Jobs under way.
    #[must_use]
    pub fn jobs(&self) -> usize {
        self.busy.values().map(Vec::len).sum()
    }

    /// Whether no snapshot holds the origin: writes need not ask then.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.tables.is_empty()
    }

    /// The table of a snapshot.
    ///
    /// # Errors
    /// It is not armed, or broken.
    pub fn table(&self, snapshot: SnapshotKey) -> Result<&Table, HoldError> {
        let table = self.tables.get(&snapshot).ok_or(HoldError::Unknown)?;
        table
            .failed()
            .map_or(Ok(table), |errno| Err(HoldError::Broken(errno)))
    }

    /// The table of a snapshot, to say where a chunk has its place or that a buffer was stored.
    ///
    /// # Errors
    /// As [`Hold::table`].
    pub fn table_mut(&mut self, snapshot: SnapshotKey) -> Result<&mut Table, HoldError> {
        let table = self.tables.get_mut(&snapshot).ok_or(HoldError::Unknown)?;
        match table.failed() {
            Some(errno) => Err(HoldError::Broken(errno)),
            None => Ok(table),
        }
    }

    /// Breaks a snapshot; the origin goes on.
    pub fn fail(&mut self, snapshot: SnapshotKey, errno: i32) {
        if let Some(table) = self.tables.get_mut(&snapshot) {
            table.fail(errno);
        }
    }

    /// As [`Hold::begin`] for a write that needs nothing preserved: it goes, and the answer is true. Otherwise nothing
    /// was begun.
    pub fn begin_if_clear(&mut self, range: &ChunkRange) -> bool {
        let touched = self.subject(range);
        let clear = self
            .tables
            .values()
            .all(|table| table.missing(range.chunk, touched).is_empty());
        self.writing += u64::from(clear);
        clear
    }

    /// The units of a write that may have to be preserved.
    fn subject(&self, range: &ChunkRange) -> UnitSet {
        let excluded = self.excluded.get(&range.chunk).copied().unwrap_or_default();
        self.layout.touched(range).without(excluded)
    }

    /// A write to `range`, which is within one chunk, wants to go on.
    pub fn begin(&mut self, range: &ChunkRange) -> Decision {
        let touched = self.subject(range);
        let needs: Vec<Need> = self
            .tables
            .iter()
            .map(|(snapshot, table)| Need {
                snapshot: *snapshot,
                units: table.missing(range.chunk, touched),
            })
            .filter(|need| !need.units.is_empty())
            .collect();
        let units = needs
            .iter()
            .fold(UnitSet::EMPTY, |all, need| all.union(need.units));
        if units.is_empty() {
            self.writing += 1;
            return Decision::Go;
        }
        match self.claim(range.chunk, units) {
            Ok(ticket) => Decision::Copy(Job {
                ticket,
                chunk: range.chunk,
                units,
                needs,
            }),
            Err(ticket) => Decision::Wait(ticket),
        }
    }

    /// The write that was told to go has landed, or failed.
    pub fn end(&mut self) {
        debug_assert!(self.writing > 0);
        self.writing = self.writing.saturating_sub(1);
    }

    /// A write to an image wants to go on. [`Decision::Copy`] names the units that it covers in part only: they are to
    /// be preserved first; with none of them left the job has no needs, and its units are those that the engine may
    /// write now. It ends by [`Hold::settle_image`].
    ///
    /// # Errors
    /// The snapshot is not armed, or broken.
    pub fn begin_image(&mut self, snapshot: SnapshotKey, range: &ChunkRange) -> Result<Decision, HoldError> {
        let touched = self.layout.touched(range);
        let partly = touched.without(self.layout.covered(range));
        let missing = self.table(snapshot)?.missing(range.chunk, partly);
        let (units, needs) = if missing.is_empty() {
            (touched, Vec::new())
        } else {
            let need = Need {
                snapshot,
                units: missing,
            };
            (missing, vec![need])
        };
        Ok(match self.claim(range.chunk, units) {
            Ok(ticket) => Decision::Copy(Job {
                ticket,
                chunk: range.chunk,
                units,
                needs,
            }),
            Err(ticket) => Decision::Wait(ticket),
        })
    }

    /// A job is done: each need was met, or failed with an error number, which breaks that snapshot and no other.
    pub fn settle(&mut self, job: &Job, outcomes: &[Result<Kept, i32>]) {
        debug_assert_eq!(job.needs.len(), outcomes.len());
        for (need, outcome) in job.needs.iter().zip(outcomes) {
            let Some(table) = self.tables.get_mut(&need.snapshot) else {
                continue;
            };
            match outcome {
                Ok(Kept::Memory(buffer)) => table.stage(job.chunk, need.units, *buffer),
                Ok(Kept::Slot(slot)) => table.store(job.chunk, *slot, need.units),
                Ok(Kept::Nowhere) => {}
                Err(errno) => table.fail(*errno),
            }
        }
        self.unclaim(job);
    }

    /// A write to an image is done. Those of its units that were not stored before are in this place of the chunk now;
    /// without one there were none, or it failed and changed nothing that an image shows.
    pub fn settle_image(&mut self, snapshot: SnapshotKey, job: &Job, written: Option<Slot>) {
        if let Some(slot) = written
            && let Ok(table) = self.table_mut(snapshot)
        {
            table.store(job.chunk, slot, job.units);
        }
        self.unclaim(job);
    }

    /// A buffer is to be stored: gives the job with the units that wait in it, whose only need is this snapshot's, and
    /// keeps image writes from them. `None` if none wait any more. It ends by [`Hold::settle`].
    ///
    /// # Errors
    /// The snapshot is not armed, or broken.
    pub fn begin_store(
        &mut self,
        snapshot: SnapshotKey,
        chunk: u64,
        buffer: BufferId,
    ) -> Result<Option<Decision>, HoldError> {
        let units = self.table(snapshot)?.waiting(chunk, buffer);
        if units.is_empty() {
            return Ok(None);
        }
        Ok(Some(match self.claim(chunk, units) {
            Ok(ticket) => Decision::Copy(Job {
                ticket,
                chunk,
                units,
                needs: vec![Need { snapshot, units }],
            }),
            Err(ticket) => Decision::Wait(ticket),
        }))
    }

    /// Where the bytes of an image are now.
    ///
    /// # Errors
    /// The snapshot is not armed, or broken.
    pub fn resolve(&self, snapshot: SnapshotKey, offset: u64, length: u64) -> Result<Vec<Piece>, HoldError> {
        let table = self.table(snapshot)?;
        table
            .resolve(offset, length)
            .ok_or(HoldError::Broken(table.failed().unwrap_or_default()))
    }

    /// After pieces were read from the origin: those of them that are elsewhere by now, and have to be read again from
    /// there. With none the read is right.
    ///
    /// # Errors
    /// The snapshot is not armed any more, or broken: nothing that was read is of use.
    pub fn recheck(&self, snapshot: SnapshotKey, pieces: &[Piece]) -> Result<Vec<Piece>, HoldError> {
        let table = self.table(snapshot)?;
        let mut moved = Vec::new();
        for piece in pieces.iter().filter(|piece| piece.place == Place::Origin) {
            let now = table
                .resolve(piece.range.offset, piece.range.length)
                .unwrap_or_default();
            moved.extend(now.into_iter().filter(|piece| piece.place != Place::Origin));
        }
        Ok(moved)
    }

    fn claim(&mut self, chunk: u64, units: UnitSet) -> Result<Ticket, Ticket> {
        let busy = self.busy.entry(chunk).or_default();
        if let Some((ticket, _)) = busy.iter().find(|(_, taken)| !taken.and(units).is_empty()) {
            return Err(*ticket);
        }
        let ticket = Ticket(self.next);
        self.next += 1;
        busy.push((ticket, units));
        Ok(ticket)
    }

    fn unclaim(&mut self, job: &Job) {
        if let Some(busy) = self.busy.get_mut(&job.chunk) {
            busy.retain(|(ticket, _)| *ticket != job.ticket);
            if busy.is_empty() {
                self.busy.remove(&job.chunk);
            }
        }
    }
}

/// Adds the units that are wholly within a range.
fn exclude(layout: &ChunkLayout, excluded: &mut HashMap<u64, UnitSet>, range: Extent) {
    for part in layout.split(range.offset, range.length) {
        let whole = layout.covered(&part);
        if !whole.is_empty() {
            let units = excluded.entry(part.chunk).or_default();
            *units = units.union(whole);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: u64 = 4096;
    const CHUNK: u64 = 64 * UNIT;

    fn at(offset: u64, length: u64) -> Extent {
        Extent { offset, length }
    }

    #[test]
    fn storage_takes_from_no_image() {
        let layout = ChunkLayout::new(4 * CHUNK, 18, 9);
        let mut hold = Hold::new(layout);
        let all = at(0, 4 * CHUNK);
        let [older, newer, storage] = [1, 2, 3].map(SnapshotKey);
        // Nobody holds the device.
        assert_eq!(hold.usable(all), [all]);
        assert_eq!(hold.usable(at(100, 512)), [at(100, 512)]);
        hold.arm(older).unwrap();
        assert_eq!(hold.usable(all), []);
        // What was nobody's at the instant may be used, in whole units or in parts.
        hold.set_free(older, vec![at(UNIT, 2 * UNIT), at(2 * CHUNK, CHUNK)]);
        assert_eq!(hold.usable(all), [at(UNIT, 2 * UNIT), at(2 * CHUNK, CHUNK)]);
        assert_eq!(hold.usable(at(512, CHUNK)), [at(UNIT, 2 * UNIT)]);
        assert_eq!(hold.usable(at(UNIT + 512, 512)), [at(UNIT + 512, 512)]);
        // Another snapshot may need it.
        hold.arm(newer).unwrap();
        assert_eq!(hold.usable(all), []);
        // What is preserved for it is needed from the origin no more; while it is being preserved it is.
        let write = ChunkRange {
            chunk: 2,
            offset: 2 * CHUNK,
            length: 4 * UNIT,
        };
        let Decision::Copy(job) = hold.begin(&write) else {
            panic!("the write goes");
        };
        assert_eq!(hold.usable(all), []);
        let outcomes: Vec<_> = job
            .needs
            .iter()
            .map(|_| {
                Ok(Kept::Slot(Slot {
                    region: crate::cow::RegionId::new(0),
                    offset: 0,
                }))
            })
            .collect();
        hold.settle(&job, &outcomes);
        assert_eq!(hold.usable(all), [at(2 * CHUNK, 4 * UNIT)]);
        // Nor is what is storage already.
        hold.exclude(storage, at(2 * CHUNK + UNIT, UNIT));
        assert_eq!(hold.stored_in(at(2 * CHUNK, CHUNK)), [storage]);
        assert_eq!(
            hold.usable(all),
            [at(2 * CHUNK, UNIT), at(2 * CHUNK + 2 * UNIT, 2 * UNIT)]
        );
        hold.give_back(storage);
        assert_eq!(hold.usable(all), [at(2 * CHUNK, 4 * UNIT)]);
        hold.release(newer).unwrap();
        assert_eq!(hold.usable(all), [at(UNIT, 2 * UNIT), at(2 * CHUNK, CHUNK)]);
        hold.release(older).unwrap();
        assert_eq!(hold.usable(all), [all]);
    }
}

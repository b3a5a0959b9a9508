//! Write: writes of the origin and of images, step by step, and the storing of buffers.

use std::collections::HashMap;

use super::task::{Task, WriteStep};
use super::{IO, NO_SPACE, SMALL, Token, World, place, places, sectors};
use crate::choices::Choices;
use crate::cow::{BufferId, ChunkRange, ChunkState, Decision, Job, Kept, Place, Slot, SnapshotKey, UnitSet};

impl<C: Choices> World<C> {
    pub(super) fn advance_write(
        &mut self,
        mut parts: Vec<ChunkRange>,
        token: Token,
        step: WriteStep,
    ) -> Option<Task> {
        let part = *parts.first()?;
        let step = match step {
            WriteStep::Ask if self.taking => WriteStep::Ask,
            WriteStep::Ask => match self.hold.begin(&part) {
                Decision::Go => WriteStep::Land(None, places(&part)),
                Decision::Copy(job) => {
                    self.seen.copies += 1;
                    self.seen.shared += u64::from(job.needs.len() > 1);
                    WriteStep::Read(job)
                }
                Decision::Wait(_) => {
                    self.seen.waits += 1;
                    WriteStep::Ask
                }
            },
            WriteStep::Read(job) => {
                let old = self.read_origin(&job);
                WriteStep::Keep(job, old)
            }
            WriteStep::Keep(job, old) => {
                self.keep(&job, &old);
                WriteStep::Ask
            }
            WriteStep::Land(_, mut rest) => {
                if let Some(at) = rest.pop() {
                    self.origin[usize::try_from(at).expect(SMALL)] = token;
                }
                if rest.is_empty() {
                    self.hold.end();
                    parts.remove(0);
                    WriteStep::Ask
                } else {
                    WriteStep::Land(None, rest)
                }
            }
        };
        (!parts.is_empty()).then_some(Task::Write { parts, token, step })
    }

    fn read_origin(&self, job: &Job) -> HashMap<u64, Token> {
        self.hold
            .layout()
            .ranges(job.chunk, job.units)
            .flat_map(|range| sectors(range.offset, range.length))
            .map(|at| (at as u64, self.origin[at]))
            .collect()
    }

    /// Meets the needs of a job, in memory or in storage, or fails.
    fn keep(&mut self, job: &Job, old: &HashMap<u64, Token>) {
        let mut outcomes = Vec::new();
        for need in &job.needs {
            outcomes.push(if self.choices.once_in(1000) {
                Err(IO)
            } else if self.choices.once_in(3) {
                let buffer = BufferId(self.fresh());
                self.buffers.insert(buffer, old.clone());
                self.tasks.push(Task::Store {
                    snapshot: need.snapshot,
                    chunk: job.chunk,
                    buffer,
                    job: None,
                });
                Ok(Kept::Memory(buffer))
            } else {
                self.put(need.snapshot, job.chunk, need.units, old)
            });
        }
        self.hold.settle(job, &outcomes);
    }

    /// Writes sectors of a chunk to a place of it.
    fn put(
        &mut self,
        key: SnapshotKey,
        chunk: u64,
        units: UnitSet,
        from: &HashMap<u64, Token>,
    ) -> Result<Kept, i32> {
        if !self.snapshots.contains_key(&key) || self.hold.table(key).is_err() {
            return Ok(Kept::Nowhere);
        }
        let Some(slot) = self.room(key, chunk, units) else {
            self.seen.overflows += 1;
            return Err(NO_SPACE);
        };
        let layout = *self.hold.layout();
        let snapshot = self.snapshots.get_mut(&key).expect("it was there");
        for range in layout.ranges(chunk, units) {
            for at in sectors(range.offset, range.length) {
                let at = at as u64;
                if let Some(token) = from.get(&at) {
                    snapshot.storage.insert(place(&layout, chunk, slot, at), *token);
                }
            }
        }
        Ok(Kept::Slot(slot))
    }

    pub(super) fn advance_image_write(
        &mut self,
        snapshot: SnapshotKey,
        mut parts: Vec<ChunkRange>,
        token: Token,
        step: WriteStep,
    ) -> Option<Task> {
        let part = *parts.first()?;
        let step = match step {
            WriteStep::Ask => match self.hold.begin_image(snapshot, &part) {
                Err(_) => return None,
                Ok(Decision::Wait(_)) => WriteStep::Ask,
                Ok(Decision::Copy(job)) if !job.needs.is_empty() => WriteStep::Read(job),
                Ok(Decision::Copy(job)) => WriteStep::Land(Some(job), Vec::new()),
                Ok(Decision::Go) => unreachable!("an image write is a job"),
            },
            WriteStep::Read(job) => {
                let old = self.read_origin(&job);
                WriteStep::Keep(job, old)
            }
            WriteStep::Keep(job, old) => {
                self.keep(&job, &old);
                WriteStep::Ask
            }
            WriteStep::Land(job, _) => {
                let job = job.expect("an image write lands in a job");
                self.land_image(snapshot, &job, &part, token);
                parts.remove(0);
                WriteStep::Ask
            }
        };
        (!parts.is_empty()).then_some(Task::ImageWrite {
            snapshot,
            parts,
            token,
            step,
        })
    }

    /// The new sectors, and around them in the same units what is in memory.
    fn land_image(&mut self, key: SnapshotKey, job: &Job, part: &ChunkRange, token: Token) {
        let layout = *self.hold.layout();
        let mut data = HashMap::new();
        for range in layout.ranges(job.chunk, job.units) {
            for piece in self
                .hold
                .resolve(key, range.offset, range.length)
                .unwrap_or_default()
            {
                if let Place::Memory { buffer, .. } = piece.place {
                    for at in sectors(piece.range.offset, piece.range.length) {
                        data.insert(at as u64, self.buffers[&buffer][&(at as u64)]);
                    }
                }
            }
        }
        for at in sectors(part.offset, part.length) {
            data.insert(at as u64, token);
        }
        let stored: Vec<(Slot, UnitSet)> = match self.hold.table(key) {
            Ok(table) => table.stored_in(job.chunk, job.units).collect(),
            Err(_) => Vec::new(),
        };
        let fresh = stored
            .iter()
            .fold(job.units, |left, (_, units)| left.without(*units));
        let slot = self.room(key, job.chunk, fresh);
        if let Some(slot) = slot
            && let Some(snapshot) = self.snapshots.get_mut(&key)
        {
            for (target, units) in stored.into_iter().chain([(slot, fresh)]) {
                for range in layout.ranges(job.chunk, units) {
                    for at in sectors(range.offset, range.length) {
                        let at = at as u64;
                        if let Some(token) = data.get(&at) {
                            let place = place(&layout, job.chunk, target, at);
                            snapshot.storage.insert(place, *token);
                        }
                    }
                }
            }
            for at in sectors(part.offset, part.length) {
                snapshot.image[at] = token;
            }
        }
        self.hold.settle_image(key, job, slot);
    }

    /// A place of the chunk with room for more units: the one it has, or another where that has none left. A write to
    /// an image that finds none fails, and breaks nothing.
    fn room(&mut self, key: SnapshotKey, chunk: u64, units: UnitSet) -> Option<Slot> {
        let snapshot = self.snapshots.get_mut(&key)?;
        let layout = *self.hold.layout();
        let table = self.hold.table_mut(key).ok()?;
        let bytes = layout.bytes_of(chunk, units);
        let space = &mut snapshot.space;
        let known = table
            .slot(chunk)
            .filter(|slot| space.extend(*slot, bytes).is_ok());
        let slot = match known {
            Some(slot) => slot,
            None => {
                self.seen.moved += u64::from(table.slot(chunk).is_some());
                space.slot(layout.chunk_bytes(), bytes).ok()?
            }
        };
        table.place(chunk, slot);
        Some(slot)
    }

    pub(super) fn advance_store(
        &mut self,
        snapshot: SnapshotKey,
        chunk: u64,
        buffer: BufferId,
        job: Option<Job>,
    ) -> Option<Task> {
        let job = match job {
            None => match self.hold.begin_store(snapshot, chunk, buffer) {
                Err(_) | Ok(None) => return None,
                Ok(Some(Decision::Copy(job))) => {
                    assert_eq!(
                        self.hold.table(snapshot).expect("it was asked").state(chunk),
                        ChunkState::InMemory
                    );
                    Some(job)
                }
                Ok(Some(_)) => None,
            },
            Some(job) => {
                let data = self.buffers[&buffer].clone();
                let outcome = self.put(snapshot, chunk, job.units, &data);
                self.hold.settle(&job, &[outcome]);
                return None;
            }
        };
        Some(Task::Store {
            snapshot,
            chunk,
            buffer,
            job,
        })
    }
}

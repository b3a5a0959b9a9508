//! Preserve: moves old data from the origin to where snapshots keep it.

use std::io;
use std::sync::Arc;

use nix::errno::Errno;

use super::mover::{self, Move, PIECE};
use super::origin::{Origin, State};
use super::staging::Staged;
use super::store::{Promise, Store};
use crate::cow::{BufferId, ChunkRange, Job, Kept, Slot, UnitSet};

/// Most bytes that are staged at once.
const STAGED: u64 = 1 << 20;

/// A job, with the stores that it needs.
pub(super) struct Work {
    job: Job,
    /// Of each need, in order.
    stores: Vec<Option<Arc<Store>>>,
}

impl Work {
    pub(super) fn new(job: Job, state: &State) -> Self {
        let stores = job
            .needs
            .iter()
            .map(|need| {
                state
                    .stores
                    .get(&need.snapshot)
                    .map(|armed| Arc::clone(&armed.store))
            })
            .collect();
        Self { job, stores }
    }
}

/// Why a need could not be met.
#[derive(Debug)]
pub(super) struct Unmet {
    pub(super) errno: i32,
    what: String,
}

impl Unmet {
    fn new(action: &str, error: &io::Error) -> Self {
        Self {
            errno: errno_of(error),
            what: format!("{action}: {error}"),
        }
    }
}

pub(super) fn errno_of(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(Errno::EIO as i32)
}

/// A place for a need.
struct Target {
    slot: Slot,
    store: Arc<Store>,
}

impl Origin {
    /// Carries out jobs of a write to the origin. Each is settled, however this ends; what can't be kept breaks its
    /// snapshot.
    pub(super) fn preserve(&self, work: Vec<Work>) {
        // Those behind one that panics are settled, too.
        let guards: Vec<Settle<'_>> = work
            .into_iter()
            .map(|work| Settle {
                origin: self,
                outcomes: Vec::with_capacity(work.stores.len()),
                work,
            })
            .collect();
        for mut guard in guards {
            guard.outcomes = self.keep(&guard.work);
        }
    }

    /// Carries out the job of a write to an image. If that fails the write does, and nothing is broken: the old data is
    /// still in the origin.
    pub(super) fn preserve_for_image(&self, work: Work) -> Result<(), Unmet> {
        let mut guard = Settle {
            origin: self,
            outcomes: Vec::new(),
            work,
        };
        let mut kept = self.keep(&guard.work);
        let failed = kept.pop_if(|outcome| outcome.is_err());
        kept.resize_with(guard.work.stores.len(), || Ok(Kept::Nowhere));
        guard.outcomes = kept;
        match failed {
            Some(Err(unmet)) => Err(unmet),
            _ => Ok(()),
        }
    }

    /// Meets the needs of a job, one outcome for each.
    fn keep(&self, work: &Work) -> Vec<Result<Kept, Unmet>> {
        let job = &work.job;
        if let Some(outcomes) = self.stage(work) {
            return outcomes;
        }
        let mut targets: Vec<Result<Option<Target>, Unmet>> = job
            .needs
            .iter()
            .zip(&work.stores)
            .map(|(need, store)| self.target(store.as_ref(), job.chunk, need.units))
            .collect();
        let placed: Vec<Option<Slot>> = targets
            .iter()
            .map(|target| target.as_ref().ok()?.as_ref().map(|target| target.slot))
            .collect();
        let moves = self.moves(job, &targets);
        let outcome = self.mover.run(&**self.disk(), &moves);
        if let Some((offset, error)) = outcome.read {
            let what = format!("read old data at byte {offset} of {}", self.disk().name());
            for target in targets.iter_mut().filter(|target| matches!(target, Ok(Some(_)))) {
                *target = Err(Unmet::new(&what, &error));
            }
        }
        for (need, disk, error) in outcome.written {
            targets[need] = Err(Unmet::new(&format!("write old data to {disk}"), &error));
        }
        let outcomes = targets.into_iter().zip(&job.needs).map(|(target, need)| {
            let Some(Target { slot, store }) = target? else {
                return Ok(Kept::Nowhere);
            };
            record(&store, job.chunk, need.units, slot)?;
            store.count(self.layout().bytes_of(job.chunk, need.units));
            Ok(Kept::Slot(slot))
        });
        let outcomes: Vec<_> = outcomes.collect();
        for (number, outcome) in outcomes.iter().enumerate() {
            // What was not kept takes no room: the write to an image that asked for it may be tried again.
            if let (Err(_), Some(slot), Some(store)) = (outcome, placed[number], &work.stores[number]) {
                let bytes = self.layout().bytes_of(job.chunk, job.needs[number].units);
                store.storage.retract(slot, bytes);
            }
        }
        outcomes
    }

    /// The pieces of a job, and where they go.
    fn moves(&self, job: &Job, targets: &[Result<Option<Target>, Unmet>]) -> Vec<Move> {
        let start = self.layout().start_of(job.chunk);
        let mut moves = Vec::new();
        for piece in self.layout().ranges(job.chunk, job.units).flat_map(pieces) {
            let mut places = Vec::new();
            for (number, (target, need)) in targets.iter().zip(&job.needs).enumerate() {
                let Ok(Some(Target { slot, store })) = target else {
                    continue;
                };
                for range in self.layout().ranges(job.chunk, need.units) {
                    let from = range.offset.max(piece.offset);
                    let to = range.end().min(piece.end());
                    if from < to {
                        places.push(mover::Target {
                            need: number,
                            disk: store.storage.disk(slot.region),
                            offset: slot.offset + (from - start),
                            from: within(&piece, from),
                            length: within(&piece, to) - within(&piece, from),
                        });
                    }
                }
            }
            if !places.is_empty() {
                moves.push(Move {
                    offset: piece.offset,
                    length: length_of(&piece),
                    targets: places,
                });
            }
        }
        moves
    }

    /// Keeps the old data in memory, if all who need it can do with that and have room.
    fn stage(&self, work: &Work) -> Option<Vec<Result<Kept, Unmet>>> {
        let job = &work.job;
        let mut ranges = self.layout().ranges(job.chunk, job.units);
        let first = ranges.next()?;
        let end = ranges.last().map_or(first.end(), |last| last.end());
        let span = usize::try_from(end - first.offset).ok()?;
        if span as u64 > STAGED {
            return None;
        }
        let mut reserved = Vec::new();
        for store in &work.stores {
            match store {
                Some(store) if store.promise == Promise::Nothing && store.staging.reserve() => {
                    reserved.push(store);
                }
                Some(_) => {
                    reserved.iter().for_each(|store| store.staging.give_back());
                    return None;
                }
                None => {}
            }
        }
        let mut data = reserved
            .first()
            .map_or_else(Vec::new, |store| store.staging.buffer(span));
        for range in self.layout().ranges(job.chunk, job.units) {
            let at = usize::try_from(range.offset - first.offset).expect("within the span");
            let part = data.get_mut(at..at + length_of(&range))?;
            if let Err(error) = self.disk().read_at(part, range.offset) {
                reserved.iter().for_each(|store| store.staging.give_back());
                let what = format!("read old data at byte {} of {}", range.offset, self.disk().name());
                let unmet = |_| Err(Unmet::new(&what, &error));
                return Some(job.needs.iter().map(unmet).collect());
            }
        }
        let staged = Arc::new(Staged {
            chunk: job.chunk,
            start: first.offset,
            data,
        });
        let put = |store: &Option<Arc<Store>>| {
            Ok(match store {
                Some(store) => Kept::Memory(store.staging.put(Arc::clone(&staged))),
                None => Kept::Nowhere,
            })
        };
        Some(work.stores.iter().map(put).collect())
    }

    /// Finds a place for units of a chunk; `None` if the snapshot is gone or broken.
    fn target(
        &self,
        store: Option<&Arc<Store>>,
        chunk: u64,
        units: UnitSet,
    ) -> Result<Option<Target>, Unmet> {
        let Some(store) = store else {
            return Ok(None);
        };
        let slot = self.place(store, chunk, units).map_err(|overflow| Unmet {
            errno: Errno::ENOSPC as i32,
            what: overflow.to_string(),
        })?;
        Ok(slot.map(|slot| Target {
            slot,
            store: Arc::clone(store),
        }))
    }

    /// Stores a buffer of the queue.
    pub(super) fn store_staged(&self, store: &Arc<Store>, id: BufferId, staged: &Staged) {
        let mut state = self.lock();
        let job = loop {
            match state.hold.begin_store(store.key, staged.chunk, id) {
                // Gone, broken, or overwritten by the image's user.
                Err(_) | Ok(None) => break None,
                Ok(Some(crate::cow::Decision::Copy(job))) => break Some(job),
                Ok(Some(_)) => {
                    state = self
                        .settled
                        .wait(state)
                        .unwrap_or_else(std::sync::PoisonError::into_inner);
                }
            }
        };
        drop(state);
        if let Some(job) = job {
            let mut guard = Settle {
                origin: self,
                work: Work {
                    job,
                    stores: vec![Some(Arc::clone(store))],
                },
                outcomes: Vec::new(),
            };
            let units = guard.work.job.units;
            guard.outcomes.push(self.put_staged(store, staged, units));
        }
        store.staging.done(id);
    }

    fn put_staged(&self, store: &Arc<Store>, staged: &Staged, units: UnitSet) -> Result<Kept, Unmet> {
        let Some(Target { slot, .. }) = self.target(Some(store), staged.chunk, units)? else {
            return Ok(Kept::Nowhere);
        };
        for range in self.layout().ranges(staged.chunk, units) {
            let at = usize::try_from(range.offset - staged.start).expect("it is in the buffer");
            let data = &staged.data[at..at + length_of(&range)];
            let disk = store.storage.disk(slot.region);
            let offset = slot.offset + (range.offset - self.layout().start_of(staged.chunk));
            disk.write_at(data, offset)
                .map_err(|error| Unmet::new(&format!("write old data to {}", disk.name()), &error))?;
        }
        record(store, staged.chunk, units, slot)?;
        store.count(self.layout().bytes_of(staged.chunk, units));
        Ok(Kept::Slot(slot))
    }
}

fn record(store: &Store, chunk: u64, units: UnitSet, slot: Slot) -> Result<(), Unmet> {
    store
        .record(chunk, units, slot)
        .map_err(|error| Unmet::new("note where old data is", &error))
}

/// Settles a job, with errors where there is no outcome.
struct Settle<'a> {
    origin: &'a Origin,
    work: Work,
    outcomes: Vec<Result<Kept, Unmet>>,
}

impl Drop for Settle<'_> {
    fn drop(&mut self) {
        let mut outcomes = std::mem::take(&mut self.outcomes);
        outcomes.resize_with(self.work.stores.len(), || {
            Err(Unmet {
                errno: Errno::EIO as i32,
                what: "preserving ended by a defect of blksnap".to_owned(),
            })
        });
        // A broken snapshot says so before the write goes on that breaks it.
        for (store, outcome) in self.work.stores.iter().zip(&outcomes) {
            if let (Some(store), Err(unmet)) = (store, outcome) {
                store.fail(unmet.errno, &unmet.what);
            }
        }
        let outcomes: Vec<_> = outcomes
            .into_iter()
            .map(|outcome| outcome.map_err(|unmet| unmet.errno))
            .collect();
        self.origin.lock().hold.settle(&self.work.job, &outcomes);
        self.origin.settled.notify_all();
        // Not before the table names them: the store's thread would find nothing to do.
        for (store, outcome) in self.work.stores.iter().zip(&outcomes) {
            if let (Some(store), Ok(Kept::Memory(buffer))) = (store, outcome) {
                store.staging.enqueue(*buffer);
            }
        }
    }
}

fn length_of(range: &ChunkRange) -> usize {
    usize::try_from(range.length).expect("a chunk fits into memory")
}

/// Offset of a byte in a piece.
fn within(piece: &ChunkRange, byte: u64) -> usize {
    usize::try_from(byte - piece.offset).expect("a piece fits into memory")
}

/// A range in pieces that are read at once.
fn pieces(range: ChunkRange) -> impl Iterator<Item = ChunkRange> {
    (range.offset..range.end())
        .step_by(usize::try_from(PIECE).expect("a piece fits into memory"))
        .map(move |offset| ChunkRange {
            chunk: range.chunk,
            offset,
            length: PIECE.min(range.end() - offset),
        })
}

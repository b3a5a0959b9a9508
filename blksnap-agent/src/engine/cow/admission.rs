//! Admission: a write waits until all that it would destroy is kept.

use std::sync::{PoisonError, RwLockReadGuard};
use std::time::Instant;

use super::origin::Origin;
use super::preserve::Work;
use crate::cow::{ChunkRange, Decision};

/// A write that may go on. It is under way until this is dropped, and no snapshot is taken meanwhile.
#[derive(Debug)]
pub struct Admitted<'a> {
    origin: &'a Origin,
    /// Parts that the hold counts.
    parts: usize,
    _gate: RwLockReadGuard<'a, ()>,
}

impl Drop for Admitted<'_> {
    fn drop(&mut self) {
        if self.parts > 0 {
            let mut state = self.origin.lock();
            (0..self.parts).for_each(|_| state.hold.end());
        }
    }
}

impl Origin {
    /// Waits until a write of any kind to the range may go on: all that snapshots lack of it is preserved, or they are
    /// broken. Never fails.
    #[must_use = "the write is over when this is dropped"]
    pub fn admit(&self, offset: u64, length: u64) -> Admitted<'_> {
        let gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        let mut admitted = Admitted {
            origin: self,
            parts: 0,
            _gate: gate,
        };
        self.guard_storage(offset, length);
        if !self.is_armed() {
            return admitted;
        }
        let mut parts = self.layout().split(offset, length);
        if let Some(first) = parts.next() {
            match parts.next() {
                // Most writes: no list is needed if nothing has to be preserved.
                None => {
                    if self.lock().hold.begin_if_clear(&first) {
                        admitted.parts = 1;
                        return admitted;
                    }
                    self.wait(&mut admitted, vec![first]);
                }
                Some(second) => {
                    let all = [first, second].into_iter().chain(parts).collect();
                    self.wait(&mut admitted, all);
                }
            }
        }
        admitted
    }

    /// Preserves what the parts need, and waits for others that do.
    fn wait(&self, admitted: &mut Admitted<'_>, mut parts: Vec<ChunkRange>) {
        let mut since = None;
        let mut state = self.lock();
        loop {
            let mut work = Vec::new();
            parts.retain(|part| match state.hold.begin(part) {
                Decision::Go => {
                    admitted.parts += 1;
                    false
                }
                Decision::Copy(job) => {
                    work.push(Work::new(job, &state));
                    true
                }
                Decision::Wait(_) => true,
            });
            if parts.is_empty() {
                break;
            }
            since.get_or_insert_with(Instant::now);
            if work.is_empty() {
                // What it needs is under way elsewhere. This write has nothing under way itself, so nobody waits for it.
                state = self.settled.wait(state).unwrap_or_else(PoisonError::into_inner);
            } else {
                drop(state);
                self.preserve(work);
                state = self.lock();
            }
        }
        drop(state);
        if let Some(since) = since {
            self.times.add(since.elapsed());
        }
    }
}

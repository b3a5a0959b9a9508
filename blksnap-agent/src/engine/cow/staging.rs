//! Staging: old data in memory that waits to be stored.
//!
//! For snapshots that promise to survive nothing, a write goes on as soon as its old data is in a buffer. The buffers
//! wait in a queue for the store's thread. A full queue makes writes wait for the storage as the others do.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::cow::BufferId;

/// Old data of one chunk.
#[derive(Debug)]
pub(super) struct Staged {
    /// The chunk.
    pub(super) chunk: u64,
    /// First byte on the device.
    pub(super) start: u64,
    /// The bytes from there on; those of units that were not preserved are anything.
    pub(super) data: Vec<u8>,
}

/// Buffers of one store.
#[derive(Debug)]
pub(super) struct Staging {
    /// Most buffers that wait.
    most: usize,
    /// Most free buffers that are kept.
    kept: usize,
    state: Mutex<State>,
    /// Something waits, or the end has come.
    work: Condvar,
}

#[derive(Debug, Default)]
struct State {
    staged: BTreeMap<BufferId, Arc<Staged>>,
    queue: VecDeque<BufferId>,
    /// Places that were given out and are not used yet.
    reserved: usize,
    free: Vec<Vec<u8>>,
    next: u64,
    closed: bool,
}

impl Staging {
    pub(super) fn new(most: usize, kept: usize) -> Self {
        Self {
            most,
            kept,
            state: Mutex::default(),
            work: Condvar::new(),
        }
    }

    /// Whether there is a place in the queue; it is taken then, until [`Staging::put`] or [`Staging::give_back`].
    pub(super) fn reserve(&self) -> bool {
        let mut state = self.lock();
        let room = !state.closed && state.staged.len() + state.reserved < self.most;
        state.reserved += usize::from(room);
        room
    }

    /// A reserved place is not needed.
    pub(super) fn give_back(&self) {
        let mut state = self.lock();
        state.reserved = state.reserved.saturating_sub(1);
    }

    /// Puts a buffer into a reserved place.
    pub(super) fn put(&self, staged: Arc<Staged>) -> BufferId {
        let mut state = self.lock();
        state.reserved = state.reserved.saturating_sub(1);
        let id = BufferId(state.next);
        state.next += 1;
        state.staged.insert(id, staged);
        id
    }

    /// The table names the buffer now: it may be stored.
    pub(super) fn enqueue(&self, id: BufferId) {
        self.lock().queue.push_back(id);
        self.work.notify_one();
    }

    /// A buffer that waits, or is just being stored.
    pub(super) fn get(&self, id: BufferId) -> Option<Arc<Staged>> {
        self.lock().staged.get(&id).cloned()
    }

    /// The next buffer to be stored; waits for one. `None` at the end.
    pub(super) fn next(&self) -> Option<(BufferId, Arc<Staged>)> {
        let mut state = self.lock();
        loop {
            if let Some(id) = state.queue.pop_front()
                && let Some(staged) = state.staged.get(&id)
            {
                return Some((id, Arc::clone(staged)));
            }
            if state.closed {
                return None;
            }
            if state.queue.is_empty() {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// A buffer is stored, or not needed any more.
    pub(super) fn done(&self, id: BufferId) {
        let mut state = self.lock();
        if let Some(staged) = state.staged.remove(&id)
            && let Some(staged) = Arc::into_inner(staged)
            && state.free.len() < self.kept
        {
            state.free.push(staged.data);
        }
    }

    /// A buffer of `length` bytes; their content is anything.
    pub(super) fn buffer(&self, length: usize) -> Vec<u8> {
        let mut buffer = self.lock().free.pop().unwrap_or_default();
        buffer.resize(length, 0);
        buffer
    }

    /// Buffers that wait.
    pub(super) fn waiting(&self) -> usize {
        self.lock().staged.len()
    }

    /// Nothing is taken any more. What waits is given out by [`Staging::next`] before the end.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.work.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_queue_is_bounded_and_buffers_are_used_again() {
        let staging = Staging::new(2, 1);
        let stage = |n: u64| {
            staging.reserve().then(|| {
                let mut data = staging.buffer(4096);
                data[0] = u8::try_from(n).unwrap();
                let id = staging.put(Arc::new(Staged {
                    chunk: n,
                    start: n << 18,
                    data,
                }));
                staging.enqueue(id);
                id
            })
        };
        let first = stage(1).unwrap();
        assert!(staging.reserve());
        assert!(stage(2).is_none(), "a reserved place counts");
        staging.give_back();
        stage(2).unwrap();
        assert!(stage(3).is_none());
        assert_eq!(staging.waiting(), 2);

        let (id, staged) = staging.next().unwrap();
        assert_eq!((id, staged.chunk), (first, 1));
        assert!(staging.get(id).is_some(), "it can be read until it is stored");
        drop(staged);
        staging.done(id);
        assert!(staging.get(id).is_none());
        assert_eq!(staging.buffer(4096)[0], 1, "the buffer that was freed");

        staging.close();
        assert!(!staging.reserve());
        assert_eq!(
            staging.next().unwrap().1.chunk,
            2,
            "what waits is stored before the end"
        );
        assert!(staging.next().is_none());
    }
}

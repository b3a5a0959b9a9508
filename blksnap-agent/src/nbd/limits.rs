//! Limits: what bounds a server, and the memory that its connections share.
//!
//! # Memory
//! Every buffer that a client can cause is taken from a `Budget`: at most [`ServerLimits::connection_bytes`] for a
//! connection, at most [`ServerLimits::total_bytes`] for all. What one connection may have also shrinks with what is
//! left: half of it. A few clients that never read their answers therefore can't take everything; the more of them
//! there are, the less each one gets, and something is always left for the next. Where even that is used up, a
//! connection that has nothing still gets `FLOOR` bytes, so that it goes on.

use std::sync::Arc;
use std::time::Duration;

use super::proto::limits::MAX_PAYLOAD;
use super::wake::Waker;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Mutex, PoisonError};

/// Bounds of a server. The defaults suit a daemon beside other work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerLimits {
    /// Connections at once; more are closed at once.
    pub connections: u32,
    /// Requests in flight on one connection.
    pub in_flight: u32,
    /// Bytes of requests and answers in flight on one connection; at least one of the largest payload fits.
    pub connection_bytes: usize,
    /// Bytes of requests and answers in flight on all connections.
    pub total_bytes: usize,
    /// Threads for requests that wait for a disk, for all connections.
    pub workers: u32,
    /// Longest handshake, TLS included.
    pub handshake_timeout: Duration,
    /// Longest time in which a client neither reads what it was sent nor goes on with a request it began.
    pub write_timeout: Duration,
    /// Longest time between an answer and the next request; zero: for ever.
    pub idle_timeout: Duration,
    /// Longest time for requests in flight when the server stops.
    pub grace: Duration,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            connections: 256,
            in_flight: 64,
            connection_bytes: 64 << 20,
            total_bytes: 512 << 20,
            workers: 32,
            handshake_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(120),
            idle_timeout: Duration::ZERO,
            grace: Duration::from_secs(5),
        }
    }
}

impl ServerLimits {
    /// With values that can work: nothing is 0 that must not be, and the largest payload fits.
    #[must_use]
    pub(super) fn sound(self) -> Self {
        let least = 2 * MAX_PAYLOAD as usize;
        Self {
            in_flight: self.in_flight.max(1),
            connection_bytes: self.connection_bytes.max(MAX_PAYLOAD as usize + FLOOR),
            total_bytes: self.total_bytes.max(least),
            workers: self.workers.max(1),
            ..self
        }
    }
}

/// Bytes that a connection gets though nothing is left, if it has none.
pub(super) const FLOOR: usize = 1 << 20;

/// Memory of all connections.
#[derive(Debug)]
pub(super) struct Budget {
    total: usize,
    used: AtomicUsize,
    waiting: Mutex<Vec<Arc<Waker>>>,
}

impl Budget {
    pub(super) const fn new(total: usize) -> Self {
        Self {
            total,
            used: AtomicUsize::new(0),
            waiting: Mutex::new(Vec::new()),
        }
    }

    /// Bytes in use.
    #[cfg(test)]
    pub(super) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Takes `bytes` for a connection that has `own` already, if it may have them now.
    pub(super) fn try_take(self: &Arc<Self>, bytes: usize, own: usize) -> Option<Held> {
        let mut used = self.used.load(Ordering::Relaxed);
        loop {
            let free = self.total.saturating_sub(used);
            // Half of what is free: then it is free too.
            let share = own.saturating_add(bytes) <= free / 2;
            let first = own == 0 && (bytes <= free || bytes <= FLOOR);
            if !(share || first) {
                return None;
            }
            match self
                .used
                .compare_exchange_weak(used, used + bytes, Ordering::AcqRel, Ordering::Relaxed)
            {
                Ok(_) => {
                    return Some(Held {
                        budget: Arc::clone(self),
                        bytes,
                    });
                }
                Err(now) => used = now,
            }
        }
    }

    /// Wakes `waker` once some memory is given back. Whoever calls this must try once more afterwards.
    pub(super) fn wake_later(&self, waker: &Arc<Waker>) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if !waiting.iter().any(|known| Arc::ptr_eq(known, waker)) {
            waiting.push(Arc::clone(waker));
        }
    }

    fn give_back(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::AcqRel);
        let waiting = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        for waker in waiting {
            waker.wake();
        }
    }
}

/// Memory taken from a budget until this is dropped.
#[derive(Debug)]
pub(super) struct Held {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Held {
    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.give_back(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn the_greedy_leave_something_for_the_next() {
        let budget = Arc::new(Budget::new(512 * MIB));
        let mut held = Vec::new();
        for connection in 0..200 {
            let mut own = 0;
            while let Some(more) = budget.try_take(MIB, own) {
                own += more.bytes();
                held.push(more);
            }
            assert!(own >= MIB, "connection {connection} got {own}");
        }
        assert!(budget.used() <= 512 * MIB + 200 * FLOOR, "{}", budget.used());
        drop(held);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn the_largest_payload_fits_into_what_is_free() {
        let limits = ServerLimits {
            connection_bytes: 0,
            total_bytes: 0,
            in_flight: 0,
            workers: 0,
            ..ServerLimits::default()
        }
        .sound();
        assert_eq!((limits.in_flight, limits.workers), (1, 1));
        assert!(limits.connection_bytes > MAX_PAYLOAD as usize);
        let budget = Arc::new(Budget::new(limits.total_bytes));
        let held = budget.try_take(MAX_PAYLOAD as usize, 0).unwrap();
        assert!(budget.try_take(MAX_PAYLOAD as usize, held.bytes()).is_none());
    }

    #[test]
    fn who_waits_is_woken_when_memory_comes_back() {
        let budget = Arc::new(Budget::new(4 * MIB));
        let waker = Arc::new(Waker::new().unwrap());
        let held = budget.try_take(4 * MIB, 0).unwrap();
        assert!(budget.try_take(2 * MIB, 0).is_none());
        budget.wake_later(&waker);
        budget.wake_later(&waker);
        waker.prepare();
        drop(held);
        assert!(waker.take(true));
        assert!(budget.try_take(2 * MIB, 0).is_some());
    }
}

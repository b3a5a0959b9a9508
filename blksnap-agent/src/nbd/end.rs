//! End: tells the connections of a server that it ends.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio_util::sync::CancellationToken;

use super::wake::Waker;

/// How far the end of a server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// It serves.
    Serving = 0,
    /// What is in flight is finished, nothing new is begun.
    Ending = 1,
    /// Whoever is still there is dropped.
    Dropping = 2,
}

/// The end of a server, known to all its connections.
#[derive(Debug)]
pub(super) struct End {
    phase: AtomicU8,
    wakers: Mutex<Vec<Weak<Waker>>>,
    ending: CancellationToken,
    dropping: CancellationToken,
}

impl End {
    pub(super) fn new() -> Self {
        Self {
            phase: AtomicU8::new(Phase::Serving as u8),
            wakers: Mutex::default(),
            ending: CancellationToken::new(),
            dropping: CancellationToken::new(),
        }
    }

    pub(super) fn phase(&self) -> Phase {
        match self.phase.load(Ordering::SeqCst) {
            0 => Phase::Serving,
            1 => Phase::Ending,
            _ => Phase::Dropping,
        }
    }

    /// Cancelled once the end begins.
    pub(super) const fn ending(&self) -> &CancellationToken {
        &self.ending
    }

    /// Cancelled once the rest is dropped.
    pub(super) const fn dropping(&self) -> &CancellationToken {
        &self.dropping
    }

    /// Goes on to a later phase and wakes everybody.
    pub(super) fn advance(&self, phase: Phase) {
        self.phase.fetch_max(phase as u8, Ordering::SeqCst);
        if phase >= Phase::Ending {
            self.ending.cancel();
        }
        if phase >= Phase::Dropping {
            self.dropping.cancel();
        }
        let wakers = self.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        for waker in wakers.iter().filter_map(Weak::upgrade) {
            waker.wake();
        }
    }

    /// From now on `waker` is woken when the phase changes, as long as somebody else holds it.
    pub(super) fn register(&self, waker: &Arc<Waker>) {
        let mut wakers = self.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        wakers.retain(|known| known.strong_count() > 0);
        wakers.push(Arc::downgrade(waker));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_is_woken_and_no_phase_comes_back() {
        let end = End::new();
        let waker = Arc::new(Waker::new().unwrap());
        end.register(&waker);
        end.register(&Arc::new(Waker::new().unwrap()));
        waker.prepare();
        end.advance(Phase::Ending);
        assert!(waker.take(true));
        assert!(end.ending().is_cancelled() && !end.dropping().is_cancelled());
        end.advance(Phase::Dropping);
        end.advance(Phase::Ending);
        assert_eq!(end.phase(), Phase::Dropping);
        assert!(end.dropping().is_cancelled());
        end.register(&waker);
        assert_eq!(
            end.wakers.lock().unwrap().len(),
            2,
            "those that are gone are forgotten"
        );
    }
}

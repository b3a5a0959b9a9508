//! Settled: a condition variable that costs nothing while nobody waits.
//!
//! Each job that is settled is told to whoever waits for it; in most cases nobody does, and the system call would be
//! made for nothing.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, LockResult, MutexGuard};
use std::time::Duration;

/// Who waits for a change of a state that one mutex guards.
///
/// Nobody is missed: a waiter counts itself while it holds the mutex, and whoever notifies has changed the state while
/// holding it. If the waiter was first, the count is seen; if not, the waiter has seen the change.
#[derive(Debug, Default)]
pub(super) struct Settled {
    changed: Condvar,
    waiting: AtomicUsize,
}

impl Settled {
    /// As [`Condvar::wait`].
    pub(super) fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> LockResult<MutexGuard<'a, T>> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let result = self.changed.wait(guard);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        result
    }

    /// As [`Condvar::wait_timeout`], without saying how it ended.
    pub(super) fn wait_timeout<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        longest: Duration,
    ) -> LockResult<MutexGuard<'a, T>> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let result = self.changed.wait_timeout(guard, longest);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        match result {
            Ok((guard, _)) => Ok(guard),
            Err(poisoned) => Err(std::sync::PoisonError::new(poisoned.into_inner().0)),
        }
    }

    /// Wakes all who wait. The state was changed before.
    pub(super) fn notify_all(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Two threads hand a number to and fro: one wake that is missed, and this never ends.
    #[test]
    fn no_wake_is_missed() {
        const TURNS: u32 = 20_000;
        let turn = Mutex::new(0);
        let settled = Settled::default();
        std::thread::scope(|scope| {
            for parity in 0..2 {
                let (turn, settled) = (&turn, &settled);
                scope.spawn(move || {
                    loop {
                        let mut now = turn.lock().unwrap();
                        while *now < TURNS && *now % 2 != parity {
                            now = settled.wait(now).unwrap();
                        }
                        if *now >= TURNS {
                            break;
                        }
                        *now += 1;
                        drop(now);
                        settled.notify_all();
                    }
                });
            }
        });
        assert_eq!(turn.into_inner().unwrap(), TURNS);
        assert_eq!(settled.waiting.into_inner(), 0);
    }
}

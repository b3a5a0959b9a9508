//! Turn: one window at a time in a process.
//!
//! Two takes may have a file system in common (the same device, a disk and its partition, a file system over
//! several devices), and only one of them can freeze it. Or one freezes what the other one copies to, and waits
//! with its own file systems frozen, or both do that to each other. A window is short, so they take turns.

use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use super::rounds::POLL;

static TURN: Mutex<()> = Mutex::new(());

/// The right to freeze, until it is dropped.
#[derive(Debug)]
pub(in crate::filter) struct Turn {
    _guard: MutexGuard<'static, ()>,
    /// How long it was waited for.
    pub(in crate::filter) waited: Duration,
}

impl Turn {
    /// Waits for the turn; `check` may end that.
    pub(in crate::filter) fn wait<E>(check: impl Fn() -> Result<(), E>) -> Result<Self, E> {
        let began = Instant::now();
        let guard = loop {
            match TURN.try_lock() {
                Ok(guard) => break guard,
                // A window that panicked has thawed.
                Err(TryLockError::Poisoned(poisoned)) => break PoisonError::into_inner(poisoned),
                Err(TryLockError::WouldBlock) => {
                    check()?;
                    std::thread::sleep(POLL);
                }
            }
        };
        Ok(Self {
            _guard: guard,
            waited: began.elapsed(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::super::ConvergeError;
    use super::*;

    #[test]
    fn windows_come_one_after_the_other_and_waiting_can_end() {
        let inside = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let _turn = Turn::wait(|| Ok::<_, ConvergeError>(())).unwrap();
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                    std::thread::yield_now();
                    inside.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        let turn = Turn::wait(|| Ok::<_, ConvergeError>(())).unwrap();
        let refused = std::thread::spawn(|| Turn::wait(|| Err(ConvergeError::Cancelled)).is_err());
        assert!(refused.join().unwrap());
        drop(turn);
    }
}

//! Commit: one flush for all that wait together.

use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

/// The flushes of one store.
#[derive(Debug, Default)]
pub(super) struct Commit {
    data: Group,
    journal: Group,
}

impl Commit {
    /// Makes durable the data that was written before the call.
    pub(super) fn data(&self, flush: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.data.join(flush)
    }

    /// Makes durable the entries that were written before the call.
    pub(super) fn journal(&self, flush: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.journal.join(flush)
    }
}

/// Flushes of one kind: at most one runs, and whoever came before it began shares it.
#[derive(Debug, Default)]
struct Group {
    state: Mutex<State>,
    done: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Flushes that have begun.
    begun: u64,
    /// Flushes that have ended.
    ended: u64,
    /// One failed: nothing is known of what was written before, and nothing ever will be.
    failed: Option<i32>,
}

impl Group {
    fn join(&self, flush: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut state = self.lock();
        // One that has begun may have missed what this call stands for: the one after it is needed.
        let needed = state.begun + 1;
        while state.begun > state.ended && state.ended < needed {
            state = self.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(errno) = state.failed {
            return Err(io::Error::from_raw_os_error(errno));
        }
        if state.ended >= needed {
            return Ok(());
        }
        state.begun += 1;
        let number = state.begun;
        drop(state);
        let _end = End { group: self, number };
        let result = flush();
        if let Err(error) = &result {
            let errno = error.raw_os_error().unwrap_or(Errno::EIO as i32);
            self.lock().failed.get_or_insert(errno);
        }
        result
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends a flush, also one that panics.
struct End<'a> {
    group: &'a Group,
    number: u64,
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.group.lock().ended = self.number;
        self.group.done.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use super::*;

    /// Every caller's number is covered by a flush that began after it was written.
    #[test]
    fn who_waits_together_shares_a_flush_that_began_after() {
        let group = Group::default();
        let written = AtomicU64::new(0);
        let durable = AtomicU64::new(0);
        let flushes = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let mine = written.fetch_add(1, Ordering::SeqCst) + 1;
                        group
                            .join(|| {
                                let now = written.load(Ordering::SeqCst);
                                std::thread::sleep(Duration::from_micros(200));
                                durable.fetch_max(now, Ordering::SeqCst);
                                flushes.fetch_add(1, Ordering::SeqCst);
                                Ok(())
                            })
                            .unwrap();
                        assert!(durable.load(Ordering::SeqCst) >= mine);
                    }
                });
            }
        });
        let flushes = flushes.into_inner();
        println!("{flushes} flushes for 400 calls");
        assert!((1..400).contains(&flushes));
    }

    #[test]
    fn one_failure_fails_all_after_it() {
        let group = Group::default();
        group.join(|| Err(Errno::EIO.into())).unwrap_err();
        let error = group.join(|| Ok(())).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::EIO as i32));
    }
}

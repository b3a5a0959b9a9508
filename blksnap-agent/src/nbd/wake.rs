//! Wake: ends the wait of a connection's thread.
//!
//! The thread waits in poll(2) on its socket and on an eventfd. Others write the eventfd only while it waits, so that
//! a busy connection costs them no system call.
//!
//! # Order
//! The waiter calls [`Waker::prepare`], looks once more for work, and waits if there is none. A waker makes the work
//! visible and then calls [`Waker::wake`]. Both touch the same flag with sequential consistency, so either the waiter
//! sees the work or the waker sees that it waits.

use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::sync::atomic::{AtomicBool, Ordering};

/// Ends the wait of one thread.
#[derive(Debug)]
pub(super) struct Waker {
    event: EventFd,
    waiting: AtomicBool,
}

impl Waker {
    /// # Errors
    /// No descriptor is left.
    pub(super) fn new() -> Result<Self, Errno> {
        Ok(Self {
            event: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
            waiting: AtomicBool::new(false),
        })
    }

    /// Ends the wait, or the next one.
    pub(super) fn wake(&self) {
        if self.waiting.swap(false, Ordering::SeqCst) {
            // It fails only when the counter is full, and then the descriptor is readable.
            let _ = self.event.write(1);
        }
    }

    /// From now on [`Waker::wake`] makes the descriptor readable, once.
    pub(super) fn prepare(&self) {
        self.waiting.store(true, Ordering::SeqCst);
    }

    /// After the wait, which found the descriptor `readable` or not: true if somebody ended it.
    pub(super) fn take(&self, readable: bool) -> bool {
        let woken = !self.waiting.swap(false, Ordering::SeqCst);
        if woken || readable {
            // Whoever took the flag may write a moment later: then a later wait ends early, and reads it.
            let _ = self.event.read();
        }
        woken
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    fn is_readable(waker: &Waker) -> bool {
        let mut one = [PollFd::new(waker.as_fd(), PollFlags::POLLIN)];
        poll(&mut one, PollTimeout::ZERO).unwrap() > 0
    }

    #[test]
    fn only_a_wait_is_ended() {
        let waker = Waker::new().unwrap();
        waker.wake();
        assert!(!is_readable(&waker), "nobody waits");
        waker.prepare();
        waker.wake();
        waker.wake();
        assert!(is_readable(&waker));
        assert!(waker.take(true));
        assert!(!is_readable(&waker));
        waker.prepare();
        assert!(!waker.take(false), "nobody ended it");
    }

    #[test]
    fn no_wake_is_lost() {
        use std::sync::Arc;
        use std::sync::atomic::AtomicU32;
        let waker = Arc::new(Waker::new().unwrap());
        let work = Arc::new(AtomicU32::new(0));
        const ROUNDS: u32 = 20_000;
        let other = {
            let (waker, work) = (Arc::clone(&waker), Arc::clone(&work));
            std::thread::spawn(move || {
                for _ in 0..ROUNDS {
                    work.fetch_add(1, Ordering::SeqCst);
                    waker.wake();
                }
            })
        };
        while work.load(Ordering::SeqCst) < ROUNDS {
            waker.prepare();
            let mut readable = false;
            if work.load(Ordering::SeqCst) < ROUNDS {
                let mut one = [PollFd::new(waker.as_fd(), PollFlags::POLLIN)];
                readable = poll(&mut one, PollTimeout::from(60_000_u16)).unwrap() > 0;
                assert!(readable, "a wake was lost");
            }
            waker.take(readable);
        }
        other.join().unwrap();
    }
}

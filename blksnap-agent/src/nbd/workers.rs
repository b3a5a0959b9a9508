//! Workers: threads for requests that wait for a disk.
//!
//! Threads are started as jobs come, up to a maximum, and end when they were idle for a while. A job that panics ends
//! alone; whoever waits for it is told by what the job drops.

use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// An idle thread ends after this time.
const IDLE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    closed: bool,
}

struct Inner {
    state: Mutex<State>,
    come: Condvar,
    most: usize,
}

/// A pool of threads. Dropped, it finishes what was given to it; nobody waits for that.
#[derive(Clone)]
pub(super) struct Workers {
    inner: Arc<Inner>,
    _last: Arc<Close>,
}

/// Closes the pool when its last owner is gone.
struct Close(Arc<Inner>);

impl Drop for Close {
    fn drop(&mut self) {
        self.0.state().closed = true;
        self.0.come.notify_all();
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works until there is nothing to do for a while.
    fn work(&self) {
        let mut state = self.state();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                if catch_unwind(AssertUnwindSafe(job)).is_err() {
                    tracing::error!("a thread that served an nbd request failed");
                }
                state = self.state();
                continue;
            }
            if state.closed {
                break;
            }
            state.idle += 1;
            let (now, wait) = self
                .come
                .wait_timeout(state, IDLE)
                .unwrap_or_else(PoisonError::into_inner);
            state = now;
            state.idle -= 1;
            if wait.timed_out() && state.jobs.is_empty() {
                break;
            }
        }
        state.threads -= 1;
    }
}

impl fmt::Debug for Workers {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Workers")
            .field("most", &self.inner.most)
            .finish_non_exhaustive()
    }
}

impl Workers {
    /// A pool of at most `most` threads.
    pub(super) fn new(most: usize) -> Self {
        let inner = Arc::new(Inner {
            state: Mutex::default(),
            come: Condvar::new(),
            most,
        });
        Self {
            _last: Arc::new(Close(Arc::clone(&inner))),
            inner,
        }
    }

    /// Gives a job to a thread; jobs begin in the order in which they came.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) {
        let mut state = self.inner.state();
        state.jobs.push_back(Box::new(job));
        // Idle threads that were woken for earlier jobs are still counted as idle.
        let more = state.jobs.len() > state.idle && state.threads < self.inner.most;
        if more {
            state.threads += 1;
        }
        // A thread that is not idle looks for jobs before it becomes so.
        let wake = state.idle > 0;
        drop(state);
        if wake {
            self.inner.come.notify_one();
        }
        if more {
            let inner = Arc::clone(&self.inner);
            let started = std::thread::Builder::new()
                .name("blksnap-nbd-io".to_owned())
                .spawn(move || inner.work());
            if let Err(error) = started {
                // With no thread at all the job must still be done by somebody.
                let mut state = self.inner.state();
                state.threads -= 1;
                tracing::warn!(%error, "a thread for nbd requests can't be started");
                if state.threads == 0 {
                    let jobs = std::mem::take(&mut state.jobs);
                    drop(state);
                    for job in jobs {
                        let _ = catch_unwind(AssertUnwindSafe(job));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Barrier, mpsc};

    use super::*;

    #[test]
    fn jobs_run_at_once_and_no_more_than_allowed() {
        let workers = Workers::new(3);
        let meet = Arc::new(Barrier::new(3));
        let running = Arc::new(AtomicUsize::new(0));
        let (done, all) = mpsc::channel();
        for _ in 0..30 {
            let (meet, running, done) = (Arc::clone(&meet), Arc::clone(&running), done.clone());
            workers.run(move || {
                let now = running.fetch_add(1, Ordering::SeqCst) + 1;
                // Three meet, or this never ends.
                meet.wait();
                running.fetch_sub(1, Ordering::SeqCst);
                done.send(now).unwrap();
            });
        }
        drop(done);
        let most = all.iter().max().unwrap();
        assert!(most <= 3, "{most} ran at once");
    }

    #[test]
    fn a_panic_ends_its_job_only() {
        let workers = Workers::new(1);
        let (done, all) = mpsc::channel();
        workers.run(|| panic!("a job that fails on purpose"));
        workers.run(move || done.send(1).unwrap());
        assert_eq!(all.recv(), Ok(1));
    }

    #[test]
    fn what_was_given_is_finished_after_the_end() {
        let (done, all) = mpsc::channel();
        let workers = Workers::new(1);
        for number in 0..5 {
            let done = done.clone();
            workers.run(move || done.send(number).unwrap());
        }
        drop((workers, done));
        assert_eq!(all.iter().collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    }
}

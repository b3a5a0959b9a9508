//! Pool: threads that carry out the requests of one device.
//!
//! As many as were asked for, from the beginning: the file system on the device may be what memory is waiting for, so
//! no thread is started and no buffer made for a request.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

/// Jobs and whether more may come.
#[derive(Debug)]
struct State<J> {
    jobs: VecDeque<J>,
    stopped: bool,
}

#[derive(Debug)]
struct Inner<J> {
    state: Mutex<State<J>>,
    come: Condvar,
}

impl<J> Inner<J> {
    fn state(&self) -> MutexGuard<'_, State<J>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next job; `None` at the end.
    fn next(&self) -> Option<J> {
        let mut state = self.state();
        loop {
            if state.stopped {
                return None;
            }
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
            }
            state = self.come.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Threads for jobs of one kind. Dropped, it is stopped.
#[derive(Debug)]
pub(super) struct Pool<J> {
    inner: Arc<Inner<J>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl<J: Send + 'static> Pool<J> {
    /// Starts `count` threads, each with a worker that `make` gives.
    ///
    /// # Errors
    /// There are no more threads; those that were started are stopped.
    pub(super) fn start<W: FnMut(J) + Send + 'static>(
        name: &str,
        count: usize,
        make: impl Fn() -> W,
    ) -> io::Result<Self> {
        let pool = Self {
            inner: Arc::new(Inner {
                state: Mutex::new(State {
                    jobs: VecDeque::new(),
                    stopped: false,
                }),
                come: Condvar::new(),
            }),
            threads: Mutex::default(),
        };
        for _ in 0..count {
            let inner = Arc::clone(&pool.inner);
            let mut work = make();
            let thread = Builder::new().name(name.to_owned()).spawn(move || {
                while let Some(job) = inner.next() {
                    work(job);
                }
            })?;
            pool.threads().push(thread);
        }
        Ok(pool)
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a job to a thread; jobs begin in the order in which they came. After [`Pool::stop`] it is dropped.
    pub(super) fn give(&self, job: J) {
        let mut state = self.inner.state();
        if !state.stopped {
            state.jobs.push_back(job);
            drop(state);
            self.inner.come.notify_one();
        }
    }

    /// Drops the jobs that did not begin; returns when those that did have ended. Not to be called by a worker.
    pub(super) fn stop(&self) {
        let mut state = self.inner.state();
        state.stopped = true;
        state.jobs.clear();
        drop(state);
        self.inner.come.notify_all();
        let threads = std::mem::take(&mut *self.threads());
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a thread that carried out requests of a ublk device failed");
            }
        }
    }
}

impl<J> Drop for Pool<J> {
    fn drop(&mut self) {
        self.inner.state().stopped = true;
        self.inner.come.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn jobs_run_at_once() {
        let (met, all) = mpsc::channel();
        let pool = Pool::start("test", 3, || {
            let met = met.clone();
            move |barrier: Arc<std::sync::Barrier>| {
                // Three meet, or this never ends.
                barrier.wait();
                met.send(()).unwrap();
            }
        })
        .unwrap();
        let barrier = Arc::new(std::sync::Barrier::new(3));
        for _ in 0..30 {
            pool.give(Arc::clone(&barrier));
        }
        assert_eq!(all.iter().take(30).count(), 30);
    }

    #[test]
    fn the_end_waits_for_what_began_and_drops_the_rest() {
        let (began, begin) = mpsc::channel();
        let (go, wait) = mpsc::channel::<()>();
        let wait = Arc::new(Mutex::new(wait));
        let done = Arc::new(Mutex::new(Vec::new()));
        let pool = Pool::start("test", 1, || {
            let (began, wait, done) = (began.clone(), Arc::clone(&wait), Arc::clone(&done));
            move |number: u32| {
                began.send(number).unwrap();
                wait.lock().unwrap().recv().unwrap();
                done.lock().unwrap().push(number);
            }
        })
        .unwrap();
        pool.give(1);
        pool.give(2);
        assert_eq!(begin.recv(), Ok(1));
        std::thread::scope(|scope| {
            let stop = scope.spawn(|| pool.stop());
            while !pool.inner.state().stopped {
                std::thread::yield_now();
            }
            pool.give(3);
            go.send(()).unwrap();
            stop.join().unwrap();
        });
        assert_eq!(*done.lock().unwrap(), [1]);
    }
}

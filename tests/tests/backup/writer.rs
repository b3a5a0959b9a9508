//! Writer: a process that writes to a file system all the time.

use std::fs::OpenOptions;

use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// Writes to a file, or to a device, until dropped.
pub(crate) struct Writer {
    pub(crate) stop: Arc<AtomicBool>,
    pub(crate) thread: Option<thread::JoinHandle<Result<()>>>,
}

impl Writer {
    /// Writes random pieces to random places within `length`, with a sync now and then.
    pub(crate) fn start(path: PathBuf, length: u64, seed: u64, pause: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut random = StdRng::seed_from_u64(seed);
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)?;
            while !flag.load(Ordering::Acquire) {
                let mut data = vec![0; 512 * random.random_range(1..=128)];
                random.fill(&mut data[..]);
                if random.random_bool(0.2) {
                    data.fill(0);
                }
                let place = random.random_range(0..length - data.len() as u64);
                file.write_all_at(&data, place / 512 * 512)?;
                if random.random_bool(0.1) {
                    file.sync_data()?;
                }
                thread::sleep(pause);
            }
            Ok(())
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }

    pub(crate) fn stop(mut self) -> Result<()> {
        self.end()
    }

    pub(crate) fn end(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Release);
        match self.thread.take().map(thread::JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => bail!("the writer panicked"),
            None => Ok(()),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // The error that matters is the test's.
        let _ = self.end();
    }
}

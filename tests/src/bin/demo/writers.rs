//! Writers: applications on both file systems, from the first snapshot to the last.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};
use blksnap_tests::complain;
use rand::{Rng as _, RngCore as _};

/// The file with the count of [`count`].
pub(crate) const COUNT: &str = "count";
/// A file that is overwritten here and there.
const DATA: &str = "data";
/// Its length.
const DATA_BYTES: u64 = 48 << 20;
/// Most overwrites are in this first part of it.
const BUSY_BYTES: u64 = 6 << 20;
/// Longest new file.
const LONGEST: usize = 128 << 10;
/// Files that are made and removed.
const FILES: u64 = 40;
/// Between two changes.
const PAUSE: Duration = Duration::from_millis(3);

/// The threads that write; ended when dropped.
pub(crate) struct Writers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Writers {
    /// Lays out the files and starts to write: one thread on each file system, and one on both.
    pub(crate) fn start(roots: [&Path; 2]) -> Result<Self> {
        for root in roots {
            let mut content = File::open("/dev/urandom")?.take(DATA_BYTES);
            io::copy(&mut content, &mut File::create(root.join(DATA))?)?;
            fs::write(root.join(COUNT), format!("{:20}", 0))?;
            File::open(root)?.sync_all()?;
        }
        let mut writers = Self {
            stop: Arc::default(),
            threads: Vec::new(),
        };
        let both = roots.map(Path::to_owned);
        writers.spawn(move |stop| count(&both, stop))?;
        for root in roots.map(Path::to_owned) {
            writers.spawn(move |stop| load(&root, stop))?;
        }
        Ok(writers)
    }

    fn spawn(&mut self, body: impl FnOnce(&AtomicBool) -> Result<()> + Send + 'static) -> Result<()> {
        let stop = Arc::clone(&self.stop);
        let thread = thread::Builder::new()
            .name("writer".to_owned())
            .spawn(move || body(&stop))?;
        self.threads.push(thread);
        Ok(())
    }

    /// Ends all of them; an error if one failed before.
    pub(crate) fn stop(mut self) -> Result<()> {
        self.join()
    }

    fn join(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let ended: Vec<_> = self.threads.drain(..).map(JoinHandle::join).collect();
        for thread in ended {
            thread.expect("a writer panicked").context("a writer failed")?;
        }
        Ok(())
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        if let Err(error) = self.join() {
            complain(format_args!("{error:#}"));
        }
    }
}

/// Counts in a file on the first file system and then in one on the second, each time on the disk: at any one
/// instant the first is as far as the second, or one ahead.
fn count(roots: &[PathBuf; 2], stop: &AtomicBool) -> Result<()> {
    let files = [&roots[0], &roots[1]].map(|root| OpenOptions::new().write(true).open(root.join(COUNT)));
    let [first, second] = files;
    let files = [first?, second?];
    let mut number = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        for file in &files {
            file.write_all_at(format!("{number:20}").as_bytes(), 0)?;
            file.sync_data()?;
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}

/// Small overwrites, new files and removed files, some on the disk at once.
fn load(root: &Path, stop: &AtomicBool) -> Result<()> {
    let mut random = rand::rng();
    let data = OpenOptions::new().write(true).open(root.join(DATA))?;
    let mut content = vec![0; LONGEST];
    let mut number = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let length = random.random_range(1..content.len());
        random.fill_bytes(&mut content[..64]);
        if number.is_multiple_of(8) {
            fs::write(root.join(format!("file{number}")), &content[..length])?;
            if let Some(old) = number.checked_sub(8 * FILES).filter(|old| *old > 0) {
                fs::remove_file(root.join(format!("file{old}")))?;
            }
        } else {
            let part = if random.random_ratio(1, 32) {
                DATA_BYTES
            } else {
                BUSY_BYTES
            };
            let offset = random.random_range(0..part - LONGEST as u64);
            data.write_all_at(&content[..length.min(4096)], offset)?;
        }
        if number.is_multiple_of(32) {
            data.sync_data()?;
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}

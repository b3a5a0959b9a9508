//! Writer: keeps a file system or a raw device busy with random writes, until it is dropped.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use blksnap_agent::sys::{AlignedBuffer, ioctl};
use nix::fcntl::{FallocateFlags, fallocate};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::complain;

/// A thread that writes. Dropping it stops and joins the thread.
#[derive(Debug)]
pub struct Writer {
    stop: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
    held: Arc<AtomicBool>,
    failed: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

/// How hard a raw device is written.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Writes in a row.
    pub burst: u32,
    /// Pause after them.
    pub pause: Duration,
}

impl Writer {
    /// Writes files below `directory`: buffered, direct, synced, punched, truncated and removed. A full file
    /// system is fine.
    #[must_use]
    pub fn files(directory: &Path, seed: u64) -> Self {
        let directory = directory.to_owned();
        let failed = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&failed);
        let mut writer = Self::start(seed, move |rng| {
            let path = directory.join(format!("file{}", rng.random_range(0..12)));
            // Whatever a step is refused (no space, no support), the next one is another one.
            if step(&path, rng).is_err_and(|error| error.raw_os_error() == Some(libc::EIO)) {
                counter.fetch_add(1, Ordering::AcqRel);
            }
            // One core is not enough for the writers, the device and the copy.
            std::thread::sleep(Duration::from_micros(rng.random_range(0..2000)));
        });
        writer.failed = failed;
        writer
    }

    /// Steps of a writer of files that an error of the disk ended (`EIO`).
    #[must_use]
    pub fn errors(&self) -> u64 {
        self.failed.load(Ordering::Acquire)
    }

    /// Writes to `node` past the page cache, in bursts.
    #[must_use]
    pub fn raw(node: &Path, seed: u64, pace: Pace) -> Self {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(node)
            .expect("a device of our own opens");
        let blocks = ioctl::blkgetsize64(&file).expect("a block device has a size") / 4096;
        let mut buffer = AlignedBuffer::zeroed(256 << 10);
        let held = Arc::new(AtomicBool::new(false));
        let wait = Arc::clone(&held);
        let mut writer = Self::start(seed, move |rng| {
            for _ in 0..rng.random_range(1..=pace.burst) {
                while wait.load(Ordering::Acquire) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                let count = rng.random_range(1..=64).min(blocks);
                let offset = rng.random_range(0..=blocks - count) * 4096;
                let bytes = usize::try_from(count * 4096).expect("at most the buffer");
                match rng.random_range(0..10) {
                    0 => drop(ioctl::blkdiscard(&file, offset, count * 4096)),
                    1 => drop(ioctl::blkzeroout(&file, offset, count * 4096)),
                    _ => {
                        // Every sector differs from all others; filling all of it would take longer than writing it.
                        for sector in buffer.as_mut_slice()[..bytes].chunks_mut(512) {
                            rng.fill(&mut sector[..8]);
                        }
                        file.write_all_at(&buffer.as_slice()[..bytes], offset)
                            .expect("a device of our own takes writes");
                    }
                }
            }
            std::thread::sleep(pace.pause);
        });
        writer.held = held;
        writer
    }

    /// While this is true a raw writer begins no write: who copies the device may need longer than its pauses.
    #[must_use]
    pub fn hold(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.held)
    }

    fn start(seed: u64, mut step: impl FnMut(&mut StdRng) + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let writes = Arc::new(AtomicU64::new(0));
        let (asked, counter) = (Arc::clone(&stop), Arc::clone(&writes));
        let thread = std::thread::spawn(move || {
            let mut rng = StdRng::seed_from_u64(seed);
            while !asked.load(Ordering::Acquire) {
                step(&mut rng);
                counter.fetch_add(1, Ordering::AcqRel);
            }
        });
        Self {
            stop,
            writes,
            held: Arc::default(),
            failed: Arc::default(),
            thread: Some(thread),
        }
    }

    /// Steps done so far.
    #[must_use]
    pub fn writes(&self) -> u64 {
        self.writes.load(Ordering::Acquire)
    }

    /// Waits until `count` more steps are done: the writer is not stuck.
    pub fn wait_for(&self, count: u64) {
        let goal = self.writes() + count;
        while self.writes() < goal {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.held.store(false, Ordering::Release);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            complain("a writer has failed");
        }
    }
}

fn open(path: &PathBuf, flags: i32) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)
}

fn step(path: &PathBuf, rng: &mut StdRng) -> io::Result<()> {
    let offset = rng.random_range(0..500) * 4096;
    let mut buffer = AlignedBuffer::zeroed(rng.random_range(1..32) * 4096);
    rng.fill(buffer.as_mut_slice());
    match rng.random_range(0..20) {
        0 => fs::remove_file(path),
        1 => open(path, 0)?.set_len(offset),
        2 => {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            Ok(fallocate(open(path, 0)?, flags, offset.cast_signed(), 65_536)?)
        }
        3..8 => open(path, libc::O_DIRECT)?.write_all_at(buffer.as_slice(), offset),
        8..11 => {
            let file = open(path, 0)?;
            file.write_all_at(buffer.as_slice(), offset + 77)?;
            file.sync_all()
        }
        11 => open(path, libc::O_DSYNC)?.write_all_at(&buffer.as_slice()[..512], offset),
        _ => open(path, 0)?.write_all_at(buffer.as_slice(), offset + 1000),
    }
}

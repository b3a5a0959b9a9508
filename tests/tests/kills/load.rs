//! Load: threads that write to a raw device, and what they wrote.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockWriteGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use blksnap_agent::sys::{AlignedBuffer, ioctl};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// Unit of the writes, in bytes.
pub(crate) const UNIT: u64 = 4096;
/// Most units in a write.
const LONGEST: u64 = 16;
/// Most writes in a row.
const BURST: u32 = 12;

/// What the threads share.
struct Shared {
    /// Held for reading while a write is under way and noted.
    gate: RwLock<()>,
    stop: AtomicBool,
    writes: AtomicU64,
    /// Units written since the last [`Paused::forget`].
    written: Mutex<Vec<bool>>,
}

impl Shared {
    fn note(&self, offset: u64, length: u64) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        for unit in offset / UNIT..(offset + length).div_ceil(UNIT) {
            written[usize::try_from(unit).expect("devices are small")] = true;
        }
        self.writes.fetch_add(1, Ordering::Relaxed);
    }
}

/// Threads that write until this is dropped.
pub(crate) struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Result<()>>>,
}

/// While this lives, no write is under way.
pub(crate) struct Paused<'a> {
    shared: &'a Shared,
    _gate: RwLockWriteGuard<'a, ()>,
}

impl Load {
    /// Lets `threads` threads write to `node` past the page cache.
    pub(crate) fn start(node: &Path, seed: u64, threads: u64) -> Result<Self> {
        let bytes = ioctl::blkgetsize64(&File::open(node)?)?;
        let shared = Arc::new(Shared {
            gate: RwLock::new(()),
            stop: AtomicBool::new(false),
            writes: AtomicU64::new(0),
            written: Mutex::new(vec![false; usize::try_from(bytes / UNIT)?]),
        });
        let threads = (0..threads)
            .map(|thread| {
                let file = OpenOptions::new()
                    .write(true)
                    .custom_flags(libc::O_DIRECT)
                    .open(node)
                    .with_context(|| format!("open {}", node.display()))?;
                let shared = Arc::clone(&shared);
                let mut random = StdRng::seed_from_u64(seed ^ (thread + 1) << 56);
                Ok(std::thread::spawn(move || {
                    let mut buffer = AlignedBuffer::zeroed(usize::try_from(LONGEST * UNIT)?);
                    while !shared.stop.load(Ordering::Acquire) {
                        for _ in 0..random.random_range(1..=BURST) {
                            let _open = shared.gate.read().unwrap_or_else(PoisonError::into_inner);
                            write(&shared, &file, bytes / UNIT, &mut buffer, &mut random)?;
                        }
                        std::thread::sleep(Duration::from_micros(random.random_range(0..6000)));
                    }
                    Ok(())
                }))
            })
            .collect::<Result<_>>()?;
        Ok(Self { shared, threads })
    }

    /// Waits for the writes under way, and begins no more.
    pub(crate) fn pause(&self) -> Paused<'_> {
        Paused {
            _gate: self.shared.gate.write().unwrap_or_else(PoisonError::into_inner),
            shared: &self.shared,
        }
    }

    /// Writes done so far.
    pub(crate) fn writes(&self) -> u64 {
        self.shared.writes.load(Ordering::Relaxed)
    }

    /// Ends the threads; fails if one did.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.shared.stop.store(true, Ordering::Release);
        self.threads
            .drain(..)
            .try_for_each(|thread| thread.join().expect("a writer panicked"))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            // The test has failed for another reason already.
            let _ = thread.join();
        }
    }
}

impl Paused<'_> {
    /// The units written, by number.
    pub(crate) fn written(&self) -> Vec<u64> {
        let written = self.shared.written.lock().unwrap_or_else(PoisonError::into_inner);
        (0_u64..)
            .zip(written.iter())
            .filter_map(|(unit, written)| written.then_some(unit))
            .collect()
    }

    /// Begins anew.
    pub(crate) fn forget(&self) {
        self.shared
            .written
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .fill(false);
    }
}

fn write(
    shared: &Shared,
    file: &File,
    units: u64,
    buffer: &mut AlignedBuffer,
    random: &mut StdRng,
) -> Result<()> {
    let count = random.random_range(1..=LONGEST).min(units);
    let (offset, length) = (random.random_range(0..=units - count) * UNIT, count * UNIT);
    match random.random_range(0..20) {
        0 => ioctl::blkdiscard(file, offset, length)?,
        1 => ioctl::blkzeroout(file, offset, length)?,
        _ => {
            let data = &mut buffer.as_mut_slice()[..usize::try_from(length)?];
            for sector in data.chunks_mut(512) {
                random.fill(&mut sector[..8]);
            }
            file.write_all_at(data, offset)?;
        }
    }
    shared.note(offset, length);
    Ok(())
}

//! Writers: programs that write to the device and must never see an error, whatever becomes of the agent.
//!
//! Each has blocks of its own and writes numbers to them, so that a block tells which write it is of. What a writer was
//! answered must be there, and nothing that it never sent.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::scene::{Scene, open, write};

pub(crate) const BLOCK: usize = 4096;
/// Longest wait for writes to go on; a bound against hanging.
const PATIENCE: Duration = Duration::from_secs(240);

/// What is known of a block.
#[derive(Default)]
struct Block {
    sent: AtomicU64,
    answered: AtomicU64,
}

struct Shared {
    seed: u64,
    blocks: Vec<Block>,
    writes: AtomicU64,
    end: AtomicBool,
}

pub(crate) struct Writers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Drop for Writers {
    fn drop(&mut self) {
        // They end when an agent answers them.
        self.shared.end.store(true, Ordering::Release);
    }
}

/// Numbers of the writes that blocks may hold.
pub(crate) type Bounds = Vec<(u64, u64)>;

fn content(seed: u64, block: usize, number: u64) -> Vec<u8> {
    if number == 0 {
        return vec![0; BLOCK];
    }
    let mut random = StdRng::seed_from_u64(seed ^ (block as u64) << 40 ^ number);
    let mut bytes = vec![0; BLOCK];
    random.fill(&mut bytes[..]);
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes
}

fn work(device: &File, shared: &Shared, mine: std::ops::Range<usize>, mut random: StdRng) -> Result<()> {
    let mut number = 0;
    while !shared.end.load(Ordering::Acquire) {
        number += 1;
        let block = random.random_range(mine.clone());
        let state = &shared.blocks[block];
        state.sent.store(number, Ordering::Release);
        let offset = (block * BLOCK) as u64;
        write(device, offset, &content(shared.seed, block, number))
            .with_context(|| format!("write {number} to block {block}"))?;
        state.answered.store(number, Ordering::Release);
        shared.writes.fetch_add(1, Ordering::AcqRel);
    }
    Ok(())
}

impl Writers {
    /// Starts `threads` writers on the whole disk, which holds zeroes.
    pub(crate) fn start(scene: &Scene, threads: usize, seed: u64) -> Result<Self> {
        let blocks = usize::try_from(scene.size)? / BLOCK;
        let shared = Arc::new(Shared {
            seed,
            blocks: (0..blocks).map(|_| Block::default()).collect(),
            writes: AtomicU64::new(0),
            end: AtomicBool::new(false),
        });
        let each = blocks / threads;
        let node = scene.node()?;
        let threads = (0..threads)
            .map(|writer| {
                let (shared, device) = (Arc::clone(&shared), open(&node)?);
                let random = StdRng::seed_from_u64(seed ^ writer as u64);
                let mine = writer * each..(writer + 1) * each;
                Ok(std::thread::spawn(move || work(&device, &shared, mine, random)))
            })
            .collect::<Result<_>>()?;
        Ok(Self { shared, threads })
    }

    /// Writes that were answered.
    pub(crate) fn writes(&self) -> u64 {
        self.shared.writes.load(Ordering::Acquire)
    }

    /// Waits for that many writes more.
    pub(crate) fn run_for(&self, more: u64) -> Result<()> {
        let (started, goal) = (Instant::now(), self.writes() + more);
        while self.writes() < goal {
            ensure!(
                started.elapsed() < PATIENCE,
                "writes do not go on at {}",
                self.writes()
            );
            ensure!(
                self.threads.iter().all(|thread| !thread.is_finished()),
                "a writer ended"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// What blocks have been answered, at least.
    pub(crate) fn answered(&self) -> Vec<u64> {
        let answered = |block: &Block| block.answered.load(Ordering::Acquire);
        self.shared.blocks.iter().map(answered).collect()
    }

    /// With what was answered before, what blocks of a disk of an instant until now may hold.
    pub(crate) fn bounds(&self, answered: Vec<u64>) -> Bounds {
        let sent = |block: &Block| block.sent.load(Ordering::Acquire);
        answered
            .into_iter()
            .zip(self.shared.blocks.iter().map(sent))
            .collect()
    }

    /// Each block holds one whole write within its bounds.
    pub(crate) fn judge(&self, what: &str, bytes: &[u8], bounds: &Bounds) -> Result<()> {
        for (block, (found, (least, most))) in bytes.chunks(BLOCK).zip(bounds).enumerate() {
            let number = u64::from_le_bytes(*found.first_chunk().context("a block")?);
            ensure!(
                (*least..=*most).contains(&number),
                "{what}: block {block} has write {number}, not {least} to {most}"
            );
            ensure!(
                found == content(self.shared.seed, block, number),
                "{what}: block {block} is not that of write {number}"
            );
        }
        Ok(())
    }

    /// Ends the writers, none of which may have seen an error; the device and the file must hold what they wrote.
    pub(crate) fn end(&mut self, scene: &mut Scene) -> Result<()> {
        self.shared.end.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            thread.join().map_err(|_| anyhow!("a writer failed"))??;
        }
        let exact: Bounds = self
            .answered()
            .into_iter()
            .map(|number| (number, number))
            .collect();
        self.judge("the device", &blksnap_tests::read_device(&scene.node()?)?, &exact)?;
        self.judge("the file", &std::fs::read(&scene.file)?, &exact)
    }
}

//! Space of difference storage: what a load of small writes takes, by the unit of preserving.
//!
//! A device of 1 GiB in chunks of 256 KiB is written in blocks of 4 KiB, as many as a tenth of it has, with a snapshot
//! held. The core decides, the storage is a directory; what is counted is what the file system took for it. The
//! figures are bytes taken for each byte written.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use blksnap_agent::cow::{ChunkLayout, Decision, Hold, Job, Kept, SnapshotKey};
use blksnap_agent::disk::{Disk, FileDisk};
use blksnap_agent::storage::{DirStorage, Pool, PoolOptions, StorageSpec, stored_bytes};
use blksnap_tests::seed;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::Bench;

/// Bytes of the device.
const SIZE: u64 = 1 << 30;
/// log2 of a chunk.
const CHUNK: u32 = 18;
/// Bytes of a write.
const BLOCK: u64 = 4096;
/// Writes: a tenth of the device.
const WRITES: u64 = SIZE / BLOCK / 10;

/// Where the writes go.
#[derive(Clone, Copy)]
enum Load {
    /// Anywhere.
    Uniform,
    /// The block of rank k as often as 1/k; ranks are spread over the device.
    Zipf,
    /// One after the other.
    Sequential,
}

impl Load {
    fn offset(self, random: &mut StdRng, number: u64) -> u64 {
        let blocks = SIZE / BLOCK;
        let block = match self {
            Self::Uniform => random.random_range(0..blocks),
            Self::Zipf => {
                let rank = (blocks as f64).powf(random.random::<f64>());
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "from 1 to the number of blocks"
                )]
                let rank = rank as u64;
                // Odd, so that no two ranks have one block.
                rank.wrapping_mul(0x9e37_79b9_7f4a_7c15) % blocks
            }
            Self::Sequential => number,
        };
        block * BLOCK
    }
}

const FIGURES: [(&str, Load, u32); 9] = [
    ("cow_space_uniform_4k", Load::Uniform, 12),
    ("cow_space_uniform_64k", Load::Uniform, 16),
    ("cow_space_uniform_256k", Load::Uniform, CHUNK),
    ("cow_space_zipf_4k", Load::Zipf, 12),
    ("cow_space_zipf_64k", Load::Zipf, 16),
    ("cow_space_zipf_256k", Load::Zipf, CHUNK),
    ("cow_space_sequential_4k", Load::Sequential, 12),
    ("cow_space_sequential_64k", Load::Sequential, 16),
    ("cow_space_sequential_256k", Load::Sequential, CHUNK),
];

pub(crate) fn measure(bench: &mut Bench) -> Result<()> {
    let seed = seed("cow-space");
    let directory = tempfile::Builder::new().prefix("blksnap-bench-").tempdir()?;
    for (name, load, unit) in FIGURES {
        bench.step(&format!("space of the difference storage: {name}"))?;
        let taken = play(directory.path(), load, unit, seed)?;
        bench.report.add(
            name,
            "stored / written",
            format!("{WRITES} writes of 4 KiB, units of {} KiB", (1_u64 << unit) >> 10),
            vec![taken],
        );
    }
    Ok(())
}

/// Bytes taken for each byte that was written; a block that is written again counts once.
fn play(directory: &Path, load: Load, unit: u32, seed: u64) -> Result<f64> {
    let snapshot = SnapshotKey(1);
    let mut hold = Hold::new(ChunkLayout::new(SIZE, CHUNK, unit));
    hold.arm(snapshot)?;
    let pool = Pool::new(PoolOptions::default(), Arc::new(|_| {}));
    pool.append(&StorageSpec::Directory {
        path: directory.to_owned(),
        limit: None,
        keep: None,
    })?;
    let origin = FileDisk::new(
        "origin",
        Arc::new(DirStorage::open(directory)?.create(SIZE)?),
        SIZE,
    );
    let mut random = StdRng::seed_from_u64(seed);
    let mut written = HashSet::new();
    let new = vec![7; usize::try_from(BLOCK)?];
    for number in 0..WRITES {
        let offset = load.offset(&mut random, number);
        for part in hold.layout().split(offset, BLOCK) {
            loop {
                match hold.begin(&part) {
                    Decision::Go => break,
                    Decision::Copy(job) => preserve(&mut hold, &pool, &origin, snapshot, &job)?,
                    Decision::Wait(_) => bail!("nobody else preserves"),
                }
            }
            origin.write_at(&new, part.offset)?;
            hold.end();
        }
        written.insert(offset);
    }
    let slot = hold
        .table(snapshot)?
        .stored()
        .next()
        .context("nothing was preserved")?
        .1;
    pool.flush()?;
    let disk = pool.disk(slot.region);
    let file = disk.file().context("a directory has a file")?;
    let stored = stored_bytes(&file.try_clone_to_owned()?.into())?;
    Ok(stored as f64 / (written.len() as u64 * BLOCK) as f64)
}

/// Copies what a job names from the origin to the storage.
fn preserve(hold: &mut Hold, pool: &Pool, origin: &FileDisk, snapshot: SnapshotKey, job: &Job) -> Result<()> {
    let layout = *hold.layout();
    let bytes = layout.bytes_of(job.chunk, job.units);
    let table = hold.table_mut(snapshot)?;
    let slot = match table.slot(job.chunk) {
        Some(slot) => {
            pool.extend(slot, bytes)?;
            slot
        }
        None => pool.slot(layout.chunk_bytes(), bytes)?,
    };
    table.place(job.chunk, slot);
    for range in layout.ranges(job.chunk, job.units) {
        let mut old = vec![0; usize::try_from(range.length)?];
        origin.read_at(&mut old, range.offset)?;
        let within = range.offset - layout.start_of(job.chunk);
        pool.disk(slot.region).write_at(&old, slot.offset + within)?;
    }
    hold.settle(job, &[Ok(Kept::Slot(slot))]);
    Ok(())
}

//! Idle: what a large device that nobody writes to costs, and how long a look through its map takes.

use std::fs;
use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use blksnap_agent::cbt::{Base, CbtMap};
use blksnap_agent::units::{BlockSize, Generation, Sectors};
use blksnap_tests::{Daemon, LoopDevice};
use uuid::Uuid;

use crate::{Bench, REPEATS};

/// Blocks of a map: as many as a device of 1 TiB has by default.
const BLOCKS: u64 = 1 << 21;
/// Passes that a sample is the mean of.
const PASSES: u32 = 20;
/// Bytes of the device.
const SIZE: u64 = 1 << 40;
/// How long the agent is left alone with it.
const REST: Duration = Duration::from_secs(3);

pub(crate) fn measure(bench: &mut Bench) -> Result<()> {
    bench.step("track: extents_2m_ms")?;
    let extents = extents()?;
    let mut memory = Vec::new();
    let rounds = bench.rounds(REPEATS);
    for round in 1..=rounds {
        bench.step(&format!("track: idle_1tib_rss_mib, {round} of {rounds}"))?;
        memory.push(memory_of_idle()?);
    }
    let report = &mut bench.report;
    let how = format!("every second of {BLOCKS} blocks changed: {} extents", BLOCKS / 2);
    report.add("extents_2m_ms", "<= 2", how, extents);
    let how = "VmRSS of the agent, a sparse loop device of 1 TiB attached".to_owned();
    report.add("idle_1tib_rss_mib", "<= 48", how, memory);
    Ok(())
}

/// Milliseconds that it takes to walk the extents of the worst map there is.
fn extents() -> Result<Vec<f64>> {
    let generation = Generation::new(Uuid::new_v4());
    let size = BlockSize::from_bytes(SIZE / BLOCKS)?;
    let mut map = CbtMap::new(generation, size, Sectors::new(SIZE / 512))?;
    map.mark_bits(&vec![0x5555_5555_5555_5555; usize::try_from(BLOCKS / 64)?]);
    map.take(generation, map.capacity())?;
    let map = map.frozen()?;
    let base = Base {
        generation,
        number: 0,
    };
    (0..REPEATS)
        .map(|_| {
            let began = Instant::now();
            for _ in 0..PASSES {
                let extents = map.changed_since(&base)?;
                // Both numbers of every extent go into it, so that none is left out.
                let sum = extents.fold(0_u64, |sum, extent| {
                    sum.wrapping_add(extent.offset) ^ extent.length
                });
                black_box(sum);
            }
            Ok(began.elapsed().as_secs_f64() * 1000.0 / f64::from(PASSES))
        })
        .collect()
}

/// MiB of an agent that has nothing to do.
fn memory_of_idle() -> Result<f64> {
    let disk = LoopDevice::new(SIZE)?;
    let daemon = Daemon::start()?;
    daemon.run(["attach".as_ref(), disk.path()])?;
    std::thread::sleep(REST);
    let pid = daemon.pid().context("the daemon runs")?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib: f64 = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|value| value.split_whitespace().next()?.parse().ok())
        .context("the kernel does not say the memory of the agent")?;
    Ok(kib / 1024.0)
}

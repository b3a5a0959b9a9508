//! Storm: ten million writes, each to a block of its own, with a ring that holds two thousand records.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::{Daemon, DaemonOptions, Zram};

use crate::Bench;
use crate::programs::{Measuring, Runs, cpu_seconds, tracking_program};
use crate::track::{attach, fio};

/// Writes of a storm.
const WRITES: u64 = 10_000_000;
/// Bytes of a write, and of a tracking block: each write makes a block dirty and a record.
const BLOCK: u64 = 4096;
/// Size of the ring.
const RING: u32 = 64 * 1024;
/// How often the storm comes.
const STORMS: usize = 3;
/// What the writers do: zeroes, which zram keeps nowhere.
const JOB: &str =
    "--rw=randwrite --bs=4k --direct=1 --ioengine=psync --zero_buffers --numjobs=2 --group_reporting";

/// What one storm showed.
struct Storm {
    lost: f64,
    agent: f64,
    program: f64,
    ring_full: f64,
    rate: f64,
}

pub(crate) fn measure(bench: &mut Bench) -> Result<()> {
    let writes = if bench.short { WRITES / 100 } else { WRITES };
    let zram = Zram::new(writes * BLOCK)?;
    let mut storms = Vec::new();
    let rounds = bench.rounds(STORMS);
    for round in 1..=rounds {
        bench.step(&format!("track: storm, {round} of {rounds}"))?;
        storms.push(storm(bench, &zram.path(), writes)?);
    }
    let job = format!("fio {JOB}, ring of {} KiB", RING / 1024);
    let mut add = |name, aim, of: &dyn Fn(&Storm) -> f64| {
        bench
            .report
            .add(name, aim, job.clone(), storms.iter().map(of).collect());
    };
    add("storm_lost", "0", &|storm| storm.lost);
    add("storm_agent_cpu_s", "", &|storm| storm.agent);
    add("storm_bpf_ns", "", &|storm| storm.program);
    add("storm_ring_full", "", &|storm| storm.ring_full);
    add("storm_writes_per_s", "", &|storm| storm.rate);
    Ok(())
}

/// One storm: every block of the disk is written once, so that what is not reported is what is lost.
fn storm(bench: &Bench, node: &Path, writes: u64) -> Result<Storm> {
    let daemon = Daemon::with_options(&DaemonOptions {
        ring_bytes: Some(RING),
        ..DaemonOptions::default()
    })?;
    let pid = daemon.pid().context("the daemon runs")?;
    let program = tracking_program(pid)?;
    attach(&daemon, node, "4K")?;
    let _measuring = Measuring::start()?;
    let (runs, cpu, began) = (Runs::of(program)?, cpu_seconds(pid)?, Instant::now());
    let half = writes / 2 * BLOCK;
    fio(
        bench,
        node,
        &format!("{JOB} --size={half} --offset_increment={half}"),
    )?;
    let rate = writes as f64 / began.elapsed().as_secs_f64();
    let status = daemon.json(["status".as_ref(), node.as_os_str()])?;
    let device = &status["devices"][0];
    let reported = device["cbt"]["dirty_blocks"]
        .as_u64()
        .context("no dirty blocks")?;
    let seen = device["counters"]["operations"]["write"]
        .as_u64()
        .context("no writes")?;
    ensure!(seen >= writes, "only {seen} of {writes} writes were made");
    ensure!(
        device["cbt"]["corrupted"].is_null(),
        "the map is in doubt: {device}"
    );
    Ok(Storm {
        lost: writes as f64 - reported as f64,
        agent: cpu_seconds(pid)? - cpu,
        program: Runs::of(program)?.mean_since(runs)?,
        ring_full: device["counters"]["ring_full"].as_f64().context("no counter")?,
        rate,
    })
}

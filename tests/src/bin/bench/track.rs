//! Track: nanoseconds of the tracking program, and the rate of a writer with and without it.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use blksnap_agent::tracker::EmptyProgram;
use blksnap_tests::{Daemon, Zram};

use crate::programs::{Measuring, Runs, tracking_program};
use crate::{Bench, REPEATS};

/// Size of the disk: as many blocks of 4 KiB as make first touches that can be measured.
const SIZE: u64 = 512 << 20;
/// What the writer does. Zeroes, so that zram has nothing to compress: the quicker the disk, the more the program
/// shows.
const JOB: &str = "--rw=randwrite --bs=4k --direct=1 --ioengine=psync --zero_buffers";
/// What the writer does where its rate counts: data that zram has to keep, as a disk does.
const RATE_JOB: &str = "--rw=randwrite --bs=4k --direct=1 --ioengine=psync";
/// How long it does that.
const TIMED: &str = "--time_based --runtime=2";
/// Once over the disk, each block once.
const ONE_PASS: &str = "--size=100%";

pub(crate) fn measure(bench: &mut Bench) -> Result<()> {
    let zram = Zram::new(SIZE)?;
    let node = zram.path();
    bench.step("track: filling the disk")?;
    fio(
        bench,
        &node,
        "--rw=write --bs=1m --direct=1 --ioengine=psync --zero_buffers",
    )?;
    let steady = steady(bench, &node)?;
    let first = first(bench, &node)?;
    let empty = empty(bench, &node)?;
    let ratio = iops_ratio(bench, &node)?;
    let job = format!("fio {JOB}");
    let report = &mut bench.report;
    report.add("track_steady_ns", "<= 100", format!("{job} {TIMED}"), steady);
    report.add("track_first_ns", "<= 150", format!("{job} {ONE_PASS}"), first);
    report.add("track_empty_ns", "", format!("{job} {TIMED}"), empty);
    report.add(
        "track_iops_ratio",
        ">= 0.97",
        format!("fio {RATE_JOB} {TIMED}"),
        ratio,
    );
    Ok(())
}

/// Every block that is written is dirty already.
fn steady(bench: &Bench, node: &Path) -> Result<Vec<f64>> {
    let daemon = Daemon::start()?;
    let program = tracking_program(daemon.pid().context("the daemon runs")?)?;
    attach(&daemon, node, "64K")?;
    fio(bench, node, &format!("{JOB} {ONE_PASS}"))?;
    let _measuring = Measuring::start()?;
    repeat(bench, "track_steady_ns", || {
        let before = Runs::of(program)?;
        fio(bench, node, &format!("{JOB} {TIMED}"))?;
        Runs::of(program)?.mean_since(before)
    })
}

/// Every write makes a block dirty.
fn first(bench: &Bench, node: &Path) -> Result<Vec<f64>> {
    let daemon = Daemon::start()?;
    let program = tracking_program(daemon.pid().context("the daemon runs")?)?;
    let _measuring = Measuring::start()?;
    repeat(bench, "track_first_ns", || {
        attach(&daemon, node, "4K")?;
        let before = Runs::of(program)?;
        fio(bench, node, &format!("{JOB} {ONE_PASS}"))?;
        let mean = Runs::of(program)?.mean_since(before)?;
        daemon.run(["detach".as_ref(), node.as_os_str()])?;
        Ok(mean)
    })
}

/// A program that does nothing.
fn empty(bench: &Bench, node: &Path) -> Result<Vec<f64>> {
    let mut program = EmptyProgram::attach()?;
    let id = program.id()?;
    let _measuring = Measuring::start()?;
    repeat(bench, "track_empty_ns", || {
        let before = Runs::of(id)?;
        fio(bench, node, &format!("{JOB} {TIMED}"))?;
        Runs::of(id)?.mean_since(before)
    })
}

/// The writer's rate with a daemon that tracks, to that without any program just before and just after: a drift of
/// the machine's speed meets both.
fn iops_ratio(bench: &Bench, node: &Path) -> Result<Vec<f64>> {
    let rate = || fio(bench, node, &format!("{RATE_JOB} {TIMED}"));
    fio(bench, node, &format!("{RATE_JOB} {ONE_PASS}"))?;
    repeat(bench, "track_iops_ratio", || {
        let before = rate()?;
        let tracking = Daemon::start()?;
        attach(&tracking, node, "64K")?;
        let with = rate()?;
        drop(tracking);
        Ok(with / f64::midpoint(before, rate()?))
    })
}

fn repeat(bench: &Bench, name: &str, mut once: impl FnMut() -> Result<f64>) -> Result<Vec<f64>> {
    (1..=REPEATS)
        .map(|round| {
            bench.step(&format!("track: {name}, {round} of {REPEATS}"))?;
            once()
        })
        .collect()
}

/// Tracks the node in blocks of this size.
pub(crate) fn attach(daemon: &Daemon, node: &Path, block_size: &str) -> Result<()> {
    daemon.run([
        "attach".as_ref(),
        "--block-size".as_ref(),
        block_size.as_ref(),
        node.as_os_str(),
    ])?;
    Ok(())
}

/// Runs fio on the node and gives the writes per second.
pub(crate) fn fio(bench: &Bench, node: &Path, arguments: &str) -> Result<f64> {
    let mut command = Command::new("fio");
    command
        .args(["--name=writer", "--output-format=json", "--allow_file_create=0"])
        .arg(format!("--filename={}", node.display()))
        .args(arguments.split_whitespace());
    let text = bench.interrupt.output(&mut command)?;
    let json: serde_json::Value =
        serde_json::from_str(&text).with_context(|| format!("fio said no JSON: {text}"))?;
    json.pointer("/jobs/0/write/iops")
        .and_then(serde_json::Value::as_f64)
        .with_context(|| format!("fio did not say its rate: {text}"))
}

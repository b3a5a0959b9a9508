//! Converge: the rate of a backup against plain copying, and the length of the freeze under load.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result};
use blksnap_tests::{Daemon, LoopDevice, run};
use rand::RngCore as _;

use crate::{Bench, REPEATS};

/// Size of the device that is copied.
const COPIED: u64 = 1 << 30;
/// Size of the device that is frozen.
const FROZEN: u64 = 512 << 20;
/// Bytes of random content that are written at a time.
const PIECE: usize = 1 << 20;
/// How often a freeze is measured.
const TAKES: usize = 9;

pub(crate) fn measure(bench: &mut Bench) -> Result<()> {
    let rates = rates(bench)?;
    bench.report.add(
        "converge_rate_ratio",
        ">= 0.9",
        "blksnap-agent backup DEV FILE, to dd bs=1M iflag=direct conv=fsync of the same".to_owned(),
        rates,
    );
    let freezes = freezes(bench)?;
    bench.report.add(
        "freeze_ms",
        "<= 100",
        "blksnap-agent snapshot create DEV, ext4 under fio randwrite with fsync".to_owned(),
        freezes,
    );
    Ok(())
}

/// Time of dd to that of a backup, in turn: a device full of random data, to the same file system.
fn rates(bench: &Bench) -> Result<Vec<f64>> {
    bench.step("converge: filling the device")?;
    let mut device = LoopDevice::new(COPIED)?;
    device.mkfs("ext4")?;
    let directory = device.mount()?;
    fill(bench, &directory.join("content"), COPIED / 10 * 9)?;
    let daemon = Daemon::start()?;
    daemon.run(["attach".as_ref(), device.path().as_os_str()])?;
    let target = daemon.scratch().join("copy.img");
    (1..=REPEATS)
        .map(|round| {
            bench.step(&format!("converge: converge_rate_ratio, {round} of {REPEATS}"))?;
            let mut dd = Command::new("dd");
            dd.arg(format!("if={}", device.path().display()))
                .arg(format!("of={}", target.display()))
                .args(["bs=1M", "iflag=direct", "conv=fsync", "status=none"]);
            let plain = seconds(bench, &mut dd)?;
            fs::remove_file(&target)?;
            let mut backup =
                daemon.command(["backup".as_ref(), device.path().as_os_str(), target.as_os_str()]);
            let ours = seconds(bench, &mut backup)?;
            fs::remove_file(&target)?;
            Ok(plain / ours)
        })
        .collect()
}

fn seconds(bench: &Bench, command: &mut Command) -> Result<f64> {
    // What the one before left to the disk is not this one's work.
    nix::unistd::sync();
    let start = Instant::now();
    bench.interrupt.output(command)?;
    Ok(start.elapsed().as_secs_f64())
}

/// Random content, which no copy can leave out.
fn fill(bench: &Bench, path: &Path, bytes: u64) -> Result<()> {
    let mut file = File::create(path)?;
    let mut piece = vec![0; PIECE];
    for _ in 0..bytes / PIECE as u64 {
        bench.interrupt.check()?;
        rand::rng().fill_bytes(&mut piece);
        file.write_all(&piece)?;
    }
    Ok(file.sync_all()?)
}

/// Milliseconds that an ext4 in use is frozen by a take.
fn freezes(bench: &Bench) -> Result<Vec<f64>> {
    let mut device = LoopDevice::new(FROZEN)?;
    device.mkfs("ext4")?;
    let directory = device.mount()?;
    let daemon = Daemon::start()?;
    daemon.run(["attach".as_ref(), device.path().as_os_str()])?;
    let _load = Load::start(&directory)?;
    (1..=TAKES)
        .map(|round| {
            bench.step(&format!("converge: freeze_ms, {round} of {TAKES}"))?;
            let mut create = daemon.command(["snapshot", "create", "--output=json"]);
            let text = bench.interrupt.output(create.arg(device.path()))?;
            let snapshot: serde_json::Value = serde_json::from_str(&text)?;
            let frozen = snapshot
                .pointer("/devices/0/image/frozen_seconds")
                .and_then(serde_json::Value::as_f64)
                .with_context(|| format!("no frozen_seconds in {text}"))?;
            let id = snapshot["id"].as_str().context("a snapshot has an id")?;
            daemon.run(["snapshot", "destroy", id])?;
            Ok(frozen * 1000.0)
        })
        .collect()
}

/// A writer on a file system, as a database writes: small, anywhere, with fsync. Ended when dropped.
struct Load(Child);

impl Load {
    fn start(directory: &Path) -> Result<Self> {
        // The file is laid out before, so that the load is there from the first take on.
        run(
            "fallocate",
            ["--length=128M".as_ref(), directory.join("data").as_os_str()],
        )?;
        let child = Command::new("fio")
            .args(["--name=load", "--rw=randwrite", "--bs=4k", "--ioengine=psync"])
            .args([
                "--thread",
                "--size=128m",
                "--overwrite=1",
                "--fsync=8",
                "--rate=20m",
            ])
            .args(["--time_based", "--runtime=3600"])
            .arg(format!("--filename={}", directory.join("data").display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("start fio")?;
        Ok(Self(child))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

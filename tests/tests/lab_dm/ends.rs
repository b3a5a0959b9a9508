//! Ends: an agent that is killed before every step of a take and of a release. The origin goes on without it, and who
//! comes next puts everything back.

use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use blksnap_agent::filter::dm::Dm;
use blksnap_agent::filter::dm::journal::Journal;
use blksnap_agent::units::SnapshotId;
use blksnap_tests::{LoopDevice, run};

use crate::scene::{Group, MIB, Scene, assert_restored, fill, options, snapshot, table};

/// Bound against a hang: a watchdog is there in milliseconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs a take or a release that ends before step `end`; whether it came to its end.
fn child(scene: &Scene, id: SnapshotId, nodes: &[PathBuf], release: bool, end: Option<u32>) -> Result<bool> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blksnap-dm"));
    command
        .arg("--journal")
        .arg(&scene.journal)
        .arg("--storage")
        .arg(&scene.storage)
        .arg("--snapshot")
        .arg(id.to_string());
    if release {
        command.arg("--release");
    }
    if let Some(end) = end {
        command.arg("--end-before").arg(end.to_string());
    }
    let output = command.args(nodes).output()?;
    if output.status.signal() == Some(libc::SIGKILL) {
        return Ok(false);
    }
    ensure!(
        output.status.success(),
        "{}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(true)
}

/// Writes all the time, and counts; no write may fail.
struct Load<'a> {
    nodes: &'a [PathBuf],
    stop: AtomicBool,
    writes: AtomicU64,
}

impl Load<'_> {
    fn run(&self) -> Result<()> {
        let mut turn = 0_u64;
        while !self.stop.load(Ordering::Relaxed) {
            for node in self.nodes {
                fill(node, turn % 8 * 4096, 4096, u8::try_from(turn % 251)?)
                    .with_context(|| format!("a write to {}", node.display()))?;
            }
            turn += 1;
            self.writes.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The origins go on: each of them was written to since.
    fn goes_on(&self) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        let seen = self.writes.load(Ordering::Relaxed);
        while self.writes.load(Ordering::Relaxed) < seen + 3 {
            ensure!(Instant::now() < until, "a write waits, and nobody lets it go on");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

/// Ends before every step, with or without a snapshot that is held beside.
fn every_step(group: &str, release: bool) -> Result<()> {
    let scene = Scene::new()?;
    let disk = LoopDevice::new(40 * MIB)?;
    let group = Group::new(group, disk.path())?;
    let nodes = vec![group.thick("a", 8)?, group.thick("b", 8)?];
    let paths: Vec<&Path> = nodes.iter().map(AsRef::as_ref).collect();
    let before = paths.iter().map(|node| table(node)).collect::<Result<Vec<_>>>()?;
    let load = Load {
        nodes: &nodes,
        stop: AtomicBool::new(false),
        writes: AtomicU64::new(0),
    };
    std::thread::scope(|scope| -> Result<()> {
        let writer = scope.spawn(|| load.run());
        let tried = (|| -> Result<u32> {
            for end in 0.. {
                ensure!(!writer.is_finished(), "a write failed");
                let id = snapshot();
                if release {
                    ensure!(child(&scene, id, &nodes, false, None)?);
                }
                let done = child(&scene, id, &nodes, release, Some(end))?;
                load.goes_on()
                    .with_context(|| format!("ended before step {end}"))?;
                // The next agent.
                let next = Dm::open(options(&scene.journal)?)?;
                let found = next.recover(true)?;
                let kept = found.held.contains_key(&id);
                ensure!(kept == (done && !release), "step {end}: held {kept}, done {done}");
                if kept {
                    next.release(id)?;
                }
                assert_restored(&scene, &paths, &before)
                    .with_context(|| format!("ended before step {end}"))?;
                load.goes_on()?;
                if done {
                    return Ok(end);
                }
            }
            Ok(0)
        })();
        load.stop.store(true, Ordering::Relaxed);
        let written = writer
            .join()
            .map_err(|_| anyhow::anyhow!("the writer panicked"))?;
        let steps = tried?;
        println!(
            "ended before each of {steps} steps, with {} writes",
            load.writes.load(Ordering::Relaxed)
        );
        ensure!(steps > 8, "{steps} steps");
        written
    })
}

#[test]
#[ignore = "needs a kernel with device mapper: cargo xtask test --vm 6.12"]
fn a_take_ends_before_every_step() -> Result<()> {
    every_step("dmendtake", false)
}

#[test]
#[ignore = "needs a kernel with device mapper: cargo xtask test --vm 6.12"]
fn a_release_ends_before_every_step() -> Result<()> {
    every_step("dmendrelease", true)
}

#[test]
#[ignore = "needs a kernel with device mapper: cargo xtask test --vm 6.12"]
fn a_snapshot_outlives_its_agent() -> Result<()> {
    let scene = Scene::new()?;
    let disk = LoopDevice::new(40 * MIB)?;
    let group = Group::new("dmoutlive", disk.path())?;
    let node = group.thick("volume", 16)?;
    let before = table(&node)?;
    fill(&node, 0, 16 * MIB, 1)?;
    let (id, taken, bytes) = scene.take(&[&node], 8 * MIB)?;
    fill(&node, 0, 4 * MIB, 2)?;
    // A new one goes on with it: it reads, grows, and lets go.
    let next = Dm::open(options(&scene.journal)?)?;
    let found = next.recover(true)?;
    let images = found.held.get(&id).context("it is held")?;
    ensure!(*images == taken.images);
    crate::same(&images[0], &bytes[0])?;
    next.grow(id, images[0].origin, 16 * MIB)?;
    fill(&node, 4 * MIB, 12 * MIB, 3)?;
    crate::same(&images[0], &bytes[0])?;
    // One that is told to keep nothing puts everything back.
    let last = Dm::open(options(&scene.journal)?)?;
    let found = last.recover(false)?;
    ensure!(found.lost.len() == 1 && found.held.is_empty(), "{found:?}");
    assert_restored(&scene, &[&node], &[before])
}

#[test]
#[ignore = "needs a kernel with device mapper: cargo xtask test --vm 6.12"]
fn a_snapshot_of_another_boot_is_lost() -> Result<()> {
    let scene = Scene::new()?;
    let disk = LoopDevice::new(40 * MIB)?;
    let group = Group::new("dmboot", disk.path())?;
    let node = group.thick("volume", 16)?;
    let before = table(&node)?;
    let (id, _, _) = scene.take(&[&node], 8 * MIB)?;
    let journal = Journal::open(&scene.journal)?;
    let (mut entries, _) = journal.read()?;
    ensure!(entries.len() == 1 && entries[0].snapshot == id, "{entries:?}");
    entries[0].boot = "another".to_owned();
    journal.write(&entries[0])?;
    let next = Dm::open(options(&scene.journal)?)?;
    let found = next.recover(true)?;
    ensure!(found.held.is_empty() && found.lost.len() == 1, "{found:?}");
    ensure!(found.lost[0].why.contains("started again"), "{found:?}");
    assert_restored(&scene, &[&node], &[before])
}

#[test]
#[ignore = "needs a kernel with device mapper: cargo xtask test --vm 6.12"]
fn a_number_that_another_device_has_is_told_of() -> Result<()> {
    let scene = Scene::new()?;
    let disk = LoopDevice::new(40 * MIB)?;
    let table_of = |sector: u64| format!("0 16384 linear {} {sector}", disk.path().display());
    run("dmsetup", ["create", "dmreused", "--table", &table_of(0)])?;
    let node = Path::new("/dev/mapper/dmreused");
    let shown = ["info", "-c", "--noheadings", "-o", "major,minor", "dmreused"];
    let number = run("dmsetup", shown)?;
    let (major, minor) = number.trim().split_once(':').context("a number")?;
    let (id, _, _) = scene.take(&[node], 8 * MIB)?;
    // Somebody removes the device, and another one gets its number.
    run("dmsetup", ["remove", "--retry", "dmreused"])?;
    let again = [
        "create", "dmreused", "--major", major, "--minor", minor, "--table",
    ];
    run("dmsetup", again.into_iter().chain([table_of(32768).as_str()]))?;
    let tried = scene.take(&[node], 8 * MIB);
    let error = tried.map(drop).expect_err("it is refused").to_string();
    ensure!(error.contains(&id.to_string()), "{error}");
    scene.dm.release(id)?;
    ensure!(crate::scene::ours()?.is_empty());
    // Now it can be taken.
    let (id, taken, bytes) = scene.take(&[node], 8 * MIB)?;
    crate::same(&taken.images[0], &bytes[0])?;
    scene.dm.release(id)?;
    ensure!(table(node)?.contains(" linear "));
    run("dmsetup", ["remove", "--retry", "dmreused"]).map(drop)
}

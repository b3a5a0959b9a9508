//! Kills: an agent that is killed at drawn moments, in takes, in releases, while images are read, and in the recovery
//! from the kill before. `BLKSNAP_DM_KILLS` says how often.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::{LoopDevice, read_device, seed};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::scene::{Group, MIB, Scene, assert_restored, table};

/// Bound against a hang: a watchdog is there in milliseconds, and a worker that begins in seconds.
const PATIENCE: Duration = Duration::from_secs(180);
const BLOCK: u64 = 4096;

/// Numbered writes, one at a time, to blocks that are drawn, and what each block has by them.
struct Load<'a> {
    nodes: &'a [PathBuf],
    mib: u64,
    stop: AtomicBool,
    writes: AtomicU64,
}

impl Load<'_> {
    fn run(&self, seed: u64) -> Result<Vec<BTreeMap<u64, u64>>> {
        use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
        let mut random = StdRng::seed_from_u64(seed);
        let files: Vec<_> = self
            .nodes
            .iter()
            .map(|node| {
                let mut options = std::fs::File::options();
                options.write(true).custom_flags(libc::O_DIRECT).open(node)
            })
            .collect::<std::io::Result<_>>()?;
        let mut written = vec![BTreeMap::new(); files.len()];
        let mut buffer = blksnap_agent::sys::AlignedBuffer::zeroed(usize::try_from(BLOCK)?);
        let mut number = 0_u64;
        while !self.stop.load(Ordering::Relaxed) {
            number += 1;
            let which = random.random_range(0..files.len());
            let block = random.random_range(0..self.mib * MIB / BLOCK);
            buffer.as_mut_slice()[..8].copy_from_slice(&number.to_le_bytes());
            files[which]
                .write_all_at(buffer.as_slice(), block * BLOCK)
                .with_context(|| format!("write {number} to {}", self.nodes[which].display()))?;
            written[which].insert(block, number);
            self.writes.fetch_add(1, Ordering::Relaxed);
            if number.is_multiple_of(64) {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(written)
    }

    /// The origins go on.
    fn goes_on(&self) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        let seen = self.writes.load(Ordering::Relaxed);
        while self.writes.load(Ordering::Relaxed) < seen + 8 {
            ensure!(
                Instant::now() < until,
                "a write failed, or waits and nobody lets it go on"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

struct Workers<'a> {
    scene: &'a Scene,
    sums: &'a Path,
    nodes: &'a [PathBuf],
}

/// What a worker was doing when it was killed, and how many snapshots it had found.
struct End {
    doing: String,
    found: Option<u64>,
}

impl Workers<'_> {
    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blksnap-dm"));
        command.arg("--journal").arg(&self.scene.journal);
        command.arg("--storage").arg(&self.scene.storage);
        command.arg("--sums").arg(self.sums).args(self.nodes);
        command
    }

    /// Starts one, and kills it: `delay` after it is ready, or after its start.
    fn kill(&self, delay: Duration, ready: bool) -> Result<End> {
        let mut child = self
            .command()
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let lines = BufReader::new(child.stdout.take().context("its output")?).lines();
        let said = Mutex::new((String::new(), None, false));
        let lock = || said.lock().unwrap_or_else(PoisonError::into_inner);
        let (killed, output) = std::thread::scope(|scope| -> Result<_> {
            scope.spawn(|| {
                for line in lines.map_while(Result::ok) {
                    let mut said = lock();
                    if let Some(count) = line.strip_prefix("found ") {
                        said.1 = count.parse().ok();
                    }
                    said.2 |= line == "ready";
                    said.0 = line;
                }
            });
            let begun = Instant::now();
            while ready && !lock().2 && child.try_wait()?.is_none() && begun.elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_millis(2));
            }
            std::thread::sleep(delay);
            let killed = child.try_wait()?.is_none();
            child.kill()?;
            Ok((killed, child.wait_with_output()?))
        })?;
        let (doing, found, was_ready) = lock().clone();
        ensure!(
            killed && (was_ready || !ready),
            "it ended by itself, or was not ready, in {doing}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(End { doing, found })
    }

    /// The last one: it looks at what is there, and lets all of it go.
    fn last(&self) -> Result<String> {
        let output = self.command().arg("--once").output()?;
        ensure!(
            output.status.success(),
            "the last one: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

#[test]
#[ignore = "needs a kernel with device mapper: cargo xtask test --vm 6.12"]
fn an_agent_is_killed_at_any_moment() -> Result<()> {
    let kills: u32 = match std::env::var("BLKSNAP_DM_KILLS") {
        Ok(text) => text.parse().context("BLKSNAP_DM_KILLS is a number")?,
        Err(_) => 8,
    };
    let seed = seed("an_agent_is_killed_at_any_moment");
    let mut random = StdRng::seed_from_u64(seed);
    let scene = Scene::new()?;
    let sums = tempfile::tempdir()?;
    let disk = LoopDevice::new(16 * MIB)?;
    let group = Group::new("dmkills", disk.path())?;
    let mib = 4;
    let nodes = vec![group.thick("a", mib)?, group.thick("b", mib)?];
    let paths: Vec<&Path> = nodes.iter().map(AsRef::as_ref).collect();
    let before = paths.iter().map(|node| table(node)).collect::<Result<Vec<_>>>()?;
    let workers = Workers {
        scene: &scene,
        sums: sums.path(),
        nodes: &nodes,
    };
    let load = Load {
        nodes: &nodes,
        mib,
        stop: AtomicBool::new(false),
        writes: AtomicU64::new(0),
    };
    let mut doing: BTreeMap<String, u32> = BTreeMap::new();
    let mut images = 0;
    let written = std::thread::scope(|scope| -> Result<_> {
        let writer = scope.spawn(|| load.run(seed));
        let tried = (|| -> Result<()> {
            for kill in 0..kills {
                // One of five is not waited for: it may still be looking at what the one before left.
                let ready = random.random_range(0..5) > 0;
                let delay = Duration::from_millis(random.random_range(0..2000));
                let end = workers
                    .kill(delay, ready)
                    .with_context(|| format!("kill {kill} of {kills}"))?;
                *doing.entry(end.doing).or_default() += 1;
                images += end.found.unwrap_or_default() * paths.len() as u64;
                load.goes_on()
                    .with_context(|| format!("after kill {kill} of {kills}"))?;
            }
            println!("the last one: {}", workers.last()?.replace('\n', " "));
            Ok(())
        })();
        load.stop.store(true, Ordering::Relaxed);
        let written = writer
            .join()
            .map_err(|_| anyhow::anyhow!("the writer panicked"))?;
        tried?;
        written
    })?;
    assert_restored(&scene, &paths, &before)?;
    for (node, written) in paths.iter().zip(&written) {
        let bytes = read_device(node)?;
        for (block, number) in written {
            let at = usize::try_from(block * BLOCK)?;
            let now = u64::from_le_bytes(bytes[at..at + 8].try_into()?);
            ensure!(
                now == *number,
                "{}: block {block} has write {now}, not {number}",
                node.display()
            );
        }
    }
    println!(
        "{kills} kills, while: {doing:?}; {images} images that a kill had left were exact, {} writes, none failed or lost",
        load.writes.load(Ordering::Relaxed)
    );
    if kills >= 50 {
        for word in ["take", "read", "release"] {
            ensure!(doing.contains_key(word), "none was killed while: {word}");
        }
    }
    Ok(())
}

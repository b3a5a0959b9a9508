//! State: the record of a tracked disk and its seals, cut at every flush. The agent that starts on what is left goes on
//! with proof, or begins anew with a reason; what it then backs up is the disk.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::{LoopDevice, LoopOptions, run, seed, unmount};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use rand::seq::IteratorRandom as _;
use serde_json::Value;

use super::log::{Entry, Record, Recorded};
use super::machine::{BLOCK, MIB, Machine};

/// The file system of the state directory.
const STATE_BYTES: u64 = 16 * MIB;
/// States on which an agent is started, unless `BLKSNAP_CUTS` says another number.
const STARTED: usize = 6;

/// A file of a backup. A backup goes on only in the file that it was written to, unchanged since.
struct Kept {
    path: PathBuf,
    /// Another name of it, which nobody removes.
    kept: PathBuf,
    bytes: Vec<u8>,
    modified: SystemTime,
}

impl Kept {
    fn of(path: PathBuf) -> Result<Self> {
        let found = fs::metadata(&path)?;
        let kept = path.with_file_name(format!("kept-{}", found.ino()));
        if !kept.exists() {
            fs::hard_link(&path, &kept)?;
        }
        Ok(Self {
            bytes: fs::read(&path)?,
            modified: found.modified()?,
            path,
            kept,
        })
    }

    fn restore(&self) -> Result<()> {
        fs::hard_link(&self.kept, &self.path)?;
        let file = File::options().write(true).truncate(true).open(&self.path)?;
        file.write_all_at(&self.bytes, 0)?;
        Ok(file.set_modified(self.modified)?)
    }
}

/// The disk and its backup when a step of the story ended.
struct Step {
    disk: Vec<u8>,
    backup: Vec<Kept>,
    /// The generation of the change map, if an agent ran and tracked the disk.
    generation: Option<String>,
}

/// Backups beside the daemon.
fn backups(machine: &Machine) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(machine.daemon.scratch())?;
    let paths = entries.map(|entry| entry.map(|entry| entry.path()));
    let mut paths = paths.collect::<Result<Vec<_>, _>>()?;
    paths.retain(|path| {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        path.is_file() && name.is_some_and(|name| name.starts_with("image"))
    });
    Ok(paths)
}

fn generation_of(map: &Value) -> Option<String> {
    map["generation_id"].as_str().map(str::to_owned)
}

impl Step {
    fn of(machine: &Machine) -> Result<Self> {
        Ok(Self {
            disk: fs::read(machine.disk.image())?,
            backup: backups(machine)?
                .into_iter()
                .map(Kept::of)
                .collect::<Result<_>>()?,
            generation: match machine.daemon.pid() {
                Some(_) => machine.status()?.and_then(|map| generation_of(&map)),
                None => None,
            },
        })
    }

    /// Makes disk and backup what they were.
    fn restore(&self, machine: &Machine) -> Result<()> {
        let disk = File::options().write(true).open(machine.disk.path())?;
        disk.write_all_at(&self.disk, 0)?;
        disk.sync_all()?;
        for path in backups(machine)? {
            fs::remove_file(path)?;
        }
        self.backup.iter().try_for_each(Kept::restore)
    }
}

/// What a tracked disk goes through, with its state on a device that records. Gives the record, and what there was at
/// each mark.
fn story(machine: &mut Machine) -> Result<(Record, Vec<Step>)> {
    let recorded = Recorded::new(STATE_BYTES)?;
    LoopDevice::mkfs_on(&recorded.node(), "ext4")?;
    machine.stop()?;
    machine.off()?;
    let state = machine.daemon.state_dir();
    run("mount", [recorded.node().as_path(), &state])?;
    let mut steps = Vec::new();
    let told = tell(machine, &recorded, &mut steps);
    let _ = machine.daemon.kill();
    unmount(&state)?;
    told?;
    Ok((recorded.end()?, steps))
}

fn tell(machine: &mut Machine, recorded: &Recorded, steps: &mut Vec<Step>) -> Result<()> {
    let mut mark = |machine: &Machine, what: &str| {
        steps.push(Step::of(machine)?);
        recorded.mark(what)
    };
    machine.on()?;
    mark(machine, "started")?;
    let node = machine.node();
    machine
        .daemon
        .run(["attach", node.as_str(), "--block-size", "64K"])?;
    machine.write(0, 8 * 4096)?;
    ensure!(machine.backup()? == "full");
    mark(machine, "attached")?;
    for round in 1..3 {
        machine.write(round * BLOCK, 4096)?;
        mark(machine, "written")?;
        machine.stop()?;
        machine.seal()?;
        mark(machine, "sealed")?;
        machine.off()?;
        machine.on()?;
        mark(machine, "restarted")?;
        machine.write((round + 50) * BLOCK, 4096)?;
        if round == 1 {
            ensure!(machine.backup()? == "incremental");
        }
        mark(machine, "used")?;
    }
    machine.daemon.run(["detach", &node])?;
    mark(machine, "detached")
}

/// A number for what is in a directory.
fn digest(directory: &Path, hasher: &mut DefaultHasher) -> Result<()> {
    let entries = fs::read_dir(directory)?.collect::<Result<Vec<_>, _>>()?;
    let mut paths: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        path.hash(hasher);
        if path.is_dir() {
            digest(&path, hasher)?;
        } else {
            fs::read(&path)?.hash(hasher);
        }
    }
    Ok(())
}

/// Mounts a copy of what a cut left over the state directory.
fn mount(machine: &Machine, disk: &Path) -> Result<LoopDevice> {
    let copy = disk.with_extension("copy");
    run(
        "cp",
        ["--sparse=always".as_ref(), disk.as_os_str(), copy.as_os_str()],
    )?;
    let device = LoopDevice::on(&copy, &LoopOptions::default())?;
    run("mount", [device.path(), &machine.daemon.state_dir()])?;
    Ok(device)
}

/// The agent starts on this state, and believes no more than is so.
fn start(machine: &mut Machine, step: &Step, generations: &BTreeSet<String>) -> Result<String> {
    step.restore(machine)?;
    machine.off()?;
    machine.on()?;
    let Some(map) = machine.status()? else {
        return Ok("not tracked".to_owned());
    };
    let reason = map["corrupted"].as_str().or(map["began"].as_str());
    let reason = reason.context("no reason")?.to_owned();
    let id = generation_of(&map).context("a generation")?;
    // Compares the backup with the disk.
    let kind = machine.backup()?;
    let known = generations.contains(&id);
    let due = if known { "incremental" } else { "full" };
    ensure!(kind == due, "{kind}, and not {due}: {reason}");
    ensure!(known || !reason.is_empty(), "a generation began without a reason");
    Ok(format!(
        "{}, {kind}",
        if known { "went on" } else { reason.as_str() }
    ))
}

#[test]
#[ignore = "needs a kernel with dm-log-writes: cargo xtask test --vm fei"]
fn state_that_was_cut_at_any_flush_is_never_misread() -> Result<()> {
    let mut random = StdRng::seed_from_u64(seed("state_that_was_cut_at_any_flush_is_never_misread"));
    let started = match std::env::var("BLKSNAP_CUTS") {
        Ok(text) => text.parse().context("BLKSNAP_CUTS is a number")?,
        Err(_) => STARTED,
    };
    let mut machine = Machine::untracked("stop")?;
    let (record, steps) = story(&mut machine)?;
    let disk_path = machine.daemon.scratch().join("replayed");
    let disk = File::create(&disk_path)?;
    disk.set_len(STATE_BYTES)?;

    // All that a cut at a flush can leave: the number of entries, and the step in which it came.
    let (mut step, mut flushes) = (0, 0);
    let mut marks = Vec::new();
    let mut states: BTreeMap<(usize, u64), usize> = BTreeMap::new();
    for (number, entry) in record.entries.iter().enumerate() {
        record.replay(number, &disk)?;
        match entry {
            Entry::Mark(what) => {
                step += 1;
                marks.push(what.as_str());
            }
            Entry::Flushed if step > 0 => {
                flushes += 1;
                disk.sync_all()?;
                let device = mount(&machine, &disk_path)?;
                let mut hasher = DefaultHasher::new();
                let digested = digest(&machine.daemon.state_dir(), &mut hasher);
                unmount(&machine.daemon.state_dir())?;
                digested?;
                run(
                    "fsck.ext4",
                    ["-f".as_ref(), "-n".as_ref(), device.path().as_os_str()],
                )?;
                states.entry((step, hasher.finish())).or_insert(number);
            }
            _ => {}
        }
    }
    println!(
        "{} entries, {flushes} flushes, {} steps, {} states",
        record.entries.len(),
        steps.len(),
        states.len()
    );
    ensure!(flushes > 20 && states.len() > 10, "the record is too short");

    let mut chosen: Vec<(usize, usize)> = states
        .iter()
        .map(|((step, _), number)| (*number, *step))
        .choose_multiple(&mut random, started);
    chosen.sort_unstable();
    disk.set_len(0)?;
    disk.set_len(STATE_BYTES)?;
    let mut next = 0;
    let generations: BTreeSet<String> = steps.iter().filter_map(|step| step.generation.clone()).collect();
    let mut outcomes: BTreeMap<String, u32> = BTreeMap::new();
    for (number, step) in chosen {
        while next <= number {
            record.replay(next, &disk)?;
            next += 1;
        }
        disk.sync_all()?;
        let device = mount(&machine, &disk_path)?;
        // What the disk had become when the step was over is the most that the state may not know of.
        let at = &steps[step.min(steps.len() - 1)];
        let outcome = start(&mut machine, at, &generations)
            .with_context(|| format!("entry {number}, step {step}: {}", machine.daemon.log()));
        let _ = machine.daemon.kill();
        unmount(&machine.daemon.state_dir())?;
        drop(device);
        let outcome = outcome?;
        println!("entry {number}, cut after \"{}\": {outcome}", marks[step - 1]);
        *outcomes.entry(outcome).or_default() += 1;
    }
    println!("{outcomes:?}");
    Ok(())
}

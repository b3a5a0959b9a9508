//! Takes: snapshots taken and released again and again under load leave nothing, in the kernel or in the agent.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::loaded_maps;
use aya::programs::{loaded_links, loaded_programs};
use blksnap_tests::lab::{self, KernelLog};
use blksnap_tests::{Daemon, run, seed};
use serde_json::Value;

use super::agent::{Busy, SIZE, alias_of, attached, id, nothing_is_left, prepare, rounds, start, take};
use super::scene::partition;

/// Bound against hanging for ever.
const PATIENCE: Duration = Duration::from_secs(60);

/// What there is in the guest of all that a take makes.
#[derive(Debug, PartialEq, Eq)]
struct There {
    /// eBPF programs, maps and links, of everybody.
    programs: usize,
    maps: usize,
    links: usize,
    /// Mounts, as the agent sees them.
    mounts: usize,
    /// Those of the agent that were not waited for included.
    children: usize,
    /// Processes with a command line.
    processes: BTreeSet<(u32, String)>,
    /// Disks and partitions.
    partitions: BTreeSet<String>,
}

impl There {
    fn now(agent: u32) -> Result<Self> {
        let processes = processes()?;
        Ok(Self {
            programs: loaded_programs().filter(Result::is_ok).count(),
            maps: loaded_maps().filter(Result::is_ok).count(),
            links: loaded_links().filter(Result::is_ok).count(),
            mounts: fs::read_to_string(format!("/proc/{agent}/mountinfo"))?
                .lines()
                .count(),
            children: processes.iter().filter(|one| one.parent == agent).count(),
            processes: processes
                .into_iter()
                .filter(|one| !one.line.is_empty())
                .map(|one| (one.id, one.line))
                .collect(),
            partitions: fs::read_to_string("/proc/partitions")?
                .lines()
                .filter_map(|line| line.split_whitespace().nth(3))
                .map(str::to_owned)
                .collect(),
        })
    }

    /// Waits until there is no more and no less: the kernel frees some of it later.
    fn comes_back(&self, agent: u32) -> Result<()> {
        let started = Instant::now();
        loop {
            let now = Self::now(agent)?;
            if now == *self {
                return Ok(());
            }
            ensure!(started.elapsed() < PATIENCE, "there is {now:?}, and was {self:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

struct Process {
    id: u32,
    parent: u32,
    line: String,
}

/// All that there are, those that have ended and that nobody waited for as well.
fn processes() -> Result<Vec<Process>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        let Some(id) = name.and_then(|name| name.parse().ok()) else {
            continue;
        };
        // It may be gone by now.
        let Ok(state) = fs::read_to_string(path.join("stat")) else {
            continue;
        };
        // After the name, which may hold anything: the state and the parent.
        let parent = state
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.split_whitespace().nth(1));
        found.push(Process {
            id,
            parent: parent.context("a parent")?.parse()?,
            line: String::from_utf8_lossy(&fs::read(path.join("cmdline")).unwrap_or_default()).into_owned(),
        });
    }
    Ok(found)
}

/// Descriptors and threads of the agent, and the KiB of its memory that are not shared.
fn held_by(agent: u32) -> Result<[usize; 3]> {
    let count = |what: &str| -> Result<usize> { Ok(fs::read_dir(format!("/proc/{agent}/{what}"))?.count()) };
    let status = fs::read_to_string(format!("/proc/{agent}/status"))?;
    let memory = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let memory = memory
        .and_then(|text| text.split_whitespace().next())
        .context("RssAnon")?;
    Ok([count("fd")?, count("task")?, memory.parse()?])
}

/// What grows between the middle and the end, for ever.
fn grows(counts: &[[usize; 3]]) -> Result<()> {
    let (Some(last), Some(middle)) = (counts.last(), counts.get(counts.len() / 2)) else {
        bail!("no rounds")
    };
    ensure!(
        last[0] <= middle[0] + 4 && last[1] <= middle[1] + 4,
        "descriptors, threads: {counts:?}"
    );
    // Reading the types of the kernel takes 40 MiB, which the allocator may keep for a thread that is gone.
    ensure!(last[2] <= middle[2] + (16 << 10), "KiB of memory: {counts:?}");
    Ok(())
}

/// How willingly this thread, and those that it starts from now on, give the processor to others.
fn nice(value: u8) -> Result<()> {
    let thread = nix::unistd::gettid().to_string();
    run("renice", ["-n", &value.to_string(), "-p", &thread]).map(drop)
}

/// A round: two snapshots of a partition and of a whole disk, both with a file system that is written to. With the first
/// one all programs are loaded and attached; the second one shares its gates, and outlives it; with the second one all is
/// taken back.
#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn takes_and_releases_leave_nothing() -> Result<()> {
    prepare()?;
    let seed = seed("gate takes");
    let daemon = start()?;
    let (part, disk) = (partition(SIZE)?, lab::virtio(1)?);
    // Writers get what others leave of the processors, which is most of the time: else a round takes twice as long.
    nice(19)?;
    let busy = [Busy::new(&part, seed)?, Busy::new(&disk, seed ^ 1)?];
    nice(0)?;
    let agent = daemon.pid().context("a pid")?;
    let mut log = KernelLog::follow()?;
    let mut counts: Vec<[usize; 3]> = Vec::new();
    let mut before = None;
    let started = Instant::now();
    let takes = rounds("BLKSNAP_GATE_TAKES", 10);
    for round in 0..takes.div_ceil(2) {
        let mut taken = [Value::Null, Value::Null];
        for one in &mut taken {
            *one = take(&daemon, &[&part, &disk], &[])?;
            for one in &busy {
                one.goes_on(2, PATIENCE)?;
            }
        }
        let known = daemon.json(["snapshot", "list"])?;
        let known = known["snapshots"].as_array().context("a list")?;
        ensure!(
            known.len() == 2 && known.iter().all(|one| one["state"] == "taken"),
            "{known:?}"
        );
        daemon.run(["snapshot", "destroy", id(&taken[0])?])?;
        busy[0].goes_on(2, PATIENCE)?;
        ensure!(
            attached() > 0 && alias_of(&disk).exists(),
            "the second one is not held"
        );
        daemon.run(["snapshot", "destroy", id(&taken[1])?])?;
        nothing_is_left(&alias_of(&disk))?;
        match &before {
            // The first one begins to track the devices.
            None => before = Some(There::now(agent)?),
            Some(before) => before
                .comes_back(agent)
                .with_context(|| format!("round {round}"))?,
        }
        counts.push(held_by(agent)?);
        println!("round {round}: {:?} after {:?}", counts.last(), started.elapsed());
    }
    println!("{takes} takes and releases; left each time: {before:?}");
    grows(&counts)?;
    is_empty(&daemon)?;
    log.is_quiet()?;
    for one in busy {
        one.check()?;
    }
    Ok(())
}

/// The agent knows of no snapshot.
fn is_empty(daemon: &Daemon) -> Result<()> {
    let known = daemon.json(["snapshot", "list"])?;
    ensure!(
        known["snapshots"].as_array().is_some_and(Vec::is_empty),
        "{known}"
    );
    Ok(())
}

//! Programs: how often the kernel ran an eBPF program, and for how long.

use std::fs;
use std::os::fd::OwnedFd;

use anyhow::{Context as _, Result, ensure};
use aya::programs::loaded_programs;
use aya::sys::{Stats, enable_stats};

/// The program that sees writes begin.
pub(crate) const TRACKING: &str = "block_bio_queue";
/// The program that sees requests go to the driver.
pub(crate) const ISSUE: &str = "block_rq_issue";

/// The kernel measures its eBPF programs while this exists (`kernel.bpf_stats_enabled`, by a descriptor, which
/// ends it however this process ends).
pub(crate) struct Measuring {
    _descriptor: OwnedFd,
}

impl Measuring {
    pub(crate) fn start() -> Result<Self> {
        Ok(Self {
            _descriptor: enable_stats(Stats::RunTime)?,
        })
    }
}

/// Runs of a program, and their time in nanoseconds.
#[derive(Clone, Copy)]
pub(crate) struct Runs {
    count: u64,
    nanoseconds: f64,
}

impl Runs {
    /// Of the program with this number up to now.
    pub(crate) fn of(id: u32) -> Result<Self> {
        for program in loaded_programs() {
            let program = program?;
            if program.id() == id {
                return Ok(Self {
                    count: program.run_count(),
                    nanoseconds: program.run_time().as_secs_f64() * 1e9,
                });
            }
        }
        anyhow::bail!("program {id} is gone")
    }

    /// Nanoseconds of each run since `before`.
    pub(crate) fn mean_since(self, before: Self) -> Result<f64> {
        let count = self.count - before.count;
        ensure!(count > 10_000, "the program ran only {count} times");
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let count = count as f64;
        Ok((self.nanoseconds - before.nanoseconds) / count)
    }
}

/// Seconds of processor time that a process and its threads have used (proc_pid_stat(5), fields 14 and 15).
pub(crate) fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is a name in parentheses, which may hold anything.
    let (_, rest) = stat.rsplit_once(')').context("the kernel's line has no name")?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let ticks = |field: usize| -> Result<f64> {
        let text = fields.get(field - 3).context("the kernel's line is short")?;
        Ok(text.parse()?)
    };
    let hertz = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("no clock tick")?;
    #[expect(clippy::cast_precision_loss, reason = "some hundreds")]
    let hertz = hertz as f64;
    Ok((ticks(14)? + ticks(15)?) / hertz)
}

/// The number of the tracking program of a daemon.
pub(crate) fn tracking_program(daemon: u32) -> Result<u32> {
    program_of(daemon, TRACKING)
}

/// The number of a program of a daemon: among those that the process has open.
pub(crate) fn program_of(daemon: u32, name: &str) -> Result<u32> {
    let mut open = Vec::new();
    for entry in fs::read_dir(format!("/proc/{daemon}/fdinfo"))? {
        // A descriptor may be closed meanwhile.
        let text = fs::read_to_string(entry?.path()).unwrap_or_default();
        let id = text.lines().find_map(|line| line.strip_prefix("prog_id:"));
        open.extend(id.and_then(|id| id.trim().parse::<u32>().ok()));
    }
    loaded_programs()
        .filter_map(Result::ok)
        .find(|program| open.contains(&program.id()) && program.name_as_str() == Some(name))
        .map(|program| program.id())
        .with_context(|| format!("the daemon has no program {name}"))
}

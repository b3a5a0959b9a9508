//! Benchmark: what tracking costs a writer, how fast a backup is, how long a freeze, how fast the NBD server,
//! what a snapshot of a served device costs.
//!
//! It runs the agent as it is used, a daemon and its commands, on devices of its own: a zram device and loop
//! devices in the temporary directory. `cargo xtask bench` builds both and starts this.

mod converge;
mod cow;
mod cow_space;
mod dm;
mod gate;
mod idle;
mod issue;
mod nbd;
mod programs;
mod report;
mod storm;
mod track;

use std::process::ExitCode;

use anyhow::{Result, ensure};
use blksnap_tests::{Interrupt, complain};
use clap::{Parser, ValueEnum};

use report::Report;

/// How often each figure is measured.
const REPEATS: usize = 5;

/// Measures the agent.
#[derive(Parser)]
#[command(name = "cargo xtask bench", disable_help_subcommand = true)]
struct Arguments {
    /// Only these groups
    #[arg(value_name = "NAME")]
    groups: Vec<Group>,
    /// Only this figure of the NBD server
    #[arg(long, value_name = "FIGURE")]
    only: Option<String>,
    /// Form of the answer
    #[arg(long, value_name = "FORM", default_value = "text")]
    output: Output,
    /// Of `storm`, `idle`, `cow` and `gate` one round, the storm a hundredth as long: whether it works, no figures to rely on
    #[arg(long)]
    short: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Group {
    /// What tracking costs: a writer, the agent in a storm, its memory; how quick a map is read
    Track,
    /// Of `track`, the agent's memory and the reading of a map only
    Idle,
    /// Of `track`, a storm of writes only
    Storm,
    /// Rate of a backup and length of a freeze
    Converge,
    /// Served devices with a snapshot held, beside qemu-storage-daemon; how long a take takes
    Cow,
    /// What difference storage takes, by the unit of preserving
    CowSpace,
    /// The NBD server beside qemu-nbd and nbdkit
    Nbd,
    /// Writes that the gate holds, beside dm-snapshot; in a guest, and only if it is named
    Gate,
    /// A volume with a snapshot by the dm filter, beside LVM's own; in a guest, and never without its name
    Dm,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// A table
    Text,
    /// One JSON object: the figures by name, and the samples
    Json,
}

/// What every measurement needs.
struct Bench {
    interrupt: Interrupt,
    report: Report,
    short: bool,
}

impl Bench {
    /// How often something is measured that is worth `times` times.
    const fn rounds(&self, times: usize) -> usize {
        if self.short { 1 } else { times }
    }

    /// Says on standard error what is being done.
    fn step(&self, what: &str) -> Result<()> {
        complain(format_args!("bench: {what}"));
        self.interrupt.check()
    }
}

fn main() -> ExitCode {
    // The server that is measured is this program too, as a process of its own.
    let mut words = std::env::args().skip(1);
    if words.next().as_deref() == Some(nbd::SERVE) {
        let words: Vec<String> = words.collect();
        return match nbd::serve(&words) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                complain(format_args!("error: {error:#}"));
                ExitCode::FAILURE
            }
        };
    }
    let arguments = Arguments::parse();
    match measure(&arguments) {
        Ok(report) => {
            match arguments.output {
                Output::Text => print!("{}", report.table()),
                Output::Json => println!("{:#}", report.json()),
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            complain(format_args!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn measure(arguments: &Arguments) -> Result<Report> {
    ensure!(
        nix::unistd::Uid::effective().is_root(),
        "the benchmark makes devices and loads eBPF programs: run it as root"
    );
    let mut bench = Bench {
        interrupt: Interrupt::install()?,
        report: Report::default(),
        short: arguments.short,
    };
    let groups = &arguments.groups;
    let wanted = |group| groups.is_empty() || groups.contains(&group);
    if wanted(Group::Track) {
        track::measure(&mut bench)?;
        issue::measure(&mut bench)?;
    }
    if wanted(Group::Track) || wanted(Group::Idle) {
        idle::measure(&mut bench)?;
    }
    if wanted(Group::Track) || wanted(Group::Storm) {
        storm::measure(&mut bench)?;
    }
    if wanted(Group::Converge) {
        converge::measure(&mut bench)?;
    }
    if wanted(Group::Cow) {
        cow::measure(&mut bench)?;
    }
    if wanted(Group::CowSpace) {
        cow_space::measure(&mut bench)?;
    }
    if wanted(Group::Nbd) {
        nbd::measure(&mut bench, arguments.only.as_deref())?;
    }
    if groups.contains(&Group::Gate) {
        gate::measure(&mut bench)?;
    }
    if groups.contains(&Group::Dm) {
        dm::measure(&mut bench)?;
    }
    Ok(bench.report)
}

//! Developer and CI commands of blksnap: `cargo xtask COMMAND`.

mod apt;
mod fuzz;
mod lint;
mod packages;
mod process;
mod rules;
mod run;
mod support;
mod test;
mod toolchain;
mod vm;
mod workspace;

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::workspace::Profile;

/// Developer and CI commands of blksnap.
#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    disable_help_subcommand = true
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Provide what building and testing need: Rust library sources, bpf-linker, distribution packages
    Setup {
        /// Leave out the distribution packages: enough to build
        #[arg(long)]
        toolchain: bool,
        /// Take the Rust library sources from here only, even if they are present
        #[arg(long, value_name = "FROM", value_enum)]
        rust_src: Option<toolchain::Source>,
    },
    /// Build the agent with its eBPF programs
    Build {
        /// Optimised, as for use
        #[arg(long)]
        release: bool,
    },
    /// Show the main job on two loop devices made for it (root); with `-- ARGS`, run the agent with ARGS as root
    Run {
        /// Optimised, as for use
        #[arg(long)]
        release: bool,
        /// Arguments of the agent
        #[arg(last = true)]
        args: Vec<OsString>,
    },
    /// Run every test (root: they make loop devices and load eBPF programs), or with --vm those of the lab, in guests
    Test(test::Arguments),
    /// Measure the agent on devices made for it (root): `track`, of it `storm` and `idle`, `converge`, `cow`, `nbd`;
    /// everything without a NAME. `gate` and `dm [--kernel NAME]` run in a guest (see `vm`), and only if named
    Bench {
        /// Arguments of the benchmark: `[NAME]... [--output json]`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "NAME")]
        args: Vec<OsString>,
    },
    /// Run fuzz targets for some time each: all of them, or the ones named. `fuzz state_file --seconds 600`
    Fuzz(fuzz::Arguments),
    /// Run a command as root in a guest with another kernel, and give its output and exit code
    Vm(Box<vm::Arguments>),
    /// Cut the power of guests that write to disks with snapshots and change maps, and look at what is left
    Power(vm::power::Arguments),
    /// Make docs/kernel-support.md from the kept results of the lab
    KernelSupport {
        /// Only say whether it is up to date
        #[arg(long)]
        check: bool,
    },
    /// Check format, clippy, documentation and the project's own rules
    Lint,
    /// Format all code
    Fmt,
    /// What the continuous integration does
    Ci,
}

fn main() -> ExitCode {
    match execute(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(command: Command) -> Result<ExitCode> {
    let profile = |release| {
        if release {
            Profile::Release
        } else {
            Profile::Development
        }
    };
    let done = match command {
        Command::Setup { toolchain, rust_src } => {
            toolchain::set_up(rust_src)?;
            if toolchain { Ok(()) } else { packages::set_up() }
        }
        Command::Build { release } => {
            toolchain::set_up(None)?;
            let agent = workspace::build_agent(profile(release))?;
            println!("{}", agent.display());
            Ok(())
        }
        Command::Run { release, args } if args.is_empty() => run::tool(profile(release), "blksnap-demo", &[]),
        Command::Run { release, args } => run::agent(profile(release), &args),
        Command::Test(arguments) => test::run(&arguments),
        Command::Bench { args } if vm::bench::is_asked(&args) => return vm::bench::run(&args),
        Command::Bench { args } => run::tool(Profile::Release, "blksnap-bench", &args),
        Command::Fuzz(arguments) => fuzz::run(&arguments),
        Command::Vm(arguments) => return vm::run(&arguments),
        Command::Power(arguments) => vm::power::run(&arguments),
        Command::KernelSupport { check } => support::run(check),
        Command::Lint => lint::run(),
        Command::Fmt => process::run(workspace::cargo().args(["fmt", "--all"])),
        Command::Ci => process::run(&mut process::command(workspace::root().join(".ci/run"))),
    };
    done.map(|()| ExitCode::SUCCESS)
}

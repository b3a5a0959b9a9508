//! Test: everything the tests need, then all of them.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::unistd::Uid;

use crate::vm::matrix::{self, Wanted};
use crate::workspace::Profile;
use crate::{packages, process, toolchain, workspace};

/// Which tests, and where.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  cargo xtask test -- -p blksnap-tests --test oracle
  cargo xtask test --vm short
  cargo xtask test --vm 6.1,6.12,7.2+full,fei -- lab_tracking dm_")]
pub(crate) struct Arguments {
    /// Kernels with commas between (see `cargo xtask vm`), `short`, or `long`, which is all: the tests run in guests with them
    #[arg(long, value_name = "KERNELS")]
    vm: Option<String>,
    /// Where the results of the guests go, as JSON; target/lab/results.json without
    #[arg(long, value_name = "FILE", requires = "vm")]
    out: Option<PathBuf>,
    /// Keep the results beside the code, in tests/lab/results.json
    #[arg(long, requires = "vm")]
    keep: bool,
    /// How long one guest may take, in seconds
    #[arg(long, default_value_t = 3600, value_name = "SECONDS", requires = "vm")]
    timeout: u64,
    /// Arguments of `cargo test`, such as `-p blksnap-tests NAME`; with --vm, test binaries and parts of names of tests; all
    /// without
    #[arg(last = true)]
    args: Vec<OsString>,
}

/// Runs `cargo test` with `arguments`, or all tests of the workspace. The eBPF crate has none: its arithmetic is
/// in blksnap-common, its programs are tested by loading them.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if let Some(kernels) = &arguments.vm {
        return in_guests(kernels, arguments);
    }
    let arguments = arguments.args.as_slice();
    ensure!(
        Uid::effective().is_root(),
        "the tests make loop devices and load eBPF programs: run `cargo xtask test` as root"
    );
    toolchain::set_up(None)?;
    packages::set_up()?;
    let agent = workspace::build_agent(Profile::Development)?;
    let mut command = workspace::cargo();
    command.env("BLKSNAP_AGENT", &agent).arg("test");
    if arguments.is_empty() {
        command.args(["--workspace", "--exclude", "blksnap-ebpf", "--no-fail-fast"]);
        command.args(["--features", workspace::FEATURES]);
    } else {
        command.args(arguments);
    }
    let tests = process::run(&mut command).context("tests failed (see above)");
    if arguments.is_empty() {
        let orders = orders();
        return tests.and(orders);
    }
    tests
}

/// The tests of the lab.
fn in_guests(kernels: &str, arguments: &Arguments) -> Result<()> {
    toolchain::set_up(None)?;
    packages::set_up()?;
    let names: Vec<String> = arguments
        .args
        .iter()
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    matrix::run(&Wanted {
        kernels,
        names: &names,
        out: arguments.out.as_deref(),
        keep: arguments.keep,
        timeout: Duration::from_secs(arguments.timeout),
    })
}

/// The tests of threads in drawn orders: with the agent compiled for the scheduler that draws them.
fn orders() -> Result<()> {
    process::run(workspace::cargo().args([
        "test",
        "--package",
        "blksnap-agent",
        "--features",
        "shuttle",
        "--lib",
        "orders::",
    ]))
    .context("tests of orders failed (see above)")
}

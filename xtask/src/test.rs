//! Test: everything the tests need, then all of them.

use std::ffi::OsString;

use anyhow::{Context, Result, ensure};
use nix::unistd::Uid;

use crate::workspace::Profile;
use crate::{packages, process, toolchain, workspace};

/// Runs `cargo test` with `arguments`, or all tests of the workspace. The eBPF crate has none: its arithmetic is
/// in blksnap-common, its programs are tested by loading them.
pub(crate) fn run(arguments: &[OsString]) -> Result<()> {
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

//! Run: programs of the workspace, built before, in place of this one.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Error, Result, anyhow, ensure};
use nix::unistd::Uid;

use crate::workspace::Profile;
use crate::{packages, process, toolchain, workspace};

/// Builds the agent and becomes it, with `arguments`; through sudo when this is not root.
pub(crate) fn agent(profile: Profile, arguments: &[OsString]) -> Result<()> {
    toolchain::set_up(None)?;
    let agent = workspace::build_agent(profile)?;
    let mut command = if Uid::effective().is_root() {
        process::command(&agent)
    } else {
        let mut command = process::command("sudo");
        command.arg("--").arg(&agent);
        command
    };
    command.args(arguments);
    Err(become_it(&mut command))
}

/// Builds the agent and `tool`, a program of the tests that makes devices and runs the agent on them, and becomes
/// the tool, with `arguments`.
pub(crate) fn tool(profile: Profile, tool: &str, arguments: &[OsString]) -> Result<()> {
    ensure!(
        Uid::effective().is_root(),
        "this makes block devices and loads eBPF programs: run it as root"
    );
    toolchain::set_up(None)?;
    packages::set_up()?;
    let (agent, tool) = workspace::build_with_tool(profile, tool)?;
    let mut command = process::command(tool);
    command.env("BLKSNAP_AGENT", agent).args(arguments);
    Err(become_it(&mut command))
}

/// Signals and the exit code are the program's own this way. Returns only if that fails.
fn become_it(command: &mut Command) -> Error {
    let error = command.exec();
    anyhow!(error).context(format!("starting `{}` failed", process::line(command)))
}

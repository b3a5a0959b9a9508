//! Run: the agent as root, built before.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;

use anyhow::{Result, anyhow};
use nix::unistd::Uid;

use crate::workspace::Profile;
use crate::{process, toolchain, workspace};

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
    // Signals and the exit code are the agent's own this way.
    let error = command.exec();
    Err(anyhow!(error).context(format!("starting `{}` failed", process::line(&command))))
}

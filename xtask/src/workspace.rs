//! Workspace: its root, cargo in it, and the agent's executable.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::process;

/// The folder of the workspace.
pub(crate) fn root() -> &'static Path {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest)
}

/// The cargo that runs this program, in the workspace.
pub(crate) fn cargo() -> Command {
    let mut command = process::command(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    command.current_dir(root());
    // What `cargo run` tells of this program. Build scripts of crates that ask for it would run again at each change from
    // a cargo started here to one that is not.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(name);
        }
    }
    command
}

/// Where cargo puts what it builds: this program is in `target/PROFILE/`.
pub(crate) fn target() -> PathBuf {
    let own = env::current_exe()
        .ok()
        .and_then(|this| Some(this.parent()?.parent()?.to_owned()));
    own.unwrap_or_else(|| root().join("target"))
}

/// What an agent for development can do beyond the usual.
pub(crate) const FEATURES: &str = "blksnap-agent/ublk";

/// How the agent is compiled.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    /// Quick to build.
    Development,
    /// As it is meant to be used.
    Release,
}

/// Builds the agent and gives the path of its executable. The toolchain must be set up.
pub(crate) fn build_agent(profile: Profile) -> Result<PathBuf> {
    let [agent] = build(profile, [("blksnap-agent", "blksnap-agent")])?;
    Ok(agent)
}

/// Builds the agent and the program `tool` of the tests, which runs it, and gives the paths of both.
pub(crate) fn build_with_tool(profile: Profile, tool: &str) -> Result<(PathBuf, PathBuf)> {
    let [agent, tool] = build(
        profile,
        [("blksnap-agent", "blksnap-agent"), ("blksnap-tests", tool)],
    )?;
    Ok((agent, tool))
}

/// Builds executables, each of a package, and gives their paths.
fn build<const N: usize>(profile: Profile, wanted: [(&str, &str); N]) -> Result<[PathBuf; N]> {
    let mut command = cargo();
    command.args(["build", "--message-format=json-render-diagnostics"]);
    for (package, name) in wanted {
        command.args(["--package", package, "--bin", name]);
    }
    match profile {
        Profile::Release => command.arg("--release"),
        // For the tests.
        Profile::Development => command.args(["--features", FEATURES]),
    };
    let messages = messages_of(&mut command)?;
    let mut paths = wanted.map(|_| PathBuf::new());
    for (path, (_, name)) in paths.iter_mut().zip(wanted) {
        *path = executable(&messages, name).with_context(|| format!("cargo built no executable {name}"))?;
    }
    Ok(paths)
}

/// Runs a `cargo build` that prints its messages as JSON, and gives the path of the executable `name`.
pub(crate) fn executable_of(command: &mut Command, name: &str) -> Result<PathBuf> {
    let messages = messages_of(command)?;
    executable(&messages, name).with_context(|| format!("cargo built no executable {name}"))
}

/// The same for several executables.
pub(crate) fn executables_of(command: &mut Command, names: &[String]) -> Result<Vec<PathBuf>> {
    let messages = messages_of(command)?;
    names
        .iter()
        .map(|name| executable(&messages, name).with_context(|| format!("cargo built no executable {name}")))
        .collect()
}

fn messages_of(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("starting `{}` failed", process::line(command)))?;
    ensure!(output.status.success(), "the build failed (see above)");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The machine's target triple, as the compiler names it.
pub(crate) fn host() -> Result<String> {
    let said = process::output(cargo().args(["--version", "--verbose"]))?;
    said.lines()
        .find_map(|line| line.strip_prefix("host: "))
        .map(str::to_owned)
        .context("cargo did not say what host it runs on")
}

/// The executable `name` in cargo's messages: one JSON object a line.
fn executable(messages: &str, name: &str) -> Option<PathBuf> {
    messages.lines().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let wanted = message.pointer("/target/name")? == name;
        let path = message.get("executable")?.as_str()?;
        wanted.then(|| PathBuf::from(path))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_executable_is_found_among_cargos_messages() {
        let messages = "{\"reason\":\"compiler-artifact\",\"target\":{\"name\":\"nix\"},\"executable\":null}\n\
                        {\"reason\":\"compiler-artifact\",\"target\":{\"name\":\"blksnap-agent\"},\"executable\":\"/t/blksnap-agent\"}\n\
                        {\"reason\":\"build-finished\",\"success\":true}\n";
        assert_eq!(
            executable(messages, "blksnap-agent"),
            Some(PathBuf::from("/t/blksnap-agent"))
        );
        assert_eq!(executable(messages, "nix"), None);
        assert_eq!(executable("not json\n", "blksnap-agent"), None);
    }

    #[test]
    fn the_root_has_the_workspace() {
        assert!(root().join("blksnap-agent/Cargo.toml").is_file());
    }
}

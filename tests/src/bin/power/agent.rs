//! Agent: the process whose state is on the disk that outlives the cut.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::agent_binary;
use blksnap_tests::nbd::{Client, Framing};
use serde_json::Value;

/// Longest wait for it to begin; a bound against hanging for ever.
const PATIENCE: Duration = Duration::from_secs(180);
const RUN: &str = "/run/power";
/// Most bytes of a read.
const PIECE: u64 = 4 << 20;

/// A running agent. It ends with SIGTERM when dropped.
pub(crate) struct Agent {
    binary: PathBuf,
    child: Child,
}

impl Agent {
    /// Starts it with its state and storage in `home`, and waits until it answers.
    pub(crate) fn start(home: &Path) -> Result<Self> {
        let binary = agent_binary()?;
        let log = File::create("/run/power.log")?;
        let child = Command::new(&binary)
            .args(["daemon", "--runtime-dir", RUN, "--bpffs", "/run/power-bpf"])
            .arg("--storage")
            .arg(home.join("storage"))
            .arg("--state-dir")
            .arg(home.join("state"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start the agent")?;
        let mut agent = Self { binary, child };
        let begun = Instant::now();
        while !agent.command(&["served"]).output()?.status.success() {
            ensure!(
                begun.elapsed() < PATIENCE,
                "the agent does not begin: {}",
                log_text()
            );
            ensure!(
                agent.child.try_wait()?.is_none(),
                "the agent ended: {}",
                log_text()
            );
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(agent)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .args(arguments)
            .env("BLKSNAP_SOCKET", Path::new(RUN).join("control.sock"));
        command
    }

    /// What a command that must succeed says in JSON.
    pub(crate) fn json(&self, arguments: &[&str]) -> Result<Value> {
        let output = self.command(arguments).arg("--output=json").output()?;
        ensure!(
            output.status.success(),
            "{arguments:?}: {}; its log: {}",
            String::from_utf8_lossy(&output.stderr).trim(),
            log_text()
        );
        serde_json::from_slice(&output.stdout).with_context(|| format!("{arguments:?}: no JSON"))
    }

    pub(crate) fn socket(&self) -> PathBuf {
        Path::new(RUN).join("nbd.sock")
    }

    /// All bytes of an export.
    pub(crate) fn content(&self, export: &str) -> Result<Vec<u8>> {
        let mut client = Client::connect(&self.socket(), export, Framing::Structured, &[])?;
        let length = client.agreed().size;
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < length {
            let at = bytes.len() as u64;
            bytes.extend(client.read(at, PIECE.min(length - at))?);
        }
        client.disconnect()?;
        Ok(bytes)
    }
}

fn log_text() -> String {
    std::fs::read_to_string("/run/power.log").unwrap_or_default()
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM);
        }
        let _ = self.child.wait();
    }
}

//! Shutdown: whether a clean stop of the daemon is one of the whole system.
//!
//! A daemon that ends while the system stays up leaves tracking to the kernel, which goes on with it until the
//! system stops; whatever the daemon knew at its own end says nothing about the reboot then. So by default it seals
//! only while systemd stops the system.

use std::fs;
use std::io::{self, Read as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Made by systemd where it is the first process (`sd_booted(3)`).
const BOOTED: &str = "/run/systemd/system";

/// Longest wait for an answer.
const WAIT: Duration = Duration::from_secs(10);

/// When the maps are sealed at a clean stop of the daemon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum SealPolicy {
    /// When systemd is stopping the system.
    #[default]
    Shutdown,
    /// At every clean stop: whoever stops the daemon makes sure that nothing writes until the system stops.
    Stop,
    /// Never.
    Never,
}

impl SealPolicy {
    /// Whether to seal now.
    #[must_use]
    pub fn applies(self) -> bool {
        match self {
            Self::Never => false,
            Self::Stop => true,
            Self::Shutdown => match system_state() {
                Ok(state) => state == "stopping",
                Err(error) => {
                    tracing::warn!(%error, "can't ask systemd whether the system is stopping: nothing is sealed");
                    false
                }
            },
        }
    }
}

/// The answer of `systemctl is-system-running`; `offline` where the first process is another one.
fn system_state() -> io::Result<String> {
    if !Path::new(BOOTED).exists() {
        return Ok("offline".to_owned());
    }
    ask(Command::new("systemctl").arg("is-system-running"))
}

/// The first line that a command says.
fn ask(command: &mut Command) -> io::Result<String> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let end = Instant::now() + WAIT;
    while child.try_wait()?.is_none() {
        if Instant::now() >= end {
            child.kill()?;
            child.wait()?;
            return Err(io::ErrorKind::TimedOut.into());
        }
        thread::sleep(Duration::from_millis(10));
    }
    let mut said = String::new();
    if let Some(output) = child.stdout.take() {
        output.take(4096).read_to_string(&mut said)?;
    }
    Ok(said.lines().next().unwrap_or_default().trim().to_owned())
}

/// The number of this boot, from the file where the kernel says it; `None` if it does not.
#[must_use]
pub fn boot(file: &Path) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    Some(text.trim().to_owned()).filter(|boot| !boot.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_command_says_is_read_whatever_it_returns() {
        let said = |script: &str| ask(Command::new("sh").args(["-c", script])).unwrap();
        assert_eq!(said("echo stopping; exit 1"), "stopping");
        assert_eq!(said("echo running"), "running");
        assert_eq!(said("exit 3"), "");
        assert!(ask(&mut Command::new("/no/such/command")).is_err());
    }

    #[test]
    fn only_a_stopping_system_seals_by_default() {
        assert!(SealPolicy::Stop.applies());
        assert!(!SealPolicy::Never.applies());
        // The machine that runs this is not stopping.
        assert!(!SealPolicy::Shutdown.applies());
    }

    #[test]
    fn the_kernel_says_which_boot_this_is() {
        let here = boot(Path::new("/proc/sys/kernel/random/boot_id")).unwrap();
        assert_eq!(here.len(), 36);
        assert_eq!(boot(Path::new("/no/such/file")), None);
        assert_eq!(boot(Path::new("/dev/null")), None);
    }
}

//! Freeze hook: a program of the user's that is told what happens to the file systems.
//!
//! It is run with one argument: `freeze` before anything is frozen (a database may flush and pause), `frozen`
//! when everything is frozen and the copies are complete (it must write nothing then), and `thaw` when everything
//! goes on, also after a failure. `BLKSNAP_DEVICES` has the nodes of the devices, separated by spaces. A code
//! other than 0 of `freeze` or `frozen` fails the take. What it says on standard error goes to the log, line by line.

use std::fmt;
use std::io::{self, BufRead as _, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// The environment variable with the devices.
const DEVICES_VARIABLE: &str = "BLKSNAP_DEVICES";

/// How often the end of the program is looked for.
const POLL: Duration = Duration::from_millis(1);

/// When a hook is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Before anything is frozen.
    Freeze,
    /// Everything is frozen, the copies are complete.
    Frozen,
    /// Everything goes on.
    Thaw,
}

impl Stage {
    /// The program's argument.
    #[must_use]
    pub const fn argument(self) -> &'static str {
        match self {
            Self::Freeze => "freeze",
            Self::Frozen => "frozen",
            Self::Thaw => "thaw",
        }
    }
}

/// A hook failed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It does not start.
    #[error("can't run freeze hook {program} {stage}: {source}")]
    Start {
        /// The program.
        program: PathBuf,
        /// Its argument.
        stage: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It failed.
    #[error("freeze hook {program} {stage} failed: {status}")]
    Failed {
        /// The program.
        program: PathBuf,
        /// Its argument.
        stage: &'static str,
        /// How it ended.
        status: ExitStatus,
    },
    /// It took too long and was killed.
    #[error("freeze hook {program} {stage} did not end within the freeze limit and was killed")]
    Late {
        /// The program.
        program: PathBuf,
        /// Its argument.
        stage: &'static str,
    },
}

/// Somebody who is told what happens to the file systems.
pub trait FreezeHook: fmt::Debug + Send + Sync {
    /// Runs to its end, which must come before the deadline.
    ///
    /// # Errors
    /// It failed, or was not done in time.
    fn run(&self, stage: Stage, devices: &[PathBuf], deadline: Instant) -> Result<(), HookError>;
}

/// A program.
#[derive(Clone, Debug)]
pub struct Hook {
    /// Its path.
    pub program: PathBuf,
}

impl FreezeHook for Hook {
    fn run(&self, stage: Stage, devices: &[PathBuf], deadline: Instant) -> Result<(), HookError> {
        let stage = stage.argument();
        let started = |source| HookError::Start {
            program: self.program.clone(),
            stage,
            source,
        };
        let names: Vec<_> = devices.iter().map(|path| path.to_string_lossy()).collect();
        let mut child = Command::new(&self.program)
            .arg(stage)
            .env(DEVICES_VARIABLE, names.join(" "))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // Not the agent's, which may be a file on what is frozen.
            .stderr(Stdio::piped())
            .spawn()
            .map_err(started)?;
        if let Some(said) = child.stderr.take() {
            let program = self.program.clone();
            let reader = std::thread::Builder::new().name("blksnap-hook".to_owned());
            if let Err(error) = reader.spawn(move || log_lines(&program, stage, said)) {
                tracing::warn!(%error, hook = %self.program.display(), "what a freeze hook says is lost");
            }
        }
        match wait_until(child, deadline).map_err(started)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(HookError::Failed {
                program: self.program.clone(),
                stage,
                status,
            }),
            None => Err(HookError::Late {
                program: self.program.clone(),
                stage,
            }),
        }
    }
}

/// What the program says goes to the log, until it and all that it started have closed their end.
fn log_lines(program: &Path, stage: &str, said: impl Read) {
    for line in BufReader::new(said).split(b'\n').map_while(Result::ok) {
        tracing::info!(hook = %program.display(), stage, "{}", String::from_utf8_lossy(&line));
    }
}

/// The end of the program; `None` if it had to be killed.
fn wait_until(mut child: Child, deadline: Instant) -> io::Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            // One that sleeps on a frozen file system dies only after the thaw, which must not wait for it.
            std::thread::spawn(move || child.wait());
            return Ok(None);
        }
        std::thread::sleep(POLL);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn hook(directory: &Path, body: &str) -> Hook {
        let program = directory.join("hook");
        std::fs::write(&program, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
        Hook { program }
    }

    fn far() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn it_gets_its_argument_and_the_devices() {
        let directory = tempfile::tempdir().unwrap();
        let hook = hook(directory.path(), "echo \"$# $1 $BLKSNAP_DEVICES\" > \"$0.out\"");
        hook.run(Stage::Frozen, &["/dev/a".into(), "/dev/b1".into()], far())
            .unwrap();
        let output = std::fs::read_to_string(directory.path().join("hook.out")).unwrap();
        assert_eq!(output, "1 frozen /dev/a /dev/b1\n");
    }

    #[test]
    fn it_may_say_more_than_a_pipe_has_room_for() {
        let directory = tempfile::tempdir().unwrap();
        let hook = hook(
            directory.path(),
            "head -c 1000000 /dev/zero | tr '\\000' '\\012' >&2; printf end >&2",
        );
        hook.run(Stage::Frozen, &[], far()).unwrap();
    }

    #[test]
    fn failures_say_what_failed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().display().to_string();
        let failing = hook(directory.path(), "exit 3");
        let text = failing.run(Stage::Freeze, &[], far()).unwrap_err().to_string();
        assert_eq!(
            text,
            format!("freeze hook {path}/hook freeze failed: exit status: 3")
        );
        let slow = hook(directory.path(), "exec sleep 60");
        let text = slow
            .run(Stage::Frozen, &[], Instant::now())
            .unwrap_err()
            .to_string();
        assert!(text.contains("did not end within the freeze limit"), "{text}");
        let missing = Hook {
            program: "/no/such/hook".into(),
        };
        let text = missing.run(Stage::Thaw, &[], far()).unwrap_err().to_string();
        assert!(
            text.starts_with("can't run freeze hook /no/such/hook thaw: "),
            "{text}"
        );
    }
}

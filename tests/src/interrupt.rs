//! Interrupt: Ctrl-C and SIGTERM as something to ask for, so that a program that made devices can remove them.

use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};

/// How often the end of a child, and the interrupt, are looked for.
const POLL: Duration = Duration::from_millis(5);

/// Somebody asked to stop.
#[derive(Clone, Copy, Debug)]
pub struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// Whether somebody asked to stop. Programs that are run by it end early then.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// From here on SIGINT, SIGTERM and SIGHUP do not end this process but are noted.
    ///
    /// # Errors
    /// The kernel refuses the handlers or the thread.
    pub fn install() -> Result<Self> {
        let flag = Arc::new(AtomicBool::new(false));
        let noted = Arc::clone(&flag);
        let (ready, is_ready) = mpsc::channel();
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || watch(&noted, &ready))?;
        is_ready.recv().context("the thread for signals ended")??;
        Ok(Self(flag))
    }

    /// Whether a signal came.
    #[must_use]
    pub fn came(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Goes on only if no signal came.
    ///
    /// # Errors
    /// [`Interrupted`].
    pub fn check(&self) -> Result<()> {
        if self.came() {
            Err(Interrupted.into())
        } else {
            Ok(())
        }
    }

    /// Sleeps, at most until a signal comes.
    ///
    /// # Errors
    /// [`Interrupted`].
    pub fn sleep(&self, time: Duration) -> Result<()> {
        let end = std::time::Instant::now() + time;
        while std::time::Instant::now() < end {
            self.check()?;
            thread::sleep(POLL);
        }
        self.check()
    }

    /// Runs `command` to its end and gives its output; it is sent SIGTERM when a signal comes.
    ///
    /// # Errors
    /// It does not start, it failed (its standard error is in the message), or [`Interrupted`].
    pub fn output(&self, command: &mut Command) -> Result<String> {
        self.check()?;
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {}", command.get_program().display()))?;
        let pid = child.id();
        let (sender, ended) = mpsc::channel::<std::io::Result<Output>>();
        let waiter = thread::spawn(move || {
            // Nobody waits any more only if this program panicked.
            let _ = sender.send(wait_with_output(&mut child));
        });
        let mut stopped = false;
        let output = loop {
            match ended.recv_timeout(POLL) {
                Ok(output) => break output?,
                Err(_) if self.came() && !stopped => {
                    stopped = true;
                    terminate(pid);
                }
                Err(_) => {}
            }
        };
        waiter.join().expect("waiting for a child does not panic");
        self.check()?;
        ensure!(
            output.status.success(),
            "{command:?}: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

fn wait_with_output(child: &mut Child) -> std::io::Result<Output> {
    let mut stderr = child.stderr.take();
    let errors = thread::spawn(move || read_all(stderr.as_mut()));
    let stdout = read_all(child.stdout.as_mut())?;
    let status: ExitStatus = child.wait()?;
    let stderr = errors.join().expect("reading a pipe does not panic")?;
    Ok(Output {
        status,
        stdout,
        stderr,
    })
}

fn read_all(from: Option<&mut impl std::io::Read>) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(from) = from {
        from.read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}

/// Sends SIGTERM to a child that is not waited for yet.
fn terminate(pid: u32) {
    if let Ok(pid) = i32::try_from(pid) {
        // It may have ended this moment.
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
}

/// Body of the thread that notes signals.
fn watch(flag: &AtomicBool, ready: &mpsc::Sender<std::io::Result<()>>) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = ready.send(Err(error));
            return;
        }
    };
    runtime.block_on(async {
        let signals = || {
            Ok((
                signal(SignalKind::interrupt())?,
                signal(SignalKind::terminate())?,
                signal(SignalKind::hangup())?,
            ))
        };
        let (mut interrupt, mut terminate, mut hangup) = match signals() {
            Ok(signals) => signals,
            Err(error) => {
                let _ = ready.send(Err(error));
                return;
            }
        };
        let _ = ready.send(Ok(()));
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
            flag.store(true, Ordering::Relaxed);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_of_a_program() {
        let interrupt = Interrupt(Arc::default());
        let text = interrupt.output(Command::new("echo").arg("word")).unwrap();
        assert_eq!(text, "word\n");
        let error = interrupt
            .output(Command::new("sh").args(["-c", "echo reason >&2; exit 3"]))
            .unwrap_err()
            .to_string();
        assert!(
            error.ends_with("reason") && error.contains("exit status: 3"),
            "{error}"
        );
    }

    #[test]
    fn a_signal_ends_a_program_that_runs() {
        let interrupt = Interrupt(Arc::default());
        let other = interrupt.clone();
        let waiting = thread::spawn(move || other.output(Command::new("sleep").arg("3600")));
        interrupt.0.store(true, Ordering::Relaxed);
        let error = waiting.join().unwrap().unwrap_err();
        assert!(error.is::<Interrupted>(), "{error:#}");
        assert!(interrupt.sleep(Duration::from_secs(3600)).is_err());
    }
}

//! Daemon: an agent process of a test's own.

use std::ffi::{OsStr, OsString};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::complain;

/// Longest wait for the daemon to start or to stop. A bound against hanging for ever, not a measurement.
const PATIENCE: Duration = Duration::from_secs(60);

/// Path of the agent: `BLKSNAP_AGENT`, or `blksnap-agent` in the folder of this executable or in the one above,
/// where cargo puts it for a test.
///
/// # Errors
/// There is no such file: the agent was not built.
pub fn agent_binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("BLKSNAP_AGENT") {
        return Ok(path.into());
    }
    let this = std::env::current_exe()?;
    this.ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join("blksnap-agent"))
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "blksnap-agent is not beside {}: run `cargo build -p blksnap-agent`",
                this.display()
            )
        })
}

/// How a [`Daemon`] is started.
#[derive(Clone, Debug, Default)]
pub struct DaemonOptions {
    /// Size of the event ring, when it is to be small.
    pub ring_bytes: Option<u32>,
    /// More arguments of `blksnap-agent daemon`.
    pub arguments: Vec<OsString>,
    /// More environment.
    pub environment: Vec<(OsString, OsString)>,
    /// Another program in place of the agent, which starts it.
    pub binary: Option<PathBuf>,
    /// Where its directory is to be; that of temporary files without.
    pub parent: Option<PathBuf>,
}

/// What a command of the agent answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Exit code; -1 for a process ended by a signal.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Answer {
    /// The standard output of a command that must succeed.
    ///
    /// # Errors
    /// The exit code is not 0.
    pub fn ok(self) -> Result<String> {
        ensure!(self.code == 0, "exit code {}: {}", self.code, self.stderr.trim());
        Ok(self.stdout)
    }
}

/// A running agent with its sockets and its difference storage in a temporary directory. Dropping it sends
/// SIGTERM to this one process, then SIGKILL if it does not end.
#[derive(Debug)]
pub struct Daemon {
    child: Option<Child>,
    /// Stays open, so that the daemon can say that it ends.
    notify: Option<UnixDatagram>,
    binary: PathBuf,
    directory: TempDir,
}

impl Daemon {
    /// Starts an agent with its defaults and waits until it is ready.
    ///
    /// # Errors
    /// The agent does not start; its log is in the message.
    pub fn start() -> Result<Self> {
        Self::with_options(&DaemonOptions::default())
    }

    /// Starts an agent and waits until it is ready.
    ///
    /// # Errors
    /// The agent does not start; its log is in the message.
    pub fn with_options(options: &DaemonOptions) -> Result<Self> {
        let mut name = tempfile::Builder::new();
        name.prefix("blksnap-run-");
        let directory = match &options.parent {
            Some(parent) => name.tempdir_in(parent)?,
            None => name.tempdir()?,
        };
        let mut daemon = Self {
            child: None,
            notify: None,
            binary: match &options.binary {
                Some(binary) => binary.clone(),
                None => agent_binary()?,
            },
            directory,
        };
        daemon.launch(options)?;
        Ok(daemon)
    }

    /// Starts the agent again in the same directory, after [`Daemon::stop`] or [`Daemon::kill`].
    ///
    /// # Errors
    /// The agent does not start, or it is still running.
    pub fn launch(&mut self, options: &DaemonOptions) -> Result<()> {
        self.begin_launch(options)?;
        self.wait_until_ready()
    }

    /// As [`Daemon::launch`], but does not wait until the agent is ready.
    ///
    /// # Errors
    /// The agent can't be started, or it is still running.
    pub fn begin_launch(&mut self, options: &DaemonOptions) -> Result<()> {
        ensure!(self.child.is_none(), "the daemon is running");
        let notify = self.directory.path().join("notify.sock");
        let _ = std::fs::remove_file(&notify);
        let ready = UnixDatagram::bind(&notify)?;
        ready.set_read_timeout(Some(Duration::from_millis(50)))?;
        let log = std::fs::File::create(self.log_path())?;
        let mut command = Command::new(&self.binary);
        command
            .arg("daemon")
            .arg("--runtime-dir")
            .arg(self.runtime_dir())
            .arg("--storage")
            .arg(self.storage())
            .arg("--state-dir")
            .arg(self.state_dir())
            .arg("--bpffs")
            .arg(self.bpffs())
            .args(options.ring_bytes.map(|bytes| format!("--ring-bytes={bytes}")))
            .args(&options.arguments)
            .envs(options.environment.iter().map(|(k, v)| (k, v)))
            .env("NOTIFY_SOCKET", &notify)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        self.notify = Some(ready);
        self.child = Some(command.spawn().context("start the daemon")?);
        Ok(())
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let (Some(child), Some(ready)) = (&mut self.child, &self.notify) else {
            bail!("the daemon is not running");
        };
        let started = Instant::now();
        let mut message = [0; 512];
        loop {
            match ready.recv(&mut message) {
                Ok(length) if message[..length].starts_with(b"READY=1") => return Ok(()),
                Ok(_) => {}
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                    ) => {}
                Err(error) => return Err(error.into()),
            }
            if let Some(status) = child.try_wait()? {
                self.child = None;
                bail!("the daemon ended at its start: {status}: {}", self.log());
            }
            ensure!(
                started.elapsed() < PATIENCE,
                "the daemon is not ready: {}",
                self.log()
            );
        }
    }

    /// Directory with the sockets.
    #[must_use]
    pub fn runtime_dir(&self) -> PathBuf {
        self.directory.path().join("run")
    }

    /// Directory of the difference storage.
    #[must_use]
    pub fn storage(&self) -> PathBuf {
        self.directory.path().join("storage")
    }

    /// The state directory.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    /// Mount point of the BPF file system of its pins.
    #[must_use]
    pub fn bpffs(&self) -> PathBuf {
        self.directory.path().join("bpf")
    }

    /// A directory for the test's own files, removed with the daemon.
    #[must_use]
    pub fn scratch(&self) -> &Path {
        self.directory.path()
    }

    /// The control socket.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.runtime_dir().join("control.sock")
    }

    /// The NBD socket.
    #[must_use]
    pub fn nbd_socket(&self) -> PathBuf {
        self.runtime_dir().join("nbd.sock")
    }

    /// URI of export `name` for NBD clients.
    #[must_use]
    pub fn nbd_uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.nbd_socket().display())
    }

    fn log_path(&self) -> PathBuf {
        self.directory.path().join("daemon.log")
    }

    /// What the daemon has logged up to now.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Process id, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// A command of the agent that talks to this daemon.
    #[must_use]
    pub fn command<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .args(arguments)
            .env("BLKSNAP_SOCKET", self.control_socket())
            .stdin(Stdio::null());
        command
    }

    /// Runs a command of the agent against this daemon, whatever it answers.
    ///
    /// # Errors
    /// The command can't be started.
    pub fn try_run<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Result<Answer> {
        let output = self.command(arguments).output()?;
        Ok(Answer {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs a command that must succeed and gives its output.
    ///
    /// # Errors
    /// The command fails.
    pub fn run<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Result<String> {
        self.try_run(arguments)?.ok()
    }

    /// Runs a command with `--output json` and gives its answer.
    ///
    /// # Errors
    /// The command fails or its output is no JSON.
    pub fn json<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Result<serde_json::Value> {
        let mut all: Vec<OsString> = arguments.into_iter().map(|a| a.as_ref().to_owned()).collect();
        all.push("--output=json".into());
        let text = self.run(all)?;
        serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid().and_then(|pid| i32::try_from(pid).ok()) {
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    /// Stops it with SIGTERM and gives its exit code (-1 after a signal).
    ///
    /// # Errors
    /// It does not end.
    pub fn stop(&mut self) -> Result<i32> {
        self.signal(Signal::SIGTERM);
        let Some(mut child) = self.child.take() else {
            bail!("the daemon is not running");
        };
        let started = Instant::now();
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status.code().unwrap_or(-1));
            }
            if started.elapsed() > PATIENCE {
                child.kill()?;
                child.wait()?;
                bail!("the daemon did not end by SIGTERM: {}", self.log());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Kills it with SIGKILL.
    ///
    /// # Errors
    /// It is not running.
    pub fn kill(&mut self) -> Result<()> {
        let Some(mut child) = self.child.take() else {
            bail!("the daemon is not running");
        };
        child.kill()?;
        child.wait()?;
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.child.is_some()
            && let Err(error) = self.stop()
        {
            complain(format_args!("{error:#}"));
        }
        if std::thread::panicking() {
            complain(format_args!("log of the daemon:\n{}", self.log()));
        }
        // With its mount, everything goes that was pinned.
        let bpffs = self.bpffs();
        if bpffs.exists()
            && let Err(errno) = umount2(&bpffs, MntFlags::MNT_DETACH)
            && errno != Errno::EINVAL
        {
            complain(format_args!("unmount {}: {errno}", bpffs.display()));
        }
    }
}

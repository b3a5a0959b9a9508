//! Served: a server in a process of its own, on a file of random content, seen from outside.

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rand::rngs::StdRng;
use rand::{RngCore as _, SeedableRng as _};
use tempfile::TempDir;

use super::build::Framing;
use super::client::{Client, Haggling};
use crate::complain;

/// Longest wait for the process to end. A bound against hanging, not a measurement.
const PATIENCE: Duration = Duration::from_secs(60);

/// Size of the file in bytes.
pub const SIZE: u64 = 48 << 20;

/// Up to here the file is data and holes in turn, each [`STRIPE`] bytes long.
pub const STRIPED: u64 = 16 << 20;

/// Length of data and hole in the striped part.
pub const STRIPE: u64 = 4096;

/// A running server of one export, `disk`, of [`SIZE`] bytes. Dropping it ends it.
#[derive(Debug)]
pub struct Served {
    child: Child,
    directory: TempDir,
    memory: Vec<u8>,
}

impl Served {
    /// Serves a new file with these arguments of `program` (`blksnap-serve`).
    ///
    /// # Errors
    /// The server does not start.
    pub fn start(program: &Path, arguments: &[&str]) -> Result<Self> {
        Self::start_in(&std::env::temp_dir(), program, arguments)
    }

    /// As [`Served::start`], with the file in a folder of its own below `place`.
    ///
    /// # Errors
    /// The server does not start.
    pub fn start_in(place: &Path, program: &Path, arguments: &[&str]) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("blksnap-nbd-")
            .tempdir_in(place)?;
        let memory = fill(&directory.path().join("disk"))?;
        let log = std::fs::File::create(directory.path().join("log"))?;
        let mut child = Command::new(program)
            .arg(directory.path().join("s"))
            .arg(directory.path().join("disk"))
            .args(arguments)
            .env("RUST_BACKTRACE", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        let mut line = String::new();
        if let Some(output) = child.stdout.take() {
            BufReader::new(output).read_line(&mut line)?;
        }
        let served = Self {
            child,
            directory,
            memory,
        };
        ensure!(line == "ready\n", "the server does not start: {}", served.log());
        Ok(served)
    }

    /// The socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("s")
    }

    /// The file that is served.
    #[must_use]
    pub fn file(&self) -> PathBuf {
        self.directory.path().join("disk")
    }

    /// A name for another file beside it.
    #[must_use]
    pub fn beside(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// What the file held at the start.
    #[must_use]
    pub fn memory(&self) -> &[u8] {
        &self.memory
    }

    /// URI of the export.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.socket().display())
    }

    /// What the process said.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// A client in transmission.
    ///
    /// # Errors
    /// The server refuses it.
    pub fn client(&self, framing: Framing) -> Result<Client> {
        Client::connect(&self.socket(), "disk", framing, &["base:allocation"])
    }

    /// A client that negotiates.
    ///
    /// # Errors
    /// The server refuses it.
    pub fn haggling(&self) -> Result<Haggling> {
        Haggling::open(&self.socket(), 3)
    }

    /// A value of /proc/PID/status in bytes, e.g. `VmHWM`, the most memory that ever was resident.
    ///
    /// # Errors
    /// The process is gone.
    pub fn memory_of(&self, key: &str) -> Result<u64> {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let value = status
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
            .with_context(|| format!("no {key} in {path}"))?;
        let number = value.trim().trim_end_matches(" kB");
        Ok(number.parse::<u64>()? << 10)
    }

    /// Number of sockets that the process has open.
    ///
    /// # Errors
    /// The process is gone.
    pub fn sockets(&self) -> Result<usize> {
        let mut sockets = 0;
        for entry in std::fs::read_dir(format!("/proc/{}/fd", self.child.id()))? {
            // One that was closed meanwhile is none.
            let link = std::fs::read_link(entry?.path());
            sockets += usize::from(link.is_ok_and(|link| link.to_string_lossy().starts_with("socket:")));
        }
        Ok(sockets)
    }

    /// Number of files, sockets and others that the process has open.
    ///
    /// # Errors
    /// The process is gone.
    pub fn descriptors(&self) -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.child.id()))?.count())
    }

    /// Waits until at most `most` sockets are open.
    ///
    /// # Errors
    /// They stay open.
    pub fn wait_for_sockets(&self, most: usize) -> Result<()> {
        let begun = Instant::now();
        while self.sockets()? > most {
            ensure!(
                begun.elapsed() < PATIENCE,
                "{} sockets stay open",
                self.sockets()?
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Ends the server and checks that it ended well: in good order, without a panic.
    ///
    /// # Errors
    /// It did not.
    pub fn end(mut self) -> Result<()> {
        drop(self.child.stdin.take());
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if begun.elapsed() > PATIENCE {
                bail!("the server does not end: {}", self.log());
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let log = self.log();
        ensure!(status.success(), "the server ended with {status}: {log}");
        ensure!(!log.contains("panicked"), "a panic in the server: {log}");
        ensure!(!self.socket().exists(), "the socket is left behind");
        Ok(())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait()
            && let Err(error) = self.child.kill().and_then(|()| self.child.wait())
        {
            complain(format_args!("end the server {}: {error}", self.child.id()));
        }
    }
}

/// Makes the file: stripes, a hole, and data at the end.
fn fill(path: &Path) -> Result<Vec<u8>> {
    let mut random = StdRng::seed_from_u64(SIZE);
    let file = std::fs::File::options().write(true).create_new(true).open(path)?;
    file.set_len(SIZE)?;
    let mut memory = vec![0; usize::try_from(SIZE)?];
    let mut data = |from: u64, length: u64| -> Result<()> {
        let range = usize::try_from(from)?..usize::try_from(from + length)?;
        random.fill_bytes(&mut memory[range.clone()]);
        Ok(file.write_all_at(&memory[range], from)?)
    };
    for stripe in (0..STRIPED).step_by(usize::try_from(2 * STRIPE)?) {
        data(stripe, STRIPE)?;
    }
    data(SIZE - (8 << 20), 8 << 20)?;
    Ok(memory)
}

/// Reads a file to its end and compares it.
///
/// # Errors
/// It differs.
pub fn compare(path: &Path, memory: &[u8]) -> Result<()> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.read_to_end(&mut bytes)?;
    ensure!(bytes.len() == memory.len(), "{} bytes", bytes.len());
    if let Some(place) = bytes.iter().zip(memory).position(|(a, b)| a != b) {
        bail!("{} differs at {place}", path.display());
    }
    Ok(())
}

//! Servers: ours, nbdkit and qemu-nbd, each a process of its own on the same file.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use blksnap_agent::nbd::file::FileExport;
use blksnap_agent::nbd::registry::Exports;
use blksnap_agent::nbd::server::{Server, ServerLimits};

/// First argument of this program where it is the server that is measured.
pub(crate) const SERVE: &str = "serve-nbd";

/// Longest wait for a server to listen.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running server.
pub(crate) struct Peer {
    pub(crate) name: &'static str,
    pub(crate) socket: PathBuf,
    pub(crate) export: &'static str,
    child: Child,
}

impl Peer {
    /// Starts a server that will listen on `DIRECTORY/NAME.sock`.
    pub(crate) fn start(
        name: &'static str,
        export: &'static str,
        directory: &Path,
        command: &mut Command,
    ) -> Result<Self> {
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("start {name}"))?;
        let mut peer = Self {
            name,
            socket: socket(directory, name),
            export,
            child,
        };
        let started = Instant::now();
        while std::os::unix::net::UnixStream::connect(&peer.socket).is_err() {
            if let Some(status) = peer.child.try_wait()? {
                bail!("{name} ended: {status}");
            }
            if started.elapsed() > PATIENCE {
                bail!("{name} does not listen");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(peer)
    }

    /// Seconds of processor time that it used up to now.
    pub(crate) fn cpu(&self) -> Result<f64> {
        let text = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // Behind the name, which may hold anything: state is field 3, utime 14, stime 15 (proc(5)).
        let (_, fields) = text.rsplit_once(')').context("stat has a name")?;
        let ticks: u64 = fields
            .split_whitespace()
            .skip(11)
            .take(2)
            .filter_map(|field| field.parse::<u64>().ok())
            .sum();
        let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("ticks")?;
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let seconds = ticks as f64 / per_second as f64;
        Ok(seconds)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn socket(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}.sock"))
}

/// All three, on `file`.
pub(crate) fn start_all(directory: &Path, file: &Path) -> Result<[Peer; 3]> {
    let ours = socket(directory, "blksnap");
    let nbdkit = socket(directory, "nbdkit");
    let qemu = socket(directory, "qemu-nbd");
    Ok([
        Peer::start(
            "blksnap",
            "image",
            directory,
            Command::new(std::env::current_exe()?)
                .arg(SERVE)
                .arg(ours)
                .arg(file),
        )?,
        Peer::start(
            "nbdkit",
            "",
            directory,
            Command::new("nbdkit")
                .arg("--foreground")
                .arg("--unix")
                .arg(nbdkit)
                .arg("file")
                .arg(file),
        )?,
        Peer::start(
            "qemu-nbd",
            "",
            directory,
            Command::new("qemu-nbd")
                .args(["--persistent", "--shared=16", "--format=raw", "--socket"])
                .arg(qemu)
                .arg(file),
        )?,
    ])
}

/// Serves a file until it is killed: the server of the daemon, with one export.
pub(crate) fn serve(arguments: &[String]) -> Result<()> {
    let [socket, file] = arguments else {
        bail!("{SERVE} takes a socket and a file");
    };
    let file = Arc::new(fs::File::options().read(true).write(true).open(file)?);
    let size = file.metadata()?.len();
    let exports = Arc::new(Exports::new());
    exports.add(Arc::new(FileExport::new("image", file, size).writable()))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let _server = Server::start(Path::new(socket), exports, &ServerLimits::default())?;
        std::future::pending::<Result<()>>().await
    })
}

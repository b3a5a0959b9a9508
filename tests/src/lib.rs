//! Fixtures: what the integration tests share. Each one cleans up after itself when dropped, also in a test that
//! panics.
//!
//! - [`Daemon`]: an agent of its own, with its sockets in a temporary directory.
//! - [`LoopDevice`]: a block device on a file of its own, with a file system and a mount when asked.
//! - [`Writer`]: random writes to a file system or a device until it is dropped.
//! - [`Zram`]: a disk in memory.
//! - [`read_device`], [`write_block`], [`fill_device`]: past the page cache.
//! - [`Tamper`]: changes what a daemon shares with the kernel.
//! - [`Interrupt`]: signals, for programs that must clean up after themselves.
//! - [`numbered`]: writes of which one can tell at which instant a disk was looked at.
//! - [`path`]: every way to write to a device, and the comparison of what changed with what is reported.
//! - [`lab`]: what a test finds in a guest with another kernel.
//! - [`volumes`]: LVM in such a guest.
//! - [`nbd`]: the client's side of the NBD protocol, as an oracle.
//! - [`seed`]: the seed of a random test, printed, or given by `BLKSNAP_SEED` to repeat a run.
//!
//! All of it needs root, and nothing of it ever touches a device that it did not make.

mod daemon;
mod direct;
mod interrupt;
pub mod lab;
mod loopdev;
pub mod nbd;
pub mod numbered;
pub mod path;
mod tamper;
pub mod volumes;
mod writer;
mod zram;

use std::ffi::OsStr;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

pub use daemon::{Answer, Daemon, DaemonOptions, agent_binary};
pub use direct::{fill_device, read_device, write_block};
pub use interrupt::{Interrupt, Interrupted};
pub use loopdev::{LoopDevice, LoopOptions};
pub use tamper::Tamper;
pub use writer::{Pace, Writer};
pub use zram::Zram;

/// Runs `program` and gives its standard output; a program that fails is an error with its standard error.
///
/// # Errors
/// The program is missing or ends with a code that is not 0.
pub fn run<A: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = A>) -> Result<String> {
    let mut command = Command::new(program);
    command.args(arguments);
    let output = command.output().with_context(|| format!("start {program}"))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Unmounts `target`. Whoever walks the mounts of the machine may have it open for a moment: it is tried for a while.
///
/// # Errors
/// It stays busy, or is not mounted.
pub fn unmount(target: &Path) -> Result<()> {
    const PATIENCE: Duration = Duration::from_secs(15);
    let started = Instant::now();
    loop {
        match run("umount", [target]) {
            Err(error) if format!("{error:#}").contains("busy") && started.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(50));
            }
            unmounted => return unmounted.map(drop),
        }
    }
}

/// Says on standard error what went wrong in a place that can't give an error: a `drop`, say. Unlike `eprintln!` it
/// does not panic when nobody reads any more, which in a `drop` would end the process with its devices left behind.
pub fn complain(what: impl std::fmt::Display) {
    // There is nobody else to tell.
    let _ = writeln!(std::io::stderr(), "{what}");
}

/// Seed of a random test: `BLKSNAP_SEED` when set, a fresh one otherwise. It is printed, so that a failure can
/// be repeated.
///
/// # Panics
/// `BLKSNAP_SEED` is no number.
#[must_use]
pub fn seed(test: &str) -> u64 {
    let seed = match std::env::var("BLKSNAP_SEED") {
        Ok(text) => text.parse().expect("BLKSNAP_SEED is a number"),
        Err(_) => rand::random(),
    };
    println!("{test}: BLKSNAP_SEED={seed}");
    seed
}

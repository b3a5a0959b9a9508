//! Lab: what a test finds in a guest with another kernel (`cargo xtask test --vm`, docs/lab.md), and how it says what
//! the kernel lacks.
//!
//! The disks are the guest's own scratch disks; nothing here gives one outside of a guest.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use blksnap_agent::filter::gate::Preemption;
use blksnap_agent::sys::ioctl;

use crate::run;

/// How the error of a test begins that has nothing to do on this kernel: it is reported so, and not as passed.
pub const ABSENT: &str = "not on this kernel: ";

/// Ends the test: the kernel lacks something.
///
/// # Errors
/// Always.
pub fn absent<T>(what: impl std::fmt::Display) -> Result<T> {
    bail!("{ABSENT}{what}")
}

/// Makes sure that this is a guest, in which every disk but the root is for tests.
///
/// # Errors
/// It is none.
pub fn inside() -> Result<()> {
    ensure!(
        std::env::var_os("BLKSNAP_LAB").is_some(),
        "this writes to disks of a guest of the lab: cargo xtask test --vm KERNEL"
    );
    Ok(())
}

/// Loads a module with parameters. A kernel that has it built in knows no such module, so this is no proof of anything.
pub fn load(module: &str, parameters: &[&str]) {
    // What is missing shows when it is used.
    let _ = Command::new("modprobe")
        .args(["-q", module])
        .args(parameters)
        .status();
}

/// Makes sure that device-mapper has `target`.
///
/// # Errors
/// It has not.
pub fn target(target: &str, module: &str) -> Result<()> {
    load("dm_mod", &[]);
    load(module, &[]);
    let targets = run("dmsetup", ["targets"]).unwrap_or_default();
    let is_there = targets
        .lines()
        .any(|line| line.split_whitespace().next() == Some(target));
    if is_there {
        Ok(())
    } else {
        absent(format_args!("device-mapper has no target {target}"))
    }
}

/// The guest's NVMe disk, by one controller or by two.
///
/// # Errors
/// The kernel has none such.
pub fn nvme(multipath: bool) -> Result<PathBuf> {
    inside()?;
    load("nvme", &[]);
    let mut several = Vec::new();
    for entry in fs::read_dir("/sys/class/nvme-subsystem").into_iter().flatten() {
        let names = names(&entry?.path())?;
        let is_controller = |name: &&String| {
            name.strip_prefix("nvme")
                .is_some_and(|rest| rest.parse::<u32>().is_ok())
        };
        if names.iter().filter(is_controller).count() > 1 {
            several.extend(
                names
                    .into_iter()
                    .filter(|name| Path::new("/dev").join(name).exists() && name.contains('n')),
            );
        }
    }
    // The paths to a disk have names as well, but no nodes.
    let mut disks: Vec<PathBuf> = names(Path::new("/sys/block"))?
        .into_iter()
        .filter(|name| name.starts_with("nvme") && several.contains(name) == multipath)
        .map(|name| Path::new("/dev").join(name))
        .filter(|node| node.exists())
        .collect();
    disks.sort();
    match disks.into_iter().next() {
        Some(disk) => Ok(disk),
        None if multipath => absent("NVMe with several paths to a disk"),
        None => absent("NVMe"),
    }
}

/// The names in a folder.
fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    Ok(entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect())
}

/// The guest's virtio disk `number`, from 0 on.
///
/// # Errors
/// It has none.
pub fn virtio(number: u8) -> Result<PathBuf> {
    inside()?;
    let disk = PathBuf::from(format!("/dev/vd{}", char::from(b'a' + number)));
    ensure!(disk.exists(), "the guest has no {}", disk.display());
    Ok(disk)
}

/// Partition `number` of `disk`, from byte `start` on, `length` bytes long; one that a test before has left goes.
/// No partition table is written.
///
/// # Errors
/// It is in use, or the kernel makes no node.
pub fn partition(disk: &Path, number: u8, start: u64, length: u64) -> Result<PathBuf> {
    inside()?;
    let table = File::open(disk)?;
    // There may be none.
    let _ = ioctl::blkpg_delete(&table, number.into());
    ioctl::blkpg_add(&table, number.into(), start, length)
        .with_context(|| format!("add partition {number} to {}", disk.display()))?;
    let node = PathBuf::from(format!("{}{number}", disk.display()));
    let started = Instant::now();
    while !node.exists() {
        ensure!(
            started.elapsed() < Duration::from_secs(20),
            "no {}",
            node.display()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(node)
}

/// How writes wait for the gate in the tests: what `BLKSNAP_GATE_TECHNIQUE` says, else asleep (`park`) on a kernel that lets
/// programs sleep and was not started so that they can turn (`fei`), else in a loop (`spin`).
#[must_use]
pub fn gate_technique() -> String {
    static CHOSEN: OnceLock<String> = OnceLock::new();
    let chosen = CHOSEN.get_or_init(|| {
        let injects = Path::new("/sys/kernel/debug/error_injection/list").exists();
        let sleeps = injects && !Preemption::now().can_spin();
        std::env::var("BLKSNAP_GATE_TECHNIQUE")
            .unwrap_or_else(|_| if sleeps { "park" } else { "spin" }.to_owned())
    });
    chosen.clone()
}

/// What the kernel says from now on.
#[derive(Debug)]
pub struct KernelLog(File);

/// What it says when something is wrong with it, or with a disk.
const COMPLAINTS: [&str; 12] = [
    "WARNING:",
    "BUG:",
    "Oops",
    "blocked for more than",
    "soft lockup",
    "hard LOCKUP",
    "stall on CPU",
    "detected stall",
    "detected expedited stall",
    "circular locking",
    "inconsistent lock state",
    "I/O error",
];

impl KernelLog {
    /// From here on.
    ///
    /// # Errors
    /// It can't be read.
    pub fn follow() -> Result<Self> {
        let mut log = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")?;
        log.seek(SeekFrom::End(0))?;
        Ok(Self(log))
    }

    /// Makes sure that the kernel did not complain since: no task that hangs, no stall, no lock taken in a wrong order,
    /// no defect of its own, no error of a disk.
    ///
    /// # Errors
    /// What it said.
    pub fn is_quiet(&mut self) -> Result<()> {
        let bad = self
            .lines()?
            .into_iter()
            .filter(|line| COMPLAINTS.iter().any(|word| line.contains(word)))
            .collect::<Vec<_>>();
        ensure!(bad.is_empty(), "the kernel complains: {}", bad.join("; "));
        Ok(())
    }

    /// The messages since the last look.
    ///
    /// # Errors
    /// They can't be read.
    pub fn lines(&mut self) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        let mut record = vec![0; 16 << 10];
        loop {
            match self.0.read(&mut record) {
                Ok(0) => return Ok(lines),
                Ok(length) => {
                    let text = String::from_utf8_lossy(&record[..length]);
                    let message = text.split_once(';').map_or(text.as_ref(), |(_, message)| message);
                    lines.push(message.lines().next().unwrap_or_default().to_owned());
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(lines),
                // Some were overwritten before they were read: the next read goes on after them.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(error) => return Err(error).context("read the kernel's log"),
            }
        }
    }
}

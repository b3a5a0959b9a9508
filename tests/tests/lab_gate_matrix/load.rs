//! Load: who writes to an origin while a snapshot is held.

use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use blksnap_agent::storage::StorageSpec;
use blksnap_tests::{Writer, lab, run};
use serde_json::Value;

use super::MIB;
use super::origin::Origin;

/// Bound against hanging for ever: fio alone takes some seconds to start in a guest.
const PATIENCE: Duration = Duration::from_secs(400);

/// Writers.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Load {
    /// fio on the device.
    Fio(Fio),
    /// So many threads that write, sync, punch, truncate and remove files.
    Files(u64),
    /// So many writers of files, each write followed by fsync.
    Fsyncs(u32),
    /// Writers of files, and one who needs more memory than there is, with swap on another partition of the disk.
    Swap,
    /// A writer of files through the page cache who dirties more than the memory bears.
    Dirty,
}

/// fio: an engine with its depth, and threads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fio {
    pub(crate) engine: &'static str,
    pub(crate) depth: u32,
    pub(crate) jobs: u32,
    /// More of its arguments.
    pub(crate) more: &'static [&'static str],
}

impl Fio {
    pub(crate) const fn new(engine: &'static str, depth: u32, jobs: u32) -> Self {
        Self {
            engine,
            depth,
            jobs,
            more: &[],
        }
    }

    fn start(&self, target: &str, seed: u64, time: Duration) -> Result<Program> {
        let mut command = Command::new("fio");
        command.args([
            "--name=load",
            "--direct=1",
            "--rw=randwrite",
            "--thread",
            "--norandommap",
            "--bsrange=4k-64k",
            "--group_reporting",
            "--allow_mounted_write=1",
            "--output-format=json",
        ]);
        command.arg(target);
        command.arg(format!("--ioengine={}", self.engine));
        command.arg(format!("--iodepth={}", self.depth));
        command.arg(format!("--numjobs={}", self.jobs));
        command.arg(format!("--randseed={}", seed >> 1));
        command.arg("--time_based");
        command.arg(format!("--runtime={}", time.as_secs()));
        Program::start(command.args(self.more))
    }
}

impl Load {
    /// Makes sure that the guest is one that it is meant for.
    pub(crate) fn needs(&self) -> Result<()> {
        match self {
            Self::Swap | Self::Dirty if memory("MemTotal")? > 1024 * MIB => {
                lab::absent("a small memory, see `cargo xtask test --vm 7.2+512m`")
            }
            _ => Ok(()),
        }
    }

    /// Where old data is kept.
    pub(crate) fn storage(&self) -> Result<StorageSpec> {
        Ok(match self {
            Self::Swap | Self::Dirty => StorageSpec::Device {
                path: lab::virtio(1)?,
                ranges: Vec::new(),
            },
            _ => StorageSpec::Memory { limit: 512 * MIB },
        })
    }

    pub(crate) fn start(&self, origin: &Origin, seed: u64, time: Duration) -> Result<Running> {
        let mut running = Running {
            began: Instant::now(),
            time,
            programs: Vec::new(),
            writers: Vec::new(),
            hungry: None,
            swap: None,
        };
        match self {
            Self::Fio(fio) => {
                let target = format!("--filename={}", origin.node.display());
                // Of a large disk its beginning.
                let mut fio = *fio;
                if fio.more.is_empty() {
                    fio.more = &["--size=64m"];
                }
                running.programs.push(fio.start(&target, seed, time)?);
            }
            Self::Files(threads) => running.write_files(origin.directory()?, *threads, seed),
            Self::Fsyncs(jobs) => {
                running.write_files(origin.directory()?, 1, seed);
                let fio = Fio {
                    more: &["--fsync=1", "--size=1m", "--bs=4k"],
                    ..Fio::new("psync", 1, *jobs)
                };
                let target = format!("--directory={}", origin.directory()?.display());
                running.programs.push(fio.start(&target, seed, time)?);
            }
            Self::Swap => {
                running.write_files(origin.directory()?, 2, seed);
                running.swap()?;
            }
            Self::Dirty => {
                running.write_files(origin.directory()?, 1, seed);
                let fio = Fio {
                    more: &["--direct=0", "--rw=write", "--size=192m", "--bs=1m"],
                    ..Fio::new("psync", 1, 1)
                };
                let target = format!("--directory={}", origin.directory()?.display());
                running.programs.push(fio.start(&target, seed, time * 2)?);
            }
        }
        Ok(running)
    }
}

/// A load under way.
pub(crate) struct Running {
    began: Instant,
    time: Duration,
    programs: Vec<Program>,
    writers: Vec<Writer>,
    /// Ends when it is dropped; before its swap.
    hungry: Option<Program>,
    swap: Option<Swap>,
}

impl Running {
    fn write_files(&mut self, directory: &Path, threads: u64, seed: u64) {
        self.writers = (0..threads)
            .map(|number| Writer::files(directory, seed ^ number))
            .collect();
    }

    /// Swap, and who needs all memory and half as much again.
    fn swap(&mut self) -> Result<()> {
        let node = lab::partition(&lab::virtio(0)?, 2, 400 * MIB, 560 * MIB)?;
        let node = node.display().to_string();
        run("mkswap", [&node])?;
        run("swapon", [&node])?;
        self.swap = Some(Swap(node));
        // One block larger than what is free, filled again and again.
        let bytes = memory("MemAvailable")? + 96 * MIB;
        let block = format!("bs={bytes}");
        self.hungry = Some(Program::start(Command::new("dd").args([
            "if=/dev/zero",
            "of=/dev/null",
            &block,
        ]))?);
        Ok(())
    }

    /// Waits for its end, and gives how many writes there were. No write failed.
    pub(crate) fn finish(mut self) -> Result<u64> {
        let mut written = 0;
        for program in self.programs.drain(..) {
            written += program.finish()?;
        }
        while self.began.elapsed() < self.time {
            std::thread::sleep(Duration::from_millis(50));
        }
        for writer in self.writers.drain(..) {
            // It is not stuck.
            writer.wait_for(2);
            written += writer.writes();
            ensure!(writer.errors() == 0, "{} writes failed", writer.errors());
        }
        if self.swap.is_some() {
            let swapped = || counter("/proc/vmstat", "pswpout");
            while swapped()? < 1000 {
                ensure!(self.began.elapsed() < PATIENCE, "nothing was swapped out");
                std::thread::sleep(Duration::from_millis(50));
            }
            println!("swapped out: {} pages", swapped()?);
            self.hungry = None;
        }
        Ok(written)
    }
}

/// Swap in use. Taken back when dropped.
struct Swap(String);

impl Drop for Swap {
    fn drop(&mut self) {
        if let Err(error) = run("swapoff", [&self.0]) {
            println!("swapoff: {error:#}");
        }
    }
}

/// A program that ends by itself. Killed when dropped.
struct Program {
    child: Child,
    what: String,
}

impl Program {
    fn start(command: &mut Command) -> Result<Self> {
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        Ok(Self {
            child,
            what: format!("{command:?}"),
        })
    }

    /// Waits for it, and gives how many writes fio says that it made.
    fn finish(mut self) -> Result<u64> {
        let mut out = self.child.stdout.take().context("its output")?;
        // It may say more than a pipe holds.
        let reader = std::thread::spawn(move || {
            let mut text = String::new();
            out.read_to_string(&mut text).map(|_| text)
        });
        let started = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            ensure!(started.elapsed() < PATIENCE, "{} hangs", self.what);
            std::thread::sleep(Duration::from_millis(20));
        };
        let Ok(text) = reader.join() else {
            bail!("a reader failed")
        };
        let text = text?;
        ensure!(status.success(), "{}: {status}: {text}", self.what);
        let Some(begin) = text.find('{') else {
            return Ok(0);
        };
        let report: Value = serde_json::from_str(&text[begin..]).context("what fio said")?;
        let mut written = 0;
        for job in report["jobs"].as_array().context("jobs")? {
            ensure!(job["error"] == 0, "{}: {job}", self.what);
            written += job["write"]["total_ios"].as_u64().unwrap_or(0);
            written += job["trim"]["total_ios"].as_u64().unwrap_or(0);
        }
        ensure!(written > 0, "{} wrote nothing", self.what);
        Ok(written)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A line of /proc/meminfo, in bytes.
fn memory(what: &str) -> Result<u64> {
    counter("/proc/meminfo", &format!("{what}:")).map(|kib| kib * 1024)
}

fn counter(file: &str, what: &str) -> Result<u64> {
    let text = fs::read_to_string(file)?;
    let mut lines = text.lines().map(str::split_whitespace);
    let value = lines.find_map(|mut words| (words.next() == Some(what)).then(|| words.next())?);
    let value = value.with_context(|| format!("no {what} in {file}"))?;
    Ok(value.parse()?)
}

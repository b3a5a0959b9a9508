//! Load: who writes to an origin while a snapshot is held.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
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

/// Bytes of the partition that is swapped to, and of the file.
const SWAP: u64 = 560 * MIB;
const SWAP_FILE: u64 = 32 * MIB;

/// Writers.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Load {
    /// fio on the device.
    Fio(Fio),
    /// So many threads that write, sync, punch, truncate and remove files.
    Files(u64),
    /// So many writers of files, each write followed by fsync.
    Fsyncs(u32),
    /// Writers of files, and one who needs twice the memory that there is, with swap on another partition of the disk.
    Swap,
    /// The same with swap in a file of the held file system as well, used first.
    SwapFile,
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
            Self::Swap | Self::SwapFile | Self::Dirty if memory("MemTotal")? > 1024 * MIB => {
                lab::absent("a small memory, see `cargo xtask test --vm 7.2+512m`")
            }
            _ => Ok(()),
        }
    }

    /// Where old data is kept.
    pub(crate) fn storage(&self) -> Result<StorageSpec> {
        Ok(match self {
            Self::Swap | Self::SwapFile | Self::Dirty => StorageSpec::Device {
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
            swap: Vec::new(),
            file: None,
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
            Self::SwapFile => {
                running.write_files(origin.directory()?, 2, seed);
                running.file = Some(swap_file(origin.directory()?)?);
            }
            Self::Dirty => {
                running.write_files(origin.directory()?, 1, seed);
                let mut fio = Fio::new("psync", 1, 1);
                // More than twice the 512 MiB of the guest.
                fio.more = &[
                    "--direct=0",
                    "--rw=write",
                    "--size=192m",
                    "--bs=1m",
                    "--time_based=0",
                    "--runtime=0",
                    "--loops=6",
                ];
                let target = format!("--directory={}", origin.directory()?.display());
                running.programs.push(fio.start(&target, seed, time)?);
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
    hungry: Option<Hungry>,
    swap: Vec<Swap>,
    /// To be used as swap when the instant is over: until then what is in it is known.
    file: Option<PathBuf>,
}

impl Running {
    fn write_files(&mut self, directory: &Path, threads: u64, seed: u64) {
        self.writers = (0..threads)
            .map(|number| Writer::files(directory, seed ^ number))
            .collect();
    }

    /// The instant is over.
    pub(crate) fn taken(&mut self) -> Result<()> {
        let Some(file) = self.file.take() else {
            return Ok(());
        };
        self.swap.push(Swap::on(&file, 10)?);
        self.swap()
    }

    /// Swap, and who needs twice the memory that there is.
    fn swap(&mut self) -> Result<()> {
        let node = lab::partition(&lab::virtio(0)?, 2, 400 * MIB, SWAP)?;
        run("mkswap", [&node])?;
        self.swap.push(Swap::on(&node, 1)?);
        // One block larger than what is free, filled again and again.
        let free = memory("MemAvailable")?;
        let bytes = (2 * free).min(free + SWAP - 96 * MIB);
        self.hungry = Some(Hungry::new(bytes)?);
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
        if !self.swap.is_empty() {
            // What is used first has its share.
            while self.swap[0].used()? < 4 * MIB {
                ensure!(
                    self.began.elapsed() < PATIENCE,
                    "next to nothing was swapped out to {}",
                    self.swap[0].0.display()
                );
                std::thread::sleep(Duration::from_millis(50));
            }
            for swap in &self.swap {
                println!("swap on {}: {} bytes", swap.0.display(), swap.used()?);
            }
            println!("swapped out: {} pages", counter("/proc/vmstat", "pswpout")?);
            self.hungry = None;
        }
        Ok(written)
    }
}

/// A file to swap to: all its blocks are there, and on the disk.
fn swap_file(directory: &Path) -> Result<PathBuf> {
    let path = directory.join("swap");
    let bytes = usize::try_from(SWAP_FILE)?;
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)?;
    file.write_all(&vec![0xa5; bytes])?;
    run("mkswap", [&path])?;
    file.sync_all()?;
    Ok(path)
}

/// Swap in use. Taken back when dropped.
struct Swap(PathBuf);

impl Swap {
    fn on(path: &Path, priority: u8) -> Result<Self> {
        let priority = format!("-p{priority}");
        run("swapon", [OsStr::new(&priority), path.as_os_str()])?;
        Ok(Self(path.to_owned()))
    }

    /// Bytes that are swapped out to it.
    fn used(&self) -> Result<u64> {
        let text = fs::read_to_string("/proc/swaps")?;
        let path = self.0.to_string_lossy();
        let line = text.lines().find(|line| line.starts_with(path.as_ref()));
        let used = line.and_then(|line| line.split_whitespace().nth(3));
        let used = used.with_context(|| format!("no {path} in {text}"))?;
        Ok(used.parse::<u64>()? * 1024)
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        if let Err(error) = run("swapoff", [&self.0]) {
            println!("swapoff: {error:#}");
        }
    }
}

/// Needs more memory than there is, until it is dropped.
struct Hungry {
    _eater: Program,
    _feeder: Program,
}

impl Hungry {
    /// Fills one block of so many bytes again and again. Pages of zeros would not be written to swap.
    fn new(bytes: u64) -> Result<Self> {
        let mut feeder = Command::new("tr");
        let mut feeder = Program::fed(feeder.args(["\\0", "x"]), File::open("/dev/zero")?)?;
        let food = feeder.child.stdout.take().context("its output")?;
        let mut eater = Command::new("dd");
        let eater = eater.args(["of=/dev/null", "iflag=fullblock", &format!("bs={bytes}")]);
        Ok(Self {
            _eater: Program::fed(eater, food)?,
            _feeder: feeder,
        })
    }
}

/// A program that ends by itself. Killed when dropped.
struct Program {
    child: Child,
    what: String,
}

impl Program {
    fn start(command: &mut Command) -> Result<Self> {
        Self::fed(command, Stdio::null())
    }

    fn fed(command: &mut Command, input: impl Into<Stdio>) -> Result<Self> {
        let child = command
            .stdin(input)
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

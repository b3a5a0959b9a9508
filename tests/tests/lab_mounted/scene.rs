//! Scene: kernel devices, mounts and files of a test, and a look at tasks that hang. All go with the test.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use blksnap_agent::sys::AlignedBuffer;
use blksnap_tests::{Daemon, agent_binary, complain, run, unmount};
use rand::rngs::StdRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use serde_json::Value;
use tempfile::TempDir;

pub(crate) const MIB: u64 = 1 << 20;

/// Bound against hanging for ever, not a measurement: longer than all time-outs of a test together.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

/// The smallest device on which each file system can be made.
pub(crate) const FILE_SYSTEMS: [(&str, u64); 3] =
    [("ext4", 48 * MIB), ("xfs", 304 * MIB), ("btrfs", 128 * MIB)];

/// A daemon, on a kernel with nbd.
pub(crate) fn daemon() -> Result<Daemon> {
    // It may be a module, which nobody loads by itself.
    let _ = Command::new("modprobe").args(["-q", "nbd"]).status();
    ensure!(Path::new("/sys/block/nbd0").exists(), "not on this kernel: nbd");
    Daemon::start()
}

/// Takes a snapshot of `devices`.
pub(crate) fn snapshot(daemon: &Daemon, devices: &[&Path], more: &[&str]) -> Result<Value> {
    let command: [&OsStr; 2] = ["snapshot".as_ref(), "create".as_ref()];
    let devices = devices.iter().map(|device| device.as_os_str());
    let more = more.iter().map(OsStr::new);
    let value = daemon.json(command.into_iter().chain(devices).chain(more))?;
    ensure!(value["state"] == "taken", "{value}");
    Ok(value)
}

/// The export of the only image, or of image `number`, of a snapshot.
pub(crate) fn export(snapshot: &Value, number: usize) -> Result<&str> {
    let export = snapshot["devices"][number]["image"]["export"].as_str();
    export.with_context(|| format!("no image {number} in {snapshot}"))
}

/// A device that `nbd connect` made. It is ended when dropped, whoever uses it.
pub(crate) struct Attached {
    pub(crate) node: PathBuf,
    /// As `nbd connect` told it.
    pub(crate) told: Value,
    ended: bool,
}

impl Attached {
    pub(crate) fn new(daemon: &Daemon, export: &str, more: &[&str]) -> Result<Self> {
        let arguments = ["nbd", "connect", export];
        let told = daemon.json(arguments.iter().chain(more))?;
        let node = told["device"].as_str().context("a device")?;
        Ok(Self {
            node: node.into(),
            told,
            ended: false,
        })
    }

    /// What sysfs says of it.
    pub(crate) fn sysfs(&self, file: &str) -> Result<String> {
        let name = self.node.file_name().context("a name")?;
        let path = Path::new("/sys/block").join(name).join(file);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Ok(text.trim().to_owned())
    }

    pub(crate) fn links(&self) -> Vec<PathBuf> {
        let links = self.told["links"].as_array().into_iter().flatten();
        links.filter_map(Value::as_str).map(PathBuf::from).collect()
    }

    /// Ends it as a user does.
    pub(crate) fn disconnect(&mut self, daemon: &Daemon, more: &[&str]) -> Result<()> {
        let arguments: [&OsStr; 3] = ["nbd".as_ref(), "disconnect".as_ref(), self.node.as_os_str()];
        daemon.run(arguments.into_iter().chain(more.iter().map(OsStr::new)))?;
        self.ended = true;
        Ok(())
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        let ended = agent_binary().and_then(|agent| {
            let arguments: [&OsStr; 4] = [
                "nbd".as_ref(),
                "disconnect".as_ref(),
                "--force".as_ref(),
                self.node.as_os_str(),
            ];
            run(&agent.to_string_lossy(), arguments)
        });
        if let Err(error) = ended {
            complain(format_args!("{error:#}"));
        }
    }
}

/// A file system that is mounted, unmounted when dropped.
pub(crate) struct Mounted {
    directory: TempDir,
    mounted: bool,
}

impl Mounted {
    pub(crate) fn new(node: &Path, options: &str) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("blksnap-mount-").tempdir()?;
        run(
            "mount",
            [
                OsStr::new("-o"),
                options.as_ref(),
                node.as_os_str(),
                directory.path().as_os_str(),
            ],
        )?;
        Ok(Self {
            directory,
            mounted: true,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn unmount(mut self) -> Result<()> {
        unmount(self.directory.path())?;
        self.mounted = false;
        Ok(())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.mounted
            && let Err(error) = run(
                "umount",
                [OsStr::new("--lazy"), self.directory.path().as_os_str()],
            )
        {
            complain(format_args!("{error:#}"));
        }
    }
}

/// Files of which is known what is in them.
pub(crate) struct Files(BTreeMap<String, Vec<u8>>);

impl Files {
    /// Writes `count` files of random lengths into the directory `name` of `root`, and syncs each.
    pub(crate) fn write(root: &Path, name: &str, count: usize, seed: u64) -> Result<Self> {
        let mut random = StdRng::seed_from_u64(seed);
        fs::create_dir_all(root.join(name))?;
        let mut files = BTreeMap::new();
        for number in 0..count {
            let mut bytes = vec![0; random.random_range(1..60_000)];
            random.fill_bytes(&mut bytes);
            let name = format!("{name}/{number}");
            let mut file = File::create(root.join(&name))?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            files.insert(name, bytes);
        }
        File::open(root.join(name))?.sync_all()?;
        Ok(Self(files))
    }

    /// Each file is as it was written, read past the page cache.
    pub(crate) fn check(&self, root: &Path) -> Result<()> {
        for (name, expected) in &self.0 {
            let path = root.join(name);
            let bytes = read_direct(&path).with_context(|| format!("read {}", path.display()))?;
            ensure!(&bytes == expected, "{} differs", path.display());
        }
        Ok(())
    }
}

/// All of a file, past the page cache.
fn read_direct(path: &Path) -> Result<Vec<u8>> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)?;
    let mut buffer = AlignedBuffer::zeroed(64 << 10);
    let mut bytes = Vec::new();
    loop {
        let count = file.read_at(buffer.as_mut_slice(), bytes.len() as u64)?;
        bytes.extend_from_slice(&buffer.as_slice()[..count]);
        // Short only at the end.
        if count < 64 << 10 {
            return Ok(bytes);
        }
    }
}

/// The file system on `node` is clean; nothing is written to it.
pub(crate) fn check_file_system(kind: &str, node: &Path) -> Result<()> {
    let (program, arguments): (_, &[&str]) = match kind {
        "ext4" => ("fsck.ext4", &["-f", "-n"]),
        "xfs" => ("xfs_repair", &["-n"]),
        "btrfs" => ("btrfs", &["check", "--readonly", "--force"]),
        _ => bail!("{kind}"),
    };
    let arguments = arguments.iter().map(OsStr::new).chain([node.as_os_str()]);
    run(program, arguments).map(drop)
}

/// How a file system is mounted beside its origin, as an image that is not written to.
pub(crate) fn read_only_options(kind: &str) -> &'static str {
    match kind {
        "ext4" => "ro,noload",
        "xfs" => "ro,norecovery,nouuid",
        _ => "ro",
    }
}

/// As [`read_only_options`], for an image that is written to: its log is replayed.
pub(crate) fn writable_options(kind: &str) -> &'static str {
    match kind {
        "xfs" => "rw,nouuid",
        _ => "rw",
    }
}

/// Waits for `what`, which must not take for ever.
pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !done()? {
        ensure!(begun.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// A task that can't be killed now: its number, when it began, and how often it has slept.
type Stuck = (String, String, String);

/// All tasks in state `D`.
fn uninterruptible() -> Result<BTreeSet<Stuck>> {
    let mut found = BTreeSet::new();
    for process in fs::read_dir("/proc")? {
        let Ok(tasks) = fs::read_dir(process?.path().join("task")) else {
            continue;
        };
        for task in tasks.flatten() {
            // A task may end at any time.
            let Ok(stat) = fs::read_to_string(task.path().join("stat")) else {
                continue;
            };
            let (_, fields) = stat.rsplit_once(')').context("a name in stat")?;
            let fields: Vec<&str> = fields.split_whitespace().collect();
            let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
            let slept = status.lines().find(|line| line.starts_with("voluntary_ctxt"));
            if fields.first() == Some(&"D") {
                let number = task.file_name().to_string_lossy().into_owned();
                let began = fields.get(19).copied().unwrap_or_default().to_owned();
                found.insert((number, began, slept.unwrap_or_default().to_owned()));
            }
        }
    }
    Ok(found)
}

/// No task is in state `D` for good. Who waits for a time-out of another test has the time to.
pub(crate) fn nobody_hangs() -> Result<()> {
    let begun = Instant::now();
    let mut stuck = uninterruptible()?;
    while !stuck.is_empty() {
        if begun.elapsed() > PATIENCE {
            let stacks = stuck.iter().map(|(number, ..)| {
                let read = |file: &str| fs::read_to_string(format!("/proc/{number}/{file}"));
                format!(
                    "{number} {}: {}",
                    read("comm").unwrap_or_default().trim(),
                    read("stack").unwrap_or_default()
                )
            });
            bail!("tasks hang: {}", stacks.collect::<Vec<_>>().join("\n"));
        }
        std::thread::sleep(Duration::from_millis(50));
        let now = uninterruptible()?;
        stuck.retain(|task| now.contains(task));
    }
    let log = Command::new("dmesg").output()?;
    let log = String::from_utf8_lossy(&log.stdout);
    let blocked = log.lines().find(|line| line.contains("blocked for more than"));
    ensure!(blocked.is_none(), "{blocked:?}");
    Ok(())
}

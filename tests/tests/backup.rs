//! Backups of loop devices in use: full and incremental ones against copies made while the device is frozen.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use blksnap_agent::backup::{
    self, BackupError, Control, ImageSource, Mode, Report, Sidecar, SidecarDevice, SidecarState, Taking,
    TargetError,
};
use blksnap_agent::disk::{BlockDevice, WatchdogCommand};
use blksnap_agent::engine::{CancelToken, Phase, Progress, Silent};
use blksnap_agent::filter::converge::{Consistency, FreezeHook, HookError, Limits, Stage};
use blksnap_agent::snapshot::{
    Content, HoldOptions, HoldPlace, Image, Member, MemberId, Snapshots, TakeOptions,
};
use blksnap_agent::storage::StorageSpec;
use blksnap_agent::tracker::{Granularity, TrackedDevice, Tracker, TrackerConfig};
use blksnap_agent::units::BlockSize;
use blksnap_tests::{Daemon, DaemonOptions, LoopDevice, LoopOptions, agent_binary, seed};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// Bytes copied at a time.
const PIECE: usize = 1 << 20;

/// Copies the device to a file while everything is frozen.
#[derive(Debug)]
struct CopyAtInstant {
    device: PathBuf,
    copy: PathBuf,
}

impl FreezeHook for CopyAtInstant {
    fn run(&self, stage: Stage, _devices: &[PathBuf], _deadline: Instant) -> Result<(), HookError> {
        if stage == Stage::Frozen {
            let failed = |source| HookError::Start {
                program: self.device.clone(),
                stage: "frozen",
                source,
            };
            copy_direct(&self.device, &self.copy).map_err(failed)?;
        }
        Ok(())
    }
}

/// Copies a device past its page cache.
fn copy_direct(device: &Path, copy: &Path) -> std::io::Result<()> {
    let device = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(device)?;
    let copy = File::create(copy)?;
    let mut memory = vec![0_u8; PIECE + 4096];
    let start = memory.as_ptr().align_offset(4096);
    let buffer = &mut memory[start..start + PIECE];
    let mut offset = 0;
    loop {
        let count = device.read_at(buffer, offset)?;
        if count == 0 {
            return Ok(());
        }
        copy.write_all_at(&buffer[..count], offset)?;
        offset += count as u64;
    }
}

fn same(a: &Path, b: &Path) -> Result<()> {
    let (a_bytes, b_bytes) = (fs::read(a)?, fs::read(b)?);
    ensure!(
        a_bytes.len() == b_bytes.len(),
        "{} and {} bytes",
        a_bytes.len(),
        b_bytes.len()
    );
    let wrong: Vec<usize> = a_bytes
        .chunks(4096)
        .zip(b_bytes.chunks(4096))
        .enumerate()
        .filter(|(_, (a, b))| a != b)
        .map(|(block, _)| block)
        .collect();
    let first = &wrong[..wrong.len().min(10)];
    ensure!(
        wrong.is_empty(),
        "{} blocks of 4 KiB differ, first {first:?}",
        wrong.len()
    );
    Ok(())
}

/// A tracked device and a directory for its backups.
struct Bench {
    // Dropped in this order: the tracker lets go of the device before the device goes.
    device: Arc<TrackedDevice>,
    tracker: Arc<Tracker>,
    directory: TempDir,
    limits: Limits,
}

impl Bench {
    fn new(path: &Path) -> Result<Self> {
        let tracker = Tracker::load(&TrackerConfig::default())?;
        let size = Granularity::Fixed(BlockSize::from_bytes(65536)?);
        let mut limits = Limits {
            max_time: Duration::from_secs(120),
            freeze_limit: Duration::from_secs(60),
            ..Limits::default()
        };
        limits.watchdog = WatchdogCommand {
            program: agent_binary()?,
            ..limits.watchdog
        };
        Ok(Self {
            device: tracker.attach(BlockDevice::open(path)?, size)?,
            tracker,
            directory: tempfile::Builder::new().prefix("blksnap-backup-").tempdir()?,
            limits,
        })
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn target(&self) -> PathBuf {
        self.at("device.img")
    }

    fn copy(&self) -> PathBuf {
        self.at("instant.img")
    }

    /// Backs up, and copies the device at the instant.
    fn backup(&self, incremental: bool) -> Result<Report> {
        let hook = CopyAtInstant {
            device: self.device.device().path.clone(),
            copy: self.copy(),
        };
        let report = self.backup_to(
            &self.target(),
            incremental,
            Some(&hook),
            &Silent,
            &CancelToken::new(),
        )?;
        Ok(report)
    }

    fn backup_to(
        &self,
        target: &Path,
        incremental: bool,
        hook: Option<&dyn FreezeHook>,
        progress: &dyn Progress,
        cancel: &CancelToken,
    ) -> Result<Report, BackupError> {
        let taking = Taking {
            limits: &self.limits,
            hook,
        };
        let control = Control { progress, cancel };
        backup::from_device(&self.device, target, incremental, taking, control)
    }

    /// Backs up, compares with the copy, and gives the reason of a full backup.
    fn right(&self, incremental: bool) -> Result<String> {
        let report = self.backup(incremental)?;
        same(&self.target(), &self.copy()).with_context(|| format!("{report:?}"))?;
        Ok(kind(&report))
    }

    fn state(&self) -> Result<SidecarState> {
        let path = Sidecar::path_of(&self.target());
        Ok(Sidecar::read(&path)?.context("no sidecar")?.state)
    }
}

fn kind(report: &Report) -> String {
    match &report.mode {
        Mode::Full { reason } => reason.code.to_owned(),
        Mode::Incremental { .. } => "incremental".to_owned(),
    }
}

/// Writes to a file, or to a device, until dropped.
struct Writer {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<Result<()>>>,
}

impl Writer {
    /// Writes random pieces to random places within `length`, with a sync now and then.
    fn start(path: PathBuf, length: u64, seed: u64, pause: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut random = StdRng::seed_from_u64(seed);
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)?;
            while !flag.load(Ordering::Acquire) {
                let mut data = vec![0; 512 * random.random_range(1..=128)];
                random.fill(&mut data[..]);
                if random.random_bool(0.2) {
                    data.fill(0);
                }
                let place = random.random_range(0..length - data.len() as u64);
                file.write_all_at(&data, place / 512 * 512)?;
                if random.random_bool(0.1) {
                    file.sync_data()?;
                }
                thread::sleep(pause);
            }
            Ok(())
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }

    fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Release);
        match self.thread.take().map(thread::JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => bail!("the writer panicked"),
            None => Ok(()),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // The error that matters is the test's.
        let _ = self.end();
    }
}

fn file_system(fs_type: &str, length: u64) -> Result<()> {
    let seed = seed(&format!("backup of {fs_type}"));
    let mut disk = LoopDevice::new(length)?;
    disk.mkfs(fs_type)?;
    let mount = disk.mount()?;
    let bench = Bench::new(disk.path())?;
    fs::write(mount.join("first"), vec![1; 5 << 20])?;
    let writer = Writer::start(mount.join("busy"), 8 * MIB, seed, Duration::from_millis(1));

    let report = bench.backup(true)?;
    ensure!(kind(&report) == "no_target", "{report:?}");
    ensure!(report.consistency == Consistency::FileSystem, "{report:?}");
    ensure!(
        report.bytes_total == length && report.bytes_copied >= length,
        "{report:?}"
    );
    same(&bench.target(), &bench.copy())?;
    let on_disk = fs::metadata(bench.target())?.blocks() * 512;
    ensure!(on_disk < length / 2, "the target has no holes: {on_disk} bytes");

    for round in 0..5 {
        fs::write(mount.join(format!("new{round}")), vec![round; 1 << 20])?;
        if round == 3 {
            fs::remove_file(mount.join("first"))?;
        }
        let report = bench.backup(true)?;
        ensure!(kind(&report) == "incremental", "round {round}: {report:?}");
        ensure!(report.bytes_copied < length / 2, "round {round}: {report:?}");
        same(&bench.target(), &bench.copy()).with_context(|| format!("round {round}: {report:?}"))?;
    }
    writer.stop()
}

#[test]
fn ext4_in_use() -> Result<()> {
    file_system("ext4", 128 * MIB)
}

#[test]
fn xfs_in_use() -> Result<()> {
    file_system("xfs", 320 * MIB)
}

#[test]
fn btrfs_in_use() -> Result<()> {
    file_system("btrfs", 256 * MIB)
}

#[test]
fn a_raw_partition_in_use() -> Result<()> {
    let seed = seed("backup of a raw partition");
    let options = LoopOptions {
        partitions: vec![
            ("1MiB".to_owned(), "9MiB".to_owned()),
            ("9MiB".to_owned(), "41MiB".to_owned()),
        ],
        ..LoopOptions::default()
    };
    let disk = LoopDevice::with_options(64 * MIB, &options)?;
    let node = disk.partition(2);
    let bench = Bench::new(&node)?;
    let mut random = StdRng::seed_from_u64(seed);
    let file = OpenOptions::new().write(true).open(&node)?;
    for round in 0..6 {
        for _ in 0..random.random_range(1..40) {
            let mut data = vec![0; 512 * random.random_range(1..=256)];
            random.fill(&mut data[..]);
            let place = random.random_range(0..32 * MIB - data.len() as u64) / 512 * 512;
            file.write_all_at(&data, place)?;
        }
        // Not synced: the backup does that.
        let report = bench.backup(true)?;
        ensure!(report.consistency == Consistency::Crash, "{report:?}");
        ensure!((kind(&report) == "incremental") == (round > 0), "{report:?}");
        same(&bench.target(), &bench.copy()).with_context(|| format!("round {round}: {report:?}"))?;
    }
    Ok(())
}

#[test]
fn an_incremental_equals_a_full_of_the_same_point() -> Result<()> {
    let seed = seed("incremental and full");
    let mut disk = LoopDevice::new(128 * MIB)?;
    disk.mkfs("ext4")?;
    let mount = disk.mount()?;
    let bench = Bench::new(disk.path())?;
    let writer = Writer::start(mount.join("busy"), 8 * MIB, seed, Duration::ZERO);
    bench.backup(false)?;
    writer.stop()?;
    fs::write(mount.join("more"), vec![3; 3 << 20])?;
    // Even a freeze writes to the file system; without it the device has one state only.
    disk.unmount()?;
    let incremental = bench.backup(true)?;
    ensure!(kind(&incremental) == "incremental", "{incremental:?}");
    let other = bench.at("full.img");
    let full = bench.backup_to(&other, false, None, &Silent, &CancelToken::new())?;
    ensure!(kind(&full) == "requested", "{full:?}");
    same(&bench.target(), &other)?;
    same(&bench.target(), &bench.copy())?;
    blksnap_tests::run("e2fsck", ["-fn".as_ref(), other.as_os_str()])?;
    Ok(())
}

/// Environment of the child: the device and the directory for its backups.
const CHILD: [&str; 2] = ["BLKSNAP_TEST_DEVICE", "BLKSNAP_TEST_DIRECTORY"];

/// Makes a full backup, says so, and then incremental ones until it is killed. Nothing when run by itself.
#[test]
fn child_of_the_kill_test() -> Result<()> {
    let [Some(device), Some(directory)] = CHILD.map(std::env::var_os) else {
        return Ok(());
    };
    let mut bench = Bench::new(Path::new(&device))?;
    bench.directory = tempfile::Builder::new()
        .disable_cleanup(true)
        .tempdir_in(&directory)?;
    let report = bench.backup_to(
        &Path::new(&directory).join("device.img"),
        true,
        None,
        &Silent,
        &CancelToken::new(),
    )?;
    println!("\nready {}", kind(&report));
    loop {
        let hook = CopyAtInstant {
            device: device.clone().into(),
            copy: bench.copy(),
        };
        let target = Path::new(&directory).join("device.img");
        bench.backup_to(&target, true, Some(&hook), &Silent, &CancelToken::new())?;
    }
}

#[test]
fn killed_at_any_point_the_next_backup_is_right() -> Result<()> {
    let seed = seed("killed backups");
    let mut random = StdRng::seed_from_u64(seed);
    let mut disk = LoopDevice::new(32 * MIB)?;
    disk.mkfs("ext4")?;
    let mount = disk.mount()?;
    let directory = tempfile::Builder::new().prefix("blksnap-killed-").tempdir()?;
    let target = directory.path().join("device.img");
    let mut states = Vec::new();
    for round in 0..5 {
        let writer = Writer::start(
            mount.join("busy"),
            8 * MIB,
            random.random(),
            Duration::from_millis(1),
        );
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--exact", "child_of_the_kill_test", "--nocapture"])
            .env(CHILD[0], disk.path())
            .env(CHILD[1], directory.path())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = BufReader::new(child.stdout.take().context("no output")?);
        let mut ready = None;
        for line in output.lines() {
            if let Some(reason) = line?.strip_prefix("ready ") {
                ready = Some(reason.to_owned());
                break;
            }
        }
        thread::sleep(Duration::from_millis(random.random_range(0..400)));
        child.kill()?;
        child.wait()?;
        ensure!(ready.is_some(), "round {round}: the child failed");
        // Nothing stays frozen: the writer comes to its end.
        writer.stop()?;
        fs::write(mount.join(format!("after{round}")), "x")?;
        File::open(mount.join(format!("after{round}")))?.sync_all()?;

        let state = Sidecar::read(&Sidecar::path_of(&target))?
            .context("no sidecar")?
            .state;
        let bench = Bench::new(disk.path())?;
        let hook = CopyAtInstant {
            device: disk.path().to_owned(),
            copy: bench.copy(),
        };
        let report = bench.backup_to(&target, true, Some(&hook), &Silent, &CancelToken::new())?;
        same(&target, &bench.copy()).with_context(|| format!("round {round}: {state:?} {report:?}"))?;
        let want = match state {
            SidecarState::Writing { .. } => "unfinished",
            _ => "generation_ended",
        };
        ensure!(kind(&report) == want, "round {round}: {state:?} {report:?}");
        states.push(want);
    }
    println!("{states:?}");
    Ok(())
}

#[test]
fn a_daemon_killed_in_a_backup_leaves_a_target_that_the_next_one_makes_right() -> Result<()> {
    let seed = seed("killed daemon");
    let mut random = StdRng::seed_from_u64(seed);
    let mut disk = LoopDevice::new(32 * MIB)?;
    disk.mkfs("ext4")?;
    let mount = disk.mount()?;
    let mut daemon = Daemon::start()?;
    let (target, copy) = (daemon.scratch().join("x.img"), daemon.scratch().join("copy.img"));
    let hook = daemon.scratch().join("hook");
    let script = format!(
        "#!/bin/sh\nif [ $1 = frozen ]; then exec dd if=$BLKSNAP_DEVICES of={} bs=1M iflag=direct status=none; fi\n",
        copy.display()
    );
    fs::write(&hook, script)?;
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755))?;
    let arguments: Vec<OsString> = vec![
        "backup".into(),
        "--incremental".into(),
        "--freeze-limit=60000".into(),
        "--freeze-hook".into(),
        hook.into(),
        disk.path().into(),
        target.clone().into(),
    ];
    let expect = |daemon: &Daemon, want: &[Option<&str>]| -> Result<()> {
        let answer = daemon.json(&arguments)?;
        same(&target, &copy).with_context(|| answer.to_string())?;
        let reason = answer["reason"].as_str();
        ensure!(want.contains(&reason), "{answer}");
        Ok(())
    };
    expect(&daemon, &[Some("no_target")])?;
    for round in 0..3 {
        let writer = Writer::start(
            mount.join("busy"),
            4 * MIB,
            random.random(),
            Duration::from_millis(1),
        );
        thread::sleep(Duration::from_millis(200));
        let mut client = daemon.command(&arguments).stderr(Stdio::null()).spawn()?;
        thread::sleep(Duration::from_millis(random.random_range(0..300)));
        daemon.kill()?;
        client.wait()?;
        writer.stop()?;
        daemon.launch(&DaemonOptions::default())?;
        // Killed in it, or before it began or after its end: the map outlives the daemon.
        expect(&daemon, &[Some("unfinished"), None]).with_context(|| format!("round {round}"))?;
        fs::write(mount.join("more"), vec![round; 1 << 20])?;
        expect(&daemon, &[None])?;
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_full_and_says_why() -> Result<()> {
    let disk = LoopDevice::new(32 * MIB)?;
    let node = OpenOptions::new().write(true).open(disk.path())?;
    let write = |n: u64| node.write_all_at(&[7; 70_000], n * 100_000 / 512 * 512);
    write(1)?;
    let bench = Bench::new(disk.path())?;
    ensure!(bench.right(true)? == "no_target");
    ensure!(bench.right(false)? == "requested");
    let (target, sidecar) = (bench.target(), Sidecar::path_of(&bench.target()));
    let open = || OpenOptions::new().write(true).open(&target);
    let spoil: [(&str, &dyn Fn() -> Result<()>); 7] = [
        ("target_length", &|| Ok(open()?.set_len(MIB)?)),
        ("target_modified", &|| Ok(open()?.write_all_at(b"x", 5 * MIB)?)),
        ("target_replaced", &|| {
            let other = bench.at("other");
            File::create(&other)?.set_len(32 * MIB)?;
            Ok(fs::rename(other, &target)?)
        }),
        ("sidecar_damaged", &|| Ok(fs::write(&sidecar, "{}")?)),
        ("sidecar_damaged", &|| {
            let mut text = String::new();
            File::open(&sidecar)?.read_to_string(&mut text)?;
            Ok(fs::write(&sidecar, text.replace("complete", "stopped"))?)
        }),
        ("no_sidecar", &|| Ok(fs::remove_file(&sidecar)?)),
        ("run_missed", &|| {
            bench.device.corrupt(blksnap_agent::cbt::ResetReason::RunMissed);
            Ok(())
        }),
    ];
    for (n, (reason, spoil)) in spoil.into_iter().enumerate() {
        // The file's clock moves on.
        thread::sleep(Duration::from_millis(20));
        spoil()?;
        write(n as u64)?;
        let got = bench.right(true)?;
        ensure!(got == reason, "{got} instead of {reason}");
        write(50 + n as u64)?;
        let got = bench.right(true)?;
        ensure!(got == "incremental", "{got} after {reason}");
    }
    // Another device's backup.
    let other_disk = LoopDevice::new(32 * MIB)?;
    let other = Bench::new(other_disk.path())?;
    let report = other.backup_to(&target, true, None, &Silent, &CancelToken::new())?;
    ensure!(kind(&report) == "generation_ended", "{report:?}");
    let Mode::Full { reason } = &report.mode else {
        bail!("{report:?}")
    };
    ensure!(
        reason.text.contains(&disk.path().display().to_string()),
        "{reason}"
    );
    Ok(())
}

#[test]
fn images_of_snapshots_and_the_device_in_turn() -> Result<()> {
    let seed = seed("images and devices");
    let mut disk = LoopDevice::new(64 * MIB)?;
    disk.mkfs("ext4")?;
    let mount = disk.mount()?;
    let bench = Bench::new(disk.path())?;
    let writer = Writer::start(mount.join("busy"), 8 * MIB, seed, Duration::from_millis(1));
    let storage = bench.at("storage");
    fs::create_dir(&storage)?;
    let snapshots = Snapshots::new(
        Arc::clone(&bench.tracker),
        HoldPlace {
            directory: None,
            boot: String::new(),
        },
    );
    let id = bench.device.device().id;
    let snapshot = || -> Result<Arc<Image>> {
        let places = vec![StorageSpec::Directory {
            path: storage.clone(),
            limit: None,
            keep: None,
        }];
        let member = Member::Tracked(bench.device.device().clone());
        let created = snapshots.create(vec![member], places, HoldOptions::default())?;
        let options = TakeOptions {
            limits: bench.limits.clone(),
            hook: None,
        };
        snapshots.take(created.id, options, Arc::new(Silent), CancelToken::new())?;
        Ok(snapshots.image(created.id, &MemberId::Device(id))?)
    };
    let of_image = |image: &Image| -> Result<String> {
        let (Content::Copy(file), Some(device)) = (&image.content, image.member.tracked()) else {
            bail!("{image:?} is no copy of a tracked device");
        };
        let source = ImageSource {
            device: &SidecarDevice::of(device),
            image: file,
            read_map: image.read_map.as_ref().context("the map is doubtful")?,
            consistency: image.consistency,
            frozen: image.frozen,
        };
        let control = Control {
            progress: &Silent,
            cancel: &CancelToken::new(),
        };
        let check = |target: &backup::Target| target.check_not_on(device);
        let report = backup::from_image(source, &bench.target(), true, check, control)?;
        let mut bytes = vec![0; usize::try_from(image.size)?];
        file.read_exact_at(&mut bytes, 0)?;
        fs::write(bench.copy(), bytes)?;
        same(&bench.target(), &bench.copy()).with_context(|| format!("{report:?}"))?;
        Ok(kind(&report))
    };
    let early = snapshot()?;
    ensure!(of_image(&early)? == "no_target");
    ensure!(bench.right(true)? == "incremental");
    let late = snapshot()?;
    ensure!(of_image(&late)? == "incremental");
    ensure!(of_image(&late)? == "incremental");
    // The target is newer than this image.
    ensure!(of_image(&early)? == "future_number");
    ensure!(of_image(&late)? == "incremental");
    ensure!(bench.right(true)? == "incremental");
    writer.stop()
}

/// Cancels when the copy has begun.
struct CancelWhenCopying(CancelToken);

impl Progress for CancelWhenCopying {
    fn update(&self, phase: Phase, done: u64, _total: u64) {
        if phase == Phase::Copying && done > 0 {
            self.0.cancel();
        }
    }
}

#[test]
fn a_cancelled_backup_goes_on_from_its_base() -> Result<()> {
    let disk = LoopDevice::new(64 * MIB)?;
    let node = OpenOptions::new().write(true).open(disk.path())?;
    let bench = Bench::new(disk.path())?;
    let cancel = CancelToken::new();
    let progress = CancelWhenCopying(cancel.clone());
    let cancelled = bench.backup_to(&bench.target(), false, None, &progress, &cancel);
    ensure!(cancelled.is_err(), "{cancelled:?}");
    ensure!(
        fs::read_dir(bench.directory.path())?.count() == 0,
        "something was left"
    );

    let first = bench.backup(false)?;
    for n in 0..30 {
        node.write_all_at(&[9; 512 * 1024], n * 2 * MIB)?;
    }
    node.sync_all()?;
    let cancel = CancelToken::new();
    let progress = CancelWhenCopying(cancel.clone());
    let cancelled = bench.backup_to(&bench.target(), true, None, &progress, &cancel);
    ensure!(cancelled.is_err(), "{cancelled:?}");
    let state = bench.state()?;
    ensure!(
        matches!(state, SidecarState::Stopped { base, .. } if base == first.taken),
        "{state:?}"
    );
    let report = bench.backup(true)?;
    ensure!(
        report.mode == Mode::Incremental { since: first.taken },
        "{report:?}"
    );
    same(&bench.target(), &bench.copy())
}

#[test]
fn targets_that_would_harm_are_refused() -> Result<()> {
    let mut disk = LoopDevice::new(32 * MIB)?;
    disk.mkfs("ext4")?;
    let mount = disk.mount()?;
    let before = fs::read(disk.image())?;
    let bench = Bench::new(disk.path())?;
    let refuse = |target: &Path| {
        let result = bench.backup_to(target, false, None, &Silent, &CancelToken::new());
        result
            .err()
            .with_context(|| format!("{} was not refused", target.display()))
    };
    let error = refuse(&mount.join("backup.img"))?;
    ensure!(
        matches!(error, BackupError::Target(TargetError::OnDevice { .. })),
        "{error}"
    );
    ensure!(!mount.join("backup.img").exists());
    let error = refuse(&disk.image())?;
    ensure!(
        matches!(error, BackupError::Target(TargetError::IsDevice { .. })),
        "{error}"
    );
    for (target, what) in [
        (disk.path().to_owned(), "a block device"),
        (mount.clone(), "a directory"),
        (bench.at("no/such/directory"), "make the directory first"),
        ("/dev/null".into(), "character device"),
    ] {
        let error = refuse(&target)?.to_string();
        ensure!(error.contains(what) && !error.contains('\n'), "{error}");
    }
    // A file on a file system in a file on the device: it stands on it all the same.
    let inner = mount.join("inner.img");
    File::create(&inner)?.set_len(8 * MIB)?;
    blksnap_tests::run("mkfs.ext4", ["-q".as_ref(), "-F".as_ref(), inner.as_os_str()])?;
    let node = blksnap_tests::run(
        "losetup",
        ["--find".as_ref(), "--show".as_ref(), inner.as_os_str()],
    )?;
    let inner_mount = bench.at("inner");
    fs::create_dir(&inner_mount)?;
    blksnap_tests::run("mount", [Path::new(node.trim()), &inner_mount])?;
    let refused = refuse(&inner_mount.join("backup.img"));
    blksnap_tests::unmount(&inner_mount)?;
    blksnap_tests::run("losetup", ["--detach", node.trim()])?;
    let error = refused?;
    ensure!(
        matches!(error, BackupError::Target(TargetError::OnDevice { .. })),
        "{error}"
    );
    ensure!(before.len() as u64 == 32 * MIB);
    Ok(())
}

#[test]
fn a_full_target_is_an_error_and_the_device_goes_on() -> Result<()> {
    let mut disk = LoopDevice::new(128 * MIB)?;
    disk.mkfs("ext4")?;
    let mount = disk.mount()?;
    fs::write(mount.join("data"), vec![5; 40 << 20])?;
    let mut small = LoopDevice::new(24 * MIB)?;
    small.mkfs("ext4")?;
    let place = small.mount()?;
    let bench = Bench::new(disk.path())?;
    let target = place.join("backup.img");
    let error = bench
        .backup_to(&target, false, None, &Silent, &CancelToken::new())
        .err()
        .context("a backup of 40 MiB fits in 24")?;
    ensure!(error.to_string().contains("free some space"), "{error}");
    ensure!(!target.exists() && !Sidecar::path_of(&target).exists());
    // Thawed, and writable.
    fs::write(mount.join("after"), "x")?;
    File::open(mount.join("after"))?.sync_all()?;
    ensure!(bench.right(true)? == "no_target");
    Ok(())
}

//! Lost: what takes a snapshot away, one thing at a time: the event and the snapshot say it with the reason, no image
//! answers, and the origin goes on without an error.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use blksnap_common::gate::COPIES;
use blksnap_tests::{Daemon, DaemonOptions, complain, lab, run, seed};
use serde_json::Value;

use super::agent::{
    Busy, alias_of, corrupted, daemon_options, id, nothing_is_left, prepare, read_image, take_on,
};
use super::scene::{Load, MIB, partition};

/// Bound against hanging for ever.
const PATIENCE: Duration = Duration::from_secs(60);

/// A disk on the guest's second one that can be stopped and broken.
struct Mapped(&'static str);

impl Mapped {
    fn new(name: &'static str) -> Result<Self> {
        lab::target("linear", "dm_mod")?;
        let sectors = 512 * MIB / 512;
        let table = format!("0 {sectors} linear {} 0", lab::virtio(1)?.display());
        run("dmsetup", ["create", name, "--table", &table])?;
        Ok(Self(name))
    }

    fn node(&self) -> String {
        format!("/dev/mapper/{}", self.0)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // It may be suspended, which a removal would wait for.
        let _ = run("dmsetup", ["resume", self.0]);
        if let Err(error) = run("dmsetup", ["remove", "--retry", self.0]) {
            complain(format_args!("{error:#}"));
        }
    }
}

/// The snapshot is lost with `reason`, and says so wherever it is asked.
fn is_lost(daemon: &Daemon, snapshot: &Value, reason: &str) -> Result<()> {
    let event = corrupted(daemon, id(snapshot)?)?;
    ensure!(event["err_code"].as_i64() != Some(0), "{event}");
    ensure!(event.to_string().contains(reason), "{event}");
    let shown = daemon.json(["snapshot", "info", id(snapshot)?])?;
    ensure!(
        shown["state"] == "corrupted" && shown["reason"].as_str().is_some_and(|why| why.contains(reason)),
        "{shown}"
    );
    ensure!(read_image(daemon, snapshot, 0).is_err(), "a lost image was read");
    Ok(())
}

/// A file system in use with a snapshot that keeps old data in `storage`; `cause` takes the snapshot away.
fn lose(
    options: &DaemonOptions,
    storage: &str,
    reason: &str,
    cause: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let daemon = Daemon::with_options(options)?;
    let part = partition(24 * MIB)?;
    let busy = Busy::new(&part, seed(reason))?;
    let taken = take_on(&daemon, &[&part], storage, &[])?;
    cause()?;
    busy.wait_for(30)?;
    is_lost(&daemon, &taken, reason)?;
    busy.wait_for(10)?;
    daemon.run(["snapshot", "destroy", id(&taken)?])?;
    nothing_is_left(Path::new("/nonexistent"))?;
    busy.check()
}

#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn difference_storage_that_is_full() -> Result<()> {
    prepare()?;
    lose(&daemon_options(), "memory:1M", "full", || Ok(()))
}

#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn difference_storage_that_fails() -> Result<()> {
    prepare()?;
    let storage = Mapped::new("gate-fails")?;
    lose(&daemon_options(), &storage.node(), "write old data to", || {
        // From now on every request is an error, which shows when the kernel writes back what was written to it.
        run("dmsetup", ["wipe_table", storage.0])?;
        for _ in 0..10 {
            std::thread::sleep(Duration::from_millis(200));
            let _ = run("sync", [storage.node()]);
        }
        Ok(())
    })
}

/// A disk of which some sectors can't be read, but can be written.
fn unreadable() -> Result<PathBuf> {
    lab::load("sd_mod", &[]);
    lab::load("scsi_debug", &["dev_size_mb=64", "opts=2"]);
    let options = Path::new("/sys/bus/pseudo/drivers/scsi_debug/opts");
    if !options.exists() {
        return lab::absent("scsi_debug");
    }
    // Where it is built in, it has no such option yet. 2 is SDEBUG_OPT_MEDIUM_ERR: sectors 4660 to 4669.
    fs::write(options, "2")?;
    let started = Instant::now();
    loop {
        for entry in fs::read_dir("/sys/block")?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let model = fs::read_to_string(entry.path().join("device/model")).unwrap_or_default();
            if name.starts_with("sd") && model.trim() == "scsi_debug" {
                return Ok(Path::new("/dev").join(name));
            }
        }
        ensure!(started.elapsed() < PATIENCE, "scsi_debug made no disk");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Writes 32 KiB past the page cache, from block `block` of 4 KiB on.
fn overwrite(disk: &Path, block: u32) -> Result<()> {
    run(
        "dd",
        [
            "if=/dev/zero",
            &format!("of={}", disk.display()),
            "bs=4k",
            "count=8",
            &format!("seek={block}"),
            "oflag=direct",
        ],
    )
    .map(drop)
}

#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn an_origin_that_can_not_be_read() -> Result<()> {
    prepare()?;
    let disk = unreadable()?;
    let daemon = Daemon::with_options(&daemon_options())?;
    let taken = take_on(&daemon, &[&disk], "memory:256M", &[])?;
    overwrite(&disk, 16)?;
    let shown = daemon.json(["snapshot", "info", id(&taken)?])?;
    ensure!(shown["state"] == "taken", "{shown}");
    // 4660 sectors are 582 blocks and a half.
    overwrite(&disk, 580)?;
    is_lost(&daemon, &taken, "read old data")?;
    overwrite(&disk, 1024)?;
    daemon.run(["snapshot", "destroy", id(&taken)?])?;
    nothing_is_left(&alias_of(&disk))
}

/// The old data does not come in time: writers wait for one deadline and no longer.
#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn an_origin_that_is_slow() -> Result<()> {
    prepare()?;
    let disk = unreadable()?;
    let daemon = Daemon::with_options(&DaemonOptions {
        arguments: vec!["--gate-deadline=1500".into(), "--gate-preempt".into()],
        ..DaemonOptions::default()
    })?;
    let taken = take_on(&daemon, &[&disk], "memory:256M", &[])?;
    // In ticks of the kernel's clock: 3 s and more. It is refused while requests are under way.
    let slow = |ticks: &str| -> Result<()> {
        let started = Instant::now();
        while let Err(error) = fs::write("/sys/bus/pseudo/drivers/scsi_debug/delay", ticks) {
            ensure!(started.elapsed() < PATIENCE, "{error}");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    };
    slow("3000")?;
    let started = Instant::now();
    let written = overwrite(&disk, 16);
    println!("a write after {:?}", started.elapsed());
    slow("1")?;
    written?;
    is_lost(&daemon, &taken, "a write waited as long as it may")?;
    overwrite(&disk, 2048)?;
    daemon.run(["snapshot", "destroy", id(&taken)?])?;
    nothing_is_left(&alias_of(&disk))
}

/// More writers than may wait: one gets past, the auditor sees it, and nobody waits any more or gets an error.
#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn more_writers_than_may_wait() -> Result<()> {
    /// Twice what may wait on a processor.
    const WRITERS: usize = 2 * COPIES;
    prepare()?;
    let daemon = Daemon::with_options(&daemon_options())?;
    let (length, seed) = (256 * MIB, seed("gate past"));
    let part = partition(length)?;
    let taken = take_on(&daemon, &[&part], "memory:400M", &[])?;
    let threads = WRITERS * std::thread::available_parallelism()?.get();
    let load = Load::on(&part, length, seed);
    let agent = daemon.pid().context("a pid")?.to_string();
    // Nobody lets them go on, so that all wait at once.
    let stopped = || run("kill", ["-STOP", &agent]).map(drop);
    let written = load.run_after(threads, Duration::from_secs(5), stopped);
    run("kill", ["-CONT", &agent])?;
    println!("{threads} writers: {} writes", written?);
    is_lost(&daemon, &taken, "reached the disk before")?;
    ensure!(
        load.run(threads, Duration::from_secs(5))? > 100,
        "writes do not go on"
    );
    daemon.run(["snapshot", "destroy", id(&taken)?])?;
    nothing_is_left(Path::new("/nonexistent"))
}

/// A machine without memory: the kernel ends the agent, writers go on, and the next agent says what is lost.
#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn a_machine_that_is_out_of_memory() -> Result<()> {
    prepare()?;
    let mut daemon = Daemon::with_options(&daemon_options())?;
    let part = partition(24 * MIB)?;
    let busy = Busy::new(&part, seed("gate memory"))?;
    let taken = take_on(&daemon, &[&part], "memory:256M", &[])?;
    let pid = daemon.pid().context("a pid")?;
    fs::write(format!("/proc/{pid}/oom_score_adj"), "1000")?;
    // Now the kernel looks for somebody to end.
    fs::write("/proc/sysrq-trigger", "f")?;
    let started = Instant::now();
    while fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z ")) {
        ensure!(started.elapsed() < PATIENCE, "the agent was not ended");
        std::thread::sleep(Duration::from_millis(50));
    }
    busy.wait_for(20)?;
    // It has ended, and is waited for.
    daemon.kill()?;
    nothing_is_left(Path::new("/nonexistent"))?;
    daemon.launch(&daemon_options())?;
    let shown = daemon.json([OsStr::new("snapshot"), "info".as_ref(), id(&taken)?.as_ref()])?;
    ensure!(shown["state"] == "corrupted", "{shown}");
    ensure!(
        shown["reason"]
            .as_str()
            .is_some_and(|why| why.contains("does not outlive its agent")),
        "{shown}"
    );
    daemon.run(["snapshot", "destroy", id(&taken)?])?;
    busy.check()
}

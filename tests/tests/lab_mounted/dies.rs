//! Servers that die, stop answering, or come back, under devices that are in use. Reads go on, or they fail within the
//! time-outs; nothing hangs.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use blksnap_agent::sys::AlignedBuffer;
use blksnap_tests::{Daemon, DaemonOptions, LoopDevice, Writer, read_device, run, seed};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::scene::{
    Attached, Files, MIB, Mounted, check_file_system, daemon, export, nobody_hangs, read_only_options,
    snapshot, wait_until,
};

/// Reads the same files over and over, past the page cache.
struct Reader {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Reader {
    fn start(files: Files, root: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let rounds = Arc::new(AtomicU64::new(0));
        let (asked, counter, root) = (Arc::clone(&stop), Arc::clone(&rounds), root.to_owned());
        let thread = std::thread::spawn(move || {
            while !asked.load(Ordering::SeqCst) {
                files.check(&root)?;
                counter.fetch_add(1, Ordering::SeqCst);
                // The agent needs the processor, too.
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        });
        Self {
            stop,
            rounds,
            thread: Some(thread),
        }
    }

    fn ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits until everything was read twice more.
    fn goes_on(&mut self) -> Result<()> {
        let due = self.rounds.load(Ordering::SeqCst) + 2;
        wait_until("the reader goes on", || {
            if self.ended() {
                self.end()?;
            }
            Ok(self.rounds.load(Ordering::SeqCst) >= due)
        })
    }

    /// Waits until it has failed, and gives why.
    fn fails(&mut self) -> Result<String> {
        let begun = Instant::now();
        wait_until("the reader fails", || Ok(self.ended()))?;
        println!("the reader failed after {:?}", begun.elapsed());
        let error = self.end().err().context("the reader has not failed")?;
        Ok(format!("{error:#}"))
    }

    fn end(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::SeqCst);
        let thread = self.thread.take().context("the reader has ended")?;
        thread.join().map_err(|_| anyhow!("the reader panicked"))?
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            // A test that fails has said so already.
            let _ = thread.join();
        }
    }
}

/// A served ext4 that is mounted, with a held snapshot of a moment at which it was frozen.
struct Held {
    // In the order in which they have to go.
    root: Mounted,
    origin: Attached,
    files: Files,
    path: PathBuf,
    export: String,
    id: String,
    daemon: Daemon,
}

impl Held {
    fn new(name: &str, time_outs: &[&str]) -> Result<Self> {
        let seed = seed(name);
        let daemon = daemon()?;
        let path = daemon.scratch().join(name);
        File::create(&path)?.set_len(48 * MIB)?;
        daemon.run(["serve".as_ref(), path.as_os_str()])?;
        let origin = Attached::new(&daemon, name, time_outs)?;
        LoopDevice::mkfs_on(&origin.node, "ext4")?;
        let root = Mounted::new(&origin.node, "rw")?;
        let files = Files::write(root.path(), "before", 20, seed)?;
        run("fsfreeze", [Path::new("--freeze"), root.path()])?;
        let taken = snapshot(&daemon, &[&path], &[]);
        run("fsfreeze", [Path::new("--unfreeze"), root.path()])?;
        let taken = taken?;
        Ok(Self {
            root,
            origin,
            files,
            path,
            export: export(&taken, 0)?.to_owned(),
            id: taken["id"].as_str().context("an id")?.to_owned(),
            daemon,
        })
    }

    fn image(&self, time_outs: &[&str]) -> Result<(Attached, Mounted)> {
        let device = Attached::new(&self.daemon, &self.export, time_outs)?;
        let mounted = Mounted::new(&device.node, read_only_options("ext4"))?;
        Ok((device, mounted))
    }

    /// All ends as it should: the file system of the origin is clean, and what was synced is there.
    fn close(mut self, more: &[&Files]) -> Result<()> {
        for files in more {
            files.check(self.root.path())?;
        }
        self.root.unmount()?;
        check_file_system("ext4", &self.origin.node)?;
        self.origin.disconnect(&self.daemon, &[])?;
        check_file_system("ext4", &self.path)
    }
}

const FOR_LONG: [&str; 4] = ["--timeout", "120", "--dead-timeout", "120"];

#[test]
#[ignore = "needs a kernel with nbd: cargo xtask test --vm fei"]
fn a_mounted_image_outlives_its_agent() -> Result<()> {
    let mut held = Held::new("outlives", &FOR_LONG)?;
    let (mut device, image) = held.image(&FOR_LONG)?;
    let before = read_device(&device.node)?;
    fs::create_dir(held.root.path().join("busy"))?;
    let writer = Writer::files(&held.root.path().join("busy"), 1);
    let files = Files::write(held.root.path(), "meanwhile", 5, 2)?;
    let mut reader = Reader::start(std::mem::replace(&mut held.files, files), image.path());
    reader.goes_on()?;
    let mut synced = Vec::new();
    for round in 0..3 {
        held.daemon.kill()?;
        held.daemon.launch(&DaemonOptions::default())?;
        reader.goes_on().context(held.daemon.log())?;
        writer.wait_for(5);
        let name = format!("round {round}");
        synced.push(Files::write(held.root.path(), &name, 3, round)?);
    }
    // A clean stop is no other thing.
    ensure!(held.daemon.stop()? == 0);
    held.daemon.launch(&DaemonOptions::default())?;
    reader.goes_on().context(held.daemon.log())?;
    reader.end()?;
    drop(writer);
    ensure!(read_device(&device.node)? == before, "the image differs");
    let status = held.daemon.json(["nbd", "list"])?;
    let ours = |found: &&serde_json::Value| found["export"] == held.export.as_str();
    let listed = status["devices"].as_array().context("devices")?.iter().find(ours);
    ensure!(listed == Some(&device.told), "{status}");
    image.unmount()?;
    device.disconnect(&held.daemon, &[])?;
    held.daemon.run(["snapshot", "destroy", &held.id])?;
    synced.push(std::mem::replace(
        &mut held.files,
        Files::write(held.root.path(), "last", 1, 3)?,
    ));
    held.close(&synced.iter().collect::<Vec<_>>())?;
    nobody_hangs()
}

#[test]
#[ignore = "needs a kernel with nbd: cargo xtask test --vm fei"]
fn without_an_agent_everything_fails_in_time() -> Result<()> {
    const SOON: [&str; 4] = ["--timeout", "3", "--dead-timeout", "4"];
    let mut held = Held::new("fails", &SOON)?;
    let (mut device, image) = held.image(&SOON)?;
    let synced = Files::write(held.root.path(), "synced", 5, 3)?;
    let files = Files::write(held.root.path(), "more", 1, 4)?;
    let mut reader = Reader::start(std::mem::replace(&mut held.files, files), image.path());
    reader.goes_on()?;
    held.daemon.kill()?;
    let why = reader.fails()?;
    ensure!(why.contains("Input/output error"), "{why}");
    // Writes fail, too.
    let mut file = File::create(held.root.path().join("never"));
    let refused = file
        .as_mut()
        .map_err(|error| std::io::Error::from(error.kind()))
        .and_then(|file| file.write_all_at(&[1; 4096], 0).and_then(|()| file.sync_all()));
    ensure!(refused.is_err(), "a write was synced to nobody");
    drop(file);
    image.unmount()?;
    held.root.unmount()?;
    // Devices can be listed and ended without an agent.
    let list = held.daemon.json(["nbd", "list"])?;
    ensure!(
        list["devices"].as_array().is_some_and(|list| list.len() >= 2),
        "{list}"
    );
    device.disconnect(&held.daemon, &[])?;
    held.origin.disconnect(&held.daemon, &[])?;

    held.daemon.launch(&DaemonOptions::default())?;
    held.origin = Attached::new(&held.daemon, "fails", &[])?;
    held.root = Mounted::new(&held.origin.node, "rw")?;
    synced.check(held.root.path())?;
    let (mut device, image) = held.image(&[])?;
    image.unmount()?;
    device.disconnect(&held.daemon, &[])?;
    held.close(&[&synced])?;
    nobody_hangs()
}

#[test]
#[ignore = "needs a kernel with nbd: cargo xtask test --vm fei"]
fn an_agent_that_is_late_finds_its_devices_again() -> Result<()> {
    const SOON: [&str; 4] = ["--timeout", "3", "--dead-timeout", "3"];
    let mut held = Held::new("late", &FOR_LONG)?;
    let mut device = Attached::new(&held.daemon, &held.export, &SOON)?;
    let before = read_device(&device.node)?;
    held.daemon.kill()?;
    ensure!(read_device(&device.node).is_err(), "there is nobody to answer");
    held.daemon.launch(&DaemonOptions::default())?;
    // The time-out is over: what waited has failed, but the device is none that has to be made again.
    wait_until("the device is back", || {
        Ok(read_device(&device.node).is_ok_and(|now| now == before))
    })?;
    device.disconnect(&held.daemon, &[])?;
    held.close(&[])?;
    nobody_hangs()
}

#[test]
#[ignore = "needs a kernel with nbd: cargo xtask test --vm fei"]
fn an_agent_that_does_not_answer_is_given_up() -> Result<()> {
    const SOON: [&str; 6] = ["--timeout", "3", "--dead-timeout", "3", "--connections", "2"];
    let mut held = Held::new("silent", &FOR_LONG)?;
    let (mut device, image) = held.image(&SOON)?;
    let files = Files::write(held.root.path(), "more", 1, 4)?;
    let mut reader = Reader::start(std::mem::replace(&mut held.files, files), image.path());
    reader.goes_on()?;
    let pid = held.daemon.pid().context("a process")?;
    let pid = Pid::from_raw(i32::try_from(pid)?);
    kill(pid, Signal::SIGSTOP)?;
    let why = reader.fails();
    kill(pid, Signal::SIGCONT)?;
    let why = why?;
    ensure!(why.contains("Input/output error"), "{why}");
    // It goes on, and so does the device when it is told to.
    held.daemon
        .run(["nbd".as_ref(), "reconnect".as_ref(), device.node.as_os_str()])?;
    let bytes = read_device(&device.node)?;
    ensure!(bytes.len() as u64 == 48 * MIB);
    image.unmount()?;
    device.disconnect(&held.daemon, &[])?;
    held.close(&[])?;
    nobody_hangs()
}

#[test]
#[ignore = "needs a kernel with nbd: cargo xtask test --vm fei"]
fn an_image_that_went_with_its_agent_ends() -> Result<()> {
    let mut daemon = daemon()?;
    let mut disk = LoopDevice::new(48 * MIB)?;
    disk.mkfs("ext4")?;
    let root = disk.mount()?;
    let files = Files::write(&root, "before", 20, seed("went"))?;
    daemon.run(["attach".as_ref(), disk.path().as_os_str()])?;
    let taken = snapshot(&daemon, &[disk.path()], &[])?;
    let mut device = Attached::new(&daemon, export(&taken, 0)?, &["--dead-timeout", "4"])?;
    let image = Mounted::new(&device.node, read_only_options("ext4"))?;
    let mut reader = Reader::start(files, image.path());
    reader.goes_on()?;
    daemon.kill()?;
    daemon.launch(&DaemonOptions::default())?;
    let why = reader.fails()?;
    ensure!(why.contains("Input/output error"), "{why}");
    image.unmount()?;
    device.disconnect(&daemon, &[])?;
    disk.unmount()?;
    check_file_system("ext4", disk.path())?;
    nobody_hangs()
}

#[test]
#[ignore = "needs a kernel with nbd: cargo xtask test --vm fei"]
fn a_destroyed_snapshot_ends_its_device() -> Result<()> {
    let mut held = Held::new("destroyed", &FOR_LONG)?;
    let (mut device, image) = held.image(&FOR_LONG)?;
    let files = Files::write(held.root.path(), "more", 1, 4)?;
    let mut reader = Reader::start(std::mem::replace(&mut held.files, files), image.path());
    reader.goes_on()?;
    held.daemon.run(["snapshot", "destroy", &held.id])?;
    let why = reader.fails()?;
    ensure!(why.contains("Input/output error"), "{why}");
    image.unmount()?;
    device.disconnect(&held.daemon, &[])?;
    let files = Files::write(held.root.path(), "afterwards", 3, 5)?;
    held.close(&[&files])?;
    nobody_hangs()
}

#[test]
#[ignore = "needs a kernel with nbd: cargo xtask test --vm fei"]
fn a_device_with_another_size_is_not_given_back() -> Result<()> {
    let mut daemon = daemon()?;
    let path = daemon.scratch().join("grown");
    File::create(&path)?.set_len(MIB)?;
    daemon.run(["serve".as_ref(), path.as_os_str()])?;
    let mut device = Attached::new(&daemon, "grown", &["--dead-timeout", "3"])?;
    ensure!(read_device(&device.node)?.len() as u64 == MIB);
    daemon.kill()?;
    OpenOptions::new().write(true).open(&path)?.set_len(2 * MIB)?;
    daemon.launch(&DaemonOptions::default())?;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(&device.node);
    let mut block = AlignedBuffer::zeroed(4096);
    let read = file.and_then(|file| file.read_exact_at(block.as_mut_slice(), 0));
    ensure!(read.is_err(), "a device of another size goes on");
    device.disconnect(&daemon, &[])?;
    nobody_hangs()
}

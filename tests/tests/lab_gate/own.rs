//! Own: difference storage in a directory of the file system on the very device whose writes are held.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::lab::KernelLog;
use blksnap_tests::nbd::{Client, Framing};
use blksnap_tests::{Daemon, LoopDevice, Writer, lab, run, seed, unmount};
use serde_json::Value;
use tempfile::TempDir;

use super::agent::{
    alias_of, attached, corrupted, daemon_options, id, nothing_is_left, prepare, read_image, take_on,
};
use super::scene::{MIB, partition};

/// Bound against hanging for ever.
const PATIENCE: Duration = Duration::from_secs(120);

/// A file system, and storage on it that has room for all the rest of it.
#[derive(Clone, Copy)]
struct Kind {
    name: &'static str,
    bytes: u64,
    storage: u64,
}

const EXT4: Kind = Kind {
    name: "ext4",
    bytes: 96 * MIB,
    storage: 56 * MIB,
};

/// The smallest that it can be made.
const XFS: Kind = Kind {
    name: "xfs",
    bytes: 304 * MIB,
    storage: 164 * MIB,
};

/// A mounted file system with a writer. Unmounted when dropped.
struct Scene {
    kind: Kind,
    node: PathBuf,
    directory: TempDir,
    writer: Option<Writer>,
    daemon: Daemon,
}

impl Scene {
    fn new(kind: Kind, node: PathBuf, seed: u64) -> Result<Self> {
        let length = if kind.name == "xfs" {
            ["-f".to_owned(), "-d".to_owned(), format!("size={}", kind.bytes)]
        } else {
            ["-F".to_owned(), "-b".to_owned(), "4096".to_owned()]
        };
        let mut arguments = vec!["-q".to_owned()];
        arguments.extend(length);
        arguments.push(node.display().to_string());
        if kind.name == "ext4" {
            arguments.push(format!("{}k", kind.bytes / 1024));
        }
        run(&format!("mkfs.{}", kind.name), &arguments)?;
        let directory = tempfile::Builder::new().prefix("blksnap-own-").tempdir()?;
        run("mount", [node.as_os_str(), directory.path().as_os_str()])?;
        let daemon = match Daemon::with_options(&daemon_options()) {
            Ok(daemon) => daemon,
            Err(error) => {
                unmount(directory.path())?;
                return Err(error);
            }
        };
        let writer = Writer::files(directory.path(), seed);
        writer.wait_for(10);
        Ok(Self {
            kind,
            node,
            directory,
            writer: Some(writer),
            daemon,
        })
    }

    /// The directory as storage of so many bytes.
    fn storage(&self, bytes: u64) -> String {
        format!("{},limit={}M", self.directory.path().display(), bytes / MIB)
    }

    fn wait_for(&self, writes: u64) -> Result<()> {
        self.writer.as_ref().context("a writer")?.wait_for(writes);
        Ok(())
    }

    /// Files of storage.
    fn files(&self) -> Result<Vec<PathBuf>> {
        with_extension(self.directory.path(), "diff")
    }

    /// What the agent has noted of them.
    fn notes(&self) -> Result<Vec<PathBuf>> {
        with_extension(&self.daemon.state_dir().join("snapshots"), "own")
    }

    /// A program that copies the device while it is frozen, for the test to compare with.
    fn hook(&self) -> Result<PathBuf> {
        let script = format!(
            "#!/bin/sh\n[ \"$1\" = frozen ] || exit 0\nexec dd if={} of={} bs=1M count={} iflag=direct 2>/dev/null\n",
            self.node.display(),
            self.frozen().display(),
            self.kind.bytes / MIB
        );
        let path = self.daemon.scratch().join("hook");
        fs::write(&path, script)?;
        fs::set_permissions(&path, Permissions::from_mode(0o755))?;
        Ok(path)
    }

    fn frozen(&self) -> PathBuf {
        self.daemon.scratch().join("frozen")
    }

    /// Takes the device, and keeps what it had as `name`.
    fn take(&self, storage: &str, name: &str) -> Result<Value> {
        let hook = self.hook()?;
        let hooked: [&OsStr; 4] = [
            "--freeze-hook".as_ref(),
            hook.as_ref(),
            // Copies take long in a guest.
            "--freeze-limit".as_ref(),
            "120000".as_ref(),
        ];
        let taken = take_on(&self.daemon, &[&self.node], storage, &hooked)?;
        fs::rename(self.frozen(), self.daemon.scratch().join(name))?;
        Ok(taken)
    }

    /// Sectors of the device that are storage of a snapshot.
    fn sectors(&self, snapshot: &Value) -> Result<BTreeSet<u64>> {
        let answer = self.daemon.json(["snapshot", "storage", id(snapshot)?])?;
        let mut sectors = BTreeSet::new();
        for extent in answer["extents"].as_array().context("extents")? {
            let number = |name: &str| {
                extent[name]
                    .as_u64()
                    .with_context(|| format!("{name} in {extent}"))
            };
            sectors.extend(number("sector")?..number("sector")? + number("count")?);
        }
        Ok(sectors)
    }

    /// The image is what was there, but for these sectors.
    fn compare(&self, snapshot: &Value, name: &str, own: &BTreeSet<u64>) -> Result<()> {
        let export = snapshot["devices"][0]["image"]["export"]
            .as_str()
            .context("an export")?;
        let mut client = Client::connect(&self.daemon.nbd_socket(), export, Framing::Structured, &[])?;
        let frozen = File::open(self.daemon.scratch().join(name))?;
        let mut wanted = vec![0; usize::try_from(MIB)?];
        let mut storage = 0;
        for offset in (0..self.kind.bytes).step_by(usize::try_from(MIB)?) {
            frozen.read_exact_at(&mut wanted, offset)?;
            let found = client.read(offset, MIB)?;
            for (number, (found, wanted)) in (0..).zip(found.chunks(512).zip(wanted.chunks(512))) {
                let sector = offset / 512 + number;
                ensure!(
                    found == wanted || own.contains(&sector),
                    "{name}: sector {sector} of the image differs"
                );
                storage += u64::from(found != wanted);
            }
        }
        println!(
            "{name}: exact but for {storage} of {} sectors of storage",
            own.len()
        );
        client.disconnect()
    }

    fn is_taken(&self, snapshot: &Value) -> Result<Value> {
        let shown = self.daemon.json(["snapshot", "info", id(snapshot)?])?;
        ensure!(shown["state"] == "taken", "{shown}; {}", self.daemon.log());
        Ok(shown)
    }

    /// No file system suffered.
    fn check(mut self) -> Result<()> {
        let errors = self.writer.take().context("a writer")?.errors();
        ensure!(errors == 0, "{errors} writes failed");
        ensure!(self.files()?.is_empty(), "files stay: {:?}", self.files()?);
        unmount(self.directory.path())?;
        let (program, option) = match self.kind.name {
            "xfs" => ("xfs_repair", "-n"),
            _ => ("fsck.ext4", "-fn"),
        };
        run(program, [OsStr::new(option), self.node.as_os_str()]).map(drop)
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if self.writer.take().is_some() {
            let _ = self.daemon.stop();
            let _ = unmount(self.directory.path());
        }
    }
}

fn with_extension(directory: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|one| one == extension) {
            found.push(path);
        }
    }
    Ok(found)
}

/// Images are exact while the device keeps its own old data, also that of a second snapshot that shares the gate, and when
/// the file is gone.
fn the_device_keeps_its_own_old_data(kind: Kind, node: PathBuf, disk: &Path) -> Result<()> {
    prepare()?;
    let scene = Scene::new(kind, node, seed(kind.name))?;
    let mut log = KernelLog::follow()?;
    let first = scene.take(&scene.storage(kind.storage), "first")?;
    ensure!(attached() > 0);
    let own = scene.sectors(&first)?;
    ensure!(
        own.len() as u64 * 512 > kind.storage * 3 / 4,
        "{} sectors of storage",
        own.len()
    );
    // Nobody takes it away by mistake.
    let files = scene.files()?;
    ensure!(
        files.len() == 1 && fs::remove_file(&files[0]).is_err(),
        "{files:?}"
    );
    ensure!(
        run("umount", [scene.directory.path()]).is_err(),
        "it was unmounted"
    );
    scene.wait_for(80)?;
    let shown = scene.is_taken(&first)?;
    ensure!(
        shown["usage"]["used"].as_u64().is_some_and(|used| used > 0),
        "nothing was stored: {shown}"
    );
    scene.compare(&first, "first", &own)?;
    let second = scene.take("memory:512M", "second")?;
    scene.wait_for(60)?;
    scene.compare(&first, "first", &own)?;
    scene.compare(&second, "second", &own)?;
    scene.is_taken(&first)?;
    // The file gives its blocks to others.
    scene.daemon.run(["snapshot", "destroy", id(&first)?])?;
    ensure!(scene.files()?.is_empty(), "files stay: {:?}", scene.files()?);
    scene.wait_for(60)?;
    scene.compare(&second, "second", &own)?;
    // What a file gets now is what a snapshot needs that is held.
    let answer = scene.daemon.try_run([
        "snapshot",
        "create",
        &scene.node.to_string_lossy(),
        "--filter",
        "gate",
        "--storage",
        &scene.storage(kind.storage),
    ])?;
    ensure!(
        answer.code == 1 && answer.stderr.contains("snapshots that are held may need"),
        "{answer:?}"
    );
    ensure!(scene.files()?.is_empty(), "files stay: {:?}", scene.files()?);
    scene.compare(&second, "second", &own)?;
    // And it is done again.
    scene.daemon.run(["snapshot", "destroy", id(&second)?])?;
    let third = scene.take(&scene.storage(kind.storage), "third")?;
    scene.wait_for(30)?;
    scene.compare(&third, "third", &scene.sectors(&third)?)?;
    scene.daemon.run(["snapshot", "destroy", id(&third)?])?;
    nothing_is_left(&alias_of(disk))?;
    log.is_quiet()?;
    scene.check()
}

#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn ext4_on_a_partition_keeps_its_own_old_data() -> Result<()> {
    the_device_keeps_its_own_old_data(EXT4, partition(EXT4.bytes)?, Path::new("/nonexistent"))
}

#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn ext4_on_a_disk_keeps_its_own_old_data() -> Result<()> {
    let disk = lab::virtio(1)?;
    the_device_keeps_its_own_old_data(EXT4, disk.clone(), &disk)
}

#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn xfs_on_a_partition_keeps_its_own_old_data() -> Result<()> {
    the_device_keeps_its_own_old_data(XFS, partition(XFS.bytes)?, Path::new("/nonexistent"))
}

#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn xfs_on_a_disk_keeps_its_own_old_data() -> Result<()> {
    let disk = lab::virtio(1)?;
    the_device_keeps_its_own_old_data(XFS, disk.clone(), &disk)
}

#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn ext4_on_a_loop_device_keeps_its_own_old_data() -> Result<()> {
    lab::inside()?;
    let device = LoopDevice::new(EXT4.bytes)?;
    the_device_keeps_its_own_old_data(EXT4, device.path().to_owned(), Path::new("/nonexistent"))
}

/// It does not grow: a snapshot whose storage is full is lost and says so, and the file system goes on.
#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn storage_on_the_device_that_is_full() -> Result<()> {
    prepare()?;
    let scene = Scene::new(EXT4, partition(EXT4.bytes)?, seed("own full"))?;
    // More than the file system has: nothing is left of it.
    let answer = scene.daemon.try_run([
        "snapshot",
        "create",
        &scene.node.to_string_lossy(),
        "--filter",
        "gate",
        "--storage",
        &scene.storage(2 * EXT4.bytes),
    ])?;
    ensure!(
        answer.code == 1 && answer.stderr.contains("can't have"),
        "{answer:?}"
    );
    ensure!(scene.files()?.is_empty(), "{:?}", scene.files()?);
    ensure!(scene.notes()?.is_empty(), "{:?}", scene.notes()?);
    let taken = scene.take(&scene.storage(4 * MIB), "taken")?;
    ensure!(scene.notes()?.len() == 1, "{:?}", scene.notes()?);
    let started = Instant::now();
    while scene.daemon.json(["snapshot", "info", id(&taken)?])?["state"] == "taken" {
        scene.wait_for(20)?;
        ensure!(started.elapsed() < PATIENCE, "it is never full");
    }
    let event = corrupted(&scene.daemon, id(&taken)?)?;
    ensure!(event.to_string().contains("full"), "{event}");
    ensure!(
        read_image(&scene.daemon, &taken, 0).is_err(),
        "a lost image was read"
    );
    ensure!(
        scene.daemon.log().contains("does not grow"),
        "{}",
        scene.daemon.log()
    );
    scene.wait_for(20)?;
    scene.daemon.run(["snapshot", "destroy", id(&taken)?])?;
    scene.check()
}

/// The file of an agent that was killed is removed by the next one, and it can be done again.
#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn storage_on_the_device_of_a_killed_agent() -> Result<()> {
    prepare()?;
    let mut scene = Scene::new(EXT4, partition(EXT4.bytes)?, seed("own kill"))?;
    for round in 0..3 {
        let taken = scene.take(&scene.storage(EXT4.storage), "taken")?;
        scene.wait_for(round * 15)?;
        scene.daemon.kill()?;
        scene.wait_for(10)?;
        ensure!(scene.files()?.len() == 1, "{:?}", scene.files()?);
        scene.daemon.launch(&daemon_options())?;
        let started = Instant::now();
        while !scene.files()?.is_empty() {
            ensure!(
                started.elapsed() < PATIENCE,
                "files stay: {:?}; {}",
                scene.files()?,
                scene.daemon.log()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        let shown = scene.daemon.json(["snapshot", "info", id(&taken)?])?;
        ensure!(shown["state"] == "corrupted", "{shown}");
        scene.daemon.run(["snapshot", "destroy", id(&taken)?])?;
    }
    // One that is stopped removes it itself.
    scene.take(&scene.storage(EXT4.storage), "taken")?;
    scene.daemon.stop()?;
    ensure!(scene.files()?.is_empty(), "files stay: {:?}", scene.files()?);
    scene.check()
}

//! Machine: a daemon with a disk, in a system that can be rebooted.
//!
//! The disk is a loop device, and the tracking is real. What the daemon is told of boots and of what the disk counted
//! and is comes from a sysfs, a `/proc` and a boot number that the test makes: loop devices have no serial number, and
//! this machine can't be rebooted. A reboot is the end of the BPF file system, with which all tracking goes.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::{Daemon, DaemonOptions, LoopDevice, run};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use serde_json::Value;
use tempfile::TempDir;

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const BLOCK: u64 = 65536;

/// Where the disk is in the sysfs of the test.
const PLACE: &str = "devices/pci0000:00/0000:00:05.0/virtio2/block";

pub(crate) struct Machine {
    pub(crate) daemon: Daemon,
    pub(crate) disk: LoopDevice,
    root: TempDir,
    boot: u32,
    seal: &'static str,
    /// More arguments of the daemon.
    pub(crate) more: Vec<OsString>,
}

impl Machine {
    /// A system with a tracked disk of 64 MiB, of which a full backup was made.
    pub(crate) fn new() -> Result<Self> {
        let machine = Self::untracked("stop")?;
        machine
            .daemon
            .run(["attach", &machine.node(), "--block-size", "64K"])?;
        machine.write(0, 8 * 4096)?;
        ensure!(machine.backup()? == "full");
        Ok(machine)
    }

    pub(crate) fn untracked(seal: &'static str) -> Result<Self> {
        let root = tempfile::Builder::new().prefix("blksnap-machine-").tempdir()?;
        let disk = LoopDevice::new(64 * MIB)?;
        for directory in ["sys/dev/block", "sys/class/block", "proc"] {
            fs::create_dir_all(root.path().join(directory))?;
        }
        // Not all processes of a machine can be looked at by every root: this one can.
        let own = std::process::id().to_string();
        symlink(Path::new("/proc").join(&own), root.path().join("proc").join(&own))?;
        fs::write(root.path().join("boot"), "boot-1\n")?;
        let options = options_of(root.path(), seal, &[]);
        let daemon = Daemon::with_options(&options)?;
        let machine = Self {
            daemon,
            disk,
            root,
            boot: 1,
            seal,
            more: Vec::new(),
        };
        machine.plug("serial-1")?;
        Ok(machine)
    }

    pub(crate) fn node(&self) -> String {
        self.disk.path().display().to_string()
    }

    fn place(&self) -> PathBuf {
        self.root.path().join("sys").join(PLACE).join(self.disk.name())
    }

    fn links(&self) -> Result<[PathBuf; 2]> {
        let number = fs::metadata(self.disk.path())?.rdev();
        let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
        let sys = self.root.path().join("sys");
        Ok([
            sys.join(format!("dev/block/{major}:{minor}")),
            sys.join("class/block").join(self.disk.name()),
        ])
    }

    /// The disk is there, with this serial number and fresh counters.
    pub(crate) fn plug(&self, serial: &str) -> Result<()> {
        let place = self.place();
        fs::create_dir_all(place.join("queue"))?;
        let [dev, _] = self.links()?;
        let number = dev.file_name().context("a name")?.to_string_lossy().into_owned();
        for (name, value) in [
            ("dev", number.as_str()),
            ("serial", serial),
            ("removable", "0"),
            ("queue/iostats", "1"),
            ("queue/logical_block_size", "512"),
            ("inflight", "       0        0"),
            ("stat", &["0"; 17].join(" ")),
        ] {
            fs::write(place.join(name), format!("{value}\n"))?;
        }
        self.measure()?;
        for link in self.links()? {
            if link.symlink_metadata().is_err() {
                symlink(Path::new("../..").join(PLACE).join(self.disk.name()), link)?;
            }
        }
        Ok(())
    }

    /// The disk is there again after some time.
    pub(crate) fn plug_later(&self, time: Duration) -> Result<JoinHandle<std::io::Result<()>>> {
        let (links, target) = (
            self.links()?,
            Path::new("../..").join(PLACE).join(self.disk.name()),
        );
        Ok(std::thread::spawn(move || {
            std::thread::sleep(time);
            links.into_iter().try_for_each(|link| symlink(&target, link))
        }))
    }

    /// The disk has another name from now on.
    pub(crate) fn rename(&mut self) -> Result<()> {
        self.unplug()?;
        let other = LoopDevice::new(64 * MIB)?;
        let content = fs::read(self.disk.image())?;
        fs::File::options()
            .write(true)
            .open(other.image())?
            .write_all_at(&content, 0)?;
        self.disk = other;
        self.plug("serial-1")
    }

    /// The disk is not there any more.
    pub(crate) fn unplug(&self) -> Result<()> {
        for link in self.links()? {
            fs::remove_file(link)?;
        }
        Ok(())
    }

    /// Tells the length of the disk.
    pub(crate) fn measure(&self) -> Result<()> {
        let size = fs::read_to_string(Path::new("/sys/class/block").join(self.disk.name()).join("size"))?;
        Ok(fs::write(self.place().join("size"), size)?)
    }

    /// Sets an attribute of the disk.
    pub(crate) fn tell(&self, name: &str, value: &str) -> Result<()> {
        Ok(fs::write(self.place().join(name), format!("{value}\n"))?)
    }

    /// The disk counted this many writes since the boot.
    pub(crate) fn count(&self, writes: u64, sectors: u64, discards: u64) -> Result<()> {
        let mut fields = [0; 17];
        (fields[4], fields[6], fields[11]) = (writes, sectors, discards);
        self.tell("stat", &fields.map(|field: u64| field.to_string()).join(" "))
    }

    /// Writes to the disk, tracked if the daemon does.
    pub(crate) fn write(&self, offset: u64, length: usize) -> Result<()> {
        let file = fs::OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(self.disk.path())?;
        let memory: Vec<u8> = (0..length + 4096).map(|_| rand::random::<u8>()).collect();
        let start = memory.as_ptr().align_offset(4096);
        Ok(file.write_all_at(&memory[start..start + length], offset)?)
    }

    /// Changes the disk behind everybody's back.
    pub(crate) fn change(&self, offset: u64) -> Result<()> {
        let file = fs::File::options().write(true).open(self.disk.image())?;
        Ok(file.write_all_at(&rand::random::<u64>().to_ne_bytes(), offset)?)
    }

    fn image(&self) -> PathBuf {
        self.daemon.scratch().join("image")
    }

    /// Makes a backup, incremental if that is right, and compares it with the disk; says which it was.
    pub(crate) fn backup(&self) -> Result<String> {
        let image = self.image();
        let (node, target) = (self.node(), image.display().to_string());
        let answer = self.daemon.json(["backup", &node, &target, "--incremental"])?;
        ensure!(
            fs::read(&image)? == fs::read(self.disk.image())?,
            "the image differs: {answer}"
        );
        let mode = find(&answer, "kind").context("no kind")?;
        Ok(mode.as_str().unwrap_or_default().to_owned())
    }

    /// A clean stop of the daemon.
    pub(crate) fn stop(&mut self) -> Result<()> {
        ensure!(self.daemon.stop()? == 0);
        Ok(())
    }

    /// The system is gone, with all that the kernel knew.
    pub(crate) fn off(&mut self) -> Result<()> {
        let bpffs = self.daemon.bpffs();
        match umount2(&bpffs, MntFlags::empty()) {
            // A daemon that could not start has mounted none.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(errno) => return Err(errno).context("unmount the BPF file system"),
        }
        match fs::remove_dir_all(self.daemon.runtime_dir()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        self.boot += 1;
        fs::write(self.root.path().join("boot"), format!("boot-{}\n", self.boot))?;
        self.count(0, 0, 0)
    }

    /// The boot has the number of the one before.
    pub(crate) fn same_boot(&self) -> Result<()> {
        let before = format!("boot-{}\n", self.boot - 1);
        Ok(fs::write(self.root.path().join("boot"), before)?)
    }

    /// The daemon starts.
    pub(crate) fn on(&mut self) -> Result<()> {
        self.daemon
            .launch(&options_of(self.root.path(), self.seal, &self.more))
    }

    /// A clean stop, and a start after a reboot.
    pub(crate) fn reboot(&mut self) -> Result<()> {
        self.stop()?;
        self.off()?;
        self.on()
    }

    /// The state of the tracked disk; `None` if it is not tracked.
    pub(crate) fn status(&self) -> Result<Option<Value>> {
        let status = self.daemon.json(["status"])?;
        let devices = find(&status, "devices")
            .and_then(Value::as_array)
            .context("no list")?;
        let node = self.node();
        let found = devices.iter().find(|device| device["device"] == node.as_str());
        Ok(found.map(|device| device["cbt"].clone()))
    }

    /// The generation of the map, and why it began or is in doubt.
    pub(crate) fn generation(&self) -> Result<(String, String)> {
        let map = self.status()?.context("the disk is not tracked")?;
        let text = |name: &str| map[name].as_str().map(str::to_owned);
        let reason = text("corrupted").or_else(|| text("began")).context("no reason")?;
        Ok((text("generation_id").context("no generation")?, reason))
    }

    /// The files of the state directory with this suffix.
    pub(crate) fn files(&self, suffix: &str) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(self.daemon.state_dir())? {
            let path = entry?.path();
            if path.extension().is_some_and(|found| found == suffix) {
                files.push(path);
            }
        }
        Ok(files)
    }

    /// The only seal.
    pub(crate) fn seal(&self) -> Result<PathBuf> {
        let mut files = self.files("seal")?;
        ensure!(files.len() == 1, "{files:?}, log: {}", self.daemon.log());
        files.pop().context("no seal")
    }

    /// Makes the disk larger.
    pub(crate) fn grow(&self, bytes: u64) -> Result<()> {
        fs::File::options()
            .write(true)
            .open(self.disk.image())?
            .set_len(bytes)?;
        run("losetup", [Path::new("--set-capacity"), self.disk.path()])?;
        self.measure()
    }
}

fn options_of(root: &Path, seal: &str, more: &[OsString]) -> DaemonOptions {
    let mut arguments: Vec<OsString> = vec!["--seal".into(), seal.into()];
    for (option, name) in [("--sysfs", "sys"), ("--proc", "proc"), ("--boot-id", "boot")] {
        arguments.extend([option.into(), root.join(name).into_os_string()]);
    }
    arguments.extend(more.iter().cloned());
    DaemonOptions {
        arguments,
        ..DaemonOptions::default()
    }
}

/// The member with this name, wherever it is.
fn find<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    match value {
        Value::Object(members) => members
            .get(name)
            .or_else(|| members.values().find_map(|member| find(member, name))),
        Value::Array(members) => members.iter().find_map(|member| find(member, name)),
        _ => None,
    }
}

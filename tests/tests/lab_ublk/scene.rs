//! Scene: an agent that serves a file, and the block device that the file is.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use blksnap_agent::sys::{AlignedBuffer, ioctl};
use blksnap_tests::nbd::{Client, Framing};
use blksnap_tests::{Daemon, DaemonOptions, complain, run, unmount};
use tempfile::TempDir;

pub(crate) const MIB: u64 = 1 << 20;
/// Of the export.
pub(crate) const NAME: &str = "disk";
/// Longest wait for a device to come or go; a bound against hanging.
const PATIENCE: Duration = Duration::from_secs(60);

/// Loads the driver.
pub(crate) fn need_driver() -> Result<()> {
    let control = Path::new("/dev/ublk-control");
    if !control.exists() && run("modprobe", ["ublk_drv"]).is_err() {
        bail!("not on this kernel: it has no ublk");
    }
    let started = Instant::now();
    while !control.exists() {
        ensure!(started.elapsed() < PATIENCE, "no {}", control.display());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Whether a node goes away.
pub(crate) fn gone(node: &Path) -> bool {
    let started = Instant::now();
    while node.exists() && started.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(20));
    }
    !node.exists()
}

pub(crate) struct Scene {
    pub(crate) daemon: Daemon,
    pub(crate) file: PathBuf,
    pub(crate) size: u64,
    /// The block device, as the agent told at first. It keeps its name.
    node: PathBuf,
}

impl Scene {
    /// Serves a new file as a block device.
    pub(crate) fn new(size: u64) -> Result<Self> {
        need_driver()?;
        let daemon = Daemon::start()?;
        let file = daemon.scratch().join(NAME);
        File::create(&file)?.set_len(size)?;
        let told = daemon.run(["serve".as_ref(), file.as_os_str(), "--ublk".as_ref()])?;
        let mut scene = Self {
            daemon,
            file,
            size,
            node: PathBuf::new(),
        };
        let node = scene.node()?;
        scene.node.clone_from(&node);
        ensure!(told.lines().any(|line| line == node.to_string_lossy()), "{told}");
        let device = scene.device()?;
        ensure!(ioctl::blkgetsize64(&device)? == size);
        ensure!(ioctl::blksszget(&device)? == 512 && ioctl::blkpbszget(&device)? == 4096);
        Ok(scene)
    }

    /// The block device, as the agent tells now.
    pub(crate) fn node(&self) -> Result<PathBuf> {
        let served = self.daemon.json(["served"])?;
        let node = served["served"][0]["node"].as_str();
        Ok(node.with_context(|| format!("no node: {served}"))?.into())
    }

    /// Opened past the page cache.
    pub(crate) fn device(&self) -> Result<File> {
        open(&self.node)
    }

    pub(crate) fn take(&self) -> Result<String> {
        let args = ["snapshot".as_ref(), "create".as_ref(), self.file.as_os_str()];
        let answer = self.daemon.json(args)?;
        Ok(answer["id"].as_str().context("an id")?.to_owned())
    }

    /// All of an image, over NBD.
    pub(crate) fn image(&self, id: &str) -> Result<Vec<u8>> {
        let export = format!("{id}/{NAME}");
        let mut client = Client::connect(&self.daemon.nbd_socket(), &export, Framing::Structured, &[])?;
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < self.size {
            let at = bytes.len() as u64;
            bytes.extend(client.read(at, (4 * MIB).min(self.size - at))?);
        }
        client.disconnect()?;
        Ok(bytes)
    }

    pub(crate) fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let mut buffer = AlignedBuffer::zeroed(length);
        let part = &mut buffer.as_mut_slice()[..length];
        self.device()?.read_exact_at(part, offset)?;
        Ok(part.to_vec())
    }

    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        write(&self.device()?, offset, data).map_err(Into::into)
    }

    pub(crate) fn discard(&self, offset: u64, length: u64) -> Result<()> {
        Ok(ioctl::blkdiscard(self.device()?, offset, length)?)
    }

    pub(crate) fn zero(&self, offset: u64, length: u64) -> Result<()> {
        Ok(ioctl::blkzeroout(self.device()?, offset, length)?)
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // Whoever uses the device must come to an end, or nothing ever does.
        if self.daemon.pid().is_none()
            && let Err(error) = self.daemon.launch(&DaemonOptions::default())
        {
            complain(format_args!("{error:#}"));
        }
        let started = Instant::now();
        while let Ok(answer) = self.daemon.try_run(["unserve", NAME])
            && answer.stderr.contains("in use")
            && started.elapsed() < PATIENCE
        {
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// A file system that is unmounted when this is dropped, before the daemon is.
pub(crate) struct Mounted(pub(crate) TempDir);

impl Mounted {
    pub(crate) fn new(device: &Path, options: &str) -> Result<Self> {
        let place = tempfile::tempdir()?;
        let words = [
            "-o".as_ref(),
            options.as_ref(),
            device.as_os_str(),
            place.path().as_os_str(),
        ];
        run("mount", words)?;
        Ok(Self(place))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = unmount(self.0.path()) {
            complain(format_args!("{error:#}"));
        }
    }
}

pub(crate) fn open(node: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(node)
        .with_context(|| format!("open {}", node.display()))
}

/// Writes past the page cache, from memory that it takes.
pub(crate) fn write(device: &File, offset: u64, data: &[u8]) -> std::io::Result<()> {
    let mut buffer = AlignedBuffer::zeroed(data.len());
    let part = &mut buffer.as_mut_slice()[..data.len()];
    part.copy_from_slice(data);
    device.write_all_at(part, offset)
}

//! Loop device: a block device on a sparse file in a temporary directory.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

use crate::{complain, run, unmount};

/// Longest wait for the kernel to detach a device.
const DETACH: Duration = Duration::from_secs(10);

/// How a [`LoopDevice`] is made.
#[derive(Clone, Debug, Default)]
pub struct LoopOptions {
    /// Logical sector size in bytes; 0 for the kernel's default of 512.
    pub sector_size: u32,
    /// Partitions of a GPT, each with its start and end as `parted` takes them (`1MiB`, `100%`); none for a
    /// device without a table.
    pub partitions: Vec<(String, String)>,
    /// The file of the device does direct I/O.
    pub direct_io: bool,
}

/// Taken by whoever asks the kernel for a free device, and by whoever has freed one whose number it wants back.
const NUMBERS: &str = "/tmp/blksnap-tests-loop.lock";

/// A loop device of our own. Dropping it unmounts what [`LoopDevice::mount`] mounted, detaches the device and
/// removes its file.
#[derive(Debug)]
pub struct LoopDevice {
    node: PathBuf,
    /// While it is detached: nobody else of the tests is given its number.
    detached: Option<File>,
    mounts: Vec<PathBuf>,
    image: PathBuf,
    directory: TempDir,
}

impl LoopDevice {
    /// A device of `bytes` bytes, all holes.
    ///
    /// # Errors
    /// The file or the device can't be made.
    pub fn new(bytes: u64) -> Result<Self> {
        Self::with_options(bytes, &LoopOptions::default())
    }

    /// A device of `bytes` bytes made as `options` say.
    ///
    /// # Errors
    /// The file, the device or its partitions can't be made.
    pub fn with_options(bytes: u64, options: &LoopOptions) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("blksnap-loop-").tempdir()?;
        let image = directory.path().join("disk.img");
        std::fs::File::create(&image)
            .and_then(|file| file.set_len(bytes))
            .with_context(|| format!("make {}", image.display()))?;
        Self::over(directory, image, options)
    }

    /// A device on `backing`, a file or another block device.
    ///
    /// # Errors
    /// The device or its partitions can't be made.
    pub fn on(backing: &Path, options: &LoopOptions) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("blksnap-loop-").tempdir()?;
        Self::over(directory, backing.to_owned(), options)
    }

    fn over(directory: TempDir, image: PathBuf, options: &LoopOptions) -> Result<Self> {
        let mut arguments = vec!["--find".to_owned(), "--show".to_owned()];
        if options.sector_size != 0 {
            arguments.push(format!("--sector-size={}", options.sector_size));
        }
        if !options.partitions.is_empty() {
            arguments.push("--partscan".to_owned());
        }
        if options.direct_io {
            arguments.push("--direct-io=on".to_owned());
        }
        arguments.push(image.display().to_string());
        let numbers = lock_numbers()?;
        let node = PathBuf::from(run("losetup", &arguments)?.trim());
        drop(numbers);
        let device = Self {
            node,
            detached: None,
            mounts: Vec::new(),
            image,
            directory,
        };
        if !options.partitions.is_empty() {
            device.write_partitions(&options.partitions)?;
        }
        Ok(device)
    }

    fn write_partitions(&self, partitions: &[(String, String)]) -> Result<()> {
        let mut arguments = vec!["--script".to_owned(), self.node.display().to_string()];
        arguments.extend(["mklabel", "gpt"].map(str::to_owned));
        for (start, end) in partitions {
            arguments.extend(["mkpart".to_owned(), "part".to_owned(), start.clone(), end.clone()]);
        }
        run("parted", &arguments)?;
        // Where udev runs, it may still be working on the new nodes; devtmpfs alone makes them at once.
        let _ = Command::new("udevadm").arg("settle").status();
        Ok(())
    }

    /// The device's node, as in `/dev/loop7`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.node
    }

    /// The kernel's name, as in `loop7`.
    #[must_use]
    pub fn name(&self) -> String {
        self.node
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default()
    }

    /// The node of partition `number`, counted from 1.
    #[must_use]
    pub fn partition(&self, number: u32) -> PathBuf {
        PathBuf::from(format!("{}p{number}", self.node.display()))
    }

    /// The file that the device is made of.
    #[must_use]
    pub fn image(&self) -> PathBuf {
        self.image.clone()
    }

    /// Detaches the device. Its number is kept for [`LoopDevice::attach`], away from all other tests.
    ///
    /// # Errors
    /// It is detached already, or somebody uses it.
    pub fn detach(&mut self) -> Result<()> {
        ensure!(self.detached.is_none(), "{} is detached", self.node.display());
        let numbers = lock_numbers()?;
        run("losetup", [Path::new("--detach"), &self.node])?;
        ensure!(self.is_gone(), "{} is still open", self.node.display());
        self.detached = Some(numbers);
        Ok(())
    }

    /// Attaches `file` under the name of the device, which was detached, with more `options` of `losetup`.
    ///
    /// # Errors
    /// `losetup` fails.
    pub fn attach(&mut self, file: &Path, options: &[&str]) -> Result<()> {
        let arguments = options.iter().map(Path::new).chain([self.path(), file]);
        run("losetup", arguments)?;
        file.clone_into(&mut self.image);
        self.detached = None;
        Ok(())
    }

    /// Detaches the device and attaches a new file of the same size under the same name.
    ///
    /// # Errors
    /// Somebody uses the device.
    pub fn replace(&mut self) -> Result<()> {
        let image = self.image();
        let length = std::fs::metadata(&image)?.len();
        self.detach()?;
        std::fs::remove_file(&image)?;
        File::create(&image)?.set_len(length)?;
        self.attach(&image, &[])
    }

    /// Waits until the kernel has let go of our file: it detaches with the last close, and whoever scans devices may
    /// still have it open.
    fn is_gone(&self) -> bool {
        let backing = Path::new("/sys/class/block")
            .join(self.name())
            .join("loop/backing_file");
        let ours = self.image();
        let deadline = Instant::now() + DETACH;
        while std::fs::read_to_string(&backing).is_ok_and(|file| Path::new(file.trim()) == ours) {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }

    /// Makes a file system of `kind` (`ext4`, `xfs`, `btrfs`) on the whole device.
    ///
    /// # Errors
    /// `mkfs` is missing or fails.
    pub fn mkfs(&self, kind: &str) -> Result<()> {
        Self::mkfs_on(&self.node, kind)
    }

    /// Makes a file system of `kind` on `node`, a partition of a device.
    ///
    /// # Errors
    /// `mkfs` is missing or fails.
    pub fn mkfs_on(node: &Path, kind: &str) -> Result<()> {
        let quiet_force: &[&str] = match kind {
            "ext4" => &["-q", "-F"],
            _ => &["-q", "-f"],
        };
        let mut arguments: Vec<&std::ffi::OsStr> = quiet_force.iter().map(AsRef::as_ref).collect();
        arguments.push(node.as_os_str());
        run(&format!("mkfs.{kind}"), arguments).map(drop)
    }

    /// Mounts the whole device and gives the mount point.
    ///
    /// # Errors
    /// `mount` fails.
    pub fn mount(&mut self) -> Result<PathBuf> {
        self.mount_node(self.node.clone())
    }

    /// Mounts partition `number` and gives the mount point.
    ///
    /// # Errors
    /// `mount` fails.
    pub fn mount_partition(&mut self, number: u32) -> Result<PathBuf> {
        self.mount_node(self.partition(number))
    }

    fn mount_node(&mut self, node: PathBuf) -> Result<PathBuf> {
        let target = self.directory.path().join(format!("mount{}", self.mounts.len()));
        std::fs::create_dir(&target)?;
        run("mount", [&node, &target])?;
        self.mounts.push(target.clone());
        Ok(target)
    }

    /// Unmounts everything that was mounted here.
    ///
    /// # Errors
    /// `umount` fails: the file system is busy.
    pub fn unmount(&mut self) -> Result<()> {
        while let Some(target) = self.mounts.pop() {
            unmount(&target)?;
            std::fs::remove_dir(&target)?;
        }
        Ok(())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        for target in self.mounts.drain(..).rev() {
            if let Err(error) = unmount(&target) {
                // The writer of a test that failed may still hold it; the device goes when the writer does.
                complain(format_args!("{error:#}"));
                let _ = run("umount", [Path::new("--lazy"), &target]);
            }
        }
        if self.detached.is_some() {
            return;
        }
        if let Err(error) = run("losetup", [Path::new("--detach"), &self.node]) {
            complain(format_args!("{error:#}"));
        }
        if !self.is_gone() {
            complain(format_args!(
                "{} is still open after {DETACH:?}",
                self.node.display()
            ));
        }
    }
}

/// Waits for the right to be given a number; it ends with the file.
fn lock_numbers() -> Result<File> {
    let file = File::create(NUMBERS).with_context(|| format!("make {NUMBERS}"))?;
    file.lock().with_context(|| format!("lock {NUMBERS}"))?;
    Ok(file)
}

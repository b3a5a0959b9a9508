//! Loop device: a block device on a sparse file in a temporary directory.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
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

/// A loop device of our own. Dropping it unmounts what [`LoopDevice::mount`] mounted, detaches the device and
/// removes its file.
#[derive(Debug)]
pub struct LoopDevice {
    node: PathBuf,
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
        let node = PathBuf::from(run("losetup", &arguments)?.trim());
        let device = Self {
            node,
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

    /// Detaches the device and attaches a new file of the same size under the same name.
    ///
    /// # Errors
    /// Somebody uses the device, or took its number meanwhile.
    pub fn replace(&mut self) -> Result<()> {
        let image = self.image();
        let length = std::fs::metadata(&image)?.len();
        run("losetup", [Path::new("--detach"), &self.node])?;
        std::fs::remove_file(&image)?;
        std::fs::File::create(&image)?.set_len(length)?;
        run("losetup", [&self.node, &image]).map(drop)
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
        if let Err(error) = run("losetup", [Path::new("--detach"), &self.node]) {
            complain(format_args!("{error:#}"));
        }
        // The kernel detaches with the last close: whoever scans devices may still have it open.
        let backing = Path::new("/sys/class/block")
            .join(self.name())
            .join("loop/backing_file");
        let deadline = Instant::now() + DETACH;
        let ours = self.image();
        while std::fs::read_to_string(&backing).is_ok_and(|file| Path::new(file.trim()) == ours) {
            if Instant::now() > deadline {
                complain(format_args!(
                    "{} is still open after {DETACH:?}",
                    self.node.display()
                ));
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

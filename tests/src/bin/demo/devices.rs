//! Devices: the two disks of the demonstration, and images of them looked into.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use blksnap_tests::{Interrupt, LoopDevice, LoopOptions, complain, run};

/// A file system on a loop device.
pub(crate) struct Volume {
    /// What is tracked and snapshotted: the disk or its partition.
    pub(crate) node: PathBuf,
    /// `ext4` or `xfs`.
    pub(crate) kind: &'static str,
    /// Where it is mounted.
    pub(crate) mountpoint: PathBuf,
    _disk: LoopDevice,
}

impl Volume {
    /// An ext4 in a partition.
    pub(crate) fn ext4() -> Result<Self> {
        let options = LoopOptions {
            partitions: vec![("1MiB".to_owned(), "100%".to_owned())],
            ..LoopOptions::default()
        };
        let mut disk = LoopDevice::with_options(193 << 20, &options)?;
        let node = disk.partition(1);
        LoopDevice::mkfs_on(&node, "ext4")?;
        let mountpoint = disk.mount_partition(1)?;
        Ok(Self {
            node,
            kind: "ext4",
            mountpoint,
            _disk: disk,
        })
    }

    /// An xfs on a whole disk, of the least size that xfs has.
    pub(crate) fn xfs() -> Result<Self> {
        let mut disk = LoopDevice::new(320 << 20)?;
        disk.mkfs("xfs")?;
        let mountpoint = disk.mount()?;
        Ok(Self {
            node: disk.path().to_owned(),
            kind: "xfs",
            mountpoint,
            _disk: disk,
        })
    }

    /// The kernel's name of the node.
    pub(crate) fn name(&self) -> String {
        let name = self.node.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// Checks the file system in an image, which is changed by that, and gives what the checker said of it and
    /// the content of `file` in it.
    pub(crate) fn check(
        &self,
        interrupt: &Interrupt,
        image: &Path,
        file: &str,
    ) -> Result<(&'static str, String)> {
        match self.kind {
            "ext4" => {
                interrupt.output(Command::new("e2fsck").args(["-f", "-n"]).arg(image))?;
                let content = look_into(image, "loop,ro", file)?;
                Ok(("e2fsck -f -n: clean", content))
            }
            "xfs" => {
                // A frozen xfs keeps some counters in its log only; mounting replays it. The original has the
                // same UUID and is mounted.
                let content = look_into(image, "loop,nouuid", file)?;
                interrupt.output(Command::new("xfs_repair").args(["-f", "-n"]).arg(image))?;
                Ok(("mounts, then xfs_repair -n: clean", content))
            }
            other => bail!("no checker for {other}"),
        }
    }
}

/// Mounts an image beside its file, reads `file` and unmounts.
fn look_into(image: &Path, options: &str, file: &str) -> Result<String> {
    let mounted = Mounted::new(image, options)?;
    fs::read_to_string(mounted.0.join(file)).with_context(|| format!("read {file} in {}", image.display()))
}

/// An image that is mounted.
struct Mounted(PathBuf);

impl Mounted {
    fn new(image: &Path, options: &str) -> Result<Self> {
        let mountpoint = image.with_extension("mount");
        fs::create_dir(&mountpoint)?;
        // The loop device goes with the mount.
        run(
            "mount",
            [
                "-o".as_ref(),
                options.as_ref(),
                image.as_os_str(),
                mountpoint.as_os_str(),
            ],
        )?;
        Ok(Self(mountpoint))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = run("umount", [&self.0]) {
            complain(format_args!("{error:#}"));
        }
    }
}

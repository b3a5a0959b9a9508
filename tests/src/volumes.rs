//! Volumes: LVM in a guest of the lab, and what device-mapper shows of snapshots.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::Result;
use blksnap_agent::filter::dm::{DmError, Instants};
use blksnap_agent::sys::AlignedBuffer;

use crate::{complain, run};

/// A command of LVM, without udev, a daemon, or anything of the host's configuration.
///
/// # Errors
/// It fails.
pub fn lvm(command: &str, arguments: &[&str]) -> Result<String> {
    let configuration = "activation{udev_sync=0 udev_rules=0 monitoring=0 verify_udev_operations=1} \
                         devices{use_devicesfile=0 external_device_info_source=\"none\" obtain_device_list_from_udev=0 \
                         filter=[\"a|^/dev/loop|\",\"a|^/dev/md|\",\"a|^/dev/vd|\",\"a|^/dev/mapper|\",\"a|^/dev/dm-|\",\"r|.*|\"]} \
                         backup{backup=0 archive=0} global{use_lvmpolld=0}";
    let mut words = vec![command, "--config", configuration];
    if !matches!(command, "pvcreate" | "vgck") {
        words.push("--yes");
    }
    words.extend(arguments);
    run("lvm", words)
}

/// A volume group, removed when dropped.
#[derive(Debug)]
pub struct Group {
    /// Its name.
    pub name: String,
}

impl Group {
    /// A group of one disk.
    ///
    /// # Errors
    /// LVM refuses.
    pub fn new(name: &str, disk: &Path) -> Result<Self> {
        Self::over(name, &[disk])
    }

    /// A group of several disks.
    ///
    /// # Errors
    /// LVM refuses.
    pub fn over(name: &str, disks: &[&Path]) -> Result<Self> {
        let disks: Vec<String> = disks.iter().map(|disk| disk.display().to_string()).collect();
        let disks: Vec<&str> = disks.iter().map(String::as_str).collect();
        lvm("pvcreate", &[&["-ff", "--yes"][..], &disks].concat())?;
        lvm(
            "vgcreate",
            &[&["--physicalextentsize", "1M", name][..], &disks].concat(),
        )?;
        Ok(Self {
            name: name.to_owned(),
        })
    }

    /// A volume of `mib` MiB.
    ///
    /// # Errors
    /// LVM refuses.
    pub fn thick(&self, name: &str, mib: u64) -> Result<PathBuf> {
        self.thick_on(name, mib, &[])
    }

    /// The same on the disks given; on any without.
    ///
    /// # Errors
    /// LVM refuses.
    pub fn thick_on(&self, name: &str, mib: u64, disks: &[&str]) -> Result<PathBuf> {
        let size = format!("{mib}M");
        let words = ["-Zn", "-Wn", "-L", &size, "-n", name, &self.name];
        lvm("lvcreate", &[&words[..], disks].concat())?;
        Ok(self.volume(name))
    }

    /// A volume of `mib` MiB in a pool of its own.
    ///
    /// # Errors
    /// LVM refuses.
    pub fn thin(&self, name: &str, mib: u64) -> Result<PathBuf> {
        let pool = format!("{name}pool");
        let (size, pool_size) = (format!("{mib}M"), format!("{}M", mib * 2));
        let thin = [
            "--type",
            "thin-pool",
            "-Zn",
            "-L",
            &pool_size,
            "--poolmetadatasize",
            "4M",
        ];
        lvm("lvcreate", &[&thin[..], &["-n", &pool, &self.name]].concat())?;
        let pool = format!("{}/{pool}", self.name);
        lvm("lvcreate", &["-V", &size, "-T", &pool, "-n", name])?;
        Ok(self.volume(name))
    }

    /// Node of a volume.
    #[must_use]
    pub fn volume(&self, name: &str) -> PathBuf {
        Path::new("/dev/mapper").join(format!("{}-{name}", self.name))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Err(error) = lvm("vgremove", &["--force", &self.name]) {
            complain(format_args!("volume group {} stays: {error:#}", self.name));
        }
    }
}

/// The table of a device as `dmsetup` shows it, with its keys.
///
/// # Errors
/// There is no such device.
pub fn table(node: &Path) -> Result<String> {
    run(
        "dmsetup",
        ["table".as_ref(), "--showkeys".as_ref(), node.as_os_str()],
    )
}

/// Names of devices of snapshots that there are.
///
/// # Errors
/// Device-mapper does not answer.
pub fn ours() -> Result<Vec<String>> {
    let listed = run("dmsetup", ["info", "--columns", "--noheadings", "-o", "name"])?;
    let names = listed.lines().map(str::trim);
    Ok(names
        .filter(|name| name.starts_with("blksnap-"))
        .map(str::to_owned)
        .collect())
}

/// Writes `value` to all of `length` bytes at `offset`, past the page cache.
///
/// # Errors
/// The write fails.
pub fn fill(node: &Path, offset: u64, length: u64, value: u8) -> Result<()> {
    let file: File = File::options()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(node)?;
    let mut buffer = AlignedBuffer::zeroed(usize::try_from(length)?);
    buffer.as_mut_slice().fill(value);
    Ok(file.write_all_at(buffer.as_slice(), offset)?)
}

/// An instant at which nothing is frozen, and nothing tracked.
#[derive(Clone, Copy, Debug)]
pub struct Nothing;

impl Instants for Nothing {
    fn before(&mut self) -> Result<(), DmError> {
        Ok(())
    }

    fn at(&mut self) -> Result<(), DmError> {
        Ok(())
    }

    fn after(&mut self) -> Result<(), DmError> {
        Ok(())
    }
}

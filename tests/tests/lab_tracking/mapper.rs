//! Mapper: device-mapper tables of our own, and LVM's.

use std::path::{Path, PathBuf};

use anyhow::Result;
use blksnap_tests::{complain, lab, run};

use crate::{disks, every_operation, nodes};

/// Sectors in a MiB.
const SECTORS: u64 = 2048;

/// A device-mapper device, removed when dropped.
struct Mapped {
    name: String,
}

impl Mapped {
    fn new(name: &str, table: &str) -> Result<Self> {
        run("dmsetup", ["create", name, "--table", table])?;
        Ok(Self {
            name: name.to_owned(),
        })
    }

    fn path(&self) -> PathBuf {
        Path::new("/dev/mapper").join(&self.name)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if let Err(error) = run("dmsetup", ["remove", "--retry", &self.name]) {
            complain(format_args!("{} stays: {error:#}", self.name));
        }
    }
}

#[test]
#[ignore = "needs device-mapper: cargo xtask test --vm 6.12"]
fn dm_linear() -> Result<()> {
    lab::target("linear", "dm_mod")?;
    let disks = disks(2, 16)?;
    let (first, second) = (disks[0].path().display(), disks[1].path().display());
    // The second half of one, then the first half of another: places differ on every level. The border is within the
    // longest range that is written.
    let table = format!(
        "0 {length} linear {first} 8192\n{length} {length} linear {second} 0",
        length = 5 * SECTORS
    );
    let mapped = Mapped::new("lab_linear", &table)?;
    every_operation(&mapped.path(), &nodes(&disks))
}

#[test]
#[ignore = "needs device-mapper: cargo xtask test --vm 6.12"]
fn dm_crypt() -> Result<()> {
    lab::target("crypt", "dm_crypt")?;
    let disks = disks(1, 16)?;
    let key = "000102030405060708090a0b0c0d0e0f".repeat(4);
    let table = format!(
        "0 {} crypt aes-xts-plain64 {key} 0 {} 2048 1 allow_discards",
        14 * SECTORS,
        disks[0].path().display()
    );
    let mapped = Mapped::new("lab_crypt", &table)?;
    every_operation(&mapped.path(), &nodes(&disks))
}

/// A volume group of one physical volume, removed when dropped.
struct Group {
    name: &'static str,
}

/// LVM without udev, a daemon, or anything of the host's configuration.
fn lvm(command: &str, arguments: &[&str]) -> Result<String> {
    let configuration = "activation{udev_sync=0 udev_rules=0 monitoring=0 verify_udev_operations=1} \
                         devices{use_devicesfile=0 external_device_info_source=\"none\" obtain_device_list_from_udev=0 \
                         filter=[\"a|^/dev/loop|\",\"r|.*|\"]} backup{backup=0 archive=0} global{use_lvmpolld=0}";
    let mut words = vec![command, "--config", configuration];
    if command != "pvcreate" {
        words.push("--yes");
    }
    words.extend(arguments);
    run("lvm", words)
}

impl Group {
    fn new(name: &'static str, disk: &Path) -> Result<Self> {
        let disk = disk.to_string_lossy();
        lvm("pvcreate", &["-ff", "--yes", &disk])?;
        lvm("vgcreate", &["--physicalextentsize", "1M", name, &disk])?;
        Ok(Self { name })
    }

    fn volume(&self, name: &str) -> PathBuf {
        Path::new("/dev/mapper").join(format!("{}-{name}", self.name))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Err(error) = lvm("vgremove", &["--force", self.name]) {
            complain(format_args!("volume group {} stays: {error:#}", self.name));
        }
    }
}

#[test]
#[ignore = "needs device-mapper: cargo xtask test --vm 6.12"]
fn lvm_thick() -> Result<()> {
    lab::target("linear", "dm_mod")?;
    let disks = disks(1, 40)?;
    let group = Group::new("labthick", disks[0].path())?;
    lvm(
        "lvcreate",
        &["-Zn", "-Wn", "-L", "12M", "-n", "volume", group.name],
    )?;
    every_operation(&group.volume("volume"), &nodes(&disks))
}

#[test]
#[ignore = "needs device-mapper: cargo xtask test --vm 6.12"]
fn lvm_thick_with_snapshot() -> Result<()> {
    lab::target("snapshot", "dm_snapshot")?;
    let disks = disks(1, 48)?;
    let group = Group::new("labsnap", disks[0].path())?;
    lvm(
        "lvcreate",
        &["-Zn", "-Wn", "-L", "12M", "-n", "volume", group.name],
    )?;
    // What is written to the volume is copied to the snapshot's storage first: more changes below than above.
    let volume = format!("{}/volume", group.name);
    lvm("lvcreate", &["-s", "-c", "4k", "-L", "24M", "-n", "old", &volume])?;
    every_operation(&group.volume("volume"), &nodes(&disks))
}

#[test]
#[ignore = "needs device-mapper: cargo xtask test --vm 6.12"]
fn lvm_thin() -> Result<()> {
    lab::target("thin-pool", "dm_thin_pool")?;
    let disks = disks(1, 56)?;
    let group = Group::new("labthin", disks[0].path())?;
    let thin = [
        "--type",
        "thin-pool",
        "-Zn",
        "-L",
        "32M",
        "--poolmetadatasize",
        "4M",
    ];
    lvm("lvcreate", &[&thin[..], &["-n", "pool", group.name]].concat())?;
    let pool = format!("{}/pool", group.name);
    lvm("lvcreate", &["-V", "16M", "-T", &pool, "-n", "volume"])?;
    every_operation(&group.volume("volume"), &nodes(&disks))
}

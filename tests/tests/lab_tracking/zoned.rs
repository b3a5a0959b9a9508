//! Zoned: a disk whose zones are written in order, appended to, finished and reset.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use blksnap_agent::disk::BlockDevice;
use blksnap_common::track::OpKind;
use blksnap_tests::path::{ALL, Seen};
use blksnap_tests::{complain, lab, run, unmount};

use crate::{KIB, MIB, subject};

/// Bytes in a zone.
const ZONE: u64 = 4 * MIB;

/// A zoned null_blk disk that keeps what is written, removed when dropped.
struct Zoned {
    folder: PathBuf,
    node: PathBuf,
}

impl Zoned {
    fn new(name: &str, mib: u64) -> Result<Self> {
        lab::inside()?;
        lab::load("null_blk", &["nr_devices=0"]);
        let top = Path::new("/sys/kernel/config/nullb");
        if !top.exists() {
            return lab::absent("null_blk");
        }
        let features = fs::read_to_string(top.join("features")).unwrap_or_default();
        if !features.contains("zoned") {
            return lab::absent("null_blk with zones");
        }
        let folder = top.join(name);
        fs::create_dir(&folder).with_context(|| format!("create {}", folder.display()))?;
        let mut disk = Self {
            folder,
            node: PathBuf::new(),
        };
        let settings = [
            ("size", mib),
            ("memory_backed", 1),
            ("zoned", 1),
            ("zone_size", ZONE / MIB),
            ("power", 1),
        ];
        for (setting, value) in settings {
            let path = disk.folder.join(setting);
            fs::write(&path, format!("{value}\n")).with_context(|| format!("write {}", path.display()))?;
        }
        let index = fs::read_to_string(disk.folder.join("index"))?;
        // Newer kernels name the disk as its folder.
        disk.node = [
            PathBuf::from("/dev").join(name),
            PathBuf::from(format!("/dev/nullb{}", index.trim())),
        ]
        .into_iter()
        .find(|node| node.exists())
        .context("the disk has no node")?;
        Ok(disk)
    }

    fn zone(&self, what: &str, number: u64) -> Result<()> {
        let offset = (number * ZONE / 512).to_string();
        let node = self.node.display().to_string();
        run("blkzone", [what, "--offset", &offset, "--count", "1", &node]).map(drop)
    }
}

impl Drop for Zoned {
    fn drop(&mut self) {
        let removed = fs::write(self.folder.join("power"), "0\n").and_then(|()| fs::remove_dir(&self.folder));
        if let Err(error) = removed {
            complain(format_args!("{} stays: {error}", self.folder.display()));
        }
    }
}

fn counted(seen: &Seen, kind: OpKind) -> u64 {
    seen.operations[usize::from(kind.code())]
}

#[test]
#[ignore = "needs null_blk: cargo xtask test --vm 6.12"]
fn zones_are_written_finished_and_reset() -> Result<()> {
    let disk = Zoned::new("labzoned", 64)?;
    let device = BlockDevice::open(&disk.node)?;
    let mut subject = subject(&[&disk.node])?;
    let direct = &ALL[1];
    // In order, as a zone wants it.
    let (_, seen) = subject.observe(|| {
        (direct.run)(&disk.node, ZONE, 64 * KIB)?;
        (direct.run)(&disk.node, ZONE + 64 * KIB, 8 * KIB)?;
        (direct.run)(&disk.node, 3 * ZONE, ZONE)
    })?;
    seen[0].check(false, &device, ZONE, 72 * KIB)?;
    seen[0].check(false, &device, 3 * ZONE, ZONE)?;
    ensure!(
        seen[0].changed.len() as u64 == (72 * KIB + ZONE) / 512,
        "not all was written"
    );
    // A finished zone takes no more: what is behind the last write may read otherwise now.
    let (_, seen) = subject.observe(|| disk.zone("finish", 1))?;
    seen[0].check(true, &device, ZONE, ZONE)?;
    ensure!(counted(&seen[0], OpKind::Zone) > 0, "{:?}", seen[0].operations);
    // What is reset is gone.
    let (_, seen) = subject.observe(|| disk.zone("reset", 3))?;
    seen[0].check(false, &device, 3 * ZONE, ZONE)?;
    ensure!(
        seen[0].changed.len() as u64 == ZONE / 512,
        "the reset changed nothing"
    );
    let (_, seen) = subject.observe(|| run("blkzone", ["reset".as_ref(), disk.node.as_os_str()]))?;
    seen[0].check(true, &device, 0, 64 * MIB)?;
    Ok(())
}

#[test]
#[ignore = "needs null_blk and btrfs: cargo xtask test --vm 6.12"]
fn zones_are_appended_to() -> Result<()> {
    // btrfs writes data of a zoned disk by appends.
    let disk = Zoned::new("labappend", 256)?;
    lab::load("btrfs", &[]);
    let features = fs::read_to_string("/sys/fs/btrfs/features/zoned").unwrap_or_default();
    if features.is_empty() {
        return lab::absent("btrfs on zoned disks");
    }
    let mut subject = subject(&[&disk.node])?;
    let folder = tempfile::tempdir()?;
    let node = disk.node.as_os_str();
    let (_, seen) = subject.observe(|| {
        let made = ["-q", "-f", "-O", "zoned", "-d", "single", "-m", "single"].map(std::ffi::OsStr::new);
        run("mkfs.btrfs", made.into_iter().chain([node]))?;
        run(
            "mount",
            ["-t".as_ref(), "btrfs".as_ref(), node, folder.path().as_os_str()],
        )?;
        let written = (0..20_u8).try_for_each(|number| {
            let bytes = vec![number | 1; 256 * 1024];
            fs::write(folder.path().join(number.to_string()), bytes)
        });
        unmount(folder.path())?;
        Ok(written?)
    })?;
    ensure!(
        seen[0].changed.len() as u64 > 5 * MIB / 512,
        "less than the files changed"
    );
    println!("operations by kind: {:?}", seen[0].operations);
    Ok(())
}

//! Disks: the guest's partitions of the benchmark, and a dm-snapshot over one of them.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use blksnap_agent::sys::AlignedBuffer;
use blksnap_tests::{lab, run};
use rand::rngs::StdRng;
use rand::{RngCore as _, SeedableRng as _};

/// Bytes of the origin.
pub(crate) const SIZE: u64 = 256 << 20;

/// Where a partition begins, and how large those for old data are.
const MIB: u64 = 1 << 20;
const STORAGE: u64 = 384 << 20;

const SECTOR: u64 = 512;

/// The origin on one disk, two places for old data on the other.
pub(crate) struct Disks {
    origin: PathBuf,
    dm: PathBuf,
    ours: PathBuf,
}

impl Disks {
    pub(crate) fn new() -> Result<Self> {
        let (first, second) = (lab::virtio(0)?, lab::virtio(1)?);
        let disks = Self {
            origin: lab::partition(&first, 1, MIB, SIZE)?,
            dm: lab::partition(&second, 1, MIB, STORAGE)?,
            ours: lab::partition(&second, 2, MIB + STORAGE, STORAGE)?,
        };
        // A scratch disk is a sparse file: nobody is to have the first writes to it.
        for (node, size) in [
            (&disks.origin, SIZE),
            (&disks.dm, STORAGE),
            (&disks.ours, STORAGE),
        ] {
            fill(node, size)?;
        }
        Ok(disks)
    }

    pub(crate) fn origin(&self) -> &Path {
        &self.origin
    }

    /// Where we keep old data.
    pub(crate) fn storage(&self) -> &Path {
        &self.ours
    }
}

fn fill(node: &Path, size: u64) -> Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(node)?;
    let mut buffer = AlignedBuffer::zeroed(4 << 20);
    StdRng::seed_from_u64(size).fill_bytes(buffer.as_mut_slice());
    for offset in (0..size).step_by(buffer.len()) {
        file.write_all_at(buffer.as_slice(), offset)?;
    }
    file.sync_all()?;
    Ok(())
}

/// The names of the kernel's devices.
const NAMES: [&str; 2] = ["blksnap-bench-snapshot", "blksnap-bench-origin"];

/// A persistent dm-snapshot, as LVM makes it. Dropping it removes it.
pub(crate) struct Snapshot {
    origin: PathBuf,
}

impl Snapshot {
    /// Of the origin, with chunks of `chunk` bytes.
    pub(crate) fn new(disks: &Disks, chunk: u64) -> Result<Self> {
        lab::target("snapshot", "dm_snapshot")?;
        // What says that it is a new one is in the first chunk.
        let header = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(&disks.dm)?;
        header.write_all_at(AlignedBuffer::zeroed(1 << 20).as_slice(), 0)?;
        drop(header);
        let (origin, sectors) = (disks.origin.display(), SIZE / SECTOR);
        let made = Self {
            origin: Path::new("/dev/mapper").join(NAMES[1]),
        };
        let table = format!(
            "0 {sectors} snapshot {origin} {} P {}",
            disks.dm.display(),
            chunk / SECTOR
        );
        run("dmsetup", ["create", NAMES[0], "--table", &table])?;
        let table = format!("0 {sectors} snapshot-origin {origin}");
        run("dmsetup", ["create", NAMES[1], "--table", &table])?;
        ensure!(
            made.origin.exists(),
            "device-mapper made no node {}",
            made.origin.display()
        );
        Ok(made)
    }

    /// The device that is written to.
    pub(crate) fn origin(&self) -> &Path {
        &self.origin
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        for name in NAMES.iter().rev() {
            if let Err(error) = run("dmsetup", ["remove", name]) {
                blksnap_tests::complain(format_args!("removing {name} failed: {error:#}"));
            }
        }
    }
}

//! In use: devices that are written while they are copied.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use blksnap_agent::filter::converge::Consistency;
use blksnap_tests::{LoopDevice, LoopOptions, seed};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::writer::Writer;
use crate::{Bench, MIB, kind, same};

fn file_system(fs_type: &str, length: u64) -> Result<()> {
    let seed = seed(&format!("backup of {fs_type}"));
    let mut disk = LoopDevice::new(length)?;
    disk.mkfs(fs_type)?;
    let mount = disk.mount()?;
    let bench = Bench::new(disk.path())?;
    fs::write(mount.join("first"), vec![1; 5 << 20])?;
    let writer = Writer::start(mount.join("busy"), 8 * MIB, seed, Duration::from_millis(1));

    let report = bench.backup(true)?;
    ensure!(kind(&report) == "no_target", "{report:?}");
    ensure!(report.consistency == Consistency::FileSystem, "{report:?}");
    ensure!(
        report.bytes_total == length && report.bytes_copied >= length,
        "{report:?}"
    );
    same(&bench.target(), &bench.copy())?;
    let on_disk = fs::metadata(bench.target())?.blocks() * 512;
    ensure!(on_disk < length / 2, "the target has no holes: {on_disk} bytes");

    for round in 0..5 {
        fs::write(mount.join(format!("new{round}")), vec![round; 1 << 20])?;
        if round == 3 {
            fs::remove_file(mount.join("first"))?;
        }
        let report = bench.backup(true)?;
        ensure!(kind(&report) == "incremental", "round {round}: {report:?}");
        ensure!(report.bytes_copied < length / 2, "round {round}: {report:?}");
        same(&bench.target(), &bench.copy()).with_context(|| format!("round {round}: {report:?}"))?;
    }
    writer.stop()
}

#[test]
fn ext4_in_use() -> Result<()> {
    file_system("ext4", 128 * MIB)
}

#[test]
fn xfs_in_use() -> Result<()> {
    file_system("xfs", 320 * MIB)
}

#[test]
fn btrfs_in_use() -> Result<()> {
    file_system("btrfs", 256 * MIB)
}

#[test]
fn a_raw_partition_in_use() -> Result<()> {
    let seed = seed("backup of a raw partition");
    let options = LoopOptions {
        partitions: vec![
            ("1MiB".to_owned(), "9MiB".to_owned()),
            ("9MiB".to_owned(), "41MiB".to_owned()),
        ],
        ..LoopOptions::default()
    };
    let disk = LoopDevice::with_options(64 * MIB, &options)?;
    let node = disk.partition(2);
    let bench = Bench::new(&node)?;
    let mut random = StdRng::seed_from_u64(seed);
    let file = OpenOptions::new().write(true).open(&node)?;
    for round in 0..6 {
        for _ in 0..random.random_range(1..40) {
            let mut data = vec![0; 512 * random.random_range(1..=256)];
            random.fill(&mut data[..]);
            let place = random.random_range(0..32 * MIB - data.len() as u64) / 512 * 512;
            file.write_all_at(&data, place)?;
        }
        // Not synced: the backup does that.
        let report = bench.backup(true)?;
        ensure!(report.consistency == Consistency::Crash, "{report:?}");
        ensure!((kind(&report) == "incremental") == (round > 0), "{report:?}");
        same(&bench.target(), &bench.copy()).with_context(|| format!("round {round}: {report:?}"))?;
    }
    Ok(())
}

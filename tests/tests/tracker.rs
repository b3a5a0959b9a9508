//! Tracker: the programs on this kernel, against loop devices.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do, by a panic")]

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, ensure};
use blksnap_agent::cbt::{CbtMap, TrackingParams};
use blksnap_agent::disk::BlockDevice;
use blksnap_agent::tracker::{Granularity, TrackedDevice, Tracker, TrackerConfig, TrackerError};
use blksnap_agent::units::BlockSize;
use blksnap_tests::LoopDevice;

const MIB: u64 = 1 << 20;

fn fixed(bytes: u64) -> Granularity {
    Granularity::Fixed(BlockSize::from_bytes(bytes).unwrap())
}

fn attach(tracker: &Tracker, path: &Path, granularity: Granularity) -> Result<Arc<TrackedDevice>> {
    Ok(tracker.attach(BlockDevice::open(path)?, granularity)?)
}

/// Writes `length` bytes past the page cache; offset and length are multiples of 4096.
fn write_direct(path: &Path, offset: u64, length: usize) -> Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)?;
    let mut memory = vec![0xa5_u8; length + 4096];
    let start = memory.as_ptr().align_offset(4096);
    file.write_all_at(&memory[start..start + length], offset)?;
    memory.clear();
    Ok(())
}

fn dirty(device: &TrackedDevice) -> Result<Vec<(u64, u64)>> {
    let dirty = device.close_period()?;
    Ok(dirty
        .extents(device.block_size(), device.device().capacity)
        .map(|extent| (extent.offset, extent.length))
        .collect())
}

#[test]
fn a_write_shows_in_its_period_and_no_other() -> Result<()> {
    let tracker = Tracker::load(&TrackerConfig::default())?;
    let disk = LoopDevice::new(64 * MIB)?;
    let device = attach(&tracker, disk.path(), fixed(65536))?;
    ensure!(dirty(&device)?.is_empty());
    write_direct(disk.path(), 65536 * 3, 4096)?;
    write_direct(disk.path(), 65536 * 5 - 4096, 8192)?;
    ensure!(dirty(&device)? == [(65536 * 3, 65536 * 3)]);
    ensure!(dirty(&device)?.is_empty());
    write_direct(disk.path(), 10 * MIB, 8 << 20)?;
    ensure!(dirty(&device)? == [(10 * MIB, 8 * MIB)]);
    let counters = device.counters()?;
    ensure!(counters.bytes[0] == 4096 + 8192 + 8 * MIB, "{counters:?}");
    ensure!(
        counters.ring_full == 0 && counters.run_misses == 0,
        "{counters:?}"
    );
    Ok(())
}

#[test]
fn a_discard_of_the_whole_device_marks_every_block() -> Result<()> {
    let tracker = Tracker::load(&TrackerConfig::default())?;
    let disk = LoopDevice::new(256 * MIB)?;
    let device = attach(&tracker, disk.path(), fixed(4096))?;
    let status = std::process::Command::new("blkdiscard")
        .arg(disk.path())
        .status()?;
    ensure!(status.success());
    ensure!(dirty(&device)? == [(0, 256 * MIB)]);
    let counters = device.counters()?;
    ensure!(
        counters.ops[1] >= 1 && counters.bytes[1] == 256 * MIB,
        "{counters:?}"
    );
    Ok(())
}

#[test]
fn the_ledger_marks_again_at_completion_and_ends_empty() -> Result<()> {
    let tracker = Tracker::load(&TrackerConfig::default())?;
    let disk = LoopDevice::new(64 * MIB)?;
    let device = attach(&tracker, disk.path(), fixed(65536))?;
    device.start_ledger()?;
    device.start_ledger()?;
    for i in 0..50 {
        write_direct(disk.path(), i * MIB, 4096)?;
        OpenOptions::new().write(true).open(disk.path())?.sync_all()?;
    }
    let status = device.ledger_status()?;
    ensure!(status.pending == 0 && status.lost == 0, "{status:?}");
    ensure!(status.unknown <= 1, "{status:?}");
    ensure!(dirty(&device)?.len() == 50);
    device.stop_ledger()?;
    write_direct(disk.path(), 0, 4096)?;
    device.stop_ledger()?;
    write_direct(disk.path(), 0, 4096)?;
    ensure!(device.ledger_status()?.pending == 0);
    ensure!(device.with_map(CbtMap::corrupted).is_none());
    Ok(())
}

#[test]
fn attach_twice_and_detach_of_nothing_are_errors() -> Result<()> {
    let tracker = Tracker::load(&TrackerConfig::default())?;
    let disk = LoopDevice::new(16 * MIB)?;
    let device = attach(
        &tracker,
        disk.path(),
        Granularity::Adaptive(TrackingParams::default()),
    )?;
    let again = tracker.attach(BlockDevice::open(disk.path())?, fixed(4096));
    ensure!(matches!(again, Err(TrackerError::Already(_))), "{again:?}");
    tracker.detach(device.device().id)?;
    let error = tracker.detach(device.device().id);
    ensure!(matches!(error, Err(TrackerError::NotAttached(_))));
    ensure!(matches!(device.close_period(), Err(TrackerError::NotAttached(_))));
    attach(&tracker, disk.path(), fixed(4096))?;
    Ok(())
}

#[test]
fn a_ring_of_a_wrong_size_is_refused() {
    for ring_bytes in [0, 1, 1000, 2048, 4097, 12288] {
        let config = TrackerConfig {
            ring_bytes,
            ..TrackerConfig::default()
        };
        assert!(matches!(Tracker::load(&config), Err(TrackerError::RingSize(_))));
    }
}

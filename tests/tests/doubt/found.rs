//! Found: what becomes of a device, against a tracker that looks only when it is asked.

use std::fs::OpenOptions;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use blksnap_agent::cbt::ResetReason;
use blksnap_agent::disk::BlockDevice;
use blksnap_agent::tracker::{Granularity, TrackedDevice, Tracker, TrackerConfig, TrackerError};
use blksnap_agent::units::BlockSize;
use blksnap_tests::{LoopDevice, LoopOptions, Zram, run, write_block};

const MIB: u64 = 1 << 20;

/// Longer than any test: who looks is the test alone.
const NEVER: Duration = Duration::from_secs(86_400);

fn tracker() -> Result<Arc<Tracker>> {
    Ok(Tracker::load(&TrackerConfig {
        doubt_interval: NEVER,
        self_test_interval: NEVER,
        ..TrackerConfig::default()
    })?)
}

fn attach(tracker: &Tracker, node: &Path) -> Result<Arc<TrackedDevice>> {
    let granularity = Granularity::Fixed(BlockSize::from_bytes(4096)?);
    Ok(tracker.attach(BlockDevice::open(node)?, granularity)?)
}

/// The device is another one: that is said, no take is made, and it is tracked again only when it is attached again.
fn is_lost(tracker: &Tracker, device: &Arc<TrackedDevice>, node: &Path, reason: ResetReason) -> Result<()> {
    ensure!(device.check_doubt() == Some(reason), "{:?}", device.check_doubt());
    ensure!(device.lost() == Some(reason));
    ensure!(device.counters()?.doubts == [(reason, 1)].into());
    let take = device.take();
    ensure!(
        matches!(&take, Err(TrackerError::Lost { reason: said, .. }) if *said == reason),
        "{take:?}"
    );
    let id = device.device().id;
    ensure!(matches!(
        tracker.device_for_take(id),
        Err(TrackerError::Lost { .. })
    ));
    // Looking again does not make it better, nor tell it again.
    ensure!(device.check_doubt() == Some(reason));
    ensure!(device.counters()?.doubts == [(reason, 1)].into());
    let again = attach(tracker, node)?;
    ensure!(again.with_map(|map| map.info().began) == reason);
    ensure!(again.check_doubt().is_none() && again.lost().is_none());
    write_block(node, 0)?;
    ensure!(again.close_period()?.count() == 1);
    ensure!(again.take()?.0.reset.is_none());
    Ok(())
}

#[test]
fn another_file_behind_a_loop_device() -> Result<()> {
    let tracker = tracker()?;
    let mut disk = LoopDevice::new(16 * MIB)?;
    let device = attach(&tracker, disk.path())?;
    disk.replace()?;
    is_lost(&tracker, &device, disk.path(), ResetReason::MediumChanged)
}

#[test]
fn other_bytes_of_the_same_file() -> Result<()> {
    let tracker = tracker()?;
    let mut disk = LoopDevice::new(16 * MIB)?;
    let other = disk.image().with_file_name("other.img");
    std::fs::File::create(&other)?.set_len(32 * MIB)?;
    // With an offset from the start, and with another one under the same name: the numbers of the kernel alone
    // would tell it here, and so the directory in sysfs is made up in the unit tests.
    let device = attach(&tracker, disk.path())?;
    disk.detach()?;
    disk.attach(&other, &["--offset=4096", "--sizelimit=16777216"])?;
    is_lost(&tracker, &device, disk.path(), ResetReason::MediumChanged)
}

#[test]
fn a_zram_disk_that_was_reset() -> Result<()> {
    let tracker = tracker()?;
    let disk = Zram::new(16 * MIB)?;
    let node = disk.path();
    let device = attach(&tracker, &node)?;
    for block in 0..10 {
        write_block(&node, block * 4096)?;
    }
    ensure!(device.check_doubt().is_none());
    // The kernel gives it neither another number nor another sequence number.
    disk.reset(16 * MIB)?;
    is_lost(&tracker, &device, &node, ResetReason::MediumChanged)
}

#[test]
fn a_zram_disk_without_a_size() -> Result<()> {
    let tracker = tracker()?;
    let disk = Zram::new(16 * MIB)?;
    let node = disk.path();
    let device = attach(&tracker, &node)?;
    std::fs::write(
        format!(
            "/sys/block/{}/reset",
            node.file_name().context("a name")?.to_string_lossy()
        ),
        "1\n",
    )?;
    ensure!(device.check_doubt() == Some(ResetReason::DeviceGone));
    disk.reset(16 * MIB)?;
    is_lost(&tracker, &device, &node, ResetReason::DeviceGone)
}

#[test]
fn another_disk_under_the_same_name() -> Result<()> {
    let tracker = tracker()?;
    let mut disk = Zram::new(16 * MIB)?;
    // Others make and remove zram disks, too.
    for _ in 0..20 {
        let node = disk.path();
        let device = attach(&tracker, &node)?;
        if disk.replace(16 * MIB)? {
            return is_lost(&tracker, &device, &node, ResetReason::DeviceReplaced);
        }
        ensure!(device.check_doubt().is_some());
        tracker.detach(device.device().id)?;
    }
    anyhow::bail!("the number was never given out again");
}

#[test]
fn another_partition_under_the_same_name() -> Result<()> {
    let tracker = tracker()?;
    let options = LoopOptions {
        partitions: vec![("1MiB".to_owned(), "9MiB".to_owned())],
        ..LoopOptions::default()
    };
    let disk = LoopDevice::with_options(32 * MIB, &options)?;
    let node = disk.partition(1);
    let device = attach(&tracker, &node)?;
    run(
        "parted",
        [
            "--script",
            &disk.path().display().to_string(),
            "rm",
            "1",
            "mkpart",
            "part",
            "2MiB",
            "10MiB",
        ],
    )?;
    // It may have got another number, too.
    let reason = device.check_doubt().context("it is another one")?;
    ensure!([ResetReason::DeviceReplaced, ResetReason::DeviceGone].contains(&reason));
    is_lost(&tracker, &device, &node, reason)?;
    ensure!(tracker.devices().len() == 1);
    Ok(())
}

#[test]
fn a_device_that_shrank_begins_anew_at_the_next_take() -> Result<()> {
    let tracker = tracker()?;
    let disk = LoopDevice::new(16 * MIB)?;
    let device = attach(&tracker, disk.path())?;
    OpenOptions::new()
        .write(true)
        .open(disk.image())?
        .set_len(8 * MIB)?;
    run("losetup", [Path::new("--set-capacity"), disk.path()])?;
    // Nobody looked, and it is found all the same.
    let take = device.take();
    ensure!(
        matches!(
            take,
            Err(TrackerError::Lost {
                reason: ResetReason::Resized,
                ..
            })
        ),
        "{take:?}"
    );
    let again = tracker.device_for_take(device.device().id)?;
    ensure!(again.device().capacity.bytes() == 8 * MIB);
    ensure!(again.with_map(|map| map.info().began) == ResetReason::Resized);
    ensure!(again.take()?.0.reset.is_none());
    Ok(())
}

#[test]
fn numbers_that_ran_out() -> Result<()> {
    let tracker = tracker()?;
    let disk = LoopDevice::new(16 * MIB)?;
    let device = attach(&tracker, disk.path())?;
    let generation = device.with_map(|map| map.info().generation);
    let mut last = None;
    for number in 1..=254 {
        write_block(disk.path(), u64::from(number) * 4096)?;
        device.close_period()?;
        let (taken, map) = device.take()?;
        ensure!(taken.number == number && taken.reset.is_none(), "{taken:?}");
        last = map;
    }
    let old = last.context("a map")?;
    write_block(disk.path(), 0)?;
    device.close_period()?;
    let (taken, map) = device.take()?;
    ensure!(
        taken.reset == Some(ResetReason::Wrapped) && taken.number == 1,
        "{taken:?}"
    );
    ensure!(taken.generation != generation);
    // The read map is of the new generation: nothing of the old one is left in it.
    let map = map.context("a map")?;
    ensure!(map.blocks().iter().all(|byte| byte <= 1));
    let full = map.changed_since(&old.base());
    ensure!(full.is_err_and(|full| full.reason.code() == "wrapped"));
    // No doubt: what is of the old generation is still right.
    ensure!(old.doubt().is_none() && device.counters()?.doubts.is_empty());
    ensure!(device.counters()?.resets.get(&ResetReason::Wrapped) == Some(&1));
    Ok(())
}

#[test]
fn a_detach_is_a_request() -> Result<()> {
    let tracker = tracker()?;
    let disk = LoopDevice::new(16 * MIB)?;
    let device = attach(&tracker, disk.path())?;
    let (_, map) = device.take()?;
    tracker.detach(device.device().id)?;
    ensure!(map.context("a map")?.doubt() == Some(ResetReason::Requested));
    ensure!(device.check_doubt() == Some(ResetReason::Requested));
    ensure!(device.take().is_err());
    Ok(())
}

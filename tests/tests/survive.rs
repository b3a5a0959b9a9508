//! Survive: tracking goes on without an agent, and the next one knows all of it.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use blksnap_agent::cbt::{Base, Blocks, CbtMap, ResetReason};
use blksnap_agent::disk::BlockDevice;
use blksnap_agent::statefile::{Format, write_sections};
use blksnap_agent::tracker::{
    Granularity, KeepConfig, PinError, TrackedDevice, Tracker, TrackerConfig, TrackerError, purge,
};
use blksnap_agent::units::{BlockSize, Sectors};
use blksnap_common::track::ABI_VERSION;
use blksnap_tests::{Daemon, DaemonOptions, LoopDevice, run};
use nix::mount::{MntFlags, umount2};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 65536;
/// Longest wait for what happens soon. A bound against hanging for ever, not a measurement.
const PATIENCE: Duration = Duration::from_secs(60);

/// A BPF file system and a directory of documents of a test's own.
struct Place {
    directory: TempDir,
}

impl Place {
    fn new() -> Result<Self> {
        Ok(Self {
            directory: tempfile::Builder::new().prefix("blksnap-survive-").tempdir()?,
        })
    }

    fn bpffs(&self) -> PathBuf {
        self.directory.path().join("bpf")
    }

    fn documents(&self) -> PathBuf {
        self.directory.path().join("devices")
    }

    fn config(&self) -> TrackerConfig {
        TrackerConfig {
            keep: Some(KeepConfig {
                bpffs: self.bpffs(),
                documents: self.documents(),
            }),
            ..TrackerConfig::default()
        }
    }

    /// All files under the pins.
    fn pins(&self) -> Vec<PathBuf> {
        fn walk(path: &Path, found: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(path).into_iter().flatten().flatten() {
                found.push(entry.path());
                walk(&entry.path(), found);
            }
        }
        let mut found = Vec::new();
        let root = self.bpffs().join("blksnap");
        if root.exists() {
            walk(&root, &mut found);
            found.push(root);
        }
        found.sort();
        found
    }

    /// The document of the only device.
    fn document(&self) -> Result<PathBuf> {
        let first = fs::read_dir(self.documents())?.next().context("no document")?;
        Ok(first?.path())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Not there when the test failed before.
        let _ = umount2(&self.bpffs(), MntFlags::MNT_DETACH);
    }
}

fn write_direct(path: &Path, offset: u64, length: usize) -> Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)?;
    let memory = vec![0xa5_u8; length + 4096];
    let start = memory.as_ptr().align_offset(4096);
    Ok(file.write_all_at(&memory[start..start + length], offset)?)
}

fn attach(tracker: &Tracker, path: &Path) -> Result<Arc<TrackedDevice>> {
    let size = Granularity::Fixed(BlockSize::from_bytes(BLOCK)?);
    Ok(tracker.attach(BlockDevice::open(path)?, size)?)
}

fn only(tracker: &Tracker) -> Result<Arc<TrackedDevice>> {
    let devices = tracker.devices();
    ensure!(
        devices.len() == 1,
        "{} devices, lost: {:?}",
        devices.len(),
        tracker.lost()
    );
    Ok(Arc::clone(&devices[0]))
}

/// Ends the period and keeps that; gives the base.
fn take(device: &TrackedDevice) -> Result<Base> {
    device.close_period()?;
    let (taken, _) = device.take()?;
    device.save()?;
    Ok(Base {
        generation: taken.generation,
        number: taken.number,
    })
}

/// Blocks changed since `base`, as of now.
fn changed(device: &TrackedDevice, base: &Base) -> Result<Vec<u64>> {
    device.close_period()?;
    let map = device.with_map(CbtMap::live_map)?;
    Ok(map
        .changed_since(base)?
        .flat_map(|extent| extent.offset / BLOCK..extent.end().div_ceil(BLOCK))
        .collect())
}

#[test]
fn what_is_written_before_between_and_after_is_known() -> Result<()> {
    let place = Place::new()?;
    let disk = LoopDevice::new(64 * MIB)?;
    let tracker = Tracker::load(&place.config())?;
    let device = attach(&tracker, disk.path())?;
    write_direct(disk.path(), 0, 4096)?;
    let base = take(&device)?;
    write_direct(disk.path(), 3 * BLOCK, 4096)?;
    // Of a closed period, which no document has.
    device.close_period()?;
    write_direct(disk.path(), 5 * BLOCK, 4096)?;
    let counted = device.counters()?.ops[0];
    drop((device, tracker));

    write_direct(disk.path(), 7 * BLOCK, 4096)?;

    let tracker = Tracker::load(&place.config())?;
    let device = only(&tracker)?;
    ensure!(device.path() == disk.path());
    ensure!(device.check_doubt().is_none(), "{:?}", device.check_doubt());
    write_direct(disk.path(), 9 * BLOCK, 4096)?;
    ensure!(changed(&device, &base)? == [3, 5, 7, 9]);
    ensure!(device.counters()?.ops[0] >= counted + 2);
    let second = take(&device)?;
    ensure!(second.generation == base.generation && second.number == base.number + 1);
    drop((device, tracker));

    let tracker = Tracker::load(&place.config())?;
    let device = only(&tracker)?;
    ensure!(changed(&device, &second)?.is_empty());
    ensure!(changed(&device, &base)? == [3, 5, 7, 9]);
    let read_map = device.with_map(CbtMap::frozen)?;
    ensure!(read_map.base() == second);
    Ok(())
}

#[test]
fn what_was_marked_by_hand_survives() -> Result<()> {
    let place = Place::new()?;
    let disk = LoopDevice::new(64 * MIB)?;
    let tracker = Tracker::load(&place.config())?;
    let device = attach(&tracker, disk.path())?;
    let base = take(&device)?;
    let sector = Sectors::new;
    device.mark_both(&[(sector(0), sector(1)), (sector(128 * 4), sector(1))])?;
    drop((device, tracker));
    let tracker = Tracker::load(&place.config())?;
    let device = only(&tracker)?;
    ensure!(changed(&device, &base)? == [0, 4]);
    let last: Vec<_> = device
        .with_map(CbtMap::frozen)?
        .changed_in_last()?
        .map(|extent| extent.offset / BLOCK)
        .collect();
    ensure!(last == [0, 4], "{last:?}");
    Ok(())
}

#[test]
fn a_doubt_survives() -> Result<()> {
    let place = Place::new()?;
    let disk = LoopDevice::new(64 * MIB)?;
    let tracker = Tracker::load(&place.config())?;
    let device = attach(&tracker, disk.path())?;
    let base = take(&device)?;
    device.corrupt(ResetReason::OutOfRange);
    drop((device, tracker));
    let tracker = Tracker::load(&place.config())?;
    let device = only(&tracker)?;
    ensure!(device.check_doubt() == Some(ResetReason::OutOfRange));
    ensure!(changed(&device, &base).is_err());
    let next = take(&device)?;
    ensure!(next.generation != base.generation);
    Ok(())
}

#[test]
fn pins_are_there_while_a_device_is_tracked_and_no_longer() -> Result<()> {
    let place = Place::new()?;
    let (one, two) = (LoopDevice::new(64 * MIB)?, LoopDevice::new(64 * MIB)?);
    let tracker = Tracker::load(&place.config())?;
    let started = Instant::now();
    let root = place.bpffs().join("blksnap");
    ensure!(place.pins() == [root.clone()], "{:?}", place.pins());
    let first = attach(&tracker, one.path())?;
    let second = attach(&tracker, two.path())?;
    ensure!(fs::read_dir(place.documents())?.count() == 2);
    tracker.detach(first.device().id)?;
    ensure!(fs::read_dir(place.documents())?.count() == 1);
    ensure!(!place.pins().is_empty());
    tracker.detach(second.device().id)?;
    ensure!(place.pins() == [root], "{:?}", place.pins());
    drop((first, second));
    // And again.
    let first = attach(&tracker, one.path())?;
    write_direct(one.path(), 0, 4096)?;
    drop((tracker, first));
    let tracker = Tracker::load(&place.config())?;
    let device = only(&tracker)?;
    tracker.detach(device.device().id)?;
    drop((device, tracker));
    // The tracker's thread may be the last to let go.
    while !place.pins().is_empty() || place.documents().exists() {
        std::thread::sleep(Duration::from_millis(10));
        ensure!(started.elapsed() < PATIENCE, "{:?}", place.pins());
    }
    Ok(())
}

#[test]
fn purge_ends_all() -> Result<()> {
    let place = Place::new()?;
    let disk = LoopDevice::new(64 * MIB)?;
    ensure!(!purge(&place.bpffs())?);
    let tracker = Tracker::load(&place.config())?;
    attach(&tracker, disk.path())?;
    let used = purge(&place.bpffs());
    ensure!(matches!(used, Err(PinError::Used(_))), "{used:?}");
    let second = Tracker::load(&place.config());
    ensure!(matches!(second, Err(TrackerError::Pin(PinError::Used(_)))));
    drop(tracker);
    ensure!(!place.pins().is_empty());
    ensure!(purge(&place.bpffs())?);
    ensure!(place.pins().is_empty(), "{:?}", place.pins());
    let tracker = Tracker::load(&place.config())?;
    ensure!(tracker.devices().is_empty() && tracker.lost().is_empty());
    Ok(())
}

#[test]
fn what_cannot_be_gone_on_with_is_said_and_begins_anew() -> Result<()> {
    let place = Place::new()?;
    let disk = LoopDevice::new(64 * MIB)?;
    for (case, reason) in [
        ("cut", ResetReason::StateDamaged),
        ("changed", ResetReason::StateDamaged),
        ("gone", ResetReason::StateDamaged),
        ("form", ResetReason::StateVersion),
        ("version", ResetReason::StateVersion),
    ] {
        let tracker = Tracker::load(&place.config())?;
        let device = attach(&tracker, disk.path())?;
        let base = take(&device)?;
        drop((device, tracker));
        let document = place.document()?;
        let mut bytes = fs::read(&document)?;
        match case {
            "cut" => bytes.truncate(bytes.len() - 1),
            "changed" => {
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
            }
            "gone" => {}
            "form" => {
                // Whole, by a program that knows another form.
                let other = Format {
                    name: "blksnap-device",
                    version: u32::MAX,
                };
                write_sections(
                    &document,
                    other,
                    &"something else",
                    &[Blocks::from(bytes.clone())],
                )?;
                bytes = fs::read(&document)?;
            }
            _ => {
                let root = place.bpffs().join("blksnap");
                fs::rename(root.join(format!("v{ABI_VERSION}")), root.join("v1000"))?;
            }
        }
        if case == "gone" {
            fs::remove_file(&document)?;
        } else {
            fs::write(&document, &bytes)?;
        }
        let tracker = Tracker::load(&place.config())?;
        ensure!(tracker.devices().is_empty(), "{case}");
        // As whoever has a record of the device does.
        let size = Granularity::Fixed(BlockSize::from_bytes(BLOCK)?);
        let again = BlockDevice::open(disk.path())?;
        let device = tracker.attach_anew(again, size, ResetReason::ContinuityUnproven)?;
        let info = device.with_map(CbtMap::info);
        ensure!(info.generation != base.generation, "{case}");
        ensure!(info.began == reason, "{case}: {:?}", info.began);
        ensure!(device.counters()?.resets.get(&reason) == Some(&1), "{case}");
        tracker.detach(device.device().id)?;
        drop((device, tracker));
    }
    Ok(())
}

#[test]
fn another_disk_under_the_same_name_is_not_gone_on_with() -> Result<()> {
    let place = Place::new()?;
    let mut disk = LoopDevice::new(64 * MIB)?;
    let tracker = Tracker::load(&place.config())?;
    attach(&tracker, disk.path())?;
    drop(tracker);
    disk.replace()?;
    let tracker = Tracker::load(&place.config())?;
    ensure!(tracker.devices().is_empty());
    let lost = tracker.lost();
    ensure!(
        lost.len() == 1
            && lost[0].reason == ResetReason::DeviceReplaced
            && lost[0].path.as_deref() == Some(disk.path()),
        "{lost:?}"
    );
    let device = attach(&tracker, disk.path())?;
    ensure!(device.with_map(CbtMap::began) == ResetReason::DeviceReplaced);
    tracker.detach(device.device().id)?;
    Ok(())
}

#[test]
fn a_device_that_grew_meanwhile_is_in_doubt() -> Result<()> {
    let place = Place::new()?;
    let disk = LoopDevice::new(64 * MIB)?;
    let tracker = Tracker::load(&place.config())?;
    let device = attach(&tracker, disk.path())?;
    let base = take(&device)?;
    drop((device, tracker));
    fs::File::options()
        .write(true)
        .open(disk.image())?
        .set_len(80 * MIB)?;
    run("losetup", [Path::new("--set-capacity"), disk.path()])?;
    let tracker = Tracker::load(&place.config())?;
    let device = only(&tracker)?;
    ensure!(device.check_doubt() == Some(ResetReason::Resized));
    ensure!(changed(&device, &base).is_err());
    Ok(())
}

#[test]
fn a_daemon_that_is_killed_or_stopped_loses_nothing() -> Result<()> {
    let disk = LoopDevice::new(64 * MIB)?;
    let node = disk.path().display().to_string();
    let mut daemon = Daemon::start()?;
    daemon.run(["attach", &node, "--block-size", "64K"])?;
    let image = daemon.scratch().join("image");
    let image = image.display().to_string();
    daemon.json(["backup", &node, &image])?;
    for (round, kill) in [(1, true), (2, false), (3, true)] {
        write_direct(disk.path(), round * BLOCK, 4096)?;
        if kill {
            daemon.kill()?;
        } else {
            ensure!(daemon.stop()? == 0);
        }
        write_direct(disk.path(), (round + 10) * BLOCK, 4096)?;
        daemon.launch(&DaemonOptions::default())?;
        write_direct(disk.path(), (round + 20) * BLOCK, 4096)?;
        let answer = daemon.json(["backup", &node, &image, "--incremental"])?;
        ensure!(answer.to_string().contains("incremental"), "{answer}");
        ensure!(fs::read(&image)? == fs::read(disk.image())?, "round {round}");
    }
    daemon.run(["detach", &node])?;
    ensure!(daemon.stop()? == 0);
    ensure!(!daemon.runtime_dir().join("devices").exists());
    ensure!(!daemon.bpffs().join("blksnap").exists());
    Ok(())
}

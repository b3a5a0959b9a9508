//! Tracking on other kernels: devices that the machine of a developer may not have.
//!
//! What a test looks for is what `paths` looks for: no byte changed that is not reported, on the device that was
//! written to and on every device below it. The rows are those of the table in docs/tracking.md that say *lab*.

mod below;
mod mapper;
mod misses;
mod passthrough;
mod zoned;

use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result, ensure};
use blksnap_agent::disk::BlockDevice;
use blksnap_agent::tracker::{Tracker, TrackerConfig};
use blksnap_common::track::OpKind;
use blksnap_tests::path::{ALL, Subject};
use blksnap_tests::{LoopDevice, lab};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Ranges that begin and end within tracking blocks, at their borders, and over many of them.
const RANGES: [(u64, u64); 4] = [
    (0, 4 * KIB),
    (68 * KIB, 120 * KIB),
    (MIB - 4 * KIB, 8 * KIB),
    (2 * MIB, 5 * MIB),
];

/// Ways to write that are the same to every driver as another one, and take long in a guest: `paths` has them all.
const SAME: [&str; 6] = [
    "O_SYNC write",
    "O_DIRECT|O_DSYNC write",
    "io_uring write, buffered",
    "sendfile from a file",
    "libaio write, O_DIRECT (fio)",
    "BLKSECDISCARD",
];

/// The programs, loaded once: that takes some seconds in a guest.
fn tracker() -> Result<Arc<Tracker>> {
    static LOADED: Mutex<Option<Arc<Tracker>>> = Mutex::new(None);
    let mut loaded = LOADED.lock().expect("no test panics meanwhile");
    if let Some(tracker) = &*loaded {
        return Ok(Arc::clone(tracker));
    }
    let tracker = Tracker::load(&TrackerConfig::default())?;
    *loaded = Some(Arc::clone(&tracker));
    Ok(tracker)
}

/// `nodes`, tracked in blocks of 4 KiB.
fn subject(nodes: &[&Path]) -> Result<Subject> {
    lab::inside()?;
    Subject::with(tracker()?, nodes.iter().map(|node| (*node, 4 * KIB)))
}

/// Writes to `node` in every way while it and the devices `below` it are tracked, and compares all of them.
fn every_operation(node: &Path, below: &[&Path]) -> Result<()> {
    let nodes: Vec<&Path> = [node].into_iter().chain(below.iter().copied()).collect();
    let mut subject = subject(&nodes)?;
    subject.observe(|| Ok(()))?;
    let written = BlockDevice::open(node)?;
    let (mut unsupported, mut changed) = (Vec::new(), vec![0; below.len() + 1]);
    for operation in ALL.iter().filter(|operation| !SAME.contains(&operation.name)) {
        let (done, seen) = subject
            .observe_more(|| {
                let mut done = Vec::new();
                for (offset, length) in RANGES {
                    done.push((operation.run)(node, offset, length)?);
                }
                std::fs::File::open(node)?.sync_all()?;
                Ok(done)
            })
            .with_context(|| operation.name)?;
        for ((offset, length), done) in RANGES.into_iter().zip(done) {
            if done {
                seen[0]
                    .check(false, &written, offset, length)
                    .with_context(|| operation.name)?;
            } else if unsupported.last() != Some(&operation.name) {
                unsupported.push(operation.name);
            }
        }
        for (seen, changed) in seen.iter().zip(&mut changed) {
            *changed += seen.changed.len();
            let all: u64 = seen.reported.iter().map(|(_, length)| length).sum();
            let capacity = BlockDevice::open(&seen.node)?.capacity.bytes();
            ensure!(
                all < capacity / 4 * 3,
                "{}: {} reports {all} bytes, so much that nothing could be missing",
                operation.name,
                seen.node.display()
            );
        }
    }
    println!(
        "{}: can't do {unsupported:?}; sectors changed: {changed:?}",
        node.display()
    );
    ensure!(
        changed.iter().all(|changed| *changed > 1000),
        "of the devices {changed:?} sectors changed: too few to show anything"
    );
    Ok(())
}

/// Devices of `mib` MiB to build on.
fn disks(count: usize, mib: u64) -> Result<Vec<LoopDevice>> {
    lab::inside()?;
    (0..count).map(|_| LoopDevice::new(mib * MIB)).collect()
}

/// The nodes of devices.
fn nodes(disks: &[LoopDevice]) -> Vec<&Path> {
    disks.iter().map(LoopDevice::path).collect()
}

#[test]
#[ignore = "needs disks of a guest: cargo xtask test --vm 6.12"]
fn virtio_partition() -> Result<()> {
    let disk = lab::virtio(0)?;
    let disk = disk.to_string_lossy();
    blksnap_tests::run(
        "parted",
        ["-s", &*disk, "mklabel", "gpt", "mkpart", "a", "2051s", "34818s"],
    )?;
    every_operation(Path::new(&format!("{disk}1")), &[])
}

#[test]
#[ignore = "needs an NVMe disk: cargo xtask test --vm 6.12"]
fn nvme() -> Result<()> {
    every_operation(&lab::nvme(false)?, &[])
}

#[test]
#[ignore = "needs an NVMe disk with two controllers: cargo xtask test --vm 6.12"]
fn nvme_multipath() -> Result<()> {
    let disk = lab::nvme(true)?;
    every_operation(&disk, &[])?;
    // Both paths, one after the other: the disk stays the same when the path in use goes away.
    let name = disk.file_name().context("a name")?.to_owned();
    let mut subject = subject(&[&disk])?;
    let controllers = passthrough::controllers(&name)?;
    ensure!(controllers.len() == 2, "{controllers:?}");
    let (_, seen) = subject.observe(|| {
        (ALL[1].run)(&disk, 0, MIB)?;
        std::fs::write(
            Path::new("/sys/class/nvme")
                .join(&controllers[0])
                .join("reset_controller"),
            "1",
        )?;
        (ALL[1].run)(&disk, 4 * MIB, MIB)
    })?;
    let device = BlockDevice::open(&disk)?;
    seen[0].check(false, &device, 0, MIB)?;
    seen[0].check(false, &device, 4 * MIB, MIB)?;
    let counted = seen[0].operations[usize::from(OpKind::Write.code())];
    ensure!(counted > 0, "no write was counted");
    Ok(())
}

#[test]
#[ignore = "needs a SCSI disk: cargo xtask test --vm 6.12"]
fn scsi() -> Result<()> {
    every_operation(&passthrough::scsi_disk()?, &[])
}

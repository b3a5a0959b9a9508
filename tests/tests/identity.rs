//! Identity: what a partition is called by the kernel and by its table, and who may write to a device.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do, by a panic")]

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result, ensure};
use blksnap_agent::disk::{BlockDevice, DeviceIdentity};
use blksnap_agent::seal::quiet::{Claim, InUse};
use blksnap_agent::sys::mman::SharedWords;
use blksnap_tests::{LoopDevice, LoopOptions, run};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

fn halves(sector_size: u32) -> LoopOptions {
    LoopOptions {
        sector_size,
        partitions: [("1MiB", "50%"), ("50%", "100%")]
            .map(|(start, end)| (start.to_owned(), end.to_owned()))
            .to_vec(),
        ..LoopOptions::default()
    }
}

/// The identity of partition `number`, and its UUID as `partx` reads it from the table.
fn partition(disk: &LoopDevice, number: u32) -> Result<(DeviceIdentity, String)> {
    let device = BlockDevice::open(&disk.partition(number))?;
    let identity = DeviceIdentity::read(Path::new("/sys"), &device)?;
    let number = number.to_string();
    let node = disk.path().to_str().unwrap();
    let uuid = run(
        "partx",
        [
            "--show",
            "--noheadings",
            "--output",
            "UUID",
            "--nr",
            &number,
            node,
        ],
    )?;
    Ok((identity, uuid.trim().to_owned()))
}

#[test]
fn the_uuid_of_a_partition_is_the_one_of_its_table() -> Result<()> {
    let _alone = alone();
    for sector_size in [512, 4096] {
        let disk = LoopDevice::with_options(64 * MIB, &halves(sector_size))?;
        let mut seen = Vec::new();
        for number in [1, 2] {
            let (identity, uuid) = partition(&disk, number)?;
            let place = identity.partition.clone().context("no partition")?;
            ensure!(place.number == number && identity.is_unique());
            // Told by the kernel since 6.11, where it read the table itself; otherwise read here.
            ensure!(place.uuid.as_ref() == Some(&uuid), "{place:?}, {uuid}");
            seen.push(identity);
        }
        ensure!(seen[0].same_device(&seen[1]).is_err());
        ensure!(seen[0].same_as(&seen[0].clone()).is_ok());
    }
    // A table of the old kind over it.
    let disk = LoopDevice::with_options(64 * MIB, &halves(512))?;
    let node = disk.path().to_str().unwrap();
    let table = [
        "--script", node, "mklabel", "msdos", "mkpart", "primary", "1MiB", "100%",
    ];
    run("parted", table)?;
    let (identity, uuid) = partition(&disk, 1)?;
    let place = identity.partition.context("no partition")?;
    ensure!(
        place.uuid.as_ref() == Some(&uuid) && uuid.ends_with("-01"),
        "{place:?}, {uuid}"
    );
    Ok(())
}

#[test]
fn a_loop_device_has_no_identity_of_its_own() -> Result<()> {
    let _alone = alone();
    let disk = LoopDevice::new(64 * MIB)?;
    let device = BlockDevice::open(disk.path())?;
    let identity = DeviceIdentity::read(Path::new("/sys"), &device)?;
    ensure!(!identity.is_unique() && identity.backing_file.is_some());
    ensure!(identity.capacity == device.capacity && identity.logical_block == device.logical_block);
    Ok(())
}

/// One test at a time: a process that one of them starts holds, until it becomes its program, all that another has
/// open, and all of that is about who has a node open.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A `/proc` with this process only: others may be out of reach.
fn own_proc() -> Result<TempDir> {
    let directory = tempfile::tempdir()?;
    let own = std::process::id().to_string();
    symlink(Path::new("/proc").join(&own), directory.path().join(&own))?;
    Ok(directory)
}

fn claim(node: &Path, proc: &TempDir) -> Result<Result<Claim, InUse>> {
    let device = BlockDevice::open(node)?;
    Ok(Claim::take(&device, Path::new("/sys"), proc.path()))
}

fn writer(node: &Path) -> Result<File> {
    Ok(OpenOptions::new().write(true).open(node)?)
}

#[test]
fn who_has_a_node_open_is_seen_where_it_matters() -> Result<()> {
    let _alone = alone();
    let proc = own_proc()?;
    let disk = LoopDevice::with_options(64 * MIB, &halves(512))?;
    let (whole, first, second) = (disk.path().to_owned(), disk.partition(1), disk.partition(2));
    for node in [&whole, &first, &second] {
        claim(node, &proc)??.sync()?;
    }
    let reader = File::open(&first)?;
    claim(&first, &proc)??;
    drop(reader);
    // Who writes, and who is in doubt by that.
    for (open, seen_by, not_by) in [
        (&first, vec![&first, &whole], vec![&second]),
        (&second, vec![&second, &whole], vec![&first]),
        (&whole, vec![&first, &second, &whole], vec![]),
    ] {
        let writer = writer(open)?;
        for node in seen_by {
            let refused = claim(node, &proc)?;
            ensure!(
                matches!(&refused, Err(InUse::Process { process, .. }) if *process == std::process::id()),
                "{} open, {}: {refused:?}",
                open.display(),
                node.display()
            );
        }
        for node in not_by {
            claim(node, &proc)??;
        }
        drop(writer);
    }
    // A claim keeps others out.
    let held = claim(&first, &proc)??;
    ensure!(matches!(claim(&first, &proc)?, Err(InUse::Exclusive(_))));
    ensure!(matches!(claim(&whole, &proc)?, Err(InUse::Exclusive(_))));
    claim(&second, &proc)??;
    drop(held);
    claim(&whole, &proc)??;
    Ok(())
}

#[test]
fn a_mapping_a_mount_and_a_loop_device_are_seen() -> Result<()> {
    let _alone = alone();
    let proc = own_proc()?;
    let mut disk = LoopDevice::with_options(64 * MIB, &halves(512))?;
    let first = disk.partition(1);
    let file = OpenOptions::new().read(true).write(true).open(&first)?;
    let mapping = SharedWords::map(&file, 512)?;
    drop(file);
    let refused = claim(&first, &proc)?;
    ensure!(matches!(refused, Err(InUse::Process { .. })), "{refused:?}");
    drop(mapping);
    claim(&first, &proc)??;

    let above = LoopDevice::on(&first, &LoopOptions::default())?;
    let refused = claim(&first, &proc)?;
    ensure!(matches!(refused, Err(InUse::Loop { .. })), "{refused:?}");
    drop(above);
    claim(&first, &proc)??;

    LoopDevice::mkfs_on(&first, "ext4")?;
    let mountpoint = disk.mount_partition(1)?;
    fs::write(mountpoint.join("file"), "content")?;
    for node in [first.as_path(), disk.path()] {
        ensure!(matches!(claim(node, &proc)?, Err(InUse::Exclusive(_))));
    }
    claim(&disk.partition(2), &proc)??;
    disk.unmount()?;
    claim(&first, &proc)??;
    Ok(())
}

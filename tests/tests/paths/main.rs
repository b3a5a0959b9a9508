//! Paths: every way to write to a device, on every kind of device that can be made here.
//!
//! Each test is a row, or some, of the table in docs/tracking.md. What a test looks for is the same everywhere: no
//! byte changed that is not reported; and where the ranges are known, exactly their blocks are reported, in every
//! slot that they touch.

mod files;
mod stacks;
mod swap;

use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use blksnap_agent::disk::BlockDevice;
use blksnap_common::track::OpKind;
use blksnap_tests::path::{ALL, Operation, Subject};
use blksnap_tests::{LoopDevice, LoopOptions, Zram};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Ranges that begin and end within tracking blocks, at their borders, and over many of them.
const RANGES: [(u64, u64); 4] = [
    (0, 4 * KIB),
    (68 * KIB, 120 * KIB),
    (MIB - 4 * KIB, 8 * KIB),
    (2 * MIB, 5 * MIB),
];

/// Does every operation on every range of `node` while `nodes` are tracked, and compares. Gives the operations that
/// the device can't do.
fn every_operation(nodes: &[(&Path, u64)], node: &Path) -> Result<Vec<&'static str>> {
    let mut subject = Subject::new(nodes.iter().copied())?;
    let written = BlockDevice::open(node)?;
    let mut unsupported = Vec::new();
    for operation in &ALL {
        let mut able = true;
        for (offset, length) in RANGES {
            // Something that a discard and zeroes make a difference to.
            let filled = &ALL[1];
            (filled.run)(node, offset, length)?;
            able &= one(&mut subject, &written, operation, offset, length)
                .with_context(|| format!("{} at {offset}, {length} bytes", operation.name))?;
        }
        if !able {
            unsupported.push(operation.name);
        }
    }
    println!("{}: can't do {unsupported:?}", node.display());
    Ok(unsupported)
}

fn one(
    subject: &mut Subject,
    node: &BlockDevice,
    operation: &Operation,
    offset: u64,
    length: u64,
) -> Result<bool> {
    let (done, seen) = subject.observe(|| (operation.run)(&node.path, offset, length))?;
    for seen in seen {
        if !done {
            ensure!(seen.changed.is_empty(), "it can't be done, and was");
            continue;
        }
        seen.check(operation.exact, node, offset, length)?;
        if seen.reported.is_empty() {
            continue;
        }
        let kinds: Vec<OpKind> = OpKind::ALL
            .into_iter()
            .filter(|kind| seen.operations[usize::from(kind.code())] > 0)
            .collect();
        ensure!(
            !kinds.is_empty() && kinds.iter().all(|kind| operation.kinds.contains(kind)),
            "{} counts {kinds:?}",
            seen.node.display()
        );
    }
    Ok(done)
}

/// Nothing that is made here has secure erase.
const NO_SECURE_ERASE: [&str; 1] = ["BLKSECDISCARD"];

#[test]
fn loop_device() -> Result<()> {
    let disk = LoopDevice::new(16 * MIB)?;
    let unsupported = every_operation(&[(disk.path(), 4 * KIB)], disk.path())?;
    ensure!(unsupported == NO_SECURE_ERASE, "{unsupported:?}");
    Ok(())
}

#[test]
fn loop_device_in_the_default_block_size() -> Result<()> {
    let disk = LoopDevice::new(16 * MIB + 12 * KIB)?;
    let unsupported = every_operation(&[(disk.path(), 64 * KIB)], disk.path())?;
    ensure!(unsupported == NO_SECURE_ERASE, "{unsupported:?}");
    Ok(())
}

#[test]
fn loop_device_with_direct_io() -> Result<()> {
    let options = LoopOptions {
        direct_io: true,
        ..LoopOptions::default()
    };
    let disk = LoopDevice::with_options(16 * MIB, &options)?;
    let unsupported = every_operation(&[(disk.path(), 4 * KIB)], disk.path())?;
    ensure!(unsupported == NO_SECURE_ERASE, "{unsupported:?}");
    Ok(())
}

#[test]
fn loop_device_of_large_sectors() -> Result<()> {
    let options = LoopOptions {
        sector_size: 4096,
        ..LoopOptions::default()
    };
    let disk = LoopDevice::with_options(16 * MIB, &options)?;
    let unsupported = every_operation(&[(disk.path(), 4 * KIB)], disk.path())?;
    ensure!(unsupported == NO_SECURE_ERASE, "{unsupported:?}");
    Ok(())
}

#[test]
fn zram() -> Result<()> {
    let disk = Zram::new(16 * MIB)?;
    let unsupported = every_operation(&[(&disk.path(), 4 * KIB)], &disk.path())?;
    ensure!(unsupported.contains(&"BLKSECDISCARD"), "{unsupported:?}");
    Ok(())
}

/// A disk of 32 MiB with two partitions that begin at sectors no tracking block begins at.
fn partitioned() -> Result<LoopDevice> {
    let part = |first: &str, last: &str| (first.to_owned(), last.to_owned());
    LoopDevice::with_options(
        32 * MIB,
        &LoopOptions {
            partitions: vec![part("2056s", "20487s"), part("20488s", "61439s")],
            ..LoopOptions::default()
        },
    )
}

#[test]
fn writes_to_a_partition_mark_the_disk() -> Result<()> {
    let disk = partitioned()?;
    let (first, second) = (disk.partition(1), disk.partition(2));
    let nodes = [
        (disk.path(), 64 * KIB),
        (first.as_path(), 4 * KIB),
        (second.as_path(), 64 * KIB),
    ];
    for node in [&first, &second] {
        let unsupported = every_operation(&nodes, node)?;
        ensure!(unsupported == NO_SECURE_ERASE, "{unsupported:?}");
    }
    Ok(())
}

#[test]
fn writes_to_the_disk_mark_its_partitions() -> Result<()> {
    let disk = partitioned()?;
    let (first, second) = (disk.partition(1), disk.partition(2));
    let mut subject = Subject::new([
        (first.as_path(), 4 * KIB),
        (disk.path(), 4 * KIB),
        (second.as_path(), 64 * KIB),
    ])?;
    let whole = BlockDevice::open(disk.path())?;
    // Over the border of the two, in the first alone, in the second alone, in none.
    let border = 20_488 * 512;
    let mut none = 0;
    for (offset, length) in [
        (border - 8 * KIB, 16 * KIB),
        (border - 64 * KIB, 64 * KIB),
        (border, 4 * KIB),
        (31 * MIB, 8 * KIB),
        (2 * MIB, 16 * MIB),
    ] {
        for operation in &ALL {
            let done = one(&mut subject, &whole, operation, offset, length)
                .with_context(|| format!("{} at {offset}, {length} bytes", operation.name))?;
            none += u32::from(!done);
        }
    }
    ensure!(none == 5, "all but secure erase can be done");
    Ok(())
}

#[test]
fn a_write_of_a_sector_marks_one_block() -> Result<()> {
    let disk = LoopDevice::new(16 * MIB)?;
    let mut subject = Subject::new([(disk.path(), 4 * KIB)])?;
    let device = BlockDevice::open(disk.path())?;
    for sector in [0, 1, 7, 8, 1023, 32_767] {
        let (_, seen) = subject.observe(|| {
            let bytes = blksnap_agent::sys::AlignedBuffer::zeroed(512);
            let file = std::fs::OpenOptions::new()
                .write(true)
                .custom_flags(libc::O_DIRECT)
                .open(disk.path())?;
            Ok(file.write_all_at(&bytes.as_slice()[..512], sector * 512)?)
        })?;
        seen[0].check(true, &device, sector * 512, 512)?;
    }
    Ok(())
}

//! Stacks: a device on a device, both tracked.

use anyhow::{Context as _, Result, ensure};
use blksnap_agent::disk::BlockDevice;
use blksnap_tests::path::{ALL, Subject};
use blksnap_tests::{LoopDevice, LoopOptions, Zram};

use crate::{KIB, MIB, RANGES};

/// Writes to `upper` in every way; both nodes report exactly that, since the same bytes are at the same place.
fn both(upper: &std::path::Path, lower: &std::path::Path) -> Result<()> {
    let mut subject = Subject::new([(upper, 4 * KIB), (lower, 4 * KIB)])?;
    let (above, below) = (BlockDevice::open(upper)?, BlockDevice::open(lower)?);
    for operation in &ALL {
        for (offset, length) in RANGES {
            (ALL[1].run)(upper, offset, length)?;
            std::fs::File::open(lower)?.sync_all()?;
            let (done, seen) = subject.observe(|| {
                let done = (operation.run)(upper, offset, length)?;
                // The upper one is done when the lower one's page cache has it.
                std::fs::File::open(upper)?.sync_all()?;
                std::fs::File::open(lower)?.sync_all()?;
                Ok(done)
            })?;
            if done {
                let what = || format!("{} at {offset}, {length} bytes", operation.name);
                seen[0]
                    .check(operation.exact, &above, offset, length)
                    .with_context(what)?;
                seen[1]
                    .check(operation.exact, &below, offset, length)
                    .with_context(what)?;
            }
        }
    }
    Ok(())
}

#[test]
fn loop_on_loop() -> Result<()> {
    let lower = LoopDevice::new(16 * MIB)?;
    let upper = LoopDevice::on(lower.path(), &LoopOptions::default())?;
    both(upper.path(), lower.path())
}

#[test]
fn loop_on_loop_with_direct_io() -> Result<()> {
    let lower = LoopDevice::new(16 * MIB)?;
    let options = LoopOptions {
        direct_io: true,
        ..LoopOptions::default()
    };
    let upper = LoopDevice::on(lower.path(), &options)?;
    both(upper.path(), lower.path())
}

#[test]
fn loop_on_zram() -> Result<()> {
    let lower = Zram::new(16 * MIB)?;
    let upper = LoopDevice::on(&lower.path(), &LoopOptions::default())?;
    both(upper.path(), &lower.path())
}

#[test]
fn loop_on_a_file_of_a_tracked_file_system() -> Result<()> {
    let mut lower = LoopDevice::new(96 * MIB)?;
    lower.mkfs("ext4")?;
    let directory = lower.mount()?;
    let image = directory.join("disk.img");
    std::fs::File::create(&image)?.set_len(16 * MIB)?;
    let upper = LoopDevice::on(&image, &LoopOptions::default())?;
    let mut subject = Subject::new([(upper.path(), 4 * KIB), (lower.path(), 4 * KIB)])?;
    let above = BlockDevice::open(upper.path())?;
    let mut changed = 0;
    for operation in &ALL {
        for (offset, length) in RANGES {
            let (done, seen) = subject.observe(|| {
                let done = (operation.run)(upper.path(), offset, length)?;
                std::fs::File::open(upper.path())?.sync_all()?;
                blksnap_tests::run("sync", ["--file-system".as_ref(), directory.as_os_str()])?;
                Ok(done)
            })?;
            if done {
                seen[0].check(operation.exact, &above, offset, length)?;
            }
            changed += seen[1].changed.len();
        }
    }
    ensure!(
        changed > 1000,
        "only {changed} sectors of the file system changed"
    );
    drop(subject);
    drop(upper);
    lower.unmount()
}

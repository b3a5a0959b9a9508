//! The dm filter on kernels with device-mapper: images byte by byte against what the device was at the instant, tables
//! as they were afterwards.
//!
//! The oracle is a copy of the device beneath, made while all origins were suspended and nothing passed.
//!
//! A guest's root is not a disk, so root on LVM is an agent in a root of its own on a volume (`root`).

mod agent;
mod ends;
mod kills;
mod lvm;
mod root;
mod scene;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use blksnap_agent::disk::BlockDevice;
use blksnap_agent::filter::dm::{Condition, availability};
use blksnap_tests::{LoopDevice, Pace, Writer, lab, read_device, run, seed};
use nix::errno::Errno;

use scene::{Group, MIB, Mounted, Scene, assert_restored, fill, ours, same, table};

/// A load of raw writes that leaves the machine some time.
const PACE: Pace = Pace {
    burst: 8,
    pause: Duration::from_millis(2),
};

/// A file system under load is taken, twice looked at, and let go.
fn file_system(test: &str, node: &Path, kind: &str) -> Result<()> {
    let scene = Scene::new()?;
    let mounted = Mounted::new(kind, node)?;
    let before = table(node)?;
    let writer = Writer::files(mounted.path(), seed(test));
    std::thread::sleep(Duration::from_secs(1));
    let (snapshot, taken, bytes) = scene.take(&[node], 96 * MIB)?;
    let image = taken.images[0];
    same(&image, &bytes[0])?;
    std::thread::sleep(Duration::from_secs(2));
    same(&image, &bytes[0])?;
    ensure!(scene.dm.check(snapshot, &image) == Condition::Whole);
    let used = scene.dm.usage(snapshot, &image).context("usage")?;
    ensure!(used.used > 0, "nothing was kept: {used:?}");

    // The image is a file system that was frozen: nothing is to be repaired.
    let node_of_image = image.node();
    match kind {
        "ext4" => run(
            "e2fsck",
            ["-f".as_ref(), "-n".as_ref(), node_of_image.as_os_str()],
        )
        .map(drop)?,
        _ => {
            // Frozen XFS leaves its log to be replayed, so that lost inodes are found: a mount does that.
            let directory = tempfile::tempdir()?;
            let options = ["-o".as_ref(), "nouuid".as_ref(), node_of_image.as_os_str()];
            run("mount", options.into_iter().chain([directory.path().as_os_str()]))?;
            blksnap_tests::unmount(directory.path())?;
            run("xfs_repair", ["-n".as_ref(), node_of_image.as_os_str()]).map(drop)?;
        }
    }
    // It is written to, and the origin does not notice.
    let first = read_device(node)?;
    fill(&node_of_image, 4 * MIB, MIB, 0xA5)?;
    let now = read_device(&node_of_image)?;
    let place = usize::try_from(4 * MIB)?..usize::try_from(5 * MIB)?;
    ensure!(now[place.clone()].iter().all(|byte| *byte == 0xA5));
    drop(first);

    scene.dm.release(snapshot)?;
    assert_restored(&scene, &[node], &[before])?;
    drop(writer);
    drop(mounted);
    match kind {
        "ext4" => run("e2fsck", ["-f".as_ref(), "-n".as_ref(), node.as_os_str()]).map(drop),
        _ => run("xfs_repair", ["-n".as_ref(), node.as_os_str()]).map(drop),
    }
}

#[test]
#[ignore = "needs a kernel with device mapper: cargo xtask test --vm 6.12"]
fn ext4_on_thick() -> Result<()> {
    lab::inside()?;
    let disk = LoopDevice::new(80 * MIB)?;
    let group = Group::new("dmthick", disk.path())?;
    file_system("ext4_on_thick", &group.thick("volume", 64)?, "ext4")
}

#[test]
#[ignore = "needs a kernel with device mapper: cargo xtask test --vm 6.12"]
fn xfs_on_thick() -> Result<()> {
    lab::inside()?;
    let disk = LoopDevice::new(336 * MIB)?;
    let group = Group::new("dmxfs", disk.path())?;
    file_system("xfs_on_thick", &group.thick("volume", 320)?, "xfs")
}

#[test]
#[ignore = "needs a kernel with device mapper: cargo xtask test --vm 6.12"]
fn ext4_on_thin() -> Result<()> {
    lab::target("thin-pool", "dm_thin_pool")?;
    let disk = LoopDevice::new(160 * MIB)?;
    let group = Group::new("dmthin", disk.path())?;
    file_system("ext4_on_thin", &group.thin("volume", 64)?, "ext4")
}

#[test]
#[ignore = "needs a kernel with device mapper: cargo xtask test --vm 6.12"]
fn xfs_on_thin() -> Result<()> {
    lab::target("thin-pool", "dm_thin_pool")?;
    let disk = LoopDevice::new(680 * MIB)?;
    let group = Group::new("dmthinxfs", disk.path())?;
    file_system("xfs_on_thin", &group.thin("volume", 320)?, "xfs")
}

/// A device of dm-crypt, removed when dropped.
struct Crypt;

impl Drop for Crypt {
    fn drop(&mut self) {
        if let Err(error) = run("dmsetup", ["remove", "--retry", "dmcrypt"]) {
            blksnap_tests::complain(format_args!("dmcrypt stays: {error:#}"));
        }
    }
}

#[test]
#[ignore = "needs a kernel with device mapper: cargo xtask test --vm 6.12"]
fn ext4_on_crypt() -> Result<()> {
    lab::target("crypt", "dm_crypt")?;
    let disk = LoopDevice::new(66 * MIB)?;
    let key = "000102030405060708090a0b0c0d0e0f".repeat(4);
    let line = format!(
        "0 {} crypt aes-xts-plain64 {key} 0 {} 2048 1 allow_discards",
        64 * MIB / 512,
        disk.path().display()
    );
    run("dmsetup", ["create", "dmcrypt", "--table", &line])?;
    let _crypt = Crypt;
    file_system("ext4_on_crypt", Path::new("/dev/mapper/dmcrypt"), "ext4")
}

#[test]
#[ignore = "needs a kernel with device mapper: cargo xtask test --vm 6.12"]
fn two_snapshots_of_one_origin() -> Result<()> {
    let scene = Scene::new()?;
    let disk = LoopDevice::new(40 * MIB)?;
    let group = Group::new("dmtwo", disk.path())?;
    let node = group.thick("volume", 24)?;
    let before = table(&node)?;
    let writer = Writer::raw(&node, seed("two_snapshots_of_one_origin"), PACE);
    let (first, one, first_bytes) = scene.take(&[&node], 48 * MIB)?;
    std::thread::sleep(Duration::from_secs(1));
    let (second, two, second_bytes) = scene.take(&[&node], 48 * MIB)?;
    ensure!(first_bytes != second_bytes, "nothing was written meanwhile");
    std::thread::sleep(Duration::from_secs(1));
    same(&one.images[0], &first_bytes[0])?;
    same(&two.images[0], &second_bytes[0])?;
    scene.dm.release(first)?;
    std::thread::sleep(Duration::from_secs(1));
    same(&two.images[0], &second_bytes[0])?;
    ensure!(table(&node)? != before, "the second one is held");
    scene.dm.release(second)?;
    drop(writer);
    assert_restored(&scene, &[&node], &[before])
}

#[test]
#[ignore = "needs a kernel with device mapper: cargo xtask test --vm 6.12"]
fn four_origins_at_one_instant() -> Result<()> {
    let scene = Scene::new()?;
    let disk = LoopDevice::new(80 * MIB)?;
    let group = Group::new("dmfour", disk.path())?;
    let nodes = ["a", "b", "c", "d"].map(|name| group.thick(name, 12));
    let nodes = nodes.into_iter().collect::<Result<Vec<_>>>()?;
    let nodes: Vec<&Path> = nodes.iter().map(AsRef::as_ref).collect();
    let before = nodes.iter().map(|node| table(node)).collect::<Result<Vec<_>>>()?;
    // One number after the other, to one volume after the other: at one instant no volume lacks one that a volume after
    // it has.
    let stop = std::sync::atomic::AtomicBool::new(false);
    let ended = std::thread::scope(|scope| -> Result<()> {
        let writer = scope.spawn(|| -> Result<u64> {
            let mut number = 1_u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                for node in &nodes {
                    write_number(node, number)?;
                }
                number += 1;
            }
            Ok(number)
        });
        let looked = (|| {
            for _ in 0..5 {
                std::thread::sleep(Duration::from_millis(300));
                let (snapshot, taken, bytes) = scene.take(&nodes, 16 * MIB)?;
                println!(
                    "four origins were suspended for {:?}, of which the copies of the oracle are most",
                    taken.suspended
                );
                std::thread::sleep(Duration::from_millis(300));
                let mut numbers = Vec::new();
                for (image, bytes) in taken.images.iter().zip(&bytes) {
                    same(image, bytes)?;
                    numbers.push(u64::from_le_bytes(read_device(&image.node())?[..8].try_into()?));
                }
                let first = numbers[0];
                ensure!(first > 0, "nothing was written before");
                ensure!(
                    numbers.is_sorted_by(|one, other| one >= other) && first - numbers[3] <= 1,
                    "{numbers:?} are of several instants"
                );
                scene.dm.release(snapshot)?;
            }
            Ok(())
        })();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let written = writer
            .join()
            .map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        ensure!(written > 20, "{written} numbers were written");
        looked
    });
    ended?;
    assert_restored(&scene, &nodes, &before)
}

fn write_number(node: &Path, number: u64) -> Result<()> {
    use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
    let file = std::fs::File::options()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(node)?;
    let mut buffer = blksnap_agent::sys::AlignedBuffer::zeroed(4096);
    buffer.as_mut_slice()[..8].copy_from_slice(&number.to_le_bytes());
    Ok(file.write_all_at(buffer.as_slice(), 0)?)
}

#[test]
#[ignore = "needs a kernel with device mapper: cargo xtask test --vm 6.12"]
fn a_full_storage_is_told_and_the_origin_goes_on() -> Result<()> {
    let scene = Scene::new()?;
    let disk = LoopDevice::new(40 * MIB)?;
    let group = Group::new("dmfull", disk.path())?;
    let node = group.thick("volume", 16)?;
    let before = table(&node)?;
    let (snapshot, taken, bytes) = scene.take(&[&node], 2 * MIB)?;
    let image = taken.images[0];
    fill(&node, 0, MIB, 1)?;
    same(&image, &bytes[0])?;
    scene.dm.usage(snapshot, &image).context("usage")?;
    for at in 0..16 {
        fill(&node, at * MIB, MIB, 2)?;
    }
    ensure!(
        scene.dm.check(snapshot, &image) == Condition::Full,
        "{:?}",
        scene.dm.check(snapshot, &image)
    );
    ensure!(Condition::Full.errno() == Some(Errno::ENOSPC));
    ensure!(read_device(&image.node()).is_err(), "it reads as if it were good");
    ensure!(
        read_device(&node)?.iter().all(|byte| *byte == 2),
        "the origin suffered"
    );
    scene.dm.release(snapshot)?;
    assert_restored(&scene, &[&node], &[before])
}

#[test]
#[ignore = "needs a kernel with device mapper: cargo xtask test --vm 6.12"]
fn storage_grows_while_it_is_written() -> Result<()> {
    let scene = Scene::new()?;
    let disk = LoopDevice::new(80 * MIB)?;
    let group = Group::new("dmgrow", disk.path())?;
    let node = group.thick("volume", 48)?;
    let before = table(&node)?;
    let (snapshot, taken, bytes) = scene.take(&[&node], 8 * MIB)?;
    let image = taken.images[0];
    for at in 0..48 {
        fill(&node, at * MIB, MIB, 3)?;
        let usage = scene.dm.usage(snapshot, &image).context("usage")?;
        if usage.bytes - usage.used < 4 * MIB {
            scene.dm.grow(snapshot, image.origin, 8 * MIB)?;
        }
    }
    let usage = scene.dm.usage(snapshot, &image).context("usage")?;
    ensure!(usage.used >= 48 * MIB, "{usage:?}");
    same(&image, &bytes[0])?;
    scene.dm.release(snapshot)?;
    assert_restored(&scene, &[&node], &[before])
}

#[test]
#[ignore = "needs a kernel with device mapper: cargo xtask test --vm 6.12"]
fn what_can_not_be_taken_is_refused() -> Result<()> {
    let scene = Scene::new()?;
    let disk = LoopDevice::new(24 * MIB)?;
    let why = |node: &Path| -> Result<String> {
        let device = BlockDevice::open(node)?;
        Ok(availability(&device).expect_err("it is refused").to_string())
    };
    ensure!(why(disk.path())?.contains("no device of device-mapper"));
    let group = Group::new("dmrefuse", disk.path())?;
    let node = group.thick("volume", 16)?;
    availability(&BlockDevice::open(&node)?)?;
    run(
        "pvcreate",
        [
            "-ff".as_ref(),
            "--yes".as_ref(),
            "--config".as_ref(),
            "devices{use_devicesfile=0 scan_lvs=1}".as_ref(),
            node.as_os_str(),
        ],
    )?;
    ensure!(why(&node)?.contains("physical volume"), "{}", why(&node)?);
    fill(&node, 0, MIB, 0)?;
    // Old data on the origin itself would wait for itself.
    let mounted = Mounted::new("ext4", &node)?;
    let mut origins = scene.origins(&[&node], MIB)?;
    origins[0].place = blksnap_agent::filter::dm::Place::Directory(mounted.path().to_owned());
    let mut witness = scene::Witness::new(&origins)?;
    let error = scene
        .dm
        .take(scene::snapshot(), &origins, &mut witness)
        .expect_err("it is refused");
    ensure!(error.to_string().contains("which is to be taken"), "{error}");
    ensure!(ours()?.is_empty());
    Ok(())
}

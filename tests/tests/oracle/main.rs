//! Oracle: every byte that changed on a device is in the extents that its change map reports.
//!
//! Random writes of every kind go to loop devices of our own; before and after each round the file behind the
//! device is compared byte by byte. A sector that differs and that no slot reports is the defect looked for.
//! [`scene`] has the devices and the comparison, [`nodes`] writes to block devices, [`files`] to file systems.
//!
//! `BLKSNAP_SEED` repeats the choices of a run; how the threads interleave is the kernel's.

mod files;
mod nodes;
mod scene;

use anyhow::{Result, ensure};
use blksnap_common::track::OpKind;
use blksnap_tests::{LoopOptions, seed};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use files::Tree;
use nodes::Node;
use scene::{During, Scene};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// The writes that one test of raw devices must have made, as the programs counted them: so many, or as
/// `BLKSNAP_ORACLE_WRITES` says where that would take too long. The rounds of the other tests go with it.
const WRITES: u64 = 100_000;

/// `count`, which is for [`WRITES`] writes, for as many as are to be made here.
fn scaled(count: u64) -> u64 {
    let writes = std::env::var("BLKSNAP_ORACLE_WRITES").map_or(WRITES, |text| {
        text.parse().expect("BLKSNAP_ORACLE_WRITES is a number")
    });
    (count * writes / WRITES).max(4)
}

/// Partitions at sectors that no tracking block begins at.
fn odd_partitions() -> Vec<(String, String)> {
    [("2051s", "67600s"), ("67601s", "190001s")]
        .map(|(start, end)| (start.to_owned(), end.to_owned()))
        .to_vec()
}

/// A generator of its own for each thread and round.
fn generator(seed: u64, round: u64, thread: u64) -> StdRng {
    StdRng::seed_from_u64(seed ^ (round << 32) ^ (thread << 56))
}

/// Writes through a disk and its two partitions, all three tracked, three threads at a time, until there were
/// [`WRITES`].
fn disk_and_partitions(
    name: &str,
    ring_bytes: u32,
    block_sizes: [u64; 3],
    during: impl Fn(u64) -> During,
) -> Result<()> {
    let seed = seed(name);
    let options = LoopOptions {
        partitions: odd_partitions(),
        ..LoopOptions::default()
    };
    let mut scene = Scene::new(96 * MIB, &options, ring_bytes)?;
    let paths = [
        scene.disk().path().to_owned(),
        scene.disk().partition(1),
        scene.disk().partition(2),
    ];
    for (path, block_size) in paths.iter().zip(block_sizes) {
        scene.attach(path, block_size)?;
    }
    // The disk's node leaves out the partition table.
    let mut nodes = [
        Node::open(&paths[0], 64 * KIB)?,
        Node::open(&paths[1], 0)?,
        Node::open(&paths[2], 0)?,
    ];
    scene.begin()?;
    let mut round = 0;
    while scene.operations(0)?.iter().sum::<u64>() < scaled(WRITES) {
        round += 1;
        scene.round(during(round), || {
            std::thread::scope(|scope| {
                let writers: Vec<_> = nodes
                    .iter_mut()
                    .zip(0..)
                    .map(|(node, thread)| {
                        scope.spawn(move || node.write(&mut generator(seed, round, thread), 400))
                    })
                    .collect();
                writers
                    .into_iter()
                    .try_for_each(|writer| writer.join().expect("a writer panicked"))
            })
        })?;
    }
    for kind in [OpKind::Write, OpKind::Discard, OpKind::WriteZeroes] {
        for slot in 0..paths.len() {
            ensure!(
                scene.operations(slot)?[kind as usize] > 0,
                "slot {slot} saw no {}",
                kind.label()
            );
        }
    }
    scene.report(name)
}

#[test]
fn writes_through_a_disk_and_its_partitions() -> Result<()> {
    disk_and_partitions(
        "writes_through_a_disk_and_its_partitions",
        256 * 1024,
        [4 * KIB, 64 * KIB, 4 * KIB],
        |round| {
            if round.is_multiple_of(2) {
                During::Close
            } else {
                During::Nothing
            }
        },
    )
}

#[test]
fn writes_with_the_ring_kept_full() -> Result<()> {
    // The scene makes sure that each of these rounds found the ring full.
    disk_and_partitions(
        "writes_with_the_ring_kept_full",
        4096,
        [64 * KIB, 4 * KIB, 64 * KIB],
        |round| match round % 4 {
            0 => During::Close,
            1 => During::Nothing,
            _ => During::KeepRingFull,
        },
    )
}

/// Writes everywhere on a disk without a partition table, its first and last sector included.
fn whole_disk(name: &str, bytes: u64, sector_size: u32, block_size: u64) -> Result<()> {
    let seed = seed(name);
    let options = LoopOptions {
        sector_size,
        ..LoopOptions::default()
    };
    let mut scene = Scene::new(bytes, &options, 256 * 1024)?;
    let path = scene.disk().path().to_owned();
    scene.attach(&path, block_size)?;
    let mut node = Node::open(&path, 0)?;
    scene.begin()?;
    for round in 1..=scaled(30) {
        scene.round(During::Nothing, || {
            node.write(&mut generator(seed, round, 0), 100)?;
            node.write_edges(&mut generator(seed, round, 1))
        })?;
    }
    scene.report(name)
}

#[test]
fn a_disk_that_ends_within_a_block() -> Result<()> {
    whole_disk(
        "a_disk_that_ends_within_a_block",
        33 * MIB + 3 * 512,
        512,
        64 * KIB,
    )
}

#[test]
fn a_disk_of_large_sectors() -> Result<()> {
    whole_disk("a_disk_of_large_sectors", 33 * MIB + 12 * KIB, 4096, 4 * KIB)
}

/// A file system on the first partition, raw writes to the second one, and both partitions and the disk tracked.
fn file_system(kind: &str, bytes: u64, rounds: u64) -> Result<()> {
    let seed = seed(kind);
    let split = format!("{}s", (bytes - 24 * MIB) / 512);
    let after = format!("{}s", (bytes - 24 * MIB) / 512 + 1);
    let options = LoopOptions {
        partitions: vec![("2051s".to_owned(), split), (after, "100%".to_owned())],
        ..LoopOptions::default()
    };
    let mut scene = Scene::new(bytes, &options, 4096)?;
    let disk = scene.disk().path().to_owned();
    let (first, second) = (scene.disk().partition(1), scene.disk().partition(2));
    scene.attach(&disk, 64 * KIB)?;
    scene.attach(&first, 4 * KIB)?;
    scene.attach(&second, 4 * KIB)?;
    scene.begin()?;
    // Making the file system is a write like others.
    scene.round(During::Nothing, || {
        blksnap_tests::LoopDevice::mkfs_on(&first, kind)
    })?;
    let mut node = Node::open(&second, 0)?;
    let mut tree = Tree::new(scene.mount(1)?);
    for round in 1..=scaled(rounds) {
        let mut random = generator(seed, round, 0);
        let during = match round % 3 {
            0 => During::KeepRingFull,
            1 => During::Close,
            _ => During::Nothing,
        };
        // Sometimes the whole life of a mount is in the round.
        let mounts_anew = random.random_ratio(1, 4);
        if mounts_anew {
            scene.unmount()?;
        }
        scene.round_with(during, |disk| {
            if mounts_anew {
                tree.moved(disk.mount_partition(1)?);
            }
            std::thread::scope(|scope| {
                let raw = scope.spawn(|| node.write(&mut generator(seed, round, 1), 100));
                tree.change(&mut random, 150)?;
                raw.join().expect("the writer panicked")
            })?;
            if round.is_multiple_of(5) {
                disk.unmount()?;
                tree.moved(disk.mount_partition(1)?);
            }
            Ok(())
        })?;
    }
    let operations = scene.operations(1)?;
    ensure!(
        operations[OpKind::Write as usize] > scaled(1000),
        "{operations:?}"
    );
    ensure!(operations[OpKind::Discard as usize] > 0, "{operations:?}");
    scene.report(kind)
}

#[test]
fn ext4() -> Result<()> {
    file_system("ext4", 160 * MIB, 30)
}

#[test]
fn xfs() -> Result<()> {
    file_system("xfs", 352 * MIB, 20)
}

#[test]
fn btrfs() -> Result<()> {
    file_system("btrfs", 192 * MIB, 20)
}

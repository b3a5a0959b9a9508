//! Difference storage on real block devices and file systems: loop devices of our own.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do, by a panic")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use blksnap_agent::cow::{RegionId, Slot, SpaceEvent};
use blksnap_agent::disk::{BlockDevice, Disk as _, FileDisk, Zero};
use blksnap_agent::storage::{DeviceExtent, Pool, PoolOptions, StorageSpec};
use blksnap_agent::sys::ioctl;
use blksnap_agent::units::{DeviceId, Extent};
use blksnap_tests::{LoopDevice, LoopOptions, complain, read_device, run, seed, unmount};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

const CHUNK: u64 = 256 << 10;
const UNIT: usize = 4096;

fn pool(minimum: u64) -> (Pool, Receiver<u64>) {
    let (told, events) = channel();
    let options = PoolOptions {
        minimum,
        ..PoolOptions::default()
    };
    let pool = Pool::new(
        options,
        Arc::new(move |SpaceEvent::LowFreeSpace { requested }| told.send(requested).unwrap()),
    );
    (pool, events)
}

fn ranges(path: &Path, ranges: &[(u64, u64)]) -> StorageSpec {
    StorageSpec::Device {
        path: path.to_owned(),
        ranges: ranges
            .iter()
            .map(|&(offset, length)| Extent { offset, length })
            .collect(),
    }
}

fn refusal(spec: &StorageSpec) -> String {
    pool(0).0.append(spec).unwrap_err().to_string()
}

/// Takes slots until there are no more, or `most`, and writes a unit to each whose bytes say which it is.
fn fill(pool: &Pool, most: usize) -> Vec<(Slot, Vec<u8>)> {
    let mut filled = Vec::new();
    while filled.len() < most
        && let Ok(slot) = pool.slot(CHUNK, UNIT as u64)
    {
        let number = filled.len();
        let bytes: Vec<u8> = (0..UNIT)
            .map(|at| u8::try_from((number * 31 + at * 7) % 251 + 1).unwrap())
            .collect();
        pool.disk(slot.region).write_at(&bytes, slot.offset).unwrap();
        filled.push((slot, bytes));
    }
    filled
}

fn sector(extent: &DeviceExtent) -> std::ops::Range<usize> {
    let at = |sector: u64| usize::try_from(sector * 512).unwrap();
    at(extent.sector)..at(extent.sector + extent.count)
}

fn id_of(path: &Path) -> DeviceId {
    BlockDevice::open(path).unwrap().id
}

#[test]
fn a_device_is_a_disk() {
    let device = LoopDevice::new(4 << 20).unwrap();
    let disk = FileDisk::open(device.path(), true).unwrap();
    assert_eq!((disk.size(), disk.logical_block()), (4 << 20, 512));
    let mut random = StdRng::seed_from_u64(seed("a_device_is_a_disk"));
    let mut model = vec![0_u8; 4 << 20];
    for step in 0..300 {
        let block = [1, 512, 4096][random.random_range(0..3)];
        let start = random.random_range(0..model.len() / block) * block;
        let end = (start + random.random_range(0..200) * block).min(model.len());
        let (offset, length) = (start as u64, (end - start) as u64);
        match random.random_range(0..4) {
            0 | 1 => {
                let value = random.random();
                disk.write_at(&vec![value; end - start], offset).unwrap();
                model[start..end].fill(value);
            }
            2 => {
                let zero = [Zero::Deallocate, Zero::Keep][random.random_range(0..2)];
                disk.zero_at(offset, length, zero, false).unwrap();
                model[start..end].fill(0);
            }
            _ => {
                disk.discard_at(offset, length).unwrap();
                // Anything is right.
                disk.read_at(&mut model[start..end], offset).unwrap();
            }
        }
        let mut found = vec![1; model.len()];
        disk.read_at(&mut found, 0).unwrap();
        assert!(found == model, "it differs from memory after step {step}");
    }
    assert!(disk.read_at(&mut [0; 512], 4 << 20).is_err());
    disk.flush().unwrap();
    assert!(
        read_device(device.path()).unwrap() == model,
        "after a flush it is on the disk"
    );
}

#[test]
fn a_device_is_claimed_once_and_the_holder_is_named() {
    let mut device = LoopDevice::new(64 << 20).unwrap();
    let open = || FileDisk::open(device.path(), true).unwrap();
    let (first, second) = (open(), open());
    first.claim().unwrap();
    first.claim().unwrap();
    let error = second.claim().unwrap_err().to_string();
    assert!(error.contains("is in use") && error.contains("fuser"), "{error}");
    drop(first);
    second.claim().unwrap();
    drop(second);
    device.mkfs("ext4").unwrap();
    let target = device.mount().unwrap();
    let error = FileDisk::open(device.path(), false)
        .unwrap()
        .claim()
        .unwrap_err()
        .to_string();
    let mounted = format!("it is mounted at {}", target.display());
    assert!(error.contains(&mounted), "{error}");
    let refused = refusal(&ranges(device.path(), &[]));
    assert!(refused.contains(&mounted), "{refused}");
}

#[test]
fn qemu_and_we_keep_out_of_each_others_images() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.raw");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let disk = FileDisk::open(&path, true).unwrap();
    disk.claim().unwrap();
    let image = path.display().to_string();
    let arguments = ["-f", "raw", "-c", "write 0 512", &image];
    let error = run("qemu-io", arguments).unwrap_err().to_string();
    assert!(error.contains("lock"), "{error}");
    drop(disk);
    run("qemu-io", arguments).unwrap();
}

#[test]
fn ranges_of_a_device_take_what_is_theirs_and_nothing_else() {
    let device = LoopDevice::new(8 << 20).unwrap();
    let before = vec![0xee; 8 << 20];
    fs::write(device.path(), &before).unwrap();
    let (pool, _events) = pool(0);
    // Two chunks and a rest; one that is cut to whole blocks; the last one up to the end.
    let given = [
        (1 << 20, 2 * CHUNK + 8192),
        ((4 << 20) - 512, CHUNK + 4096 + 512),
        ((8 << 20) - CHUNK, CHUNK),
    ];
    pool.append(&ranges(device.path(), &given)).unwrap();
    let filled = fill(&pool, 100);
    assert_eq!(filled.len(), 4, "whole chunks only");
    pool.flush().unwrap();
    let mut model = before;
    for (slot, bytes) in &filled {
        let start = usize::try_from(slot.offset).unwrap();
        assert!(
            given
                .iter()
                .any(|(offset, length)| { *offset <= slot.offset && slot.offset + CHUNK <= offset + length })
        );
        model[start..start + UNIT].copy_from_slice(bytes);
    }
    assert!(read_device(device.path()).unwrap() == model);
    let id = id_of(device.path());
    let extent = |offset: u64, length: u64| DeviceExtent {
        device: id,
        sector: offset / 512,
        count: length / 512,
    };
    assert_eq!(
        pool.extents().unwrap(),
        [
            extent(1 << 20, 2 * CHUNK + 8192),
            extent(4 << 20, CHUNK + 4096),
            extent((8 << 20) - CHUNK, CHUNK)
        ]
    );
    // The pool has them.
    let twice = pool
        .append(&ranges(device.path(), &[(1 << 20, 4096)]))
        .unwrap_err();
    assert!(twice.to_string().contains("has some of them already"), "{twice}");
    for (wrong, why) in [
        (&[(0, 9 << 20)][..], "the device ends before"),
        (&[(0, 8192), (4096, 8192)][..], "another range has some of them"),
        (&[(512, 4096)][..], "no whole block"),
    ] {
        let refused = refusal(&ranges(device.path(), wrong));
        assert!(refused.contains(why), "{refused}");
    }
}

#[test]
fn a_whole_device_is_taken_for_us_alone_and_never_an_origin() {
    let device = LoopDevice::with_options(
        64 << 20,
        &LoopOptions {
            partitions: vec![
                ("1MiB".to_owned(), "31MiB".to_owned()),
                ("31MiB".to_owned(), "100%".to_owned()),
            ],
            ..LoopOptions::default()
        },
    )
    .unwrap();
    let (first, second) = (device.partition(1), device.partition(2));
    let origin = [BlockDevice::open(&first).unwrap()];
    let (ours, _events) = pool(0);
    for path in [device.path(), &first] {
        let refused = ours.append_beside(&ranges(path, &[]), &origin).unwrap_err();
        assert!(
            refused
                .to_string()
                .contains("a device to be snapshotted is on it"),
            "{refused}"
        );
    }
    ours.append_beside(&ranges(&second, &[]), &origin).unwrap();
    assert!(refusal(&ranges(&second, &[])).contains("is in use"));
    // Its own ranges are known to be free of it.
    ours.append_beside(&ranges(&first, &[(0, 1 << 20)]), &origin)
        .unwrap();
    let length = BlockDevice::open(&second).unwrap().capacity.bytes();
    assert_eq!(ours.usage().bytes, length / 4096 * 4096 + (1 << 20));
}

#[test]
fn a_larger_logical_block_than_the_origins_is_refused() {
    let options = LoopOptions {
        sector_size: 4096,
        ..LoopOptions::default()
    };
    let device = LoopDevice::with_options(8 << 20, &options).unwrap();
    let refused = refusal(&ranges(device.path(), &[]));
    assert!(
        refused.contains("its logical blocks have 4096 bytes, those of the device to be snapshotted 512"),
        "{refused}"
    );
    let options = PoolOptions {
        logical_block: 4096,
        ..PoolOptions::default()
    };
    let pool = Pool::new(options, Arc::new(|_| {}));
    pool.append(&ranges(device.path(), &[])).unwrap();
    assert_eq!(fill(&pool, 100).len(), 32);
}

/// A directory of its own on a file system of its own.
fn mounted(kind: &str, bytes: u64) -> (LoopDevice, PathBuf) {
    let mut device = LoopDevice::new(bytes).unwrap();
    device.mkfs(kind).unwrap();
    let target = device.mount().unwrap();
    (device, target)
}

fn directory(path: &Path, limit: Option<u64>) -> StorageSpec {
    StorageSpec::Directory {
        path: path.to_owned(),
        limit,
        keep: None,
    }
}

#[test]
fn the_extents_of_a_file_are_where_its_bytes_are() {
    for (kind, bytes) in [("ext4", 64 << 20), ("xfs", 400 << 20)] {
        let (device, target) = mounted(kind, bytes);
        let (pool, _events) = pool(1 << 20);
        pool.append(&directory(&target, Some(4 << 20))).unwrap();
        let filled = fill(&pool, 300);
        assert_eq!(filled.len(), 300, "{kind}");
        pool.flush().unwrap();
        let extents = pool.extents().unwrap();
        let content = read_device(device.path()).unwrap();
        assert!(extents.iter().all(|extent| extent.device == id_of(device.path())));
        let pages: std::collections::HashSet<&[u8]> = extents
            .iter()
            .flat_map(|extent| content[sector(extent)].chunks(UNIT))
            .collect();
        for (slot, bytes) in &filled {
            assert!(
                pages.contains(&bytes[..]),
                "{kind}: {slot:?} is not in the extents"
            );
        }
        let total: u64 = extents.iter().map(|extent| extent.count * 512).sum();
        assert!(total < 4 << 20, "{kind}: {total} bytes for 300 units");
    }
}

#[test]
fn a_file_system_without_addresses_of_its_device_says_so() {
    let (_device, target) = mounted("btrfs", 200 << 20);
    let (pool, _events) = pool(1 << 20);
    pool.append(&directory(&target, None)).unwrap();
    assert_eq!(fill(&pool, 20).len(), 20);
    pool.flush().unwrap();
    let refused = pool.extents().unwrap_err().to_string();
    assert!(refused.contains("is on btrfs, which does not tell"), "{refused}");
}

#[test]
fn a_file_system_is_never_filled() {
    for (kind, bytes) in [("ext4", 64 << 20), ("xfs", 400 << 20)] {
        let (_device, target) = mounted(kind, bytes);
        let (_other, elsewhere) = mounted("ext4", 64 << 20);
        let (pool, events) = pool(8 << 20);
        pool.append(&directory(&target, None)).unwrap();
        // Somebody else fills most of it.
        let space = || nix::sys::statvfs::statvfs(&target).unwrap();
        let free = |space: &nix::sys::statvfs::Statvfs| space.blocks_available() * space.fragment_size();
        let ballast = File::create(target.join("ballast")).unwrap();
        let length = free(&space()) - (free(&space()) / 4).max(16 << 20);
        let fallocate = |length| {
            let flags = nix::fcntl::FallocateFlags::empty();
            nix::fcntl::fallocate(&ballast, flags, 0, i64::try_from(length).unwrap()).unwrap();
        };
        fallocate(length);
        let filled = fill(&pool, usize::MAX);
        let now = space();
        let reserve = now.blocks() * now.fragment_size() / 20;
        assert!(!filled.is_empty());
        assert!(
            free(&now) > reserve / 2 && free(&now) < reserve + (8 << 20),
            "{kind}: {} bytes are left, {reserve} are to be",
            free(&now)
        );
        let used = pool.usage().used;
        assert_eq!(pool.slot(CHUNK, UNIT as u64).unwrap_err().used, used);
        // What was promised could be written, all of it.
        pool.flush().unwrap();
        for (slot, bytes) in &filled {
            let mut found = vec![0; UNIT];
            pool.disk(slot.region).read_at(&mut found, slot.offset).unwrap();
            assert!(found == *bytes, "{kind}: {slot:?}");
        }
        assert!(events.try_iter().count() > 1, "{kind}");
        // Another place goes on from there, once what the file system found while writing is used up.
        pool.append(&directory(&elsewhere, Some(1 << 20))).unwrap();
        let more = fill(&pool, usize::MAX);
        let elsewhere = more.iter().filter(|(slot, _)| slot.region == RegionId::new(1));
        assert_eq!(elsewhere.count(), 256, "{kind}");
        // And so does this one, as soon as it can.
        nix::unistd::ftruncate(&ballast, 0).unwrap();
        ballast.sync_all().unwrap();
        pool.extend(filled[0].0, UNIT as u64).unwrap();
    }
}

#[test]
fn a_full_or_foreign_file_system_is_refused_at_once() {
    let (_device, target) = mounted("ext4", 32 << 20);
    let space = nix::sys::statvfs::statvfs(&target).unwrap();
    let ballast = File::create(target.join("ballast")).unwrap();
    let length = space.blocks_available() * space.fragment_size() - (1 << 20);
    let flags = nix::fcntl::FallocateFlags::empty();
    nix::fcntl::fallocate(&ballast, flags, 0, i64::try_from(length).unwrap()).unwrap();
    let refused = refusal(&directory(&target, None));
    assert!(refused.contains("are kept free"), "{refused}");
    drop(ballast);
}

#[test]
fn memory_file_systems_are_bounded_too() {
    let place = tempfile::tempdir().unwrap();
    run(
        "mount",
        [
            "-t",
            "tmpfs",
            "-o",
            "size=8M",
            "tmpfs",
            &place.path().display().to_string(),
        ],
    )
    .unwrap();
    let (pool, _events) = pool(1 << 20);
    let appended = pool.append(&directory(place.path(), None));
    let filled = fill(&pool, usize::MAX).len();
    drop(pool);
    blksnap_tests::unmount(place.path()).unwrap();
    appended.unwrap();
    let most = (8 << 20) * 19 / 20 / UNIT;
    assert!((most - 300..=most + 1).contains(&filled), "{filled} of {most}");
}

/// A file system for as long as it lives.
struct SmallMemory(tempfile::TempDir);

impl SmallMemory {
    fn new(size: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let options = format!("size={size}");
        let arguments = ["-t".as_ref(), "tmpfs".as_ref(), "-o".as_ref(), options.as_ref()];
        let node: [&std::ffi::OsStr; 2] = ["blksnap-test".as_ref(), directory.path().as_os_str()];
        run("mount", arguments.into_iter().chain(node)).unwrap();
        Self(directory)
    }
}

impl Drop for SmallMemory {
    fn drop(&mut self) {
        if let Err(error) = unmount(self.0.path()) {
            complain(format_args!("{error:#}"));
        }
    }
}

/// A disk that fails after a write was answered, when the kernel writes its page cache back: a page that is dropped
/// then is read again with what was on the disk before, which is not what was kept.
#[test]
fn what_the_disk_did_not_take_is_never_read() {
    let memory = SmallMemory::new("64k");
    let backing = memory.0.path().join("disk");
    File::create(&backing).unwrap().set_len(8 << 20).unwrap();
    let device = LoopDevice::on(&backing, &LoopOptions::default()).unwrap();
    let (pool, _) = pool(0);
    pool.append(&ranges(device.path(), &[])).unwrap();
    let kept = fill(&pool, usize::MAX);
    let node = File::open(device.path()).unwrap();
    node.sync_all().unwrap_err();
    ioctl::blkflsbuf(&node).unwrap();
    let (mut lost, mut older) = (0, 0);
    let on_disk = read_device(device.path()).unwrap();
    for (slot, bytes) in &kept {
        let at = usize::try_from(slot.offset).unwrap();
        older += u32::from(on_disk[at..at + UNIT] != **bytes);
        let mut found = vec![0; UNIT];
        match pool.disk(slot.region).read_at(&mut found, slot.offset) {
            Ok(()) => assert!(found == *bytes, "other bytes than those kept at {}", slot.offset),
            Err(_) => lost += 1,
        }
    }
    assert!(
        older > 0 && lost >= older,
        "{lost} refused, {older} not on the disk, of {}",
        kept.len()
    );
    let (slot, bytes) = &kept[0];
    pool.disk(slot.region).write_at(bytes, slot.offset).unwrap_err();
}

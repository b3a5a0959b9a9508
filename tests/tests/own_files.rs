//! Files as difference storage on the device that they are on: where their bytes are, and that they stay there.
//!
//! The device is a loop device, of a file whose bytes are compared with what the file system says.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do, by a panic")]

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use blksnap_agent::disk::{BlockDevice, extents};
use blksnap_agent::own::{self, Candidate, Helper, Kept, Make, On};
use blksnap_agent::sys::{flags, fsmap};
use blksnap_agent::units::Extent;
use blksnap_tests::{LoopDevice, LoopOptions, agent_binary, run, seed};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 400 * MIB;

/// A device with two partitions, on the second of which there is a file system.
struct Scene {
    device: LoopDevice,
    mount: PathBuf,
}

impl Scene {
    fn new(kind: &str) -> Self {
        let partitions = [("1MiB", "33MiB"), ("33MiB", "100%")];
        let mut device = LoopDevice::with_options(
            SIZE,
            &LoopOptions {
                partitions: partitions
                    .map(|(start, end)| (start.to_owned(), end.to_owned()))
                    .to_vec(),
                ..LoopOptions::default()
            },
        )
        .unwrap();
        LoopDevice::mkfs_on(&device.partition(2), kind).unwrap();
        let mount = device.mount_partition(2).unwrap();
        Self { device, mount }
    }

    fn served(&self) -> Vec<Candidate> {
        vec![Candidate {
            name: "disk".to_owned(),
            id: BlockDevice::open(self.device.path()).unwrap().id,
        }]
    }

    /// Where the file system begins.
    fn start(&self) -> u64 {
        let directory = File::open(&self.mount).unwrap();
        match own::find(&directory, &self.served()).unwrap() {
            On::Served { device, start } if device == "disk" => start,
            other => panic!("{other:?}"),
        }
    }

    /// Bytes of the device, from beneath it.
    fn beneath(&self, range: &Extent) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(range.length).unwrap()];
        let file = File::open(self.device.image()).unwrap();
        file.read_exact_at(&mut bytes, range.offset).unwrap();
        bytes
    }

    /// All that loop device and file system have is in the file of the device.
    fn sync(&self) {
        run("sync", [Path::new("-f"), &self.mount]).unwrap();
        run("blockdev", [Path::new("--flushbufs"), self.device.path()]).unwrap();
    }

    /// Writes files and removes every second, so that what comes next is in pieces.
    fn tatter(&mut self, random: &mut StdRng) {
        for number in 0..60 {
            let bytes = vec![random.random(); random.random_range(1..400) * 1024];
            fs::write(self.mount.join(format!("f{number}")), bytes).unwrap();
        }
        self.sync();
        for number in (0..60).step_by(2) {
            fs::remove_file(self.mount.join(format!("f{number}"))).unwrap();
        }
        // XFS frees the blocks of what was removed later, in the background (`xfs_inodegc_worker`), at the latest here.
        self.device.unmount().unwrap();
        self.mount = self.device.mount_partition(2).unwrap();
    }
}

fn moved(ranges: &[Extent], by: u64) -> Vec<Extent> {
    ranges
        .iter()
        .map(|range| Extent {
            offset: range.offset + by,
            length: range.length,
        })
        .collect()
}

fn fresh(path: PathBuf, length: u64) -> Make {
    Make {
        path,
        length: Some(length),
        fresh: Some(4096),
        free: None,
    }
}

fn as_it_is(path: &Path) -> Make {
    Make {
        path: path.to_owned(),
        length: None,
        fresh: None,
        free: None,
    }
}

fn extents_are_where_the_bytes_are(kind: &str) {
    let mut scene = Scene::new(kind);
    let mut random = StdRng::seed_from_u64(seed(kind));
    assert_eq!(scene.start(), 33 * MIB);
    scene.tatter(&mut random);
    // A file that somebody writes, in an order of his own.
    let path = scene.mount.join("written");
    let mut content = vec![0_u8; 9 << 20];
    random.fill(&mut content[..]);
    let file = File::create_new(&path).unwrap();
    let mut pieces: Vec<usize> = (0..content.len() / 65536).collect();
    while !pieces.is_empty() {
        let piece = pieces.swap_remove(random.random_range(0..pieces.len())) * 65536;
        file.write_all_at(&content[piece..piece + 65536], piece as u64)
            .unwrap();
        if random.random_range(0..10) == 0 {
            file.sync_all().unwrap();
        }
    }
    drop(file);
    let made = own::make(&as_it_is(&path)).unwrap();
    scene.sync();
    let on_device = moved(&made.ranges, scene.start());
    let found: Vec<u8> = on_device.iter().flat_map(|range| scene.beneath(range)).collect();
    assert!(
        found == content,
        "{kind}: the bytes are elsewhere than {on_device:?}"
    );
    assert!(!made.created);
    // The same by the other way, for marks: on the disk, and on the partition.
    let disk = BlockDevice::open(scene.device.path()).unwrap();
    let partition = BlockDevice::open(&scene.device.partition(2)).unwrap();
    assert_eq!(
        extents::of_file(&disk, &path).unwrap(),
        extents::joined(on_device.clone())
    );
    assert_eq!(
        extents::of_file(&partition, &path).unwrap(),
        extents::joined(made.ranges.clone())
    );
    // Nobody changes it any more.
    for refused in [
        OpenOptions::new().write(true).open(&path).map(drop),
        fs::remove_file(&path),
        fs::rename(&path, scene.mount.join("other")),
    ] {
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EPERM));
    }
    // Nor moves it.
    let (mover, option) = match kind {
        "xfs" => ("xfs_fsr", "-v"),
        _ => ("e4defrag", "-v"),
    };
    let _ = run(mover, [Path::new(option), &path]);
    assert_eq!(own::ranges(&path).unwrap(), made.ranges);
    let kept = Kept {
        path: path.clone(),
        created: false,
        device: "disk".to_owned(),
    };
    assert_eq!(own::release(std::slice::from_ref(&kept), &scene.served()), []);
    assert!(OpenOptions::new().write(true).open(&path).is_ok());
    assert_eq!(own::release(&[kept], &scene.served()), [], "a second time");
}

fn a_new_file_is_allocated_and_reads_as_zeroes(kind: &str) {
    let mut scene = Scene::new(kind);
    let mut random = StdRng::seed_from_u64(seed(kind));
    scene.tatter(&mut random);
    let path = scene.mount.join("new.diff");
    let before = fsmap::free_ranges(&File::open(&scene.mount).unwrap(), 4096).unwrap();
    let made = own::make(&Make {
        free: Some(4096),
        ..fresh(path.clone(), 40 * MIB)
    })
    .unwrap();
    assert!(made.created);
    assert_eq!(
        made.ranges.iter().map(|range| range.length).sum::<u64>(),
        40 * MIB
    );
    // Of a file in many pieces ext4 counts the blocks of its tree of extents, too.
    let counted = fs::metadata(&path).unwrap().blocks() * 512;
    assert!((40 * MIB..41 * MIB).contains(&counted), "{counted} bytes");
    // What was free is told, and the file has some of that.
    assert_eq!(made.free, before);
    for range in &made.ranges {
        assert!(
            before
                .iter()
                .any(|free| free.offset <= range.offset && range.end() <= free.end()),
            "{range:?} was not free"
        );
    }
    // Something else is written beneath it: nobody sees it in the file system, and nobody is hurt.
    let untouched = fs::read(scene.mount.join("f1")).unwrap();
    let image = OpenOptions::new().write(true).open(scene.device.image()).unwrap();
    for range in moved(&made.ranges, scene.start()) {
        image
            .write_all_at(&vec![0xa5; usize::try_from(range.length).unwrap()], range.offset)
            .unwrap();
    }
    run("blockdev", [Path::new("--flushbufs"), scene.device.path()]).unwrap();
    assert!(fs::read(&path).unwrap().iter().all(|byte| *byte == 0));
    assert_eq!(fs::read(scene.mount.join("f1")).unwrap(), untouched);
    let again = own::make(&fresh(path.clone(), MIB)).unwrap_err();
    assert!(again.contains("can't create"), "{again}");
    let kept = Kept {
        path: path.clone(),
        created: true,
        device: "disk".to_owned(),
    };
    // Not while its device is not the one that is mounted there.
    let others = [Candidate {
        name: "disk".to_owned(),
        id: blksnap_agent::units::DeviceId { major: 8, minor: 999 },
    }];
    let only = std::slice::from_ref(&kept);
    assert_eq!(own::release(only, &others), only);
    assert!(path.exists());
    assert_eq!(own::release(only, &scene.served()), []);
    assert!(!path.exists());
    let mut device = scene.device;
    device.unmount().unwrap();
    let check = if kind == "xfs" { "xfs_repair" } else { "fsck.ext4" };
    let options = if kind == "xfs" { "-n" } else { "-fn" };
    run(check, [Path::new(options), &device.partition(2)]).unwrap();
}

fn what_can_not_be_storage_says_why(kind: &str) {
    let scene = Scene::new(kind);
    let refusal = |make: &Make| own::make(make).unwrap_err();
    let path = |name: &str| scene.mount.join(name);
    // Holes.
    let holes = path("holes");
    File::create(&holes).unwrap().set_len(8 * MIB).unwrap();
    let why = refusal(&as_it_is(&holes));
    assert!(
        why.contains("it has holes; make a new one with `fallocate"),
        "{why}"
    );
    // A refused file is as it was.
    assert!(!flags::is_immutable(&File::open(&holes).unwrap()).unwrap());
    // Filled, it is one.
    let filled = own::make(&Make {
        length: Some(8 * MIB),
        ..as_it_is(&holes)
    })
    .unwrap();
    assert!(!filled.created && filled.ranges.iter().map(|range| range.length).sum::<u64>() == 8 * MIB);
    // Somebody has it already, or it is nothing.
    assert!(refusal(&as_it_is(&holes)).contains("can't open"));
    File::create(path("empty")).unwrap();
    assert!(refusal(&as_it_is(&path("empty"))).contains("has no bytes to be used"));
    assert!(refusal(&as_it_is(&scene.mount)).contains("can't open"));
    // Too long, or all that there is: something stays free.
    let why = refusal(&Make {
        fresh: None,
        ..fresh(path("long"), SIZE)
    });
    assert!(why.contains("are kept free; free some space"), "{why}");
    assert!(!path("long").exists());
    let most = own::make(&fresh(path("most"), SIZE)).unwrap();
    let has = most.ranges.iter().map(|range| range.length).sum::<u64>();
    assert!(has > SIZE / 2 && has < SIZE * 19 / 20, "{has}");
    let kept = |name: &str| Kept {
        path: path(name),
        created: true,
        device: "disk".to_owned(),
    };
    assert_eq!(own::release(&[kept("most"), kept("holes")], &scene.served()), []);
    if kind == "xfs" {
        fs::write(path("one"), vec![7; 1 << 20]).unwrap();
        run("cp", [Path::new("--reflink=always"), &path("one"), &path("two")]).unwrap();
        let why = refusal(&as_it_is(&path("two")));
        assert!(why.contains("other files share blocks with it"), "{why}");
    }
}

#[test]
fn ext4_says_where_its_files_are() {
    extents_are_where_the_bytes_are("ext4");
}

#[test]
fn xfs_says_where_its_files_are() {
    extents_are_where_the_bytes_are("xfs");
}

#[test]
fn a_file_of_ext4_is_allocated_and_let_go() {
    a_new_file_is_allocated_and_reads_as_zeroes("ext4");
}

#[test]
fn a_file_of_xfs_is_allocated_and_let_go() {
    a_new_file_is_allocated_and_reads_as_zeroes("xfs");
}

#[test]
fn ext4_refuses_what_can_not_be_storage() {
    what_can_not_be_storage_says_why("ext4");
}

#[test]
fn xfs_refuses_what_can_not_be_storage() {
    what_can_not_be_storage_says_why("xfs");
}

#[test]
fn btrfs_is_refused_everywhere_and_left_as_it_was() {
    let scene = Scene::new("btrfs");
    assert_eq!(scene.start(), 33 * MIB);
    let path = scene.mount.join("new.diff");
    let why = own::make(&fresh(path.clone(), MIB)).unwrap_err();
    assert!(
        why.contains("is on btrfs, which does not tell where on the device its files are"),
        "{why}"
    );
    assert!(!path.exists());
    fs::write(&path, vec![1; 1 << 20]).unwrap();
    let disk = BlockDevice::open(scene.device.path()).unwrap();
    let marks = extents::of_file(&disk, &path).unwrap_err().to_string();
    assert!(own::make(&as_it_is(&path)).unwrap_err() == marks, "{marks}");
    fs::write(&path, b"it can be written").unwrap();
}

#[test]
fn what_stands_on_the_device_is_told_from_what_is_on_it() {
    let scene = Scene::new("ext4");
    let inner = scene.mount.join("inner.img");
    File::create(&inner).unwrap().set_len(64 * MIB).unwrap();
    let mut stacked = LoopDevice::on(&inner, &LoopOptions::default()).unwrap();
    stacked.mkfs("ext4").unwrap();
    let mount = stacked.mount().unwrap();
    let file = File::open(&mount).unwrap();
    assert_eq!(
        own::find(&file, &scene.served()).unwrap(),
        On::Above {
            device: "disk".to_owned(),
            source: stacked.path().display().to_string(),
        }
    );
    drop(file);
    let elsewhere = File::open("/proc").unwrap();
    assert_eq!(own::find(&elsewhere, &scene.served()).unwrap(), On::Elsewhere);
    // By the process that the agent asks.
    let helper = Helper {
        program: agent_binary().unwrap(),
        arguments: vec![own::SUBCOMMAND.into()],
    };
    let link = tempfile::tempdir().unwrap();
    let link = link.path().join("link");
    std::os::unix::fs::symlink(&scene.mount, &link).unwrap();
    let looked = helper
        .look(&format!("{},limit=1M", link.display()), &scene.served())
        .unwrap();
    assert_eq!(
        looked.spec.to_string(),
        format!("{},limit=1048576", scene.mount.display())
    );
    assert!(matches!(looked.on, On::Served { .. }), "{looked:?}");
    let made = helper.make(fresh(scene.mount.join("made"), MIB)).unwrap();
    assert_eq!(helper.ranges(&scene.mount.join("made")).unwrap(), made.ranges);
    let kept = Kept {
        path: scene.mount.join("made"),
        created: true,
        device: "disk".to_owned(),
    };
    assert_eq!(helper.release(&[kept], &scene.served()).unwrap(), []);
    let refused = helper.look("/no/such/place/at/all", &scene.served()).unwrap_err();
    assert!(
        refused.to_string().contains("can't open /no/such/place/at"),
        "{refused}"
    );
}

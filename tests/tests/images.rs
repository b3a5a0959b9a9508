//! Images: byte for byte the device at the instant, under load; and what happens when there can't be one.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do, by a panic")]

use std::any::Any;
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use blksnap_agent::cbt::{Base, TrackingParams};
use blksnap_agent::disk::{BlockDevice, DirectReader, WatchdogCommand};
use blksnap_agent::engine::{CancelToken, Silent};
use blksnap_agent::filter::converge::{Consistency, ConvergeError, FreezeHook, HookError, Limits, Stage};
use blksnap_agent::snapshot::{
    Content, HoldOptions, HoldPlace, Image, Info, Member, MemberId, SnapshotError, Snapshots, State,
    TakeOptions,
};
use blksnap_agent::storage::StorageSpec;
use blksnap_agent::sys::AlignedBuffer;
use blksnap_agent::tracker::{Granularity, Tracker, TrackerConfig};
use blksnap_agent::units::{BlockSize, DeviceId};
use blksnap_tests::{LoopDevice, LoopOptions, Pace, Writer, Zram, agent_binary, run, seed};
use nix::errno::Errno;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

const MIB: u64 = 1 << 20;

/// Bound against hanging for ever; the hook copies whole devices while they are frozen.
const PATIENCE: Duration = Duration::from_secs(60);

fn limits() -> Limits {
    Limits {
        freeze_limit: PATIENCE,
        watchdog: WatchdogCommand {
            program: agent_binary().unwrap(),
            arguments: vec!["thaw-watchdog".into()],
        },
        ..Limits::default()
    }
}

/// Copies the devices when they are frozen. Raw writers begin no write from then on, until it is dropped: on a busy
/// machine the copy takes longer than any pause of theirs, and a write while it runs asks for another one.
#[derive(Debug, Default)]
struct Witness {
    hold: Vec<Arc<AtomicBool>>,
    copies: Mutex<HashMap<PathBuf, Vec<u8>>>,
    stages: Mutex<Vec<Stage>>,
}

impl Witness {
    /// One for takes of these devices.
    fn of<'a>(busy: impl IntoIterator<Item = &'a Busy>) -> Arc<Self> {
        let writers = busy.into_iter().flat_map(|busy| &busy.writers);
        Arc::new(Self {
            hold: writers.map(Writer::hold).collect(),
            copies: Mutex::default(),
            stages: Mutex::default(),
        })
    }
}

impl FreezeHook for Witness {
    fn run(&self, stage: Stage, devices: &[PathBuf], _deadline: Instant) -> Result<(), HookError> {
        self.stages.lock().unwrap().push(stage);
        if stage == Stage::Frozen {
            for writer in &self.hold {
                writer.store(true, Ordering::Release);
            }
            let mut copies = self.copies.lock().unwrap();
            for path in devices {
                copies.insert(path.clone(), content(path));
            }
        }
        Ok(())
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        for writer in &self.hold {
            writer.store(false, Ordering::Release);
        }
    }
}

/// All bytes of a device.
fn content(path: &Path) -> Vec<u8> {
    let reader = DirectReader::open(&BlockDevice::open(path).unwrap()).unwrap();
    let mut bytes = Vec::with_capacity(usize::try_from(reader.length()).unwrap());
    let mut buffer = AlignedBuffer::zeroed(4 << 20);
    while (bytes.len() as u64) < reader.length() {
        let left = reader.length() - bytes.len() as u64;
        let count = usize::try_from(left).unwrap().min(buffer.len());
        reader.read(&mut buffer, bytes.len() as u64, count).unwrap();
        bytes.extend_from_slice(&buffer.as_slice()[..count]);
    }
    bytes
}

/// First byte that differs.
fn difference(one: &[u8], other: &[u8]) -> Option<usize> {
    assert_eq!(one.len(), other.len());
    let chunk = one
        .chunks(4096)
        .zip(other.chunks(4096))
        .position(|(a, b)| a != b)?;
    let at = chunk * 4096;
    Some(
        at + one[at..]
            .iter()
            .zip(&other[at..])
            .take_while(|(a, b)| a == b)
            .count(),
    )
}

fn image_bytes(image: &Image) -> Vec<u8> {
    let Content::Copy(file) = &image.content else {
        panic!("{image:?} is no copy");
    };
    let mut bytes = vec![0; usize::try_from(image.size).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn directory(path: &Path) -> Vec<StorageSpec> {
    vec![StorageSpec::Directory {
        path: path.to_owned(),
        limit: None,
        keep: None,
    }]
}

/// Snapshots end with their agent.
fn nowhere() -> HoldPlace {
    HoldPlace {
        directory: None,
        boot: String::new(),
    }
}

/// A tracker, snapshots and a directory for them.
struct Bench {
    tracker: Arc<Tracker>,
    snapshots: Snapshots,
    storage: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let tracker = Tracker::load(&TrackerConfig::default()).unwrap();
        Self {
            snapshots: Snapshots::new(Arc::clone(&tracker), nowhere()),
            tracker,
            storage: tempfile::Builder::new()
                .prefix("blksnap-storage-")
                .tempdir()
                .unwrap(),
        }
    }

    fn attach(&self, path: &Path, granularity: Granularity) -> DeviceId {
        let device = BlockDevice::open(path).unwrap();
        self.tracker.attach(device, granularity).unwrap().device().id
    }

    fn attach_default(&self, path: &Path) -> DeviceId {
        self.attach(path, Granularity::Adaptive(TrackingParams::default()))
    }

    fn member(&self, id: DeviceId) -> Member {
        Member::Tracked(self.tracker.device(id).unwrap().device().clone())
    }

    fn create_in(&self, devices: &[DeviceId], storage: &Path) -> Info {
        let members = devices.iter().map(|id| self.member(*id)).collect();
        self.snapshots
            .create(members, directory(storage), HoldOptions::default())
            .unwrap()
    }

    fn create(&self, devices: &[DeviceId]) -> Info {
        self.create_in(devices, self.storage.path())
    }

    fn image(&self, info: &Info, id: DeviceId) -> Result<Arc<Image>, SnapshotError> {
        self.snapshots.image(info.id, &MemberId::Device(id))
    }

    fn take(
        &self,
        info: &Info,
        limits: Limits,
        hook: Option<Arc<dyn FreezeHook>>,
    ) -> Result<Info, SnapshotError> {
        let options = TakeOptions { limits, hook };
        self.snapshots
            .take(info.id, options, Arc::new(Silent), CancelToken::new())
    }

    fn assert_storage_empty(&self) {
        assert_eq!(std::fs::read_dir(self.storage.path()).unwrap().count(), 0);
    }
}

/// A device that is written all the time.
struct Busy {
    name: &'static str,
    node: PathBuf,
    consistency: Consistency,
    /// Stopped before the device goes.
    writers: Vec<Writer>,
    /// What cleans up.
    _device: Box<dyn Any + Send + Sync>,
}

/// A file system on a zram device, whose driver works on bios: they end at another tracepoint than requests.
struct MountedZram {
    zram: Zram,
    mountpoint: tempfile::TempDir,
}

impl MountedZram {
    fn new(bytes: u64) -> Self {
        let this = Self {
            zram: Zram::new(bytes).unwrap(),
            mountpoint: tempfile::tempdir().unwrap(),
        };
        LoopDevice::mkfs_on(&this.zram.path(), "ext4").unwrap();
        run("mount", [&*this.zram.path(), this.mountpoint.path()]).unwrap();
        this
    }
}

impl Drop for MountedZram {
    fn drop(&mut self) {
        if let Err(error) = run("umount", [self.mountpoint.path()]) {
            eprintln!("{error:#}");
        }
    }
}

impl Busy {
    fn file_system(kind: &'static str, bytes: u64, seed: u64) -> Self {
        let mut device = LoopDevice::new(bytes).unwrap();
        device.mkfs(kind).unwrap();
        let mountpoint = device.mount().unwrap();
        Self {
            name: kind,
            node: device.path().to_owned(),
            consistency: Consistency::FileSystem,
            writers: vec![Writer::files(&mountpoint, seed)],
            _device: Box::new(device),
        }
    }

    /// The second of two partitions; the first one is written past any file system, without a pause.
    fn partition(seed: u64) -> Self {
        let parts = [("1MiB", "33MiB"), ("33MiB", "100%")];
        let options = LoopOptions {
            partitions: parts
                .map(|(start, end)| (start.to_owned(), end.to_owned()))
                .to_vec(),
            ..LoopOptions::default()
        };
        let mut device = LoopDevice::with_options(100 * MIB, &options).unwrap();
        LoopDevice::mkfs_on(&device.partition(2), "ext4").unwrap();
        let mountpoint = device.mount_partition(2).unwrap();
        let pace = Pace {
            burst: 1,
            pause: Duration::from_millis(2),
        };
        Self {
            name: "partition",
            node: device.partition(2),
            consistency: Consistency::FileSystem,
            writers: vec![
                Writer::files(&mountpoint, seed),
                Writer::raw(&device.partition(1), seed + 1, pace),
            ],
            _device: Box::new(device),
        }
    }

    fn zram(seed: u64) -> Self {
        let device = MountedZram::new(64 * MIB);
        Self {
            name: "zram",
            node: device.zram.path(),
            consistency: Consistency::FileSystem,
            writers: vec![Writer::files(device.mountpoint.path(), seed)],
            _device: Box::new(device),
        }
    }

    fn raw(seed: u64, sector_size: u32) -> Self {
        let options = LoopOptions {
            sector_size,
            ..LoopOptions::default()
        };
        let device = LoopDevice::with_options(48 * MIB, &options).unwrap();
        let pace = Pace {
            burst: 60,
            pause: Duration::from_millis(400),
        };
        Self {
            name: "raw",
            node: device.path().to_owned(),
            consistency: Consistency::Crash,
            writers: vec![Writer::raw(device.path(), seed, pace)],
            _device: Box::new(device),
        }
    }
}

#[test]
fn images_are_the_devices_at_the_instant() {
    let seed = seed("images_are_the_devices_at_the_instant");
    let mut rng = StdRng::seed_from_u64(seed);
    let bench = Bench::new();
    let busy = [
        Busy::file_system("ext4", 64 * MIB, seed),
        Busy::file_system("xfs", 300 * MIB, seed + 10),
        Busy::file_system("btrfs", 128 * MIB, seed + 20),
        Busy::partition(seed + 30),
        Busy::raw(seed + 40, 0),
        Busy::raw(seed + 50, 4096),
        Busy::zram(seed + 60),
    ];
    let ids: Vec<DeviceId> = busy
        .iter()
        .map(|busy| {
            let shift = *[12, 14, 16].choose(&mut rng).unwrap();
            bench.attach(
                &busy.node,
                Granularity::Fixed(BlockSize::from_shift(shift).unwrap()),
            )
        })
        .collect();
    let mut earlier: HashMap<PathBuf, (Base, Vec<u8>)> = HashMap::new();
    for round in 0..20 {
        // One device, or several at one instant.
        let count = if round % 3 == 0 {
            1
        } else {
            rng.random_range(2..=3)
        };
        let chosen: Vec<usize> = rand::seq::index::sample(&mut rng, busy.len(), count).into_vec();
        for index in &chosen {
            busy[*index].writers[0].wait_for(1);
        }
        let devices: Vec<DeviceId> = chosen.iter().map(|index| ids[*index]).collect();
        let snapshot = bench.create(&devices);
        let witness = Witness::of(chosen.iter().map(|index| &busy[*index]));
        let info = bench
            .take(&snapshot, limits(), Some(Arc::clone(&witness) as _))
            .unwrap_or_else(|error| panic!("round {round}, seed {seed}: {error}"));
        assert_eq!((info.state, info.images.len()), (State::Taken, chosen.len()));
        let mut copies = std::mem::take(&mut *witness.copies.lock().unwrap());
        drop(witness);
        for (index, image) in chosen.iter().zip(&info.images) {
            let busy = &busy[*index];
            let name = format!("{} in round {round}, seed {seed}", busy.name);
            let copy = copies.remove(&busy.node).expect("the hook copied each device");
            let bytes = image_bytes(image);
            assert_eq!(difference(&bytes, &copy), None, "{name}: first difference");
            assert_eq!(image.consistency, busy.consistency, "{name}");
            check_changes(&mut earlier, image, copy, &name);
        }
        println!(
            "round {round}: {:?}, frozen {:?}, {} rounds",
            chosen.iter().map(|index| busy[*index].name).collect::<Vec<_>>(),
            info.images[0].frozen,
            info.images[0].rounds
        );
        // The writers go on.
        busy[chosen[0]].writers[0].wait_for(1);
        bench.snapshots.destroy(info.id).unwrap();
    }
    bench.assert_storage_empty();
}

/// Everything that differs from the instant before is among what the map says.
fn check_changes(earlier: &mut HashMap<PathBuf, (Base, Vec<u8>)>, image: &Image, copy: Vec<u8>, name: &str) {
    let map = image.read_map.as_ref().expect("no doubt");
    if let Some((base, before)) = earlier.get(image.member.path())
        && base.generation == map.generation()
    {
        let mut same = before.clone();
        for extent in map.changed_since(base).unwrap() {
            let range = usize::try_from(extent.offset).unwrap()..usize::try_from(extent.end()).unwrap();
            same[range.clone()].copy_from_slice(&copy[range]);
        }
        assert_eq!(
            difference(&same, &copy),
            None,
            "{name}: a change was not reported"
        );
    }
    earlier.insert(image.member.path().to_owned(), (map.base(), copy));
}

#[test]
fn several_snapshots_of_a_device_hold_their_instants() {
    let seed = seed("several_snapshots_of_a_device_hold_their_instants");
    let bench = Bench::new();
    let busy = Busy::file_system("ext4", 64 * MIB, seed);
    let id = bench.attach_default(&busy.node);
    let mut held = Vec::new();
    for _ in 0..3 {
        busy.writers[0].wait_for(20);
        let witness = Arc::new(Witness::default());
        let info = bench
            .take(&bench.create(&[id]), limits(), Some(Arc::clone(&witness) as _))
            .unwrap();
        let stages = witness.stages.lock().unwrap().clone();
        assert_eq!(
            (stages[0], stages[stages.len() - 1]),
            (Stage::Freeze, Stage::Thaw)
        );
        let copy = witness.copies.lock().unwrap().remove(&busy.node).unwrap();
        held.push((info, copy));
    }
    assert_eq!(bench.snapshots.list().len(), 3);
    for (info, copy) in &held {
        let image = bench.image(info, id).unwrap();
        assert_eq!(difference(&image_bytes(&image), copy), None);
        bench.snapshots.destroy(info.id).unwrap();
        // The reader still has it.
        assert_eq!(difference(&image_bytes(&image), copy), None);
    }
    assert!(bench.snapshots.list().is_empty());
}

#[test]
fn takes_of_one_device_at_the_same_time_are_all_right() {
    let seed = seed("takes_of_one_device_at_the_same_time_are_all_right");
    let bench = Bench::new();
    let busy = Busy::raw(seed, 0);
    let id = bench.attach(&busy.node, Granularity::Fixed(BlockSize::from_shift(12).unwrap()));
    for _ in 0..4 {
        let results: Vec<_> = std::thread::scope(|scope| {
            let takes: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| {
                        let witness = Witness::of([&busy]);
                        let info =
                            bench.take(&bench.create(&[id]), limits(), Some(Arc::clone(&witness) as _))?;
                        let copy = witness.copies.lock().unwrap().remove(&busy.node).unwrap();
                        Ok::<_, SnapshotError>((info, copy))
                    })
                })
                .collect();
            takes
                .into_iter()
                .map(|take| take.join().unwrap().unwrap())
                .collect()
        });
        for (info, copy) in results {
            assert_eq!(difference(&image_bytes(&info.images[0]), &copy), None);
        }
    }
}

#[test]
fn a_full_directory_is_a_clear_error_and_leaves_nothing() {
    let seed = seed("a_full_directory_is_a_clear_error_and_leaves_nothing");
    let bench = Bench::new();
    let busy = Busy::raw(seed, 0);
    run(
        "dd",
        [
            "if=/dev/urandom",
            &format!("of={}", busy.node.display()),
            "bs=1M",
            "count=48",
            "oflag=direct",
        ],
    )
    .unwrap();
    let id = bench.attach_default(&busy.node);
    let directory = tempfile::tempdir().unwrap();
    run(
        "mount",
        [
            "-t",
            "tmpfs",
            "-o",
            "size=8m",
            "none",
            directory.path().to_str().unwrap(),
        ],
    )
    .unwrap();
    let info = bench.create_in(&[id], directory.path());
    let error = bench.take(&info, limits(), None).unwrap_err();
    let available = nix::sys::statvfs::statvfs(directory.path())
        .unwrap()
        .blocks_available();
    let left = std::fs::read_dir(directory.path()).unwrap().count();
    let info = bench.snapshots.info(info.id).unwrap();
    bench.snapshots.destroy(info.id).unwrap();
    blksnap_tests::unmount(directory.path()).unwrap();
    assert_eq!(error.errno(), Errno::ENOSPC, "{error}");
    let text = error.to_string();
    assert!(
        text.contains("free some space there") && !text.contains('\n'),
        "{text}"
    );
    assert_eq!((available * 4096, left), (8 * MIB, 0));
    assert_eq!(info.state, State::Created);
}

#[test]
fn storage_on_a_file_system_to_be_frozen_is_refused() {
    let bench = Bench::new();
    let mut device = LoopDevice::new(64 * MIB).unwrap();
    device.mkfs("ext4").unwrap();
    let mountpoint = device.mount().unwrap();
    let id = bench.attach_default(device.path());
    let info = bench.create_in(&[id], &mountpoint);
    let error = bench.take(&info, limits(), None).unwrap_err();
    assert!(
        matches!(error, SnapshotError::Converge(ConvergeError::SinkFrozen { .. })),
        "{error}"
    );
    assert!(error.to_string().contains("choose another place"), "{error}");
    bench.snapshots.destroy(info.id).unwrap();
    std::fs::write(mountpoint.join("file"), b"still writable").unwrap();
}

#[test]
fn a_writer_that_never_pauses_is_a_clear_error() {
    let seed = seed("a_writer_that_never_pauses_is_a_clear_error");
    let bench = Bench::new();
    let device = LoopDevice::new(32 * MIB).unwrap();
    let id = bench.attach_default(device.path());
    let pace = Pace {
        burst: 1000,
        pause: Duration::ZERO,
    };
    let writers: Vec<Writer> = (0..4)
        .map(|n| Writer::raw(device.path(), seed + n, pace))
        .collect();
    let info = bench.create(&[id]);
    let short = Limits {
        freeze_limit: Duration::from_millis(500),
        max_rounds: 4,
        ..limits()
    };
    let error = bench.take(&info, short, None).unwrap_err();
    assert_eq!(error.errno(), Errno::ETIME, "{error}");
    assert!(!error.to_string().contains('\n'), "{error}");
    drop(writers);
    // The same snapshot can be taken when the writer is gone.
    let info = bench.take(&info, limits(), None).unwrap();
    assert_eq!(
        difference(&image_bytes(&info.images[0]), &content(device.path())),
        None
    );
}

#[test]
fn a_freeze_that_takes_too_long_fails_and_thaws() {
    #[derive(Debug)]
    struct Slow;
    impl FreezeHook for Slow {
        fn run(&self, stage: Stage, _devices: &[PathBuf], _deadline: Instant) -> Result<(), HookError> {
            if stage == Stage::Frozen {
                std::thread::sleep(Duration::from_secs(1));
            }
            Ok(())
        }
    }
    let bench = Bench::new();
    let mut device = LoopDevice::new(64 * MIB).unwrap();
    device.mkfs("ext4").unwrap();
    let mountpoint = device.mount().unwrap();
    let id = bench.attach_default(device.path());
    let info = bench.create(&[id]);
    let short = Limits {
        freeze_limit: Duration::from_millis(300),
        ..limits()
    };
    let error = bench.take(&info, short, Some(Arc::new(Slow))).unwrap_err();
    assert!(matches!(error, SnapshotError::Converge(_)), "{error}");
    std::fs::write(mountpoint.join("file"), b"writable").unwrap();
    assert_eq!(bench.snapshots.info(info.id).unwrap().state, State::Created);
}

#[test]
fn calls_have_the_errors_of_the_reference() {
    let bench = Bench::new();
    let device = LoopDevice::new(16 * MIB).unwrap();
    let other = LoopDevice::new(16 * MIB).unwrap();
    let id = bench.attach_default(device.path());
    let untracked = Member::Tracked(BlockDevice::open(other.path()).unwrap());
    let tracked = bench.member(id);
    let errno = |result: Result<Info, SnapshotError>| result.unwrap_err().errno();
    let create = |members: &[&Member]| {
        let members = members.iter().map(|member| (*member).clone()).collect();
        bench
            .snapshots
            .create(members, directory(bench.storage.path()), HoldOptions::default())
    };

    assert_eq!(errno(create(&[&untracked])), Errno::ENODEV);
    assert_eq!(errno(create(&[&tracked, &tracked])), Errno::EALREADY);
    assert!(bench.snapshots.list().is_empty());

    let info = bench.create(&[]);
    assert_eq!(errno(bench.take(&info, limits(), None)), Errno::ENODEV);
    assert_eq!(errno(bench.snapshots.add(info.id, untracked)), Errno::ENODEV);
    bench.snapshots.add(info.id, tracked.clone()).unwrap();
    assert_eq!(
        errno(bench.snapshots.add(info.id, tracked.clone())),
        Errno::EALREADY
    );
    assert_eq!(bench.image(&info, id).unwrap_err().errno(), Errno::ENODATA);
    // In another snapshot, too.
    bench.create(&[id]);

    bench.take(&info, limits(), None).unwrap();
    assert_eq!(errno(bench.take(&info, limits(), None)), Errno::EALREADY);
    assert_eq!(
        errno(bench.snapshots.add(info.id, tracked.clone())),
        Errno::EALREADY
    );
    bench.snapshots.destroy(info.id).unwrap();
    assert_eq!(errno(bench.snapshots.info(info.id)), Errno::ESRCH);
    assert_eq!(errno(bench.take(&info, limits(), None)), Errno::ESRCH);
    assert_eq!(
        bench.snapshots.destroy(info.id).unwrap_err().errno(),
        Errno::ESRCH
    );
    assert_eq!(bench.snapshots.list().len(), 1);

    // Destroyed while it is being taken.
    #[derive(Debug)]
    struct Destroy(Mutex<Option<std::sync::mpsc::Sender<()>>>);
    impl FreezeHook for Destroy {
        fn run(&self, stage: Stage, _devices: &[PathBuf], _deadline: Instant) -> Result<(), HookError> {
            if stage == Stage::Freeze {
                self.0.lock().unwrap().take();
                // The destroyer is on its way; whether it arrives during the take or after is all the same.
                std::thread::sleep(Duration::from_millis(50));
            }
            Ok(())
        }
    }
    let info = bench.create(&[id]);
    let (sender, receiver) = std::sync::mpsc::channel();
    let (snapshots, snapshot) = (&bench.snapshots, info.id);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // The end of the channel is the hook's signal.
            let _ = receiver.recv();
            assert_eq!(snapshots.info(snapshot).unwrap().state, State::Taking);
            snapshots.destroy(snapshot).unwrap();
        });
        let _ = bench.take(&info, limits(), Some(Arc::new(Destroy(Mutex::new(Some(sender))))));
    });
    assert_eq!(errno(bench.snapshots.info(info.id)), Errno::ESRCH);
    bench.assert_storage_empty();
    drop(File::open(device.path()).unwrap());
}

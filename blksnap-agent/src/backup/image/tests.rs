//! Backups of images against a plain model: a device in memory, with a kill at any step of the copying.

use std::convert::Infallible;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Mutex;

use proptest::prelude::*;
use tempfile::TempDir;
use uuid::Uuid;

use super::*;
use crate::backup::sidecar::{Sidecar, SidecarState};
use crate::cbt::{CbtMap, ResetReason};
use crate::units::{BlockSize, DeviceId, Generation, Sectors};

/// A device whose last tracking block is short.
const LENGTH: usize = (40 << 16) + 1536;

/// A device, its map, and a target.
struct Bench {
    directory: TempDir,
    bytes: Vec<u8>,
    map: CbtMap,
    device: SidecarDevice,
    generations: u128,
}

impl Bench {
    fn new() -> Self {
        let capacity = Sectors::from_bytes(LENGTH as u64).unwrap();
        let size = BlockSize::from_shift(16).unwrap();
        Self {
            directory: tempfile::tempdir().unwrap(),
            bytes: vec![0; LENGTH],
            map: CbtMap::new(Generation::new(Uuid::from_u128(1)), size, capacity).unwrap(),
            device: SidecarDevice {
                path: "/dev/loop9".into(),
                name: "loop9".to_owned(),
                id: DeviceId { major: 7, minor: 9 },
                capacity: LENGTH as u64,
            },
            generations: 1,
        }
    }

    fn target(&self) -> PathBuf {
        self.directory.path().join("x.img")
    }

    fn write(&mut self, sector: usize, sectors: usize, byte: u8) {
        let end = (sector + sectors).min(LENGTH / 512);
        self.bytes[sector * 512..end * 512].fill(byte);
        let count = Sectors::new((end - sector) as u64);
        self.map.mark_extent(Sectors::new(sector as u64), count).unwrap();
    }

    fn take(&mut self) -> (File, Arc<ReadMap>) {
        self.generations += 1;
        let fresh = Generation::new(Uuid::from_u128(self.generations));
        self.map.take(fresh, self.map.capacity()).unwrap();
        let image = tempfile::tempfile().unwrap();
        image.set_len(LENGTH as u64).unwrap();
        // Zero blocks of the image are holes, as in a snapshot's.
        for (block, bytes) in self.bytes.chunks(1 << 16).enumerate() {
            if bytes.iter().any(|byte| *byte != 0) {
                image.write_all_at(bytes, (block as u64) << 16).unwrap();
            }
        }
        (image, self.map.read_map().unwrap())
    }

    /// Takes a snapshot and backs it up; `steps` is the number of parts after which it is stopped.
    fn backup(&mut self, incremental: bool, steps: u64) -> Result<Report, BackupError> {
        let (image, read_map) = self.take();
        let source = ImageSource {
            device: &self.device,
            image: &image,
            read_map: &read_map,
            consistency: Consistency::Crash,
            frozen: Duration::ZERO,
        };
        run(source, &self.target(), incremental, &|step, cancel| {
            if step >= steps {
                cancel.cancel();
            }
        })
    }

    fn target_is_right(&self) -> bool {
        fs::read(self.target()).unwrap() == self.bytes
    }

    fn state(&self) -> SidecarState {
        let path = Sidecar::path_of(&self.target());
        Sidecar::read(&path).unwrap().unwrap().state
    }
}

/// Calls a function with the number of each step, counted from 1.
struct Steps<'a> {
    taken: AtomicU64,
    cancel: CancelToken,
    each: &'a (dyn Fn(u64, &CancelToken) + Sync),
}

impl Progress for Steps<'_> {
    fn update(&self, _phase: Phase, done: u64, total: u64) {
        assert!(done <= total);
        (self.each)(self.taken.fetch_add(1, Ordering::Relaxed) + 1, &self.cancel);
    }
}

fn run(
    source: ImageSource<'_>,
    target: &Path,
    incremental: bool,
    each: &(dyn Fn(u64, &CancelToken) + Sync),
) -> Result<Report, BackupError> {
    let progress = Steps {
        taken: AtomicU64::new(0),
        cancel: CancelToken::new(),
        each,
    };
    let control = Control {
        progress: &progress,
        cancel: &progress.cancel,
    };
    from_image(source, target, incremental, |_| Ok::<_, Infallible>(()), control)
}

impl From<Infallible> for BackupError {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

fn reason(report: &Report) -> &str {
    match &report.mode {
        Mode::Full { reason } => reason.code,
        Mode::Incremental { .. } => "incremental",
    }
}

#[test]
fn incremental_copies_only_what_changed() {
    let mut bench = Bench::new();
    bench.write(0, 600, 1);
    bench.write(3000, 5000, 2);
    let first = bench.backup(true, u64::MAX).unwrap();
    assert_eq!((reason(&first), first.bytes_copied), ("no_target", LENGTH as u64));
    assert!(bench.target_is_right());
    bench.write(128 * 3 + 5, 1, 3);
    bench.write(128 * 39, 400, 0);
    let second = bench.backup(true, u64::MAX).unwrap();
    assert_eq!(second.mode, Mode::Incremental { since: first.taken });
    assert_eq!(second.bytes_copied, (2 << 16) + 1536);
    assert!(bench.target_is_right());
    let third = bench.backup(true, u64::MAX).unwrap();
    assert_eq!((reason(&third), third.bytes_copied), ("incremental", 0));
    let fourth = bench.backup(false, u64::MAX).unwrap();
    assert_eq!(reason(&fourth), "requested");
    assert!(bench.target_is_right());
}

#[test]
fn a_target_that_is_not_ours_any_more_is_written_whole() {
    let mut bench = Bench::new();
    bench.write(0, 5000, 1);
    bench.backup(false, u64::MAX).unwrap();
    let target = bench.target();
    let sidecar = Sidecar::path_of(&target);
    let spoil: [(&str, &dyn Fn()); 7] = [
        ("target_length", &|| {
            File::options()
                .write(true)
                .open(&target)
                .unwrap()
                .set_len(512)
                .unwrap();
        }),
        ("target_replaced", &|| {
            let other = target.with_extension("other");
            fs::copy(&target, &other).unwrap();
            fs::rename(&other, &target).unwrap();
        }),
        ("target_modified", &|| {
            let file = File::options().write(true).open(&target).unwrap();
            file.write_all_at(b"x", 70_000).unwrap();
        }),
        ("sidecar_damaged", &|| {
            let text = fs::read_to_string(&sidecar).unwrap();
            fs::write(&sidecar, text.replacen("\"number\": ", "\"number\": 1", 1)).unwrap();
        }),
        ("sidecar_damaged", &|| fs::write(&sidecar, "").unwrap()),
        ("no_sidecar", &|| fs::remove_file(&sidecar).unwrap()),
        ("no_target", &|| fs::remove_file(&target).unwrap()),
    ];
    for (want, spoil) in spoil {
        // A change of the file within the clock's resolution would not be seen.
        std::thread::sleep(std::time::Duration::from_millis(20));
        spoil();
        bench.write(17, 1, 9);
        let report = bench.backup(true, u64::MAX).unwrap();
        assert_eq!(reason(&report), want);
        assert!(bench.target_is_right(), "{want}");
        bench.write(1000, 1, 4);
        assert_eq!(reason(&bench.backup(true, u64::MAX).unwrap()), "incremental");
        assert!(bench.target_is_right(), "{want}");
    }
}

#[test]
fn what_failed_leaves_nothing_new_behind() {
    let mut bench = Bench::new();
    bench.write(0, 5000, 1);
    assert!(matches!(bench.backup(false, 1), Err(BackupError::Copy(_))));
    assert_eq!(fs::read_dir(bench.directory.path()).unwrap().count(), 0);
    bench.backup(false, u64::MAX).unwrap();
    assert!(bench.backup(false, 1).is_err());
    assert_eq!(bench.state(), SidecarState::Writing { full: true });
    assert_eq!(reason(&bench.backup(true, u64::MAX).unwrap()), "unfinished");
    assert!(bench.target_is_right());
}

#[test]
fn an_incremental_backup_stopped_in_order_goes_on_from_its_base() {
    let mut bench = Bench::new();
    bench.write(0, 5000, 1);
    let first = bench.backup(false, u64::MAX).unwrap();
    bench.write(0, 128, 2);
    bench.write(1280, 128, 2);
    bench.write(2560, 128, 2);
    assert!(bench.backup(true, 1).is_err());
    assert!(!bench.target_is_right());
    assert!(matches!(bench.state(), SidecarState::Stopped { base, .. } if base == first.taken));
    bench.write(1280, 128, 0);
    let last = bench.backup(true, u64::MAX).unwrap();
    assert_eq!(last.mode, Mode::Incremental { since: first.taken });
    assert!(bench.target_is_right());
}

#[test]
fn doubt_makes_it_full() {
    let mut bench = Bench::new();
    bench.write(0, 5000, 1);
    bench.backup(false, u64::MAX).unwrap();
    bench.write(0, 128, 2);
    let (image, read_map) = bench.take();
    let source = ImageSource {
        device: &bench.device,
        image: &image,
        read_map: &read_map,
        consistency: Consistency::Crash,
        frozen: Duration::ZERO,
    };
    // It comes up in the middle of the copy.
    let target = bench.target();
    let map = Mutex::new(&mut bench.map);
    let corrupt = |_, _: &CancelToken| map.lock().unwrap().corrupt(ResetReason::RunMissed);
    let report = run(source, &target, true, &corrupt).unwrap();
    assert_eq!(reason(&report), "run_missed");
    assert!(bench.target_is_right());
    assert_eq!(reason(&bench.backup(true, u64::MAX).unwrap()), "run_missed");
}

#[test]
fn an_image_of_another_length_is_refused() {
    let mut bench = Bench::new();
    bench.device.capacity += 512;
    assert!(matches!(
        bench.backup(false, u64::MAX),
        Err(BackupError::ImageLength { .. })
    ));
    assert!(!bench.target().exists());
}

#[derive(Clone, Debug)]
enum Op {
    Write(usize, usize, u8),
    /// Back up, and be stopped after some parts.
    Backup(bool, u64),
    /// Back up, and be killed after some parts.
    Kill(bool, u64),
    /// Wrap the map's numbers.
    Takes(u8),
    Corrupt,
}

fn operation() -> impl Strategy<Value = Op> {
    let steps = prop_oneof![3 => Just(u64::MAX), 2 => 1..8_u64];
    prop_oneof![
        8 => (0..LENGTH / 512, 1..700_usize, 0..4_u8).prop_map(|(at, n, byte)| Op::Write(at, n, byte)),
        4 => (prop::bool::weighted(0.9), steps).prop_map(|(i, steps)| Op::Backup(i, steps)),
        1 => (prop::bool::weighted(0.9), 1..8_u64).prop_map(|(i, steps)| Op::Kill(i, steps)),
        1 => (100..=255_u8).prop_map(Op::Takes),
        1 => Just(Op::Corrupt),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_backup_that_says_it_is_complete_is_the_device(ops in prop::collection::vec(operation(), 1..25)) {
        let mut bench = Bench::new();
        for op in ops {
            match op {
                Op::Write(sector, sectors, byte) => bench.write(sector, sectors, byte),
                Op::Backup(incremental, steps) => {
                    if bench.backup(incremental, steps).is_ok() {
                        prop_assert!(bench.target_is_right());
                        let complete = matches!(bench.state(), SidecarState::Complete { .. });
                        prop_assert!(complete);
                    }
                }
                Op::Kill(incremental, steps) => {
                    if bench.backup(incremental, steps).is_ok() {
                        prop_assert!(bench.target_is_right());
                    } else if bench.target().exists() {
                        // A kill leaves what was there while it was written.
                        let path = Sidecar::path_of(&bench.target());
                        let mut sidecar = Sidecar::read(&path).unwrap().unwrap();
                        sidecar.state = SidecarState::Writing { full: !incremental };
                        sidecar.write(&path).unwrap();
                    }
                }
                Op::Takes(count) => {
                    for _ in 0..count {
                        bench.generations += 1;
                        let fresh = Generation::new(Uuid::from_u128(bench.generations));
                        bench.map.take(fresh, bench.map.capacity()).unwrap();
                    }
                }
                Op::Corrupt => bench.map.corrupt(ResetReason::HookDead),
            }
        }
    }
}

//! Faults: every error at every input and output. The origin's writer sees only errors of the origin's own writes;
//! an image is right or broken, and says so once.

use std::sync::Arc;

use nix::errno::Errno;
use rand::rngs::StdRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};

use super::super::*;
use super::journal::{Journal, Subject};
use super::{Given, Plain, Told, content, image_content, layout, range, store};
use crate::disk::testing::{FaultDisk, Operation};
use crate::disk::{Disk, MemoryDisk, Zero};

const ERRORS: [Errno; 12] = [
    Errno::EIO,
    Errno::ENOSPC,
    Errno::EDQUOT,
    Errno::EROFS,
    Errno::ENOMEM,
    Errno::ENXIO,
    Errno::ENODEV,
    Errno::ETIMEDOUT,
    Errno::EAGAIN,
    Errno::EINVAL,
    Errno::EFBIG,
    Errno::EILSEQ,
];

/// Which disk fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Where {
    Origin,
    Storage,
    Journal,
}

#[derive(Clone, Copy, Debug)]
struct Fault {
    place: Where,
    operation: Operation,
    nth: u64,
    errno: Errno,
}

fn disk(name: &str, size: u64) -> Arc<FaultDisk> {
    Arc::new(FaultDisk::new(Arc::new(MemoryDisk::new(name, size, 1 << 30))))
}

/// What an image must read as; `None` where a write to it failed.
struct Expected(Vec<Option<u8>>);

impl Expected {
    fn of(bytes: &[u8]) -> Self {
        Self(bytes.iter().copied().map(Some).collect())
    }

    fn is(&self, found: &[u8]) -> bool {
        self.0
            .iter()
            .zip(found)
            .all(|(expected, found)| expected.is_none_or(|expected| expected == *found))
    }
}

struct World {
    seed: u64,
    fault: Option<Fault>,
    disks: [Arc<FaultDisk>; 3],
    origin: Arc<Origin>,
    image: Image,
    told: Arc<Told>,
    expected: Expected,
    /// A snapshot with storage of its own.
    other: (Image, Arc<Told>, Expected),
    model: Vec<u8>,
    /// The fault has shown itself to the origin's writer, or to the image's user.
    seen: bool,
}

impl World {
    fn new(seed: u64, promise: Promise, fault: Option<Fault>) -> Self {
        let layout = layout();
        let subject = Subject {
            snapshot: uuid::Uuid::from_u128(7),
            member: 0,
            layout,
        };
        let disks = [
            disk("origin", layout.size()),
            disk("storage", 1 << 22),
            disk("journal", Journal::most_bytes(&layout)),
        ];
        let mut rng = StdRng::seed_from_u64(seed ^ 1);
        let mut model = vec![0; usize::try_from(layout.size()).unwrap()];
        rng.fill_bytes(&mut model);
        disks[0].write_at(&model, 0).unwrap();
        let origin = Arc::new(Origin::new(Arc::clone(&disks[0]) as _, layout));
        let journal = Journal::create(Arc::clone(&disks[2]) as _, &subject, promise).unwrap();
        let storage = Plain::new(&[(Arc::clone(&disks[1]) as _, true)]);
        let (first, told) = store(1, &storage, promise, Some(journal));
        let sound: Arc<dyn Disk> = Arc::new(MemoryDisk::new("sound", 1 << 22, 1 << 30));
        let (second, other_told) = store(2, &Plain::new(&[(sound, false)]), Promise::AgentCrash, None);
        let paused = origin.pause();
        let image = paused.arm(first).unwrap();
        let other = paused.arm(second).unwrap();
        drop(paused);
        if let Some(fault) = fault {
            disks[fault.place as usize].fail(fault.operation, fault.nth, fault.errno);
        }
        Self {
            seed,
            fault,
            disks,
            origin,
            image,
            told,
            expected: Expected::of(&model),
            other: (other, other_told, Expected::of(&model)),
            model,
            seen: false,
        }
    }

    fn counts(&self) -> Vec<(Where, Operation, u64)> {
        [Where::Origin, Where::Storage, Where::Journal]
            .into_iter()
            .flat_map(|place| Operation::ALL.map(|operation| (place, operation)))
            .map(|(place, operation)| (place, operation, self.disks[place as usize].count(operation)))
            .collect()
    }

    fn play(&mut self) {
        let mut rng = StdRng::seed_from_u64(self.seed);
        for _ in 0..30 {
            let (offset, length) = range(&mut rng, self.origin.layout().size());
            let at = usize::try_from(offset).unwrap();
            let mut data = vec![0; length];
            rng.fill_bytes(&mut data);
            match rng.random_range(0..10) {
                0..=4 => {
                    let zero = rng.random_bool(0.2);
                    self.write_origin(offset, &data, zero);
                }
                5..=6 => {
                    let written = self.image.write_at(&data, offset);
                    for (expected, byte) in self.expected.0[at..at + length].iter_mut().zip(&data) {
                        *expected = written.is_ok().then_some(*byte);
                    }
                    self.check_error(written);
                }
                7..=8 => {
                    let mut found = vec![0; length];
                    let read = self.image.read_at(&mut found, offset);
                    if read.is_ok() {
                        let part = Expected(self.expected.0[at..at + length].to_vec());
                        assert!(part.is(&found), "{:?}", self.fault);
                    }
                    self.check_error(read);
                }
                _ => {
                    let flushed = self.image.flush();
                    self.check_error(flushed);
                    let known = self.image.allocation(offset, length as u64, 8).map(|_| ());
                    self.check_error(known);
                }
            }
        }
    }

    fn write_origin(&mut self, offset: u64, data: &[u8], zero: bool) {
        let length = data.len() as u64;
        let admitted = self.origin.admit(offset, length);
        let disk = self.origin.disk();
        let written = if zero {
            disk.zero_at(offset, length, Zero::Keep, false)
        } else {
            disk.write_at(data, offset)
        };
        drop(admitted);
        let range = usize::try_from(offset).unwrap()..usize::try_from(offset + length).unwrap();
        match written {
            Ok(()) if zero => self.model[range].fill(0),
            Ok(()) => self.model[range].copy_from_slice(data),
            Err(error) => {
                let fault = self.fault.unwrap();
                assert_eq!(
                    fault.place,
                    Where::Origin,
                    "the writer sees an error of a snapshot: {error}"
                );
                assert_eq!(error.raw_os_error(), Some(fault.errno as i32));
                self.seen = true;
                let now = self.now();
                self.model[range.clone()].copy_from_slice(&now[range]);
            }
        }
    }

    /// The origin's content, past the fault.
    fn now(&self) -> Vec<u8> {
        loop {
            let mut all = vec![0; self.model.len()];
            if self.disks[0].read_at(&mut all, 0).is_ok() {
                return all;
            }
        }
    }

    /// An error of the image is the one that was injected, or says that the snapshot is broken.
    fn check_error(&mut self, result: Result<(), ImageError>) {
        let Err(error) = result else { return };
        let fault = self
            .fault
            .unwrap_or_else(|| panic!("seed {}: {error}", self.seed));
        match error {
            ImageError::Broken(errno) => assert_eq!(errno, fault.errno as i32, "{fault:?}"),
            other => {
                assert_eq!(other.errno(), fault.errno as i32, "{fault:?}: {other}");
                self.seen = true;
            }
        }
    }

    fn finish(mut self) -> (bool, bool) {
        self.origin.drain(self.image.key());
        assert!(
            self.now() == self.model,
            "seed {} {:?}: the origin differs",
            self.seed,
            self.fault
        );
        let mut broken = 0;
        let images = [
            (&self.image, &self.told, &self.expected),
            (&self.other.0, &self.other.1, &self.other.2),
        ];
        for (image, told, expected) in images {
            let found = [(); 2].iter().find_map(|()| match image_content(image) {
                // A fault that comes only now.
                Err(ImageError::Io { .. }) => None,
                found => Some(found),
            });
            match found.unwrap() {
                Ok(found) => {
                    assert_eq!(told.errors(), [], "{:?}", self.fault);
                    assert!(
                        expected.is(&found),
                        "seed {} {:?}: {:?} differs",
                        self.seed,
                        self.fault,
                        image.key()
                    );
                }
                Err(error) => {
                    let fault = self.fault.unwrap();
                    assert!(matches!(error, ImageError::Broken(errno) if errno == fault.errno as i32));
                    let told = told.errors();
                    assert_eq!(told.len(), 1, "{fault:?}");
                    assert_eq!(told[0].0, fault.errno as i32);
                    assert_eq!(image.state().unwrap(), Some(fault.errno as i32));
                    broken += 1;
                }
            }
        }
        self.model.clear();
        (broken > 0, self.seen)
    }
}

#[test]
fn every_error_at_every_operation() {
    let seed: u64 = rand::rng().random();
    println!("seed {seed}");
    let (mut runs, mut broken, mut seen) = (0, 0, 0);
    for promise in [Promise::AgentCrash, Promise::PowerCut] {
        let mut world = World::new(seed, promise, None);
        let before = world.counts();
        world.play();
        let after = world.counts();
        assert_eq!(world.finish(), (false, false));
        for ((place, operation, from), (.., to)) in before.into_iter().zip(after) {
            for nth in 0..to - from {
                // Each error somewhere, and every place with two.
                for errno in ERRORS.iter().skip(usize::try_from(nth).unwrap() % 6).step_by(6) {
                    let fault = Fault {
                        place,
                        operation,
                        nth,
                        errno: *errno,
                    };
                    let mut world = World::new(seed, promise, Some(fault));
                    world.play();
                    let (broke, shown) = world.finish();
                    runs += 1;
                    broken += u32::from(broke);
                    seen += u32::from(shown);
                }
            }
        }
    }
    println!("{runs} runs with a fault: {broken} broke a snapshot, {seen} were seen by a user");
    assert!(broken > 20 && seen > 20);
}

/// The storage is full: the origin goes on.
#[test]
fn an_overflow_breaks_the_snapshot_and_nothing_else() {
    let layout = layout();
    let disk: Arc<dyn Disk> = Arc::new(MemoryDisk::new("origin", layout.size(), 1 << 30));
    let origin = Arc::new(Origin::new(Arc::clone(&disk), layout));
    let region: Arc<dyn Disk> = Arc::new(MemoryDisk::new("region", 3 * 32768, 1 << 20));
    let (small, told) = store(1, &Plain::new(&[(region, false)]), Promise::AgentCrash, None);
    let image = origin.pause().arm(small).unwrap();
    for chunk in 0..4 {
        assert_eq!(image.state().unwrap(), None);
        let _admitted = origin.admit(chunk * 32768, 512);
        disk.write_at(&[1; 512], chunk * 32768).unwrap();
    }
    assert_eq!(image.state().unwrap(), Some(Errno::ENOSPC as i32));
    let told = told.errors();
    assert_eq!(told.len(), 1);
    assert!(told[0].1.contains("full"), "{told:?}");
    assert_eq!(content(&*disk)[3 * 32768..][..512], [1; 512]);
    // A write to an image that finds no room breaks nothing.
    let region: Arc<dyn Disk> = Arc::new(MemoryDisk::new("region", 2 * 32768, 1 << 20));
    let (small, told) = store(2, &Plain::new(&[(region, false)]), Promise::AgentCrash, None);
    let image = origin.pause().arm(small).unwrap();
    let before = content(&*disk);
    image.write_at(&[2; 512], 0).unwrap();
    image.write_at(&[2; 512], 32768).unwrap();
    assert!(matches!(
        image.write_at(&[2; 512], 2 * 32768),
        Err(ImageError::NoSpace)
    ));
    assert_eq!((image.state().unwrap(), told.errors()), (None, vec![]));
    let found = image_content(&image).unwrap();
    assert!(found[2 * 32768..] == before[2 * 32768..]);
}

/// A chunk whose region is full has another place in the region that was appended.
#[test]
fn a_chunk_goes_on_in_another_region() {
    let layout = layout();
    let disk: Arc<dyn Disk> = Arc::new(MemoryDisk::new("origin", layout.size(), 1 << 30));
    let before: Vec<u8> = (0..layout.size()).map(|n| (n / 512 % 251) as u8).collect();
    disk.write_at(&before, 0).unwrap();
    let origin = Arc::new(Origin::new(Arc::clone(&disk), layout));
    let region = |name, bytes| -> Given { (Arc::new(MemoryDisk::new(name, 1 << 20, bytes)), true) };
    // Room for 3 units; the second region takes the rest.
    let storage = Plain::with_room(&[
        (region("first", 1 << 20), 3 * 4096),
        (region("second", 1 << 20), 1 << 20),
    ]);
    let (kept, told) = store(1, &storage, Promise::AgentCrash, None);
    let image = origin.pause().arm(Arc::clone(&kept)).unwrap();
    for unit in 0..6 {
        let _admitted = origin.admit(unit * 4096, 512);
        disk.write_at(&[255; 512], unit * 4096).unwrap();
    }
    assert_eq!((kept.preserved(), told.errors()), (6 * 4096, vec![]));
    assert!(image_content(&image).unwrap() == before);
    // Over both places, and a unit that has none yet.
    let data = vec![254; 5 * 4096];
    image.write_at(&data, 2 * 4096 + 512).unwrap();
    let mut expected = before;
    expected[2 * 4096 + 512..][..data.len()].copy_from_slice(&data);
    assert!(image_content(&image).unwrap() == expected);
}

/// A write to an image that failed can be tried again for ever: it takes no room of others.
#[test]
fn a_write_to_an_image_that_fails_takes_no_room() {
    let layout = layout();
    let origin = Arc::new(Origin::new(disk("origin", layout.size()), layout));
    // Old data that is not zeroes is kept by a write.
    origin.disk().write_at(&[1; 16384], 0).unwrap();
    let region = disk("region", 1 << 20);
    let storage = Plain::new(&[(Arc::clone(&region) as _, true)]);
    let used = || storage.space.lock().unwrap().used();
    let (store, told) = store(1, &storage, Promise::AgentCrash, None);
    let image = origin.pause().arm(store).unwrap();
    for (offset, length) in [(0, 4096), (4096 + 512, 512)] {
        let before = used();
        for _ in 0..3 {
            region.fail(Operation::Write, 0, Errno::EIO);
            image.write_at(&vec![7; length], offset).unwrap_err();
            assert_eq!(used(), before);
        }
        image.write_at(&vec![7; length], offset).unwrap();
        assert_eq!(used(), before + 4096);
    }
    assert_eq!(told.errors(), []);
}

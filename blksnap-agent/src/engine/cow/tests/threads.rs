//! Threads: writers, readers, image writers and takes at once. The oracle of an image is a copy of the origin made while
//! it was paused, and what was written to the image since.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rand::rngs::StdRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};

use super::super::*;
use super::{Plain, content, layout, range, store};
use crate::disk::testing::FaultDisk;
use crate::disk::{Disk, MemoryDisk, Zero};
use crate::units::Extent;

/// A snapshot and what its image must read as; locked for each write to the image.
struct Held {
    image: Image,
    expected: Mutex<Vec<u8>>,
}

fn play(seed: u64, promise: Promise) -> (u64, u64) {
    let layout = layout();
    let disk = Arc::new(MemoryDisk::new("origin", layout.size(), 1 << 30));
    let origin = Arc::new(Origin::new(Arc::clone(&disk) as _, layout));
    let held: Mutex<Vec<Arc<Held>>> = Mutex::default();
    let end = AtomicBool::new(false);
    let compared = AtomicU64::new(0);
    let takes = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for n in 0..3 {
            let (origin, end) = (&origin, &end);
            scope.spawn(move || {
                let mut rng = StdRng::seed_from_u64(seed + n);
                while !end.load(Ordering::Relaxed) {
                    let (offset, length) = range(&mut rng, origin.layout().size());
                    let admitted = origin.admit(offset, length as u64);
                    if rng.random_bool(0.1) {
                        let zeroed = origin
                            .disk()
                            .zero_at(offset, length as u64, Zero::Deallocate, false);
                        zeroed.unwrap();
                    } else {
                        let mut data = vec![0; length];
                        rng.fill_bytes(&mut data);
                        origin.disk().write_at(&data, offset).unwrap();
                    }
                    drop(admitted);
                }
            });
        }
        // Reads images and compares; a range is compared under the lock that its image's writer takes.
        for n in 0..2 {
            let (held, end, compared) = (&held, &end, &compared);
            scope.spawn(move || {
                let mut rng = StdRng::seed_from_u64(seed + 10 + n);
                while !end.load(Ordering::Relaxed) {
                    let some = {
                        let held = held.lock().unwrap();
                        if held.is_empty() {
                            continue;
                        }
                        Arc::clone(&held[rng.random_range(0..held.len())])
                    };
                    let (offset, length) = range(&mut rng, some.image.size());
                    let mut expected = some.expected.lock().unwrap();
                    let at = usize::try_from(offset).unwrap();
                    if rng.random_bool(0.2) {
                        let mut data = vec![0; length];
                        rng.fill_bytes(&mut data);
                        match some.image.write_at(&data, offset) {
                            Ok(()) => expected[at..at + length].copy_from_slice(&data),
                            Err(ImageError::Gone) => continue,
                            Err(error) => panic!("seed {seed}: {error}"),
                        }
                    }
                    let mut found = vec![0; length];
                    match some.image.read_at(&mut found, offset) {
                        Ok(()) => {
                            assert!(
                                found == expected[at..at + length],
                                "seed {seed}: {length} bytes at {offset} of {:?} differ",
                                some.image.key()
                            );
                            compared.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(ImageError::Gone) => {}
                        Err(error) => panic!("seed {seed}: {error}"),
                    }
                }
            });
        }
        let mut rng = StdRng::seed_from_u64(seed + 20);
        for key in 0..40 {
            // Slow storage makes a queue, and faults of other kinds are in another test.
            let region = FaultDisk::new(Arc::new(MemoryDisk::new("region", 1 << 30, 1 << 30)));
            let storage = Plain::new(&[(Arc::new(region), rng.random_bool(0.5))]);
            let (store, told) = store(key, &storage, promise, None);
            let paused = origin.pause();
            let image = paused.arm(store).unwrap();
            let expected = content(&*disk);
            drop(paused);
            takes.fetch_add(1, Ordering::Relaxed);
            held.lock().unwrap().push(Arc::new(Held {
                image,
                expected: Mutex::new(expected),
            }));
            std::thread::sleep(std::time::Duration::from_millis(rng.random_range(0..15)));
            let mut all = held.lock().unwrap();
            if all.len() > 3 {
                let at = rng.random_range(0..all.len());
                let gone = all.swap_remove(at);
                drop(all);
                let expected = gone.expected.lock().unwrap();
                let found = super::image_content(&gone.image).unwrap();
                assert!(found == *expected, "seed {seed}: {:?} differs", gone.image.key());
                origin.release(gone.image.key());
                assert!(matches!(super::image_content(&gone.image), Err(ImageError::Gone)));
            }
            assert_eq!(told.errors(), []);
        }
        end.store(true, Ordering::Relaxed);
    });
    for held in held.into_inner().unwrap() {
        origin.drain(held.image.key());
        let found = super::image_content(&held.image).unwrap();
        assert!(
            found == *held.expected.lock().unwrap(),
            "seed {seed}: {:?} differs",
            held.image.key()
        );
        origin.release(held.image.key());
    }
    assert_eq!(origin.counters().snapshots, 0);
    (compared.into_inner(), origin.counters().held_writes)
}

#[test]
fn images_are_right_with_many_threads_at_once() {
    for promise in [Promise::AgentCrash, Promise::Nothing, Promise::PowerCut] {
        let seed = rand::rng().random();
        let (compared, held) = play(seed, promise);
        println!("seed {seed}, {promise:?}: {compared} reads compared, {held} writes held");
        assert!(compared > 100 && held > 50, "{compared} {held}");
    }
}

/// Difference storage on the origin itself needs no preserving; who else writes there breaks the snapshot that it is of.
#[test]
fn storage_on_the_origin_is_nobodys_image() {
    let layout = layout();
    let disk = Arc::new(MemoryDisk::new("origin", layout.size(), 1 << 30));
    let origin = Arc::new(Origin::new(Arc::clone(&disk) as _, layout));
    let region: Arc<dyn Disk> = Arc::new(MemoryDisk::new("region", 1 << 20, 1 << 20));
    let storage = Plain::new(&[(region, true)]);
    let (elsewhere, told) = store(1, &storage, Promise::AgentCrash, None);
    let (own, told_own) = store(2, &storage, Promise::AgentCrash, None);
    let image = origin.pause().arm(Arc::clone(&elsewhere)).unwrap();
    let image_own = origin.pause().arm(Arc::clone(&own)).unwrap();
    // From the middle of a unit to the middle of another one: the whole units between.
    let reserved = Extent {
        offset: 2048,
        length: 5 * 4096,
    };
    origin.exclude(own.key, &[reserved]);
    let write = |offset, length| {
        let _admitted = origin.admit(offset, length);
        disk.write_at(&vec![7; usize::try_from(length).unwrap()], offset)
            .unwrap();
    };
    write(reserved.end(), 512);
    assert_eq!(told_own.errors(), []);
    assert_eq!((elsewhere.preserved(), own.preserved()), (4096, 4096));
    write(4096, 4 * 4096);
    assert_eq!(told_own.errors().len(), 1, "its storage was overwritten");
    super::image_content(&image_own).unwrap_err();
    // The units at the ends are in the range in part.
    write(0, 6 * 4096);
    assert_eq!(elsewhere.preserved(), 2 * 4096);
    assert_eq!(told.errors(), []);
    let found = super::image_content(&image).unwrap();
    assert!(
        found[..4096]
            .iter()
            .chain(&found[5 * 4096..])
            .all(|byte| *byte == 0)
    );
    // With the snapshot goes what it reserved.
    origin.release(own.key);
    let (later, _) = store(3, &storage, Promise::AgentCrash, None);
    origin.pause().arm(Arc::clone(&later)).unwrap();
    write(4096, 4096);
    assert_eq!(later.preserved(), 4096);
}

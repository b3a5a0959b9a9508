//! Tests of the pool on files and in memory; those on block devices and file systems of their own are in the `tests`
//! crate.

use std::fs::File;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};

use super::*;

const CHUNK: u64 = 256 << 10;
const UNIT: u64 = 4096;
const BYTES: usize = 4096;

fn pool(minimum: u64, autogrow: bool) -> (Pool, Receiver<u64>) {
    let (told, events) = channel();
    let options = PoolOptions {
        minimum,
        autogrow,
        ..PoolOptions::default()
    };
    (Pool::new(options, listener(told)), events)
}

fn listener(told: std::sync::mpsc::Sender<u64>) -> Listener {
    Arc::new(move |SpaceEvent::LowFreeSpace { requested }| told.send(requested).unwrap())
}

fn directory(path: &Path, limit: Option<u64>, keep: Option<&str>) -> StorageSpec {
    StorageSpec::Directory {
        path: path.to_owned(),
        limit,
        keep: keep.map(str::to_owned),
    }
}

/// Gives out units, one to a chunk, until there is no room, and gives their number.
fn fill(pool: &Pool) -> u64 {
    let overflow = (0..u64::MAX).find(|_| pool.slot(CHUNK, UNIT).is_err());
    overflow.unwrap()
}

#[test]
fn a_directory_grows_up_to_its_limit_and_every_half_minimum_is_told() {
    let place = tempfile::tempdir().unwrap();
    let (pool, events) = pool(64 * UNIT, true);
    assert_eq!(events.try_recv(), Ok(64 * UNIT), "at creation");
    pool.append(&directory(place.path(), Some(200 * UNIT), None))
        .unwrap();
    let usage = pool.usage();
    assert_eq!(
        (usage.used, usage.bytes, usage.limit),
        (0, 64 * UNIT, Some(200 * UNIT))
    );
    for number in 1..=200_u64 {
        pool.slot(CHUNK, UNIT).unwrap();
        // At 32, 96, 160.
        let due = number % 64 == 32;
        assert_eq!(events.try_recv().ok(), due.then_some(64 * UNIT), "after {number}");
        let grown = (1 + (number + 32) / 64) * 64;
        assert_eq!(pool.usage().bytes, grown.min(200) * UNIT, "after {number}");
    }
    let overflow = pool.slot(CHUNK, UNIT).unwrap_err();
    assert_eq!((overflow.used, overflow.bytes), (200 * UNIT, 200 * UNIT));
    // More storage while it is held.
    pool.append(&StorageSpec::Memory { limit: 3 * UNIT }).unwrap();
    assert_eq!(fill(&pool), 3);
    assert_eq!(pool.usage().limit, Some(203 * UNIT));
}

#[test]
fn without_growth_what_was_given_is_all() {
    let place = tempfile::tempdir().unwrap();
    for (limit, room) in [(None, 16), (Some(40 * UNIT), 40), (Some(9 * UNIT), 9)] {
        let (pool, _events) = pool(16 * UNIT, false);
        pool.append(&directory(place.path(), limit, None)).unwrap();
        assert_eq!(fill(&pool), room);
        assert_eq!(pool.usage().limit, Some(room * UNIT));
    }
}

#[test]
fn a_slot_is_extended_in_its_region_only() {
    let (pool, _events) = pool(0, true);
    pool.append(&StorageSpec::Memory { limit: 2 * UNIT }).unwrap();
    pool.append(&StorageSpec::Memory { limit: 9 * UNIT }).unwrap();
    let first = pool.slot(CHUNK, UNIT).unwrap();
    pool.extend(first, UNIT).unwrap();
    assert!(pool.extend(first, UNIT).is_err());
    let second = pool.slot(CHUNK, UNIT).unwrap();
    assert_eq!((first.region.index(), second.region.index()), (0, 1));
    pool.extend(second, 8 * UNIT).unwrap();
    // What is written to a slot is read from it.
    for (slot, value) in [(first, 1), (second, 2)] {
        pool.disk(slot.region)
            .write_at(&[value; BYTES], slot.offset + UNIT)
            .unwrap();
    }
    let mut found = [0; BYTES];
    pool.disk(first.region)
        .read_at(&mut found, first.offset + UNIT)
        .unwrap();
    assert_eq!(found, [1; BYTES]);
    pool.flush().unwrap();
    assert!(matches!(pool.extents(), Err(StorageError::NoDevice(_))));
}

#[test]
fn a_directory_costs_nothing_until_it_is_written() {
    let place = tempfile::tempdir().unwrap();
    let (pool, _events) = pool(1 << 40, true);
    pool.append(&directory(place.path(), None, None)).unwrap();
    let slots: Vec<_> = (0..1000).map(|_| pool.slot(CHUNK, UNIT).unwrap()).collect();
    let disk = pool.disk(slots[0].region);
    for slot in &slots[..10] {
        disk.write_at(&[7; BYTES], slot.offset + 5 * UNIT).unwrap();
    }
    pool.flush().unwrap();
    let file = File::from(disk.file().unwrap().try_clone_to_owned().unwrap());
    // The file system may need a block or two to find them.
    let stored = super::super::stored_bytes(&file).unwrap();
    assert!((10 * UNIT..=12 * UNIT).contains(&stored), "{stored}");
    assert_eq!(pool.usage().used, 1000 * UNIT);
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
    // It is never promised more than the file system has.
    let space = nix::sys::statvfs::statvfs(place.path()).unwrap();
    assert!(pool.usage().bytes < space.blocks() * space.fragment_size());
}

#[test]
fn a_file_is_used_as_it_is_or_grows() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("diff");
    let spec = |limit| StorageSpec::File {
        path: path.clone(),
        limit,
    };
    let (first, _events) = pool(64 * UNIT, true);
    assert!(matches!(first.append(&spec(None)), Err(StorageError::Io { .. })));
    fs::write(&path, [0; 10]).unwrap();
    assert!(matches!(
        first.append(&spec(None)),
        Err(StorageError::Empty { .. })
    ));
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(3 * CHUNK + UNIT)
        .unwrap();
    first.append(&spec(None)).unwrap();
    assert_eq!(fill(&first), 3, "whole chunks, and no rest");
    // It is in use.
    let (second, _events) = pool(64 * UNIT, true);
    let busy = second.append(&spec(None)).unwrap_err().to_string();
    assert!(busy.contains("is in use"), "{busy}");
    drop(first);
    second.append(&spec(Some(100 * UNIT))).unwrap();
    assert_eq!(fill(&second), 100);
    let (third, _events) = pool(64 * UNIT, true);
    let error = third
        .append(&StorageSpec::File {
            path: place.path().to_owned(),
            limit: None,
        })
        .unwrap_err();
    assert!(
        matches!(error, StorageError::Io { .. } | StorageError::Kind { .. }),
        "{error}"
    );
    assert!(matches!(
        third.append(&directory(Path::new("/dev/null"), None, None)),
        Err(StorageError::NotDirectory { .. })
    ));
    assert!(matches!(
        third.append(&StorageSpec::Device {
            path,
            ranges: Vec::new()
        }),
        Err(StorageError::Disk(crate::disk::DiskError::NotBlock { .. }))
    ));
}

#[test]
fn what_was_kept_is_opened_again_with_its_slots() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("file");
    fs::write(&path, vec![0; 8 << 20]).unwrap();
    let options = PoolOptions {
        minimum: 64 * UNIT,
        ..PoolOptions::default()
    };
    let (first, _events) = pool(options.minimum, true);
    first
        .append(&directory(place.path(), Some(40 * UNIT), Some("a")))
        .unwrap();
    first
        .append(&StorageSpec::File {
            path: path.clone(),
            limit: None,
        })
        .unwrap();
    let taken: Vec<Taken> = (0..60)
        .map(|number: u8| {
            let slot = first.slot(CHUNK, UNIT).unwrap();
            let disk = first.disk(slot.region);
            disk.write_at(&[number; BYTES], slot.offset).unwrap();
            Taken {
                slot,
                chunk: CHUNK,
                stored: UNIT,
            }
        })
        .collect();
    assert!(taken[0].slot.region.index() == 0 && taken[59].slot.region.index() == 1);
    first.flush().unwrap();
    let specs = first.specs();
    let used = first.usage().used;
    let again = |taken: &[Taken], told| {
        Pool::reopen(options, listener(told), &specs, &|_| None, taken.iter().copied())
    };
    let (told, events) = channel();
    assert!(again(&taken, told).is_err(), "the first one has it");
    drop(first);
    let (told, _) = channel();
    assert!(matches!(
        again(&[taken[0], taken[0]], told),
        Err(StorageError::Misplaced(_))
    ));
    drop(events);
    let (told, events) = channel();
    let second = again(&taken, told).unwrap();
    assert_eq!(second.usage().used, used);
    assert!(
        events.try_recv().is_ok(),
        "more is wanted than was asked for at first"
    );
    let next = second.slot(CHUNK, UNIT).unwrap();
    assert!(taken.iter().all(|taken| taken.slot != next));
    for (number, taken) in taken.iter().enumerate() {
        let mut found = [0; BYTES];
        second
            .disk(taken.slot.region)
            .read_at(&mut found, taken.slot.offset)
            .unwrap();
        assert!(
            found.iter().all(|byte| usize::from(*byte) == number),
            "slot {number}"
        );
    }
    second.remove_kept().unwrap();
    second.remove_kept().unwrap();
    assert_eq!(
        fs::read_dir(place.path()).unwrap().count(),
        1,
        "the file was not made here"
    );
    let (told, _events) = channel();
    drop(second);
    assert!(matches!(again(&taken, told), Err(StorageError::Io { .. })));
}

#[test]
fn what_does_not_outlive_the_agent_is_not_opened_again() {
    let place = tempfile::tempdir().unwrap();
    for spec in [
        directory(place.path(), None, None),
        StorageSpec::Memory { limit: 1 },
    ] {
        let refused = Pool::reopen(PoolOptions::default(), Arc::new(|_| {}), &[spec], &|_| None, []);
        assert!(matches!(refused, Err(StorageError::Volatile(_))));
    }
    let (pool, _events) = pool(0, true);
    for name in ["", "a/b", "..", "a b"] {
        let refused = pool.append(&directory(place.path(), None, Some(name)));
        assert!(matches!(refused, Err(StorageError::Name(_))), "{name}");
    }
    pool.append(&directory(place.path(), None, Some("x"))).unwrap();
    let twice = {
        let (other, _events) = super::tests::pool(0, true);
        other
            .append(&directory(place.path(), None, Some("x")))
            .unwrap_err()
    };
    assert!(twice.to_string().contains("File exists"), "{twice}");
}

#[test]
fn only_what_was_written_is_flushed() {
    let (pool, _events) = pool(0, true);
    let place = tempfile::tempdir().unwrap();
    pool.append(&directory(place.path(), Some(9 * UNIT), None))
        .unwrap();
    let slot = pool.slot(CHUNK, UNIT).unwrap();
    let store = Arc::clone(&pool.lock().regions[0].store);
    assert!(!store.is_unflushed());
    pool.disk(slot.region).write_at(&[1; 512], slot.offset).unwrap();
    assert!(store.is_unflushed());
    pool.flush().unwrap();
    assert!(!store.is_unflushed());
    // Whoever has the descriptor writes unseen.
    assert!(pool.disk(slot.region).file().is_some());
    assert!(store.is_unflushed());
    pool.flush().unwrap();
    assert!(store.is_unflushed());
}

/// Threads that take and extend slots while storage is appended: no slot twice, and nothing above the limits.
#[test]
fn threads_get_slots_of_their_own() {
    let (pool, _events) = pool(32 * UNIT, true);
    let place = tempfile::tempdir().unwrap();
    let taken: Vec<Taken> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let mut mine = Vec::new();
                    while mine.len() < 300 {
                        let Ok(slot) = pool.slot(CHUNK, UNIT) else {
                            std::thread::yield_now();
                            continue;
                        };
                        let more = u64::from(pool.extend(slot, UNIT).is_ok());
                        mine.push(Taken {
                            slot,
                            chunk: CHUNK,
                            stored: (1 + more) * UNIT,
                        });
                    }
                    mine
                })
            })
            .collect();
        for _ in 0..30 {
            pool.append(&directory(place.path(), Some(100 * UNIT), None))
                .unwrap();
        }
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect()
    });
    let used: u64 = taken.iter().map(|taken| taken.stored).sum();
    assert_eq!(pool.usage().used, used);
    let mut space = Space::new(0).0;
    for _ in 0..30 {
        space.append(Region::sparse(1 << 40, 100 * UNIT));
    }
    space.restore(taken).unwrap();
    assert_eq!(space.bytes(), 3000 * UNIT, "no region has more than its limit");
}

#[test]
fn what_is_withdrawn_can_be_given_again_in_another_order() {
    let place = tempfile::tempdir().unwrap();
    let (pool, _events) = pool(64 * UNIT, false);
    let specs = [
        directory(place.path(), Some(64 * UNIT), Some("a")),
        StorageSpec::Memory { limit: 8 * UNIT },
    ];
    let kept = || std::fs::read_dir(place.path()).unwrap().count();
    for spec in &specs {
        pool.append(spec).unwrap();
    }
    assert_eq!(
        (pool.usage().bytes, pool.usage().regions, kept()),
        (72 * UNIT, 2, 1)
    );
    pool.withdraw().unwrap();
    assert_eq!((pool.usage().bytes, pool.usage().regions, kept()), (0, 0, 0));
    assert!(pool.specs().is_empty() && pool.slot(CHUNK, UNIT).is_err());
    for spec in specs.iter().rev() {
        pool.append(spec).unwrap();
    }
    assert_eq!(pool.specs(), [specs[1].clone(), specs[0].clone()]);
    // Memory comes first now.
    let slot = pool.slot(CHUNK, UNIT).unwrap();
    pool.disk(slot.region).write_at(&[7; BYTES], slot.offset).unwrap();
    assert!(pool.disk(slot.region).name().starts_with("memory:"));
    assert_eq!(fill(&pool), 71);
    assert_eq!((pool.usage().used, pool.usage().regions), (72 * UNIT, 2));
}

//! Rules of the map, one by one.

use super::*;
use crate::cbt::{Base, ChangedExtents};
use crate::units::Extent;
use uuid::Uuid;

pub(super) fn generation(n: u128) -> Generation {
    Generation::new(Uuid::from_u128(n))
}

fn map_of(blocks: u64) -> CbtMap {
    let size = BlockSize::from_shift(12).unwrap();
    CbtMap::new(generation(1), size, Sectors::new(blocks * 8)).unwrap()
}

fn take(map: &mut CbtMap) -> Taken {
    let capacity = map.capacity();
    map.take(generation(100), capacity).unwrap()
}

fn blocks(extents: ChangedExtents) -> Vec<u64> {
    extents
        .flat_map(|e| e.offset / 4096..e.end().div_ceil(4096))
        .collect()
}

fn since(map: &CbtMap, generation: Generation, number: u8) -> Result<Vec<u64>, FullReason> {
    let base = Base { generation, number };
    map.frozen()
        .and_then(|read| read.changed_since(&base))
        .map(blocks)
        .map_err(|full| full.reason)
}

#[test]
fn numbers_start_at_zero_and_one_and_count_takes() {
    let mut map = map_of(100);
    assert_eq!((map.previous(), map.active()), (0, 1));
    assert_eq!(map.frozen().unwrap_err().reason, FullReason::NotTaken);
    for number in 1..=254 {
        let taken = take(&mut map);
        assert_eq!(
            taken,
            Taken {
                number,
                generation: generation(1),
                reset: None
            }
        );
        assert_eq!((map.previous(), map.active()), (number, number + 1));
    }
}

#[test]
fn changes_are_those_after_the_base_and_before_the_take() {
    let mut map = map_of(100);
    map.mark_blocks(1, 3);
    take(&mut map);
    map.mark_blocks(3, 4);
    take(&mut map);
    map.mark_blocks(50, 99);
    assert_eq!(map.dirty_blocks(), 50);
    assert_eq!(since(&map, generation(1), 0).unwrap(), [1, 2, 3, 4]);
    assert_eq!(since(&map, generation(1), 1).unwrap(), [3, 4]);
    assert_eq!(since(&map, generation(1), 2).unwrap(), [0; 0]);
    assert_eq!(
        since(&map, generation(1), 3),
        Err(FullReason::FutureNumber { base: 3, number: 2 })
    );
    assert_eq!(blocks(map.read_map().unwrap().changed_in_last().unwrap()), [3, 4]);
}

#[test]
fn wrap_starts_over_and_refuses_older_bases() {
    let mut map = map_of(100);
    for _ in 1..=254 {
        map.mark_blocks(0, 9);
        take(&mut map);
    }
    map.mark_blocks(20, 30);
    let held = map.read_map().unwrap();
    let taken = take(&mut map);
    assert_eq!(
        taken,
        Taken {
            number: 1,
            generation: generation(100),
            reset: Some(ResetReason::Wrapped)
        }
    );
    assert_eq!((map.previous(), map.active()), (1, 2));
    for number in 0..=255 {
        let full = since(&map, generation(1), number).unwrap_err();
        assert_eq!(full.code(), "wrapped");
    }
    assert_eq!(since(&map, generation(100), 1).unwrap(), [0; 0]);
    map.mark_blocks(7, 7);
    take(&mut map);
    assert_eq!(since(&map, generation(100), 1).unwrap(), [7]);
    // The snapshot held before is still right.
    let base = Base {
        generation: generation(1),
        number: 253,
    };
    assert_eq!(
        blocks(held.changed_since(&base).unwrap()),
        (0..10).collect::<Vec<_>>()
    );
}

#[test]
fn doubt_reaches_what_was_handed_out_until_the_next_take() {
    let mut map = map_of(100);
    take(&mut map);
    let held = map.read_map().unwrap();
    map.corrupt(ResetReason::RunMissed);
    map.corrupt(ResetReason::HookDead);
    assert!(map.read_map().is_none());
    let doubt = FullReason::Corrupted(ResetReason::RunMissed);
    assert_eq!(map.frozen().unwrap_err().reason, doubt);
    assert_eq!(held.changed_in_last().unwrap_err().reason, doubt);
    assert_eq!(held.changed_since(&held.base()).unwrap_err().reason, doubt);
    let taken = take(&mut map);
    assert_eq!((taken.number, taken.reset), (1, Some(ResetReason::RunMissed)));
    assert_eq!(map.corrupted(), None);
    assert_eq!(since(&map, taken.generation, 1).unwrap(), [0; 0]);
    assert!(held.changed_in_last().is_err());
}

#[test]
fn resize_starts_over_at_the_take() {
    let mut map = map_of(100);
    map.mark_blocks(5, 5);
    take(&mut map);
    for (capacity, count) in [(801_u32, 101), (8, 1), (8000, 1000)] {
        map.mark_blocks(0, 0);
        let taken = map
            .take(generation(capacity.into()), Sectors::new(capacity.into()))
            .unwrap();
        assert_eq!((taken.number, taken.reset), (1, Some(ResetReason::Resized)));
        assert_eq!(map.block_count(), count);
        assert_eq!(since(&map, generation(1), 1).unwrap_err().code(), "resized");
        assert_eq!(map.dirty_blocks(), 0);
    }
    let limit = CbtMap::MAX_BLOCKS * 8;
    assert!(map.take(generation(3), Sectors::new(limit + 1)).is_err());
    assert_eq!(map.corrupted(), Some(ResetReason::Resized));
    assert!(
        map.take(generation(4), Sectors::new(8000))
            .unwrap()
            .reset
            .is_some()
    );
}

#[test]
fn sectors_past_the_end_corrupt() {
    // The last block has one sector.
    let size = BlockSize::from_shift(12).unwrap();
    let fresh = || CbtMap::new(generation(1), size, Sectors::new(81)).unwrap();
    for (start, count, right) in [
        (80, 1, true),
        (0, 81, true),
        (100, 0, true),
        (80, 2, false),
        (81, 1, false),
        (0, 82, false),
        (88, 1, false),
        (u64::MAX, 1, false),
        (1, u64::MAX, false),
    ] {
        let mut map = fresh();
        let result = map.mark_extent(Sectors::new(start), Sectors::new(count));
        assert_eq!(result.is_ok(), right, "{start}+{count}");
        let want = (!right).then_some(ResetReason::OutOfRange);
        assert_eq!(map.corrupted(), want, "{start}+{count}");
        // A request by a person is only refused.
        let mut map = fresh();
        assert_eq!(
            map.mark_both(Sectors::new(start), Sectors::new(count)).is_ok(),
            right
        );
        assert_eq!(map.corrupted(), None);
        assert!(right || map.dirty_blocks() == 0);
    }
    let mut map = fresh();
    map.mark_bits(&[0x7ff]);
    assert_eq!((map.dirty_blocks(), map.corrupted()), (11, None));
    map.mark_bits(&[0x800]);
    assert_eq!(map.corrupted(), Some(ResetReason::OutOfRange));
    let mut map = fresh();
    map.mark_bits(&[0, 1]);
    assert_eq!(map.corrupted(), Some(ResetReason::OutOfRange));
    let mut map = fresh();
    map.mark_bits(&[0, 0, 0]);
    map.mark_blocks(3, 2);
    assert_eq!((map.dirty_blocks(), map.corrupted()), (0, None));
}

#[test]
fn marks_on_request_are_seen_in_both_maps() {
    let mut map = map_of(100);
    map.mark_both(Sectors::new(0), Sectors::new(1)).unwrap();
    take(&mut map);
    take(&mut map);
    let held = map.read_map().unwrap();
    map.mark_both(Sectors::new(17), Sectors::new(8)).unwrap();
    assert_eq!(since(&map, generation(1), 1).unwrap(), [2, 3]);
    assert_eq!(map.dirty_blocks(), 2);
    assert_eq!(blocks(held.changed_in_last().unwrap()), [0; 0]);
    take(&mut map);
    assert_eq!(since(&map, generation(1), 2).unwrap(), [2, 3]);
}

#[test]
fn the_live_map_has_the_open_period() {
    let mut map = map_of(100);
    map.mark_blocks(1, 1);
    take(&mut map);
    map.mark_blocks(2, 2);
    let live = map.live_map().unwrap();
    map.mark_blocks(3, 3);
    assert_eq!(live.number(), map.active());
    let base = |number| Base {
        generation: generation(1),
        number,
    };
    assert_eq!(blocks(live.changed_since(&base(0)).unwrap()), [1, 2]);
    assert_eq!(blocks(live.changed_since(&base(1)).unwrap()), [2]);
    map.corrupt(ResetReason::Requested);
    assert!(map.live_map().is_err() && live.changed_since(&base(1)).is_err());
}

#[test]
fn the_last_extent_ends_with_the_device() {
    let size = BlockSize::from_shift(16).unwrap();
    let mut map = CbtMap::new(generation(1), size, Sectors::new(128 * 70 + 3)).unwrap();
    map.mark_blocks(63, 70);
    map.mark_blocks(0, 0);
    take(&mut map);
    let extents: Vec<Extent> = map.read_map().unwrap().changed_in_last().unwrap().collect();
    let first = Extent {
        offset: 0,
        length: 65_536,
    };
    let last = Extent {
        offset: 63 << 16,
        length: (7 << 16) + 3 * 512,
    };
    assert_eq!(extents, [first, last]);
}

#[test]
fn a_map_too_large_is_refused() {
    let size = BlockSize::from_shift(12).unwrap();
    let error = CbtMap::new(generation(1), size, Sectors::new(u64::MAX)).unwrap_err();
    assert!(error.to_string().contains("use a larger block size"), "{error}");
}

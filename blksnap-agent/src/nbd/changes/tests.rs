//! Tests of the contexts of changes, against a plain model of the map.

use std::collections::BTreeSet;

use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::cbt::{CbtMap, FullReason, ResetReason};
use crate::units::{BlockSize, Sectors};

const CLEAN: u32 = 0;
const DIRTY: u32 = 1;
/// Size of a tracking block in bytes.
const BLOCK: u64 = 4096;

fn status(extents: &[(u64, u32)]) -> Vec<StatusExtent> {
    extents
        .iter()
        .map(|&(length, flags)| StatusExtent { length, flags })
        .collect()
}

fn told_of(dirty: &[Extent], offset: u64, end: u64, most: usize) -> Vec<StatusExtent> {
    let size = 1 << 20;
    Changes::last(dirty, size)
        .status(DIRTY_BITMAP_LAST, offset, end, most)
        .unwrap()
}

#[test]
fn dirty_extents_become_a_gapless_list() {
    let dirty = [
        Extent {
            offset: 10,
            length: 10,
        },
        Extent {
            offset: 30,
            length: 5,
        },
    ];
    assert_eq!(
        told_of(&dirty, 0, 40, 9),
        status(&[(10, CLEAN), (10, DIRTY), (10, CLEAN), (5, DIRTY), (5, CLEAN)])
    );
    assert_eq!(
        told_of(&dirty, 15, 33, 9),
        status(&[(5, DIRTY), (10, CLEAN), (3, DIRTY)])
    );
    assert_eq!(told_of(&dirty, 35, 40, 9), status(&[(5, CLEAN)]));
    assert_eq!(told_of(&dirty, 0, 40, 2), status(&[(10, CLEAN), (10, DIRTY)]));
    assert_eq!(told_of(&dirty, 0, 40, 1), status(&[(10, CLEAN)]));
    assert_eq!(told_of(&[], 0, 40, 9), status(&[(40, CLEAN)]));
}

proptest! {
    /// Oracle: a byte for each position.
    #[test]
    fn dirty_status_tells_each_byte_rightly(
        bytes in prop::collection::vec(any::<bool>(), 1..200),
        from in 0_usize..200,
        length in 1_usize..200,
    ) {
        let mut dirty: Vec<Extent> = Vec::new();
        for (offset, _) in bytes.iter().enumerate().filter(|(_, byte)| **byte) {
            let offset = offset as u64;
            match dirty.last_mut() {
                Some(last) if last.end() == offset => last.length += 1,
                _ => dirty.push(Extent { offset, length: 1 }),
            }
        }
        let from = from % bytes.len();
        let end = (from + length).min(bytes.len());
        let told: Vec<bool> = told_of(&dirty, from as u64, end as u64, usize::MAX)
            .iter()
            .flat_map(|extent| (0..extent.length).map(|_| extent.flags == DIRTY))
            .collect();
        prop_assert_eq!(told, bytes[from..end].to_vec());
    }
}

fn generation(number: u128) -> Generation {
    Generation::new(Uuid::from_u128(number))
}

/// A map of `blocks` blocks whose periods marked these blocks, taken after each.
fn map(blocks: u64, periods: &[BTreeSet<u64>]) -> CbtMap {
    let capacity = Sectors::new(blocks * BLOCK / 512);
    let block_size = BlockSize::from_bytes(BLOCK).unwrap();
    let mut map = CbtMap::new(generation(7), block_size, capacity).unwrap();
    for period in periods {
        for block in period {
            map.mark_blocks(*block, *block);
        }
        map.take(generation(8), capacity).unwrap();
    }
    map
}

fn of(map: &CbtMap) -> Changes {
    let read = map.read_map().unwrap();
    let size = read.capacity().bytes();
    Changes::of(read, size)
}

fn names(changes: &Changes) -> Vec<String> {
    changes
        .contexts()
        .iter()
        .map(|name| name.as_str().to_owned())
        .collect()
}

/// Whether each block is told as dirty, asked in pieces of `piece` blocks with at most `most` extents each.
fn blocks_told(changes: &Changes, context: &str, blocks: u64, piece: u64, most: usize) -> Vec<bool> {
    let mut told = Vec::new();
    while (told.len() as u64) < blocks {
        let from = told.len() as u64;
        let end = (from + piece).min(blocks);
        let extents = changes.status(context, from * BLOCK, end * BLOCK, most).unwrap();
        assert!(!extents.is_empty() && extents.len() <= most);
        for extent in extents {
            assert!(extent.length > 0 && extent.length % BLOCK == 0);
            told.extend((0..extent.length / BLOCK).map(|_| extent.flags == DIRTY));
        }
        assert!(told.len() as u64 <= end);
    }
    told
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Oracle: the sets of blocks of each period.
    #[test]
    fn contexts_tell_what_the_periods_marked(
        blocks in 1_u64..400,
        periods in prop::collection::vec(prop::collection::btree_set(0_u64..400, 0..60), 1..6),
        piece in 1_u64..500,
        most in 1_usize..8,
    ) {
        let periods: Vec<BTreeSet<u64>> = periods
            .into_iter()
            .map(|period| period.into_iter().filter(|block| *block < blocks).collect())
            .collect();
        let changes = of(&map(blocks, &periods));
        // A block marked again counts for the latest period.
        let last_marked = |block: u64| (0..periods.len()).rev().find(|period| periods[*period].contains(&block));
        for number in 0..=periods.len() {
            let context = format!("qemu:dirty-bitmap:since-{}-{number}", generation(7));
            prop_assert!(names(&changes).contains(&context));
            let told = blocks_told(&changes, &context, blocks, piece, most);
            for (block, dirty) in (0..).zip(told) {
                let changed = last_marked(block).is_some_and(|period| period >= number);
                prop_assert_eq!(dirty, changed, "block {} since {}", block, number);
            }
        }
        let told = blocks_told(&changes, DIRTY_BITMAP_LAST, blocks, piece, most);
        for (block, dirty) in (0..).zip(told) {
            prop_assert_eq!(dirty, periods[periods.len() - 1].contains(&block), "block {} last", block);
        }
    }
}

#[test]
fn contexts_are_named_newest_first_and_only_so() {
    let changes = of(&map(4, &[BTreeSet::from([1]), BTreeSet::from([2])]));
    let id = "00000000-0000-0000-0000-000000000007";
    let since = |number: &str| format!("qemu:dirty-bitmap:since-{id}-{number}");
    assert_eq!(
        names(&changes),
        [DIRTY_BITMAP_LAST.to_owned(), since("2"), since("1"), since("0")]
    );
    for other in ["01", "+1", "", "-1", "256", "1 "] {
        assert_eq!(
            changes.status(&since(other), 0, BLOCK, 9),
            Err(ChangesError::Name),
            "{other}"
        );
    }
    let simple = id.replace('-', "");
    let name = format!("qemu:dirty-bitmap:since-{simple}-1");
    assert_eq!(changes.status(&name, 0, BLOCK, 9), Err(ChangesError::Name));
}

#[test]
fn what_cant_be_told_is_refused_with_the_reason() {
    let changes = of(&map(4, &[BTreeSet::new()]));
    let id = generation(7);
    for answered in [
        DIRTY_BITMAP_LAST.to_owned(),
        format!("qemu:dirty-bitmap:since-{id}-1"),
        "base:allocation".into(),
        "qemu:allocation-depth".into(),
        "qemu:dirty-bitmap:other".into(),
        "qemu:dirty-bitmap:".into(),
    ] {
        assert_eq!(changes.refusal(&answered), None, "{answered}");
    }
    let future = changes.refusal(&format!("qemu:dirty-bitmap:since-{id}-2"));
    assert!(matches!(
        future,
        Some(ChangesError::Full(FullNeeded {
            reason: FullReason::FutureNumber { base: 2, number: 1 }
        }))
    ));
    let other = changes.refusal(&format!("qemu:dirty-bitmap:since-{}-1", generation(9)));
    assert!(matches!(
        other,
        Some(ChangesError::Full(FullNeeded {
            reason: FullReason::GenerationEnded { .. }
        }))
    ));
    for broken in ["since-", "since-1", "since-x-1", &format!("since-{id}-300")] {
        let refusal = changes.refusal(&format!("qemu:dirty-bitmap:{broken}"));
        assert_eq!(refusal, Some(ChangesError::Name), "{broken}");
    }
    // Where only the last period is known, no base is.
    let last = Changes::last([], BLOCK);
    assert_eq!(names(&last), [DIRTY_BITMAP_LAST]);
    let refusal = last.refusal(&format!("qemu:dirty-bitmap:since-{id}-1"));
    assert_eq!(refusal, Some(ChangesError::Name));
}

#[test]
fn a_doubt_ends_every_answer() {
    let mut map = map(4, &[BTreeSet::from([1]), BTreeSet::from([2])]);
    let changes = of(&map);
    let since = format!("qemu:dirty-bitmap:since-{}-1", generation(7));
    assert!(changes.status(&since, 0, 4 * BLOCK, 9).is_ok());
    map.corrupt(ResetReason::RunMissed);
    for context in [since.as_str(), DIRTY_BITMAP_LAST] {
        let told = changes.status(context, 0, 4 * BLOCK, 9);
        assert!(matches!(told, Err(ChangesError::Full(_))), "{told:?}");
        let refusal = changes.refusal(context).unwrap().to_string();
        assert!(refusal.contains("full copy needed"), "{refusal}");
    }
    assert!(names(&changes).is_empty());
}

#[test]
fn a_map_of_another_size_tells_nothing() {
    let read = map(4, &[BTreeSet::from([1])]).read_map().unwrap();
    for size in [3 * BLOCK, 4 * BLOCK - 512, 5 * BLOCK] {
        let changes = Changes::of(Arc::clone(&read), size);
        assert!(names(&changes).is_empty());
        let told = changes.status(DIRTY_BITMAP_LAST, 0, BLOCK, 9);
        assert!(matches!(told, Err(ChangesError::Size { .. })), "{told:?}");
    }
}

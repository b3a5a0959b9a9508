//! Maps that come back, and parts that make none.

use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::cbt::Base;
use crate::units::Extent;

fn generation(n: u128) -> Generation {
    Generation::new(Uuid::from_u128(n))
}

fn map_of(blocks: u64) -> CbtMap {
    let size = BlockSize::from_shift(12).unwrap();
    CbtMap::new(generation(1), size, Sectors::new(blocks * 8)).unwrap()
}

/// The map after a way through a file's header.
fn again(map: &CbtMap) -> Result<CbtMap, RestoreError> {
    let saved = map.save();
    let header = serde_json::to_string(&saved.header).unwrap();
    let header = serde_json::from_str(&header).unwrap();
    let sections = saved.sections().iter().map(Blocks::to_vec).collect();
    CbtMap::restore_sections(&header, sections)
}

/// Everything that can be asked of a map.
fn answers(map: &CbtMap) -> Vec<String> {
    let mut answers = vec![format!("{:?} {}", map.info(), map.active())];
    for read in [map.frozen(), map.live_map()] {
        let Ok(read) = read.as_ref() else {
            answers.push(format!("{read:?}"));
            continue;
        };
        answers.push(format!("{:?}", read.info()));
        answers.push(format!(
            "{:?}",
            read.changed_in_last().map(Iterator::collect::<Vec<Extent>>)
        ));
        for number in 0..=read.number().saturating_add(1) {
            for generation in [read.generation(), generation(u128::MAX)] {
                let changes = read.changed_since(&Base { generation, number });
                answers.push(format!("{:?}", changes.map(Iterator::collect::<Vec<Extent>>)));
            }
        }
    }
    answers
}

type Change<'a> = &'a dyn Fn(&mut SavedHeader, &mut Vec<u8>, &mut Option<Vec<u8>>);

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let mut map = map_of(100);
    map.mark_blocks(1, 3);
    map.take(generation(2), map.capacity()).unwrap();
    map.mark_blocks(3, 9);
    let saved = map.save();
    let (header, bytes, read) = (
        saved.header.clone(),
        saved.bytes.to_vec(),
        saved.read.unwrap().to_vec(),
    );
    assert!(CbtMap::restore(&header, bytes.clone(), Some(read.clone())).is_ok());

    let with = |change: Change<'_>| {
        let (mut header, mut bytes, mut read) = (header.clone(), bytes.clone(), Some(read.clone()));
        change(&mut header, &mut bytes, &mut read);
        CbtMap::restore(&header, bytes, read)
            .map(|_| ())
            .map_err(|error| error.to_string())
    };
    let refused = |change: Change<'_>, why: &str| {
        let error = with(change).unwrap_err();
        assert!(error.contains(why), "{error}, not {why}");
    };
    refused(&|header, _, _| header.block_size = 4095, "block size 4095");
    refused(&|header, _, _| header.block_size = 8192, "number of blocks");
    refused(
        &|header, _, _| header.capacity = Sectors::new(801),
        "number of blocks",
    );
    refused(&|header, _, _| header.capacity = Sectors::new(u64::MAX), "limit");
    refused(&|header, _, _| header.active = 0, "period 0");
    refused(&|header, _, _| header.active = 1, "not reached");
    refused(&|header, _, _| header.active = 3, "not of the last take");
    refused(&|header, _, _| header.read = None, "not of the last take");
    refused(&|_, _, read| *read = None, "missing");
    refused(&|_, bytes, _| bytes.truncate(99), "number of blocks");
    refused(&|_, bytes, _| bytes[50] = 3, "not reached");
    refused(&|_, bytes, _| bytes[50] = 1, "not of this map");
    refused(&|_, bytes, _| bytes[1] = 0, "not of this map");
    refused(&|_, _, read| read.as_mut().unwrap()[50] = 2, "not of this map");
    refused(&|_, _, read| read.as_mut().unwrap().push(0), "another length");
    for count in [0, 3] {
        let error = CbtMap::restore_sections(&header, vec![bytes.clone(); count]).unwrap_err();
        assert!(error.to_string().contains("number of sections"), "{error}");
    }

    let new = map_of(100);
    let error = CbtMap::restore(&new.save().header, vec![0; 100], Some(vec![0; 100])).unwrap_err();
    assert!(error.to_string().contains("there should be none"), "{error}");
}

#[test]
fn doubt_is_saved_and_shared_as_before() {
    let mut map = map_of(100);
    map.take(generation(2), map.capacity()).unwrap();
    let mut same = again(&map).unwrap();
    let handed_out = same.read_map().unwrap();
    same.corrupt(ResetReason::RunMissed);
    assert_eq!(handed_out.doubt(), Some(ResetReason::RunMissed));
    assert_eq!(again(&same).unwrap().corrupted(), Some(ResetReason::RunMissed));
}

#[derive(Clone, Debug)]
enum Op {
    Mark(u64, u64),
    OnRequest(u64, u64),
    Takes(u8),
    Resize(u64),
    Corrupt(usize),
    Saved,
}

fn operation() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..380_u64, 0..200_u64).prop_map(|(first, n)| Op::Mark(first, first + n)),
        3 => (0..3000_u64, 0..300_u64).prop_map(|(start, count)| Op::OnRequest(start, count)),
        6 => prop_oneof![9 => Just(1_u8), 1 => 240..=255_u8].prop_map(Op::Takes),
        1 => (1..3200_u64).prop_map(Op::Resize),
        1 => any::<usize>().prop_map(Op::Corrupt),
        3 => Just(Op::Saved),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    /// Two maps live the same life, but one is saved and restored now and then.
    #[test]
    fn a_restored_map_answers_as_the_one_saved(
        capacity in 1..3200_u64,
        ops in prop::collection::vec(operation(), 1..40),
    ) {
        let size = BlockSize::from_shift(12).unwrap();
        let begin = || CbtMap::new(generation(0), size, Sectors::new(capacity)).unwrap();
        let (mut map, mut twin) = (begin(), begin());
        let mut fresh = 0;
        let mut capacity = Sectors::new(capacity);
        for op in &ops {
            if let Op::Resize(sectors) = op {
                capacity = Sectors::new(*sectors);
            }
            for map in [&mut map, &mut twin] {
                match op {
                    Op::Mark(first, last) => map.mark_blocks(*first, *last),
                    Op::OnRequest(start, count) => {
                        // Past the end nothing is marked.
                        let _ = map.mark_both(Sectors::new(*start), Sectors::new(*count));
                    }
                    Op::Takes(count) => {
                        for number in 0..*count {
                            map.take(generation(fresh + 1 + u128::from(number)), capacity).unwrap();
                        }
                    }
                    Op::Corrupt(which) => map.corrupt(ResetReason::ALL[which % ResetReason::ALL.len()]),
                    Op::Resize(_) | Op::Saved => {}
                }
            }
            fresh += 256;
            if matches!(op, Op::Saved) {
                map = again(&map).unwrap();
            }
            prop_assert_eq!(map.info(), twin.info());
        }
        prop_assert_eq!(answers(&again(&map).unwrap()), answers(&twin));
    }
}

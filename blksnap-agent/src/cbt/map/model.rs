//! The map against a plain model: per block the last period it was written in, with numbers that never end.
//!
//! The model knows nothing of bytes, numbers below 256 or shared doubt. It keeps every take ever made and says what
//! an answer has to be: exactly the blocks written after the base's take, or "full needed" where the map has no
//! right to answer.

use proptest::prelude::*;

use super::tests::generation;
use super::*;
use crate::cbt::{Base, ChangedExtents};
use crate::units::Extent;

const BLOCK_SECTORS: u64 = 8;

#[derive(Clone, Debug)]
enum Op {
    Blocks(u64, u64),
    Extent(u64, u64),
    Bits(Vec<u64>),
    OnRequest(u64, u64),
    Takes(u8),
    Corrupt(usize),
    Resize(u64),
}

/// What a take was, as the model sees it.
#[derive(Clone)]
struct TakenModel {
    base: Base,
    /// Index of the generation in the order of their beginnings.
    era: usize,
    period: u64,
    capacity: u64,
    /// Per block the last period it was written in; 0 for never.
    last: Vec<u64>,
    map: Arc<ReadMap>,
}

struct Model {
    capacity: u64,
    capacity_now: u64,
    period: u64,
    /// Period in which the generation began.
    first: u64,
    last: Vec<u64>,
    /// Whether each generation is known to be wrong.
    doubted: Vec<bool>,
    takes: Vec<TakenModel>,
}

impl Model {
    fn new(capacity: u64) -> Self {
        Self {
            capacity,
            capacity_now: capacity,
            period: 1,
            first: 1,
            last: vec![0; blocks(capacity)],
            doubted: vec![false],
            takes: Vec::new(),
        }
    }

    fn era(&self) -> usize {
        self.doubted.len() - 1
    }

    fn doubt(&mut self) {
        let era = self.era();
        self.doubted[era] = true;
    }

    fn write(&mut self, first: u64, last: u64) {
        for block in first..=last {
            match self.last.get_mut(index(block)) {
                Some(period) => *period = self.period,
                None => self.doubt(),
            }
        }
    }

    /// Whether the take now has to start the map over.
    fn starts_over(&self) -> bool {
        self.capacity != self.capacity_now || self.doubted[self.era()] || self.period - self.first + 1 == 255
    }
}

fn blocks(capacity: u64) -> usize {
    index(capacity.div_ceil(BLOCK_SECTORS))
}

/// The extents of the blocks that are to be reported, found one by one.
fn extents_of(taken: &TakenModel, wanted: impl Fn(u64) -> bool) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    for (block, last) in (0_u64..).zip(&taken.last) {
        if !wanted(*last) {
            continue;
        }
        let offset = block * BLOCK_SECTORS * 512;
        let length = (taken.capacity * 512 - offset).min(BLOCK_SECTORS * 512);
        match extents.last_mut() {
            Some(before) if before.end() == offset => before.length += length,
            _ => extents.push(Extent { offset, length }),
        }
    }
    extents
}

fn check(model: &Model, map: &CbtMap, taken: &TakenModel, base: &TakenModel) -> Result<(), TestCaseError> {
    let since = taken.map.changed_since(&base.base).map(Iterator::collect);
    if model.doubted[taken.era] || base.era != taken.era || base.period > taken.period {
        let full: Result<Vec<Extent>, FullNeeded> = since;
        prop_assert!(full.is_err(), "{} since {} answered", taken.base, base.base);
    } else {
        prop_assert_eq!(since, Ok(extents_of(taken, |last| last > base.period)));
    }
    prop_assert!(map.blocks.iter().all(|byte| byte <= map.active));
    Ok(())
}

fn apply(model: &mut Model, map: &mut CbtMap, op: &Op, fresh: &mut u128) -> Result<(), TestCaseError> {
    let before = map.blocks.clone();
    match op {
        Op::Blocks(first, last) => {
            map.mark_blocks(*first, *last);
            model.write(*first, *last);
        }
        Op::Extent(start, count) => {
            let result = map.mark_extent(Sectors::new(*start), Sectors::new(*count));
            let inside = *count == 0 || start + count <= model.capacity;
            prop_assert_eq!(result.is_ok(), inside);
            if *count > 0 {
                model.write(start / BLOCK_SECTORS, (start + count - 1) / BLOCK_SECTORS);
            }
            if !inside {
                model.doubt();
            }
        }
        Op::Bits(words) => {
            map.mark_bits(words);
            for block in 0..words.len() as u64 * 64 {
                if words[index(block / 64)] >> (block % 64) & 1 == 1 {
                    model.write(block, block);
                }
            }
        }
        Op::OnRequest(start, count) => {
            let inside = *count == 0 || start + count <= model.capacity;
            let result = map.mark_both(Sectors::new(*start), Sectors::new(*count));
            prop_assert_eq!(result.is_ok(), inside);
            if inside && *count > 0 {
                let (first, last) = (start / BLOCK_SECTORS, (start + count - 1) / BLOCK_SECTORS);
                model.write(first, last);
                // A copy of the last take's map, if this generation has one, now shows them as well.
                let era = model.era();
                if let Some(taken) = model.takes.last().filter(|t| t.era == era).cloned() {
                    let mut marked = taken;
                    marked.last[index(first)..=index(last)].fill(marked.period);
                    if let Some(read) = map.read_map() {
                        marked.map = read;
                        model.takes.push(marked);
                    }
                }
            }
        }
        Op::Takes(count) => {
            for _ in 0..*count {
                *fresh += 1;
                let over = model.starts_over();
                let taken = map.take(generation(*fresh), Sectors::new(model.capacity_now));
                let taken = taken.map_err(|e| TestCaseError::fail(e.to_string()))?;
                prop_assert_eq!(taken.reset.is_some(), over);
                if over {
                    prop_assert_eq!(taken.generation, generation(*fresh));
                    model.capacity = model.capacity_now;
                    model.last = vec![0; blocks(model.capacity)];
                    model.first = model.period;
                    model.doubted.push(false);
                }
                let read = map.read_map();
                prop_assert!(read.is_some());
                let Some(read) = read else { continue };
                let base = Base {
                    generation: taken.generation,
                    number: taken.number,
                };
                prop_assert_eq!(read.base(), base);
                prop_assert!(model.takes.iter().all(|t| t.era != model.era() || t.base != base));
                model.takes.push(TakenModel {
                    base,
                    era: model.era(),
                    period: model.period,
                    capacity: model.capacity,
                    last: model.last.clone(),
                    map: read,
                });
                model.period += 1;
            }
            return Ok(());
        }
        Op::Corrupt(which) => {
            map.corrupt(ResetReason::ALL[which % ResetReason::ALL.len()]);
            model.doubt();
        }
        Op::Resize(capacity) => model.capacity_now = *capacity,
    }
    prop_assert!(before.iter().zip(map.blocks.iter()).all(|(old, new)| old <= new));
    Ok(())
}

fn operation() -> impl Strategy<Value = Op> {
    let sectors = 0..3100_u64;
    let count = prop_oneof![4 => 0..40_u64, 1 => 0..1200_u64];
    prop_oneof![
        6 => (0..390_u64, prop_oneof![0..4_u64, 0..200_u64]).prop_map(|(first, n)| Op::Blocks(first, first + n)),
        6 => (sectors.clone(), count.clone()).prop_map(|(start, count)| Op::Extent(start, count)),
        6 => prop::collection::vec(prop_oneof![Just(0), Just(u64::MAX), any::<u64>()], 0..6).prop_map(Op::Bits),
        4 => (sectors, count).prop_map(|(start, count)| Op::OnRequest(start, count)),
        12 => prop_oneof![9 => Just(1_u8), 1 => 2..5_u8, 1 => 240..=255_u8].prop_map(Op::Takes),
        1 => any::<usize>().prop_map(Op::Corrupt),
        1 => prop_oneof![Just(3072_u64), 0..3200_u64].prop_map(Op::Resize),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_answer_is_the_models(
        capacity in prop_oneof![Just(3072_u64), 0..3200_u64],
        ops in prop::collection::vec(operation(), 1..60),
        picks in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 40),
    ) {
        let size = BlockSize::from_shift(12).unwrap();
        let mut map = CbtMap::new(generation(0), size, Sectors::new(capacity)).unwrap();
        let mut model = Model::new(capacity);
        let mut fresh = 0;
        for op in &ops {
            apply(&mut model, &mut map, op, &mut fresh)?;
            let doubted = model.doubted[model.era()];
            prop_assert_eq!(map.corrupted().is_some(), doubted);
            let dirty = model.last.iter().filter(|last| **last == model.period).count() as u64;
            prop_assert_eq!(map.dirty_blocks(), dirty);
        }
        if model.takes.is_empty() {
            prop_assert!(map.read_map().is_none());
            return Ok(());
        }
        for (taken, base) in &picks {
            check(&model, &map, taken.get(&model.takes), base.get(&model.takes))?;
        }
        let newest = model.takes.last().unwrap();
        for base in &model.takes {
            check(&model, &map, newest, base)?;
        }
        if !model.doubted[newest.era] {
            // Number 0 is the generation's beginning, and numbers not reached are refused.
            let all = Base { number: 0, ..newest.base };
            let got: Vec<Extent> = newest.map.changed_since(&all).unwrap().collect();
            prop_assert_eq!(got, extents_of(newest, |last| last > 0));
            let last: Vec<Extent> = newest.map.changed_in_last().unwrap().collect();
            prop_assert_eq!(last, extents_of(newest, |last| last == newest.period));
            for number in newest.base.number..u8::MAX {
                let future = Base { number: number + 1, ..newest.base };
                prop_assert!(newest.map.changed_since(&future).is_err());
            }
        }
    }

    #[test]
    fn extents_of_any_bytes_are_the_runs(
        runs in prop::collection::vec((any::<u8>(), prop_oneof![1..4_usize, 1..150_usize]), 0..40),
        number in any::<u8>(),
        short in 0..8_u64,
        skips in prop::collection::vec(any::<u64>(), 5),
    ) {
        let bytes: Vec<u8> = runs.iter().flat_map(|(byte, n)| std::iter::repeat_n(*byte, *n)).collect();
        let capacity = (bytes.len() as u64 * BLOCK_SECTORS).saturating_sub(short);
        let size = BlockSize::from_shift(12).unwrap();
        let mut map = CbtMap::new(generation(0), size, Sectors::new(capacity)).unwrap();
        map.take(generation(1), Sectors::new(capacity)).unwrap();
        let mut read = ReadMap::clone(&map.read_map().unwrap());
        read.number = number;
        read.blocks = Blocks::from(bytes.clone());
        let read = Arc::new(read);
        let model = TakenModel {
            base: read.base(),
            era: 0,
            period: number.into(),
            capacity,
            last: bytes.iter().copied().map(u64::from).collect(),
            map: Arc::clone(&read),
        };
        let last: Vec<Extent> = read.changed_in_last().unwrap().collect();
        prop_assert_eq!(&last, &extents_of(&model, |byte| byte == u64::from(number)));
        for at in skips {
            let from = at % (bytes.len() as u64 + 70);
            let start = from * BLOCK_SECTORS * 512;
            let rest = last.iter().filter(|extent| extent.end() > start);
            let wanted: Vec<Extent> = rest
                .map(|extent| {
                    let offset = extent.offset.max(start);
                    Extent { offset, length: extent.end() - offset }
                })
                .collect();
            // Before the first one is asked for, and after some.
            let fresh = read.changed_in_last().unwrap().skip_to(start + at % 4096);
            prop_assert_eq!(fresh.collect::<Vec<_>>(), &wanted[..]);
            let mut used = read.changed_in_last().unwrap();
            let passed = used.by_ref().take(3).last().map_or(0, |extent| extent.end());
            let wanted: Vec<Extent> = wanted.into_iter().filter(|extent| extent.offset >= passed).collect();
            prop_assert_eq!(used.skip_to(start).collect::<Vec<_>>(), wanted);
        }
        for since in [0, 1, number / 2, number.saturating_sub(1), number] {
            let since = since.min(number);
            let base = Base { number: since, ..read.base() };
            let got: ChangedExtents = read.changed_since(&base).unwrap();
            let want = extents_of(&model, |byte| byte > u64::from(since));
            prop_assert_eq!(got.total_bytes(), want.iter().map(|e| e.length).sum::<u64>());
            prop_assert_eq!(got.collect::<Vec<_>>(), want);
        }
    }
}

//! Heat: where on the device blocks changed, and how long ago, in few enough buckets to be drawn.
//!
//! Time is counted in periods, the only clock a map has: a block of the open period changed *now*, one of the period
//! before changed before the last take. A period says little on its own when there are two hundred, so they are put
//! together in [`Age`]s that become longer the older they are. A bucket is a range of blocks with the number of its
//! blocks in each age; its size is a power of two, so that offsets stay round numbers.

use serde::{Deserialize, Serialize};

use super::CbtInfo;
use super::blocks::Blocks;
use super::reason::ResetReason;
use crate::units::Generation;

/// Periods back from the open one at which an age ends: now, the last one, the one before, then twice as many.
const STEPS: [u8; 7] = [0, 1, 2, 4, 8, 16, 254];

/// Most buckets that are made.
pub const MAX_BUCKETS: u64 = 1 << 16;

/// Where and how recently a device changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heat {
    /// Bytes of the device.
    pub device_capacity: u64,
    /// Bytes of a tracking block.
    pub block_size: u64,
    /// Number of tracking blocks.
    pub block_count: u64,
    /// Generation of the map; what changed before it is not known.
    pub generation: Generation,
    /// Number of the open period; the last take has the number before.
    pub active_number: u8,
    /// Why the map may lack changes, if it may.
    pub corrupted: Option<ResetReason>,
    /// The ages, the newest first; blocks in none of them did not change in this generation.
    pub ages: Vec<Age>,
    /// Blocks that did not change in this generation.
    pub unchanged_blocks: u64,
    /// Bytes of every bucket but the last one, which may be shorter.
    pub bucket_size: u64,
    /// The buckets, by ascending offset.
    pub buckets: Vec<Bucket>,
}

/// Some periods that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Age {
    /// Number of the newest period.
    pub newest: u8,
    /// Number of the oldest period.
    pub oldest: u8,
    /// Blocks of the device that last changed in one of them.
    pub blocks: u64,
}

/// A range of the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bucket {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Number of tracking blocks.
    pub blocks: u64,
    /// Number of the last period in which one of them changed.
    pub newest: Option<u8>,
    /// How many blocks last changed in each of [`Heat::ages`].
    pub changed: Vec<u64>,
}

impl Heat {
    /// The heat of a map with `active` as the open period, in at most `most` buckets (1 to [`MAX_BUCKETS`]).
    #[must_use]
    pub fn new(info: &CbtInfo, active: u8, blocks: &Blocks, most: u64) -> Self {
        let most = most.clamp(1, MAX_BUCKETS);
        let mut shift = 0;
        while info.block_count.div_ceil(1 << shift) > most {
            shift += 1;
        }
        let mut ages = ages(active);
        let mut counter = Counter::new(info, 1 << shift, &ages);
        for piece in blocks.pieces() {
            counter.count(piece);
        }
        let buckets = counter.finish();
        for (index, age) in ages.iter_mut().enumerate() {
            age.blocks = buckets.iter().map(|bucket| bucket.changed[index]).sum();
        }
        let changed: u64 = ages.iter().map(|age| age.blocks).sum();
        Self {
            device_capacity: info.device_capacity,
            block_size: info.block_size,
            block_count: info.block_count,
            generation: info.generation,
            active_number: active,
            corrupted: info.corrupted,
            unchanged_blocks: info.block_count - changed,
            bucket_size: info.block_size << shift,
            ages,
            buckets,
        }
    }
}

/// The ages of a map in period `active`, without blocks.
fn ages(active: u8) -> Vec<Age> {
    let mut newest = active;
    let mut ages = Vec::new();
    for step in STEPS {
        if newest == 0 {
            break;
        }
        let oldest = active.saturating_sub(step).max(1);
        ages.push(Age {
            newest,
            oldest,
            blocks: 0,
        });
        newest = oldest - 1;
    }
    ages
}

/// Counts blocks into buckets.
struct Counter {
    capacity: u64,
    block_size: u64,
    bucket_blocks: u64,
    /// Age of each number; the last index is for none.
    age_of: [u8; 256],
    ages: usize,
    /// Of the open bucket, by number.
    counts: [u64; 256],
    filled: u64,
    buckets: Vec<Bucket>,
}

impl Counter {
    fn new(info: &CbtInfo, bucket_blocks: u64, ages: &[Age]) -> Self {
        let mut age_of = [u8::MAX; 256];
        for (index, age) in (0_u8..).zip(ages) {
            age_of[usize::from(age.oldest)..=usize::from(age.newest)].fill(index);
        }
        Self {
            capacity: info.device_capacity,
            block_size: info.block_size,
            bucket_blocks,
            age_of,
            ages: ages.len(),
            counts: [0; 256],
            filled: 0,
            buckets: Vec::new(),
        }
    }

    fn count(&mut self, mut piece: &[u8]) {
        while !piece.is_empty() {
            let room = usize::try_from(self.bucket_blocks - self.filled).unwrap_or(usize::MAX);
            let (now, rest) = piece.split_at(room.min(piece.len()));
            for byte in now {
                self.counts[usize::from(*byte)] += 1;
            }
            self.filled += now.len() as u64;
            if self.filled == self.bucket_blocks {
                self.close();
            }
            piece = rest;
        }
    }

    fn close(&mut self) {
        let mut changed = vec![0; self.ages];
        let mut newest = None;
        for ((number, count), age) in (0_u8..=u8::MAX).zip(self.counts).zip(self.age_of) {
            // Number 0 is of no age.
            if let Some(sum) = changed.get_mut(usize::from(age)).filter(|_| count > 0) {
                *sum += count;
                newest = Some(number);
            }
        }
        let offset = self.buckets.len() as u64 * self.bucket_blocks * self.block_size;
        self.buckets.push(Bucket {
            offset,
            length: (self.filled * self.block_size).min(self.capacity - offset),
            blocks: self.filled,
            newest,
            changed,
        });
        self.counts = [0; 256];
        self.filled = 0;
    }

    fn finish(mut self) -> Vec<Bucket> {
        if self.filled > 0 {
            self.close();
        }
        self.buckets
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::cbt::CbtMap;
    use crate::units::{BlockSize, Sectors};

    fn info(blocks: u64, short: u64) -> CbtInfo {
        let size = BlockSize::from_shift(12).unwrap();
        let capacity = Sectors::new((blocks * 8).saturating_sub(short));
        CbtMap::new(Generation::new(Uuid::from_u128(1)), size, capacity)
            .unwrap()
            .info()
    }

    fn spans(active: u8) -> Vec<(u8, u8)> {
        ages(active).iter().map(|age| (age.newest, age.oldest)).collect()
    }

    #[test]
    fn ages_cover_every_period_once_and_grow() {
        assert_eq!(spans(1), [(1, 1)]);
        assert_eq!(spans(2), [(2, 2), (1, 1)]);
        assert_eq!(spans(7), [(7, 7), (6, 6), (5, 5), (4, 3), (2, 1)]);
        assert_eq!(
            spans(255),
            [
                (255, 255),
                (254, 254),
                (253, 253),
                (252, 251),
                (250, 247),
                (246, 239),
                (238, 1)
            ]
        );
        for active in 1..=255 {
            let covered: Vec<u8> = spans(active)
                .iter()
                .flat_map(|(newest, oldest)| (*oldest..=*newest).rev())
                .collect();
            assert_eq!(covered, (1..=active).rev().collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_device_without_blocks_has_no_buckets() {
        let heat = Heat::new(&info(0, 0), 1, &Blocks::default(), 10);
        assert_eq!((heat.buckets.len(), heat.unchanged_blocks), (0, 0));
    }

    proptest! {
        #[test]
        fn buckets_are_what_counting_block_by_block_gives(
            seed in prop::collection::vec((any::<u8>(), 1..40_usize), 0..30),
            active in 1..=255_u8,
            most in 0..100_u64,
            short in 0..8_u64,
        ) {
            let bytes: Vec<u8> = seed
                .iter()
                .flat_map(|(byte, n)| std::iter::repeat_n(byte % active, *n))
                .chain([active])
                .collect();
            let info = info(bytes.len() as u64, short);
            let heat = Heat::new(&info, active, &Blocks::from(bytes.clone()), most);

            prop_assert!(heat.buckets.len() as u64 <= most.max(1));
            prop_assert!((heat.bucket_size / 4096).is_power_of_two());
            // One bucket more than half of what was asked for, unless blocks are as fine as it gets.
            prop_assert!(heat.bucket_size == 4096 || heat.buckets.len() as u64 * 2 >= most.max(1));
            let mut end = 0;
            let mut unchanged = 0;
            for bucket in &heat.buckets {
                prop_assert_eq!(bucket.offset, end);
                end += bucket.length;
                let first = usize::try_from(bucket.offset / 4096).unwrap();
                let blocks = &bytes[first..first + usize::try_from(bucket.blocks).unwrap()];
                prop_assert_eq!(bucket.newest, blocks.iter().copied().max().filter(|number| *number > 0));
                for (age, count) in heat.ages.iter().zip(&bucket.changed) {
                    let wanted = blocks.iter().filter(|byte| (age.oldest..=age.newest).contains(byte)).count();
                    prop_assert_eq!(*count, wanted as u64);
                }
                unchanged += blocks.iter().filter(|byte| **byte == 0).count() as u64;
            }
            prop_assert_eq!(end, info.device_capacity);
            prop_assert_eq!(heat.unchanged_blocks, unchanged);
            for (index, age) in heat.ages.iter().enumerate() {
                prop_assert_eq!(age.blocks, heat.buckets.iter().map(|b| b.changed[index]).sum::<u64>());
            }
        }
    }
}

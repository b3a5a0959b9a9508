//! Changed extents: the blocks of a read map that meet a condition, merged into ascending byte ranges.
//!
//! The map is scanned 64 blocks at a time: eight words of eight bytes become one mask of 64 bits, and the mask becomes
//! the places where runs begin and end, which are taken by counting zeros. Nothing is collected, so that two million
//! blocks can be streamed from a shared map at the cost of one pass over it.

use std::iter::FusedIterator;
use std::sync::Arc;

use super::read_map::ReadMap;
use crate::units::Extent;

/// A one in each byte of a word.
const ONES: u64 = 0x0101_0101_0101_0101;
/// The low seven bits of each byte of a word.
const LOW: u64 = 0x7f * ONES;
/// The highest bit of each byte of a word.
const HIGH: u64 = 0x80 * ONES;

/// Which blocks are wanted, by their byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Condition {
    /// Byte greater than this.
    Above(u8),
    /// Byte equal to this.
    Equal(u8),
}

impl Condition {
    /// Bit `i` is set if byte `i` of `blocks` meets the condition.
    #[inline]
    fn mask(self, blocks: &[u8; 64]) -> u64 {
        match self {
            // x > n, by bytes and without a carry between them: the low seven bits plus (127 - n's low seven)
            // set the high bit where they are greater; n's own high bit decides how x's joins in.
            Self::Above(n) if n < 0x80 => {
                let add = u64::from(0x7f - n) * ONES;
                gather(blocks, |x| ((x & LOW) + add) | x)
            }
            Self::Above(n) => {
                let add = u64::from(0xff - n) * ONES;
                gather(blocks, |x| ((x & LOW) + add) & x)
            }
            Self::Equal(n) => {
                let same = u64::from(n) * ONES;
                gather(blocks, |x| {
                    let differs = x ^ same;
                    !(((differs & LOW) + LOW) | differs)
                })
            }
        }
    }

    /// The condition for one byte.
    #[inline]
    const fn holds(self, byte: u8) -> bool {
        match self {
            Self::Above(n) => byte > n,
            Self::Equal(n) => byte == n,
        }
    }
}

/// Collects the high bits that `test` leaves in the bytes of each word.
#[inline]
fn gather(blocks: &[u8; 64], test: impl Fn(u64) -> u64) -> u64 {
    let (words, _) = blocks.as_chunks::<8>();
    let mut mask = 0;
    for (i, word) in words.iter().enumerate() {
        let high = (test(u64::from_le_bytes(*word)) & HIGH) >> 7;
        // Bit 8 i goes to bit 56 + i; no two partial products meet.
        mask |= (high.wrapping_mul(0x0102_0408_1020_4080) >> 56) << (8 * i);
    }
    mask
}

/// Iterator over changed extents: merged, ascending, clipped to the device's capacity.
///
/// It owns its share of the read map and can outlive the map it came from.
#[derive(Clone, Debug)]
pub struct ChangedExtents {
    map: Arc<ReadMap>,
    condition: Condition,
    /// log2 of the block size in bytes.
    shift: u32,
    /// Bytes of the device.
    capacity: u64,
    /// Where, in the 64 blocks that begin at `base`, runs begin and end that were not reported yet: in turn, and a
    /// beginning first.
    edges: u64,
    /// Whether the last of these 64 blocks is wanted: the next one then is no beginning.
    carry: bool,
    /// First block of the 64 of `edges`.
    base: usize,
    /// First block not scanned yet.
    next: usize,
}

impl ChangedExtents {
    pub(super) fn new(map: Arc<ReadMap>, condition: Condition) -> Self {
        Self {
            shift: map.block_size().shift(),
            capacity: map.capacity().bytes(),
            map,
            condition,
            edges: 0,
            carry: false,
            base: 0,
            next: 0,
        }
    }

    /// The read map that this iterates over.
    #[must_use]
    pub fn read_map(&self) -> &Arc<ReadMap> {
        &self.map
    }

    /// Sum of the lengths of the extents still to come, in bytes.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.clone().map(|extent| extent.length).sum()
    }

    /// Goes on from the block that holds the byte `offset`. An extent that began before starts with that block.
    #[must_use]
    pub fn skip_to(mut self, offset: u64) -> Self {
        let block = usize::try_from(offset >> self.shift).unwrap_or(usize::MAX);
        if block >= self.next {
            (self.edges, self.carry) = (0, false);
            // Scanning goes by 64 blocks.
            self.next = (block / 64 * 64).max(self.next);
            if !self.load() {
                return self;
            }
        }
        if block > self.base {
            let mask = between(self.edges) & (u64::MAX << (block % 64));
            self.edges = mask ^ (mask << 1);
        }
        self
    }

    /// Loads the edges of the next 64 blocks; false at the end of the map.
    #[inline]
    fn load(&mut self) -> bool {
        let rest = self.map.blocks().rest_of_piece(self.next);
        if rest.is_empty() {
            return false;
        }
        self.base = self.next;
        let mask = if let Some(blocks) = rest.first_chunk::<64>() {
            self.next += 64;
            self.condition.mask(blocks)
        } else {
            self.next += rest.len();
            rest.iter().rev().fold(0, |mask, byte| {
                (mask << 1) | u64::from(self.condition.holds(*byte))
            })
        };
        self.edges = mask ^ (mask << 1 | u64::from(self.carry));
        self.carry = mask >> 63 == 1;
        true
    }

    /// The next block at which a run begins or, after that, the block after its end; none at the end of the map.
    #[inline]
    fn edge(&mut self) -> Option<usize> {
        while self.edges == 0 {
            if !self.load() {
                return None;
            }
        }
        let at = self.base + self.edges.trailing_zeros() as usize;
        self.edges &= self.edges - 1;
        Some(at)
    }

    /// The next extent, which is not within the 64 blocks of `edges` as a whole.
    #[inline(never)]
    fn next_over(&mut self) -> Option<Extent> {
        let first = self.edge()?;
        // A run may reach the end of the map.
        let end = self.edge().unwrap_or(self.next);
        Some(extent(first, end, self.shift, self.capacity))
    }
}

/// The blocks `first..end` of 2^`shift` bytes, in bytes. The last block of the map may be short.
#[inline]
fn extent(first: usize, end: usize, shift: u32, capacity: u64) -> Extent {
    let offset = (first as u64) << shift;
    let end = ((end as u64) << shift).min(capacity);
    Extent {
        offset,
        length: end - offset,
    }
}

/// The bits from each beginning to before its end.
const fn between(edges: u64) -> u64 {
    let mut mask = edges;
    let mut step = 1;
    while step < 64 {
        mask ^= mask << step;
        step *= 2;
    }
    mask
}

impl Iterator for ChangedExtents {
    type Item = Extent;

    #[inline]
    fn next(&mut self) -> Option<Extent> {
        let begins = self.edges;
        let ends = begins & begins.wrapping_sub(1);
        if ends == 0 {
            return self.next_over();
        }
        // A whole run in these 64 blocks: nearly all there are where there are many.
        self.edges = ends & (ends - 1);
        Some(extent(
            self.base + begins.trailing_zeros() as usize,
            self.base + ends.trailing_zeros() as usize,
            self.shift,
            self.capacity,
        ))
    }

    #[inline]
    fn fold<B, F: FnMut(B, Extent) -> B>(mut self, init: B, mut f: F) -> B {
        let mut sum = init;
        let (shift, capacity) = (self.shift, self.capacity);
        loop {
            // Beginnings and ends apart, so that neither waits for the other.
            let base = self.base;
            let inside = between(self.edges);
            let (mut begins, mut ends) = (self.edges & inside, self.edges & !inside);
            while ends != 0 {
                let first = base + begins.trailing_zeros() as usize;
                let end = base + ends.trailing_zeros() as usize;
                begins &= begins.wrapping_sub(1);
                ends &= ends - 1;
                sum = f(sum, extent(first, end, shift, capacity));
            }
            // At most one is left, whose end is in later blocks.
            self.edges = begins;
            match self.next_over() {
                Some(extent) => sum = f(sum, extent),
                None => return sum,
            }
        }
    }
}

impl FusedIterator for ChangedExtents {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Base, CbtMap};
    use super::*;
    use crate::units::{BlockSize, Generation, Sectors};

    proptest! {
        /// One by one and all at once give the same, from any place on.
        #[test]
        fn a_fold_is_all_that_comes(words in proptest::collection::vec(any::<u64>(), 1..40), short in 1_u64..64, skip in 0_usize..600) {
            let generation = Generation::new(uuid::Uuid::nil());
            let size = BlockSize::from_shift(16).unwrap();
            let blocks = words.len() as u64 * 64 - short;
            let mut words = words;
            if let Some(last) = words.last_mut() {
                *last &= u64::MAX >> short;
            }
            let mut map = CbtMap::new(generation, size, Sectors::new(blocks * 128 - 5)).unwrap();
            map.mark_bits(&words);
            map.take(generation, map.capacity()).unwrap();
            let base = Base { generation, number: 0 };
            let mut extents = map.frozen().unwrap().changed_since(&base).unwrap();
            for _ in 0..skip {
                extents.next();
            }
            let mut one_by_one = Vec::new();
            for extent in extents.clone() {
                one_by_one.push(extent);
            }
            let at_once = extents.fold(Vec::new(), |mut all, extent| {
                all.push(extent);
                all
            });
            prop_assert_eq!(at_once, one_by_one);
        }
    }

    #[test]
    fn masks_match_the_condition_for_every_byte_and_number() {
        for number in 0..=255_u8 {
            for condition in [Condition::Above(number), Condition::Equal(number)] {
                for quarter in 0..4_u8 {
                    let mut blocks = [0; 64];
                    for (byte, i) in blocks.iter_mut().zip(0_u8..) {
                        *byte = quarter * 64 + i;
                    }
                    let want = blocks
                        .iter()
                        .rev()
                        .fold(0_u64, |mask, b| (mask << 1) | u64::from(condition.holds(*b)));
                    assert_eq!(condition.mask(&blocks), want, "{condition:?} quarter {quarter}");
                }
            }
        }
    }
}

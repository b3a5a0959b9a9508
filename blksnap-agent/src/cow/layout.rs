//! Layout: chunks and units of a device, and sets of units in a chunk.

/// Most units in a chunk.
const UNITS: u32 = 64;
/// log2 of the smallest unit.
const MIN_UNIT_SHIFT: u32 = 12;

/// Chunks and units of a device. The last chunk, and its last unit, may be short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkLayout {
    size: u64,
    chunk_shift: u32,
    unit_shift: u32,
}

/// The part of a byte range that is in one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkRange {
    /// Number of the chunk.
    pub chunk: u64,
    /// First byte on the device.
    pub offset: u64,
    /// Bytes, at least one.
    pub length: u64,
}

impl ChunkRange {
    /// The byte after the last one.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.offset + self.length
    }
}

impl ChunkLayout {
    /// A device of `size` bytes in chunks of 2^`chunk_shift` bytes, whose units are at least 2^`block_shift` bytes.
    #[must_use]
    pub fn new(size: u64, chunk_shift: u32, block_shift: u32) -> Self {
        let unit_shift = chunk_shift
            .saturating_sub(UNITS.trailing_zeros())
            .max(MIN_UNIT_SHIFT)
            .max(block_shift)
            .min(chunk_shift);
        Self {
            size,
            chunk_shift,
            unit_shift,
        }
    }

    /// Bytes of the device.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of a chunk that is not the last one.
    #[must_use]
    pub const fn chunk_bytes(&self) -> u64 {
        1 << self.chunk_shift
    }

    /// Bytes of a unit that is not the last one.
    #[must_use]
    pub const fn unit_bytes(&self) -> u64 {
        1 << self.unit_shift
    }

    /// Number of chunks.
    #[must_use]
    pub const fn chunks(&self) -> u64 {
        self.size.div_ceil(self.chunk_bytes())
    }

    /// Bytes of a chunk; fewer for a short last one.
    #[must_use]
    pub fn length_of(&self, chunk: u64) -> u64 {
        self.size
            .saturating_sub(chunk << self.chunk_shift)
            .min(self.chunk_bytes())
    }

    /// First byte of a chunk.
    #[must_use]
    pub const fn start_of(&self, chunk: u64) -> u64 {
        chunk << self.chunk_shift
    }

    /// A byte range by chunks, in order. What is past the end of the device is left out.
    pub fn split(&self, offset: u64, length: u64) -> impl Iterator<Item = ChunkRange> + use<> {
        let layout = *self;
        let end = offset.saturating_add(length).min(self.size);
        let mut next = offset;
        std::iter::from_fn(move || {
            if next >= end {
                return None;
            }
            let chunk = next >> layout.chunk_shift;
            let stop = (layout.start_of(chunk) + layout.chunk_bytes()).min(end);
            let range = ChunkRange {
                chunk,
                offset: next,
                length: stop - next,
            };
            next = stop;
            Some(range)
        })
    }

    /// The units that a range touches.
    #[must_use]
    pub fn touched(&self, range: &ChunkRange) -> UnitSet {
        let start = self.start_of(range.chunk);
        let first = (range.offset - start) >> self.unit_shift;
        let last = (range.end() - 1 - start) >> self.unit_shift;
        UnitSet::between(first, last)
    }

    /// The units that a range covers as a whole. A short last unit is covered by a range to the end of the device.
    #[must_use]
    pub fn covered(&self, range: &ChunkRange) -> UnitSet {
        let start = self.start_of(range.chunk);
        let first = (range.offset - start).div_ceil(self.unit_bytes());
        let end = if range.end() == self.size {
            (range.end() - start).div_ceil(self.unit_bytes())
        } else {
            (range.end() - start) >> self.unit_shift
        };
        if first < end {
            UnitSet::between(first, end - 1)
        } else {
            UnitSet::EMPTY
        }
    }

    /// All units of a chunk.
    #[must_use]
    pub fn all(&self, chunk: u64) -> UnitSet {
        match self.length_of(chunk) {
            0 => UnitSet::EMPTY,
            length => UnitSet::between(0, (length - 1) >> self.unit_shift),
        }
    }

    /// The bytes of a set of units: ranges in order, merged, cut at the end of the device.
    pub fn ranges(&self, chunk: u64, units: UnitSet) -> impl Iterator<Item = ChunkRange> + use<> {
        let layout = *self;
        let start = self.start_of(chunk);
        units.runs().filter_map(move |(first, count)| {
            let offset = start + (u64::from(first) << layout.unit_shift);
            let end = (offset + (u64::from(count) << layout.unit_shift)).min(layout.size);
            (offset < end).then(|| ChunkRange {
                chunk,
                offset,
                length: end - offset,
            })
        })
    }

    /// The units that a range touches, each with its part of the range, in order.
    pub fn units_of(&self, range: &ChunkRange) -> impl Iterator<Item = (UnitSet, ChunkRange)> + use<> {
        let (layout, range) = (*self, *range);
        let start = self.start_of(range.chunk);
        let first = (range.offset - start) >> self.unit_shift;
        let last = (range.end() - 1 - start) >> self.unit_shift;
        (first..=last).map(move |unit| {
            let from = start + (unit << layout.unit_shift);
            let offset = from.max(range.offset);
            let end = (from + layout.unit_bytes()).min(range.end());
            let part = ChunkRange {
                chunk: range.chunk,
                offset,
                length: end - offset,
            };
            (UnitSet::between(unit, unit), part)
        })
    }

    /// Bytes that a set of units has on the device.
    #[must_use]
    pub fn bytes_of(&self, chunk: u64, units: UnitSet) -> u64 {
        self.ranges(chunk, units).map(|range| range.length).sum()
    }
}

/// Units of one chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct UnitSet(u64);

impl UnitSet {
    /// No unit.
    pub const EMPTY: Self = Self(0);

    /// The units whose bits are set.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The bits.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The units `first..=last`, both below 64.
    fn between(first: u64, last: u64) -> Self {
        debug_assert!(first <= last && last < u64::from(UNITS));
        Self((u64::MAX << first) & (u64::MAX >> (u64::from(UNITS) - 1 - last)))
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// How many there are.
    #[must_use]
    pub const fn count(self) -> u32 {
        self.0.count_ones()
    }

    /// Those of this set and of `other`.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Those of this set that `other` has, too.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Those of this set that `other` lacks.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Runs of units: first one and count, ascending.
    fn runs(self) -> impl Iterator<Item = (u32, u32)> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            if rest == 0 {
                return None;
            }
            let first = rest.trailing_zeros();
            let count = (!(rest >> first)).trailing_zeros();
            rest &= u64::MAX.checked_shl(first + count).unwrap_or(0);
            Some((first, count))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layouts() -> impl Strategy<Value = ChunkLayout> {
        (1_u64..5000, 15_u32..21, 9_u32..13)
            .prop_map(|(sectors, chunk, block)| ChunkLayout::new(sectors * 512, chunk, block))
    }

    proptest! {
        #[test]
        fn a_range_is_its_parts(layout in layouts(), offset in 0_u64..3_000_000, length in 0_u64..3_000_000) {
            let mut next = offset;
            for part in layout.split(offset, length) {
                prop_assert_eq!(part.offset, next);
                prop_assert!(part.length > 0 && part.offset >= layout.start_of(part.chunk));
                prop_assert!(part.end() <= layout.start_of(part.chunk) + layout.length_of(part.chunk));
                next = part.end();
                // Every byte's unit is touched, and no other; a unit is covered if all its bytes are.
                let start = layout.start_of(part.chunk);
                for unit in 0..64_u64 {
                    let (from, to) = (start + unit * layout.unit_bytes(), start + (unit + 1) * layout.unit_bytes());
                    let to = to.min(start + layout.length_of(part.chunk));
                    let bit = UnitSet::from_bits(1 << unit);
                    let touches = from < part.end() && part.offset < to;
                    prop_assert_eq!(!layout.touched(&part).and(bit).is_empty(), touches);
                    let covers = from < to && part.offset <= from && to <= part.end();
                    prop_assert_eq!(!layout.covered(&part).and(bit).is_empty(), covers, "unit {} of {:?}", unit, part);
                    prop_assert_eq!(!layout.all(part.chunk).and(bit).is_empty(), from < to);
                }
            }
            prop_assert_eq!(next, offset.max((offset + length).min(layout.size())));
            for part in layout.split(offset, length) {
                let mut next = part.offset;
                let mut units = UnitSet::EMPTY;
                for (unit, of_part) in layout.units_of(&part) {
                    prop_assert_eq!((unit.count(), of_part.offset), (1, next));
                    prop_assert_eq!(layout.touched(&of_part), unit);
                    next = of_part.end();
                    units = units.union(unit);
                }
                prop_assert_eq!((next, units), (part.end(), layout.touched(&part)));
            }
        }

        #[test]
        fn a_set_is_its_runs(bits: u64) {
            let layout = ChunkLayout::new(1 << 30, 18, 9);
            let set = UnitSet::from_bits(bits);
            let mut back = UnitSet::EMPTY;
            let mut end = None;
            for range in layout.ranges(3, set) {
                prop_assert!(end.is_none_or(|end| end < range.offset), "not merged");
                end = Some(range.end());
                back = back.union(layout.covered(&range));
            }
            prop_assert_eq!(back, set);
            prop_assert_eq!(layout.bytes_of(3, set), u64::from(set.count()) * layout.unit_bytes());
        }
    }

    #[test]
    fn a_chunk_has_at_most_64_units() {
        for (chunk, block, unit) in [(18, 9, 12), (20, 9, 14), (26, 9, 20), (15, 9, 12), (18, 14, 14)] {
            assert_eq!(ChunkLayout::new(1 << 40, chunk, block).unit_bytes(), 1 << unit);
        }
    }
}

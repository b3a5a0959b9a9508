//! Choices: what decides in tests with a model: the numbers of a seed, or the bytes of a fuzzer.

use std::ops::Range;

/// A source of decisions.
pub trait Choices {
    /// A number below `bound`, which is not 0.
    fn below(&mut self, bound: u64) -> u64;

    /// A number of a range that is not empty.
    fn of(&mut self, range: Range<u64>) -> u64 {
        range.start + self.below(range.end - range.start)
    }

    /// An index below `bound`, which is not 0.
    fn index(&mut self, bound: usize) -> usize {
        usize::try_from(self.below(bound as u64)).unwrap_or(0)
    }

    /// True once in `bound` times.
    fn once_in(&mut self, bound: u64) -> bool {
        self.below(bound) == 0
    }

    /// Whether there is nothing more to decide by.
    fn is_over(&self) -> bool {
        false
    }
}

/// Numbers that follow from a seed (SplitMix64), without an end.
#[derive(Clone, Debug)]
pub struct Seeded(u64);

impl Seeded {
    /// Those of `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn next_number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

impl Choices for Seeded {
    fn below(&mut self, bound: u64) -> u64 {
        self.next_number() % bound.max(1)
    }
}

/// The bytes of a fuzzer: one for a number below 257, two for larger ones; 0 when they are used up.
#[derive(Clone, Debug)]
pub struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    /// Those of `input`.
    #[must_use]
    pub const fn new(input: &'a [u8]) -> Self {
        Self(input)
    }
}

impl Choices for Bytes<'_> {
    fn below(&mut self, bound: u64) -> u64 {
        let wanted = match bound {
            0 | 1 => 0,
            2..=256 => 1,
            _ => 2,
        };
        let (used, rest) = self.0.split_at(wanted.min(self.0.len()));
        self.0 = rest;
        let number = used.iter().fold(0, |all, byte| all << 8 | u64::from(*byte));
        number % bound.max(1)
    }

    fn is_over(&self) -> bool {
        self.0.is_empty()
    }
}

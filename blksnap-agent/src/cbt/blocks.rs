//! Blocks: a byte per tracking block, in pieces that several maps share.
//!
//! A copy of a map costs a count for each piece of 64 KiB, whatever the piece holds; a piece is copied when one of
//! the maps that share it marks a block that is not marked yet. So a take freezes a map, and a question gets a map
//! to work on, in microseconds, while the device's lock is held; and a device that nobody writes to costs the
//! memory of one piece.

use std::fmt;
use std::iter::successors;
use std::sync::Arc;

/// Blocks of a piece but the last one: a multiple of 64, which marking and scanning go by. Small in tests, so that the
/// models meet the ends of pieces.
const PIECE: usize = if cfg!(test) { 256 } else { 1 << 16 };

/// Words of bits that [`Blocks::mark_bits`] goes by: a multiple of a piece's.
pub(crate) const MARK_WORDS: usize = 1 << 10;
const _: () = assert!(MARK_WORDS.is_multiple_of(PIECE / 64));

/// A byte per block: the number of the period in which it last changed.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Blocks {
    pieces: Vec<Arc<[u8]>>,
    length: usize,
}

impl Blocks {
    /// `length` blocks that never changed.
    #[must_use]
    pub fn unchanged(length: usize) -> Self {
        let mut pieces = vec![Arc::<[u8]>::from(vec![0; PIECE.min(length)]); length / PIECE];
        if !length.is_multiple_of(PIECE) {
            pieces.push(Arc::from(vec![0; length % PIECE]));
        }
        Self { pieces, length }
    }

    /// Number of blocks.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.length
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// All bytes in order, piece by piece.
    pub fn pieces(&self) -> impl Iterator<Item = &[u8]> + Clone {
        self.pieces.iter().map(|piece| &**piece)
    }

    /// All bytes in order.
    pub fn iter(&self) -> impl Iterator<Item = u8> + '_ {
        self.pieces().flatten().copied()
    }

    /// The bytes from block `first` to the end of its piece; none past the end. Aligned as `first` is: 64 blocks
    /// from a multiple of 64 are in one piece, unless the map ends before.
    #[inline]
    #[must_use]
    pub fn rest_of_piece(&self, first: usize) -> &[u8] {
        let piece = self.pieces.get(first / PIECE);
        piece
            .and_then(|piece| piece.get(first % PIECE..))
            .unwrap_or_default()
    }

    /// The bytes of the blocks `start..end`, as slices in order; those past the end are left out.
    pub fn slices(&self, start: usize, end: usize) -> impl Iterator<Item = &[u8]> {
        let end = end.min(self.length);
        successors(Some(start), move |at| Some((at / PIECE + 1) * PIECE))
            .take_while(move |at| *at < end)
            .map(move |at| {
                let rest = self.rest_of_piece(at);
                &rest[..rest.len().min(end - at)]
            })
    }

    /// A copy of all bytes.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        self.pieces.concat()
    }

    /// Sets the blocks `first..=last`, which are there, to `number`. Gives how many were not.
    pub(super) fn mark(&mut self, first: usize, last: usize, number: u8) -> u64 {
        let mut fresh = 0;
        let mut at = first;
        while at <= last {
            let piece = &mut self.pieces[at / PIECE];
            let range = at % PIECE..(at % PIECE + last - at + 1).min(piece.len());
            at += range.len();
            let others = piece[range.clone()]
                .iter()
                .filter(|byte| **byte != number)
                .count();
            if others > 0 {
                Arc::make_mut(piece)[range].fill(number);
                fresh += others as u64;
            }
        }
        fresh
    }

    /// Sets every block whose bit is set to `number`: bit `b` of word `w` is block 64 `w` + `b`, and the first word is
    /// word [`MARK_WORDS`] * `chunk`. Gives how many were not, and whether a bit is past the end.
    pub(super) fn mark_bits(&mut self, chunk: usize, words: &[u64], number: u8) -> (u64, bool) {
        let mut fresh = 0;
        let mut beyond = false;
        let mut pieces = self.pieces.iter_mut().skip(chunk * (MARK_WORDS / (PIECE / 64)));
        for words in words.chunks(PIECE / 64) {
            match pieces.next() {
                Some(piece) => {
                    let (marked, past) = mark_piece(piece, words, number);
                    fresh += marked;
                    beyond |= past;
                }
                None => beyond |= words.iter().any(|word| *word != 0),
            }
        }
        (fresh, beyond)
    }

    /// Shares with `other` the pieces that are alike.
    pub(super) fn share(&mut self, other: &Self) {
        for (piece, twin) in self.pieces.iter_mut().zip(&other.pieces) {
            if *piece == *twin {
                *piece = Arc::clone(twin);
            }
        }
    }
}

/// Marks in one piece, which is copied only if a block of it changes.
fn mark_piece(piece: &mut Arc<[u8]>, words: &[u64], number: u8) -> (u64, bool) {
    let mut fresh = 0;
    let mut beyond = false;
    // A bitmap is mostly clear, or marks what is marked already.
    let is_news = words.iter().enumerate().any(|(index, word)| {
        *word != 0 && {
            let bytes = piece.get(index * 64..).unwrap_or_default();
            bits(*word).any(|bit| bytes.get(bit).is_none_or(|byte| *byte != number))
        }
    });
    if !is_news {
        return (fresh, beyond);
    }
    let mut chunks = Arc::make_mut(piece).chunks_mut(64);
    for word in words {
        let chunk = chunks.next().unwrap_or_default();
        match *word {
            0 => {}
            u64::MAX if chunk.len() == 64 => {
                fresh += chunk.iter().filter(|byte| **byte != number).count() as u64;
                chunk.fill(number);
            }
            word => {
                for bit in bits(word) {
                    if let Some(byte) = chunk.get_mut(bit) {
                        fresh += u64::from(*byte != number);
                        *byte = number;
                    } else {
                        beyond = true;
                    }
                }
            }
        }
    }
    (fresh, beyond)
}

/// The numbers of the bits that are set.
fn bits(word: u64) -> impl Iterator<Item = usize> {
    let some = |word: u64| (word != 0).then_some(word);
    successors(some(word), move |word| some(word & (word - 1))).map(|word| word.trailing_zeros() as usize)
}

impl From<Vec<u8>> for Blocks {
    fn from(bytes: Vec<u8>) -> Self {
        Self {
            length: bytes.len(),
            pieces: bytes.chunks(PIECE).map(Arc::from).collect(),
        }
    }
}

impl PartialEq<[u8]> for Blocks {
    fn eq(&self, other: &[u8]) -> bool {
        self.length == other.len() && self.pieces().eq(other.chunks(PIECE))
    }
}

impl fmt::Debug for Blocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blocks")
            .field("length", &self.length)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Op {
        Range(prop::sample::Index, usize, u8),
        Bits(prop::sample::Index, Vec<u64>, u8),
        Copy,
    }

    fn operation() -> impl Strategy<Value = Op> {
        let word = prop_oneof![3 => Just(0), 1 => Just(u64::MAX), 2 => any::<u64>()];
        prop_oneof![
            3 => (any::<prop::sample::Index>(), prop_oneof![0..4_usize, 0..2 * PIECE], 1..5_u8)
                .prop_map(|(first, count, number)| Op::Range(first, count, number)),
            3 => (any::<prop::sample::Index>(), prop::collection::vec(word, 0..80), 1..5_u8)
                .prop_map(|(at, words, number)| Op::Bits(at, words, number)),
            1 => Just(Op::Copy),
        ]
    }

    /// Marks bits that begin at word `at`.
    fn with_bits(at: usize, words: &[u64]) -> Vec<u64> {
        [vec![0; at], words.to_vec()].concat()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn shared_pieces_are_what_separate_vectors_are(
            length in prop_oneof![0..200_usize, PIECE - 2..PIECE + 3, 0..3 * PIECE],
            ops in prop::collection::vec(operation(), 0..12),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 2),
        ) {
            let mut blocks = Blocks::unchanged(length);
            let mut model = vec![0_u8; length];
            let mut copies = Vec::new();
            for op in ops {
                match op {
                    Op::Range(first, count, number) if length > 0 => {
                        let first = first.index(length);
                        let last = (first + count).min(length - 1);
                        let wanted = model[first..=last].iter().filter(|byte| **byte != number).count();
                        prop_assert_eq!(blocks.mark(first, last, number), wanted as u64);
                        model[first..=last].fill(number);
                    }
                    Op::Bits(at, words, number) => {
                        let words = with_bits(at.index(length / 64 + 2), &words);
                        let (mut fresh, mut beyond) = (0, false);
                        for bit in (0..words.len() * 64).filter(|bit| words[bit / 64] >> (bit % 64) & 1 == 1) {
                            match model.get_mut(bit) {
                                Some(byte) => {
                                    fresh += u64::from(*byte != number);
                                    *byte = number;
                                }
                                None => beyond = true,
                            }
                        }
                        let mut chunked = blocks.clone();
                        let marked = words.chunks(MARK_WORDS).enumerate().fold((0, false), |(n, past), (chunk, words)| {
                            let (more, also) = chunked.mark_bits(chunk, words, number);
                            (n + more, past || also)
                        });
                        prop_assert_eq!(marked, (fresh, beyond));
                        prop_assert_eq!(blocks.mark_bits(0, &words, number), (fresh, beyond));
                        prop_assert!(blocks == chunked);
                    }
                    Op::Range(..) => {}
                    Op::Copy => copies.push((blocks.clone(), model.clone())),
                }
            }
            copies.push((blocks, model));
            for (blocks, model) in &mut copies {
                prop_assert_eq!(blocks.len(), model.len());
                prop_assert!(*blocks == model[..]);
                prop_assert_eq!(&blocks.to_vec(), &*model);
                let [start, end] = [cuts[0].index(length + 1), cuts[1].index(length + 1)];
                let wanted = model.get(start..end).unwrap_or_default();
                prop_assert_eq!(blocks.slices(start, end).collect::<Vec<_>>().concat(), wanted);
                let mut again = Blocks::from(model.clone());
                again.share(blocks);
                prop_assert!(again == *blocks);
                for (mine, theirs) in again.pieces.iter().zip(&blocks.pieces) {
                    prop_assert!(Arc::ptr_eq(mine, theirs));
                }
            }
        }
    }

    #[test]
    fn only_what_changes_is_copied() {
        let mut blocks = Blocks::unchanged(4 * PIECE + 10);
        let copy = blocks.clone();
        assert_eq!(blocks.mark(PIECE + 5, PIECE + 5, 1), 1);
        let shared = |a: &Blocks, b: &Blocks| -> Vec<bool> {
            a.pieces
                .iter()
                .zip(&b.pieces)
                .map(|(a, b)| Arc::ptr_eq(a, b))
                .collect()
        };
        assert_eq!(shared(&blocks, &copy), [true, false, true, true, true]);
        // Marked again, nothing is copied.
        let copy = blocks.clone();
        assert_eq!(blocks.mark(PIECE + 5, PIECE + 5, 1), 0);
        assert_eq!(
            blocks.mark_bits(0, &with_bits((PIECE + 5) / 64, &[1 << 5]), 1),
            (0, false)
        );
        assert_eq!(shared(&blocks, &copy), [true; 5]);
    }
}

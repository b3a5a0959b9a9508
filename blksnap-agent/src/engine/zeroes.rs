//! Zeroes: finds the runs of zero bytes that become holes.

use std::ops::Range;

/// Unit of the search in bytes; the smallest hole of common file systems.
const GRANULE: usize = 4096;

/// A shorter run of zeroes between data is written as data: a hole costs the file system an extent.
const MIN_RUN: usize = 16 * 1024;

static ZEROES: [u8; GRANULE] = [0; GRANULE];

/// A part of a piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Where in the piece.
    pub(super) range: Range<usize>,
    /// All bytes are zero.
    pub(super) zero: bool,
}

/// Cuts `data`, whose first byte has position `offset` in its file, into runs of data and of zeroes. They are
/// ascending, adjoining and cover all of it.
pub(super) fn runs(data: &[u8], offset: u64) -> Vec<Run> {
    let mut list: Vec<Run> = Vec::new();
    let mut start = 0;
    while start < data.len() {
        // Granules are aligned in the file, where holes must be.
        let misaligned = usize::try_from(offset % GRANULE as u64).expect("below the granule");
        let to_boundary = GRANULE - (misaligned + start) % GRANULE;
        let end = (start + to_boundary).min(data.len());
        let zero = data[start..end] == ZEROES[..end - start];
        match list.last_mut() {
            Some(last) if last.zero == zero => last.range.end = end,
            _ => list.push(Run {
                range: start..end,
                zero,
            }),
        }
        start = end;
    }
    let whole = list.len() == 1;
    for run in &mut list {
        let at_edge = run.range.start == 0 || run.range.end == data.len();
        // At the edges the run may go on in the piece beside.
        run.zero &= whole || run.range.len() >= if at_edge { GRANULE } else { MIN_RUN };
    }
    list.dedup_by(|next, previous| {
        let merge = next.zero == previous.zero;
        if merge {
            previous.range.end = next.range.end;
        }
        merge
    });
    list
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_cover_the_data_and_zero_ones_are_zero(
            units in proptest::collection::vec((0_u8..3, 1_usize..9), 1..12),
            offset in 0_u64..40,
            cut in 0_usize..4000,
        ) {
            let mut data = Vec::new();
            for (value, count) in units {
                data.resize(data.len() + count * 4096, value / 2);
            }
            data.truncate(data.len() - cut);
            let list = runs(&data, offset * 512);
            let mut next = 0;
            for (index, run) in list.iter().enumerate() {
                prop_assert_eq!(run.range.start, next);
                next = run.range.end;
                if run.zero {
                    prop_assert!(data[run.range.clone()].iter().all(|byte| *byte == 0));
                }
                prop_assert!(index == 0 || list[index - 1].zero != run.zero);
            }
            prop_assert_eq!(next, data.len());
        }
    }

    #[test]
    fn long_runs_become_holes_and_short_ones_do_not() {
        let mut data = vec![1; 64 * 1024];
        data[4096..8192].fill(0);
        data[16384..40960].fill(0);
        let zero: Vec<_> = runs(&data, 0)
            .into_iter()
            .filter(|run| run.zero)
            .map(|run| run.range)
            .collect();
        assert_eq!((zero.len(), &zero[0]), (1, &(16384..40960)));
        assert_eq!(
            runs(&[0; 512], 512),
            [Run {
                range: 0..512,
                zero: true
            }]
        );
        assert_eq!(runs(&[], 0), []);
    }
}

//! Palette: the colour, the character and the words of each age of change.

use crate::cbt::{Age, Heat};

/// Red, green and blue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rgb(pub(super) u8, pub(super) u8, pub(super) u8);

/// How an age is shown: from hot to cold.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shade {
    pub(super) rgb: Rgb,
    /// The nearest one of a terminal's 256 colours.
    pub(super) indexed: u8,
    /// Where there is no colour: the more ink, the newer.
    pub(super) plain: char,
}

/// The ages, the newest first.
const SHADES: [Shade; 7] = [
    shade(Rgb(0xe4, 0x1a, 0x1c), 160, '@'),
    shade(Rgb(0xf9, 0x7b, 0x16), 208, '#'),
    shade(Rgb(0xfb, 0xc0, 0x2d), 220, '*'),
    shade(Rgb(0x8b, 0xc3, 0x4a), 107, '+'),
    shade(Rgb(0x26, 0xa6, 0x9a), 36, '='),
    shade(Rgb(0x42, 0x8b, 0xca), 68, '-'),
    shade(Rgb(0x5c, 0x5f, 0xa8), 61, '.'),
];

/// What did not change, on a terminal.
pub(super) const UNCHANGED: Shade = shade(Rgb(0x3a, 0x3d, 0x42), 237, ' ');

const fn shade(rgb: Rgb, indexed: u8, plain: char) -> Shade {
    Shade { rgb, indexed, plain }
}

/// The shade of age number `index`; there are as many as ages.
pub(super) fn of_age(index: usize) -> Shade {
    SHADES.get(index).copied().unwrap_or(UNCHANGED)
}

/// When the blocks of an age changed, in the takes that a user knows.
pub(super) fn words(heat: &Heat, age: &Age) -> String {
    let take = |number: u8| format!("take {number}");
    match (age.oldest - 1, age.newest) {
        (0, newest) if newest == heat.active_number => "now: no take yet".to_owned(),
        (before, newest) if newest == heat.active_number => format!("now: since {}", take(before)),
        (0, newest) => format!("before {}", take(newest)),
        (before, newest) => format!("between takes {before} and {newest}"),
    }
}

/// What did not change, in words.
pub(super) const UNCHANGED_WORDS: &str = "not in this generation";

/// A line of the legend.
pub(super) struct Entry {
    /// Number of the age; none for what did not change.
    pub(super) age: Option<usize>,
    pub(super) words: String,
    pub(super) blocks: u64,
    pub(super) bytes: u64,
    /// Of the device, as `12.3 %`.
    pub(super) share: String,
}

/// The legend, the newest first.
pub(super) fn legend(heat: &Heat) -> Vec<Entry> {
    let entry = |age: Option<usize>, words: String, blocks: u64| Entry {
        age,
        words,
        blocks,
        bytes: blocks.saturating_mul(heat.block_size).min(heat.device_capacity),
        share: share(blocks, heat.block_count),
    };
    let ages = heat.ages.iter().enumerate();
    let changed = ages.map(|(index, age)| entry(Some(index), words(heat, age), age.blocks));
    let unchanged = entry(None, UNCHANGED_WORDS.to_owned(), heat.unchanged_blocks);
    changed.chain([unchanged]).collect()
}

/// A share that is neither shown as nothing nor as everything when it is not.
fn share(blocks: u64, of: u64) -> String {
    let percent = if of == 0 {
        0.0
    } else {
        blocks as f64 * 100.0 / of as f64
    };
    if blocks > 0 && percent < 0.1 {
        "< 0.1 %".to_owned()
    } else if blocks < of && percent > 99.9 {
        "> 99.9 %".to_owned()
    } else {
        format!("{percent:.1} %")
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::*;

    #[test]
    fn ages_are_told_by_the_takes_around_them() {
        let heat = samples::heat(&[0; 64], 7, 64);
        let said: Vec<String> = heat.ages.iter().map(|age| words(&heat, age)).collect();
        assert_eq!(
            said,
            [
                "now: since take 6",
                "between takes 5 and 6",
                "between takes 4 and 5",
                "between takes 2 and 4",
                "before take 2",
            ]
        );
        let heat = samples::heat(&[0; 64], 1, 64);
        assert_eq!(words(&heat, &heat.ages[0]), "now: no take yet");
    }

    #[test]
    fn shares_are_rounded_to_the_safe_side() {
        assert_eq!(share(0, 10_000), "0.0 %");
        assert_eq!(share(1, 10_000), "< 0.1 %");
        assert_eq!(share(1234, 10_000), "12.3 %");
        assert_eq!(share(9999, 10_000), "> 99.9 %");
        assert_eq!(share(10_000, 10_000), "100.0 %");
        assert_eq!(share(0, 0), "0.0 %");
    }
}

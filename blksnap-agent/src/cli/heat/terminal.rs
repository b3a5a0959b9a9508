//! Terminal: the device as rows of cells, a cell as one character.
//!
//! The colour of a cell is the age of the newest change in it, and it is filled from below as far as blocks of that
//! age go; what is above has the colour of what most of the other blocks are. Without colour a cell has a character
//! for the newest change, and nothing tells how much of it changed.

use std::fmt::Write as _;

use super::super::size::human;
use super::super::table::{Align, Table};
use super::palette::{self, Shade, UNCHANGED};
use super::{Picture, headline, place, unit_line};
use crate::cbt::Bucket;

/// What a terminal can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Colours {
    /// None: plain characters.
    Plain,
    /// The palette of 256.
    Indexed,
    /// 24 bits.
    True,
}

/// Eighths of a cell.
const EIGHTHS: [char; 8] = [
    '\u{2581}', '\u{2582}', '\u{2583}', '\u{2584}', '\u{2585}', '\u{2586}', '\u{2587}', '\u{2588}',
];

/// The whole text, in rows of `columns` cells.
pub(super) fn text(picture: &Picture, columns: usize, colours: Colours) -> String {
    let heat = &picture.heat;
    let how = match colours {
        Colours::Plain => "a character tells when something in it last changed",
        _ => "filled as far as it last changed at that time",
    };
    let mut text = format!("{}\n{}, {how}\n\n", headline(picture), unit_line(picture));
    let offsets: Vec<String> = heat
        .buckets
        .chunks(columns.max(1))
        .map(|row| place(row[0].offset))
        .collect();
    let width = offsets.iter().map(String::len).max().unwrap_or_default();
    for (row, offset) in heat.buckets.chunks(columns.max(1)).zip(&offsets) {
        // Writing to a string can't fail.
        let _ = write!(text, "{offset:>width$} ");
        if colours == Colours::Plain {
            text.push('|');
        }
        for bucket in row {
            cell(&mut text, bucket, colours);
        }
        text.push_str(if colours == Colours::Plain { "|" } else { RESET });
        text.push('\n');
    }
    text.push('\n');
    legend(&mut text, picture, colours);
    text
}

fn cell(text: &mut String, bucket: &Bucket, colours: Colours) {
    let Some(newest) = bucket.changed.iter().position(|blocks| *blocks > 0) else {
        return match colours {
            Colours::Plain => text.push(UNCHANGED.plain),
            _ => paint(text, UNCHANGED, UNCHANGED, ' ', colours),
        };
    };
    let shade = palette::of_age(newest);
    if colours == Colours::Plain {
        return text.push(shade.plain);
    }
    let blocks = bucket.changed[newest];
    // Rounded up, so that one block shows, but full only where all of it is.
    let eighths = usize::try_from((blocks * 8).div_ceil(bucket.blocks.max(1))).unwrap_or(8);
    let eighths = if blocks < bucket.blocks { eighths.min(7) } else { 8 };
    let unchanged = bucket.blocks - bucket.changed.iter().sum::<u64>();
    let rest = bucket
        .changed
        .iter()
        .enumerate()
        .skip(newest + 1)
        .max_by_key(|(_, blocks)| **blocks)
        .filter(|(_, blocks)| **blocks > unchanged)
        .map_or(UNCHANGED, |(age, _)| palette::of_age(age));
    let character = EIGHTHS[eighths.clamp(1, 8) - 1];
    paint(text, shade, rest, character, colours);
}

const RESET: &str = "\x1b[0m";

fn paint(text: &mut String, front: Shade, back: Shade, character: char, colours: Colours) {
    // Writing to a string can't fail.
    let _ = match colours {
        Colours::Plain => write!(text, "{character}"),
        Colours::Indexed => write!(
            text,
            "\x1b[38;5;{};48;5;{}m{character}",
            front.indexed, back.indexed
        ),
        Colours::True => {
            let (f, b) = (front.rgb, back.rgb);
            write!(
                text,
                "\x1b[38;2;{};{};{};48;2;{};{};{}m{character}",
                f.0, f.1, f.2, b.0, b.1, b.2
            )
        }
    };
}

fn legend(text: &mut String, picture: &Picture, colours: Colours) {
    let mut table = Table::new([
        ("LAST CHANGED", Align::Left),
        ("SIZE", Align::Right),
        ("SHARE", Align::Right),
        ("BLOCKS", Align::Right),
    ]);
    let entries = palette::legend(&picture.heat);
    for entry in &entries {
        table.row([
            entry.words.clone(),
            human(entry.bytes),
            entry.share.clone(),
            entry.blocks.to_string(),
        ]);
    }
    // A sample before each line but the head.
    let lines = table.text();
    let shades = entries
        .iter()
        .map(|entry| entry.age.map_or(UNCHANGED, palette::of_age));
    for (line, shade) in lines.lines().zip([None].into_iter().chain(shades.map(Some))) {
        match (shade, colours) {
            (None, _) => text.push_str("    "),
            (Some(shade), Colours::Plain) => {
                // Writing to a string can't fail.
                let _ = write!(text, "'{}' ", shade.plain);
            }
            (Some(shade), _) => {
                for _ in 0..2 {
                    paint(text, shade, shade, ' ', colours);
                }
                text.push_str(RESET);
                text.push_str("  ");
            }
        }
        text.push_str(line);
        text.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::*;

    #[test]
    fn plain_text_has_no_escapes_and_a_character_a_cell() {
        let mut bytes = [0; 64];
        bytes[..4].copy_from_slice(&[3, 2, 1, 3]);
        let text = text(&samples::picture(&bytes, 3, 64), 32, Colours::Plain);
        assert_eq!(
            text,
            "/dev/sdb1: 256 KiB, generation 00000000-0000-0000-0000-000000000001, last take 2\n\
             each cell is 4 KiB: one block, a character tells when something in it last changed\n\
             \n\
             \u{20}   0 B |@#*@                            |\n\
             128 KiB |                                |\n\
             \n\
             \u{20}   LAST CHANGED               SIZE   SHARE  BLOCKS\n\
             '@' now: since take 2         8 KiB   3.1 %       2\n\
             '#' between takes 1 and 2     4 KiB   1.6 %       1\n\
             '*' before take 1             4 KiB   1.6 %       1\n\
             ' ' not in this generation  240 KiB  93.8 %      60\n"
        );
    }

    #[test]
    fn a_cell_is_filled_as_far_as_the_newest_change_goes() {
        // 16 blocks a cell: one new one, all new ones, half new and the rest of the period before.
        let mut bytes = [0; 64];
        bytes[0] = 2;
        bytes[16..32].fill(2);
        bytes[32..40].fill(2);
        bytes[40..48].fill(1);
        let text = text(&samples::picture(&bytes, 2, 4), 4, Colours::Indexed);
        let row = text.lines().find(|line| line.contains('\u{2581}')).unwrap();
        assert!(row.contains("\x1b[38;5;160;48;5;237m\u{2581}"), "{row:?}");
        assert!(row.contains("\x1b[38;5;160;48;5;237m\u{2588}"), "{row:?}");
        assert!(row.contains("\x1b[38;5;160;48;5;208m\u{2584}"), "{row:?}");
        assert!(row.contains("\x1b[38;5;237;48;5;237m \x1b[0m"), "{row:?}");
    }
}

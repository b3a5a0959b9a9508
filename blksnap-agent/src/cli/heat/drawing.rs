//! Drawing: the picture as rectangles and words with places, which SVG and PNG both show.
//!
//! A cell is a bar, filled from below by what its blocks are: the newest change at the bottom, older ones above, and
//! on top what did not change. So the height of the colour is how much of it changed, and its colour when.

use super::super::size::human;
use super::palette::{self, Rgb};
use super::{Picture, headline, place, unit_line};
use crate::cbt::Bucket;

/// Cells in a row.
pub(super) const COLUMNS: usize = 64;
/// Width and height of a cell, and the gap after it, in pixels.
const CELL: (u32, u32, u32) = (14, 20, 2);
/// Least height of an age that is in a cell at all.
const LEAST: u32 = 2;
/// Free space around everything.
const MARGIN: u32 = 28;
/// Width of the offsets before the rows.
const LABELS: u32 = 100;
/// Height of a line of words.
pub(super) const LINE: u32 = 26;
/// Where the columns of the legend begin, or end for numbers.
const LEGEND: [u32; 4] = [30, 430, 560, 690];

/// Paper, words, quiet words, and what did not change.
pub(super) const PAPER: Rgb = Rgb(0xff, 0xff, 0xff);
const INK: Rgb = Rgb(0x1f, 0x24, 0x2a);
const QUIET: Rgb = Rgb(0x6b, 0x74, 0x80);
const UNCHANGED: Rgb = Rgb(0xe6, 0xe9, 0xed);

/// Side of its place on which words are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Anchor {
    Start,
    End,
}

/// Something with a place, in pixels from the upper left.
#[derive(Clone, Debug)]
pub(super) enum Shape {
    Rectangle {
        x: u32,
        y: u32,
        width: u32,
        height: u32,
        colour: Rgb,
    },
    Words {
        x: u32,
        /// The middle of the line.
        y: u32,
        anchor: Anchor,
        bold: bool,
        colour: Rgb,
        text: String,
    },
    /// Shapes that belong together, and what they say when pointed at.
    Group { title: String, shapes: Vec<Shape> },
}

/// A picture with its size in pixels.
#[derive(Clone, Debug)]
pub(super) struct Drawing {
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) shapes: Vec<Shape>,
}

/// Lays the picture out.
pub(super) fn draw(picture: &Picture) -> Drawing {
    let heat = &picture.heat;
    let mut shapes = Vec::new();
    let mut y = MARGIN + LINE / 2;
    let how = format!(
        "{}, filled as far as it changed, in the colour of when",
        unit_line(picture)
    );
    for (text, bold, colour) in [(headline(picture), true, INK), (how, false, QUIET)] {
        shapes.push(words(MARGIN, y, Anchor::Start, bold, colour, text));
        y += LINE;
    }
    y += LINE / 4;
    let (width, height, gap) = CELL;
    for row in heat.buckets.chunks(COLUMNS) {
        let label = place(row[0].offset);
        shapes.push(words(
            MARGIN + LABELS - 14,
            y + height / 2,
            Anchor::End,
            false,
            QUIET,
            label,
        ));
        let mut x = MARGIN + LABELS;
        for bucket in row {
            shapes.push(Shape::Group {
                title: title(picture, bucket),
                shapes: bar(bucket, x, y),
            });
            x += width + gap;
        }
        y += height + gap;
    }
    y += LINE;
    let heads = ["last changed", "size", "share", "blocks"];
    for ((head, x), anchor) in heads.into_iter().zip(LEGEND).zip(ANCHORS) {
        shapes.push(words(MARGIN + LABELS + x, y, anchor, true, INK, head.to_owned()));
    }
    y += LINE;
    for entry in palette::legend(heat) {
        shapes.push(Shape::Rectangle {
            x: MARGIN + LABELS,
            y: y - 8,
            width,
            height: 16,
            colour: entry.age.map_or(UNCHANGED, |age| palette::of_age(age).rgb),
        });
        let cells = [
            entry.words,
            human(entry.bytes),
            entry.share,
            entry.blocks.to_string(),
        ];
        for ((text, x), anchor) in cells.into_iter().zip(LEGEND).zip(ANCHORS) {
            shapes.push(words(MARGIN + LABELS + x, y, anchor, false, INK, text));
        }
        y += LINE;
    }
    Drawing {
        width: 2 * MARGIN + LABELS + u32::try_from(COLUMNS).unwrap_or(0) * (width + gap) - gap,
        height: y - LINE / 2 + MARGIN,
        shapes,
    }
}

const ANCHORS: [Anchor; 4] = [Anchor::Start, Anchor::End, Anchor::End, Anchor::End];

fn words(x: u32, y: u32, anchor: Anchor, bold: bool, colour: Rgb, text: String) -> Shape {
    Shape::Words {
        x,
        y,
        anchor,
        bold,
        colour,
        text,
    }
}

/// What a cell says when pointed at.
fn title(picture: &Picture, bucket: &Bucket) -> String {
    let heat = &picture.heat;
    let at = format!("{} at {}", human(bucket.length), place(bucket.offset));
    let ages = heat.ages.iter().zip(&bucket.changed);
    let changed: Vec<String> = ages
        .filter(|(_, blocks)| **blocks > 0)
        .map(|(age, blocks)| {
            format!(
                "{}: {}",
                palette::words(heat, age),
                human(blocks * heat.block_size)
            )
        })
        .collect();
    if changed.is_empty() {
        format!("{at}\nunchanged")
    } else {
        format!("{at}\n{}", changed.join("\n"))
    }
}

/// The bar of a cell.
fn bar(bucket: &Bucket, x: u32, y: u32) -> Vec<Shape> {
    let (width, height, _) = CELL;
    let rectangle = |y, height, colour| Shape::Rectangle {
        x,
        y,
        width,
        height,
        colour,
    };
    let mut shapes = vec![rectangle(y, height, UNCHANGED)];
    let mut bottom = y + height;
    for (age, part) in parts(bucket, height).into_iter().enumerate() {
        if part > 0 {
            bottom -= part;
            shapes.push(rectangle(bottom, part, palette::of_age(age).rgb));
        }
    }
    shapes
}

/// The height of each age in a bar: what is there is seen, and a bar is full only where all of it changed.
fn parts(bucket: &Bucket, height: u32) -> Vec<u32> {
    let blocks = bucket.blocks.max(1);
    let scaled = |count: u64| u32::try_from(count * u64::from(height) / blocks).unwrap_or(height);
    let mut parts: Vec<u32> = bucket
        .changed
        .iter()
        .map(|count| if *count == 0 { 0 } else { scaled(*count).max(LEAST) })
        .collect();
    let all = bucket.changed.iter().sum::<u64>() == bucket.blocks;
    let room = if all { height } else { height - LEAST };
    let mut sum: u32 = parts.iter().sum();
    while sum > room {
        let Some(largest) = parts.iter_mut().max() else {
            break;
        };
        *largest -= 1;
        sum -= 1;
    }
    if all && let Some(largest) = parts.iter_mut().max() {
        *largest += height - sum;
    }
    parts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bars_show_everything_and_are_full_only_when_all_changed(
            changed in prop::collection::vec(prop_oneof![Just(0_u64), 1..5000_u64], 1..=7),
            unchanged in prop_oneof![Just(0_u64), 1..5000_u64],
        ) {
            let blocks = changed.iter().sum::<u64>() + unchanged;
            prop_assume!(blocks > 0);
            let bucket = Bucket { offset: 0, length: blocks * 4096, blocks, newest: None, changed };
            let parts = parts(&bucket, CELL.1);
            let sum: u32 = parts.iter().sum();
            prop_assert_eq!(sum == CELL.1, unchanged == 0);
            prop_assert!(sum <= CELL.1);
            for (part, count) in parts.iter().zip(&bucket.changed) {
                prop_assert_eq!(*part > 0, *count > 0);
            }
        }
    }
}

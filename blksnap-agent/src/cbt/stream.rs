//! Stream: the answer to "what changed since" in parts, made one after the other, so that no answer of millions of
//! extents is ever in memory as a whole.
//!
//! There are two forms. A document is the JSON of [`super::ChangedAnswer`]. Lines are one JSON object each
//! ([`ChangedLine`]): a head, the extents, and an end with their number, by which a reader knows that it has all of
//! them; or why a full copy is needed, which may also come instead of the end, when the map became doubtful while it
//! was read. A document has no place to say that: it breaks off.

use std::io::Write as _;

use serde::{Deserialize, Serialize};

use super::answer::{ChangedReport, FullAnswer};
use super::extents::ChangedExtents;
use super::reason::{FullNeeded, FullReason};
use crate::units::{Extent, Generation};

/// A part is sent when it has this many bytes.
const PART: usize = 1 << 15;

/// Form of an answer in parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangedForm {
    /// One JSON document.
    Document,
    /// A JSON object a line.
    Lines,
}

/// A line of an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ChangedLine {
    /// The first one.
    Head(ChangedHead),
    /// An extent; they ascend and don't touch.
    Extent(Extent),
    /// The last one.
    End {
        /// What came before it.
        end: ChangedTotals,
    },
    /// The only or the last one: a full copy is needed, whatever came before.
    Full {
        /// Why.
        full_needed: FullAnswer,
    },
}

/// What an answer is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangedHead {
    /// Generation of the map.
    pub generation: Generation,
    /// Number of the take that the extents lead to.
    pub number: u8,
    /// Number that they start from.
    pub since: u8,
    /// Tracking block size in bytes.
    pub block_size: u64,
    /// Bytes of the device.
    pub device_capacity: u64,
}

/// Sums of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangedTotals {
    /// Number of extents.
    pub extents: u64,
    /// Bytes in them.
    pub bytes: u64,
}

impl From<FullNeeded> for FullAnswer {
    fn from(full: FullNeeded) -> Self {
        Self {
            reason: full.reason.code().to_owned(),
            detail: full.reason.to_string(),
        }
    }
}

/// The parts of an answer, in order.
#[derive(Clone, Debug)]
pub struct ChangedParts {
    form: ChangedForm,
    since: u8,
    totals: ChangedTotals,
    state: State,
}

#[derive(Clone, Debug)]
enum State {
    Begin(Result<ChangedExtents, FullNeeded>),
    Extents(ChangedExtents),
    Done,
}

impl ChangedReport {
    /// The answer in parts.
    #[must_use]
    pub fn parts(self, form: ChangedForm) -> ChangedParts {
        ChangedParts {
            form,
            since: self.since_number(),
            totals: ChangedTotals::default(),
            state: State::Begin(self.changes()),
        }
    }
}

impl ChangedParts {
    fn head(&self, extents: &ChangedExtents) -> ChangedHead {
        let map = extents.read_map();
        ChangedHead {
            generation: map.generation(),
            number: map.number(),
            since: self.since,
            block_size: map.block_size().bytes(),
            device_capacity: map.capacity().bytes(),
        }
    }

    /// Adds an object to a part.
    fn put<T: Serialize>(&self, part: &mut Vec<u8>, object: &T) {
        serde_json::to_writer(&mut *part, object).expect("plain numbers and strings are JSON");
        if self.form == ChangedForm::Lines {
            part.push(b'\n');
        }
    }

    fn begin(&self, part: &mut Vec<u8>, extents: &ChangedExtents) {
        self.put(part, &self.head(extents));
        if self.form == ChangedForm::Document {
            // The extents go into the same object.
            part.pop();
            part.extend_from_slice(b",\"extents\":[");
        }
    }

    /// Adds extents until the part is full; false when there are no more.
    fn add(&mut self, part: &mut Vec<u8>, extents: &mut ChangedExtents) -> bool {
        while part.len() < PART {
            let Some(Extent { offset, length }) = extents.next() else {
                return false;
            };
            if self.form == ChangedForm::Document && self.totals.extents > 0 {
                part.push(b',');
            }
            let end = if self.form == ChangedForm::Lines { "\n" } else { "" };
            write!(part, "{{\"offset\":{offset},\"length\":{length}}}{end}")
                .expect("memory takes everything");
            self.totals.extents += 1;
            self.totals.bytes += length;
        }
        true
    }
}

impl Iterator for ChangedParts {
    type Item = Result<Vec<u8>, FullNeeded>;

    /// The next part; an error instead of the rest where only that can tell that the answer is void.
    fn next(&mut self) -> Option<Self::Item> {
        let mut part = Vec::with_capacity(PART + 128);
        let mut extents = match std::mem::replace(&mut self.state, State::Done) {
            State::Done => return None,
            State::Begin(Err(full)) => {
                self.put(
                    &mut part,
                    &ChangedLine::Full {
                        full_needed: full.into(),
                    },
                );
                return Some(Ok(part));
            }
            State::Begin(Ok(extents)) => {
                self.begin(&mut part, &extents);
                extents
            }
            State::Extents(extents) => extents,
        };
        if self.add(&mut part, &mut extents) {
            self.state = State::Extents(extents);
            return Some(Ok(part));
        }
        let doubt = extents
            .read_map()
            .doubt()
            .map(FullReason::Corrupted)
            .map(FullNeeded::from);
        match (self.form, doubt) {
            (ChangedForm::Document, Some(full)) => return Some(Err(full)),
            (ChangedForm::Document, None) => part.extend_from_slice(b"]}"),
            (ChangedForm::Lines, Some(full)) => self.put(
                &mut part,
                &ChangedLine::Full {
                    full_needed: full.into(),
                },
            ),
            (ChangedForm::Lines, None) => self.put(&mut part, &ChangedLine::End { end: self.totals }),
        }
        Some(Ok(part))
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::cbt::{Base, CbtMap, ChangedAnswer, ResetReason};
    use crate::units::{BlockSize, Sectors};

    /// A taken map in which every second block of `blocks` changed.
    fn map(blocks: u64) -> (CbtMap, Base) {
        let generation = Generation::new(Uuid::from_u128(1));
        let size = BlockSize::from_shift(12).unwrap();
        let mut map = CbtMap::new(generation, size, Sectors::new(blocks * 8)).unwrap();
        for block in (0..blocks).step_by(2) {
            map.mark_blocks(block, block);
        }
        map.take(generation, map.capacity()).unwrap();
        (
            map,
            Base {
                generation,
                number: 0,
            },
        )
    }

    fn whole(parts: ChangedParts) -> Result<Vec<u8>, FullNeeded> {
        parts.collect::<Result<Vec<_>, _>>().map(|parts| parts.concat())
    }

    fn lines(parts: ChangedParts) -> Vec<ChangedLine> {
        let text = whole(parts).unwrap();
        let lines = text.split_inclusive(|byte| *byte == b'\n');
        lines.map(|line| serde_json::from_slice(line).unwrap()).collect()
    }

    #[test]
    fn both_forms_say_what_the_document_in_one_piece_says() {
        for blocks in [0, 1, 2, 20_000] {
            let (map, base) = map(blocks);
            let report = ChangedReport::since(map.frozen(), &base);
            let wanted = serde_json::to_value(&report).unwrap();
            let document = whole(report.clone().parts(ChangedForm::Document)).unwrap();
            let mut document: serde_json::Value = serde_json::from_slice(&document).unwrap();
            assert_eq!(document["device_capacity"], blocks * 4096);
            document.as_object_mut().unwrap().remove("device_capacity");
            assert_eq!(document, wanted);

            let lines = lines(report.parts(ChangedForm::Lines));
            let ChangedAnswer::Changed { extents, number, .. } = serde_json::from_value(wanted).unwrap()
            else {
                panic!("no extents");
            };
            assert!(matches!(&lines[0], ChangedLine::Head(head) if head.number == number));
            let said: Vec<Extent> = lines
                .iter()
                .filter_map(|line| match line {
                    ChangedLine::Extent(extent) => Some(*extent),
                    _ => None,
                })
                .collect();
            assert_eq!(said, extents);
            let totals = ChangedTotals {
                extents: blocks.div_ceil(2),
                bytes: blocks.div_ceil(2) * 4096,
            };
            assert_eq!(lines.last(), Some(&ChangedLine::End { end: totals }));
        }
    }

    #[test]
    fn an_answer_that_becomes_void_says_so() {
        let (mut map, base) = map(20_000);
        let report = ChangedReport::since(map.frozen(), &base);
        let mut document = report.clone().parts(ChangedForm::Document);
        let parts = report.parts(ChangedForm::Lines);
        document.next().unwrap().unwrap();
        map.corrupt(ResetReason::RunMissed);
        assert!(document.any(|part| part.is_err()));
        let last = lines(parts).pop();
        assert!(
            matches!(last, Some(ChangedLine::Full { full_needed }) if full_needed.reason == "run_missed")
        );

        let full = ChangedReport::since(map.frozen(), &base);
        for form in [ChangedForm::Document, ChangedForm::Lines] {
            let text = whole(full.clone().parts(form)).unwrap();
            let answer: ChangedAnswer = serde_json::from_slice(&text).unwrap();
            assert!(matches!(answer, ChangedAnswer::Full { .. }));
        }
    }
}

//! Answer to "what changed since": its form in JSON, streamed out and read back.
//!
//! `{"generation", "number", "since", "block_size", "extents": [{"offset", "length"}, ..]}` or
//! `{"full_needed": {"reason", "detail"}}`. All sizes are bytes, extents ascend and don't touch.

use serde::ser::{SerializeMap, SerializeStruct};
use serde::{Deserialize, Serialize, Serializer};

use super::extents::ChangedExtents;
use super::read_map::{Base, ReadMap};
use super::reason::FullNeeded;
use crate::units::{Extent, Generation};
use std::sync::Arc;

/// An answer to be serialized; the extents are walked while it is written.
#[derive(Clone, Debug)]
pub struct ChangedReport {
    since: u8,
    changes: Result<ChangedExtents, FullNeeded>,
}

impl ChangedReport {
    /// What the map of the last take ([`super::CbtMap::frozen`]) says about `base`; without a map, why there is
    /// none.
    #[must_use]
    pub fn since(map: Result<Arc<ReadMap>, FullNeeded>, base: &Base) -> Self {
        Self {
            since: base.number,
            changes: map.and_then(|map| map.changed_since(base)),
        }
    }

    /// What the map of the last take says about the period before it; without a map, why there is none.
    #[must_use]
    pub fn last(map: Result<Arc<ReadMap>, FullNeeded>) -> Self {
        Self {
            since: map.as_ref().map_or(0, |map| map.number().saturating_sub(1)),
            changes: map.and_then(|map| map.changed_in_last()),
        }
    }

    /// Number that the changes start from.
    pub(super) const fn since_number(&self) -> u8 {
        self.since
    }

    /// The extents or the reason why there are none.
    ///
    /// # Errors
    /// A full copy is needed.
    pub fn changes(self) -> Result<ChangedExtents, FullNeeded> {
        self.changes
    }
}

impl Serialize for ChangedReport {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.changes {
            Ok(extents) => {
                let map = extents.read_map();
                let mut object = serializer.serialize_struct("Changed", 5)?;
                object.serialize_field("generation", &map.generation())?;
                object.serialize_field("number", &map.number())?;
                object.serialize_field("since", &self.since)?;
                object.serialize_field("block_size", &map.block_size().bytes())?;
                object.serialize_field("extents", &Streamed(extents))?;
                object.end()
            }
            Err(full) => {
                let mut object = serializer.serialize_map(Some(1))?;
                object.serialize_entry("full_needed", full)?;
                object.end()
            }
        }
    }
}

impl Serialize for FullNeeded {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut object = serializer.serialize_struct("FullNeeded", 2)?;
        object.serialize_field("reason", self.reason.code())?;
        object.serialize_field("detail", &self.reason.to_string())?;
        object.end()
    }
}

/// Serializes the extents one by one.
struct Streamed<'a>(&'a ChangedExtents);

impl Serialize for Streamed<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.clone())
    }
}

/// An answer as read by a client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ChangedAnswer {
    /// What changed.
    Changed {
        /// Generation of the map.
        generation: Generation,
        /// Number of the take that the extents lead to.
        number: u8,
        /// Number that they start from.
        since: u8,
        /// Tracking block size in bytes.
        block_size: u64,
        /// Ascending extents.
        extents: Vec<Extent>,
    },
    /// A full copy is needed.
    Full {
        /// Why.
        full_needed: FullAnswer,
    },
}

/// The reason in a [`ChangedAnswer::Full`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FullAnswer {
    /// Stable code.
    pub reason: String,
    /// For people.
    pub detail: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cbt::{CbtMap, ResetReason};
    use crate::units::{BlockSize, Sectors};
    use uuid::Uuid;

    #[test]
    fn both_answers_are_read_back() {
        let generation = Generation::new(Uuid::from_u128(1));
        let mut map = CbtMap::new(generation, BlockSize::from_shift(12).unwrap(), Sectors::new(81)).unwrap();
        map.mark_blocks(2, 3);
        map.mark_blocks(10, 10);
        map.take(Generation::new(Uuid::from_u128(2)), Sectors::new(81))
            .unwrap();
        let base = Base {
            generation,
            number: 0,
        };
        let text = serde_json::to_string(&ChangedReport::since(map.frozen(), &base)).unwrap();
        assert_eq!(
            text,
            "{\"generation\":\"00000000-0000-0000-0000-000000000001\",\"number\":1,\"since\":0,\
             \"block_size\":4096,\"extents\":[{\"offset\":8192,\"length\":8192},{\"offset\":40960,\"length\":512}]}"
        );
        let answer: ChangedAnswer = serde_json::from_str(&text).unwrap();
        assert!(
            matches!(answer, ChangedAnswer::Changed { number: 1, since: 0, ref extents, .. } if extents.len() == 2)
        );

        map.corrupt(ResetReason::RunMissed);
        let text = serde_json::to_string(&ChangedReport::since(map.frozen(), &base)).unwrap();
        let answer: ChangedAnswer = serde_json::from_str(&text).unwrap();
        assert!(matches!(answer, ChangedAnswer::Full { full_needed } if full_needed.reason == "run_missed"));
        let untaken = CbtMap::new(generation, BlockSize::from_shift(12).unwrap(), Sectors::new(81)).unwrap();
        let text = serde_json::to_string(&ChangedReport::last(untaken.frozen())).unwrap();
        assert!(text.contains("\"not_taken\""), "{text}");
    }
}

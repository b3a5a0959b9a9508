//! Chunk parameters: how large a chunk is on a device of some size.

use serde::{Deserialize, Serialize};

use super::layout::ChunkLayout;
use crate::units::Sectors;

/// Smallest shift that a chunk may have: 64 units of a sector's size or more.
const MIN_SHIFT: u32 = 15;
/// Largest shift that a chunk may have.
const MAX_SHIFT: u32 = 26;

/// Chunk parameters that no device can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChunkParamsError {
    /// A shift outside of what a chunk may have.
    #[error("{name} is {value}, but must be from {MIN_SHIFT} (32 KiB) to {MAX_SHIFT} (64 MiB)")]
    Shift {
        /// Name of the parameter.
        name: &'static str,
        /// Its value.
        value: u32,
    },
    /// A count whose shift is none.
    #[error("chunk_maximum_count_shift is {0}, but must be from 1 to 40")]
    Count(u32),
}

/// The three parameters that choose the chunk size.
///
/// The size starts at `minimum_shift`, or at the device's smallest I/O if that is larger, and doubles until the device
/// has at most 2^`maximum_count_shift` chunks or `maximum_shift` is reached; there the count may exceed its maximum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Fields", into = "Fields")]
pub struct ChunkParams {
    minimum_shift: u32,
    maximum_shift: u32,
    maximum_count_shift: u32,
}

impl ChunkParams {
    /// Checks the parameters. A `maximum_shift` below `minimum_shift` is raised to it.
    ///
    /// # Errors
    /// A shift outside 15..=26, or a count shift outside 1..=40.
    #[doc(alias = "chunk_minimum_shift")]
    #[doc(alias = "chunk_maximum_shift")]
    #[doc(alias = "chunk_maximum_count_shift")]
    pub fn new(
        minimum_shift: u32,
        maximum_shift: u32,
        maximum_count_shift: u32,
    ) -> Result<Self, ChunkParamsError> {
        let check = |name, value| {
            if (MIN_SHIFT..=MAX_SHIFT).contains(&value) {
                Ok(())
            } else {
                Err(ChunkParamsError::Shift { name, value })
            }
        };
        check("chunk_minimum_shift", minimum_shift)?;
        let maximum_shift = maximum_shift.max(minimum_shift);
        check("chunk_maximum_shift", maximum_shift)?;
        if !(1..=40).contains(&maximum_count_shift) {
            return Err(ChunkParamsError::Count(maximum_count_shift));
        }
        Ok(Self {
            minimum_shift,
            maximum_shift,
            maximum_count_shift,
        })
    }

    /// The layout of a device of `capacity` with the given logical block and smallest I/O in bytes, both powers of
    /// two.
    #[must_use]
    pub fn layout(&self, capacity: Sectors, logical_block: u32, minimum_io: u32) -> ChunkLayout {
        let smallest = minimum_io.max(1).next_power_of_two().trailing_zeros();
        // A unit must hold a logical block.
        let block = logical_block.max(1).next_power_of_two().trailing_zeros();
        let from = self
            .minimum_shift
            .max(smallest)
            .max(block)
            .min(self.maximum_shift);
        let chunks = |shift: u32| capacity.bytes().div_ceil(1 << shift);
        let shift = (from..self.maximum_shift)
            .find(|shift| chunks(*shift) <= 1 << self.maximum_count_shift)
            .unwrap_or(self.maximum_shift);
        ChunkLayout::new(capacity.bytes(), shift, block)
    }
}

impl Default for ChunkParams {
    /// 256 KiB to 64 MiB, 2^40 chunks: the original's.
    fn default() -> Self {
        Self {
            minimum_shift: 18,
            maximum_shift: 26,
            maximum_count_shift: 40,
        }
    }
}

/// The form in files and JSON.
#[derive(Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Fields {
    chunk_minimum_shift: u32,
    chunk_maximum_shift: u32,
    chunk_maximum_count_shift: u32,
}

impl Default for Fields {
    fn default() -> Self {
        ChunkParams::default().into()
    }
}

impl From<ChunkParams> for Fields {
    fn from(params: ChunkParams) -> Self {
        Self {
            chunk_minimum_shift: params.minimum_shift,
            chunk_maximum_shift: params.maximum_shift,
            chunk_maximum_count_shift: params.maximum_count_shift,
        }
    }
}

impl TryFrom<Fields> for ChunkParams {
    type Error = ChunkParamsError;

    fn try_from(fields: Fields) -> Result<Self, ChunkParamsError> {
        Self::new(
            fields.chunk_minimum_shift,
            fields.chunk_maximum_shift,
            fields.chunk_maximum_count_shift,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_starts_small_and_grows_with_the_device() {
        let params = ChunkParams::default();
        let shift = |params: &ChunkParams, bytes: u64, io: u32| {
            params
                .layout(Sectors::new(bytes / 512), 512, io)
                .chunk_bytes()
                .trailing_zeros()
        };
        assert_eq!(shift(&params, 1 << 30, 512), 18);
        assert_eq!(shift(&params, 1 << 50, 512), 18);
        assert_eq!(shift(&params, 1 << 59, 512), 19);
        assert_eq!(shift(&params, 1 << 30, 1 << 20), 20);
        assert_eq!(shift(&params, 1 << 30, 1 << 30), 26);
        let few = ChunkParams::new(18, 20, 4).unwrap();
        assert_eq!(shift(&few, 1 << 22, 512), 18);
        assert_eq!(shift(&few, (1 << 22) + 512, 512), 19);
        // At the cap the count exceeds its maximum.
        assert_eq!(shift(&few, 1 << 40, 512), 20);
    }

    #[test]
    fn what_no_device_can_have_is_refused() {
        for (minimum, maximum) in [(14, 26), (27, 27), (18, 27)] {
            assert!(matches!(
                ChunkParams::new(minimum, maximum, 40),
                Err(ChunkParamsError::Shift { .. })
            ));
        }
        for count in [0, 41] {
            assert_eq!(
                ChunkParams::new(18, 26, count),
                Err(ChunkParamsError::Count(count))
            );
        }
        assert_eq!(ChunkParams::new(20, 18, 40), ChunkParams::new(20, 20, 40));
        let json = serde_json::to_string(&ChunkParams::default()).unwrap();
        assert!(json.contains("\"chunk_minimum_shift\":18"), "{json}");
        assert_eq!(
            serde_json::from_str::<ChunkParams>(&json).unwrap(),
            ChunkParams::default()
        );
        assert!(serde_json::from_str::<ChunkParams>(r#"{"chunk_minimum_shift":3}"#).is_err());
    }
}

//! Tracking parameters: how large a tracking block is on a device of some size.

use serde::{Deserialize, Serialize};

use crate::units::{BlockSize, Sectors};

/// Tracking parameters that no device can be tracked with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParamsError {
    /// A shift outside of what a block size may have.
    #[error("{name} is {value}, but must be from 12 (4 KiB) to 26 (64 MiB)")]
    Shift {
        /// Name of the parameter.
        name: &'static str,
        /// Its value.
        value: u32,
    },
    /// A block count of 0.
    #[error("tracking_block_maximum_count is 0, but must be at least 1")]
    Count,
}

/// The three parameters that choose the tracking block size.
///
/// The size starts at `minimum_shift` and doubles until the device has at most `maximum_count` blocks or
/// `maximum_shift` is reached; there the count may exceed its maximum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Fields", into = "Fields")]
pub struct TrackingParams {
    minimum_shift: u32,
    maximum_count: u64,
    maximum_shift: u32,
}

impl TrackingParams {
    /// Checks the parameters. A `maximum_shift` below `minimum_shift` is raised to it.
    ///
    /// # Errors
    /// A shift outside 12..=26, or a count of 0.
    #[doc(alias = "tracking_block_minimum_shift")]
    #[doc(alias = "tracking_block_maximum_count")]
    #[doc(alias = "tracking_block_maximum_shift")]
    pub fn new(minimum_shift: u32, maximum_count: u64, maximum_shift: u32) -> Result<Self, ParamsError> {
        if BlockSize::from_shift(minimum_shift).is_err() {
            return Err(ParamsError::Shift {
                name: "tracking_block_minimum_shift",
                value: minimum_shift,
            });
        }
        let maximum_shift = maximum_shift.max(minimum_shift);
        if BlockSize::from_shift(maximum_shift).is_err() {
            return Err(ParamsError::Shift {
                name: "tracking_block_maximum_shift",
                value: maximum_shift,
            });
        }
        if maximum_count == 0 {
            return Err(ParamsError::Count);
        }
        Ok(Self {
            minimum_shift,
            maximum_count,
            maximum_shift,
        })
    }

    /// log2 of the smallest block in bytes.
    #[must_use]
    pub const fn minimum_shift(&self) -> u32 {
        self.minimum_shift
    }

    /// Number of blocks above which the block size doubles.
    #[must_use]
    pub const fn maximum_count(&self) -> u64 {
        self.maximum_count
    }

    /// log2 of the largest block in bytes.
    #[must_use]
    pub const fn maximum_shift(&self) -> u32 {
        self.maximum_shift
    }

    /// The tracking block size for a device of `capacity`.
    #[must_use]
    pub fn block_size(&self, capacity: Sectors) -> BlockSize {
        // The constructor allowed only shifts that a block size can have.
        let size = |shift| BlockSize::from_shift(shift).expect("shift was checked by the constructor");
        (self.minimum_shift..self.maximum_shift)
            .map(size)
            .find(|size| size.blocks_in(capacity) <= self.maximum_count)
            .unwrap_or_else(|| size(self.maximum_shift))
    }
}

impl Default for TrackingParams {
    /// 64 KiB to 64 MiB, 2,097,152 blocks: the original's.
    fn default() -> Self {
        Self {
            minimum_shift: 16,
            maximum_count: 2_097_152,
            maximum_shift: 26,
        }
    }
}

/// The form in files and JSON.
#[derive(Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Fields {
    minimum_shift: u32,
    maximum_count: u64,
    maximum_shift: u32,
}

impl Default for Fields {
    fn default() -> Self {
        TrackingParams::default().into()
    }
}

impl From<TrackingParams> for Fields {
    fn from(params: TrackingParams) -> Self {
        Self {
            minimum_shift: params.minimum_shift,
            maximum_count: params.maximum_count,
            maximum_shift: params.maximum_shift,
        }
    }
}

impl TryFrom<Fields> for TrackingParams {
    type Error = ParamsError;

    fn try_from(fields: Fields) -> Result<Self, Self::Error> {
        Self::new(fields.minimum_shift, fields.maximum_count, fields.maximum_shift)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn shift_for(params: &TrackingParams, bytes: u64) -> u32 {
        params.block_size(Sectors::from_bytes(bytes).unwrap()).shift()
    }

    #[test]
    fn blocks_double_until_the_count_fits() {
        let params = TrackingParams::default();
        for (bytes, shift) in [
            (0, 16),
            (512, 16),
            (128 * GIB, 16),
            (128 * GIB + 512, 17),
            (1024 * GIB, 19),
            (128 * 1024 * GIB, 26),
            (1024 * 1024 * GIB, 26),
        ] {
            assert_eq!(shift_for(&params, bytes), shift, "{bytes} bytes");
        }
    }

    #[test]
    fn bounds_are_checked_and_a_low_maximum_raised() {
        assert!(TrackingParams::new(11, 1, 26).is_err());
        assert!(TrackingParams::new(27, 1, 26).is_err());
        assert!(TrackingParams::new(16, 1, 27).is_err());
        assert_eq!(TrackingParams::new(16, 0, 26), Err(ParamsError::Count));
        let params = TrackingParams::new(20, 1, 12).unwrap();
        assert_eq!(params.maximum_shift(), 20);
        assert_eq!(shift_for(&params, 1 << 40), 20);
    }

    #[test]
    fn text_form_is_checked_and_has_defaults() {
        let read = |text| serde_json::from_str::<TrackingParams>(text);
        assert_eq!(read("{}").unwrap(), TrackingParams::default());
        assert_eq!(read(r#"{"minimum_shift":12}"#).unwrap().minimum_shift(), 12);
        assert!(read(r#"{"minimum_shift":3}"#).is_err());
        assert!(read(r#"{"minimal_shift":13}"#).is_err());
        let text = serde_json::to_string(&TrackingParams::default()).unwrap();
        assert_eq!(read(&text).unwrap(), TrackingParams::default());
    }
}

//! Units: quantities and identifiers. A number with a unit is never a bare integer at a module's border.
//!
//! Sector means 512 bytes everywhere, whatever the device's logical block size. There is no `Deref` and no
//! `From<u64>`: every conversion has a name.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Bytes in a sector.
pub const SECTOR_BYTES: u64 = 512;

/// A value was outside the range of its unit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// A byte count that is no multiple of the sector size.
    #[error("{0} bytes is not a multiple of 512")]
    NotSectors(u64),
    /// A block size that is no power of two in the allowed range.
    #[error("block size {0} is not a power of two from 4 KiB to 64 MiB")]
    BlockSize(u64),
    /// Text that is no size.
    #[error("\"{0}\" is no size: give bytes, or a number with a suffix as in 64K, 1M, 2GiB")]
    Size(String),
    /// Text that is no `major:minor`.
    #[error("\"{0}\" is not a device number of the form major:minor")]
    DeviceId(String),
}

/// The bytes of `text`: a number, and a suffix `K`, `M`, `G`, `T`, also as in `KiB`; K is 1024.
///
/// # Errors
/// It is none, or more than 2^64.
pub fn parse_bytes(text: &str) -> Result<u64, UnitError> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let shift = match suffix {
        "" | "B" => Some(0),
        "k" | "K" | "KiB" => Some(10),
        "M" | "MiB" => Some(20),
        "G" | "GiB" => Some(30),
        "T" | "TiB" => Some(40),
        _ => None,
    };
    shift
        .and_then(|shift| number.parse::<u64>().ok()?.checked_mul(1 << shift))
        .ok_or_else(|| UnitError::Size(text.to_owned()))
}

/// A count of 512-byte sectors, or a position in them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Sectors(u64);

impl Sectors {
    /// `count` sectors.
    #[must_use]
    pub const fn new(count: u64) -> Self {
        Self(count)
    }

    /// The sectors in `bytes`.
    ///
    /// # Errors
    /// `bytes` is no multiple of 512.
    pub const fn from_bytes(bytes: u64) -> Result<Self, UnitError> {
        if bytes.is_multiple_of(SECTOR_BYTES) {
            Ok(Self(bytes / SECTOR_BYTES))
        } else {
            Err(UnitError::NotSectors(bytes))
        }
    }

    /// The number of sectors.
    #[must_use]
    pub const fn count(self) -> u64 {
        self.0
    }

    /// The same in bytes; saturates at `u64::MAX`.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0.saturating_mul(SECTOR_BYTES)
    }
}

/// Size of a tracking block: a power of two from 4 KiB (shift 12) to 64 MiB (shift 26).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockSize {
    shift: u32,
}

impl BlockSize {
    /// Smallest shift.
    pub const MIN_SHIFT: u32 = 12;
    /// Largest shift.
    pub const MAX_SHIFT: u32 = 26;

    /// The size 2^`shift` bytes.
    ///
    /// # Errors
    /// `shift` is outside 12..=26.
    pub const fn from_shift(shift: u32) -> Result<Self, UnitError> {
        if shift >= Self::MIN_SHIFT && shift <= Self::MAX_SHIFT {
            Ok(Self { shift })
        } else {
            Err(UnitError::BlockSize(1_u64.wrapping_shl(shift)))
        }
    }

    /// The size `bytes`.
    ///
    /// # Errors
    /// `bytes` is no power of two from 4 KiB to 64 MiB.
    pub const fn from_bytes(bytes: u64) -> Result<Self, UnitError> {
        if bytes.is_power_of_two()
            && bytes.trailing_zeros() >= Self::MIN_SHIFT
            && bytes.trailing_zeros() <= Self::MAX_SHIFT
        {
            Ok(Self {
                shift: bytes.trailing_zeros(),
            })
        } else {
            Err(UnitError::BlockSize(bytes))
        }
    }

    /// log2 of the size in bytes.
    #[must_use]
    pub const fn shift(self) -> u32 {
        self.shift
    }

    /// log2 of the size in sectors.
    #[must_use]
    pub const fn sector_shift(self) -> u32 {
        self.shift - SECTOR_BYTES.trailing_zeros()
    }

    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        1 << self.shift
    }

    /// Number of blocks that cover `capacity`; the last one may be short.
    #[must_use]
    pub const fn blocks_in(self, capacity: Sectors) -> u64 {
        capacity.count().div_ceil(1 << self.sector_shift())
    }
}

/// A range in bytes: the form in which changed areas leave the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Length in bytes, not 0.
    pub length: u64,
}

impl Extent {
    /// Byte after the last one.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.offset + self.length
    }
}

/// An identifier that is a UUID, in text and JSON too.
macro_rules! identifier {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// The one with this identifier.
            #[must_use]
            pub const fn new(id: Uuid) -> Self {
                Self(id)
            }

            /// The identifier.
            #[must_use]
            pub const fn uuid(self) -> Uuid {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map(Self)
            }
        }
    };
}

identifier! {
    /// Identity of a change map's life: numbers of different generations can't be compared.
    Generation
}

identifier! {
    /// Identity of a snapshot.
    SnapshotId
}

/// A block device's number, `major:minor` in text and JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct DeviceId {
    /// Major number, below 2^12.
    pub major: u32,
    /// Minor number, below 2^20.
    pub minor: u32,
}

impl DeviceId {
    /// The number as the kernel keeps it in `dev_t` (`MKDEV`: 12 bits of major, 20 of minor), which is not the
    /// encoding of user space.
    #[must_use]
    pub const fn kernel_dev(self) -> u32 {
        (self.major << 20) | (self.minor & 0xf_ffff)
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl From<DeviceId> for String {
    fn from(id: DeviceId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for DeviceId {
    type Error = UnitError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl FromStr for DeviceId {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || UnitError::DeviceId(text.to_owned());
        let (major, minor) = text.trim().split_once(':').ok_or_else(wrong)?;
        let number = |part: &str, bits: u32| {
            part.parse::<u32>()
                .ok()
                .filter(|n| *n < 1 << bits)
                .ok_or_else(wrong)
        };
        Ok(Self {
            major: number(major, 12)?,
            minor: number(minor, 20)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes_are_powers_of_two_in_range() {
        for shift in 0..64 {
            assert_eq!(
                BlockSize::from_shift(shift).is_ok(),
                (12..=26).contains(&shift),
                "shift {shift}"
            );
            assert_eq!(
                BlockSize::from_bytes(1 << shift).is_ok(),
                (12..=26).contains(&shift),
                "shift {shift}"
            );
        }
        assert_eq!(BlockSize::from_bytes(65_537), Err(UnitError::BlockSize(65_537)));
        assert_eq!(BlockSize::from_bytes(0), Err(UnitError::BlockSize(0)));
        let size = BlockSize::from_bytes(65_536).unwrap();
        assert_eq!((size.shift(), size.sector_shift(), size.bytes()), (16, 7, 65_536));
        assert_eq!(size.blocks_in(Sectors::new(129)), 2);
    }

    #[test]
    fn device_numbers_keep_their_text() {
        let id: DeviceId = "259:3\n".parse().unwrap();
        assert_eq!(id, DeviceId { major: 259, minor: 3 });
        assert_eq!(id.kernel_dev(), 259 << 20 | 3);
        assert_eq!(id.to_string(), "259:3");
        for wrong in ["", "7", "7:", ":1", "a:b", "4096:0", "1:1048576", "-1:0"] {
            assert!(wrong.parse::<DeviceId>().is_err(), "{wrong}");
        }
    }
}

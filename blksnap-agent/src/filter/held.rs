//! Held: images of devices whose writes a filter holds, one type for all such filters.
//!
//! What an image has in common with others is its [`Image`]: what was preserved and, for the rest, the origin. What
//! differs is where it is noted that its user has changed it.

use std::sync::Arc;

use super::gate::GateImage;
use super::served::{Served, ServedImage};
use crate::disk::Zero;
use crate::engine::cow::{Image, ImageError, Origin};

/// An image of a device whose writes are held: what is written to it is marked as changed in the device's maps.
#[derive(Clone, Debug)]
pub enum HeldImage {
    /// Of a device that the agent serves.
    Served(ServedImage),
    /// Of a device that has a gate.
    Gate(GateImage),
}

impl HeldImage {
    /// The image, for reading.
    #[must_use]
    pub const fn image(&self) -> &Image {
        match self {
            Self::Served(served) => served.image(),
            Self::Gate(gate) => gate.image(),
        }
    }

    /// The device under copy on write.
    #[must_use]
    pub fn origin(&self) -> &Arc<Origin> {
        self.image().origin()
    }

    /// The device, if the agent serves it.
    #[must_use]
    pub const fn served(&self) -> Option<&Arc<Served>> {
        match self {
            Self::Served(served) => Some(served.served()),
            Self::Gate(_) => None,
        }
    }

    /// As [`Image::write_at`].
    ///
    /// # Errors
    /// As there, or the change can't be noted: nothing is written then.
    pub fn write_at(&self, data: &[u8], offset: u64) -> Result<(), ImageError> {
        match self {
            Self::Served(served) => served.write_at(data, offset),
            Self::Gate(gate) => gate.write_at(data, offset),
        }
    }

    /// As [`Image::zero_at`].
    ///
    /// # Errors
    /// As [`HeldImage::write_at`].
    pub fn zero_at(&self, offset: u64, length: u64, zero: Zero) -> Result<(), ImageError> {
        match self {
            Self::Served(served) => served.zero_at(offset, length, zero),
            Self::Gate(gate) => gate.zero_at(offset, length, zero),
        }
    }
}

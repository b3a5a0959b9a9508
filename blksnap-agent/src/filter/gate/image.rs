//! Image: a device behind a gate as it was at the instant; what its user writes to it is marked in the device's maps.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use crate::cbt::Taken;
use crate::disk::Zero;
use crate::engine::cow::{Image, ImageError};
use crate::tracker::{DirtyBlocks, TrackedDevice};
use crate::units::{Generation, SECTOR_BYTES, Sectors};

/// An image of a device that has a gate. It has no hold on the gate itself: that ends with the snapshot, whoever still
/// reads.
#[derive(Clone, Debug)]
pub struct GateImage {
    tracked: Arc<TrackedDevice>,
    image: Image,
    marked: Arc<Mutex<Marked>>,
}

/// Blocks that are marked in the read map and in the open period, as of a take.
#[derive(Debug)]
struct Marked {
    generation: Generation,
    active: u8,
    blocks: DirtyBlocks,
}

impl GateImage {
    /// `image`, of a device that is tracked as `tracked` and was taken so.
    #[must_use]
    pub fn new(tracked: Arc<TrackedDevice>, image: Image, taken: Taken) -> Self {
        let marked = Marked {
            generation: taken.generation,
            active: taken.number.wrapping_add(1),
            blocks: DirtyBlocks::default(),
        };
        Self {
            tracked,
            image,
            marked: Arc::new(Mutex::new(marked)),
        }
    }

    /// The image, for reading.
    #[must_use]
    pub const fn image(&self) -> &Image {
        &self.image
    }

    /// As [`Image::write_at`].
    ///
    /// # Errors
    /// As there, or the change can't be noted: nothing is written then.
    pub fn write_at(&self, data: &[u8], offset: u64) -> Result<(), ImageError> {
        self.mark(offset, data.len() as u64)?;
        self.image.write_at(data, offset)
    }

    /// As [`Image::zero_at`].
    ///
    /// # Errors
    /// As [`GateImage::write_at`].
    pub fn zero_at(&self, offset: u64, length: u64, zero: Zero) -> Result<(), ImageError> {
        self.mark(offset, length)?;
        self.image.zero_at(offset, length, zero)
    }

    /// Marks blocks that are not marked yet: each mark is written to a file.
    fn mark(&self, offset: u64, length: u64) -> Result<(), ImageError> {
        let size = self.image.size();
        let Some(last) = length
            .checked_sub(1)
            .and_then(|rest| offset.checked_add(rest))
            .filter(|last| *last < size)
        else {
            // Nothing is changed, or the write fails.
            return Ok(());
        };
        let shift = self.tracked.block_size().shift();
        let (first, last) = (offset >> shift, last >> shift);
        let mut marked = self.marked.lock().unwrap_or_else(PoisonError::into_inner);
        let (generation, active) = self.tracked.with_map(|map| (map.generation(), map.active()));
        if (marked.generation, marked.active) != (generation, active) {
            // Taken again since: the next backup reads another map.
            *marked = Marked {
                generation,
                active,
                blocks: DirtyBlocks::default(),
            };
        }
        let is_marked = |block: u64| {
            let word = usize::try_from(block / 64).ok();
            word.and_then(|word| marked.blocks.words().get(word))
                .is_some_and(|word| word >> (block % 64) & 1 == 1)
        };
        if (first..=last).all(is_marked) {
            return Ok(());
        }
        let sectors = self.tracked.block_size().bytes() / SECTOR_BYTES;
        let start = first * sectors;
        let end = ((last + 1) * sectors).min(size / SECTOR_BYTES);
        let range = (Sectors::new(start), Sectors::new(end - start));
        self.tracked.mark_both(&[range]).map_err(|error| ImageError::Io {
            action: "note a change of the image",
            offset,
            source: io::Error::other(error.to_string()),
        })?;
        marked.blocks.insert(first, last);
        Ok(())
    }
}

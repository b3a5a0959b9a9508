//! Fingerprint: checksums of those parts of a device that a use of it would most likely change.
//!
//! The counters of the disks tell of every write in this boot. Of a boot in between (another system, a rescue disk,
//! a hypervisor that shows an older state of the disk) they know nothing. So a seal keeps checksums of
//!
//! - the first and the last MiB, and the first 128 KiB of every partition: partition tables, superblocks, the labels
//!   of LVM, LUKS and md, which a mount changes;
//! - up to 256 blocks of those that changed last, spread evenly: journals, superblocks and whatever a program
//!   writes first wherever it is; an older state of the disk differs there most likely.
//!
//! What agrees in all of it may still differ elsewhere: this finds doubt, it proves nothing.

use std::io;

use serde::{Deserialize, Serialize};

use crate::cbt::Blocks;
use crate::sys::AlignedBuffer;
use crate::units::Extent;

/// Bytes at either end.
const ENDS: u64 = 1 << 20;

/// Bytes at the beginning of a partition.
const PARTITION: u64 = 128 << 10;

/// Most bytes of a block that changed.
const BLOCK: u64 = 64 << 10;

/// Where samples begin and end: no disk has larger logical blocks.
const UNIT: u64 = 64 << 10;

/// Most blocks that changed.
const BLOCKS: usize = 256;

/// Most samples of one fingerprint.
const MAX_SAMPLES: usize = 1024;

/// A part of the device and its checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
    /// CRC-32C of the bytes.
    pub sum: u32,
}

/// Checksums of some parts of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint {
    samples: Vec<Sample>,
}

/// What a fingerprint is made of: a device, or bytes in a test.
pub trait Content {
    /// Length in bytes.
    fn length(&self) -> u64;
    /// Fills the first `length` bytes of `buffer` from `offset` on, both multiples of 64 KiB or up to the end.
    ///
    /// # Errors
    /// The range can't be read.
    fn read(&self, buffer: &mut AlignedBuffer, offset: u64, length: usize) -> io::Result<()>;
}

impl Content for crate::disk::DirectReader {
    fn length(&self) -> u64 {
        crate::disk::DirectReader::length(self)
    }

    fn read(&self, buffer: &mut AlignedBuffer, offset: u64, length: usize) -> io::Result<()> {
        crate::disk::DirectReader::read(self, buffer, offset, length)
    }
}

/// The content is not the one that a fingerprint was made of.
#[derive(Debug, thiserror::Error)]
pub enum ContentDiffers {
    /// It can't be read.
    #[error("reading {length} bytes at {offset} failed: {source}")]
    Io {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
        /// Why.
        source: io::Error,
    },
    /// A part differs.
    #[error("the {length} bytes at {offset} are not those that were there when tracking stopped")]
    Differs {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
    },
    /// The fingerprint says nothing.
    #[error("there is no fingerprint of the content")]
    Empty,
}

/// Where to look at a device of `length` bytes with partitions that begin at these bytes, whose change map has
/// these `bytes` for blocks of `block` bytes. Ascending, not overlapping, in units of 64 KiB but for the end.
#[must_use]
pub fn places(length: u64, partitions: &[u64], bytes: &Blocks, block: u64) -> Vec<Extent> {
    let mut wanted = vec![(0, ENDS), (length.saturating_sub(ENDS), ENDS)];
    wanted.extend(partitions.iter().map(|start| (*start, PARTITION)));
    let block_offsets = latest(bytes).into_iter().map(|index| index * block);
    wanted.extend(block_offsets.map(|offset| (offset, block.min(BLOCK))));
    wanted.sort_unstable();
    let mut places: Vec<Extent> = Vec::new();
    for (offset, size) in wanted {
        let end = offset.saturating_add(size).next_multiple_of(UNIT).min(length);
        let after = places.last().map_or(0, Extent::end);
        let offset = (offset - offset % UNIT).max(after);
        if offset < end && places.len() < MAX_SAMPLES {
            places.push(Extent {
                offset,
                length: end - offset,
            });
        }
    }
    places
}

/// The indices of the blocks that changed last, ascending: all of the last periods that fit, and an even choice of
/// the one before, its first block among them.
fn latest(bytes: &Blocks) -> Vec<u64> {
    let mut counts = [0_usize; 256];
    for byte in bytes.iter() {
        counts[usize::from(byte)] += 1;
    }
    let mut left = BLOCKS;
    // All blocks above this period fit.
    let mut period = u8::MAX;
    while period > 0 && counts[usize::from(period)] <= left {
        left -= counts[usize::from(period)];
        period -= 1;
    }
    let count = counts[usize::from(period)];
    let mut place = 0;
    let chosen = (0_u64..).zip(bytes.iter()).filter(|(_, byte)| {
        if *byte != period || period == 0 {
            return *byte > period;
        }
        place += 1;
        (place - 1) * left % count < left
    });
    chosen.map(|(index, _)| index).collect()
}

impl Fingerprint {
    /// The checksums at `places`.
    ///
    /// # Errors
    /// The content can't be read.
    pub fn of(content: &impl Content, places: &[Extent]) -> Result<Self, ContentDiffers> {
        let samples = places
            .iter()
            .map(|place| {
                Ok(Sample {
                    offset: place.offset,
                    length: place.length,
                    sum: sum(content, *place)?,
                })
            })
            .collect::<Result<_, ContentDiffers>>()?;
        Ok(Self { samples })
    }

    /// Whether the content is the same.
    ///
    /// # Errors
    /// It is not, or can't be read.
    pub fn check(&self, content: &impl Content) -> Result<(), ContentDiffers> {
        if self.samples.is_empty() {
            return Err(ContentDiffers::Empty);
        }
        for Sample {
            offset,
            length,
            sum: was,
        } in &self.samples
        {
            let (offset, length) = (*offset, *length);
            let inside = offset
                .checked_add(length)
                .is_some_and(|end| end <= content.length() && length <= ENDS + UNIT);
            if !inside || sum(content, Extent { offset, length })? != *was {
                return Err(ContentDiffers::Differs { offset, length });
            }
        }
        Ok(())
    }
}

fn sum(content: &impl Content, place: Extent) -> Result<u32, ContentDiffers> {
    let failed = |source| ContentDiffers::Io {
        offset: place.offset,
        length: place.length,
        source,
    };
    let length = usize::try_from(place.length).map_err(|error| failed(io::Error::other(error)))?;
    let mut buffer = AlignedBuffer::zeroed(length.max(1));
    content.read(&mut buffer, place.offset, length).map_err(failed)?;
    Ok(crc32c::crc32c(&buffer.as_slice()[..length]))
}

#[cfg(test)]
mod tests;

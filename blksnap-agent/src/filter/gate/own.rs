//! Own: difference storage on the device whose writes are held.
//!
//! Its units are excluded ([`crate::engine::cow::Origin::claim`]): no image has them, nothing preserves them, and their
//! bits in the map of the programs are set from the arming on. So a write of old data there waits for nobody, and is
//! nothing that the auditor looks for. It goes the way by which the origin is read, beneath the file system and past every
//! page cache: no page and no journal that waits in the gate is in its way.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use blksnap_common::blockrange::{BlockRange, word_mask};

use super::source::Source;
use crate::cow::{ChunkLayout, UnitSet};
use crate::disk::{Allocation, Disk, Zero};

/// Zeroes are written in pieces of so many bytes.
const PIECE: u64 = 1 << 20;

/// The words of the map of kept units that have bits of excluded ones, with those bits.
pub(super) fn words(layout: &ChunkLayout, excluded: &[(u64, UnitSet)]) -> BTreeMap<u64, u64> {
    let unit = layout.unit_bytes();
    let mut words = BTreeMap::new();
    for (chunk, units) in excluded {
        for range in layout.ranges(*chunk, *units) {
            let range = BlockRange {
                first: range.offset / unit,
                last: (range.end() - 1) / unit,
            };
            for word in range.first / 64..=range.last / 64 {
                *words.entry(word).or_default() |= word_mask(range, word);
            }
        }
    }
    words
}

/// A device, to be stored on.
#[derive(Debug)]
pub(super) struct OwnDisk(Arc<Source>);

impl OwnDisk {
    pub(super) fn open(source: &Arc<Source>) -> io::Result<Arc<dyn Disk>> {
        source.open_for_storage()?;
        Ok(Arc::new(Self(Arc::clone(source))))
    }
}

impl Disk for OwnDisk {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn size(&self) -> u64 {
        self.0.size()
    }

    fn logical_block(&self) -> u32 {
        self.0.logical_block()
    }

    fn minimum_io(&self) -> u32 {
        self.0.minimum_io()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_storage(buffer, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_storage(data, offset)
    }

    fn zero_at(&self, offset: u64, length: u64, _zero: Zero, fast: bool) -> io::Result<()> {
        if fast {
            return Err(nix::errno::Errno::EOPNOTSUPP.into());
        }
        let zeroes = vec![0; usize::try_from(length.min(PIECE)).map_err(io::Error::other)?];
        let mut done = 0;
        while done < length {
            let part = usize::try_from((length - done).min(PIECE)).map_err(io::Error::other)?;
            self.0.write_storage(&zeroes[..part], offset + done)?;
            done += part as u64;
        }
        Ok(())
    }

    /// The file keeps its blocks.
    fn discard_at(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.0.flush_storage()
    }

    fn allocation(&self, offset: u64, length: u64, most: usize) -> io::Result<Vec<Allocation>> {
        self.0.allocation(offset, length, most)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cow::{Hold, SnapshotKey};
    use crate::units::Extent;

    proptest! {
        /// A bit is set if all bytes of its unit are storage, and no other.
        #[test]
        fn bits_are_those_of_units_that_are_wholly_storage(
            sectors in 1_u64..20_000,
            chunk in 15_u32..22,
            block in 9_u32..13,
            ranges in proptest::collection::vec((0_u64..20_000, 1_u64..4_000), 0..6),
        ) {
            let layout = ChunkLayout::new(sectors * 512, chunk, block);
            let mut hold = Hold::new(layout);
            let mut bytes = vec![false; usize::try_from(sectors).unwrap()];
            for (first, count) in ranges {
                // Each by itself, and apart: two ranges that make up a unit together leave it out.
                let (first, end) = (first.min(sectors), (first + count).min(sectors));
                let taken = usize::try_from(first).unwrap()..usize::try_from(end).unwrap();
                let unit = layout.unit_bytes() / 512;
                let (inner, outer) = (first.next_multiple_of(unit), if end == sectors { end } else { end / unit * unit });
                if taken.is_empty() {
                    continue;
                }
                hold.exclude(SnapshotKey(1), Extent { offset: first * 512, length: (end - first) * 512 });
                for at in inner..outer.max(inner) {
                    bytes[usize::try_from(at).unwrap()] = true;
                }
            }
            let excluded: Vec<_> = hold.excluded().collect();
            let found = words(&layout, &excluded);
            let units = layout.size().div_ceil(layout.unit_bytes());
            for unit in 0..units.next_multiple_of(64) {
                let of = |unit: u64| usize::try_from((unit * layout.unit_bytes() / 512).min(sectors)).unwrap();
                let wanted = unit < units && bytes[of(unit)..of(unit + 1)].iter().all(|byte| *byte);
                let bit = found.get(&(unit / 64)).copied().unwrap_or(0) >> (unit % 64) & 1 == 1;
                prop_assert_eq!(bit, wanted, "unit {} of {:?}", unit, layout);
            }
        }
    }
}

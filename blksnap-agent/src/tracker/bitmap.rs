//! Bitmap: one bit per tracking block and period, written by the programs, mapped here.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use aya::maps::{ArrayOfMaps, Map, MapData, MapError};
use blksnap_common::blockrange::{BlockRange, word_mask};

use crate::cbt::CbtMap;
use crate::sys::mman::SharedWords;
use crate::units::{BlockSize, Extent, Sectors};

use super::TrackerError;
use super::periods::Marked;
use super::pins::{self, PinError};
use super::refusal::one_line;

/// `BPF_MAP_TYPE_ARRAY`.
const MAP_TYPE_ARRAY: u32 = 2;
/// `BPF_F_MMAPABLE`.
const F_MMAPABLE: u32 = 1 << 10;
/// `BPF_F_INNER_MAP`: inner arrays of one outer map may differ in length.
const F_INNER_MAP: u32 = 1 << 12;

/// An array of `words` words, all 0, for an outer map; and its memory.
pub(crate) fn new_words(name: &str, words: u32) -> Result<(MapData, SharedWords), String> {
    let description = aya_obj::Map::new_from_params(MAP_TYPE_ARRAY, 4, 8, words, F_MMAPABLE | F_INNER_MAP);
    let map = MapData::create(description, name, None).map_err(|e| one_line(&e))?;
    let shared = SharedWords::map(map.fd().as_fd(), words as usize).map_err(|e| e.to_string())?;
    Ok((map, shared))
}

/// A bitmap that the programs may write to.
#[derive(Debug)]
pub(super) struct Bitmap {
    pub(super) map: MapData,
    shared: SharedWords,
    /// Where it is pinned. Dropping it leaves the pin.
    pin: Option<PathBuf>,
}

impl Bitmap {
    /// A clear bitmap of `blocks` bits.
    pub(super) fn new(slot: u32, blocks: u64) -> Result<Self, TrackerError> {
        let error = |reason: String| TrackerError::Map {
            action: "make a bitmap for",
            slot,
            reason,
        };
        let words =
            u32::try_from(blocks.div_ceil(64)).map_err(|_| error(format!("{blocks} blocks are too many")))?;
        let (map, shared) = new_words("blksnap_bitmap", words).map_err(error)?;
        Ok(Self {
            map,
            shared,
            pin: None,
        })
    }

    /// The bitmap of `blocks` bits behind `map`, made by an agent before.
    pub(super) fn open(map: MapData, slot: u32, blocks: u64) -> Result<Self, TrackerError> {
        let error = |reason: String| TrackerError::Map {
            action: "open a bitmap of",
            slot,
            reason,
        };
        let words = blocks.div_ceil(64);
        let found = map.info().map_err(|e| error(one_line(&e)))?.max_entries();
        if u64::from(found) != words {
            return Err(error(format!("it has {found} words, not {words}")));
        }
        let shared = SharedWords::map(map.fd().as_fd(), found as usize).map_err(|e| error(e.to_string()))?;
        Ok(Self {
            map,
            shared,
            pin: None,
        })
    }

    /// The kernel's number of the map.
    pub(super) fn id(&self) -> Result<u32, TrackerError> {
        let info = self.map.info().map_err(|e| TrackerError::Load(one_line(&e)))?;
        Ok(info.id())
    }

    /// Pins it: it lives on without this process.
    pub(super) fn pinned(mut self, path: PathBuf) -> Result<Self, PinError> {
        pins::pin_map(self.map.fd().as_fd(), &path)?;
        self.pin = Some(path);
        Ok(self)
    }

    /// The same, found pinned at `path`.
    pub(super) fn found_at(mut self, path: PathBuf) -> Self {
        self.pin = Some(path);
        self
    }

    /// Where it is pinned.
    pub(super) fn pin(&self) -> Option<&Path> {
        self.pin.as_deref()
    }

    /// Sets the bits that are set in `words`, the first of which is word `first`.
    pub(super) fn add(&self, first: usize, words: &[u64]) {
        let mine = self.shared.words().get(first..).unwrap_or_default();
        for (mine, theirs) in mine.iter().zip(words).filter(|(_, theirs)| **theirs != 0) {
            mine.fetch_or(*theirs, Ordering::AcqRel);
        }
    }

    /// Sets the bits of the blocks `first..=last`.
    pub(super) fn add_blocks(&self, first: u64, last: u64) {
        let range = BlockRange { first, last };
        let mine = self.shared.words().iter().zip(0_u64..);
        let skipped = usize::try_from(first / 64).unwrap_or(usize::MAX);
        for (mine, index) in mine.skip(skipped).take_while(|(_, index)| *index <= last / 64) {
            mine.fetch_or(word_mask(range, index), Ordering::AcqRel);
        }
    }
}

impl Marked for Bitmap {
    fn is_clear(&self) -> bool {
        self.shared
            .words()
            .iter()
            .all(|word| word.load(Ordering::Acquire) == 0)
    }

    fn words(&self) -> usize {
        self.shared.words().len()
    }

    fn read(&self, first: usize, window: &mut [u64]) -> usize {
        let mine = self.shared.words().get(first..).unwrap_or_default();
        mine.iter()
            .zip(&mut *window)
            .map(|(word, copy)| *copy = word.load(Ordering::Acquire))
            .count()
    }
}

/// The `BITMAPS` map: which bitmap each slot writes to. Every device has a handle of its own, so that devices
/// wait for the kernel side by side.
pub(super) struct BitmapTable {
    map: ArrayOfMaps<MapData, MapData>,
}

impl std::fmt::Debug for BitmapTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BitmapTable").finish_non_exhaustive()
    }
}

impl BitmapTable {
    /// The table of a loaded object.
    pub(super) fn new(map: Map) -> Result<Self, TrackerError> {
        let map = ArrayOfMaps::try_from(map).map_err(|e| TrackerError::Load(one_line(&e)))?;
        Ok(Self { map })
    }

    /// Another handle of the map behind `fd`.
    pub(super) fn open(fd: BorrowedFd<'_>) -> Result<Self, TrackerError> {
        let io = |source| TrackerError::Io {
            action: "open map BITMAPS again".to_owned(),
            source,
        };
        let load = |e: MapError| TrackerError::Load(one_line(&e));
        let data = MapData::from_fd(fd.try_clone_to_owned().map_err(io)?).map_err(load)?;
        Self::new(Map::from_map_data(data).map_err(load)?)
    }

    /// Lets the programs write to `bitmap` for `slot`; the bitmap before is final when this returns.
    pub(super) fn set(&mut self, slot: u32, bitmap: &Bitmap) -> Result<(), TrackerError> {
        self.map.set(slot, &bitmap.map, 0).map_err(|e| TrackerError::Map {
            action: "open a period of",
            slot,
            reason: one_line(&e),
        })
    }
}

/// The blocks written in a closed period.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirtyBlocks {
    words: Vec<u64>,
}

impl DirtyBlocks {
    /// The blocks whose bit is set: block `b` is bit `b % 64` of word `b / 64`.
    #[must_use]
    pub fn new(words: Vec<u64>) -> Self {
        Self { words }
    }

    /// Every one of `blocks` blocks.
    #[must_use]
    pub fn all(blocks: u64) -> Self {
        let mut dirty = Self::default();
        if blocks > 0 {
            dirty.insert(0, blocks - 1);
        }
        dirty
    }

    /// The bits.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Whether nothing was written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// How many blocks were written.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Adds the blocks `first..=last`.
    pub fn insert(&mut self, first: u64, last: u64) {
        let range = BlockRange { first, last };
        let last_word = usize::try_from(last / 64).expect("block numbers fit the address space");
        if self.words.len() <= last_word {
            self.words.resize(last_word + 1, 0);
        }
        for (index, word) in self
            .words
            .iter_mut()
            .enumerate()
            .skip((first / 64) as usize)
            .take_while(|(i, _)| *i <= last_word)
        {
            *word |= word_mask(range, index as u64);
        }
    }

    /// Adds the blocks of `other`.
    pub fn union(&mut self, other: &Self) {
        if self.words.len() < other.words.len() {
            self.words.resize(other.words.len(), 0);
        }
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
    }

    /// The blocks as extents in bytes of a device of `capacity`, ascending and merged.
    pub fn extents(&self, block_size: BlockSize, capacity: Sectors) -> impl Iterator<Item = Extent> + '_ {
        let mut next = 0_u64;
        std::iter::from_fn(move || {
            let first = self.next_block(next, true)?;
            let end = self
                .next_block(first, false)
                .unwrap_or(self.words.len() as u64 * 64);
            next = end;
            let offset = first * block_size.bytes();
            let stop = (end * block_size.bytes()).min(capacity.bytes());
            (offset < stop).then(|| Extent {
                offset,
                length: stop - offset,
            })
        })
    }

    /// The first block from `from` on that is dirty or, with `dirty` false, clean.
    fn next_block(&self, from: u64, dirty: bool) -> Option<u64> {
        let mut index = usize::try_from(from / 64).ok()?;
        let mut mask = u64::MAX << (from % 64);
        while let Some(&word) = self.words.get(index) {
            let wanted = if dirty { word } else { !word } & mask;
            if wanted != 0 {
                return Some(index as u64 * 64 + u64::from(wanted.trailing_zeros()));
            }
            mask = u64::MAX;
            index += 1;
        }
        None
    }

    /// Marks the blocks in the map.
    pub(super) fn mark(&self, map: &mut CbtMap) {
        map.mark_bits(&self.words);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn extents_are_the_dirty_blocks(
            ranges in proptest::collection::vec((0_u64..700, 0_u64..90), 0..12),
            sectors in 1_u64..6000,
        ) {
            let block_size = BlockSize::from_shift(12).unwrap();
            let capacity = Sectors::new(sectors);
            let blocks = block_size.blocks_in(capacity);
            let mut dirty = DirtyBlocks::default();
            let at = |number: u64| usize::try_from(number).unwrap();
            let mut model = vec![false; at(blocks)];
            for (first, length) in ranges {
                let last = (first + length).min(blocks - 1);
                if first >= blocks { continue; }
                dirty.insert(first, last);
                for b in first..=last { model[at(b)] = true; }
            }
            prop_assert_eq!(dirty.count(), model.iter().filter(|b| **b).count() as u64);
            prop_assert_eq!(dirty.is_empty(), !model.contains(&true));
            let mut bytes = vec![false; at(capacity.count())];
            let mut previous_end = None;
            for extent in dirty.extents(block_size, capacity) {
                prop_assert!(previous_end.is_none_or(|end| end < extent.offset), "not merged or not ascending");
                previous_end = Some(extent.end());
                for sector in extent.offset / 512..extent.end() / 512 { bytes[at(sector)] = true; }
            }
            for (sector, marked) in bytes.iter().enumerate() {
                prop_assert_eq!(*marked, model[sector / 8]);
            }
        }
    }

    #[test]
    fn all_covers_every_block() {
        for blocks in [0, 1, 63, 64, 65, 1000] {
            assert_eq!(DirtyBlocks::all(blocks).count(), blocks);
        }
    }
}

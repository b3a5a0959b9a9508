//! Tamper: changes the maps that a daemon shares with the kernel, behind its back. What it then says of itself is
//! what a test wants to know.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context as _, Result, bail};
use aya::maps::{Array, ArrayOfMaps, Map, MapData, MapInfo};
use blksnap_common::track::{DISK_TABLE, DiskSlots, SlotState};

/// `BPF_F_MMAPABLE | BPF_F_INNER_MAP`, as the daemon's own bitmaps.
const BITMAP_FLAGS: u32 = 1 << 10 | 1 << 12;

/// The maps of a daemon that tracks one device.
#[derive(Debug)]
pub struct Tamper {
    ids: BTreeMap<String, u32>,
}

impl Tamper {
    /// Finds the maps that the process has open.
    ///
    /// # Errors
    /// It has none.
    pub fn with(pid: u32) -> Result<Self> {
        let mut ids = BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
            // A descriptor may be closed meanwhile.
            let text = fs::read_to_string(entry?.path()).unwrap_or_default();
            let id = text.lines().find_map(|line| line.strip_prefix("map_id:"));
            if let Some(id) = id.and_then(|id| id.trim().parse().ok())
                && let Ok(info) = MapInfo::from_id(id)
                && let Some(name) = info.name_as_str()
            {
                ids.insert(name.to_owned(), id);
            }
        }
        if ids.is_empty() {
            bail!("process {pid} has no maps");
        }
        Ok(Self { ids })
    }

    fn map(&self, name: &str) -> Result<MapData> {
        let id = self.ids.get(name).with_context(|| format!("no map {name}"))?;
        Ok(MapData::from_id(*id)?)
    }

    fn bitmaps(&self) -> Result<ArrayOfMaps<MapData, Array<MapData, u64>>> {
        Ok(ArrayOfMaps::try_from(Map::ArrayOfMaps(self.map("BITMAPS")?))?)
    }

    /// The entry of the one tracked disk in the disk table.
    fn disk(&self) -> Result<(u32, DiskSlots)> {
        let disks: ArrayOfMaps<_, Array<MapData, DiskSlots>> =
            ArrayOfMaps::try_from(Map::ArrayOfMaps(self.map("DISKS")?))?;
        for index in 0..DISK_TABLE {
            if let Ok(inner) = disks.get(&index, 0)
                && let Ok(slots) = inner.get(&0, 0)
                && slots.count > 0
            {
                return Ok((index, slots));
            }
        }
        bail!("no disk is tracked");
    }

    fn slot(&self) -> Result<u32> {
        Ok(self.disk()?.1.slots[0].id)
    }

    /// Changes the state of the slot.
    ///
    /// # Errors
    /// The map can't be changed.
    pub fn state(&self, change: impl FnOnce(&mut SlotState)) -> Result<()> {
        let slot = self.slot()?;
        let mut states: Array<_, SlotState> = Array::try_from(Map::Array(self.map("STATE")?))?;
        let mut state = states.get(&slot, 0)?;
        change(&mut state);
        Ok(states.set(slot, state, 0)?)
    }

    /// Lets the programs know of no disk any more.
    ///
    /// # Errors
    /// The map can't be changed.
    pub fn forget_disk(&self) -> Result<()> {
        let (index, _) = self.disk()?;
        let mut inner = Array::<MapData, DiskSlots>::create(1, 0)?;
        inner.set(0, DiskSlots::EMPTY, 0)?;
        let mut disks: ArrayOfMaps<_, Array<MapData, DiskSlots>> =
            ArrayOfMaps::try_from(Map::ArrayOfMaps(self.map("DISKS")?))?;
        Ok(disks.set(index, &inner, 0)?)
    }

    /// Puts a bitmap of one word in the place of the slot's.
    ///
    /// # Errors
    /// The map can't be changed.
    pub fn shrink_bitmap(&self) -> Result<()> {
        let inner = Array::<MapData, u64>::create(1, BITMAP_FLAGS)?;
        Ok(self.bitmaps()?.set(self.slot()?, &inner, 0)?)
    }

    /// Sets all bits of word `index` of the slot's bitmap.
    ///
    /// # Errors
    /// The map can't be changed, or is shorter.
    pub fn fill_word(&self, index: u32) -> Result<()> {
        let mut bitmap = self.bitmaps()?.get(&self.slot()?, 0)?;
        Ok(bitmap.set(index, u64::MAX, 0)?)
    }
}

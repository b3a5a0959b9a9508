//! Object: the eBPF programs and maps as loaded, and the table of slots.
//!
//! Everything here happens under one lock of the tracker. Replacing an element of `DISKS` or `BITMAPS` waits
//! for running programs (`maybe_wait_bpf_programs` in `kernel/bpf/syscall.c`), so when a call returns, no
//! program uses the old value any more.
//!
//! # From agent to agent
//! While a device is tracked, maps, steady programs and what attaches them are pinned. The next agent loads its own
//! programs over the pinned maps and attaches them; the programs before go when it has the documents of all devices
//! in order ([`Object::drop_earlier`]). So there is no moment without a program, and a newer agent's programs take
//! over at once. What both see is marked twice, which changes nothing but the counters.

mod pinned;

use std::collections::{BTreeMap, HashMap as StdHashMap};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use aya::maps::{Array, ArrayOfMaps, HashMap, Map, MapData, MapError, PerCpuArray, PerCpuValues, RingBuf};
use aya::programs::BtfTracePoint;
use aya::programs::tp_btf::BtfTracePointLinkId;
use aya::{Btf, Ebpf, EbpfLoader};
use blksnap_common::track::{
    DISK_LEDGER, DISK_PROBES, DISK_REQUESTS, DISK_TABLE, DiskSlots, LedgerEntry, MAX_SLOTS, NO_DISK,
    SLOT_LEDGER, SLOTS_PER_DISK, Slot, SlotCounters, SlotState, disk_entry,
};

use super::bitmap::BitmapTable;
use super::btf::KernelBtf;
use super::guards::Guards;
use super::layout::Layout;
use super::pins::{self, Pins};
use super::probe::DiskKind;
use super::refusal::{one_line, verdict};
use super::{TrackerConfig, TrackerError};
use crate::sys::mman::SharedWords;
use pinned::{Earlier, Link};

/// The compiled programs.
pub(super) static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/blksnap"));

/// Programs attached for as long as the tracker lives.
const STEADY: [&str; 3] = ["block_bio_queue", "block_bio_remap", "block_rq_issue"];
/// Programs attached while a ledger is kept.
const COMPLETE: [&str; 2] = ["block_rq_complete", "block_bio_complete"];
/// Maps that outlive the agent.
const MAPS: [&str; 7] = [
    "DISKS", "BITMAPS", "STATE", "COUNTERS", "GUARDS", "LEDGER", "EVENTS",
];

/// What a fresh load hands to others.
pub(super) struct Loaded {
    pub(super) object: Object,
    pub(super) ring: RingBuf<MapData>,
    pub(super) state: SharedWords,
    pub(super) logger: Option<aya_log::EbpfLogger<&'static dyn log::Log>>,
}

/// Events that programs were skipped for since they were loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RunMisses {
    /// Of the programs that see writes begin: a write may be missing from the bitmap.
    pub(super) steady: u64,
    /// Of those that see them end: a write in the ledger may never leave it.
    pub(super) complete: u64,
}

impl RunMisses {
    pub(super) fn total(self) -> u64 {
        self.steady + self.complete
    }
}

/// Programs, maps and slots.
pub(super) struct Object {
    ebpf: Ebpf,
    /// Where everything is pinned while a device is tracked.
    pins: Option<Pins>,
    /// Whether it is.
    pinned: bool,
    /// Handles of [`MAPS`].
    maps: Vec<(&'static str, OwnedFd)>,
    links: Vec<(&'static str, Link)>,
    /// The kernel's number of the first steady program.
    id: u32,
    /// The kernel's number of map `BITMAPS`: tells these maps from any others of this boot.
    instance: u32,
    /// Programs of agents before, by the number of their first.
    earlier: BTreeMap<u32, Earlier>,
    disks: ArrayOfMaps<MapData, Array<MapData, DiskSlots>>,
    /// The disk in each entry of `DISKS`; `None` for one that was never used.
    entries: [Option<u32>; DISK_TABLE as usize],
    /// `BITMAPS`; devices have handles of their own.
    bitmaps: OwnedFd,
    counters: PerCpuArray<MapData, SlotCounters>,
    ledger: HashMap<MapData, u64, LedgerEntry>,
    pub(super) guards: Guards,
    /// What `DISKS` holds.
    table: StdHashMap<u32, DiskSlots>,
    used: [bool; MAX_SLOTS as usize],
    complete: Vec<(&'static str, BtfTracePointLinkId)>,
}

impl Object {
    /// Loads programs and maps and attaches the steady programs. Where maps are pinned they are gone on with,
    /// otherwise nothing is tracked yet.
    pub(super) fn load(
        config: &TrackerConfig,
        adjust: impl FnOnce(&mut Layout),
    ) -> Result<Loaded, TrackerError> {
        let mut ring_bytes = config.ring_bytes;
        if !ring_bytes.is_power_of_two() || ring_bytes < 4096 {
            return Err(TrackerError::RingSize(ring_bytes));
        }
        let load = |error: &dyn std::error::Error| TrackerError::Load(verdict(&one_line(error)));
        let kernel = KernelBtf::read(&config.btf)?;
        let mut layout = Layout::of(&kernel)?;
        drop(kernel);
        adjust(&mut layout);
        let mut loader = EbpfLoader::new();
        layout.apply(&mut loader);
        let pins = config
            .keep
            .as_ref()
            .map(|keep| Pins::open(&keep.bpffs))
            .transpose()?;
        let adopted = pins.as_ref().filter(|pins| pins.has_maps(&MAPS));
        let mut earlier = BTreeMap::new();
        if let Some(pins) = adopted {
            for name in MAPS {
                loader.map_pin_path(name, pins.map(name));
            }
            let ring = pins::open_map(&pins.map("EVENTS"))?;
            ring_bytes = ring.info().map_err(|e| load(&e))?.max_entries();
            earlier = Earlier::find(pins)?;
        } else if let Some(pins) = &pins {
            // An agent that was killed while it pinned for its first device: nothing is tracked.
            pins.clear()?;
        }
        let pinned = adopted.is_some();
        loader.map_max_entries("EVENTS", ring_bytes);
        let mut ebpf = loader.load(OBJECT).map_err(|e| load(&e))?;
        let aya_btf = Btf::from_sys_fs().map_err(|e| load(&e))?;
        for name in STEADY.into_iter().chain(COMPLETE) {
            program(&mut ebpf, name)?
                .load(name, &aya_btf)
                .map_err(|e| load(&e))?;
        }
        let logger = aya_log::EbpfLogger::init(&mut ebpf)
            .inspect_err(|error| tracing::warn!(%error, "messages of the tracking programs are not shown"))
            .ok();
        let mut maps = Vec::new();
        let mut take = |name: &'static str| {
            let map = ebpf
                .take_map(name)
                .ok_or_else(|| TrackerError::Load(format!("the object has no map {name}")))?;
            let fd = map_data(&map)
                .ok_or_else(|| TrackerError::Load(format!("map {name} is of another kind")))?
                .fd()
                .as_fd()
                .try_clone_to_owned()
                .map_err(|e| load(&e))?;
            maps.push((name, fd));
            Ok::<_, TrackerError>(map)
        };
        let state_map = take("STATE")?;
        let Map::Array(data) = &state_map else {
            return Err(TrackerError::Load("map STATE is no array".to_owned()));
        };
        let state = SharedWords::map(data.fd().as_fd(), MAX_SLOTS as usize * size_of::<SlotState>() / 8)
            .map_err(|e| load(&e))?;
        let ring = RingBuf::try_from(take("EVENTS")?).map_err(|e| load(&e))?;
        let disks = ArrayOfMaps::try_from(take("DISKS")?).map_err(|e| load(&e))?;
        let Map::ArrayOfMaps(data) = take("BITMAPS")? else {
            return Err(TrackerError::Load("map BITMAPS is no array of maps".to_owned()));
        };
        let instance = data.info().map_err(|e| load(&e))?.id();
        let bitmaps = data.fd().as_fd().try_clone_to_owned().map_err(|e| load(&e))?;
        let counters = PerCpuArray::try_from(take("COUNTERS")?).map_err(|e| load(&e))?;
        let ledger = HashMap::try_from(take("LEDGER")?).map_err(|e| load(&e))?;
        let guards = Guards::new(take("GUARDS")?, layout.commands())?;
        let id = program(&mut ebpf, STEADY[0])?.info().map_err(|e| load(&e))?.id();
        let mut object = Self {
            ebpf,
            pins,
            pinned,
            maps,
            links: Vec::new(),
            id,
            instance,
            earlier,
            disks,
            entries: [None; DISK_TABLE as usize],
            bitmaps,
            counters,
            ledger,
            guards,
            table: StdHashMap::new(),
            used: [false; MAX_SLOTS as usize],
            complete: Vec::new(),
        };
        if pinned {
            object.read_table()?;
        }
        for name in STEADY {
            let program = program(&mut object.ebpf, name)?;
            let link = program.attach().and_then(|id| program.take_link(id));
            object
                .links
                .push((name, Link::Free(link.map_err(|e| load(&e))?.into())));
        }
        if pinned {
            object.pin_programs()?;
        }
        Ok(Loaded {
            object,
            ring,
            state,
            logger,
        })
    }

    /// Reads back what `DISKS` holds.
    fn read_table(&mut self) -> Result<(), TrackerError> {
        for entry in 0..DISK_TABLE {
            let inner = match self.disks.get(&entry, 0) {
                Ok(inner) => inner,
                Err(MapError::KeyNotFound) => continue,
                Err(error) => return Err(TrackerError::Load(one_line(&error))),
            };
            let slots = inner.get(&0, 0).map_err(|e| TrackerError::Load(one_line(&e)))?;
            self.entries[entry as usize] = Some(slots.disk);
            if slots.count > 0 {
                for slot in &slots.slots[..slots.count as usize] {
                    self.used[slot.id as usize] = true;
                }
                self.table.insert(slots.disk, slots);
            }
        }
        Ok(())
    }

    /// All slots with their disks: of an agent before, right after the load.
    pub(super) fn slots(&self) -> Vec<(u32, Slot)> {
        self.table
            .iter()
            .flat_map(|(disk, slots)| {
                slots.slots[..slots.count as usize]
                    .iter()
                    .map(|slot| (*disk, *slot))
            })
            .collect()
    }

    /// Where pins are, if they are made.
    pub(super) fn pins(&self) -> Option<&Pins> {
        self.pins.as_ref()
    }

    /// The kernel's number of map `BITMAPS`.
    pub(super) fn instance(&self) -> u32 {
        self.instance
    }

    /// The kernel's number of this agent's first steady program.
    pub(super) fn id(&self) -> u32 {
        self.id
    }

    /// The bitmap that the programs write to for `slot`.
    pub(super) fn open_bitmap(&self, slot: u32) -> Result<MapData, TrackerError> {
        let data = MapData::from_fd(self.bitmaps.try_clone().map_err(|source| TrackerError::Io {
            action: "open map BITMAPS again".to_owned(),
            source,
        })?);
        data.and_then(|data| ArrayOfMaps::<_, MapData>::try_from(Map::ArrayOfMaps(data)))
            .and_then(|table| table.get(&slot, 0))
            .map_err(|e| map_error("open the bitmap of", slot, &e))
    }

    /// Reserves a slot on `disk`; nothing is tracked before [`Self::insert`].
    pub(super) fn reserve(&mut self, disk: u32, device: &str) -> Result<u32, TrackerError> {
        let full = |limit, what| TrackerError::Full {
            device: device.to_owned(),
            limit,
            what,
        };
        match self.table.get(&disk) {
            Some(slots) if slots.count as usize == SLOTS_PER_DISK => {
                return Err(full(SLOTS_PER_DISK, "ranges of its disk"));
            }
            None if self.entry_of(disk).is_none() => {
                return Err(full(self.table.len(), "disks"));
            }
            _ => {}
        }
        let free = (0..MAX_SLOTS)
            .find(|slot| !self.used[*slot as usize])
            .ok_or_else(|| full(MAX_SLOTS as usize, "devices"))?;
        self.used[free as usize] = true;
        Ok(free)
    }

    /// Gives back a slot that no disk has.
    pub(super) fn release(&mut self, slot: u32) {
        self.used[slot as usize] = false;
        if let Err(error) = self.guards.clear(slot) {
            tracing::warn!(%error, "a slot that is free still counts passthrough commands");
        }
    }

    /// Starts tracking. The slot has its bitmap already.
    pub(super) fn insert(&mut self, disk: u32, slot: Slot, kind: DiskKind) -> Result<(), TrackerError> {
        let cpus = aya::util::nr_cpus().map_err(|(_, e)| TrackerError::Load(e.to_string()))?;
        let zero = PerCpuValues::try_from(vec![SlotCounters::default(); cpus])
            .map_err(|e| map_error("clear the counters of", slot.id, &e))?;
        self.counters
            .set(slot.id, zero, 0)
            .map_err(|e| map_error("clear the counters of", slot.id, &e))?;
        let mut slots = self.table.get(&disk).copied().unwrap_or(DiskSlots::EMPTY);
        slots.zone_sectors = kind.zone_sectors;
        slots.flags = slots.flags & !DISK_REQUESTS | if kind.requests { DISK_REQUESTS } else { 0 };
        slots.slots[slots.count as usize] = slot;
        slots.count += 1;
        self.set_disk(disk, slot.id, slots)
    }

    /// Ends tracking of the slot; the caller closes its period after that, then releases it.
    pub(super) fn remove(&mut self, disk: u32, slot: u32) -> Result<(), TrackerError> {
        let Some(mut slots) = self.table.get(&disk).copied() else {
            return Ok(());
        };
        let count = slots.count as usize;
        let Some(at) = slots.slots[..count].iter().position(|s| s.id == slot) else {
            return Ok(());
        };
        slots.slots.copy_within(at + 1..count, at);
        slots.slots[count - 1] = Slot::default();
        slots.count -= 1;
        self.set_disk(disk, slot, slots)
    }

    /// A handle of the table of bitmaps.
    pub(super) fn bitmap_table(&self) -> Result<BitmapTable, TrackerError> {
        BitmapTable::open(self.bitmaps.as_fd())
    }

    /// Switches the ledger of a slot. The programs that see completions are attached before the first write is
    /// entered.
    pub(super) fn set_ledger(&mut self, disk: u32, slot: u32, on: bool) -> Result<(), TrackerError> {
        if on && self.complete.is_empty() {
            for name in COMPLETE {
                let id = program(&mut self.ebpf, name)?
                    .attach()
                    .map_err(|e| TrackerError::Load(one_line(&e)))?;
                self.complete.push((name, id));
            }
        }
        if let Some(mut slots) = self.table.get(&disk).copied() {
            for entry in &mut slots.slots[..slots.count as usize] {
                if entry.id == slot {
                    entry.flags = if on {
                        entry.flags | SLOT_LEDGER
                    } else {
                        entry.flags & !SLOT_LEDGER
                    };
                }
            }
            self.set_disk(disk, slot, slots)?;
        }
        Ok(())
    }

    /// Detaches the programs that see completions, and empties the ledger, once no slot keeps it. The caller
    /// has marked what was still in flight.
    pub(super) fn drop_ledger_if_unused(&mut self) -> Result<(), TrackerError> {
        let kept = self.table.values().any(|disk| disk.flags & DISK_LEDGER != 0);
        if kept {
            return Ok(());
        }
        for (name, id) in self.complete.drain(..) {
            program(&mut self.ebpf, name)?
                .detach(id)
                .map_err(|e| TrackerError::Load(one_line(&e)))?;
        }
        let keys: Vec<u64> = self.ledger.keys().filter_map(Result::ok).collect();
        for key in keys {
            // A key that is gone was removed by the write's completion.
            let _ = self.ledger.remove(&key);
        }
        Ok(())
    }

    /// The writes in flight that the ledger knows on `disk`, as sector ranges.
    pub(super) fn in_flight(&self, disk: u32) -> Result<Vec<(u64, u64)>, TrackerError> {
        let mut found = Vec::new();
        for key in self.ledger.keys() {
            let key = key.map_err(|e| TrackerError::Load(one_line(&e)))?;
            let Ok(entry) = self.ledger.get(&key, 0) else {
                continue;
            };
            for range in entry
                .ranges
                .iter()
                .filter(|range| range.disk == disk && range.sectors > 0)
            {
                found.push((range.sector, u64::from(range.sectors)));
            }
        }
        Ok(found)
    }

    /// The slot's counters, summed over the processors.
    pub(super) fn counters(&self, slot: u32) -> Result<SlotCounters, TrackerError> {
        let mut sum = SlotCounters::default();
        let per_cpu = self
            .counters
            .get(&slot, 0)
            .map_err(|e| map_error("read the counters of", slot, &e))?;
        for cpu in per_cpu.iter() {
            for (total, part) in sum.kinds.iter_mut().zip(cpu.kinds) {
                total.ops += part.ops;
                total.bytes += part.bytes;
            }
            sum.reads += cpu.reads;
            sum.records += cpu.records;
        }
        Ok(sum)
    }

    /// Reads seen on `disk`.
    pub(super) fn reads(&self, disk: u32) -> Result<u64, TrackerError> {
        self.slots_of(disk)
            .iter()
            .map(|slot| Ok(self.counters(slot.id)?.reads))
            .sum()
    }

    /// Reads of `disk` and operations on its slots that were seen.
    pub(super) fn events(&self, disk: u32) -> Result<u64, TrackerError> {
        let mut events = 0;
        for slot in self.slots_of(disk) {
            let counters = self.counters(slot.id)?;
            events += counters.reads + counters.kinds.iter().map(|kind| kind.ops).sum::<u64>();
        }
        Ok(events)
    }

    fn slots_of(&self, disk: u32) -> &[Slot] {
        self.table
            .get(&disk)
            .map_or(&[], |slots| &slots.slots[..slots.count as usize])
    }

    /// Events that the programs were skipped for: `recursion_misses` of their fdinfo (`bpf_prog_show_fdinfo` in
    /// `kernel/bpf/syscall.c`).
    pub(super) fn run_misses(&mut self) -> Result<RunMisses, TrackerError> {
        let mut misses = RunMisses::default();
        for name in STEADY {
            misses.steady += self.misses_of(name)?;
        }
        for name in COMPLETE {
            misses.complete += self.misses_of(name)?;
        }
        Ok(misses)
    }

    fn misses_of(&mut self, name: &str) -> Result<u64, TrackerError> {
        let fd = program(&mut self.ebpf, name)?
            .fd()
            .map_err(|e| TrackerError::Load(one_line(&e)))?;
        recursion_misses(fd.as_fd())
    }

    /// The entry of the disk table that `disk` has or may take; `None` if its places are taken.
    fn entry_of(&self, disk: u32) -> Option<u32> {
        let places = || (0..DISK_PROBES).map(|probe| (disk_entry(disk) + probe) % DISK_TABLE);
        let holds = |entry: u32, wanted: Option<u32>| self.entries[entry as usize] == wanted;
        places()
            .find(|entry| holds(*entry, Some(disk)))
            .or_else(|| places().find(|entry| holds(*entry, Some(NO_DISK)) || holds(*entry, None)))
    }

    fn set_disk(&mut self, disk: u32, slot: u32, mut slots: DiskSlots) -> Result<(), TrackerError> {
        let action = "update the disk of";
        let full = || TrackerError::Map {
            action,
            slot,
            reason: "the disk table is full".to_owned(),
        };
        let entry = self.entry_of(disk).ok_or_else(full)?;
        // An entry that was used once stays, so that a look-up goes on to the ones after it.
        slots.disk = if slots.count == 0 { NO_DISK } else { disk };
        slots.entry = entry;
        let kept = slots.slots[..slots.count as usize]
            .iter()
            .any(|entry| entry.flags & SLOT_LEDGER != 0);
        slots.flags = if kept {
            slots.flags | DISK_LEDGER
        } else {
            slots.flags & !DISK_LEDGER
        };
        let mut inner = Array::<MapData, DiskSlots>::create(1, 0).map_err(|e| map_error(action, slot, &e))?;
        inner.set(0, slots, 0).map_err(|e| map_error(action, slot, &e))?;
        self.disks
            .set(entry, &inner, 0)
            .map_err(|e| map_error(action, slot, &e))?;
        self.entries[entry as usize] = Some(slots.disk);
        if slots.count == 0 {
            self.table.remove(&disk);
        } else {
            self.table.insert(disk, slots);
        }
        Ok(())
    }
}

pub(super) fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut BtfTracePoint, TrackerError> {
    let program = ebpf
        .program_mut(name)
        .ok_or_else(|| TrackerError::Load(format!("the object has no program {name}")))?;
    program.try_into().map_err(|e| TrackerError::Load(one_line(&e)))
}

fn map_error(action: &'static str, slot: u32, error: &dyn std::error::Error) -> TrackerError {
    TrackerError::Map {
        action,
        slot,
        reason: one_line(error),
    }
}

fn map_data(map: &Map) -> Option<&MapData> {
    match map {
        Map::Array(data)
        | Map::ArrayOfMaps(data)
        | Map::PerCpuArray(data)
        | Map::HashMap(data)
        | Map::RingBuf(data) => Some(data),
        _ => None,
    }
}

fn recursion_misses(program: BorrowedFd<'_>) -> Result<u64, TrackerError> {
    let path = format!("/proc/self/fdinfo/{}", program.as_raw_fd());
    let text = std::fs::read_to_string(&path).map_err(|source| TrackerError::Io {
        action: format!("read {path}"),
        source,
    })?;
    text.lines()
        .find_map(|line| line.strip_prefix("recursion_misses:"))
        .and_then(|value| value.trim().parse().ok())
        .ok_or_else(|| TrackerError::Load(format!("{path} does not show recursion_misses")))
}

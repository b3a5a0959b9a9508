//! Maps: all state of the programs. Their layout is `blksnap_common::track`.

use aya_ebpf::bindings::{BPF_F_INNER_MAP, BPF_F_MMAPABLE};
use aya_ebpf::btf_maps::{Array, ArrayOfMaps, HashMap, PerCpuArray, RingBuf};
use aya_ebpf::macros::btf_map;
use blksnap_common::track::{
    DISK_PROBES, DISK_TABLE, DiskSlots, GUARDS as GUARD_ENTRIES, Guard, LEDGER_ENTRIES, LedgerEntry,
    MAX_SLOTS, RING_BYTES, Record, SlotCounters, SlotState, disk_entry,
};

/// A bitmap: as many words as the device needs, mapped by the agent.
pub(crate) type Bitmap = Array<u64, 1, { (BPF_F_INNER_MAP | BPF_F_MMAPABLE) as usize }>;

/// [`DiskSlots`] as plain words. Up to Linux 6.2 an inner map made without type information is refused where the
/// template's value is a struct: `bpf_map_meta_equal` compares where a timer in the value is, and that is another error
/// for a struct without one than for a value of which nothing is known (kernel/bpf/map_in_map.c, `timer_off`).
type DiskWords = [u64; size_of::<DiskSlots>() / 8];

const _: () = assert!(size_of::<DiskWords>() == size_of::<DiskSlots>());
const _: () = assert!(align_of::<DiskWords>() >= align_of::<DiskSlots>());

/// The disk table. A map in a map, since replacing an element of one waits for running programs: none sees half
/// a change.
#[btf_map]
static DISKS: ArrayOfMaps<Array<DiskWords, 1>, { DISK_TABLE as usize }> = ArrayOfMaps::new();

/// The slots of `disk`, if it has any. The entry is looked up once more when it is found, so that the verifier
/// has one path from here on and not one for each probe.
#[inline(always)]
pub(crate) fn slots_of(disk: u32) -> Option<&'static DiskSlots> {
    let first = disk_entry(disk);
    let mut found = first;
    for probe in 0..DISK_PROBES {
        found = first + probe;
        if entry(found)?.disk == disk {
            break;
        }
    }
    let slots = entry(found)?;
    if slots.disk == disk { Some(slots) } else { None }
}

/// Entry `number` of the disk table, if it was ever used.
#[inline(always)]
pub(crate) fn entry(number: u32) -> Option<&'static DiskSlots> {
    let words = DISKS.get_value(number & (DISK_TABLE - 1), &0)?;
    // SAFETY: the value is a `DiskSlots`, which has the size of the words and no stricter alignment (asserted above),
    // no padding, and no bytes that it may not have.
    Some(unsafe { &*core::ptr::from_ref(words).cast::<DiskSlots>() })
}

/// The bitmap of each slot's open period.
#[btf_map]
pub(crate) static BITMAPS: ArrayOfMaps<Bitmap, { MAX_SLOTS as usize }> = ArrayOfMaps::new();

/// Rare events of each slot.
#[btf_map]
pub(crate) static STATE: Array<SlotState, { MAX_SLOTS as usize }, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Counters of each slot.
#[btf_map]
pub(crate) static COUNTERS: PerCpuArray<SlotCounters, { MAX_SLOTS as usize }> = PerCpuArray::new();

/// Who wants to know of passthrough commands to which disk.
#[btf_map]
pub(crate) static GUARDS: Array<Guard, { GUARD_ENTRIES as usize }> = Array::new();

/// Writes in flight, by the address of their bio.
#[btf_map]
pub(crate) static LEDGER: HashMap<u64, LedgerEntry, { LEDGER_ENTRIES as usize }> = HashMap::new();

/// Records of newly dirty blocks.
#[btf_map]
pub(crate) static EVENTS: RingBuf<Record, { RING_BYTES as usize }> = RingBuf::new();

//! Mark: from a bio to bits in the bitmaps of the slots that it touches.

use core::ffi::c_void;
use core::mem::offset_of;
use core::ptr::addr_of_mut;

use aya_ebpf::bindings::BPF_RB_NO_WAKEUP;
use aya_ebpf::helpers::bpf_loop;
use aya_ebpf::programs::BtfTracePointContext;
use aya_log_ebpf::error;
use blksnap_common::blockrange::{BlockRange, NO_KIND, blocks_of, changed_sectors, word_mask};
use blksnap_common::track::{
    DISK_LEDGER, DiskSlots, KIND_ENTRIES, KindCounters, Record, SLOTS_PER_DISK, Slot, SlotState,
};

use blksnap_ebpf::{atomic, kind_of};

use crate::layout::Bio;
use crate::ledger;
use crate::maps::{BITMAPS, COUNTERS, EVENTS, STATE, entry, slots_of};

/// Bitmap words handled without a call: a bio of 1 MiB touches at most two at the default block size.
const INLINE_WORDS: u64 = 3;

/// Upper bound of words of one bio: less than 4 GiB in blocks of 4 KiB, 64 to a word, and one for the start.
const MAX_WORDS: u32 = (1 << 14) + 1;

/// A bio was submitted, or redirected to a lower disk (`remapped`).
#[inline(always)]
pub(crate) fn submitted(ctx: &BtfTracePointContext, bio: &Bio, remapped: bool) {
    let disk = bio.disk();
    let Some(slots) = slots_of(disk) else {
        return;
    };
    let kind = kind_of(bio.opf());
    if kind == NO_KIND {
        read(slots);
        return;
    }
    let sectors = u64::from(bio.size() >> 9);
    let changed = changed_sectors(kind, slots.zone_sectors, bio.sector(), sectors);
    let Some((sector, sectors)) = changed else {
        whole_device(slots);
        return;
    };
    if sectors == 0 {
        ledger::enter_empty(slots, bio, disk);
        return;
    }
    let missing = mark(slots, sector, sectors, kind.into());
    if missing != 0 {
        error!(ctx, "disk {}: {} slots lack a bitmap word", disk, missing);
    }
    // All writes of the disk, also those outside the slots that keep the ledger: a completion without an entry
    // counts as unknown, and does not always know its range.
    if slots.flags & DISK_LEDGER != 0 {
        ledger::enter(bio, disk, sector, sectors, remapped);
    }
}

/// Kind of a write that is marked for the second time: neither counted nor recorded.
pub(crate) const AGAIN: u32 = u32::MAX;

/// Marks a range that is within one word of the slot's bitmap, or outside the slot: so it is for most writes, and
/// this needs no call. `false` if the range is another one, or the word is missing.
#[inline(always)]
fn mark_word(slot: &Slot, sector: u64, sectors: u64, kind: u32) -> bool {
    let Some(range) = blocks_of(slot, sector, sectors) else {
        return true;
    };
    let word = range.first >> 6;
    if word != range.last >> 6 {
        return false;
    }
    let Some(bits) = BITMAPS.get_value_ptr_mut(slot.id, &(word as u32)) else {
        return false;
    };
    let mask = (u64::MAX << (range.first & 63)) & (u64::MAX >> (63 - (range.last & 63)));
    // SAFETY: `bits` points to a word of the map; other CPUs change it with atomic operations only.
    let newly_dirty = unsafe {
        let newly_dirty = core::ptr::read_volatile(bits) & mask != mask;
        if newly_dirty {
            atomic::or(bits, mask);
        }
        newly_dirty
    };
    if kind != AGAIN {
        let recorded = newly_dirty && record(slot, range, kind);
        count(slot, sectors, kind, recorded);
    }
    true
}

/// Counts a write of a slot.
#[inline(always)]
fn count(slot: &Slot, sectors: u64, kind: u32, recorded: bool) {
    if let Some(counters) = COUNTERS.get_ptr_mut(slot.id) {
        // SAFETY: this CPU's copy of the map value; the index is masked below the length.
        unsafe {
            let kind = addr_of_mut!((*counters).kinds)
                .cast::<KindCounters>()
                .add(kind as usize & (KIND_ENTRIES - 1));
            (*kind).ops += 1;
            (*kind).bytes += sectors << 9;
            if recorded {
                (*counters).records += 1;
            }
        }
    }
}

/// Marks the range in every slot of the disk that it touches; gives the number of slots that lack a bitmap word.
#[inline(always)]
pub(crate) fn mark(slots: &DiskSlots, sector: u64, sectors: u64, kind: u32) -> u32 {
    if slots.count == 1 && mark_word(&slots.slots[0], sector, sectors, kind) {
        return 0;
    }
    let mut missing = mark_slot(slots.entry, 0, sector, sectors, kind);
    for index in 1..SLOTS_PER_DISK as u32 {
        if index >= slots.count {
            break;
        }
        missing += mark_slot(slots.entry, index, sector, sectors, kind);
    }
    missing
}

/// Marks the range in slot `index` of a disk; 1 if the slot lacks a bitmap word, else 0. A global function for
/// the verifier: it is checked once, by itself, and not on every path to each of its calls.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn mark_slot(disk_entry: u32, index: u32, sector: u64, sectors: u64, kind: u32) -> u32 {
    let Some(slots) = entry(disk_entry) else {
        return 0;
    };
    let slot = &slots.slots[index as usize & (SLOTS_PER_DISK - 1)];
    let Some(range) = blocks_of(slot, sector, sectors) else {
        return 0;
    };
    let Ok(newly_dirty) = set_bits(slot, range) else {
        bump(slot.id, offset_of!(SlotState, errors));
        return 1;
    };
    if kind == AGAIN {
        return 0;
    }
    let recorded = newly_dirty && record(slot, range, kind);
    count(slot, sectors, kind, recorded);
    0
}

/// A map element that is always there was not.
struct Missing;

/// Sets the bits of `range`; says whether one of them was clear.
#[inline(always)]
fn set_bits(slot: &Slot, range: BlockRange) -> Result<bool, Missing> {
    let first_word = range.first >> 6;
    let last_word = range.last >> 6;
    let mut newly_dirty = false;
    for i in 0..INLINE_WORDS {
        let word = first_word + i;
        if word > last_word {
            return Ok(newly_dirty);
        }
        newly_dirty |= set_word(slot.id, range, word)?;
    }
    let mut rest = Rest {
        range,
        next_word: first_word + INLINE_WORDS,
        slot: slot.id,
        outcome: 0,
    };
    // SAFETY: the callback has the signature that the helper expects, the context outlives the call.
    unsafe {
        bpf_loop(MAX_WORDS, set_rest as *mut c_void, addr_of_mut!(rest).cast(), 0);
    }
    // SAFETY: a plain read of this frame's own variable, which the callback may have changed.
    let outcome = unsafe { core::ptr::read_volatile(&rest.outcome) };
    if outcome & MISSING != 0 {
        Err(Missing)
    } else {
        Ok(newly_dirty || outcome & NEWLY_DIRTY != 0)
    }
}

/// What is left for [`set_rest`].
#[repr(C)]
struct Rest {
    range: BlockRange,
    next_word: u64,
    slot: u32,
    outcome: u32,
}

/// In [`Rest::outcome`]: a bit was clear.
const NEWLY_DIRTY: u32 = 1;
/// In [`Rest::outcome`]: a word was missing.
const MISSING: u32 = 2;

/// Callback of `bpf_loop`: the next word; 1 ends the loop. The verifier wants it static: no exported symbol.
extern "C" fn set_rest(_index: u64, rest: *mut Rest) -> i64 {
    // SAFETY: `rest` is the context that `set_bits` passed.
    let rest = unsafe { &mut *rest };
    let word = rest.next_word;
    if word > rest.range.last >> 6 {
        return 1;
    }
    rest.next_word = word + 1;
    match set_word(rest.slot, rest.range, word) {
        Ok(true) => rest.outcome |= NEWLY_DIRTY,
        Ok(false) => {}
        Err(Missing) => {
            rest.outcome |= MISSING;
            return 1;
        }
    }
    0
}

/// Sets the bits of `range` in one word; says whether one of them was clear.
#[inline(always)]
fn set_word(slot: u32, range: BlockRange, word: u64) -> Result<bool, Missing> {
    let bits = BITMAPS.get_value_ptr_mut(slot, &(word as u32)).ok_or(Missing)?;
    let mask = word_mask(range, word);
    // SAFETY: `bits` points to a word of the map; other CPUs change it with atomic operations only.
    unsafe {
        if core::ptr::read_volatile(bits) & mask == mask {
            return Ok(false);
        }
        atomic::or(bits, mask);
    }
    Ok(true)
}

/// Puts a record on the ring, without waking the reader; `false` if there was no room.
#[inline(always)]
fn record(slot: &Slot, range: BlockRange, kind: u32) -> bool {
    let period = match STATE.get_ptr_mut(slot.id) {
        // SAFETY: a plain read of a word that only the agent writes.
        Some(state) => unsafe { core::ptr::read_volatile(&raw const (*state).period) },
        None => 0,
    };
    let record = Record {
        period,
        first_block: range.first,
        last_block: range.last,
        slot: slot.id,
        kind,
    };
    match EVENTS.reserve(0) {
        Some(mut entry) => {
            entry.write(record);
            entry.submit(u64::from(BPF_RB_NO_WAKEUP));
            true
        }
        None => {
            bump(slot.id, offset_of!(SlotState, ring_full));
            false
        }
    }
}

/// Counts a read in the first slot of the disk: proof that the hook is alive.
#[inline(always)]
fn read(slots: &DiskSlots) {
    if let Some(counters) = COUNTERS.get_ptr_mut(slots.slots[0].id) {
        // SAFETY: this CPU's copy of the map value.
        unsafe { (*counters).reads += 1 };
    }
}

/// Notes in every slot of the disk that all of it changed.
#[inline(always)]
fn whole_device(slots: &DiskSlots) {
    for i in 0..SLOTS_PER_DISK {
        if i as u32 >= slots.count {
            break;
        }
        bump(slots.slots[i].id, offset_of!(SlotState, whole_device));
    }
}

/// Adds one to the 64-bit field of a slot's state that starts at `offset`.
#[inline(always)]
pub(crate) fn bump(slot: u32, offset: usize) {
    if let Some(state) = STATE.get_ptr_mut(slot) {
        // SAFETY: `offset` is one of `offset_of!`, inside the map value just looked up; the verifier checks it.
        unsafe { atomic::add(state.byte_add(offset).cast(), 1) };
    }
}

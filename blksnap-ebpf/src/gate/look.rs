//! Look: whether a write may go on.

use blksnap_common::blockrange::{BlockRange, NO_KIND, blocks_of, changed_sectors};
use blksnap_common::gate::{Passed, broken};
use blksnap_common::track::{DiskSlots, SLOTS_PER_DISK};
use blksnap_ebpf::kind_of;

use crate::bio::Bio;
use crate::hold::{break_gate, hold, is_audited, is_kept};
use crate::maps::{DISKS, EPOCH, HITS, LAST, PASSED};
use crate::park::park;

/// Number of a copy that does not wait: the auditors.
const AUDITOR: u32 = u32::MAX;

/// A write at a gate: disk, number of the gate there, sector, sectors, copy.
type Look = extern "C" fn(u32, u32, u64, u64, u32) -> u32;

/// A bio enters `submit_bio_noacct`; `copy` looks at it, and waits in a loop.
#[inline(always)]
pub(crate) fn submitted(bio: &Bio, copy: u32) {
    look(bio, copy, gate_write);
}

/// A bio enters `should_fail_bio`; `copy` looks at it, and sleeps.
#[inline(always)]
pub(crate) fn submitted_to_sleep(bio: &Bio, copy: u32) {
    if copy == 0
        && let Some(hits) = HITS.get_ptr_mut(0)
    {
        // SAFETY: a word of the map; whoever is late stores the same.
        unsafe {
            if core::ptr::read_volatile(hits) == 0 {
                core::ptr::write_volatile(hits, 1);
            }
        }
    }
    look(bio, copy, gate_write_to_sleep);
}

#[inline(always)]
fn look(bio: &Bio, copy: u32, write: Look) {
    let kind = kind_of(bio.opf());
    if kind == NO_KIND {
        return;
    }
    // Before anything is looked at: a gate that is armed from here on makes the note below a stale one.
    let Some(epoch) = EPOCH.get_ptr(0) else { return };
    // SAFETY: a word of the map, which only the agent writes.
    let epoch = unsafe { core::ptr::read_volatile(epoch) };
    let device = bio.device();
    let now = Passed {
        device: device.key(),
        sector: bio.sector(),
        shape: u64::from(bio.size()) | u64::from(bio.flags()) << 32 | u64::from(kind) << 48,
        epoch,
    };
    let Some(last) = LAST.get_ptr_mut(0) else { return };
    // SAFETY: this CPU's copy of the map value. Another task may come between the loads: then the whole is no pass of
    // one write, but each pass that it could be taken for has the same device, sector, shape and epoch.
    if copy > 0 && unsafe { is_same(last, &now) } {
        return;
    }
    let start = if bio.is_remapped() { 0 } else { device.start() };
    decide(device.disk(), now.sector + start, bio.size(), kind, copy, write);
    // SAFETY: as above.
    unsafe { note(last, &now) };
}

/// Whether all words are the same.
///
/// # Safety
/// `last` points to a map value of this CPU.
#[inline(always)]
unsafe fn is_same(last: *const Passed, now: &Passed) -> bool {
    // SAFETY: the caller's contract.
    unsafe {
        let epoch = core::ptr::read_volatile(&raw const (*last).epoch);
        let device = core::ptr::read_volatile(&raw const (*last).device);
        let sector = core::ptr::read_volatile(&raw const (*last).sector);
        let shape = core::ptr::read_volatile(&raw const (*last).shape);
        epoch == now.epoch && device == now.device && sector == now.sector && shape == now.shape
    }
}

/// Notes a write that passed. The epoch is taken away first and set last, so that a task that comes between finds
/// no mixture of two writes that looks true.
///
/// # Safety
/// As [`is_same`].
#[inline(always)]
unsafe fn note(last: *mut Passed, now: &Passed) {
    // SAFETY: the caller's contract.
    unsafe {
        core::ptr::write_volatile(&raw mut (*last).epoch, 0);
        core::ptr::write_volatile(&raw mut (*last).device, now.device);
        core::ptr::write_volatile(&raw mut (*last).sector, now.sector);
        core::ptr::write_volatile(&raw mut (*last).shape, now.shape);
        core::ptr::write_volatile(&raw mut (*last).epoch, now.epoch);
    }
}

/// A bio is on its way to the driver. Its sector counts from the disk's beginning at these hooks.
#[inline(always)]
pub(crate) fn audited(bio: &Bio) {
    let kind = kind_of(bio.opf());
    if kind != NO_KIND {
        decide(
            bio.device().disk(),
            bio.sector(),
            bio.size(),
            kind,
            AUDITOR,
            gate_write,
        );
    }
}

/// Finds the gates that a write goes through. The disk is looked up once more for each, so that the verifier checks
/// the rest once, and not on every path.
#[inline(always)]
fn decide(disk: u32, sector: u64, bytes: u32, kind: u8, copy: u32, write: Look) {
    // SAFETY: the value is replaced as a whole, and lives as long as the program runs.
    let Some(slots) = (unsafe { DISKS.get(disk) }) else {
        return;
    };
    let changed = changed_sectors(kind, slots.zone_sectors, sector, u64::from(bytes >> 9));
    let (sector, sectors) = changed.unwrap_or((0, u64::MAX));
    if sectors == 0 {
        return;
    }
    let count = slots.count;
    for index in 0..SLOTS_PER_DISK as u32 {
        if index >= count {
            break;
        }
        write(disk, index, sector, sectors, copy);
    }
}

/// A write at gate `index` of a disk. Global for the verifier: checked once, by itself. The result is always 0.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn gate_write(disk: u32, index: u32, sector: u64, sectors: u64, copy: u32) -> u32 {
    let Some((gate, range)) = missing(disk, index, sector, sectors, copy) else {
        return 0;
    };
    if copy != AUDITOR {
        hold(gate, range, copy);
    } else if is_audited(gate) {
        break_gate(gate, broken::BYPASSED);
    }
    0
}

/// The same for programs that may sleep.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn gate_write_to_sleep(disk: u32, index: u32, sector: u64, sectors: u64, copy: u32) -> u32 {
    if let Some((gate, range)) = missing(disk, index, sector, sectors, copy) {
        park(gate, range, copy);
    }
    0
}

/// The gate and its units that a write changes, if they are not all kept.
#[inline(always)]
fn missing(disk: u32, index: u32, sector: u64, sectors: u64, copy: u32) -> Option<(u32, BlockRange)> {
    // SAFETY: as in `decide`.
    let slots = unsafe { DISKS.get(disk) }?;
    let slots: &DiskSlots = slots;
    let slot = &slots.slots[index as usize & (SLOTS_PER_DISK - 1)];
    let range = blocks_of(slot, sector, sectors)?;
    if sectors == u64::MAX {
        break_gate(slot.id, broken::WHOLE_DISK);
        return None;
    }
    if !is_kept(slot.id, range) {
        return Some((slot.id, range));
    }
    if copy != AUDITOR
        && let Some(passed) = PASSED.get_ptr_mut(slot.id)
    {
        // SAFETY: this CPU's copy of the map value.
        unsafe { *passed += 1 };
    }
    None
}

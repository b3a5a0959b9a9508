//! Ledger: writes in flight, so that each can be marked again when its data has landed.
//!
//! A write is seen when it is submitted. Who copies blocks while writers go on may read a block after its mark
//! and before its data. While [`SLOT_LEDGER`] is set, a write is entered here by the address of its bio, and
//! marked in the then open period when it completes.
//!
//! # Where a write ends
//! - A driver that works on requests ends bios at `block_rq_complete`, in pieces: the block layer may have split
//!   a bio, and a request may end in parts. A part that was split off names its parent in `bi_private`
//!   (`bio_chain`), so that its sectors count for the parent's entry, which goes when none remain.
//! - A driver that works on bios, and a bio that fails before it becomes a request, end at `block_bio_complete`.
//!
//! The kernel traces each bio at one of the two (`BIO_TRACE_COMPLETION` is cleared at the first).
//!
//! A completion without an entry belongs to a write that was submitted before the flag was set: it is counted,
//! and who copies starts again; of a request, whose range is known here, it is marked as well. A flush without data ends like a write at `block_bio_complete`, so it is
//! entered, with no sectors, where that can happen.

use core::ffi::c_void;
use core::mem::offset_of;
use core::ptr::addr_of_mut;

use aya_ebpf::helpers::bpf_loop;
use aya_ebpf::programs::BtfTracePointContext;
use blksnap_common::blockrange::NO_KIND;
use blksnap_common::track::{
    DISK_LEDGER, DISK_REQUESTS, DiskSlots, LedgerEntry, LedgerRange, SLOT_LEDGER, SLOTS_PER_DISK, SlotState,
};
use blksnap_ebpf::{atomic, kind_of};

use crate::layout::{Bio, ListedBio, completed_bytes};
use crate::maps::{LEDGER, slots_of};
use crate::mark::{AGAIN, bump, mark};

/// Upper bound of bios in a request.
const MAX_BIOS: u32 = 1 << 16;

/// Enters a flush without data, if a slot of the disk keeps the ledger.
#[inline(always)]
pub(crate) fn enter_empty(slots: &DiskSlots, bio: &Bio, disk: u32) {
    if slots.flags & DISK_REQUESTS == 0 && slots.flags & DISK_LEDGER != 0 {
        enter(bio, disk, 0, 0, false);
    }
}

/// Enters a write that was just marked.
#[inline(always)]
pub(crate) fn enter(bio: &Bio, disk: u32, sector: u64, sectors: u64, remapped: bool) {
    let range = LedgerRange {
        sector,
        sectors: sectors as u32,
        disk,
    };
    let key = bio.key();
    let mut entry = LedgerEntry {
        ranges: [
            range,
            LedgerRange {
                sector: 0,
                sectors: 0,
                disk: 0,
            },
        ],
        remaining: sectors,
    };
    if remapped {
        // SAFETY: the entry of a bio in flight is touched only by who handles that bio.
        if let Some(upper) = unsafe { LEDGER.get(key) } {
            if upper.ranges[1].sectors != 0 {
                count_lost(disk);
            }
            entry.ranges[1] = upper.ranges[0];
        }
    }
    if LEDGER.insert(key, entry, 0).is_err() {
        count_lost(disk);
    }
}

/// `block_bio_complete`.
#[inline(always)]
pub(crate) fn bio_completed(bio: &Bio) {
    let disk = bio.disk();
    let Some(slots) = slots_of(disk) else {
        // An upper disk may be tracked where the lower one is not.
        finish(bio.key());
        return;
    };
    if slots.flags & DISK_REQUESTS != 0 {
        // It never became a request: what is left of it was not written.
        let sectors = u64::from(bio.size() >> 9);
        if sectors != 0 && kind_of(bio.opf()) != NO_KIND {
            piece(slots, ListedBio::at(bio.key()), disk, bio.sector(), sectors);
        }
    } else if !finish(bio.key()) && kind_of(bio.opf()) != NO_KIND {
        count_unknown(disk);
    }
}

/// `block_rq_complete`.
#[inline(always)]
pub(crate) fn request_completed(ctx: &BtfTracePointContext) {
    let first = ListedBio::first_of_request(ctx);
    let left = completed_bytes(ctx);
    if left == 0 || first.key() == 0 || kind_of(first.opf()) == NO_KIND {
        return;
    }
    let mut walk = Walk {
        bio: first.key(),
        left,
        disk: first.disk(),
    };
    // SAFETY: the callback has the signature that the helper expects, the context outlives the call.
    unsafe {
        bpf_loop(MAX_BIOS, next_bio as *mut c_void, addr_of_mut!(walk).cast(), 0);
    }
}

/// Where [`next_bio`] is in a request.
#[repr(C)]
struct Walk {
    bio: u64,
    left: u32,
    disk: u32,
}

/// Callback of `bpf_loop`: the next bio of a request; 1 ends the loop.
extern "C" fn next_bio(_index: u64, walk: *mut Walk) -> i64 {
    // SAFETY: `walk` is the context that `request_completed` passed.
    let walk = unsafe { &mut *walk };
    let bio = ListedBio::at(walk.bio);
    let size = bio.size();
    let done = if size < walk.left { size } else { walk.left };
    let sectors = u64::from(done >> 9);
    if let Some(slots) = slots_of(walk.disk) {
        piece(slots, bio, walk.disk, bio.sector(), sectors);
    } else {
        // An upper disk may be tracked that sent the bio here.
        settle(bio, sectors);
    }
    walk.left -= done;
    walk.bio = bio.next().key();
    i64::from(walk.left == 0 || walk.bio == 0)
}

/// `sectors` of a bio, or of a part split off it, completed on `disk`.
#[inline(always)]
fn piece(slots: &DiskSlots, bio: ListedBio, disk: u32, sector: u64, sectors: u64) {
    if slots.flags & DISK_LEDGER == 0 {
        return;
    }
    // Also of a write older than the ledger: its data is there now, and may have come after an instant.
    mark_again(disk, sector, sectors);
    if !settle(bio, sectors) {
        count_unknown(disk);
    }
}

/// Takes `sectors` of a bio, or of a part split off it, from its entry, which goes when none remain; `false` if
/// there is none.
#[inline(always)]
fn settle(bio: ListedBio, sectors: u64) -> bool {
    let mut key = bio.key();
    let mut found = LEDGER.get_ptr_mut(key);
    if found.is_none() {
        key = bio.private();
        found = LEDGER.get_ptr_mut(key);
    }
    let Some(entry) = found else {
        return false;
    };
    // SAFETY: the entry of a bio in flight; parts of it may complete on several CPUs at once.
    let before = unsafe { atomic::subtract(addr_of_mut!((*entry).remaining), sectors) };
    if before <= sectors {
        finish(key);
    }
    true
}

/// Marks the whole ranges of an entry again and drops it; `false` if there is none.
#[inline(always)]
fn finish(key: u64) -> bool {
    // SAFETY: the entry of a bio in flight, copied before it is removed.
    let Some(entry) = unsafe { LEDGER.get(key) }.copied() else {
        return false;
    };
    for range in &entry.ranges {
        if range.sectors != 0 {
            mark_again(range.disk, range.sector, u64::from(range.sectors));
        }
    }
    // The entry was just found, and only this completion removes it.
    let _ = LEDGER.remove(key);
    true
}

/// Marks a range again. A global function for the verifier: checked once, by itself, not at each of its calls;
/// so are the ones below.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn mark_again(disk: u32, sector: u64, sectors: u64) -> u32 {
    if let Some(slots) = slots_of(disk) {
        mark(slots, sector, sectors, AGAIN);
    }
    0
}

/// Counts a completion without an entry.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn count_unknown(disk: u32) -> u32 {
    if let Some(slots) = slots_of(disk) {
        for i in 0..SLOTS_PER_DISK {
            if i as u32 >= slots.count {
                break;
            }
            let slot = &slots.slots[i];
            if slot.flags & SLOT_LEDGER != 0 {
                bump(slot.id, offset_of!(SlotState, unknown_completions));
            }
        }
    }
    0
}

/// Counts a write that could not be entered: nobody will see it complete.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn count_lost(disk: u32) -> u32 {
    if let Some(slots) = slots_of(disk) {
        for i in 0..SLOTS_PER_DISK {
            if i as u32 >= slots.count {
                break;
            }
            bump(slots.slots[i].id, offset_of!(SlotState, ledger_lost));
        }
    }
    0
}

//! Passthrough: commands that go to a disk past `block_bio_queue`.
//!
//! `SG_IO`, the NVMe and MMC ioctls and the drivers' own commands make requests without a bio that was queued.
//! Every request, theirs too, goes through `blk_mq_start_request`, which fires `block_rq_issue` before the driver
//! sends it. The program looks at the operation first and leaves: ordinary requests cost a load and two compares.
//! A command that may change data is counted for every slot that guards its disk; which command that is decides
//! [`blksnap_common::passthrough`].

use core::ffi::c_void;
use core::mem::offset_of;
use core::ptr::addr_of_mut;

use aya_ebpf::helpers::bpf_loop;
use aya_ebpf::programs::BtfTracePointContext;
use blksnap_common::passthrough::{COMMAND_BYTES, Commands, Direction, may_change};
use blksnap_common::track::{GUARD_CONTROLLER, GUARD_FREE, GUARD_HIDDEN, GUARDS as ENTRIES, SlotState};

use crate::layout::{Request, nvme_command, scsi_command};
use crate::maps::GUARDS;
use crate::mark::bump;

/// `block_rq_issue`.
#[inline(always)]
pub(crate) fn issued(ctx: &BtfTracePointContext) {
    let request = Request::of_issue(ctx);
    let Some(direction) = request.passthrough() else {
        return;
    };
    let (disk, hidden) = request.disk();
    let mut look = Look {
        request: request.key(),
        disk: if disk == 0 { GUARD_CONTROLLER } else { disk },
        also: if hidden { GUARD_HIDDEN } else { GUARD_FREE },
        bytes: request.bytes(),
        out: u32::from(matches!(direction, Direction::Out)),
    };
    // SAFETY: the callback has the signature that the helper expects, the context outlives the call.
    unsafe {
        bpf_loop(ENTRIES, look_at as *mut c_void, addr_of_mut!(look).cast(), 0);
    }
}

/// What [`look_at`] looks for.
#[repr(C)]
struct Look {
    request: u64,
    disk: u32,
    /// Another name of the disk, or [`GUARD_FREE`].
    also: u32,
    bytes: u32,
    /// 1 for data to the device.
    out: u32,
}

/// Callback of `bpf_loop`: the next guard; 1 ends the loop.
extern "C" fn look_at(index: u64, look: *mut Look) -> i64 {
    // SAFETY: `look` is the context that `issued` passed.
    let look = unsafe { &*look };
    let Some(guard) = GUARDS.get(index as u32) else {
        return 1;
    };
    if guard.disk == GUARD_FREE || (guard.disk != look.disk && guard.disk != look.also) {
        return 0;
    }
    let command = if guard.commands == Commands::Scsi as u32 {
        scsi_command(look.request)
    } else if guard.commands == Commands::Unknown as u32 {
        None
    } else {
        nvme_command(look.request)
    };
    let (commands, command) = match command {
        Some(command) => (guard.commands, command),
        None => (Commands::Unknown as u32, [0; COMMAND_BYTES]),
    };
    let direction = if look.out == 0 {
        Direction::In
    } else {
        Direction::Out
    };
    if may_change(commands, direction, look.bytes, &command) {
        bump(guard.slot, offset_of!(SlotState, passthrough));
    }
    0
}

//! Park: a write sleeps until its units are kept.
//!
//! The program writes what it needs into the place of its CPU and copy, and reads a byte of the page of that place in the
//! memory of another process, the parker. The page is one of a file that the agent serves by FUSE, and is never there: the
//! page fault is a read request to the agent, which keeps the units, sets their bits, and answers with an error, so that
//! the next fault asks again. Nobody else has this page meanwhile: the kernel does not start a copy that is active on the
//! CPU, and a program that sleeps stays on its CPU (`__bpf_prog_enter_sleepable_recur`).
//!
//! Whatever the fault brought, the bits decide. A task that is being killed gets no page: it asks by the ring, and turns,
//! with the scheduling points that a fault has, until the agent has set the bits. If the agent dies the kernel ends all
//! requests of its file system; if it hangs the parker has the kernel end them.

use core::ffi::c_void;
use core::mem::offset_of;
use core::ptr::{addr_of_mut, read_volatile, write_volatile};

use aya_ebpf::helpers::generated::bpf_copy_from_user_task;
use aya_ebpf::helpers::{bpf_get_smp_processor_id, bpf_ktime_get_ns, bpf_loop};
use blksnap_common::blockrange::BlockRange;
use blksnap_common::gate::{COPIES, GateState, Request, TASK_FROM_PID, TASK_RELEASE, broken};

use crate::hold::{ROUNDS, TURNS, account, break_gate, bump, has_word, is_closed, overdue, send};
use crate::maps::{PARKED, PARKER};

/// `struct task_struct` of the kernel.
type Task = aya_ebpf::bindings::task_struct;

/// `bpf_task_from_pid`: a reference to a task, or null.
#[inline(always)]
fn task_from_pid(pid: i32) -> *mut Task {
    // SAFETY: the agent puts the number of the kernel's function, which has this signature, in place of the constant
    // (`filter::gate::park`); a program in which that was not done is refused by the verifier.
    let call: extern "C" fn(i32) -> *mut Task = unsafe { core::mem::transmute(TASK_FROM_PID as usize) };
    call(pid)
}

/// `bpf_task_release`.
#[inline(always)]
fn task_release(task: *mut Task) {
    // SAFETY: as above.
    let call: extern "C" fn(*mut Task) = unsafe { core::mem::transmute(TASK_RELEASE as usize) };
    call(task);
}

/// A wait, as its loop sees it.
#[repr(C)]
struct Wait {
    range: BlockRange,
    /// The word that is waited for; those before it are there.
    word: u64,
    /// When it began, `CLOCK_MONOTONIC`.
    since: u64,
    gate: u32,
    copy: u32,
    /// Faults so far, up to 2.
    faults: u32,
    /// Whether it is over.
    over: u32,
}

/// Sleeps until the units of `range` are kept, or the gate lets everything pass.
#[inline(always)]
pub(crate) fn park(gate: u32, range: BlockRange, copy: u32) {
    // SAFETY: a helper without arguments.
    let since = unsafe { bpf_ktime_get_ns() };
    let mut wait = Wait {
        range,
        word: range.first >> 6,
        since,
        gate,
        copy,
        faults: 0,
        over: 0,
    };
    // SAFETY: the callback has the signature that the helper expects, the context outlives the call.
    unsafe { bpf_loop(ROUNDS, round as *mut c_void, addr_of_mut!(wait).cast(), 0) };
    // SAFETY: a helper without arguments.
    let time = unsafe { bpf_ktime_get_ns() } - since;
    account(gate, time, copy);
}

/// Callback of the outer `bpf_loop`: so many turns as one loop may have; 1 ends it.
extern "C" fn round(_index: u64, wait: *mut Wait) -> i64 {
    // SAFETY: the callback has the signature that the helper expects, and `wait` outlives the call.
    unsafe { bpf_loop(TURNS, turn as *mut c_void, wait.cast(), 0) };
    // SAFETY: `wait` is the context that `park` passed.
    i64::from(unsafe { read_volatile(&raw const (*wait).over) } != 0)
}

/// Callback of `bpf_loop`: one sleep; 1 ends the loop.
extern "C" fn turn(_index: u64, wait: *mut Wait) -> i64 {
    // SAFETY: `wait` is the context that `park` passed.
    let wait = unsafe { &mut *wait };
    if !is_closed(wait.gate) {
        wait.over = 1;
        return 1;
    }
    if has_word(wait.gate, wait.range, wait.word) {
        if wait.word >= wait.range.last >> 6 {
            wait.over = 1;
            return 1;
        }
        wait.word += 1;
        return 0;
    }
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    let mut reason = overdue(wait.gate, now, now.wrapping_sub(wait.since));
    if reason == 0 {
        if wait.faults == 1 {
            ask(wait);
        }
        if wait.faults < 2 {
            wait.faults += 1;
        }
        if sleep(wait) {
            return 0;
        }
        reason = broken::PLACE;
    }
    break_gate(wait.gate, reason);
    wait.over = 1;
    1
}

/// Asks by the ring, since the fault did not help.
#[inline(always)]
fn ask(wait: &mut Wait) {
    let sent = send(Request {
        first: wait.range.first,
        last: wait.range.last,
        gate: wait.gate,
        reserved: 0,
    });
    if !sent {
        wait.faults = 0;
        bump(wait.gate, offset_of!(GateState, ring_full), 1);
    }
}

/// Faults in the page of this CPU and copy; `false` if there is none.
#[inline(always)]
fn sleep(wait: &Wait) -> bool {
    let Some(parker) = PARKER.get_ptr(0) else {
        return false;
    };
    // SAFETY: words of the map value, which the agent sets when no gate is armed, and takes away page first.
    let (base, page, pid) = unsafe {
        (
            read_volatile(&raw const (*parker).base),
            read_volatile(&raw const (*parker).page),
            read_volatile(&raw const (*parker).pid),
        )
    };
    if page == 0 {
        return false;
    }
    // SAFETY: a helper without arguments.
    let place = unsafe { bpf_get_smp_processor_id() } * COPIES as u32 + wait.copy;
    let Some(parked) = PARKED.get_ptr_mut(place) else {
        return false;
    };
    // SAFETY: this place is this program's alone while it is active.
    unsafe {
        write_volatile(&raw mut (*parked).first, wait.range.first);
        write_volatile(&raw mut (*parked).last, wait.range.last);
        write_volatile(&raw mut (*parked).since, wait.since);
        write_volatile(&raw mut (*parked).gate, wait.gate);
    }
    bump(wait.gate, offset_of!(GateState, requests), 1);
    let task = task_from_pid(pid as i32);
    if task.is_null() {
        return false;
    }
    let mut byte = 0_u8;
    // SAFETY: one byte of this frame; the task is referenced until it is released.
    unsafe {
        bpf_copy_from_user_task(
            addr_of_mut!(byte).cast(),
            1,
            (base + u64::from(place) * page) as *const c_void,
            task,
            0,
        );
    }
    task_release(task);
    true
}

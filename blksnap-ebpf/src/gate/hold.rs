//! Hold: a write waits until its units are kept.
//!
//! The program turns in `bpf_loop` until the agent has set the bits. Nothing sleeps: on a preemptible kernel the agent
//! and the completions of its reads get the processor by preempting the loop. What ends it, at the latest, is the
//! deadline, or that the agent gives no sign of life; the gate is broken then, and lets everything pass.
//!
//! # Copies
//! The kernel does not start a tracing program that is active on the CPU (`__bpf_prog_enter_recur`), and one that
//! waits is, though preempted. So the program is attached many times over: the second writer on a CPU is not seen by
//! the first copy, and waits in the second. A writer that finds all copies taken goes on, and the auditor breaks the
//! gate.

use core::ffi::c_void;
use core::mem::offset_of;
use core::ptr::{addr_of_mut, read_volatile, write_volatile};

use aya_ebpf::bindings::BPF_RB_FORCE_WAKEUP;
use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_loop};
use blksnap_common::blockrange::{BlockRange, word_mask};
use blksnap_common::gate::{GateState, HOLD_BUCKETS, Request, armed, broken, hold_bucket};
use blksnap_ebpf::atomic;

use crate::maps::{KEPT, REQUESTS, STATE};

/// Most turns of one loop (`BPF_MAX_LOOPS` of include/linux/bpf_verifier.h).
pub(crate) const TURNS: u32 = 1 << 23;

/// Loops in a row, in a loop of their own: more than enough for any deadline.
pub(crate) const ROUNDS: u32 = 256;

/// Words of a bitmap that one bio can touch: less than 4 GiB in units of 4 KiB, 64 to a word, and one for the start.
const MAX_WORDS: u32 = (1 << 14) + 1;

/// Whether the units of `range` are kept, or need not be: the gate is open, or broken.
#[inline(always)]
pub(crate) fn is_kept(gate: u32, range: BlockRange) -> bool {
    if !is_closed(gate) {
        return true;
    }
    let word = range.first >> 6;
    if !has_word(gate, range, word) {
        return false;
    }
    if word == range.last >> 6 {
        return true;
    }
    let mut scan = Scan {
        range,
        word: word + 1,
        gate,
        missing: 0,
    };
    // SAFETY: the callback has the signature that the helper expects, the context outlives the call.
    unsafe { bpf_loop(MAX_WORDS, scan_word as *mut c_void, addr_of_mut!(scan).cast(), 0) };
    // SAFETY: a plain read of this frame's own variable, which the callback may have changed.
    unsafe { read_volatile(&raw const scan.missing) == 0 }
}

/// Whether the gate makes writes wait.
#[inline(always)]
pub(crate) fn is_closed(gate: u32) -> bool {
    let Some(state) = STATE.get_ptr(gate) else {
        return false;
    };
    // SAFETY: plain loads of words of the map value.
    unsafe {
        read_volatile(&raw const (*state).armed) != armed::OPEN
            && read_volatile(&raw const (*state).broken) == 0
    }
}

/// Whether a write that comes by is one that should have waited.
#[inline(always)]
pub(crate) fn is_audited(gate: u32) -> bool {
    let Some(state) = STATE.get_ptr(gate) else {
        return true;
    };
    // SAFETY: a plain load of a word of the map value.
    unsafe { read_volatile(&raw const (*state).armed) == armed::AUDITED }
}

/// Whether the units of `range` that are in `word` are kept. A word that is missing is not.
#[inline(always)]
pub(crate) fn has_word(gate: u32, range: BlockRange, word: u64) -> bool {
    let Some(bits) = KEPT.get_value_ptr_mut(gate, &(word as u32)) else {
        return false;
    };
    let mask = word_mask(range, word);
    // SAFETY: `bits` points to a word of the map, which the agent sets bits in.
    unsafe { read_volatile(bits) & mask == mask }
}

/// What is left for [`scan_word`].
#[repr(C)]
struct Scan {
    range: BlockRange,
    word: u64,
    gate: u32,
    missing: u32,
}

/// Callback of `bpf_loop`: the next word; 1 ends the loop.
extern "C" fn scan_word(_index: u64, scan: *mut Scan) -> i64 {
    // SAFETY: `scan` is the context that `is_kept` passed.
    let scan = unsafe { &mut *scan };
    let word = scan.word;
    if word > scan.range.last >> 6 {
        return 1;
    }
    scan.word = word + 1;
    if has_word(scan.gate, scan.range, word) {
        return 0;
    }
    scan.missing = 1;
    1
}

/// Lets everything pass from now on, and says why.
#[inline(always)]
pub(crate) fn break_gate(gate: u32, reason: u64) {
    let Some(state) = STATE.get_ptr_mut(gate) else {
        return;
    };
    // SAFETY: an aligned word of the map value just looked up.
    unsafe {
        atomic::or(addr_of_mut!((*state).broken), reason);
        if reason == broken::BYPASSED {
            atomic::add(addr_of_mut!((*state).bypassed), 1);
        }
    }
    // Somebody looks at the state before he waits for the ring, and is woken by this.
    send(Request {
        first: 0,
        last: 0,
        gate,
        reserved: 0,
    });
}

/// Sends a request and wakes the agent; `false` if the ring is full.
#[inline(always)]
pub(crate) fn send(request: Request) -> bool {
    let Some(mut entry) = REQUESTS.reserve(0) else {
        return false;
    };
    entry.write(request);
    entry.submit(u64::from(BPF_RB_FORCE_WAKEUP));
    true
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
    /// Whether the agent was asked.
    asked: u32,
    /// Whether it is over.
    over: u32,
    reserved: u32,
}

/// Waits until the units of `range` are kept, or the gate lets everything pass.
#[inline(always)]
pub(crate) fn hold(gate: u32, range: BlockRange, copy: u32) {
    // SAFETY: a helper without arguments.
    let since = unsafe { bpf_ktime_get_ns() };
    let mut wait = Wait {
        range,
        word: range.first >> 6,
        since,
        gate,
        asked: 0,
        over: 0,
        reserved: 0,
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
    // SAFETY: `wait` is the context that `hold` passed.
    i64::from(unsafe { read_volatile(&raw const (*wait).over) } != 0)
}

/// Callback of `bpf_loop`: one look at what is waited for; 1 ends the loop.
extern "C" fn turn(_index: u64, wait: *mut Wait) -> i64 {
    // SAFETY: `wait` is the context that `hold` passed.
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
    if wait.asked == 0 {
        let request = Request {
            first: wait.range.first,
            last: wait.range.last,
            gate: wait.gate,
            reserved: 0,
        };
        wait.asked = 1;
        if send(request) {
            bump(wait.gate, offset_of!(GateState, requests), 1);
        } else {
            wait.asked = 0;
            bump(wait.gate, offset_of!(GateState, ring_full), 1);
        }
    }
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    let reason = overdue(wait.gate, now, now.wrapping_sub(wait.since));
    if reason != 0 {
        break_gate(wait.gate, reason);
        wait.over = 1;
        return 1;
    }
    0
}

/// Why a wait of `time` nanoseconds ends now, or 0.
#[inline(always)]
pub(crate) fn overdue(gate: u32, now: u64, time: u64) -> u64 {
    let Some(state) = STATE.get_ptr(gate) else {
        return broken::MAP;
    };
    // SAFETY: plain loads of words of the map value.
    unsafe {
        if time > read_volatile(&raw const (*state).deadline) {
            return broken::DEADLINE;
        }
        let beat = read_volatile(&raw const (*state).beat);
        if now > beat && now - beat > read_volatile(&raw const (*state).silence) {
            return broken::AGENT;
        }
    }
    0
}

/// Counts a wait.
#[inline(always)]
pub(crate) fn account(gate: u32, time: u64, copy: u32) {
    bump(gate, offset_of!(GateState, held), 1);
    bump(gate, offset_of!(GateState, held_nanoseconds), time);
    let Some(state) = STATE.get_ptr_mut(gate) else {
        return;
    };
    // SAFETY: words of the map value. The two maxima are for people: two CPUs at once may lose one of them.
    unsafe {
        let longest = addr_of_mut!((*state).longest);
        if read_volatile(longest) < time {
            write_volatile(longest, time);
        }
        let copies = addr_of_mut!((*state).copies);
        if read_volatile(copies) < u64::from(copy) + 1 {
            write_volatile(copies, u64::from(copy) + 1);
        }
        let bucket = hold_bucket(time);
        if bucket < HOLD_BUCKETS {
            atomic::add(addr_of_mut!((*state).hold_buckets).cast::<u64>().add(bucket), 1);
        }
    }
}

/// Adds `n` to the 64-bit field of a gate's state that starts at `offset`.
#[inline(always)]
pub(crate) fn bump(gate: u32, offset: usize, n: u64) {
    if let Some(state) = STATE.get_ptr_mut(gate) {
        // SAFETY: `offset` is one of `offset_of!`, inside the map value just looked up; the verifier checks it.
        unsafe { atomic::add(state.byte_add(offset).cast(), n) };
    }
}

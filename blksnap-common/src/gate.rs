//! Gate ABI: maps shared by the programs that make writes wait and the agent, and the arithmetic of both.
//!
//! A *gate* stands before one range of a disk, a [`Slot`](crate::track::Slot) whose blocks are the units of
//! preserving. In its bitmap a bit is set when the old data of the unit is kept, or nobody needs it.

/// Gates over all disks: entries of every map by gate.
pub const MAX_GATES: u32 = 64;

/// Disks that have a gate: entries of the table of disks.
pub const GATED_DISKS: u32 = 64;

/// Copies of the waiting program. The kernel does not start a program that is active on the CPU, and one that waits
/// is: the next writer on this CPU waits in the next copy. A trampoline takes 38 programs (`BPF_MAX_TRAMP_LINKS`
/// in include/linux/bpf.h).
pub const COPIES: usize = 32;

/// Bytes of the ring of requests: room for more writers than there are copies on many CPUs.
pub const REQUEST_RING_BYTES: u32 = 256 * 1024;

/// Buckets of [`GateState::hold_buckets`]: below 2^10 ns, 2^11 ns, and so on; the last has all that is longer.
pub const HOLD_BUCKETS: usize = 24;

/// What a gate does, [`GateState::armed`].
pub mod armed {
    /// Everything passes.
    pub const OPEN: u64 = 0;
    /// Writes wait, and the auditor looks.
    pub const AUDITED: u64 = 1;
    /// Writes wait, and those that were let pass before are still on their way: the auditor does not look.
    pub const HOLDS: u64 = 2;
}

/// Why a gate lets everything pass, as bits of [`GateState::broken`].
pub mod broken {
    /// A write reached the disk before old data was kept: no copy of the program saw it.
    pub const BYPASSED: u64 = 1;
    /// A write waited as long as it may.
    pub const DEADLINE: u64 = 1 << 1;
    /// The agent gave no sign of life.
    pub const AGENT: u64 = 1 << 2;
    /// An operation changes the whole disk.
    pub const WHOLE_DISK: u64 = 1 << 3;
    /// A map element that is always there was not.
    pub const MAP: u64 = 1 << 4;
    /// The agent gave up: its own reason says more.
    pub const GIVEN_UP: u64 = 1 << 5;
    /// A write that should have slept had no place to.
    pub const PLACE: u64 = 1 << 6;
    /// All of them, with their names in metrics.
    pub const CODES: [(&str, u64); 7] = [
        ("bypassed", BYPASSED),
        ("deadline", DEADLINE),
        ("agent", AGENT),
        ("whole_disk", WHOLE_DISK),
        ("map", MAP),
        ("given_up", GIVEN_UP),
        ("place", PLACE),
    ];
}

/// State of a gate: shared by all CPUs, mapped by the agent. Written by the programs with atomic operations, but
/// for what the agent sets before it arms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct GateState {
    /// One of [`armed`].
    pub armed: u64,
    /// Bits of [`broken`]; anything but 0 lets everything pass.
    pub broken: u64,
    /// Longest wait of a write, in nanoseconds.
    pub deadline: u64,
    /// Last sign of life of the agent, `CLOCK_MONOTONIC` in nanoseconds.
    pub beat: u64,
    /// Longest silence of the agent in nanoseconds that a waiting write bears.
    pub silence: u64,
    /// Writes that waited.
    pub held: u64,
    /// Time of all waits in nanoseconds.
    pub held_nanoseconds: u64,
    /// The longest of them.
    pub longest: u64,
    /// Requests in the ring.
    pub requests: u64,
    /// Requests that found the ring full, and were tried again.
    pub ring_full: u64,
    /// Writes that went on with old data not kept.
    pub bypassed: u64,
    /// The most copies of the program that were in use on a CPU when a write came.
    pub copies: u64,
    /// Waits by length.
    pub hold_buckets: [u64; HOLD_BUCKETS],
}

/// Words of a [`GateState`].
pub const STATE_WORDS: usize = size_of::<GateState>() / 8;

/// A write that waits: units that it needs to be kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Request {
    /// First unit of the gate's range.
    pub first: u64,
    /// Last unit.
    pub last: u64,
    /// The gate.
    pub gate: u32,
    /// Always 0.
    pub reserved: u32,
}

/// Bytes of a [`Request`].
pub const REQUEST_BYTES: usize = size_of::<Request>();

/// A write that a copy of the program on this CPU has let pass: the copies after it need not look again. True for as
/// long as no gate is armed after `epoch`, since a bit that is set stays set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Passed {
    /// Address of the block device.
    pub device: u64,
    /// First sector, as the bio has it.
    pub sector: u64,
    /// Bytes in the low half, flags of the bio in the next 16 bits.
    pub shape: u64,
    /// Armings before the write was looked at, and one: 0 is never a true one.
    pub epoch: u64,
}

/// A write that sleeps, in the place of its CPU and its copy of the program: while a copy is active on a CPU nobody else
/// starts it there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Parked {
    /// First unit of the gate's range.
    pub first: u64,
    /// Last unit.
    pub last: u64,
    /// When the wait began, `CLOCK_MONOTONIC` in nanoseconds.
    pub since: u64,
    /// The gate.
    pub gate: u32,
    /// Always 0.
    pub reserved: u32,
}

/// Words of a [`Parked`].
pub const PARKED_WORDS: usize = size_of::<Parked>() / 8;

/// Where writes sleep: a page for each CPU and copy in the memory of a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Parker {
    /// Address of the first page.
    pub base: u64,
    /// Bytes of a page; 0 if there is no place.
    pub page: u64,
    /// The process, by its number in the first PID namespace.
    pub pid: u64,
}

/// Stands in the programs for the call of the kernel's function `bpf_task_from_pid`, until the agent has put its number
/// there.
pub const TASK_FROM_PID: u32 = 0x4b5f_7a01;

/// The same for `bpf_task_release`.
pub const TASK_RELEASE: u32 = 0x4b5f_7a02;

/// Bucket of a wait.
#[inline(always)]
#[must_use]
pub const fn hold_bucket(nanoseconds: u64) -> usize {
    let log = 63 - (nanoseconds | 1).leading_zeros() as usize;
    let bucket = log.saturating_sub(9);
    if bucket < HOLD_BUCKETS {
        bucket
    } else {
        HOLD_BUCKETS - 1
    }
}

const _: () = {
    assert!(size_of::<GateState>() == 8 * (12 + HOLD_BUCKETS));
    assert!(REQUEST_BYTES == 24);
    assert!(size_of::<Passed>() == 32);
    assert!(size_of::<Parked>() == 32);
    assert!(size_of::<Parker>() == 24);
};

#[cfg(feature = "user")]
mod user {
    use super::{GateState, Request};

    // SAFETY: repr(C), no padding (sizes asserted above), every bit pattern is a value.
    unsafe impl aya::Pod for GateState {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Request {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bucket_is_twice_as_long_as_the_one_before() {
        assert_eq!(hold_bucket(0), 0);
        assert_eq!(hold_bucket(1023), 0);
        for bucket in 1..HOLD_BUCKETS {
            let least = 1_u64 << (9 + bucket);
            assert_eq!(hold_bucket(least), bucket, "{least} ns");
            assert_eq!(hold_bucket(least - 1), bucket - 1, "{least} ns less 1");
        }
        assert_eq!(hold_bucket(u64::MAX), HOLD_BUCKETS - 1);
    }
}

//! Scheduling: priority of a thread, its place among those who write, and the clock that programs in the kernel see.

use nix::errno::Errno;
use nix::time::{ClockId, clock_gettime};

/// From include/uapi/linux/prctl.h.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// `CLOCK_MONOTONIC` in nanoseconds, which is what `bpf_ktime_get_ns` gives.
#[must_use]
pub fn monotonic() -> u64 {
    // It can't fail for this clock; 0 would be a sign of life from long ago.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| {
        let seconds = u64::try_from(time.tv_sec()).unwrap_or_default();
        seconds * 1_000_000_000 + u64::try_from(time.tv_nsec()).unwrap_or_default()
    })
}

/// Gives the calling thread real-time priority (`SCHED_FIFO`, 1 to 99).
///
/// # Errors
/// `EPERM`: without `CAP_SYS_NICE`. `EINVAL`: another number.
pub fn real_time(priority: u8) -> Result<(), Errno> {
    let parameters = libc::sched_param {
        sched_priority: priority.into(),
    };
    // SAFETY: 0 names the calling thread; the parameters live as long as the call.
    Errno::result(unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) })?;
    Ok(())
}

/// The real-time priority of the calling thread; `None` if it has the policy of every other thread.
///
/// # Errors
/// The kernel's own.
pub fn real_time_of_this() -> Result<Option<u8>, Errno> {
    let mut parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: 0 names the calling thread; the parameters are ours to write.
    let policy = Errno::result(unsafe { libc::sched_getscheduler(0) })?;
    // SAFETY: as above.
    Errno::result(unsafe { libc::sched_getparam(0, &raw mut parameters) })?;
    let number = u8::try_from(parameters.sched_priority).map_err(|_| Errno::ERANGE)?;
    Ok((policy == libc::SCHED_FIFO).then_some(number))
}

/// Tells the kernel that others wait for what the calling thread, and those that it starts, write (`PR_SET_IO_FLUSHER`):
/// it does not make it write back dirty memory when it asks for some, nor wait for others who do. Without
/// `CAP_SYS_RESOURCE` it stays as it was.
pub fn flush_for_others() {
    // SAFETY: the call takes numbers only; a kernel that refuses changes nothing.
    let told = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    if told != 0 {
        tracing::debug!("the kernel does not know of threads that others wait for");
    }
}

//! Inherit: descriptors that the service manager opened for this process (sd_listen_fds(3)).

use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// First inherited descriptor (`SD_LISTEN_FDS_START`).
pub const FIRST: RawFd = 3;

static TAKEN: AtomicBool = AtomicBool::new(false);

/// Takes the `count` descriptors from [`FIRST`] on, and keeps them from children. To be called when `LISTEN_PID` names
/// this process: then they were open before it began, and nobody else has them.
///
/// # Errors
/// `EBADF` if one is not open, `EALREADY` if this was called before.
pub fn take(count: RawFd) -> Result<Vec<OwnedFd>, Errno> {
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Err(Errno::EALREADY);
    }
    (FIRST..FIRST.saturating_add(count))
        .map(|number| {
            // SAFETY: the descriptor is not used but for the two calls below, which fail if it is not open. If it is,
            // the service manager gave it to this process, and this function gives it away once only.
            let descriptor = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
            fcntl(descriptor, FcntlArg::F_GETFD)?;
            fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
            // SAFETY: it is open and nobody owns it, as above.
            Ok(unsafe { OwnedFd::from_raw_fd(number) })
        })
        .collect()
}

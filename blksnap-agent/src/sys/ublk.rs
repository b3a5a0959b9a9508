//! ublk: what libublk leaves to raw descriptors.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;

use libublk::io::UblkDev;

/// The character device of `device`, for reading and writing the bytes of requests (`UBLK_F_USER_COPY`).
///
/// # Errors
/// There are no more descriptors.
pub fn character_device(device: &UblkDev) -> io::Result<File> {
    // SAFETY: the first descriptor is that of the file that `device` owns, which is open as long as it is borrowed.
    let descriptor = unsafe { BorrowedFd::borrow_raw(device.tgt.fds[0]) };
    descriptor.try_clone_to_owned().map(File::from)
}

//! Flags: attributes of a file that the file system keeps to (`linux/fs.h`).

use std::ffi::c_int;
use std::fs::File;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

/// `FS_IMMUTABLE_FL`: it can't be written, cut, punched, moved, renamed or removed, nor its flags but this one changed.
const IMMUTABLE: c_int = 0x10;

mod raw {
    use std::ffi::c_long;

    // The numbers say long, the kernel reads and writes an int.
    nix::ioctl_read!(getflags, b'f', 1, c_long);
    nix::ioctl_write_ptr!(setflags, b'f', 2, c_long);
}

fn get(file: &File) -> Result<c_int, Errno> {
    let mut flags = [0_i32; 2];
    // SAFETY: the descriptor is open for the call, and the kernel writes one int to the array, which has room for a
    // long and is aligned for an int, which is all that is written.
    unsafe { raw::getflags(file.as_raw_fd(), (&raw mut flags).cast()) }?;
    Ok(flags[0])
}

/// `FS_IOC_GETFLAGS`: whether nobody can change the file.
///
/// # Errors
/// `ENOTTY`: the file system has no such attributes.
pub fn is_immutable(file: &File) -> Result<bool, Errno> {
    Ok(get(file)? & IMMUTABLE != 0)
}

/// `FS_IOC_SETFLAGS`: lets nobody change the file, or everybody again who may.
///
/// # Errors
/// `EPERM`: no `CAP_LINUX_IMMUTABLE`; `ENOTTY`, `EOPNOTSUPP`: the file system has no such attribute.
pub fn set_immutable(file: &File, immutable: bool) -> Result<(), Errno> {
    let now = get(file)?;
    let wanted = if immutable {
        now | IMMUTABLE
    } else {
        now & !IMMUTABLE
    };
    if wanted == now {
        return Ok(());
    }
    let flags = [wanted, 0_i32];
    // SAFETY: the descriptor is open for the call, and the kernel reads one int from the array.
    unsafe { raw::setflags(file.as_raw_fd(), (&raw const flags).cast()) }.map(drop)
}

//! FUSE: file systems that this process serves, mounted nowhere (`fsopen(2)`, Linux 5.2; linux/fuse.h).

use std::ffi::{CStr, CString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt as _;

use nix::errno::Errno;

/// The kernel's end of a connection.
const DEVICE: &str = "/dev/fuse";

/// From include/uapi/linux/mount.h.
const FSOPEN_CLOEXEC: libc::c_long = 1;
const FSCONFIG_SET_STRING: libc::c_long = 1;
const FSCONFIG_CMD_CREATE: libc::c_long = 6;
const FSMOUNT_CLOEXEC: libc::c_long = 1;
const MOUNT_ATTR_NOSUID: libc::c_long = 2;
const MOUNT_ATTR_NODEV: libc::c_long = 4;

mod raw {
    nix::ioctl_read!(fuse_dev_ioc_clone, 229, 0, u32);
}

/// A new connection without a file system.
///
/// # Errors
/// `ENOENT` or `ENODEV`: the kernel has no FUSE.
pub fn open_device() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(DEVICE)
}

/// `FUSE_DEV_IOC_CLONE`: another way to the requests of a connection, on which a read never waits. What was read by it
/// has to be answered by it.
///
/// # Errors
/// `EINVAL`: nothing is served by `device`.
pub fn clone_device(device: &File) -> io::Result<File> {
    let spare = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(DEVICE)?;
    let mut of = u32::try_from(device.as_raw_fd()).map_err(io::Error::other)?;
    // SAFETY: both descriptors are open for the call; the kernel only reads the number.
    unsafe { raw::fuse_dev_ioc_clone(spare.as_raw_fd(), &raw mut of) }?;
    Ok(spare)
}

/// A file system that is one file, which only this user may open, served by who reads `device`. It stands nowhere; it is
/// there as long as what is given, or something opened by that.
///
/// # Errors
/// What the kernel says: without `CAP_SYS_ADMIN` it is `EPERM`.
pub fn file(device: &File) -> io::Result<OwnedFd> {
    let number = CString::new(device.as_raw_fd().to_string()).map_err(io::Error::other)?;
    detached(
        c"fuse",
        &[
            (c"source", c"blksnap"),
            (c"fd", &number),
            (c"rootmode", c"100400"),
            (c"user_id", c"0"),
            (c"group_id", c"0"),
        ],
    )
}

/// The file system by which connections are looked at and ended.
///
/// # Errors
/// What the kernel says.
pub fn control() -> io::Result<OwnedFd> {
    detached(c"fusectl", &[])
}

/// Mounts a file system nowhere.
fn detached(kind: &CStr, parameters: &[(&CStr, &CStr)]) -> io::Result<OwnedFd> {
    // SAFETY: the name lives as long as the call.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) })?;
    for (key, value) in parameters {
        configure(&context, FSCONFIG_SET_STRING, Some((key, value)))?;
    }
    configure(&context, FSCONFIG_CMD_CREATE, None)?;
    // SAFETY: the descriptor is open for the call, the others are numbers.
    let mount = unsafe {
        libc::syscall(
            libc::SYS_fsmount,
            context.as_fd().as_raw_fd(),
            FSMOUNT_CLOEXEC,
            MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV,
        )
    };
    owned(mount)
}

fn configure(context: &OwnedFd, command: libc::c_long, pair: Option<(&CStr, &CStr)>) -> io::Result<()> {
    let (key, value) = pair.map_or((std::ptr::null(), std::ptr::null()), |(key, value)| {
        (key.as_ptr(), value.as_ptr())
    });
    // SAFETY: the descriptor is open, and key and value live as long as the call.
    let done = unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0) };
    Errno::result(done)?;
    Ok(())
}

/// The descriptor that a call gave.
fn owned(given: libc::c_long) -> io::Result<OwnedFd> {
    let raw = RawFd::try_from(Errno::result(given)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made it for this process, and nothing else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

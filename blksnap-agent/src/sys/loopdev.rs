//! Loopdev: a file as a block device (`linux/loop.h`).

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd as _};

use nix::errno::Errno;

mod raw {
    nix::ioctl_none_bad!(loop_ctl_get_free, 0x4C82);
    nix::ioctl_write_ptr_bad!(loop_configure, 0x4C0A, super::Config);
    nix::ioctl_write_int_bad!(loop_set_capacity, 0x4C07);
    nix::ioctl_write_int_bad!(loop_clr_fd, 0x4C01);
}

/// `LO_FLAGS_AUTOCLEAR`: the device lets its file go when nobody has it open any more.
const AUTOCLEAR: u32 = 4;
/// `LO_FLAGS_DIRECT_IO`.
const DIRECT_IO: u32 = 16;

/// `struct loop_info64`.
#[repr(C)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<Info>() == 232 && size_of::<Config>() == 304);

/// `LOOP_CTL_GET_FREE`: number of a loop device that nobody uses, at the moment; `control` is `/dev/loop-control`.
///
/// # Errors
/// The kernel's own.
pub fn get_free(control: impl AsFd) -> Result<u32, Errno> {
    // SAFETY: the descriptor is open for the call; the ioctl takes no argument.
    let number = unsafe { raw::loop_ctl_get_free(control.as_fd().as_raw_fd()) }?;
    u32::try_from(number).map_err(|_| Errno::ERANGE)
}

/// `LOOP_CONFIGURE` (Linux 5.8): makes `device` the bytes of `file`, with direct I/O where the file system permits it,
/// until nobody has the device open.
///
/// # Errors
/// `EBUSY`: somebody else was given the device meanwhile.
pub fn configure(device: &File, file: &File) -> Result<(), Errno> {
    let config = Config {
        fd: u32::try_from(file.as_raw_fd()).map_err(|_| Errno::EBADF)?,
        block_size: 0,
        info: Info {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: AUTOCLEAR | DIRECT_IO,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        },
        reserved: [0; 8],
    };
    // SAFETY: the descriptors are open for the call, and the kernel reads a `loop_config`, as which `config` is laid
    // out.
    unsafe { raw::loop_configure(device.as_raw_fd(), &raw const config) }?;
    Ok(())
}

/// `LOOP_SET_CAPACITY`: the device is as long as its file is now.
///
/// # Errors
/// `ENXIO`: it has no file.
pub fn set_capacity(device: &File) -> Result<(), Errno> {
    // SAFETY: the descriptor is open for the call; the argument is not used.
    unsafe { raw::loop_set_capacity(device.as_raw_fd(), 0) }?;
    Ok(())
}

/// `LOOP_CLR_FD`: the device lets its file go, at once or when the last one closes it.
///
/// # Errors
/// `ENXIO`: it has no file.
pub fn clear(device: &File) -> Result<(), Errno> {
    // SAFETY: the descriptor is open for the call; the argument is not used.
    unsafe { raw::loop_clr_fd(device.as_raw_fd(), 0) }?;
    Ok(())
}

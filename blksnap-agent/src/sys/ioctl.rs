//! Ioctls: one safe typed function for each, named as the kernel names it (`linux/fs.h`, `linux/blkdev.h`).

use std::ffi::{c_int, c_uint};
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

mod raw {
    use std::ffi::{c_int, c_uint};

    nix::ioctl_read!(blkgetsize64, 0x12, 114, usize);
    nix::ioctl_read_bad!(blksszget, nix::request_code_none!(0x12, 104), c_int);
    nix::ioctl_read_bad!(blkpbszget, nix::request_code_none!(0x12, 123), c_uint);
    nix::ioctl_read_bad!(blkiomin, nix::request_code_none!(0x12, 120), c_uint);
    nix::ioctl_read_bad!(blkroget, nix::request_code_none!(0x12, 94), c_int);
    nix::ioctl_read!(blkgetdiskseq, 0x12, 128, u64);
    nix::ioctl_none!(blkflsbuf, 0x12, 97);
    nix::ioctl_write_ptr_bad!(blkdiscard, nix::request_code_none!(0x12, 119), [u64; 2]);
    nix::ioctl_write_ptr_bad!(blksecdiscard, nix::request_code_none!(0x12, 125), [u64; 2]);
    nix::ioctl_write_ptr_bad!(blkzeroout, nix::request_code_none!(0x12, 127), [u64; 2]);
    nix::ioctl_write_ptr_bad!(blkpg, nix::request_code_none!(0x12, 105), super::BlkpgArgument);
    nix::ioctl_readwrite!(fifreeze, b'X', 119, c_int);
    nix::ioctl_readwrite!(fithaw, b'X', 120, c_int);
}

/// `BLKGETSIZE64`: capacity of a block device in bytes.
///
/// # Errors
/// `ENOTTY`: not a block device.
pub fn blkgetsize64(device: impl AsFd) -> Result<u64, Errno> {
    let mut bytes = 0_usize;
    // SAFETY: the descriptor is open for the call, and the kernel writes one u64 (a `usize` here) to `bytes`.
    unsafe { raw::blkgetsize64(device.as_fd().as_raw_fd(), &raw mut bytes) }?;
    Ok(bytes as u64)
}

/// `BLKSSZGET`: logical block size in bytes, the unit of direct I/O.
///
/// # Errors
/// `ENOTTY`: not a block device.
pub fn blksszget(device: impl AsFd) -> Result<u32, Errno> {
    let mut bytes: c_int = 0;
    // SAFETY: the descriptor is open for the call, and the kernel writes one int to `bytes`.
    unsafe { raw::blksszget(device.as_fd().as_raw_fd(), &raw mut bytes) }?;
    u32::try_from(bytes).map_err(|_| Errno::ERANGE)
}

/// `BLKPBSZGET`: physical block size in bytes, what the medium writes at once.
///
/// # Errors
/// `ENOTTY`: not a block device.
pub fn blkpbszget(device: impl AsFd) -> Result<u32, Errno> {
    let mut bytes: c_uint = 0;
    // SAFETY: the descriptor is open for the call, and the kernel writes one unsigned int to `bytes`.
    unsafe { raw::blkpbszget(device.as_fd().as_raw_fd(), &raw mut bytes) }?;
    Ok(bytes)
}

/// `BLKIOMIN`: smallest I/O in bytes that the device prefers.
///
/// # Errors
/// `ENOTTY`: not a block device.
pub fn blkiomin(device: impl AsFd) -> Result<u32, Errno> {
    let mut bytes: c_uint = 0;
    // SAFETY: the descriptor is open for the call, and the kernel writes one unsigned int to `bytes`.
    unsafe { raw::blkiomin(device.as_fd().as_raw_fd(), &raw mut bytes) }?;
    Ok(bytes)
}

/// `BLKROGET`: true if the device refuses writes.
///
/// # Errors
/// `ENOTTY`: not a block device.
pub fn blkroget(device: impl AsFd) -> Result<bool, Errno> {
    let mut read_only: c_int = 0;
    // SAFETY: the descriptor is open for the call, and the kernel writes one int to `read_only`.
    unsafe { raw::blkroget(device.as_fd().as_raw_fd(), &raw mut read_only) }?;
    Ok(read_only != 0)
}

/// `BLKGETDISKSEQ` (Linux 5.15): sequence number of the disk, never used twice until the next boot.
///
/// # Errors
/// `ENOTTY`: not a block device, or an older kernel.
pub fn blkgetdiskseq(device: impl AsFd) -> Result<u64, Errno> {
    let mut number = 0_u64;
    // SAFETY: the descriptor is open for the call, and the kernel writes one u64 to `number`.
    unsafe { raw::blkgetdiskseq(device.as_fd().as_raw_fd(), &raw mut number) }?;
    Ok(number)
}

/// `BLKFLSBUF`: writes back and drops the page cache of the device's node.
///
/// # Errors
/// `EACCES`: no `CAP_SYS_ADMIN`.
pub fn blkflsbuf(device: impl AsFd) -> Result<(), Errno> {
    // SAFETY: the descriptor is open for the call; the ioctl takes no argument.
    unsafe { raw::blkflsbuf(device.as_fd().as_raw_fd()) }.map(drop)
}

/// `BLKDISCARD`: discards `length` bytes from byte `offset` on; both multiples of 512.
///
/// # Errors
/// `EOPNOTSUPP`: the device knows no discard; `EINVAL`: not aligned, or past the end.
pub fn blkdiscard(device: impl AsFd, offset: u64, length: u64) -> Result<(), Errno> {
    // SAFETY: the descriptor is open for the call, and the kernel reads two u64 from the array.
    unsafe { raw::blkdiscard(device.as_fd().as_raw_fd(), &[offset, length]) }.map(drop)
}

/// `BLKSECDISCARD`: as [`blkdiscard`], and the bytes can't be had back.
///
/// # Errors
/// `EOPNOTSUPP`: the device knows no secure erase; `EINVAL`: not aligned, or past the end.
pub fn blksecdiscard(device: impl AsFd, offset: u64, length: u64) -> Result<(), Errno> {
    // SAFETY: the descriptor is open for the call, and the kernel reads two u64 from the array.
    unsafe { raw::blksecdiscard(device.as_fd().as_raw_fd(), &[offset, length]) }.map(drop)
}

/// `BLKZEROOUT`: makes `length` bytes from byte `offset` on read as zero; both multiples of 512.
///
/// # Errors
/// `EINVAL`: not aligned, or past the end.
pub fn blkzeroout(device: impl AsFd, offset: u64, length: u64) -> Result<(), Errno> {
    // SAFETY: the descriptor is open for the call, and the kernel reads two u64 from the array.
    unsafe { raw::blkzeroout(device.as_fd().as_raw_fd(), &[offset, length]) }.map(drop)
}

/// `FIFREEZE`: writes back the file system that holds `file` and stops every write to it, until [`fithaw`].
///
/// # Errors
/// `EOPNOTSUPP`: the file system can't be frozen; `EBUSY`: it is frozen already; `EPERM`: no `CAP_SYS_ADMIN`.
pub fn fifreeze(file: impl AsFd) -> Result<(), Errno> {
    let mut unused: c_int = 0;
    // SAFETY: the descriptor is open for the call; the kernel does not use the argument.
    unsafe { raw::fifreeze(file.as_fd().as_raw_fd(), &raw mut unused) }.map(drop)
}

/// `FITHAW`: ends a freeze.
///
/// # Errors
/// `EINVAL`: the file system is not frozen; `EPERM`: no `CAP_SYS_ADMIN`.
pub fn fithaw(file: impl AsFd) -> Result<(), Errno> {
    let mut unused: c_int = 0;
    // SAFETY: the descriptor is open for the call; the kernel does not use the argument.
    unsafe { raw::fithaw(file.as_fd().as_raw_fd(), &raw mut unused) }.map(drop)
}

/// `struct blkpg_ioctl_arg` of `linux/blkpg.h`.
#[repr(C)]
struct BlkpgArgument {
    operation: c_int,
    flags: c_int,
    length: c_int,
    data: *mut BlkpgPartition,
}

/// `struct blkpg_partition` of `linux/blkpg.h`: bytes, not sectors. The names are not read.
#[repr(C)]
struct BlkpgPartition {
    start: i64,
    length: i64,
    number: c_int,
    device_name: [u8; 64],
    volume_name: [u8; 64],
}

const _: () = assert!(size_of::<BlkpgPartition>() == 152 && size_of::<BlkpgArgument>() == 24);

/// `BLKPG_ADD_PARTITION`: tells the kernel of a partition of the disk, in bytes; the disk's table stays as it is.
///
/// # Errors
/// `EBUSY`: there is one of this number, or one that overlaps. `EINVAL`: not within the disk.
pub fn blkpg_add(disk: impl AsFd, number: i32, start: u64, length: u64) -> Result<(), Errno> {
    blkpg(disk, 1, number, start, length)
}

/// `BLKPG_DEL_PARTITION`: takes it back.
///
/// # Errors
/// `EBUSY`: somebody uses it. `ENXIO`: there is none.
pub fn blkpg_delete(disk: impl AsFd, number: i32) -> Result<(), Errno> {
    blkpg(disk, 2, number, 0, 0)
}

fn blkpg(disk: impl AsFd, operation: c_int, number: i32, start: u64, length: u64) -> Result<(), Errno> {
    let mut partition = BlkpgPartition {
        start: i64::try_from(start).map_err(|_| Errno::EINVAL)?,
        length: i64::try_from(length).map_err(|_| Errno::EINVAL)?,
        number,
        device_name: [0; 64],
        volume_name: [0; 64],
    };
    let argument = BlkpgArgument {
        operation,
        flags: 0,
        length: c_int::try_from(size_of::<BlkpgPartition>()).map_err(|_| Errno::EINVAL)?,
        data: &raw mut partition,
    };
    // SAFETY: the descriptor is open for the call; the argument and the partition that it points to live as long, and
    // have the layout that the kernel reads.
    unsafe { raw::blkpg(disk.as_fd().as_raw_fd(), &raw const argument) }?;
    Ok(())
}

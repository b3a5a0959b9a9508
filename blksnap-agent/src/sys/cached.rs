//! Cached: what the page cache can tell and give without waiting for a disk.

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::statfs::{FsType, HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};

/// Bytes of a page as cachestat(2) counts them.
fn page() -> u64 {
    // SAFETY: sysconf has no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(4096).max(1)
}

/// `RAMFS_MAGIC` of include/uapi/linux/magic.h.
const RAMFS: FsType = FsType(0x8584_58f6);

/// Whether a file's content is memory and nothing else: tmpfs, memfd, ramfs, hugetlbfs. Reading it never waits for a
/// disk, unless it was swapped out.
#[must_use]
pub fn is_memory(file: &File) -> bool {
    fstatfs(file).is_ok_and(|found| [TMPFS_MAGIC, HUGETLBFS_MAGIC, RAMFS].contains(&found.filesystem_type()))
}

/// Reads as preadv2(2) with `RWF_NOWAIT` does: what is in the page cache, and nothing else.
///
/// # Errors
/// `EAGAIN` if nothing is cached, `EOPNOTSUPP` if the file system can't tell.
pub fn read_now(file: &File, buffer: &mut [u8], offset: u64) -> Result<usize, Errno> {
    let offset = libc::off_t::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
    let part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: `part` describes `buffer`, which is ours to write for the length of the call; the descriptor is open
    // for the life of `file`.
    let count = unsafe { libc::preadv2(file.as_raw_fd(), &raw const part, 1, offset, libc::RWF_NOWAIT) };
    Errno::result(count).map(isize::unsigned_abs)
}

/// Whether the kernel lost something that was written to `file` through the page cache since the file was opened, or
/// since this or fsync(2) said so last: sync_file_range(2) of a range in which there is nothing to wait for tells only
/// that (`file_check_and_advance_wb_err`).
///
/// # Errors
/// What the disk answered, `EIO` or `ENOSPC`; the kernel says it once.
pub fn written_back(file: &File) -> Result<(), Errno> {
    /// Behind the end of every file.
    const NOWHERE: libc::off64_t = 1 << 62;
    // SAFETY: no memory is handed over; the descriptor is open for the life of `file`.
    let result =
        unsafe { libc::sync_file_range(file.as_raw_fd(), NOWHERE, 4096, libc::SYNC_FILE_RANGE_WAIT_BEFORE) };
    Errno::result(result).map(drop)
}

/// `struct cachestat_range` of include/uapi/linux/mman.h.
#[repr(C)]
struct Range {
    offset: u64,
    length: u64,
}

/// `struct cachestat` of include/uapi/linux/mman.h.
#[repr(C)]
#[derive(Default)]
struct Stat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Number of cachestat(2) on every architecture (Linux 6.5).
const CACHESTAT: libc::c_long = 451;

/// Whether every page of the range is in the page cache; `None` if the kernel can't tell.
#[must_use]
pub fn is_cached(file: &File, offset: u64, length: u64) -> Option<bool> {
    let page = page();
    let range = Range { offset, length };
    let mut stat = Stat::default();
    // SAFETY: both structs are laid out as the kernel's and live through the call; the descriptor is open.
    let result = unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut stat, 0) };
    if result != 0 || length == 0 {
        return None;
    }
    let last = offset.checked_add(length)? - 1;
    Some(stat.cached > last / page - offset / page)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn what_was_just_written_is_cached() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 100_000]).unwrap();
        assert_ne!(is_cached(&file, 1000, 90_000), Some(false));
        let mut buffer = [0; 5000];
        match read_now(&file, &mut buffer, 3000) {
            Ok(count) => assert!(count > 0 && buffer[..count].iter().all(|byte| *byte == 7)),
            Err(errno) => assert!([Errno::EOPNOTSUPP, Errno::EAGAIN].contains(&errno), "{errno}"),
        }
    }

    #[test]
    fn what_was_not_lost_is_not_said_to_be() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 100_000]).unwrap();
        written_back(&file).unwrap();
        file.sync_all().unwrap();
        written_back(&file).unwrap();
    }

    #[test]
    fn a_hole_is_not_cached_before_it_is_read() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        assert_ne!(is_cached(&file, 0, 1 << 20), Some(true));
    }

    #[test]
    fn files_in_memory_are_known() {
        let name = c"blksnap-test";
        let memory = nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
        assert!(is_memory(&File::from(memory)));
        assert!(!is_memory(&File::open("/proc/self/stat").unwrap()));
    }
}

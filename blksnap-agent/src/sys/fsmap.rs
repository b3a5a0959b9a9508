//! GETFSMAP: what a file system knows of the blocks of its device (`linux/fsmap.h`). XFS and ext4 have it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;
use nix::sys::stat::{major, minor};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::units::Extent;

/// Records asked for at a time.
const BATCH: usize = 256;

/// `FMR_OF_SPECIAL_OWNER`: the owner is no inode but one of `FMR_OWN_*`.
const SPECIAL_OWNER: u32 = 0x10;
/// `FMR_OF_LAST`: the last record of the file system.
const LAST: u32 = 0x20;
/// `FMR_OWN_FREE`: nobody's.
const OWN_FREE: u64 = 1;

/// `struct fsmap`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Record {
    device: u32,
    flags: u32,
    physical: u64,
    owner: u64,
    offset: u64,
    length: u64,
    reserved: [u64; 3],
}

/// `struct fsmap_head` with room for [`BATCH`] records.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Request {
    iflags: u32,
    oflags: u32,
    count: u32,
    entries: u32,
    reserved: [u64; 6],
    keys: [Record; 2],
    records: [Record; BATCH],
}

/// Size of `struct fsmap_head` without records, which is in the number of the ioctl.
const HEADER: usize = 192;

const _: () = {
    assert!(size_of::<Record>() == 64);
    assert!(size_of::<Request>() == HEADER + 64 * BATCH);
};

/// `FS_IOC_GETFSMAP`: the free ranges of at least `least` bytes of the device that the file system of `file` is on, in
/// bytes of that device, ascending. They are those of a moment.
///
/// # Errors
/// `ENOTTY`, `EOPNOTSUPP`: the file system can't tell; `EPERM`: no `CAP_SYS_ADMIN`.
pub fn free_ranges(file: &File, least: u64) -> Result<Vec<Extent>, Errno> {
    let device = encoded(file.metadata().map_err(|error| errno(&error))?.dev());
    let mut found: Vec<Extent> = Vec::new();
    let mut low = Record::default();
    let high = Record {
        device: u32::MAX,
        flags: u32::MAX,
        physical: u64::MAX,
        owner: u64::MAX,
        offset: u64::MAX,
        ..Record::default()
    };
    loop {
        let mut request = Box::new(Request {
            iflags: 0,
            oflags: 0,
            #[expect(clippy::cast_possible_truncation, reason = "a small constant")]
            count: BATCH as u32,
            entries: 0,
            reserved: [0; 6],
            keys: [low, high],
            records: [Record::default(); BATCH],
        });
        // SAFETY: the descriptor is open for the call, and the kernel writes at most `count` records, for which
        // `request` has room.
        Errno::result(unsafe {
            libc::ioctl(
                file.as_raw_fd(),
                nix::request_code_readwrite!(b'X', 59, HEADER),
                &raw mut *request,
            )
        })?;
        let records = &request.records[..BATCH.min(request.entries as usize)];
        let free = |record: &&Record| {
            record.device == device && record.flags & SPECIAL_OWNER != 0 && record.owner == OWN_FREE
        };
        found.extend(records.iter().filter(free).map(|record| Extent {
            offset: record.physical,
            length: record.length,
        }));
        match records.last() {
            Some(last) if last.flags & LAST == 0 => {
                if (last.device, last.physical) < (low.device, low.physical) {
                    // It would never end.
                    return Err(Errno::EBADR);
                }
                // The kernel goes on behind it.
                low = *last;
            }
            _ => break,
        }
    }
    found.sort_unstable();
    found.dedup_by(|next, previous| {
        let joins = next.offset <= previous.end();
        if joins {
            previous.length = previous.end().max(next.end()) - previous.offset;
        }
        joins
    });
    found.retain(|range| range.length >= least);
    Ok(found)
}

/// A device number as the kernel gives it to users in 32 bits (`new_encode_dev`).
fn encoded(dev: u64) -> u32 {
    let (major, minor) = (major(dev), minor(dev));
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the kernel's majors have 12 bits, its minors 20"
    )]
    let number = ((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)) as u32;
    number
}

fn errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_those_of_the_kernel() {
        assert_eq!(encoded(nix::sys::stat::makedev(8, 1)), 0x801);
        assert_eq!(encoded(nix::sys::stat::makedev(259, 0x12345)), 0x1231_0345);
    }
}

//! FIEMAP: where the bytes of a file are on its device (`linux/fiemap.h`).

use std::fs::File;
use std::os::fd::AsRawFd;

use bitflags::bitflags;
use nix::errno::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `FIEMAP_FLAG_SYNC`: write the file back first.
const FLAG_SYNC: u32 = 1;

/// Extents asked for at a time.
const BATCH: usize = 128;

bitflags! {
    /// What an extent is (`FIEMAP_EXTENT_*`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ExtentFlags: u32 {
        /// The last one of the file.
        const LAST = 0x1;
        /// Where it is, is not known.
        const UNKNOWN = 0x2;
        /// It is not allocated yet.
        const DELALLOC = 0x4;
        /// Its bytes on the device are not the file's: compressed, say.
        const ENCODED = 0x8;
        /// Encrypted; as long as the file's.
        const DATA_ENCRYPTED = 0x80;
        /// It begins or ends within a block.
        const NOT_ALIGNED = 0x100;
        /// Among the file system's own data.
        const DATA_INLINE = 0x200;
        /// In a block with the ends of other files.
        const DATA_TAIL = 0x400;
        /// Allocated, and reads as zeroes.
        const UNWRITTEN = 0x800;
        /// Made up of several smaller ones.
        const MERGED = 0x1000;
        /// Other files have it, too.
        const SHARED = 0x2000;
        /// Flags of later kernels.
        const _ = !0;
    }
}

/// `struct fiemap_extent`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

/// `struct fiemap` with room for [`BATCH`] extents.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawMap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [RawExtent; BATCH],
}

const _: () = {
    assert!(size_of::<RawExtent>() == 56);
    assert!(size_of::<RawMap>() == 32 + 56 * BATCH);
};

/// Size of `struct fiemap` without extents, which is in the number of the ioctl.
const HEADER: usize = 32;

/// A piece of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileExtent {
    /// Where it begins in the file, in bytes.
    pub logical: u64,
    /// Where it begins in the address space of the file system, in bytes.
    pub physical: u64,
    /// Bytes.
    pub length: u64,
    /// What it is.
    pub flags: ExtentFlags,
}

/// `FS_IOC_FIEMAP`: all extents of `file`, after it was written back.
///
/// # Errors
/// `EOPNOTSUPP`: the file system can't tell; `EBADR`: not after writing back; what writing back says.
pub fn fiemap(file: &File) -> Result<Vec<FileExtent>, Errno> {
    let mut found = Vec::new();
    let mut start = 0;
    loop {
        let mut map = Box::new(RawMap {
            start,
            length: u64::MAX - start,
            flags: FLAG_SYNC,
            mapped_extents: 0,
            #[expect(clippy::cast_possible_truncation, reason = "a small constant")]
            extent_count: BATCH as u32,
            reserved: 0,
            extents: [RawExtent::default(); BATCH],
        });
        // SAFETY: the descriptor is open for the call, and the kernel writes at most `extent_count` extents, for
        // which `map` has room.
        Errno::result(unsafe {
            libc::ioctl(
                file.as_raw_fd(),
                nix::request_code_readwrite!(b'f', 11, HEADER),
                &raw mut *map,
            )
        })?;
        let batch = &map.extents[..BATCH.min(map.mapped_extents as usize)];
        for raw in batch {
            found.push(FileExtent {
                logical: raw.logical,
                physical: raw.physical,
                length: raw.length,
                flags: ExtentFlags::from_bits_retain(raw.flags),
            });
        }
        match batch.last() {
            Some(last) if last.flags & ExtentFlags::LAST.bits() == 0 => {
                let next = last.logical.saturating_add(last.length);
                if next <= start {
                    // It would never end.
                    return Err(Errno::EBADR);
                }
                start = next;
            }
            _ => return Ok(found),
        }
    }
}

/// `FS_IOC_FSGETXATTR`: whether the file's data is on the realtime device of XFS (`FS_XFLAG_REALTIME`).
///
/// # Errors
/// `ENOTTY`: the file system has no such attributes.
pub fn is_realtime(file: &File) -> Result<bool, Errno> {
    /// `struct fsxattr` in `linux/fs.h`.
    #[derive(Clone, Copy, Default)]
    #[repr(C)]
    struct Attributes {
        flags: u32,
        rest: [u32; 6],
    }
    const _: () = assert!(size_of::<Attributes>() == 28);
    const REALTIME: u32 = 1;
    let mut attributes = Attributes::default();
    // SAFETY: the descriptor is open for the call, and the kernel writes one `struct fsxattr`.
    Errno::result(unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            nix::request_code_read!(b'X', 31, size_of::<Attributes>()),
            &raw mut attributes,
        )
    })?;
    Ok(attributes.flags & REALTIME != 0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn more_extents_than_a_batch_are_all_there() {
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        // Every second block is a hole.
        let wanted = 3 * BATCH as u64 / 2;
        for block in 0..wanted {
            file.write_all_at(&[7; 4096], block * 8192).unwrap();
        }
        let extents = match fiemap(&file) {
            Ok(extents) => extents,
            // The temporary directory may be on anything.
            Err(error) => {
                assert_eq!(error, Errno::EOPNOTSUPP);
                return;
            }
        };
        assert_eq!(extents.len() as u64, wanted);
        for (extent, block) in extents.iter().zip(0..) {
            assert_eq!((extent.logical, extent.length), (block * 8192, 4096));
        }
        assert!(extents.last().unwrap().flags.contains(ExtentFlags::LAST));
        assert!(!is_realtime(&file).unwrap_or_default());
    }

    #[test]
    fn an_empty_file_has_none() {
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        assert!(matches!(fiemap(&file), Ok(extents) if extents.is_empty()));
    }
}

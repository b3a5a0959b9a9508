//! Extents: the ranges of a tracked device that hold a file, so that they can be marked.
//!
//! `FIEMAP` answers in the address space of the file system. Only for some is that the device itself: ext2 to 4,
//! and XFS but for files on its realtime device. btrfs has addresses of its own, spread over several devices, and
//! others are not known; those are refused rather than guessed. A file system on a partition counts for its disk,
//! too. One on something stacked on the device (LVM, md, loop) does not: what is where decides the layer between.
//!
//! Ranges are rounded out to sectors: too much is marked rather than too little. They are those of the moment: a
//! file that is written meanwhile may have others afterwards, and what is written is tracked anyway.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::device::{BlockDevice, device_number};
use super::mounts::Table;
use crate::sys::fiemap::{self, ExtentFlags, FileExtent};
use crate::units::{DeviceId, Extent, SECTOR_BYTES};

/// File systems whose addresses are bytes of their device.
const KNOWN: [&str; 4] = ["ext2", "ext3", "ext4", "xfs"];

/// How often a file is asked that has extents without a place.
const ATTEMPTS: u32 = 5;

/// The ranges of a file on a device can't be told.
#[derive(Debug, thiserror::Error)]
pub enum ExtentsError {
    /// Nothing is at the path, or it can't be read.
    #[error("can't open {}: {source}", path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A directory, a device, a pipe.
    #[error("{} is not a regular file; give a file, or ranges of the device", .0.display())]
    NotFile(PathBuf),
    /// It is on another device.
    #[error("{} is not on {}; name the device that its file system is on", path.display(), device.display())]
    OtherDevice {
        /// The path.
        path: PathBuf,
        /// The device.
        device: PathBuf,
    },
    /// The file system's addresses are not the device's.
    #[error(
        "{} is on {kind}, which does not tell where on the device its files are; give ranges of the device",
        path.display()
    )]
    Kind {
        /// The path.
        path: PathBuf,
        /// Kind of file system.
        kind: String,
    },
    /// A part of the file has no place, or one that says nothing.
    #[error(
        "a part of {} has no place on the device that could be told ({why}); try again when nobody writes it, or give ranges",
        path.display()
    )]
    NoPlace {
        /// The path.
        path: PathBuf,
        /// What it is.
        why: &'static str,
    },
    /// The file has no block of its own for some of its bytes.
    #[error(
        "{} can't be difference storage: {why}; make a new one with `fallocate -l SIZE`, or give a directory",
        path.display()
    )]
    NotOwn {
        /// The path.
        path: PathBuf,
        /// What is wrong.
        why: &'static str,
    },
    /// The kernel does not tell.
    #[error("can't ask where {} is: {source}; give ranges of the device", path.display())]
    Map {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The ranges of `device` that hold the file at `path`, ascending, rounded out to sectors and joined where they
/// touch.
///
/// # Errors
/// See [`ExtentsError`].
pub fn of_file(device: &BlockDevice, path: &Path) -> Result<Vec<Extent>, ExtentsError> {
    let opened = |source| ExtentsError::Open {
        path: path.to_owned(),
        source,
    };
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(opened)?;
    let metadata = file.metadata().map_err(opened)?;
    if !metadata.is_file() {
        return Err(ExtentsError::NotFile(path.to_owned()));
    }
    check_kind(&file, path)?;
    let first_byte = place(device, &metadata).ok_or_else(|| ExtentsError::OtherDevice {
        path: path.to_owned(),
        device: device.path.clone(),
    })?;
    find(&file, path, first_byte)
}

/// The device of the file system that has `file`, and the ranges of it that hold the file; as [`of_file`]. The path is
/// for messages.
///
/// # Errors
/// See [`ExtentsError`].
pub fn of_open_file(file: &File, path: &Path) -> Result<(DeviceId, Vec<Extent>), ExtentsError> {
    check_kind(file, path)?;
    let metadata = file.metadata().map_err(|source| ExtentsError::Open {
        path: path.to_owned(),
        source,
    })?;
    Ok((device_number(metadata.dev()), find(file, path, 0)?))
}

/// The ranges of its file system's device that hold `file`, in the order of the file, if all its bytes have blocks that
/// are the file's alone and hold nothing but them: who writes to these ranges writes to this file. Those that touch are
/// one. The path is for messages.
///
/// # Errors
/// See [`ExtentsError`].
pub fn of_own_file(file: &File, path: &Path) -> Result<Vec<Extent>, ExtentsError> {
    check_kind(file, path)?;
    let length = file.metadata().map_err(|source| ExtentsError::Open {
        path: path.to_owned(),
        source,
    });
    let length = length?.len();
    sync(file, path)?;
    let extents = fiemap::fiemap(file).map_err(|errno| ExtentsError::Map {
        path: path.to_owned(),
        source: errno.into(),
    })?;
    own_ranges(&extents, length).map_err(|why| ExtentsError::NotOwn {
        path: path.to_owned(),
        why,
    })
}

/// The ranges of a file of `length` bytes that is all there, or why it is not.
fn own_ranges(extents: &[FileExtent], length: u64) -> Result<Vec<Extent>, &'static str> {
    /// What says that a range has bytes of others, or not those of the file.
    const WRONG: [(ExtentFlags, &str); 8] = [
        (
            ExtentFlags::DATA_INLINE,
            "its bytes are among the file system's own",
        ),
        (ExtentFlags::DATA_TAIL, "it shares a block with other files"),
        (
            ExtentFlags::SHARED,
            "other files share blocks with it (a copy by reference, or a snapshot)",
        ),
        (ExtentFlags::DATA_ENCRYPTED, "it is encrypted"),
        (ExtentFlags::ENCODED, "it is compressed or encrypted"),
        (ExtentFlags::DELALLOC, "a part of it is not allocated yet"),
        (
            ExtentFlags::UNKNOWN,
            "a part of it has no place that could be told",
        ),
        (ExtentFlags::NOT_ALIGNED, "it does not have whole blocks"),
    ];
    let mut found: Vec<Extent> = Vec::new();
    let mut next = 0;
    for extent in extents {
        if let Some((_, why)) = WRONG.iter().find(|(flag, _)| extent.flags.intersects(*flag)) {
            return Err(why);
        }
        if extent.logical > next {
            return Err("it has holes");
        }
        next = extent.logical.checked_add(extent.length).ok_or("out of range")?;
        let end = extent.physical.checked_add(extent.length).ok_or("out of range")?;
        match found.last_mut() {
            Some(last) if last.end() == extent.physical => last.length = end - last.offset,
            _ => found.push(Extent {
                offset: extent.physical,
                length: extent.length,
            }),
        }
    }
    if next < length {
        return Err("it has holes");
    }
    found.retain(|range| range.length > 0);
    Ok(found)
}

/// Refuses file systems whose addresses are not known to be bytes of their device.
fn check_kind(file: &File, path: &Path) -> Result<(), ExtentsError> {
    let kind = Table::read()
        .map_err(io::Error::other)
        .and_then(|table| Ok(table.of_file(file)?.fs_type.clone()))
        .map_err(|source| ExtentsError::Open {
            path: path.to_owned(),
            source,
        })?;
    if !KNOWN.contains(&kind.as_str()) || fiemap::is_realtime(file).unwrap_or_default() {
        return Err(ExtentsError::Kind {
            path: path.to_owned(),
            kind,
        });
    }
    Ok(())
}

/// The ranges of a file in a file system that begins at `first_byte`.
fn find(file: &File, path: &Path, first_byte: u64) -> Result<Vec<Extent>, ExtentsError> {
    let mut attempt = 1;
    loop {
        let extents = fiemap::fiemap(file).map_err(|errno| ExtentsError::Map {
            path: path.to_owned(),
            source: errno.into(),
        })?;
        match ranges(&extents, first_byte) {
            Ok(ranges) => return Ok(ranges),
            Err(_) if attempt < ATTEMPTS => {
                attempt += 1;
                sync(file, path)?;
            }
            Err(why) => {
                return Err(ExtentsError::NoPlace {
                    path: path.to_owned(),
                    why,
                });
            }
        }
    }
}

fn sync(file: &File, path: &Path) -> Result<(), ExtentsError> {
    file.sync_all().map_err(|source| ExtentsError::Map {
        path: path.to_owned(),
        source,
    })
}

/// Where the file system of a file begins on the device: the device is what it is on, or the disk of that.
fn place(device: &BlockDevice, file: &std::fs::Metadata) -> Option<u64> {
    let id = device_number(file.dev());
    if id == device.id {
        return Some(0);
    }
    if !device.is_whole_disk() {
        return None;
    }
    let partition = super::device::sysfs_directory(id).ok()?;
    let disk = partition.parent()?.join("dev");
    let on_it = partition.join("partition").exists()
        && std::fs::read_to_string(disk).ok()?.trim() == device.id.to_string();
    let start: u64 = std::fs::read_to_string(partition.join("start"))
        .ok()?
        .trim()
        .parse()
        .ok()?;
    on_it.then_some(start * SECTOR_BYTES)
}

/// The ranges of extents of a file system that begins at `first_byte`, or what one of them is that has no place.
fn ranges(extents: &[FileExtent], first_byte: u64) -> Result<Vec<Extent>, &'static str> {
    let mut found: Vec<Extent> = Vec::with_capacity(extents.len());
    for extent in extents {
        if extent.flags.contains(ExtentFlags::DELALLOC) {
            return Err("not allocated yet");
        }
        if extent.flags.contains(ExtentFlags::UNKNOWN) {
            return Err("unknown");
        }
        // Encrypted bytes are as many, and in the same place.
        if extent.flags.contains(ExtentFlags::ENCODED) && !extent.flags.contains(ExtentFlags::DATA_ENCRYPTED)
        {
            return Err("encoded");
        }
        let start = first_byte.checked_add(extent.physical).ok_or("out of range")?;
        let end = start.checked_add(extent.length).ok_or("out of range")?;
        let offset = start / SECTOR_BYTES * SECTOR_BYTES;
        let end = end.checked_next_multiple_of(SECTOR_BYTES).ok_or("out of range")?;
        if end > offset {
            found.push(Extent {
                offset,
                length: end - offset,
            });
        }
    }
    Ok(joined(found))
}

/// The ranges ascending and apart: those that touch or overlap become one.
#[must_use]
pub fn joined(mut ranges: Vec<Extent>) -> Vec<Extent> {
    ranges.sort_unstable();
    ranges.dedup_by(|next, previous| {
        let joins = next.offset <= previous.end();
        if joins {
            previous.length = previous.end().max(next.end()) - previous.offset;
        }
        joins
    });
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(physical: u64, length: u64, flags: ExtentFlags) -> FileExtent {
        FileExtent {
            logical: 0,
            physical,
            length,
            flags,
        }
    }

    fn pairs(extents: &[FileExtent], first_byte: u64) -> Result<Vec<(u64, u64)>, &'static str> {
        let found = ranges(extents, first_byte)?;
        Ok(found.iter().map(|range| (range.offset, range.length)).collect())
    }

    #[test]
    fn ranges_are_on_the_device_ascending_and_apart() {
        let none = ExtentFlags::empty();
        let extents = [
            extent(8192, 4096, none),
            extent(0, 4096, ExtentFlags::SHARED),
            extent(4096, 4096, ExtentFlags::UNWRITTEN),
            extent(65536, 512, ExtentFlags::MERGED | ExtentFlags::LAST),
        ];
        assert_eq!(pairs(&extents, 0), Ok(vec![(0, 12288), (65536, 512)]));
        assert_eq!(
            pairs(&extents, 1 << 20),
            Ok(vec![(1 << 20, 12288), ((1 << 20) + 65536, 512)])
        );
        assert_eq!(pairs(&[], 0), Ok(Vec::new()));
    }

    #[test]
    fn what_is_not_aligned_is_rounded_out() {
        let inline = ExtentFlags::DATA_INLINE | ExtentFlags::NOT_ALIGNED;
        // Inline data in an inode, over the end of a sector.
        assert_eq!(pairs(&[extent(1000, 60, inline)], 0), Ok(vec![(512, 1024)]));
        assert_eq!(
            pairs(&[extent(1024, 1, ExtentFlags::DATA_TAIL)], 512),
            Ok(vec![(1536, 512)])
        );
    }

    #[test]
    fn what_has_no_place_is_never_guessed() {
        for (flags, why) in [
            (ExtentFlags::DELALLOC | ExtentFlags::UNKNOWN, "not allocated yet"),
            (ExtentFlags::UNKNOWN, "unknown"),
            (ExtentFlags::ENCODED, "encoded"),
        ] {
            assert_eq!(pairs(&[extent(0, 512, flags)], 0), Err(why));
        }
        let encrypted = ExtentFlags::ENCODED | ExtentFlags::DATA_ENCRYPTED;
        assert_eq!(pairs(&[extent(0, 512, encrypted)], 0), Ok(vec![(0, 512)]));
        assert_eq!(
            pairs(&[extent(u64::MAX, 512, ExtentFlags::empty())], 0),
            Err("out of range")
        );
    }

    #[test]
    fn a_file_that_is_all_its_own_has_all_its_ranges() {
        let piece = |logical, physical, length, flags| FileExtent {
            logical,
            physical,
            length,
            flags,
        };
        let unwritten = ExtentFlags::UNWRITTEN;
        let whole = [
            piece(0, 65536, 4096, unwritten),
            piece(4096, 69632, 4096, ExtentFlags::empty()),
            piece(8192, 8192, 4096, unwritten | ExtentFlags::LAST),
        ];
        let at = |offset, length| Extent { offset, length };
        assert_eq!(
            own_ranges(&whole, 12000),
            Ok(vec![at(65536, 8192), at(8192, 4096)])
        );
        assert_eq!(own_ranges(&[], 0), Ok(Vec::new()));
        let holes = Err("it has holes");
        assert_eq!(own_ranges(&whole, 12289), holes);
        assert_eq!(own_ranges(&whole[1..], 12288), holes);
        assert_eq!(own_ranges(&[whole[0], whole[2]], 12288), holes);
        for flags in [
            ExtentFlags::SHARED,
            ExtentFlags::DATA_INLINE | ExtentFlags::NOT_ALIGNED,
            ExtentFlags::DELALLOC,
            ExtentFlags::UNKNOWN,
            ExtentFlags::ENCODED,
            ExtentFlags::DATA_ENCRYPTED,
            ExtentFlags::DATA_TAIL,
        ] {
            assert!(
                own_ranges(&[piece(0, 4096, 4096, flags)], 4096).is_err(),
                "{flags:?}"
            );
        }
        assert!(own_ranges(&[piece(0, u64::MAX, 4096, unwritten)], 4096).is_err());
    }

    #[test]
    fn what_is_no_file_on_the_device_is_refused() {
        let device = BlockDevice {
            path: "/dev/sdz".into(),
            name: "sdz".to_owned(),
            id: crate::units::DeviceId { major: 8, minor: 400 },
            disk_id: crate::units::DeviceId { major: 8, minor: 400 },
            disk_name: "sdz".to_owned(),
            disk_path: "/dev/sdz".into(),
            first_sector: crate::units::Sectors::new(0),
            capacity: crate::units::Sectors::new(8),
            logical_block: 512,
            physical_block: 512,
            minimum_io: 512,
            diskseq: None,
            read_only: false,
        };
        let error = |path: &str| of_file(&device, Path::new(path)).unwrap_err().to_string();
        assert!(error("/no/such/file").starts_with("can't open /no/such/file: "));
        assert!(error("/proc").contains("is not a regular file"));
        assert!(error("/proc/version").contains("/proc/version is on proc, which does not tell"));
    }
}

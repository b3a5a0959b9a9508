//! Direct reader: reads a device as the disk has it.
//!
//! Reads go through the node of the *whole disk* with `O_DIRECT`, at absolute offsets. The page cache of a
//! partition's node, which a file system or a raw writer may be using, is then neither filled nor written back
//! nor dropped by them. (A direct read writes back the dirty pages of the node it goes through, in its range.)
//!
//! Callers ask for ranges of the device; this module adds where the device begins, checks the range, and says in
//! every error which device and which bytes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};

use super::device::device_number;
use super::{BlockDevice, DiskError};
use crate::sys::{AlignedBuffer, ioctl};
use crate::units::Extent;

/// A device, open for direct reads.
#[derive(Debug)]
pub struct DirectReader {
    disk: File,
    /// Name for messages.
    name: String,
    /// First byte on the disk.
    start: u64,
    /// Length in bytes.
    length: u64,
    logical_block: u64,
}

impl DirectReader {
    /// Opens `device`.
    ///
    /// # Errors
    /// The node can't be opened, or is no longer the device that `device` describes.
    pub fn open(device: &BlockDevice) -> Result<Self, DiskError> {
        let path = &device.disk_path;
        let failed = |source: io::Error| DiskError::Open {
            path: path.clone(),
            source,
        };
        let disk = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(path)
            .map_err(failed)?;
        let metadata = disk.metadata().map_err(failed)?;
        let same_number = device_number(metadata.rdev()) == device.disk_id;
        let same_disk = device.diskseq.is_none_or(|known| {
            // Kernels before 5.15 have neither the attribute nor the ioctl.
            ioctl::blkgetdiskseq(&disk).is_ok_and(|now| now == known)
        });
        let size = ioctl::blkgetsize64(&disk).map_err(|errno| failed(errno.into()))?;
        let large_enough = size >= device.first_sector.bytes() + device.capacity.bytes();
        if !same_number || !same_disk || !large_enough {
            return Err(DiskError::Replaced { path: path.clone() });
        }
        let logical_block = u64::from(device.logical_block);
        let length = device.capacity.bytes();
        if !length.is_multiple_of(logical_block) || !device.first_sector.bytes().is_multiple_of(logical_block)
        {
            return Err(DiskError::Unaligned {
                path: device.path.clone(),
                logical_block: device.logical_block,
            });
        }
        Ok(Self {
            disk,
            name: device.path.display().to_string(),
            start: device.first_sector.bytes(),
            length,
            logical_block,
        })
    }

    /// Length of the device in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Name of the device, for messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `extent` grown to whole logical blocks, as direct reads want it, and cut at the device's end.
    #[must_use]
    pub fn aligned(&self, extent: Extent) -> Extent {
        let offset = extent.offset - extent.offset % self.logical_block;
        let end = extent.end().next_multiple_of(self.logical_block).min(self.length);
        Extent {
            offset,
            length: end.saturating_sub(offset),
        }
    }

    /// The open disk and the offset on it of the device's byte `offset`, for a caller that submits the reads.
    #[must_use]
    pub fn raw(&self, offset: u64) -> (BorrowedFd<'_>, u64) {
        (self.disk.as_fd(), self.start + offset)
    }

    /// Fills the first `length` bytes of `buffer` from byte `offset` of the device on.
    ///
    /// # Errors
    /// The range is not within the device or not aligned to logical blocks, or the disk fails.
    pub fn read(&self, buffer: &mut AlignedBuffer, offset: u64, length: usize) -> io::Result<()> {
        let within = offset
            .checked_add(length as u64)
            .is_some_and(|end| end <= self.length)
            && length <= buffer.len();
        if !within {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let mut done = 0;
        while done < length {
            let position = self.start + offset + done as u64;
            match self
                .disk
                .read_at(&mut buffer.as_mut_slice()[done..length], position)
            {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

//! Geometry: sizes of a served device, as its block device has them.

use std::fs::File;

use super::UblkError;
use crate::filter::served::Served;
use crate::sys::ioctl;

/// Largest logical block that the driver takes, that of a page.
const LARGEST_LOGICAL: u32 = 4096;
/// Physical block of a regular file: what the page cache reads and writes.
const FILE_PHYSICAL: u32 = 4096;
/// Largest sizes that are passed on; file systems may take them for their own.
const LARGEST_PHYSICAL: u32 = 64 << 10;
const LARGEST_MINIMUM: u32 = 1 << 20;

/// Sizes in bytes; all but that of the device are powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) size: u64,
    pub(super) logical: u32,
    pub(super) physical: u32,
    /// Smallest I/O that costs no read.
    pub(super) minimum: u32,
}

impl Geometry {
    /// Those of the origin.
    ///
    /// # Errors
    /// The driver can't have them.
    pub(super) fn of(served: &Served) -> Result<Self, UblkError> {
        let disk = served.origin().disk();
        // A regular file has no such thing.
        let physical = File::open(served.path())
            .ok()
            .and_then(|file| ioctl::blkpbszget(file).ok());
        Self::new(served.size(), disk.logical_block(), physical, disk.minimum_io())
    }

    fn new(size: u64, logical: u32, physical: Option<u32>, minimum: u32) -> Result<Self, UblkError> {
        if logical > LARGEST_LOGICAL {
            return Err(UblkError::LogicalBlock(logical));
        }
        if size == 0 || !size.is_multiple_of(u64::from(logical)) {
            return Err(UblkError::Size { size, logical });
        }
        let physical = physical
            .filter(|bytes| bytes.is_power_of_two())
            .unwrap_or(FILE_PHYSICAL)
            .clamp(logical, LARGEST_PHYSICAL);
        Ok(Self {
            size,
            logical,
            physical,
            minimum: minimum.clamp(physical, LARGEST_MINIMUM),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes_are_those_of_the_origin() {
        let geometry =
            |logical, physical, minimum| Geometry::new(1 << 20, logical, physical, minimum).unwrap();
        let sizes = |g: Geometry| (g.logical, g.physical, g.minimum);
        assert_eq!(sizes(geometry(512, Some(512), 512)), (512, 512, 512));
        assert_eq!(sizes(geometry(512, Some(4096), 4096)), (512, 4096, 4096));
        assert_eq!(sizes(geometry(4096, Some(4096), 65536)), (4096, 4096, 65536));
        // A file.
        assert_eq!(sizes(geometry(512, None, 4096)), (512, 4096, 4096));
        // One on a file system that prefers long I/O.
        assert_eq!(sizes(geometry(512, None, 1 << 24)), (512, 4096, 1 << 20));
        // What a device should not say.
        assert_eq!(sizes(geometry(4096, Some(512), 512)), (4096, 4096, 4096));
        assert_eq!(sizes(geometry(512, Some(3), 512)), (512, 4096, 4096));
    }

    #[test]
    fn what_the_driver_can_not_have_is_refused() {
        assert!(matches!(
            Geometry::new(1 << 20, 8192, None, 8192),
            Err(UblkError::LogicalBlock(8192))
        ));
        assert!(matches!(
            Geometry::new(5120, 4096, None, 4096),
            Err(UblkError::Size {
                size: 5120,
                logical: 4096
            })
        ));
        assert!(Geometry::new(0, 512, None, 512).is_err());
    }
}

//! Probe: what the tracker asks of a device itself.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use crate::disk::BlockDevice;
use crate::units::SECTOR_BYTES;

/// Alignment and length that every logical block size up to 4 KiB divides.
const PAGE: usize = 4096;

/// Reads the first sectors of the device past the page cache, through its whole disk.
pub(super) fn direct_read(device: &BlockDevice) -> io::Result<()> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(&device.disk_path)?;
    let block = u64::from(device.logical_block).max(SECTOR_BYTES);
    let bytes = usize::try_from(block).map_err(io::Error::other)?;
    let alignment = PAGE.max(bytes);
    let mut memory = vec![0_u8; alignment + bytes];
    let start = memory.as_ptr().align_offset(alignment);
    let offset = device.first_sector.bytes().next_multiple_of(block);
    file.read_exact_at(&mut memory[start..start + bytes], offset)
}

/// What the programs must know of a disk's driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DiskKind {
    /// Sectors in a zone of a zoned disk, 0 for another one.
    pub(crate) zone_sectors: u32,
    /// The driver works on requests.
    pub(crate) requests: bool,
}

/// Looks the driver up (`queue/zoned` and `queue/chunk_sectors` in `Documentation/ABI/stable/sysfs-block`; a
/// request queue shows its hardware queues in `mq`, `blk_mq_sysfs_register`).
pub(crate) fn disk_kind(device: &BlockDevice) -> DiskKind {
    let disk = format!("/sys/dev/block/{}", device.disk_id);
    let attribute = |name: &str| fs::read_to_string(format!("{disk}/queue/{name}")).unwrap_or_default();
    let zone_sectors = match attribute("zoned").trim() {
        "" | "none" => 0,
        _ => attribute("chunk_sectors").trim().parse().unwrap_or(0),
    };
    DiskKind {
        zone_sectors,
        requests: fs::exists(format!("{disk}/mq")).unwrap_or(false),
    }
}

//! Own: difference storage that is on a snapshotted device itself.

use std::sync::Arc;

use super::files::{Devices, FileInUse, next_key};
use crate::cow::SnapshotKey;
use crate::disk::BlockDevice;
use crate::engine::cow::{Fence, Image};
use crate::filter::served::Served;
use crate::storage::{Own, StorageSpec};
use crate::units::{Extent, SECTOR_BYTES};

/// What these places have of a served block device, in bytes from its beginning. An image file has no sectors that
/// difference storage could be given.
pub(super) fn ranges_of(specs: &[StorageSpec], served: &Served) -> Vec<Extent> {
    let Ok(origin) = BlockDevice::open(served.path()) else {
        return Vec::new();
    };
    let mut own = Vec::new();
    for spec in specs {
        let StorageSpec::Device { path, ranges } = spec else {
            continue;
        };
        // One that is gone can't be opened as storage either.
        let Ok(device) = BlockDevice::open(path) else {
            continue;
        };
        if device.disk_id == origin.disk_id {
            let from = device.first_sector.count() * SECTOR_BYTES;
            let start = origin.first_sector.count() * SECTOR_BYTES;
            own.extend(
                ranges
                    .iter()
                    .filter_map(|range| common(range, from, start, served.size())),
            );
        }
    }
    own
}

/// Sectors of a member that hold old data of all of them: a write there by somebody else breaks every image, not only that
/// of the member.
#[derive(Debug)]
pub(super) struct Guard {
    served: Arc<Served>,
    key: SnapshotKey,
    fence: Arc<Fence>,
}

impl Guard {
    /// An image needs what is stored there.
    pub(super) fn used_by(&self, image: &Image) {
        if !self.fence.used_by(image.origin(), image.key()) {
            self.fence.break_off(image.origin(), image.key());
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.served.origin().give_back(self.key);
    }
}

/// Guards the ranges of these places that are on one of the devices.
pub(super) fn guards(specs: &[StorageSpec], devices: &[Arc<Served>]) -> Vec<Guard> {
    let guard = |served: &Arc<Served>| {
        let ranges = ranges_of(specs, served);
        if ranges.is_empty() {
            return None;
        }
        let origin = served.origin();
        let name = served.path().display().to_string();
        let guard = Guard {
            served: Arc::clone(served),
            key: next_key(),
            fence: Fence::new(name, Arc::clone(origin.disk()), served.before_own_write()),
        };
        origin.claim_again(guard.key, &guard.fence, &ranges);
        Some(guard)
    };
    devices.iter().filter_map(guard).collect()
}

/// The files on the devices that an agent before has made, with what is written down of them.
pub(super) fn files_again<'a>(
    specs: &'a [StorageSpec],
    devices: &[Arc<Served>],
    all: Option<&Arc<dyn Devices>>,
) -> Vec<(&'a Own, Arc<FileInUse>)> {
    let again = |spec: &'a StorageSpec| {
        let StorageSpec::Own(own) = spec else {
            return None;
        };
        let served = devices.iter().find(|served| served.name() == own.device)?;
        Some((own, FileInUse::again(own, served, all?)?))
    };
    specs.iter().filter_map(again).collect()
}

/// The part of a range of a device that begins at byte `from` of its disk that is on the origin, which begins at byte
/// `start` and has `size` bytes.
fn common(range: &Extent, from: u64, start: u64, size: u64) -> Option<Extent> {
    let first = (from + range.offset).max(start);
    let end = (from + range.end()).min(start + size);
    (first < end).then(|| Extent {
        offset: first - start,
        length: end - first,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_those_of_the_origin() {
        let extent = |offset, length| Extent { offset, length };
        // Of the device itself, of its disk, of a partition within it, and of another partition.
        assert_eq!(common(&extent(512, 1024), 0, 0, 4096), Some(extent(512, 1024)));
        assert_eq!(
            common(&extent(512, 1024), 1024, 1024, 4096),
            Some(extent(512, 1024))
        );
        assert_eq!(common(&extent(0, 8192), 0, 1024, 4096), Some(extent(0, 4096)));
        assert_eq!(common(&extent(0, 512), 2048, 1024, 4096), Some(extent(1024, 512)));
        assert_eq!(common(&extent(0, 1024), 0, 1024, 4096), None);
        assert_eq!(common(&extent(0, 1024), 5120, 1024, 4096), None);
    }
}

//! Files: difference storage on the very devices of a snapshot, in files that are used by their sectors.
//!
//! # Order
//! 1. From here on it is known which bytes of the device are written ([`Origin::watch`]).
//! 2. The file is noted, so that the next agent removes it; then it is allocated and made durable.
//! 3. Its sectors are claimed on the origin ([`Origin::claim`]): those that images may need are left out, and a write to
//!    the others is seen from here on.
//! 4. The file is looked up again. If it is where it was, nobody took the sectors from it before they were watched.
//!
//! What was free before the file was made, and not written until the instant, is nobody's in the image either: files
//! that are made later, when the storage grows, may have it.
//!
//! [`Origin::watch`]: crate::engine::cow::Origin::watch
//! [`Origin::claim`]: crate::engine::cow::Origin::claim

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{SnapshotError, places};
use crate::cow::SnapshotKey;
use crate::disk::{BlockDevice, Disk};
use crate::engine::cow::{Fence, Image};
use crate::filter::served::Served;
use crate::own::{Candidate, Helper, Kept, Make};
use crate::storage::{Numbered, Own, OwnFile, OwnPlace};
use crate::units::{DeviceId, Extent, SnapshotId};

/// Sectors are used from and to multiples of this.
const PAGE: u64 = 4096;

/// The served devices, and those of them that are block devices.
pub trait Devices: fmt::Debug + Send + Sync {
    /// The one of this name.
    fn served(&self, name: &str) -> Option<Arc<Served>>;

    /// Those that are block devices.
    fn nodes(&self) -> Vec<Candidate>;
}

/// Numbers of snapshots, of files and of what is watched, in the core.
pub(super) fn next_key() -> SnapshotKey {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    SnapshotKey(NEXT.fetch_add(1, Ordering::Relaxed))
}

/// What is written to a device is looked at, until this is dropped.
#[derive(Debug)]
pub(super) struct Watch {
    served: Arc<Served>,
    key: SnapshotKey,
}

impl Watch {
    fn begin(served: &Arc<Served>) -> Self {
        let key = next_key();
        served.origin().watch(key);
        Self {
            served: Arc::clone(served),
            key,
        }
    }

    /// Whether it is the device of this name that is watched.
    pub(super) fn is_of(&self, device: &str) -> bool {
        self.served.name() == device
    }

    /// The key, if it is this device that is watched.
    pub(super) fn key_of(&self, served: &Served) -> Option<SnapshotKey> {
        self.is_of(served.name()).then_some(self.key)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.served.origin().unwatch(self.key);
    }
}

/// A file in use. Dropped, its sectors are written no more.
#[derive(Debug)]
pub(super) struct FileInUse {
    served: Arc<Served>,
    key: SnapshotKey,
    fence: Arc<Fence>,
    devices: Arc<dyn Devices>,
}

impl FileInUse {
    fn new(served: &Arc<Served>, path: &Path, devices: &Arc<dyn Devices>) -> Arc<Self> {
        let name = format!("{} by its sectors", path.display());
        Arc::new(Self {
            served: Arc::clone(served),
            key: next_key(),
            fence: Fence::new(
                name,
                Arc::clone(served.origin().disk()),
                served.before_own_write(),
            ),
            devices: Arc::clone(devices),
        })
    }

    /// One that an agent before has made. Nothing may have been written to the device since.
    pub(super) fn again(own: &Own, served: &Arc<Served>, devices: &Arc<dyn Devices>) -> Option<Arc<Self>> {
        let file = own.file.as_ref()?;
        let in_use = Self::new(served, &file.path, devices);
        served
            .origin()
            .claim_again(in_use.key, &in_use.fence, &file.ranges);
        Some(in_use)
    }

    /// As the pool uses it.
    pub(super) fn place(self: &Arc<Self>) -> OwnPlace {
        OwnPlace {
            disk: Arc::clone(&self.fence) as Arc<dyn Disk>,
            numbered: Arc::clone(self) as Arc<dyn Numbered>,
        }
    }

    /// An image needs what is stored here.
    pub(super) fn used_by(&self, image: &Image) {
        let origin = image.origin();
        if !self.fence.used_by(origin, image.key()) {
            self.fence.break_off(origin, image.key());
        }
    }

    /// Its sectors are written no more, and belong to the images again.
    pub(super) fn end(&self) {
        self.served.origin().give_back(self.key);
    }
}

impl Drop for FileInUse {
    fn drop(&mut self) {
        self.end();
    }
}

impl Numbered for FileInUse {
    fn number(&self) -> Option<DeviceId> {
        let mut nodes = self.devices.nodes().into_iter();
        nodes
            .find(|node| node.name == self.served.name())
            .map(|node| node.id)
    }
}

/// A file that was made.
#[derive(Debug)]
pub(super) struct NewFile {
    pub(super) spec: Own,
    pub(super) in_use: Arc<FileInUse>,
    pub(super) watch: Option<Watch>,
}

/// Makes files for a snapshot, and lets them go.
#[derive(Clone, Debug)]
pub(super) struct Files {
    pub(super) id: SnapshotId,
    /// Where they are noted.
    pub(super) root: PathBuf,
    pub(super) helper: Helper,
    pub(super) devices: Arc<dyn Devices>,
}

impl Files {
    /// Makes a file of `wanted` bytes, if that is a directory; with `watch` it is found out what is free on the device.
    ///
    /// # Errors
    /// It can't be made or used; nothing is left of it then.
    pub(super) fn make(&self, own: &Own, wanted: u64, watch: bool) -> Result<NewFile, SnapshotError> {
        let served = self
            .devices
            .served(&own.device)
            .ok_or_else(|| SnapshotError::OwnDevice {
                path: own.path.clone(),
                device: own.device.clone(),
            })?;
        let watch = watch.then(|| Watch::begin(&served));
        let path = if own.directory {
            let number = uuid::Uuid::new_v4().as_fields().0;
            own.path.join(format!("blksnap-{}-{number:08x}.diff", self.id))
        } else {
            own.path.clone()
        };
        let kept = Kept {
            path: path.clone(),
            created: own.directory,
            device: own.device.clone(),
        };
        places::note_own(&self.root, self.id, &kept)
            .map_err(|source| SnapshotError::state("note in", &self.root, source))?;
        let chunk = served.origin().layout().chunk_bytes();
        let made = self.helper.make(Make {
            path: path.clone(),
            length: if own.directory { Some(wanted) } else { own.limit },
            fresh: own.directory.then_some(chunk),
            free: watch.as_ref().map(|_| chunk),
        })?;
        let on_device = |ranges: &[Extent]| -> Vec<Extent> {
            let shifted = ranges.iter().filter_map(|range| {
                let offset = range.offset.checked_add(own.start)?;
                let end = offset.checked_add(range.length)?.min(served.size());
                (offset < end).then_some(Extent {
                    offset,
                    length: end - offset,
                })
            });
            shifted.collect()
        };
        if let Some(watch) = &watch {
            served.origin().watch_within(watch.key, &on_device(&made.free));
        }
        let in_use = FileInUse::new(&served, &path, &self.devices);
        let claimed = served
            .origin()
            .claim(in_use.key, &in_use.fence, &on_device(&made.ranges));
        let ranges = pieces(&claimed, chunk, u64::from(served.origin().disk().logical_block()));
        let refused = match self.helper.ranges(&path) {
            Ok(again) if again != made.ranges => Some(SnapshotError::OwnMoved { path: path.clone() }),
            Ok(_) if ranges.is_empty() => Some(SnapshotError::OwnNeeded { path: path.clone() }),
            Ok(_) => None,
            Err(error) => Some(error.into()),
        };
        if let Some(error) = refused {
            in_use.end();
            // The note leads to it if this fails.
            let _ = self.helper.release(&[kept], &self.devices.nodes());
            return Err(error);
        }
        Ok(NewFile {
            spec: Own {
                file: Some(OwnFile {
                    path,
                    bytes: made.ranges.iter().map(|range| range.length).sum(),
                    ranges,
                }),
                ..own.clone()
            },
            in_use,
            watch,
        })
    }

    /// Lets a file go that is of no use.
    pub(super) fn undo(&self, file: &NewFile) {
        file.in_use.end();
        if let Some(OwnFile { path, .. }) = &file.spec.file {
            let kept = Kept {
                path: path.clone(),
                created: file.spec.directory,
                device: file.spec.device.clone(),
            };
            let _ = self.helper.release(&[kept], &self.devices.nodes());
        }
    }

    /// Lets all files of the snapshot go. Those that can't be reached stay noted; so do all with `others`, because more
    /// may come.
    pub(super) fn release(&self, others: bool) {
        let files = match places::own_files(&self.root, self.id) {
            Ok(files) if files.is_empty() => return,
            Ok(files) => files,
            Err(error) => {
                tracing::warn!(snapshot = %self.id, %error, "files of a snapshot stay");
                return;
            }
        };
        let mut nodes = self.devices.nodes();
        nodes.extend(held_by_gates(&files));
        match self.helper.release(&files, &nodes) {
            Ok(left) if left.is_empty() && !others => places::forget_own(&self.root, self.id),
            Ok(left) => {
                for kept in left {
                    tracing::warn!(snapshot = %self.id, file = %kept.path.display(), device = kept.device, "a file of a snapshot that is gone stays; the next start of the daemon tries again");
                }
            }
            Err(error) => tracing::warn!(snapshot = %self.id, %error, "files of a snapshot stay"),
        }
    }
}

/// Devices by whose nodes files are noted: those whose writes were held by gates.
pub(super) fn held_by_gates(files: &[Kept]) -> Vec<Candidate> {
    let node = |kept: &Kept| {
        let path = Path::new(&kept.device);
        let device = path.is_absolute().then(|| BlockDevice::open(path))?.ok()?;
        Some(Candidate {
            name: kept.device.clone(),
            id: device.id,
        })
    };
    files.iter().filter_map(node).collect()
}

/// Ranges cut to whole pages and blocks, those at least as long as a chunk.
pub(super) fn pieces(ranges: &[Extent], chunk: u64, block: u64) -> Vec<Extent> {
    let step = block.max(PAGE);
    let cut = ranges.iter().filter_map(|range| {
        let offset = range.offset.next_multiple_of(step);
        let end = range.end() / step * step;
        (offset < end && end - offset >= chunk).then(|| Extent {
            offset,
            length: end - offset,
        })
    });
    cut.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_are_used_in_whole_pages_as_long_as_a_chunk() {
        let at = |offset, length| Extent { offset, length };
        let ranges = [
            at(0, 65536),
            at(100, 8192),
            at(1 << 20, 4096),
            at((1 << 21) + 512, 12288),
        ];
        assert_eq!(
            pieces(&ranges, 8192, 512),
            [at(0, 65536), at((1 << 21) + 4096, 8192)]
        );
        assert_eq!(pieces(&ranges, 65536, 16384), [at(0, 65536)]);
    }
}

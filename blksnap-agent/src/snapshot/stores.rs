//! Stores: what a snapshot whose writes are held is given to keep old data with, and who is told when it can't.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Sender;

use nix::sys::stat::{major, minor};

use super::events::{EventData, Events};
use super::files::next_key;
use super::held::HoldOptions;
use super::owner::Command;
use crate::cow::{SnapshotKey, SpaceEvent};
use crate::engine::cow::journal::Journal;
use crate::engine::cow::{Broken, DiffStorage, Promise, Store, StoreOptions};
use crate::storage::{Pool, PoolOptions, StorageSpec};
use crate::units::{Extent, SECTOR_BYTES, Sectors, SnapshotId};

/// Tells whoever waits for events of a snapshot that an image is lost.
struct Tell {
    id: SnapshotId,
    events: Arc<Events>,
    device: PathBuf,
}

impl Broken for Tell {
    fn broken(&self, errno: i32, what: &str) {
        let device = self.device.display().to_string();
        tracing::error!(snapshot = %self.id, device, errno, what, "the image is lost; the device goes on");
        let number = fs::metadata(&self.device)
            .ok()
            .filter(|metadata| metadata.file_type().is_block_device())
            .map_or(0, |metadata| metadata.rdev());
        self.events.send(EventData::Corrupted {
            device,
            major: u32::try_from(major(number)).unwrap_or_default(),
            minor: u32::try_from(minor(number)).unwrap_or_default(),
            errno,
            reason: what.to_owned(),
        });
    }
}

/// A pool whose events go to who waits for them, and to the owner.
pub(super) fn pool_events(
    events: &Arc<Events>,
    owner: &Sender<Command>,
) -> Arc<dyn Fn(SpaceEvent) + Send + Sync> {
    let (events, owner) = (Arc::clone(events), owner.clone());
    Arc::new(move |SpaceEvent::LowFreeSpace { requested }| {
        // One that is gone needs no space.
        let _ = owner.send(Command::Low(requested));
        events.send(EventData::LowFreeSpace {
            requested: Sectors::new(requested / SECTOR_BYTES),
        });
    })
}

/// Where a member's old data goes.
pub(super) struct Parts<'a> {
    pub(super) pool: &'a Arc<Pool>,
    pub(super) journal: Option<Journal>,
    /// Storage that is on the member itself.
    pub(super) excluded: Vec<Extent>,
    /// Key of what is watched of the member.
    pub(super) free: Option<SnapshotKey>,
}

/// The store of a member at `device`.
pub(super) fn new_store(
    id: SnapshotId,
    device: &Path,
    parts: Parts<'_>,
    options: &HoldOptions,
    events: &Arc<Events>,
) -> Store {
    let key = next_key();
    Store::new(
        key,
        Arc::clone(parts.pool) as Arc<dyn DiffStorage>,
        StoreOptions {
            promise: options.promise,
            queue: options.queue,
            buffers: options.buffers,
            journal: parts.journal,
            excluded: parts.excluded,
            free: parts.free,
            broken: Arc::new(Tell {
                id,
                events: Arc::clone(events),
                device: device.to_owned(),
            }),
        },
    )
}

/// Options of the pool of a snapshot of devices with logical blocks of this size.
pub(super) const fn pool_options(minimum: u64, autogrow: bool, logical_block: u32) -> PoolOptions {
    PoolOptions {
        minimum,
        autogrow,
        logical_block,
    }
}

/// Storage that is found again after the agent, where it is a directory.
pub(super) fn kept(spec: &StorageSpec, id: SnapshotId, promise: Promise) -> StorageSpec {
    match spec {
        StorageSpec::Directory {
            path,
            limit,
            keep: None,
        } if promise != Promise::Nothing => StorageSpec::Directory {
            path: path.clone(),
            limit: *limit,
            keep: Some(id.to_string()),
        },
        other => other.clone(),
    }
}

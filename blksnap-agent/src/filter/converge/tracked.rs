//! What converge needs of the world: tracked devices, and somebody who freezes. Real ones, or models of them.

use std::fmt;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::cbt::{Base, FullNeeded, FullReason, ReadMap, ResetReason, Taken};
use crate::disk::{BlockDevice, DirectReader, DiskError, FreezeError, Freezer};
use crate::engine::Source;
use crate::tracker::{DeviceWatch, DirtyBlocks, LedgerStatus, TrackedDevice, TrackerError};
use crate::units::{BlockSize, DeviceId, Extent};

/// A device whose writes are recorded.
pub trait Tracked: fmt::Debug + Send + Sync {
    /// The device.
    fn device(&self) -> &BlockDevice;

    /// Size of a tracking block.
    fn block_size(&self) -> BlockSize;

    /// Begins to watch: the ledger is kept, and every block written from now on is seen, whoever closes the
    /// period, until the watch is dropped.
    ///
    /// # Errors
    /// The device was detached, or the kernel refuses.
    fn watch(self: Arc<Self>) -> Result<Box<dyn Watch>, TrackerError>;

    /// The device, to be read.
    ///
    /// # Errors
    /// It is gone or another one.
    fn source(&self) -> Result<Box<dyn Source>, DiskError>;

    /// What changed since `base`, with everything marked so far.
    ///
    /// # Errors
    /// The map does not reach back to `base`, or is doubtful.
    fn changed_since(&self, base: &Base) -> Result<Vec<Extent>, FullNeeded>;

    /// A reason to doubt what the tracker says, if there is one.
    fn doubt(&self) -> Option<ResetReason>;

    /// Ends the period of the change map.
    ///
    /// # Errors
    /// The map can't be made anew where it has to be.
    fn take(&self) -> Result<(Taken, Option<Arc<ReadMap>>), TrackerError>;

    /// Keeps what [`Tracked::take`] did, so that no agent gives its number again. Nothing is frozen then.
    ///
    /// # Errors
    /// It can't be kept: the take must not be told.
    fn keep(&self) -> Result<(), TrackerError>;

    /// Marks blocks in the open period of the change map.
    fn mark(&self, dirty: &DirtyBlocks);

    /// Writes that the driver holds now.
    ///
    /// # Errors
    /// The device is gone.
    fn driver_writes(&self) -> Result<u64, DiskError>;

    /// Writes back the page cache of the device's node.
    ///
    /// # Errors
    /// The device fails.
    fn sync_node(&self) -> Result<(), FreezeError>;
}

/// Watches a device.
pub trait Watch: fmt::Debug + Send + Sync {
    /// Closes the period, and gives all blocks written since the last call, in periods closed by anybody.
    ///
    /// # Errors
    /// The device was detached, or the kernel has no memory.
    fn close_period(&self) -> Result<DirtyBlocks, TrackerError>;

    /// Whether [`Watch::close_period`] would give nothing now. It does not wait: a write whose event is under way
    /// may show just afterwards.
    fn is_clean(&self) -> bool;

    /// Blocks of periods that somebody else closed since the last call of this or [`Watch::close_period`].
    fn drain(&self) -> DirtyBlocks;

    /// What the ledger knows.
    ///
    /// # Errors
    /// The kernel refuses.
    fn status(&self) -> Result<LedgerStatus, TrackerError>;
}

/// Freezes the file systems of all devices of a run.
pub trait Quiesce: fmt::Debug + Send {
    /// The mount point that must be written to when `file` is, if it is one of those to be frozen.
    ///
    /// # Errors
    /// The mount table can't be read.
    fn hold(&self, file: &File) -> Result<Option<PathBuf>, DiskError>;

    /// Prepares, so that freezing is quick.
    ///
    /// # Errors
    /// The watchdog does not start.
    fn arm(&mut self) -> Result<(), FreezeError>;

    /// Writes back all file systems.
    ///
    /// # Errors
    /// One fails.
    fn sync(&self) -> Result<(), FreezeError>;

    /// Freezes all, to be thawed before `limit` has passed. Nothing is frozen after a failure.
    ///
    /// # Errors
    /// One can't be frozen.
    fn freeze(&mut self, limit: Duration) -> Result<(), FreezeError>;

    /// Thaws all, and gives how long they were frozen; zero if there are none.
    ///
    /// # Errors
    /// One was thawed before.
    fn thaw(&mut self) -> Result<Duration, FreezeError>;

    /// True if the device has file systems, and all of them are frozen or were at the last freeze.
    fn froze(&self, device: DeviceId) -> bool;
}

impl Quiesce for Freezer {
    fn hold(&self, file: &File) -> Result<Option<PathBuf>, DiskError> {
        self.file_systems().hold(file)
    }

    fn arm(&mut self) -> Result<(), FreezeError> {
        self.arm()
    }

    fn sync(&self) -> Result<(), FreezeError> {
        self.file_systems().sync()
    }

    fn freeze(&mut self, limit: Duration) -> Result<(), FreezeError> {
        self.freeze(limit)
    }

    fn thaw(&mut self) -> Result<Duration, FreezeError> {
        self.thaw()
    }

    fn froze(&self, device: DeviceId) -> bool {
        self.froze(device)
    }
}

impl Tracked for TrackedDevice {
    fn device(&self) -> &BlockDevice {
        self.device()
    }

    fn block_size(&self) -> BlockSize {
        self.block_size()
    }

    fn watch(self: Arc<Self>) -> Result<Box<dyn Watch>, TrackerError> {
        Ok(Box::new(DeviceWatch::start(self)?))
    }

    fn source(&self) -> Result<Box<dyn Source>, DiskError> {
        Ok(Box::new(DirectReader::open(self.device())?))
    }

    fn changed_since(&self, base: &Base) -> Result<Vec<Extent>, FullNeeded> {
        let (map, previous) = self.with_map(|map| (map.live_map(), map.previous()));
        let map = map?;
        if base.generation == map.generation() && base.number > previous {
            return Err(FullReason::FutureNumber {
                base: base.number,
                number: previous,
            }
            .into());
        }
        Ok(map.changed_since(base)?.collect())
    }

    fn doubt(&self) -> Option<ResetReason> {
        self.check_doubt()
    }

    fn take(&self) -> Result<(Taken, Option<Arc<ReadMap>>), TrackerError> {
        self.take()
    }

    fn keep(&self) -> Result<(), TrackerError> {
        self.save()
    }

    fn mark(&self, dirty: &DirtyBlocks) {
        self.mark(dirty);
    }

    fn driver_writes(&self) -> Result<u64, DiskError> {
        self.device().writes_in_driver()
    }

    fn sync_node(&self) -> Result<(), FreezeError> {
        let path = &self.device().path;
        let synced = File::open(path).and_then(|node| node.sync_all());
        synced.map_err(|source| FreezeError::Sync {
            mountpoint: path.clone(),
            source,
        })
    }
}

impl Watch for DeviceWatch {
    fn close_period(&self) -> Result<DirtyBlocks, TrackerError> {
        self.close_period()
    }

    fn is_clean(&self) -> bool {
        self.is_clean()
    }

    fn drain(&self) -> DirtyBlocks {
        self.drain()
    }

    fn status(&self) -> Result<LedgerStatus, TrackerError> {
        self.device().ledger_status()
    }
}

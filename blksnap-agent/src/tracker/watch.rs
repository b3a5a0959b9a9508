//! Watch: everything that is written to a device from one moment on, whoever closes the periods meanwhile.
//!
//! Several copies of one device may be under way at a time. Each closes periods when it needs to, and a closed
//! period's blocks come out once; so the device hands them to every watch, which collects them for its owner. While
//! a watch exists, the ledger of its device is kept.

use std::sync::{Arc, Weak};

use super::periods::Closed;
use super::{DirtyBlocks, TrackedDevice, TrackerError};
use crate::sync::{Mutex, MutexGuard, PoisonError};

/// What a watch has collected. Whoever looks at it has `blocks`, so that nobody sees a period on its way from the one
/// to the other; who hands a period on, behind the lock of the device, needs `closed` only, for a moment.
#[derive(Debug, Default)]
pub struct Collected {
    blocks: Mutex<DirtyBlocks>,
    /// Periods of which `blocks` lacks the blocks.
    closed: Mutex<Vec<Arc<Closed>>>,
}

impl Collected {
    fn push(&self, closed: Arc<Closed>) {
        self.waiting().push(closed);
    }

    /// Adds the blocks of closed periods, whose bitmaps are of no use then, and gives all.
    pub(super) fn settle(&self) -> MutexGuard<'_, DirtyBlocks> {
        let mut blocks = self.blocks();
        let closed = std::mem::take(&mut *self.waiting());
        for closed in closed {
            blocks.union(&closed.blocks());
        }
        blocks
    }

    fn is_empty(&self) -> bool {
        let blocks = self.blocks();
        blocks.is_empty() && self.waiting().iter().all(|closed| closed.is_clear())
    }

    fn blocks(&self) -> MutexGuard<'_, DirtyBlocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Arc<Closed>>> {
        self.closed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A device of which a watch can be kept.
pub trait Watched: Send + Sync {
    /// From here on writes are marked again when they complete. Calls nest.
    ///
    /// # Errors
    /// The kernel refuses.
    fn start_ledger(&self) -> Result<(), TrackerError>;
    /// Ends what [`Watched::start_ledger`] started.
    ///
    /// # Errors
    /// The kernel refuses; the map is corrupted then.
    fn stop_ledger(&self) -> Result<(), TrackerError>;
    /// Hands the blocks of every period closed from now on to `watcher`, too.
    fn add_watcher(&self, watcher: Weak<Collected>);
    /// Closes the period; its blocks are for the watches.
    ///
    /// # Errors
    /// The device was detached, or the kernel has no memory for a new bitmap. The period stays open then.
    fn close(&self) -> Result<(), TrackerError>;
    /// Whether nothing was marked since the last close, by any program that has ended.
    fn is_clean(&self) -> bool;
    /// For messages.
    fn name(&self) -> String;
}

/// A watch of a tracked device.
pub type DeviceWatch = Watch<TrackedDevice>;

/// Collects the blocks of every period that is closed while it exists.
#[derive(Debug)]
pub struct Watch<D: Watched> {
    device: Arc<D>,
    collected: Arc<Collected>,
}

impl<D: Watched> Watch<D> {
    /// Begins to watch.
    ///
    /// # Errors
    /// The ledger can't be kept.
    pub fn start(device: Arc<D>) -> Result<Self, TrackerError> {
        device.start_ledger()?;
        let collected = Arc::default();
        device.add_watcher(Arc::downgrade(&collected));
        Ok(Self { device, collected })
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Arc<D> {
        &self.device
    }

    /// Closes the period, and gives all blocks written since the last call, or since the watch began. Of the
    /// period that was open when it began, blocks written before may be among them.
    ///
    /// # Errors
    /// As [`Watched::close`]; nothing collected is lost then.
    pub fn close_period(&self) -> Result<DirtyBlocks, TrackerError> {
        self.device.close()?;
        Ok(self.drain())
    }

    /// Whether there is nothing to collect now; see [`TrackedDevice::is_clean`] for what "now" means.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        // The open period first: one that somebody closes between the two is then seen in what was collected.
        self.device.is_clean() && self.collected.is_empty()
    }

    /// What others have closed since the last call of this or of [`Watch::close_period`].
    #[must_use]
    pub fn drain(&self) -> DirtyBlocks {
        std::mem::take(&mut *self.collected.settle())
    }
}

impl<D: Watched> Drop for Watch<D> {
    fn drop(&mut self) {
        if let Err(error) = self.device.stop_ledger() {
            tracing::error!(device = %self.device.name(), %error, "the ledger of writes in flight did not end");
        }
    }
}

/// The watches of a device.
#[derive(Debug, Default)]
pub(super) struct Watchers {
    list: Vec<Weak<Collected>>,
}

impl Watchers {
    pub(super) fn add(&mut self, watcher: Weak<Collected>) {
        self.list.push(watcher);
    }

    /// Gives a closed period to every watch, and forgets those that are gone. They are to be settled when the
    /// device's lock is free again.
    pub(super) fn tell(&mut self, closed: &Arc<Closed>) -> Vec<Arc<Collected>> {
        let told: Vec<_> = self.list.iter().filter_map(Weak::upgrade).collect();
        for watch in &told {
            watch.push(Arc::clone(closed));
        }
        self.list = told.iter().map(Arc::downgrade).collect();
        told
    }
}

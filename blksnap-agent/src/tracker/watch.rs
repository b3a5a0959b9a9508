//! Watch: everything that is written to a device from one moment on, whoever closes the periods meanwhile.
//!
//! Several copies of one device may be under way at a time. Each closes periods when it needs to, and a closed
//! period's blocks come out once; so the device hands them to every watch, which collects them for its owner. While
//! a watch exists, the ledger of its device is kept.

use std::sync::{Arc, Weak};

use super::{DirtyBlocks, TrackedDevice, TrackerError};
use crate::sync::{Mutex, PoisonError};

/// What a watch has collected.
pub(super) type Collected = Mutex<DirtyBlocks>;

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
    fn add_watcher(&self, watcher: Weak<Mutex<DirtyBlocks>>);
    /// Closes the period, and gives its blocks.
    ///
    /// # Errors
    /// The device was detached, or the kernel has no memory for a new bitmap. The period stays open then.
    fn close_period(&self) -> Result<DirtyBlocks, TrackerError>;
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
    /// As [`Watched::close_period`]; nothing collected is lost then.
    pub fn close_period(&self) -> Result<DirtyBlocks, TrackerError> {
        self.device.close_period()?;
        Ok(self.drain())
    }

    /// Whether there is nothing to collect now; see [`TrackedDevice::is_clean`] for what "now" means.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        // The open period first: one that somebody closes between the two is then seen in what was collected.
        self.device.is_clean()
            && self
                .collected
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .is_empty()
    }

    /// What others have closed since the last call of this or of [`Watch::close_period`].
    #[must_use]
    pub fn drain(&self) -> DirtyBlocks {
        std::mem::take(&mut *self.collected.lock().unwrap_or_else(PoisonError::into_inner))
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

    /// Hands the blocks of a closed period to every watch, and forgets those that are gone.
    pub(super) fn tell(&mut self, dirty: &DirtyBlocks) {
        self.list.retain(|watcher| {
            let Some(collected) = watcher.upgrade() else {
                return false;
            };
            collected
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .union(dirty);
            true
        });
    }
}

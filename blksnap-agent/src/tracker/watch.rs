//! Watch: everything that is written to a device from one moment on, whoever closes the periods meanwhile.
//!
//! Several copies of one device may be under way at a time. Each closes periods when it needs to, and a closed
//! period's blocks come out once; so the device hands them to every watch, which collects them for its owner. While
//! a watch exists, the ledger of its device is kept.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::{DirtyBlocks, TrackedDevice, TrackerError};

/// What a watch has collected.
type Collected = Mutex<DirtyBlocks>;

/// Collects the blocks of every period that is closed while it exists.
#[derive(Debug)]
pub struct DeviceWatch {
    device: Arc<TrackedDevice>,
    collected: Arc<Collected>,
}

impl DeviceWatch {
    /// Begins to watch.
    ///
    /// # Errors
    /// The ledger can't be kept.
    pub fn start(device: Arc<TrackedDevice>) -> Result<Self, TrackerError> {
        device.start_ledger()?;
        let collected = Arc::default();
        device.add_watcher(Arc::downgrade(&collected));
        Ok(Self { device, collected })
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Arc<TrackedDevice> {
        &self.device
    }

    /// Closes the period, and gives all blocks written since the last call, or since the watch began. Of the
    /// period that was open when it began, blocks written before may be among them.
    ///
    /// # Errors
    /// As [`TrackedDevice::close_period`]; nothing collected is lost then.
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

    /// What others have closed since the last call of this or of [`DeviceWatch::close_period`].
    #[must_use]
    pub fn drain(&self) -> DirtyBlocks {
        std::mem::take(&mut *self.collected.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for DeviceWatch {
    fn drop(&mut self) {
        if let Err(error) = self.device.stop_ledger() {
            tracing::error!(device = %self.device.device().path.display(), %error, "the ledger of writes in flight did not end");
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

//! Follow: writes that are under way at an instant come into the difference after it.
//!
//! A write is marked when it is submitted. One that is marked before the period of an instant ends and lands after the
//! instant is in no later difference by that mark. So the ledger is kept over the instant: what completes meanwhile is
//! marked again in the period after it, and so is what is still under way when the ledger ends. A write from before
//! the ledger is told of by its driver when it completes, with its sectors if the driver works on requests; without
//! them nobody knows what it changed, and the map says so; so it does if the kernel skipped the program for a completion.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::{DeviceWatch, TrackedDevice, TrackerError, disk_kind};
use crate::cbt::ResetReason;

/// Least time between the begin of the ledger and the close of the period before an instant. Until then a write from
/// before the ledger has reached its driver and completed, unless it takes longer.
const LEAD: Duration = Duration::from_millis(100);

/// Follows the writes of a device over an instant.
#[derive(Debug)]
pub struct Follow {
    watch: DeviceWatch,
    began: Instant,
    /// The driver works on requests: it tells the sectors of what completes.
    requests: bool,
    /// Writes that were not followed until the period was closed.
    unfollowed: u64,
}

impl Follow {
    /// Begins to follow. It belongs before what takes time before the instant, as writing back of file systems.
    ///
    /// # Errors
    /// The ledger can't be kept.
    pub fn start(device: &Arc<TrackedDevice>) -> Result<Self, TrackerError> {
        Ok(Self {
            requests: disk_kind(device.device()).requests,
            watch: DeviceWatch::start(Arc::clone(device))?,
            began: Instant::now(),
            unfollowed: 0,
        })
    }

    /// Waits until writes from before [`Follow::start`] have had their time, and closes the period.
    ///
    /// # Errors
    /// The device was detached, or the kernel has no memory for a new bitmap, or does not say what it skipped.
    pub fn close_period(&mut self) -> Result<(), TrackerError> {
        thread::sleep(LEAD.saturating_sub(self.began.elapsed()));
        // What comes up during the close counts as if it came after it.
        self.unfollowed = self.watch.device().unfollowed(self.requests)?;
        self.watch.close_period().map(drop)
    }

    /// Ends after the instant, and after its number was taken: if a write could not be followed, the next difference
    /// may lack it, and the map is declared doubtful.
    pub fn end(self) {
        let device = Arc::clone(self.watch.device());
        let (requests, before) = (self.requests, self.unfollowed);
        // What is under way now is marked with that.
        drop(self.watch);
        // Not to know is no better than to have missed one.
        if !matches!(device.unfollowed(requests), Ok(now) if now == before) {
            device.corrupt(ResetReason::NotFollowed);
        }
    }
}

//! Backup errors: what was tried, and the remedy.

use std::io;
use std::path::PathBuf;

use super::target::TargetError;
use crate::engine::CopyError;
use crate::filter::converge::ConvergeError;
use crate::statefile::StateFileError;
use crate::tracker::TrackerError;

/// A backup failed. The device and the snapshot are as they were.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The target can't be used.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The sidecar can't be written.
    #[error(transparent)]
    Sidecar(#[from] StateFileError),
    /// Reading the image or writing the target failed, or was cancelled.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// The device can't be brought to a point in time.
    #[error(transparent)]
    Converge(#[from] ConvergeError),
    /// Tracking.
    #[error(transparent)]
    Tracker(#[from] TrackerError),
    /// The image can't be looked at.
    #[error("can't find the data in the image of {device}: {source}")]
    Image {
        /// The device that the image is of.
        device: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The image is not as long as the device was.
    #[error("the image of {device} has {found} bytes instead of {capacity}: take the snapshot again")]
    ImageLength {
        /// The device.
        device: PathBuf,
        /// Bytes of the image.
        found: u64,
        /// Bytes of the device.
        capacity: u64,
    },
}

//! Snapshot errors, each with the errno of the original's interface.

use nix::errno::Errno;

use crate::filter::converge::ConvergeError;
use crate::storage::StorageError;
use crate::tracker::TrackerError;
use crate::units::{DeviceId, SnapshotId};

/// Something about a snapshot failed.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// No such snapshot.
    #[error("no snapshot {0}; `blksnap-agent snapshot list` shows those there are")]
    Unknown(SnapshotId),
    /// It has no device.
    #[error("snapshot {0} has no device; add one with `blksnap-agent snapshot add`")]
    Empty(SnapshotId),
    /// The device is in it.
    #[error("{device} is in snapshot {snapshot} already")]
    AlreadyAdded {
        /// The device's node.
        device: String,
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// It is taken, or being taken.
    #[error("snapshot {0} is taken already; create another one")]
    AlreadyTaken(SnapshotId),
    /// It is not taken.
    #[error("snapshot {0} is not taken; `blksnap-agent snapshot take` does that")]
    NotTaken(SnapshotId),
    /// The device is not tracked.
    #[error("device {0} is not tracked; attach it with `blksnap-agent attach`")]
    NotTracked(DeviceId),
    /// The difference storage.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The tracker.
    #[error(transparent)]
    Tracker(#[from] TrackerError),
    /// The copy.
    #[error(transparent)]
    Converge(#[from] ConvergeError),
    /// The owner ended unexpectedly.
    #[error("snapshot {0} failed by a defect of blksnap; destroy it, and report this with the log")]
    Defect(SnapshotId),
}

impl SnapshotError {
    /// The errno of the original's interface, `EIO` where it has none.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Unknown(_) => Errno::ESRCH,
            Self::Empty(_) | Self::NotTracked(_) => Errno::ENODEV,
            Self::AlreadyAdded { .. } | Self::AlreadyTaken(_) => Errno::EALREADY,
            Self::NotTaken(_) => Errno::ENODATA,
            Self::Converge(error) if error.is_no_space() => Errno::ENOSPC,
            Self::Converge(ConvergeError::Cancelled) => Errno::ECANCELED,
            Self::Converge(ConvergeError::NotConverging { .. } | ConvergeError::NeverQuiet { .. }) => {
                Errno::ETIME
            }
            Self::Tracker(TrackerError::NotAttached(_)) => Errno::ENODEV,
            Self::Storage(_) | Self::Tracker(_) | Self::Converge(_) | Self::Defect(_) => Errno::EIO,
        }
    }
}

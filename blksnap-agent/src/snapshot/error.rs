//! Snapshot errors, each with the errno of the original's interface.

use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::engine::cow::journal::JournalError;
use crate::filter::converge::ConvergeError;
use crate::filter::dm::DmError;
use crate::filter::gate::GateError;
use crate::filter::served::TakeError;
use crate::own::HelperError;
use crate::statefile::StateFileError;
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
    /// The device is not in it.
    #[error("the device is not in snapshot {0}; `blksnap-agent snapshot info` shows its devices")]
    NotInSnapshot(SnapshotId),
    /// The device is not tracked.
    #[error("device {0} is not tracked; attach it with `blksnap-agent attach`")]
    NotTracked(DeviceId),
    /// Devices that are copied, and devices that the agent serves.
    #[error(
        "{device} can't be in snapshot {snapshot}: devices whose old data survives in different ways have no common instant; make one snapshot for each kind of filter"
    )]
    Mixed {
        /// The device's path.
        device: String,
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// A snapshot of devices that are copied has one directory.
    #[error(
        "snapshot {snapshot} is copied to a directory, which {given} is not; name one directory without a limit as its storage"
    )]
    OneDirectory {
        /// The snapshot.
        snapshot: SnapshotId,
        /// What was named.
        given: String,
    },
    /// Storage can't be added any more.
    #[error("snapshot {0} is copied, and its storage grows by itself")]
    NotAppendable(SnapshotId),
    /// A journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A document.
    #[error(transparent)]
    Document(#[from] StateFileError),
    /// State in a directory.
    #[error("can't {action} {}: {source}", path.display())]
    State {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Served devices can't be taken.
    #[error(transparent)]
    Served(#[from] TakeError),
    /// Gates.
    #[error(transparent)]
    Gate(#[from] GateError),
    /// Device-mapper.
    #[error(transparent)]
    Dm(#[from] DmError),
    /// Devices with gates can't be taken: nobody made any.
    #[error("can't hold writes of {0} in the kernel: this agent has no gates; choose another filter")]
    NoGates(String),
    /// Storage that stands on a device whose writes are held.
    #[error(
        "can't store in {place}: it is on {}, whose writes would wait for themselves; give a place on another device, memory:SIZE, or before the take a directory of an ext4 or XFS that is mounted from the device itself",
        origin.display()
    )]
    OnOrigin {
        /// The storage.
        place: String,
        /// The device, or where its file system is mounted.
        origin: PathBuf,
    },
    /// The difference storage.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A file on a served device.
    #[error(transparent)]
    Own(#[from] HelperError),
    /// It has no blocks that could be used.
    #[error(
        "can't use {} as difference storage: its blocks are in pieces shorter than a chunk, or snapshots that are held may need what was there; free some space, or give a place on another device",
        path.display()
    )]
    OwnNeeded {
        /// The file.
        path: PathBuf,
    },
    /// It does not stay where it is.
    #[error(
        "can't use {} as difference storage: the file system moved it; try again when nobody does",
        path.display()
    )]
    OwnMoved {
        /// The file.
        path: PathBuf,
    },
    /// It is on a served device that is not in the snapshot.
    #[error(
        "can't use {} as difference storage: it is on {device}, which is served and not in the snapshot, so that the agent would wait for itself; add the device, or give a place on another one",
        path.display()
    )]
    OwnDevice {
        /// The file or directory.
        path: PathBuf,
        /// Name of the device.
        device: String,
    },
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
    pub(super) fn state(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::State {
            action,
            path: path.to_owned(),
            source,
        }
    }

    /// The errno of the original's interface, `EIO` where it has none.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Unknown(_) => Errno::ESRCH,
            Self::Empty(_) | Self::NotTracked(_) | Self::NotInSnapshot(_) => Errno::ENODEV,
            Self::AlreadyAdded { .. } | Self::AlreadyTaken(_) => Errno::EALREADY,
            Self::NotTaken(_) => Errno::ENODATA,
            Self::Converge(error) if error.is_no_space() => Errno::ENOSPC,
            Self::Converge(ConvergeError::Cancelled) => Errno::ECANCELED,
            Self::Converge(ConvergeError::NotConverging { .. } | ConvergeError::NeverQuiet { .. }) => {
                Errno::ETIME
            }
            Self::Tracker(TrackerError::NotAttached(_)) => Errno::ENODEV,
            Self::Mixed { .. }
            | Self::OneDirectory { .. }
            | Self::NotAppendable(_)
            | Self::OwnDevice { .. }
            | Self::OnOrigin { .. } => Errno::EINVAL,
            Self::NoGates(_) => Errno::EOPNOTSUPP,
            Self::Gate(GateError::Busy { .. } | GateError::Broken { .. }) => Errno::EBUSY,
            Self::OwnNeeded { .. } | Self::OwnMoved { .. } => Errno::EBUSY,
            Self::State { source, .. } => source.raw_os_error().map_or(Errno::EIO, Errno::from_raw),
            Self::Storage(_)
            | Self::Own(_)
            | Self::Tracker(_)
            | Self::Converge(_)
            | Self::Journal(_)
            | Self::Document(_)
            | Self::Served(_)
            | Self::Gate(_)
            | Self::Dm(_)
            | Self::Defect(_) => Errno::EIO,
        }
    }
}

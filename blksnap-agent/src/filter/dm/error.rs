//! Error: what device-mapper refuses, and why a device is not taken.

use std::io;
use std::path::PathBuf;

use nix::errno::Errno;

use super::journal::JournalError;
use crate::disk::DiskError;
use crate::disk::FreezeError;
use crate::disk::watchdog::WatchdogError;

/// The dm filter failed.
#[derive(Debug, thiserror::Error)]
pub enum DmError {
    /// No device-mapper.
    #[error(
        "can't open {}: {source}; `modprobe dm_mod` loads device-mapper",
        crate::sys::dm::NODE
    )]
    Control {
        /// Why.
        source: io::Error,
    },
    /// A target is missing.
    #[error("the kernel has no device-mapper target {0:?}; `modprobe dm_snapshot` loads it")]
    NoTarget(&'static str),
    /// The kernel refused a step.
    #[error("can't {action} {device}: {}", .source.desc())]
    Step {
        /// What was tried.
        action: &'static str,
        /// The device.
        device: String,
        /// Why.
        source: Errno,
    },
    /// A device that something stands on is gone.
    #[error("can't {action} {device}: what it stands on is gone")]
    Gone {
        /// What was tried.
        action: &'static str,
        /// The device.
        device: String,
    },
    /// The device can't be an origin.
    #[error("can't take {device} by device-mapper: {why}")]
    Refused {
        /// The device.
        device: String,
        /// Why, and what to do.
        why: String,
    },
    /// The difference storage can't be used.
    #[error("can't keep old data in {place}: {why}")]
    Storage {
        /// Where.
        place: String,
        /// Why, and what to do.
        why: String,
    },
    /// A call for it failed.
    #[error("can't {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The instant took too long.
    #[error(
        "{device} went on before all devices were taken: it was suspended for longer than the limit; nothing was taken: try again when less is written, or give storage on a faster disk"
    )]
    Late {
        /// The device.
        device: String,
    },
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The watchdog.
    #[error(transparent)]
    Watchdog(#[from] WatchdogError),
    /// File systems.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// A device.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// What was to be done at the instant.
    #[error("{0}")]
    Instant(String),
}

impl DmError {
    pub(super) fn refused(device: impl std::fmt::Display, why: impl Into<String>) -> Self {
        Self::Refused {
            device: device.to_string(),
            why: why.into(),
        }
    }

    pub(super) fn storage(place: impl std::fmt::Display, why: impl std::fmt::Display) -> Self {
        Self::Storage {
            place: place.to_string(),
            why: why.to_string(),
        }
    }

    /// The number that the kernel answered with, if it did.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Step { source, .. } => Some(*source),
            _ => None,
        }
    }
}

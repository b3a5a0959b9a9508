//! Errors: from those of the modules below to what a client is told.

use crate::backup::{BackupError, TargetError};
use crate::control::error::{ApiError, Code};
use crate::disk::DiskError;
use crate::disk::extents::ExtentsError;
use crate::engine::CopyError;
use crate::filter::converge::ConvergeError;
use crate::filter::dm::DmError;
use crate::filter::gate::GateError;
use crate::own::HelperError;
use crate::seal::SealError;
use crate::snapshot::SnapshotError;
use crate::statefile::StateFileError;
use crate::storage::StorageError;
use crate::tracker::TrackerError;
use crate::ublk::UblkError;

/// An error of a module, about `action` on something.
pub(super) trait Tell {
    /// The kind of the error.
    fn code(&self) -> Code;

    /// The error as a client is told it.
    fn tell(&self, action: impl std::fmt::Display) -> ApiError
    where
        Self: std::error::Error + Sized,
    {
        ApiError::of(self.code(), action, self)
    }
}

impl Tell for DiskError {
    fn code(&self) -> Code {
        match self {
            Self::NoDevice { .. } | Self::Empty { .. } | Self::NoDiskNode { .. } | Self::Replaced { .. } => {
                Code::NoDevice
            }
            Self::NotBlock { .. } => Code::NotBlockDevice,
            Self::Busy { .. } => Code::Busy,
            Self::NotDisk { .. } => Code::InvalidRequest,
            _ => Code::Io,
        }
    }
}

impl Tell for TrackerError {
    fn code(&self) -> Code {
        match self {
            Self::Already(_) => Code::Already,
            Self::NotAttached(_) => Code::NotAttached,
            Self::Full { .. } => Code::Busy,
            Self::TooManyBlocks { .. } | Self::RingSize(_) | Self::Unit(_) => Code::InvalidRequest,
            Self::HookDead(_) | Self::Dax { .. } | Self::Bcache { .. } => Code::Unsupported,
            Self::Lost { .. } => Code::NoDevice,
            Self::Disk(error) => error.code(),
            Self::Btf(_) | Self::Load(_) => Code::System,
            Self::Map { .. } | Self::Io { .. } | Self::Pin(_) | Self::State(_) => Code::Io,
        }
    }
}

impl Tell for SealError {
    fn code(&self) -> Code {
        match self {
            Self::Disk(error) => error.code(),
            Self::State(StateFileError::Io { source, .. }) | Self::Directory { source, .. } => of_io(source),
            Self::State(_) => Code::Io,
        }
    }
}

impl Tell for ExtentsError {
    fn code(&self) -> Code {
        match self {
            Self::Open { .. } | Self::NotFile(_) | Self::OtherDevice { .. } => Code::InvalidRequest,
            Self::Kind { .. } => Code::Unsupported,
            Self::NotOwn { .. } => Code::InvalidRequest,
            Self::NoPlace { .. } => Code::Busy,
            Self::Map { source, .. } => match source.raw_os_error() {
                Some(libc::EOPNOTSUPP) => Code::Unsupported,
                _ => of_io(source),
            },
        }
    }
}

impl Tell for StorageError {
    fn code(&self) -> Code {
        match self {
            Self::NotDirectory { .. }
            | Self::NotSparse { .. }
            | Self::Empty { .. }
            | Self::Kind { .. }
            | Self::LogicalBlock { .. }
            | Self::Range { .. }
            | Self::Origin { .. }
            | Self::NotServed { .. }
            | Self::Name(_) => Code::InvalidRequest,
            Self::Directory { source, .. } | Self::Create { source, .. } | Self::Io { source, .. } => {
                of_io(source)
            }
            Self::Full { .. } => Code::NoSpace,
            Self::Disk(error) => error.code(),
            Self::NoDevice(_) | Self::Extents(_) => Code::Unsupported,
            Self::Volatile(_) | Self::Misplaced(_) => Code::Io,
        }
    }
}

impl Tell for HelperError {
    fn code(&self) -> Code {
        match self {
            Self::Process(source) => of_io(source),
            Self::Silent => Code::Busy,
            Self::Refused(_) => Code::InvalidRequest,
        }
    }
}

impl Tell for CopyError {
    fn code(&self) -> Code {
        match self {
            _ if self.is_no_space() => Code::NoSpace,
            Self::Cancelled => Code::Cancelled,
            Self::Late => Code::NotConverging,
            _ => Code::Io,
        }
    }
}

impl Tell for ConvergeError {
    fn code(&self) -> Code {
        match self {
            Self::NoDevice | Self::Twice(_) | Self::SinkFrozen { .. } => Code::InvalidRequest,
            Self::Tracker(error) => error.code(),
            Self::Disk(error) => error.code(),
            Self::Freeze(_) => Code::Io,
            Self::Copy(error) => error.code(),
            Self::Hook(_) => Code::Hook,
            Self::FullNeeded(_) | Self::Doubt { .. } => Code::Corrupted,
            Self::NotConverging { .. } | Self::NeverQuiet { .. } | Self::NotFollowed { .. } => {
                Code::NotConverging
            }
            Self::Cancelled => Code::Cancelled,
        }
    }
}

impl Tell for SnapshotError {
    fn code(&self) -> Code {
        match self {
            Self::Unknown(_) => Code::UnknownSnapshot,
            Self::Empty(_) => Code::InvalidRequest,
            Self::AlreadyAdded { .. } | Self::AlreadyTaken(_) => Code::Already,
            Self::NotTaken(_) => Code::NotTaken,
            Self::NotTracked(_) | Self::NotInSnapshot(_) => Code::NotAttached,
            Self::Mixed { .. } | Self::OneDirectory { .. } | Self::NotAppendable(_) => Code::InvalidRequest,
            Self::Document(error) => error.code(),
            Self::State { source, .. } => of_io(source),
            Self::Journal(_) | Self::Served(_) => Code::Io,
            Self::Own(error) => error.code(),
            Self::OwnNeeded { .. } | Self::OwnMoved { .. } => Code::Busy,
            Self::OwnDevice { .. } | Self::OnOrigin { .. } => Code::InvalidRequest,
            Self::NoGates(_) => Code::Unsupported,
            Self::Gate(GateError::Busy { .. } | GateError::Broken { .. }) => Code::Busy,
            Self::Gate(GateError::Btf(_) | GateError::Load(_)) => Code::Unsupported,
            Self::Gate(_) => Code::Io,
            Self::Dm(DmError::Refused { .. } | DmError::NoTarget(_) | DmError::Control { .. }) => {
                Code::Unsupported
            }
            Self::Dm(DmError::Storage { .. }) => Code::InvalidRequest,
            Self::Dm(_) => Code::Io,
            Self::Storage(error) => error.code(),
            Self::Tracker(error) => error.code(),
            Self::Converge(error) => error.code(),
            Self::Defect(_) => Code::Io,
        }
    }
}

impl Tell for StateFileError {
    fn code(&self) -> Code {
        match self {
            Self::Io { source, .. } => of_io(source),
            _ => Code::Corrupted,
        }
    }
}

impl Tell for TargetError {
    fn code(&self) -> Code {
        match self {
            Self::NotFile { .. } | Self::OnDevice { .. } | Self::IsDevice { .. } => Code::InvalidRequest,
            Self::Busy { .. } => Code::Busy,
            Self::Io { source, .. } => of_io(source),
            Self::Disk(error) => error.code(),
            Self::Sidecar(error) => error.code(),
        }
    }
}

impl Tell for BackupError {
    fn code(&self) -> Code {
        match self {
            Self::Target(error) => error.code(),
            Self::Sidecar(error) => error.code(),
            Self::Copy(error) => error.code(),
            Self::Converge(error) => error.code(),
            Self::Tracker(error) => error.code(),
            Self::Image { source, .. } => of_io(source),
            Self::ImageLength { .. } => Code::Corrupted,
        }
    }
}

impl Tell for UblkError {
    fn code(&self) -> Code {
        match self {
            Self::NotBuilt | Self::LogicalBlock(_) | Self::Size { .. } => Code::Unsupported,
            Self::NoDriver | Self::Lacks(_) => Code::System,
            Self::Busy { .. } => Code::Busy,
            Self::Driver { .. } | Self::Io { .. } => Code::Io,
        }
    }
}

fn of_io(source: &std::io::Error) -> Code {
    match source.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Code::NoSpace,
        _ => Code::Io,
    }
}

//! Member: a device of a snapshot.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::disk::BlockDevice;
use crate::filter::served::Served;
use crate::units::DeviceId;

/// A device of a snapshot.
#[derive(Clone, Debug)]
pub enum Member {
    /// A block device whose changes the kernel tells of; it is copied by `converge`.
    Tracked(BlockDevice),
    /// A disk that the agent serves; its writes are held.
    Served(Arc<Served>),
}

/// What tells members apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemberId {
    /// Number of a block device.
    Device(DeviceId),
    /// Name of a served disk.
    Served(String),
}

/// How old data survives in a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FilterKind {
    /// Copied until copy and device are equal.
    Converge,
    /// The agent serves the device and holds its writes.
    Served,
}

impl FilterKind {
    /// Its name.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Converge => "converge",
            Self::Served => "served",
        }
    }
}

impl Member {
    /// What tells it from others.
    #[must_use]
    pub fn id(&self) -> MemberId {
        match self {
            Self::Tracked(device) => MemberId::Device(device.id),
            Self::Served(served) => MemberId::Served(served.name().to_owned()),
        }
    }

    /// Which filter it needs.
    #[must_use]
    pub const fn filter(&self) -> FilterKind {
        match self {
            Self::Tracked(_) => FilterKind::Converge,
            Self::Served(_) => FilterKind::Served,
        }
    }

    /// Node or file.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Tracked(device) => &device.path,
            Self::Served(served) => served.path(),
        }
    }

    /// The kernel's name, or that under which it is served.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Tracked(device) => &device.name,
            Self::Served(served) => served.name(),
        }
    }

    /// Number of the block device; none for a served file.
    #[must_use]
    pub fn device_id(&self) -> Option<DeviceId> {
        match self {
            Self::Tracked(device) => Some(device.id),
            Self::Served(_) => None,
        }
    }

    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        match self {
            Self::Tracked(device) => device.capacity.bytes(),
            Self::Served(served) => served.size(),
        }
    }

    /// The tracked device, if it is one.
    #[must_use]
    pub const fn tracked(&self) -> Option<&BlockDevice> {
        match self {
            Self::Tracked(device) => Some(device),
            Self::Served(_) => None,
        }
    }

    /// Its path for messages.
    #[must_use]
    pub fn shown(&self) -> String {
        PathBuf::from(self.path()).display().to_string()
    }
}

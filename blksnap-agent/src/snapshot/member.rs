//! Member: a device of a snapshot.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::disk::BlockDevice;
use crate::filter::served::Served;
use crate::units::DeviceId;

/// A device of a snapshot.
#[derive(Clone, Debug)]
pub enum Member {
    /// A block device whose changes the kernel tells of; it is copied by `converge`.
    Tracked(BlockDevice),
    /// A block device whose changes the kernel tells of, and whose writes it holds, too, by a gate.
    Gated(BlockDevice),
    /// A device of device-mapper whose changes the kernel tells of, and whose old data it keeps itself.
    Mapped(BlockDevice),
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FilterKind {
    /// Copied until copy and device are equal.
    Converge,
    /// Programs in the kernel hold the device's writes.
    Gate,
    /// Device-mapper keeps what is overwritten.
    Dm,
    /// The agent serves the device and holds its writes.
    Served,
}

impl FilterKind {
    /// Its name.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Converge => "converge",
            Self::Gate => "gate",
            Self::Dm => "dm",
            Self::Served => "served",
        }
    }

    pub(super) const fn served() -> Self {
        Self::Served
    }

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes it so")]
    pub(super) const fn is_served(&self) -> bool {
        matches!(self, Self::Served)
    }
}

/// Which filter is wished for devices that are not served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FilterWish {
    /// The first that works: device-mapper's own for its devices, the gate for others, and else converge.
    Auto,
    /// [`FilterKind::Converge`].
    #[default]
    Converge,
    /// [`FilterKind::Gate`].
    Gate,
    /// [`FilterKind::Dm`].
    Dm,
}

impl Member {
    /// What tells it from others.
    #[must_use]
    pub fn id(&self) -> MemberId {
        match self {
            Self::Tracked(device) | Self::Gated(device) | Self::Mapped(device) => MemberId::Device(device.id),
            Self::Served(served) => MemberId::Served(served.name().to_owned()),
        }
    }

    /// Which filter it needs.
    #[must_use]
    pub const fn filter(&self) -> FilterKind {
        match self {
            Self::Tracked(_) => FilterKind::Converge,
            Self::Gated(_) => FilterKind::Gate,
            Self::Mapped(_) => FilterKind::Dm,
            Self::Served(_) => FilterKind::Served,
        }
    }

    /// Node or file.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Tracked(device) | Self::Gated(device) | Self::Mapped(device) => &device.path,
            Self::Served(served) => served.path(),
        }
    }

    /// The kernel's name, or that under which it is served.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Tracked(device) | Self::Gated(device) | Self::Mapped(device) => &device.name,
            Self::Served(served) => served.name(),
        }
    }

    /// Number of the block device; none for a served file.
    #[must_use]
    pub fn device_id(&self) -> Option<DeviceId> {
        match self {
            Self::Tracked(device) | Self::Gated(device) | Self::Mapped(device) => Some(device.id),
            Self::Served(_) => None,
        }
    }

    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        match self {
            Self::Tracked(device) | Self::Gated(device) | Self::Mapped(device) => device.capacity.bytes(),
            Self::Served(served) => served.size(),
        }
    }

    /// The tracked device, if it is one.
    #[must_use]
    pub const fn tracked(&self) -> Option<&BlockDevice> {
        match self {
            Self::Tracked(device) | Self::Gated(device) | Self::Mapped(device) => Some(device),
            Self::Served(_) => None,
        }
    }

    /// Its path for messages.
    #[must_use]
    pub fn shown(&self) -> String {
        PathBuf::from(self.path()).display().to_string()
    }
}

//! ublk: served devices as block devices of this machine, `/dev/ublkbN`, by the kernel's driver `ublk_drv`.
//!
//! ```text
//!  file system ─► /dev/ublkbN ─► driver ─► queue thread ─► readers, changers ─► filter::served ─► disk
//!                                   ▲            │ answers       │
//!                                   └────────────┴───────────────┘ bytes, by pread and pwrite on /dev/ublkcN
//! ```
//! One thread takes requests from the driver and never waits for a disk. Reads and all others have threads of their
//! own, so that a write that waits for old data to be kept holds up no read. The bytes of a request are copied by the
//! thread that carries it out (`UBLK_F_USER_COPY`).
//!
//! # The agent's end
//! The device outlives the agent (`UBLK_F_USER_RECOVERY`): its requests wait, also those that were under way
//! (`UBLK_F_USER_RECOVERY_REISSUE`), until an agent takes it over again. What was under way is done again from the
//! beginning, which for reads, writes and zeroes comes to the same.
//!
//! A device is known by a number drawn at its making, which the driver keeps (`ublksrv_flags`): another one that has
//! its place after a reboot is not touched.
//!
//! Everything that takes the driver is behind the cargo feature `ublk`; without it all calls answer
//! [`UblkError::NotBuilt`].

#[cfg(not(feature = "ublk"))]
mod absent;
#[cfg(feature = "ublk")]
mod control;
#[cfg(feature = "ublk")]
mod device;
#[cfg(feature = "ublk")]
mod geometry;
#[cfg(feature = "ublk")]
mod pool;
#[cfg(feature = "ublk")]
mod queue;
#[cfg(feature = "ublk")]
mod request;
#[cfg(feature = "ublk")]
mod users;

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

#[cfg(not(feature = "ublk"))]
pub use absent::{Device, available};
#[cfg(feature = "ublk")]
pub use control::available;
#[cfg(feature = "ublk")]
pub use device::Device;

/// What the driver is asked through.
pub const CONTROL: &str = "/dev/ublk-control";

/// A device can't be made, found again or removed.
#[derive(Debug, thiserror::Error)]
pub enum UblkError {
    /// The agent lacks the feature.
    #[error("this agent is built without ublk; build it with `cargo build --release --features ublk`")]
    NotBuilt,
    /// The kernel lacks the driver, or it is not loaded.
    #[error("the kernel shows no {CONTROL}; load its driver with `modprobe ublk_drv`")]
    NoDriver,
    /// The driver is too old.
    #[error("the kernel's ublk driver lacks {0}; it takes Linux 6.5 or later")]
    Lacks(&'static str),
    /// The origin's blocks are too large.
    #[error("its logical blocks have {0} bytes, and the driver takes 4096 at most; serve it over NBD alone")]
    LogicalBlock(u32),
    /// The origin has no whole number of blocks.
    #[error("its size of {size} bytes is no multiple of its logical block of {logical}; make it one")]
    Size {
        /// Bytes of the origin.
        size: u64,
        /// Bytes of a logical block.
        logical: u32,
    },
    /// Somebody uses it.
    #[error("{} is in use: {user}; unmount or close it", node.display())]
    Busy {
        /// The block device.
        node: PathBuf,
        /// Who does.
        user: String,
    },
    /// The driver refuses something.
    #[error("{action}: {source}")]
    Driver {
        /// What was asked of it.
        action: String,
        /// Its answer.
        source: io::Error,
    },
    /// Something else of the machine.
    #[error("{action}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// What is written down of a device, so that the next agent finds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Left {
    /// Its number, of which the name of the node is made; none if it was about to be made.
    pub number: Option<u32>,
    /// The number by which it is known to be ours.
    pub token: u64,
}

impl Left {
    /// For a device that is to be made.
    #[must_use]
    pub fn fresh() -> Self {
        Self {
            number: None,
            token: uuid::Uuid::new_v4().as_u64_pair().0,
        }
    }
}

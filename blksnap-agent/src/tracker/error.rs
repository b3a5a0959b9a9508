//! Tracker errors: what was tried on what, and the remedy.

use std::io;

use super::btf::BtfError;
use super::pins::PinError;
use crate::cbt::ResetReason;
use crate::disk::DiskError;
use crate::disk::dax::Dax;
use crate::statefile::StateFileError;
use crate::units::{DeviceId, UnitError};

/// Something about tracking failed.
#[derive(Debug, thiserror::Error)]
pub enum TrackerError {
    /// The kernel's type information can't be used.
    #[error(transparent)]
    Btf(#[from] BtfError),
    /// The kernel refused the programs or a map.
    #[error(
        "can't load the tracking programs: {0}; run as root (CAP_BPF, CAP_PERFMON) on kernel 6.1 or later, `blksnap-agent doctor` says more"
    )]
    Load(String),
    /// The ring is no power of two of whole pages.
    #[error("ring of {0} bytes: give a power of two of at least 4096")]
    RingSize(u32),
    /// A map operation failed that should not.
    #[error("can't {action} slot {slot}: {reason}")]
    Map {
        /// What was tried.
        action: &'static str,
        /// On which slot.
        slot: u32,
        /// Why.
        reason: String,
    },
    /// The device is attached.
    #[error("{0} is attached already; `blksnap-agent status` shows it")]
    Already(String),
    /// The device is not attached.
    #[error("device {0} is not attached; run `blksnap-agent attach` on it first")]
    NotAttached(DeviceId),
    /// No slot is free.
    #[error("can't track {device}: {limit} {what} are tracked already; detach some")]
    Full {
        /// The device.
        device: String,
        /// How many there may be.
        limit: usize,
        /// Of what.
        what: &'static str,
    },
    /// The bitmap would need more words than a map can have.
    #[error(
        "can't track {device} in blocks of {block_size} bytes: {blocks} blocks are too many; give a larger block size"
    )]
    TooManyBlocks {
        /// The device.
        device: String,
        /// Bytes in a block.
        block_size: u64,
        /// Blocks that this makes.
        blocks: u64,
    },
    /// A read of the device moved no counter.
    #[error(
        "the tracepoint does not fire for {0}: its driver bypasses the block layer, or tracing is stopped; it can't be tracked"
    )]
    HookDead(String),
    /// The device, or its medium, is another one than the one attached.
    #[error("{device} can't be taken: {reason}; attach it again, and make a full backup")]
    Lost {
        /// The device.
        device: String,
        /// What became of it.
        reason: ResetReason,
    },
    /// The device is written past the block layer.
    #[error("{device} can't be tracked: {how}, and what is written so is not seen; mount it with dax=never")]
    Dax {
        /// The device.
        device: String,
        /// By what.
        how: Dax,
    },
    /// The device gets writes that the kernel does not tell of.
    #[error(
        "{device} can't be tracked: {upper} is stacked on it, and this kernel does not tell of the writes that bcache \
         sends down; track {upper}"
    )]
    Bcache {
        /// The device.
        device: String,
        /// The bcache device.
        upper: String,
    },
    /// What outlives the agent.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// The document of a device.
    #[error(transparent)]
    State(#[from] StateFileError),
    /// The device itself.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The block size.
    #[error(transparent)]
    Unit(#[from] UnitError),
    /// A system call.
    #[error("can't {action}: {source}")]
    Io {
        /// What was tried, on what.
        action: String,
        /// Why.
        source: io::Error,
    },
}

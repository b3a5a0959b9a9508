//! Decide: whether a change map goes on after a reboot. Pure: what is known of the device comes as [`Evidence`].
//!
//! A map goes on only if every link of this chain holds:
//!
//! 1. There is a seal, whole, and it belongs to the record. It was made when nothing used the device any more, and
//!    was removed for good before the device was tracked again; so there was no start of the agent in between.
//! 2. It was made in another boot: in the same one the device may have been written after it, with nobody counting
//!    since then. And it was made in the last boot in which an agent started: one that started later and did not use it
//!    has left the device untracked.
//! 3. The device is the same, by what only this device says of itself, and as long.
//! 4. Its disks counted no write since the system started, and have none in flight.
//! 5. Its content is the same where a use would change it. This is the only link that tells of a system that was
//!    started in between without us; see [`super::fingerprint`] for what it can't tell.
//!
//! Anything else, also what can't be found out, is a [`Doubt`], and a new generation begins.

use super::counters::{Unprovable, WriteCounters};
use super::fingerprint::{ContentDiffers, Fingerprint};
use super::record::{Record, Sealed};
use crate::cbt::{CbtMap, ResetReason, RestoreError};
use crate::disk::{DeviceIdentity, Difference, DiskError};
use crate::statefile::StateFileError;

/// What can be found out about a device before it is tracked again.
pub trait Evidence {
    /// The boot that this is; `None` if the kernel does not say.
    fn boot(&self) -> Option<String>;
    /// The last boot before this one in which an agent started; `None` if that is not known.
    fn boot_before(&self) -> Option<String>;
    /// The device now.
    ///
    /// # Errors
    /// It can't be read.
    fn identity(&self) -> Result<DeviceIdentity, DiskError>;
    /// What was written since the system started, by disk or partition.
    ///
    /// # Errors
    /// The counters prove nothing.
    fn written(&self) -> Result<Vec<(String, WriteCounters)>, Unprovable>;
    /// Whether the content is the one that this was made of.
    ///
    /// # Errors
    /// It is not, or can't be read.
    fn content(&self, fingerprint: &Fingerprint) -> Result<(), ContentDiffers>;
}

/// Why a map does not go on.
#[derive(Debug, thiserror::Error)]
pub enum Doubt {
    /// There is no seal.
    #[error("it was in use when tracking stopped, or the system did not stop cleanly")]
    Unsealed,
    /// The seal can't be read.
    #[error("{0}")]
    Seal(#[from] StateFileError),
    /// The seal is of another record.
    #[error("the seal does not belong to the record")]
    OtherRecord,
    /// The saved map is none.
    #[error("{0}")]
    Map(#[from] RestoreError),
    /// The map was in doubt before.
    #[error("{0}")]
    Corrupted(ResetReason),
    /// The system was not started anew since.
    #[error("it was sealed in this boot, and may have been written since")]
    SameBoot,
    /// The system was started in between.
    #[error("it was sealed before the last boot in which an agent started")]
    BootBetween,
    /// The kernel does not say which boot this is.
    #[error("the kernel does not say which boot this is")]
    BootUnknown,
    /// The device can't be identified.
    #[error("{0}")]
    Disk(#[from] DiskError),
    /// The device is not known to be the same.
    #[error("{0}")]
    Device(#[from] Difference),
    /// The map is not of a device of this length.
    #[error("the saved map is of {map} sectors, the device has {device}")]
    Capacity {
        /// Sectors of the map.
        map: u64,
        /// Sectors of the device.
        device: u64,
    },
    /// A disk has been written to.
    #[error(
        "{name} has been written to since the system started: {} writes, {} discards, {} in flight",
        counters.writes, counters.discards, counters.in_flight
    )]
    Written {
        /// The disk or partition.
        name: String,
        /// What it counted.
        counters: WriteCounters,
    },
    /// The counters prove nothing.
    #[error("{0}")]
    Counters(#[from] Unprovable),
    /// The content is another one.
    #[error("{0}")]
    Content(#[from] ContentDiffers),
}

impl Doubt {
    /// The reason of the generation that begins.
    #[must_use]
    pub const fn reason(&self) -> ResetReason {
        match self {
            Self::Seal(StateFileError::Version { .. }) => ResetReason::StateVersion,
            Self::Seal(_) | Self::OtherRecord | Self::Map(_) => ResetReason::StateDamaged,
            Self::Corrupted(reason) => *reason,
            Self::Device(Difference::Other { .. }) => ResetReason::DeviceReplaced,
            Self::Device(Difference::Capacity { .. }) | Self::Capacity { .. } => ResetReason::Resized,
            Self::Unsealed
            | Self::SameBoot
            | Self::BootBetween
            | Self::BootUnknown
            | Self::Disk(_)
            | Self::Device(Difference::Unidentified | Difference::Unknown { .. })
            | Self::Written { .. }
            | Self::Counters(_)
            | Self::Content(_) => ResetReason::ContinuityUnproven,
        }
    }
}

/// The map to go on with, or why a new generation begins. `sealed` is what was found beside `record`.
///
/// # Errors
/// There is no proof that the map has every change.
pub fn decide(
    record: &Record,
    sealed: Result<Option<Sealed>, StateFileError>,
    evidence: &impl Evidence,
) -> Result<CbtMap, Doubt> {
    // First, since it is the better reason.
    let identity = evidence.identity()?;
    record.identity.same_device(&identity)?;
    let sealed = sealed?.ok_or(Doubt::Unsealed)?;
    if sealed.header.record != *record {
        return Err(Doubt::OtherRecord);
    }
    let boot = evidence
        .boot()
        .filter(|boot| !boot.is_empty())
        .ok_or(Doubt::BootUnknown)?;
    if sealed.header.boot == boot || sealed.header.boot.is_empty() {
        return Err(Doubt::SameBoot);
    }
    if evidence.boot_before().as_ref() != Some(&sealed.header.boot) {
        return Err(Doubt::BootBetween);
    }
    sealed.header.identity.same_as(&identity)?;
    untouched(evidence)?;
    evidence.content(&sealed.header.fingerprint)?;
    let map = sealed.into_map()?;
    if map.capacity() != identity.capacity {
        return Err(Doubt::Capacity {
            map: map.capacity().count(),
            device: identity.capacity.count(),
        });
    }
    map.corrupted()
        .map_or(Ok(map), |reason| Err(Doubt::Corrupted(reason)))
}

/// Whether the device is still the one that [`decide`] saw, and still not written to. Asked again when the device is
/// tracked: a write before that moment is in the counters, one after it is in the new bitmap.
///
/// # Errors
/// It was written to, or there is no telling.
pub fn settle(was: &DeviceIdentity, evidence: &impl Evidence) -> Result<(), Doubt> {
    was.same_as(&evidence.identity()?)?;
    untouched(evidence)
}

fn untouched(evidence: &impl Evidence) -> Result<(), Doubt> {
    for (name, counters) in evidence.written()? {
        if !counters.is_zero() {
            return Err(Doubt::Written { name, counters });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;

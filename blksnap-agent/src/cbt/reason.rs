//! Reasons: why a generation ended, and why a question about changes can only be answered with "full needed".

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::units::Generation;

/// Why a map started over: the cause of the generation that began then.
///
/// The codes of [`ResetReason::code`] are the ones in API, metrics and logs; they are never renamed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResetReason {
    /// The device was attached with no earlier map to go on with.
    NewAttach,
    /// Somebody asked for it.
    Requested,
    /// Period numbers ran out.
    Wrapped,
    /// The map was found to be wrong, with no more precise reason.
    Corrupted,
    /// The device changed its capacity.
    Resized,
    /// The kernel skipped a run of a tracking program.
    RunMissed,
    /// The event ring answered with an error other than "full".
    RingError,
    /// A look-up in a tracking map failed that never should.
    MapError,
    /// A write touched sectors past the end of the map.
    OutOfRange,
    /// The tracking program no longer sees requests of the device.
    HookDead,
    /// A command went to the device past the block layer's write path.
    PassthroughWrite,
    /// A file system on the device is mounted with direct access to memory, which no hook sees.
    DaxMount,
    /// The medium was exchanged.
    MediumChanged,
    /// The device is gone, or has no medium.
    DeviceGone,
    /// Another device took the place of the one tracked.
    DeviceReplaced,
    /// The state left by the agent before is damaged or missing.
    StateDamaged,
    /// The state left by the agent before has a form that this one can't read.
    StateVersion,
    /// Nothing proves that the device was not written while it was not tracked.
    ContinuityUnproven,
    /// A write that was under way at an instant could not be followed until it landed.
    NotFollowed,
}

impl ResetReason {
    /// All reasons.
    pub const ALL: [Self; 19] = [
        Self::NewAttach,
        Self::Requested,
        Self::Wrapped,
        Self::Corrupted,
        Self::Resized,
        Self::RunMissed,
        Self::RingError,
        Self::MapError,
        Self::OutOfRange,
        Self::HookDead,
        Self::PassthroughWrite,
        Self::DaxMount,
        Self::MediumChanged,
        Self::DeviceGone,
        Self::DeviceReplaced,
        Self::StateDamaged,
        Self::StateVersion,
        Self::ContinuityUnproven,
        Self::NotFollowed,
    ];

    /// The stable code, as in JSON and metric labels.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::NewAttach => "new_attach",
            Self::Requested => "requested",
            Self::Wrapped => "wrapped",
            Self::Corrupted => "corrupted",
            Self::Resized => "resized",
            Self::RunMissed => "run_missed",
            Self::RingError => "ring_error",
            Self::MapError => "map_error",
            Self::OutOfRange => "out_of_range",
            Self::HookDead => "hook_dead",
            Self::PassthroughWrite => "passthrough_write",
            Self::DaxMount => "dax_mount",
            Self::MediumChanged => "medium_changed",
            Self::DeviceGone => "device_gone",
            Self::DeviceReplaced => "device_replaced",
            Self::StateDamaged => "state_damaged",
            Self::StateVersion => "state_version",
            Self::ContinuityUnproven => "continuity_unproven",
            Self::NotFollowed => "not_followed",
        }
    }
}

impl fmt::Display for ResetReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NewAttach => "the device was attached anew",
            Self::Requested => "a new generation was asked for",
            Self::Wrapped => "the period numbers ran out",
            Self::Corrupted => "the map was found to be wrong",
            Self::Resized => "the device changed its capacity",
            Self::RunMissed => "the kernel skipped a run of the tracking program",
            Self::RingError => "the event ring failed",
            Self::MapError => "a tracking map failed",
            Self::OutOfRange => "a write reached past the end of the map",
            Self::HookDead => "the tracking program no longer sees the device's requests",
            Self::PassthroughWrite => "a passthrough command may have written to the device",
            Self::DaxMount => "the device is mounted with direct access (dax), which can't be tracked",
            Self::MediumChanged => "the medium was exchanged",
            Self::DeviceGone => "the device is gone",
            Self::DeviceReplaced => "another device took the place of the one tracked",
            Self::StateDamaged => "the saved tracking state is damaged or missing",
            Self::StateVersion => "the saved tracking state has an unknown version",
            Self::ContinuityUnproven => "writes while the device was not tracked can't be ruled out",
            Self::NotFollowed => "a write under way at a take could not be followed until it landed",
        })
    }
}

/// Why only a full copy gives a right image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FullReason {
    /// The base names another generation than the map's, which began for the reason `began`.
    GenerationEnded {
        /// Generation of the base.
        base: Generation,
        /// Generation of the map.
        current: Generation,
        /// Why the map's generation began.
        began: ResetReason,
    },
    /// The base has a number that the map has not reached.
    FutureNumber {
        /// Number of the base.
        base: u8,
        /// Number of the map's last take.
        number: u8,
    },
    /// The map is known to be wrong, until a take starts it over.
    Corrupted(ResetReason),
    /// No take has been made since the map started.
    NotTaken,
}

impl FullReason {
    /// The stable code, as in JSON. For an ended generation it is the one of the [`ResetReason`], where that says
    /// more than that the device was attached.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::GenerationEnded { began, .. } => match began {
                ResetReason::NewAttach => "generation_ended",
                reason => reason.code(),
            },
            Self::FutureNumber { .. } => "future_number",
            Self::Corrupted(reason) => reason.code(),
            Self::NotTaken => "not_taken",
        }
    }
}

impl fmt::Display for FullReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::GenerationEnded { base, current, began } => {
                write!(
                    f,
                    "generation {base} of the base is not the map's {current}, which began because {began}"
                )
            }
            Self::FutureNumber { base, number } => {
                write!(
                    f,
                    "number {base} of the base is past {number}, the last one taken in this generation"
                )
            }
            Self::Corrupted(reason) => write!(f, "the map can't be relied on until the next take: {reason}"),
            Self::NotTaken => f.write_str("no snapshot was taken since the map began"),
        }
    }
}

/// The answer where changed extents can't be given, or could be too few: take everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("full copy needed: {reason}")]
pub struct FullNeeded {
    /// Why.
    pub reason: FullReason,
}

impl From<FullReason> for FullNeeded {
    fn from(reason: FullReason) -> Self {
        Self { reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_serialized_names_and_differ() {
        let mut codes: Vec<&str> = ResetReason::ALL.iter().map(|r| r.code()).collect();
        for reason in ResetReason::ALL {
            let json = serde_json::to_string(&reason).unwrap();
            assert_eq!(json, format!("\"{}\"", reason.code()));
            assert_eq!(serde_json::from_str::<ResetReason>(&json).unwrap(), reason);
        }
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), ResetReason::ALL.len());
    }

    #[test]
    fn errors_are_one_line() {
        let generation = Generation::new(uuid::Uuid::from_u128(7));
        for reason in [
            FullReason::GenerationEnded {
                base: generation,
                current: generation,
                began: ResetReason::Wrapped,
            },
            FullReason::FutureNumber { base: 9, number: 3 },
            FullReason::Corrupted(ResetReason::RunMissed),
            FullReason::NotTaken,
        ] {
            let text = FullNeeded { reason }.to_string();
            assert!(
                !text.contains('\n') && text.starts_with("full copy needed: "),
                "{text}"
            );
        }
    }
}

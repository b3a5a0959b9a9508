//! Document: what the next agent must know of a tracked device, beside the pins. Its change map and counters.
//!
//! It is of this boot and of these maps, and says of which. docs/format.md has the form.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use blksnap_common::track::{ABI_VERSION, Slot, SlotState};
use serde::{Deserialize, Serialize};

use crate::cbt::{Blocks, CbtMap, ResetReason, SavedHeader};
use crate::disk::presence::Presence;
use crate::statefile::{self, Format, StateFileError};
use crate::units::DeviceId;

/// The form; a new one with every change of the maps, too.
const FORMAT: Format = Format {
    name: "blksnap-device",
    version: ABI_VERSION * 100 + 2,
};

/// Where the kernel says which boot this is.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Everything but the bytes of the map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Document {
    /// The boot.
    pub(super) boot: String,
    /// The kernel's number of map `BITMAPS`.
    pub(super) instance: u32,
    /// The device's node.
    pub(super) path: PathBuf,
    /// The device.
    pub(super) device: DeviceId,
    /// The disk's sequence number.
    pub(super) diskseq: Option<u64>,
    /// The disk, as the kernel's `dev_t`.
    pub(super) disk: u32,
    /// The slot.
    pub(super) slot: SavedSlot,
    /// Rare events handled so far.
    pub(super) seen: Vec<u64>,
    /// Rare events before the attach.
    pub(super) at_attach: Vec<u64>,
    /// Skipped runs that this generation is not concerned by, by the number of the first program of each set.
    pub(super) misses: BTreeMap<u32, u64>,
    /// What is known of the device, to tell it from another one in its place.
    pub(super) presence: Option<Presence>,
    /// Doubts that came up, by reason.
    pub(super) doubts: BTreeMap<ResetReason, u64>,
    /// How often the map began anew, by reason.
    pub(super) resets: BTreeMap<ResetReason, u64>,
    /// The change map.
    pub(super) map: SavedHeader,
}

/// A slot as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedSlot {
    id: u32,
    first_sector: u64,
    end_sector: u64,
    block_shift: u32,
}

impl From<&Slot> for SavedSlot {
    fn from(slot: &Slot) -> Self {
        Self {
            id: slot.id,
            first_sector: slot.first_sector,
            end_sector: slot.end_sector,
            block_shift: slot.block_shift,
        }
    }
}

impl Document {
    /// Writes it with the map's bytes.
    pub(super) fn write(&self, path: &Path, sections: &[Blocks]) -> Result<(), StateFileError> {
        statefile::write_sections(path, FORMAT, self, sections)
    }

    /// Reads it, with the map.
    pub(super) fn read(path: &Path) -> Result<(Self, CbtMap), ResetReason> {
        let said = |error: &dyn std::fmt::Display| {
            tracing::warn!(path = %path.display(), %error, "what is known of a tracked device is lost");
        };
        let (document, sections) = match statefile::read_sections::<Self>(path, FORMAT) {
            Ok(Some(read)) => read,
            Ok(None) => return Err(ResetReason::StateDamaged),
            Err(error) => {
                said(&error);
                return Err(match error {
                    StateFileError::Version { .. } => ResetReason::StateVersion,
                    _ => ResetReason::StateDamaged,
                });
            }
        };
        let map = CbtMap::restore_sections(&document.map, sections).map_err(|error| {
            said(&error);
            ResetReason::StateDamaged
        })?;
        Ok((document, map))
    }
}

/// The number of this boot.
pub(super) fn boot_id() -> String {
    std::fs::read_to_string(BOOT_ID)
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}

/// A slot's state as numbers.
pub(super) fn numbers(state: &SlotState) -> Vec<u64> {
    vec![
        state.ring_full,
        state.whole_device,
        state.errors,
        state.ledger_lost,
        state.unknown_completions,
        state.passthrough,
        state.period,
    ]
}

/// A slot's state from numbers.
pub(super) fn state_of(numbers: &[u64]) -> Option<SlotState> {
    let [
        ring_full,
        whole_device,
        errors,
        ledger_lost,
        unknown_completions,
        passthrough,
        period,
    ] = *numbers
    else {
        return None;
    };
    Some(SlotState {
        ring_full,
        whole_device,
        errors,
        ledger_lost,
        unknown_completions,
        passthrough,
        period,
    })
}

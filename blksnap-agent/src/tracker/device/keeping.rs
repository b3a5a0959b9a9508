//! Keeping: the device's document is written, and read by the next agent. [`super::super::keep`] has the argument.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blksnap_common::blockrange::{BlockRange, blocks_of};
use blksnap_common::track::Slot;

use super::super::bitmap::Bitmap;
use super::super::document::{self, Document, SavedSlot};
use super::super::keep::{self, Keep};
use super::super::periods::{Marked as _, Periods, RingFull};
use super::super::{Shared, TrackerError, pins};
use super::doubt::{self, Doubts};
use super::{State, TrackedDevice};
use crate::cbt::ResetReason;
use crate::disk::BlockDevice;
use crate::disk::presence::{Change, Presence, SYSFS};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, PoisonError};

/// A slot that can't be gone on with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// The node of its device, where that is known.
    pub path: Option<PathBuf>,
    /// Its disk, as the kernel's `dev_t`, and the sector where it begins there.
    pub place: (u32, u64),
    /// Why.
    pub reason: ResetReason,
}

impl TrackedDevice {
    /// Goes on with what an agent before left of `slot` on `disk`.
    ///
    /// # Errors
    /// Why it can't be gone on with. Nothing is changed.
    pub(in super::super) fn adopt(shared: &Arc<Shared>, disk: u32, slot: Slot) -> Result<Self, Lost> {
        let lost = |path: Option<&Path>, reason| Lost {
            path: path.map(Path::to_owned),
            place: (disk, slot.first_sector),
            reason,
        };
        let Some(documents) = &shared.documents else {
            return Err(lost(None, ResetReason::StateDamaged));
        };
        let (document, mut map) =
            Document::read(&keep::document_of(documents, slot.id)).map_err(|reason| lost(None, reason))?;
        let lost = |reason| lost(Some(&document.path), reason);
        let same = document.boot == document::boot_id()
            && document.instance == shared.object().instance()
            && document.disk == disk
            && document.slot == SavedSlot::from(&slot)
            && map.block_size().sector_shift() == slot.block_shift
            && map.capacity().count() == slot.end_sector - slot.first_sector;
        let (Some(seen), Some(at_attach), true) = (
            document::state_of(&document.seen),
            document::state_of(&document.at_attach),
            same,
        ) else {
            return Err(lost(ResetReason::StateDamaged));
        };
        let mut device = BlockDevice::open(&document.path).map_err(|error| {
            tracing::warn!(%error, "a tracked device is gone");
            lost(ResetReason::DeviceGone)
        })?;
        if device.id != document.device
            || device.diskseq != document.diskseq
            || device.disk_id.kernel_dev() != disk
            || device.first_sector.count() != slot.first_sector
        {
            return Err(lost(ResetReason::DeviceReplaced));
        }
        let presence = Presence::look(Path::new(SYSFS), &device);
        let change = match (&presence, &document.presence) {
            (Some(now), Some(before)) => now.change_since(before),
            _ => Some(Change::Gone),
        };
        if let Some(reason) = change.and_then(doubt::reason_to_lose) {
            return Err(lost(reason));
        }
        // As attached: whoever looks for doubt compares it with what the kernel says.
        device.capacity = map.capacity();
        let block_size = map.block_size();
        let blocks = block_size.blocks_in(device.capacity);
        let told = map.corrupted();
        let (found, open, table, sets, stack) = (|| {
            let mut object = shared.object();
            // What the device is made of may have changed.
            let stack = object.guards.set(slot.id, device.id)?;
            let open = Bitmap::open(object.open_bitmap(slot.id)?, slot.id, blocks)?;
            let pins = object
                .pins()
                .ok_or_else(|| TrackerError::Load("no pins".to_owned()))?;
            let (found, at) = Keep::find(pins, documents, slot.id, blocks, open.id()?)?;
            let open = match at {
                Some(path) => open.found_at(path),
                None => open,
            };
            for (sector, sectors) in object.in_flight(disk)? {
                if let Some(BlockRange { first, last }) = blocks_of(&slot, sector, sectors) {
                    map.mark_blocks(first, last);
                }
            }
            Ok::<_, TrackerError>((
                found,
                open,
                object.bitmap_table()?,
                object.misses_by_set()?,
                stack,
            ))
        })()
        .map_err(|error| {
            tracing::warn!(
                %error,
                device = %document.path.display(),
                "what is known of a tracked device is lost"
            );
            lost(ResetReason::MapError)
        })?;
        // An agent that was killed as it opened a period may not have come to say so.
        let period = shared.slot_state(slot.id).period.max(found.period.unwrap_or(0));
        shared.set_period(slot.id, period);
        for bitmap in &found.blocks {
            let mut words = vec![0; bitmap.words()];
            bitmap.read(0, &mut words);
            map.mark_bits(&words);
        }
        // Some set of programs was there when the document was made, and is there now.
        let continuous = document
            .misses
            .keys()
            .any(|set| matches!(sets.get(set), Some(Some(_))));
        let skipped = sets
            .iter()
            .any(|(set, misses)| misses.is_some_and(|n| n != document.misses.get(set).copied().unwrap_or(0)));
        if !continuous {
            map.corrupt(ResetReason::HookDead);
        } else if skipped {
            map.corrupt(ResetReason::RunMissed);
        }
        Ok(Self {
            block_size,
            slot,
            shared: Arc::clone(shared),
            state: Mutex::new(State {
                periods: Periods::new(map, open, period),
                table,
                seen,
                misses: sets.into_iter().filter_map(|(set, n)| Some((set, n?))).collect(),
                keep: Some(found.keep),
                unsaved: true,
                // As attached, for the same reason as the capacity.
                doubts: Doubts::adopted(document.presence, stack, told, document.doubts),
                resets: document.resets,
            }),
            detached: AtomicBool::new(false),
            ledger: Mutex::new(0),
            // Whatever was in the ring is read from the bitmap.
            ring_full: RingFull::new(u64::MAX),
            at_attach,
            saving: Mutex::new(()),
            device,
        })
    }

    /// Writes the document, if one is kept: what is marked by now survives the agent.
    ///
    /// # Errors
    /// The file can't be written. Nothing marked is lost then, but a take that it was for must not be told to
    /// anybody.
    pub fn save(&self) -> Result<(), TrackerError> {
        let _saving = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.state();
        if self.detached.load(Ordering::Acquire) {
            return Err(TrackerError::NotAttached(self.device.id));
        }
        let State { periods, keep, .. } = &mut *state;
        let Some(keep) = keep else {
            return Ok(());
        };
        keep.begin_save()?;
        let covered = keep.take_covered();
        let path = keep.document().to_owned();
        let saved = periods.map.save();
        let sections = saved.sections();
        let header = saved.header;
        let document = Document {
            boot: document::boot_id(),
            instance: self.shared.instance,
            path: self.device.path.clone(),
            device: self.device.id,
            diskseq: self.device.diskseq,
            disk: self.device.disk_id.kernel_dev(),
            slot: SavedSlot::from(&self.slot),
            seen: document::numbers(&state.seen),
            at_attach: document::numbers(&self.at_attach),
            misses: state.misses.clone(),
            doubts: state.doubts.counts.clone(),
            presence: state.doubts.presence.clone(),
            resets: state.resets.clone(),
            map: header,
        };
        state.unsaved = false;
        drop(state);
        let written = document.write(&path, &sections);
        let failed = match written {
            Ok(()) => covered.iter().find_map(|pin| pins::remove_tree(pin).err()),
            Err(error) => {
                let mut state = self.state();
                state.unsaved = true;
                if let Some(keep) = &mut state.keep {
                    keep.give_back(covered);
                }
                return Err(error.into());
            }
        };
        match failed {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }

    /// Writes the document if it lacks something.
    pub(in super::super) fn save_if_needed(&self) {
        if self.state().unsaved
            && let Err(error) = self.save()
        {
            tracing::error!(device = %self.device.path.display(), %error, "what is known of the device would not survive this process");
        }
    }
}

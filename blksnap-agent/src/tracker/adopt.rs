//! Adopt: going on with what an agent before tracked.

use std::sync::Arc;

use blksnap_common::track::SLOT_LEDGER;

use super::bitmap::Bitmap;
use super::device::{Lost, TrackedDevice};
use super::{Shared, TrackerError, keep, pins};

/// Takes over all slots of the loaded object: gives the devices, and what could not be taken over, which is not
/// tracked any more then.
pub(super) fn adopt(shared: &Arc<Shared>) -> Result<(Vec<Arc<TrackedDevice>>, Vec<Lost>), TrackerError> {
    let Some(documents) = &shared.documents else {
        return Ok((Vec::new(), Vec::new()));
    };
    let slots = shared.object().slots();
    // Completions were not seen while no agent ran.
    for (disk, slot) in slots.iter().filter(|(_, slot)| slot.flags & SLOT_LEDGER != 0) {
        shared.object().set_ledger(*disk, slot.id, false)?;
    }
    let mut devices = Vec::new();
    let mut lost = Vec::new();
    for (disk, mut slot) in slots {
        slot.flags &= !SLOT_LEDGER;
        match TrackedDevice::adopt(shared, disk, slot) {
            Ok(device) => {
                tracing::info!(device = %device.path().display(), "tracking goes on");
                devices.push(Arc::new(device));
            }
            Err(what) => {
                tracing::warn!(
                    device = what.path.as_ref().map(|path| path.display().to_string()),
                    reason = what.reason.code(),
                    "tracking can't go on: attach it again"
                );
                lost.push(what);
                drop_slot(shared, disk, slot.id)?;
            }
        }
    }
    let mut object = shared.object();
    object.drop_ledger_if_unused()?;
    drop(object);
    for device in &devices {
        // From here on the documents name this agent's programs.
        device.save()?;
    }
    let mut object = shared.object();
    object.drop_earlier()?;
    // What is there without being in the table: remains of an attach or a detach that was cut short.
    let known: Vec<u32> = devices.iter().map(|device| device.slot_id()).collect();
    if let Some(pins) = object.pins() {
        for slot in pins.slots()? {
            if !known.contains(&slot) {
                pins::remove_tree(&pins.slot(slot))?;
            }
        }
    }
    for path in pins::entries(documents)? {
        if !known
            .iter()
            .any(|slot| keep::document_of(documents, *slot) == path)
        {
            pins::remove_tree(&path)?;
        }
    }
    object.unpin_if_unused()?;
    Ok((devices, lost))
}

/// Ends tracking of a slot that has no device.
fn drop_slot(shared: &Shared, disk: u32, slot: u32) -> Result<(), TrackerError> {
    let mut object = shared.object();
    object.remove(disk, slot)?;
    object.bitmap_table()?.set(slot, &Bitmap::new(slot, 1)?)?;
    object.release(slot);
    Ok(())
}

//! Tracked device: one slot, its bitmap, its change map.
//!
//! # Locking
//! `state` first, then the tracker's object; nobody holds the object and waits for a device.
//!
//! # Why no write is missed
//! The programs set a bit before the bio goes on to the driver. [`TrackedDevice::close_period`] puts a clear
//! bitmap in place of the open one; the kernel returns from that only when no program uses the old one, so what
//! is read from it afterwards is complete: a write is either in the closed bitmap, or in the new one. Ring
//! records only make the map current in between; a record of a closed period is ignored, since the bitmap had it.

mod doubt;
mod keeping;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use blksnap_common::blockrange::{BlockRange, blocks_of};
use blksnap_common::track::{OP_KINDS, Record, Slot, SlotState};
use serde::Serialize;

use doubt::Doubts;
pub use keeping::Lost;

use super::bitmap::{Bitmap, BitmapTable, DirtyBlocks};
use super::keep::Keep;
use super::periods::{Closed, Handed, Periods, RingFull};
use super::watch::{Collected, Watched};
use super::{Shared, TrackerError, pins, probe};
use crate::cbt::{CbtMap, MapError, ResetReason};
use crate::disk::presence::{Presence, SYSFS};
use crate::disk::{BlockDevice, DiskError, bcache, dax};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, MutexGuard, PoisonError};
use crate::units::{BlockSize, Sectors};

/// What the ledger knows of writes in flight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LedgerStatus {
    /// Writes queued and not complete.
    pub pending: u64,
    /// Writes, or completions, that could not be followed; counted since the tracker started.
    pub lost: u64,
    /// Completions of writes that were queued before the ledger was kept; counted since the attach.
    pub unknown: u64,
}

/// Counters of a device since it was attached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DeviceCounters {
    /// Operations by [`blksnap_common::track::OpKind`].
    pub ops: [u64; OP_KINDS],
    /// Bytes by [`blksnap_common::track::OpKind`].
    pub bytes: [u64; OP_KINDS],
    /// Ring records written.
    pub records: u64,
    /// Records that found the ring full; the bitmap had their blocks.
    pub ring_full: u64,
    /// Events that a tracking program was skipped for, over all devices since the tracker started.
    pub run_misses: u64,
    /// Blocks changed in the open period.
    pub dirty_blocks: u64,
    /// Passthrough commands that may have changed it.
    pub passthrough: u64,
    /// Doubts that came up, by reason: each ends a generation.
    pub doubts: BTreeMap<ResetReason, u64>,
    /// Generations that began, by reason.
    pub resets: BTreeMap<ResetReason, u64>,
}

/// A device that is tracked.
#[derive(Debug)]
pub struct TrackedDevice {
    device: BlockDevice,
    block_size: BlockSize,
    slot: Slot,
    shared: Arc<Shared>,
    state: Mutex<State>,
    detached: AtomicBool,
    /// Holders of the ledger.
    ledger: Mutex<u32>,
    ring_full: RingFull,
    /// Values of the slot's state when it was attached: slots are used again.
    at_attach: SlotState,
    /// One save at a time.
    saving: Mutex<()>,
}

#[derive(Debug)]
struct State {
    periods: Periods<Bitmap>,
    table: BitmapTable,
    /// Rare events handled so far; passthrough commands and errors when this generation began.
    seen: SlotState,
    /// Skipped runs of the steady programs when this generation began, by the number of the first program: of this
    /// agent, and of those before.
    misses: BTreeMap<u32, u64>,
    /// What outlives the agent.
    keep: Option<Keep>,
    /// The document lacks something that it should have soon.
    unsaved: bool,
    doubts: Doubts,
    resets: BTreeMap<ResetReason, u64>,
}

impl State {
    /// Marks blocks in the open period, and keeps them for the next agent.
    fn mark(&mut self, dirty: &DirtyBlocks) {
        if let Some(keep) = &self.keep {
            keep.add(0, dirty.words());
        }
        dirty.mark(&mut self.periods.map);
    }

    /// Marks the blocks `first..=last`, and keeps them.
    fn mark_blocks(&mut self, first: u64, last: u64) {
        if let Some(keep) = &self.keep {
            keep.add_blocks(first, last);
        }
        self.periods.map.mark_blocks(first, last);
    }
}

/// Ranges can't be marked.
#[derive(Debug, thiserror::Error)]
pub enum MarkError {
    /// A range is not of the device.
    #[error(transparent)]
    Range(#[from] MapError),
    /// The mark would not survive the agent.
    #[error(transparent)]
    Save(#[from] TrackerError),
}

/// A bitmap for the programs, pinned where things are kept.
fn open_bitmap(keep: Option<&Keep>, slot: u32, blocks: u64, period: u64) -> Result<Bitmap, TrackerError> {
    match keep {
        Some(keep) => keep.bitmap(period),
        None => Bitmap::new(slot, blocks),
    }
}

impl TrackedDevice {
    /// Tracks a device with a map of its capacity, which has every change until now.
    pub(super) fn attach(
        shared: &Arc<Shared>,
        device: BlockDevice,
        map: CbtMap,
        resets: BTreeMap<ResetReason, u64>,
    ) -> Result<Self, TrackerError> {
        let block_size = map.block_size();
        let blocks = map.block_count();
        if let Some(how) = dax::of(&device)? {
            return Err(TrackerError::Dax {
                device: device.path.display().to_string(),
                how,
            });
        }
        if let Some(upper) = bcache::unseen_above(device.id) {
            return Err(TrackerError::Bcache {
                device: device.path.display().to_string(),
                upper,
            });
        }
        let disk = device.disk_id.kernel_dev();
        let kind = probe::disk_kind(&device);
        let mut object = shared.object();
        object.pin()?;
        let id = object.reserve(disk, &device.path.display().to_string())?;
        let started = (|| {
            let keep = match (object.pins(), &shared.documents) {
                (Some(pins), Some(documents)) => Some(Keep::create(pins, documents, id, blocks)?),
                _ => None,
            };
            // Records of the device that had the slot before may still be in the ring.
            let period = shared.slot_state(id).period + 1;
            let bitmap = open_bitmap(keep.as_ref(), id, blocks, period)?;
            shared.set_period(id, period);
            let slot = Slot {
                first_sector: device.first_sector.count(),
                end_sector: device.first_sector.count() + device.capacity.count(),
                id,
                block_shift: block_size.sector_shift(),
                flags: 0,
                reserved: 0,
            };
            let doubts = Doubts::new(
                Presence::look(Path::new(SYSFS), &device),
                object.guards.set(id, device.id)?,
            );
            let at_attach = shared.slot_state(id);
            let misses = object.misses_by_set()?;
            let mut table = object.bitmap_table()?;
            table.set(id, &bitmap)?;
            object.insert(disk, slot, kind)?;
            Ok((slot, table, bitmap, at_attach, misses, keep, doubts))
        })();
        let (slot, table, bitmap, at_attach, misses, keep, doubts) = match started {
            Ok(started) => started,
            Err(error) => {
                // What is left of the slot has no document: nobody takes it for tracked.
                if let Some(pins) = object.pins() {
                    let _ = pins::remove_tree(&pins.slot(id));
                }
                object.release(id);
                let _ = object.unpin_if_unused();
                return Err(error);
            }
        };
        drop(object);
        let tracked = Self {
            device,
            block_size,
            slot,
            shared: Arc::clone(shared),
            state: Mutex::new(State {
                periods: Periods::new(map, bitmap, at_attach.period),
                table,
                seen: at_attach,
                misses: misses
                    .into_iter()
                    .filter_map(|(set, n)| Some((set, n?)))
                    .collect(),
                keep,
                unsaved: false,
                doubts,
                resets,
            }),
            detached: AtomicBool::new(false),
            ledger: Mutex::new(0),
            ring_full: RingFull::new(at_attach.ring_full),
            at_attach,
            saving: Mutex::new(()),
        };
        let proven = tracked.hook_is_alive().and_then(|alive| {
            if alive {
                tracked.save()
            } else {
                Err(TrackerError::HookDead(tracked.device.path.display().to_string()))
            }
        });
        match proven {
            Ok(()) => Ok(tracked),
            Err(error) => {
                tracked.detach()?;
                Err(error)
            }
        }
    }

    /// The device as it was when it was attached.
    #[must_use]
    pub fn device(&self) -> &BlockDevice {
        &self.device
    }

    /// Size of a tracking block.
    #[must_use]
    pub fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// Closes the bitmap's period: what was written in it goes into the change map, under the number of the
    /// open snapshot period, and comes back as a set of blocks.
    ///
    /// # Errors
    /// The device was detached, or the kernel has no memory for a new bitmap. The period stays open then.
    pub fn close_period(&self) -> Result<DirtyBlocks, TrackerError> {
        Ok(self.close()?.blocks())
    }

    /// Closes the period, and gives its bitmap.
    fn close(&self) -> Result<Arc<Closed>, TrackerError> {
        let handed = self.close_locked(&mut self.state())?;
        Ok(handed.settle())
    }

    fn close_locked(&self, state: &mut State) -> Result<Handed, TrackerError> {
        if self.detached.load(Ordering::Acquire) {
            return Err(TrackerError::NotAttached(self.device.id));
        }
        let blocks = self.block_size.blocks_in(self.device.capacity);
        let period = state.periods.number();
        let next = open_bitmap(state.keep.as_ref(), self.slot.id, blocks, period + 1)?;
        state.table.set(self.slot.id, &next)?;
        let closed = state.periods.switched(next);
        if self.shared.slot_state(self.slot.id).period != period {
            // Nobody else writes there: what else is in that memory may be wrong, too.
            state.corrupt(&self.device, ResetReason::Corrupted);
        }
        self.shared.set_period(self.slot.id, state.periods.number());
        let seen = self.shared.slot_state(self.slot.id);
        let all = seen.whole_device != state.seen.whole_device;
        if seen.passthrough != state.seen.passthrough {
            state.corrupt(&self.device, ResetReason::PassthroughWrite);
        }
        if seen.errors != state.seen.errors {
            state.corrupt(&self.device, ResetReason::MapError);
        }
        state.seen = SlotState {
            // Handled where the generation ends.
            passthrough: state.seen.passthrough,
            errors: state.seen.errors,
            ..seen
        };
        if let (Some(keep), true) = (&state.keep, all) {
            keep.add_blocks(0, blocks - 1);
        }
        let State { periods, keep, .. } = &mut *state;
        let handed = periods.hand_on(Arc::clone(&closed), all, |first, words| {
            if let Some(keep) = keep {
                keep.add(first, words);
            }
        });
        state.tell(&self.device);
        if let Some(pin) = closed.pin() {
            // Its blocks are kept: one that stays is only marked again.
            pins::remove_tree(pin)?;
        }
        Ok(handed)
    }

    /// Whether nothing was marked since the last close, by any program that has ended or will end: it looks at the
    /// open bitmap and does not wait, so a program that runs meanwhile may mark just afterwards. Quicker than
    /// [`Self::close_period`], which waits for the kernel.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        let state = self.state();
        let seen = self.shared.slot_state(self.slot.id);
        // Doubt is looked for at the take.
        state.periods.is_clean() && seen.whole_device == state.seen.whole_device
    }

    /// Runs `f` on the change map. Keep it short: the tracker's thread waits.
    pub fn with_map<T>(&self, f: impl FnOnce(&CbtMap) -> T) -> T {
        f(&self.state().periods.map)
    }

    /// Marks blocks in the open period of the change map.
    pub fn mark(&self, dirty: &DirtyBlocks) {
        self.state().mark(dirty);
    }

    /// Marks sectors in both maps, as [`CbtMap::mark_both`], and keeps that. All ranges are looked at first.
    ///
    /// # Errors
    /// One reaches past the end: nothing is marked. Or the document can't be written.
    pub fn mark_both(&self, ranges: &[(Sectors, Sectors)]) -> Result<(), MarkError> {
        {
            let mut state = self.state();
            for (start, count) in ranges {
                state.periods.map.check_range(*start, *count)?;
            }
            for (start, count) in ranges {
                state.periods.map.mark_both(*start, *count)?;
            }
        }
        Ok(self.save()?)
    }

    /// From here on writes are marked again when they complete. Calls nest.
    ///
    /// # Errors
    /// The kernel refuses the program or the change of the map.
    pub fn start_ledger(&self) -> Result<(), TrackerError> {
        let mut holders = self.holders();
        if *holders == 0 {
            self.shared
                .object()
                .set_ledger(self.device.disk_id.kernel_dev(), self.slot.id, true)?;
        }
        *holders += 1;
        Ok(())
    }

    /// Ends what [`Self::start_ledger`] started. Writes that are still in flight are marked now: they may land
    /// after an instant that was taken before.
    ///
    /// # Errors
    /// The kernel refuses; the map is corrupted then.
    pub fn stop_ledger(&self) -> Result<(), TrackerError> {
        let mut holders = self.holders();
        *holders = holders.saturating_sub(1);
        if *holders > 0 {
            return Ok(());
        }
        let mut state = self.state();
        let stopped = self.end_ledger(&mut state);
        if stopped.is_err() {
            state.corrupt(&self.device, ResetReason::MapError);
        }
        stopped
    }

    fn end_ledger(&self, state: &mut State) -> Result<(), TrackerError> {
        let disk = self.device.disk_id.kernel_dev();
        let mut object = self.shared.object();
        object.set_ledger(disk, self.slot.id, false)?;
        for (sector, sectors) in object.in_flight(disk)? {
            if let Some(BlockRange { first, last }) = blocks_of(&self.slot, sector, sectors) {
                state.mark_blocks(first, last);
            }
        }
        object.drop_ledger_if_unused()
    }

    /// What the ledger knows now.
    ///
    /// # Errors
    /// The maps can't be read.
    pub fn ledger_status(&self) -> Result<LedgerStatus, TrackerError> {
        let (misses, in_flight) = {
            let mut object = self.shared.object();
            (
                object.run_misses()?,
                object.in_flight(self.device.disk_id.kernel_dev())?,
            )
        };
        let seen = self.shared.slot_state(self.slot.id);
        let pending = in_flight
            .iter()
            .filter(|(s, n)| blocks_of(&self.slot, *s, *n).is_some())
            .count();
        Ok(LedgerStatus {
            pending: pending as u64,
            lost: seen.ledger_lost + misses.total(),
            unknown: seen.unknown_completions - self.at_attach.unknown_completions,
        })
    }

    /// Writes that the ledger could not enter, completions that the kernel skipped the program for, and, unless the
    /// driver tells the sectors of what completes (`requests`), completions that the ledger knows nothing of. Counted
    /// since the tracker started; skipped beginnings of writes end the generation by themselves.
    ///
    /// # Errors
    /// The kernel does not say what it skipped.
    pub(super) fn unfollowed(&self, requests: bool) -> Result<u64, TrackerError> {
        let skipped = self.shared.object().run_misses()?.complete;
        let seen = self.shared.slot_state(self.slot.id);
        let unknown = if requests { 0 } else { seen.unknown_completions };
        Ok(seen.ledger_lost + skipped + unknown)
    }

    /// Capacity that the kernel reports now.
    ///
    /// # Errors
    /// The device is gone or another one.
    pub fn capacity_now(&self) -> Result<Sectors, DiskError> {
        self.device.capacity_now()
    }

    /// The counters.
    ///
    /// # Errors
    /// The maps can't be read.
    pub fn counters(&self) -> Result<DeviceCounters, TrackerError> {
        let (counters, misses) = {
            let mut object = self.shared.object();
            (object.counters(self.slot.id)?, object.run_misses()?)
        };
        let seen = self.shared.slot_state(self.slot.id);
        let state = self.state();
        Ok(DeviceCounters {
            ops: std::array::from_fn(|kind| counters.kinds[kind].ops),
            bytes: std::array::from_fn(|kind| counters.kinds[kind].bytes),
            records: counters.records,
            ring_full: seen.ring_full - self.at_attach.ring_full,
            passthrough: seen.passthrough - self.at_attach.passthrough,
            run_misses: misses.steady,
            dirty_blocks: state.periods.map.dirty_blocks(),
            doubts: state.doubts.counts.clone(),
            resets: state.resets.clone(),
        })
    }

    /// Brings the change map up to what was queued until now. The period stays open.
    pub fn refresh(&self) {
        let period = self.state().periods.number();
        let windows = (0..).take_while(|window| {
            let mut state = self.state();
            !self.detached.load(Ordering::Acquire) && state.periods.refresh_window(period, *window)
        });
        // Others get the lock between two windows.
        windows.for_each(drop);
    }

    /// As [`Self::refresh`], for a take that can't wait for the kernel, as a close does, and keeps writers away. The
    /// period stays open, so what is marked in it will be in the next difference as well.
    pub fn refresh_for_take(&self) {
        self.refresh();
        let mut state = self.state();
        if self.shared.slot_state(self.slot.id).whole_device != state.seen.whole_device {
            let last = self.block_size.blocks_in(self.device.capacity) - 1;
            state.mark_blocks(0, last);
        }
    }

    /// A record from the ring.
    pub(super) fn apply(&self, record: &Record) {
        let mut state = self.state();
        if !self.detached.load(Ordering::Acquire) {
            state.periods.apply(record);
        }
    }

    /// Reads the open bitmap if records were lost to a full ring.
    pub(super) fn catch_up(&self) {
        let ring_full = self.shared.slot_state(self.slot.id).ring_full;
        if self.ring_full.is_news(ring_full) {
            self.refresh();
        }
    }

    pub(super) fn slot_id(&self) -> u32 {
        self.slot.id
    }

    /// Stops tracking; the object stays readable for who holds it, and its map is closed.
    pub(super) fn detach(&self) -> Result<(), TrackerError> {
        if self.detached.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let disk = self.device.disk_id.kernel_dev();
        // A save under way would bring the document back.
        let _saving = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.state();
        state.periods.map.corrupt(ResetReason::Requested);
        let placeholder = Bitmap::new(self.slot.id, 1)?;
        if let Some(keep) = &state.keep {
            keep.forget()?;
        }
        let mut object = self.shared.object();
        object.remove(disk, self.slot.id)?;
        object.drop_ledger_if_unused()?;
        state.table.set(self.slot.id, &placeholder)?;
        if let Some(keep) = state.keep.take() {
            keep.remove()?;
        }
        object.release(self.slot.id);
        object.unpin_if_unused()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn holders(&self) -> MutexGuard<'_, u32> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the device was attached from.
    #[must_use]
    pub fn path(&self) -> &PathBuf {
        &self.device.path
    }
}

impl Watched for TrackedDevice {
    fn start_ledger(&self) -> Result<(), TrackerError> {
        Self::start_ledger(self)
    }

    fn stop_ledger(&self) -> Result<(), TrackerError> {
        Self::stop_ledger(self)
    }

    fn add_watcher(&self, watcher: Weak<Collected>) {
        self.state().periods.add_watcher(watcher);
    }

    fn close(&self) -> Result<(), TrackerError> {
        Self::close(self).map(drop)
    }

    fn is_clean(&self) -> bool {
        Self::is_clean(self)
    }

    fn name(&self) -> String {
        self.device.path.display().to_string()
    }
}

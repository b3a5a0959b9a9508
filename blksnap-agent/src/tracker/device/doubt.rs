//! Doubt: whether the map may miss a change, and the takes that end it.
//!
//! What is looked at, in the order in which it is told:
//!
//! 1. the device itself ([`crate::disk::presence`]): gone, another one, another medium, another size;
//! 2. whether a file system on it writes past the block layer ([`crate::disk::dax`]);
//! 3. passthrough commands, counted by the programs for every disk that it stands on ([`super::super::guards`]);
//! 4. runs of the programs that the kernel skipped;
//! 5. look-ups in the tracking maps that failed.
//!
//! It is looked for every second, when a period is closed, before every answer, and in [`TrackedDevice::take`], in
//! which nothing can come between the look and the take: both are under one lock, and a counter that rises later is
//! compared with what it was at the look. Others declare doubt where they find it: bits and records past the end,
//! a period number that is not ours, a ring that holds something else than records, a hook that no longer fires.
//!
//! The first reason stays until a take begins the next generation. A device that was lost is not taken again: it
//! has to be attached, so that somebody knows that it is another one.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::super::TrackerError;
use super::super::probe;
use super::{State, TrackedDevice};
use crate::cbt::{ReadMap, ResetReason, Taken};
use crate::disk::presence::{Change, Completed, Presence, SYSFS};
use crate::disk::stack::Stack;
use crate::disk::{BlockDevice, bcache, dax};
use crate::units::Generation;

/// What is known of reasons to doubt.
#[derive(Debug)]
pub(super) struct Doubts {
    /// The device as attached, with the I/O that it had completed at the last look. `None` if it was gone already.
    pub(super) presence: Option<Presence>,
    /// What became of the device, if it is no longer the one attached.
    lost: Option<ResetReason>,
    /// The doubt that was told.
    told: Option<ResetReason>,
    /// Doubts told, by reason.
    pub(super) counts: BTreeMap<ResetReason, u64>,
    /// The disks that are guarded.
    stack: Stack,
}

impl Doubts {
    pub(super) fn new(presence: Option<Presence>, stack: Stack) -> Self {
        Self {
            presence,
            lost: None,
            told: None,
            counts: BTreeMap::new(),
            stack,
        }
    }

    /// Of a device that an agent before tracked, with what was told of it.
    pub(super) fn adopted(
        presence: Option<Presence>,
        stack: Stack,
        told: Option<ResetReason>,
        counts: BTreeMap<ResetReason, u64>,
    ) -> Self {
        Self {
            told,
            counts,
            ..Self::new(presence, stack)
        }
    }
}

/// Counters that stay the same within a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counts {
    /// Skipped runs of the steady programs; `None` if that is not known.
    misses: Option<u64>,
    passthrough: u64,
    errors: u64,
}

/// What was found at a look.
#[derive(Clone, Copy, Debug)]
struct Evidence {
    lost: Option<ResetReason>,
    resized: bool,
    dax: bool,
    before: Counts,
    now: Counts,
}

impl Evidence {
    /// The reason to doubt, if there is one.
    fn judge(&self) -> Option<ResetReason> {
        let Self {
            lost,
            resized,
            dax,
            before,
            now,
        } = *self;
        let counted = [
            (dax, ResetReason::DaxMount),
            (resized, ResetReason::Resized),
            (
                now.passthrough != before.passthrough,
                ResetReason::PassthroughWrite,
            ),
            // Not to know is no better than to have missed one.
            (
                now.misses.is_none() || now.misses != before.misses,
                ResetReason::RunMissed,
            ),
            (now.errors != before.errors, ResetReason::MapError),
        ];
        lost.or_else(|| counted.into_iter().find_map(|(is, reason)| is.then_some(reason)))
    }
}

/// The reason for which a device that changed so is no longer the one attached.
pub(super) fn reason_to_lose(change: Change) -> Option<ResetReason> {
    match change {
        Change::Gone => Some(ResetReason::DeviceGone),
        Change::Replaced => Some(ResetReason::DeviceReplaced),
        Change::Medium => Some(ResetReason::MediumChanged),
        Change::Resized => None,
    }
}

impl State {
    /// Declares that the map may miss changes, and tells it.
    pub(super) fn corrupt(&mut self, device: &BlockDevice, reason: ResetReason) {
        self.periods.map.corrupt(reason);
        self.tell(device);
    }

    /// Tells of a doubt that was not told yet.
    pub(super) fn tell(&mut self, device: &BlockDevice) {
        let Some(reason) = self.periods.map.corrupted() else {
            return;
        };
        // Detached by request: nobody asks any more.
        if self.doubts.told == Some(reason) || reason == ResetReason::Requested {
            return;
        }
        self.doubts.told = Some(reason);
        *self.doubts.counts.entry(reason).or_default() += 1;
        self.unsaved = true;
        tracing::error!(device = %device.path.display(), reason = reason.code(),
            "the change map may miss writes: the next backup must be a full one");
    }
}

impl TrackedDevice {
    /// Looks for reasons to doubt that the map is complete. A reason found ends the generation at the next take,
    /// and is given.
    pub fn check_doubt(&self) -> Option<ResetReason> {
        let mut state = self.state();
        self.look(&mut state);
        state.periods.map.corrupted()
    }

    /// Declares that the map may miss changes.
    pub fn corrupt(&self, reason: ResetReason) {
        self.state().corrupt(&self.device, reason);
        self.save_if_needed();
    }

    /// What became of the device, if it is no longer the one attached.
    #[must_use]
    pub fn lost(&self) -> Option<ResetReason> {
        self.state().doubts.lost
    }

    /// Ends the snapshot period of the change map. The caller has closed the bitmap's period at the instant, and
    /// keeps writers away or proves that there were none. Nobody must be told of the take before [`Self::save`]
    /// has kept it.
    ///
    /// # Errors
    /// The device is not the one attached any more, or it can't be proven that its writes are seen, or the map
    /// can't be made anew for the device's capacity.
    pub fn take(&self) -> Result<(Taken, Option<Arc<ReadMap>>), TrackerError> {
        let mut state = self.state();
        if self.detached.load(Ordering::Acquire) {
            return Err(TrackerError::NotAttached(self.device.id));
        }
        let evidence = self.look(&mut state);
        let name = || self.device.path.display().to_string();
        if let Some(reason) = evidence.lost.or(evidence.resized.then_some(ResetReason::Resized)) {
            return Err(TrackerError::Lost {
                device: name(),
                reason,
            });
        }
        if evidence.dax
            && let Some(how) = dax::of(&self.device)?
        {
            return Err(TrackerError::Dax { device: name(), how });
        }
        if let Some(upper) = bcache::unseen_above(self.device.id) {
            return Err(TrackerError::Bcache {
                device: name(),
                upper,
            });
        }
        if state.periods.map.corrupted() == Some(ResetReason::HookDead) && !self.hook_is_alive()? {
            return Err(TrackerError::HookDead(name()));
        }
        let taken = state
            .periods
            .map
            .take(Generation::new(uuid::Uuid::new_v4()), self.device.capacity)
            .map_err(|e| TrackerError::Map {
                action: "take the map of",
                slot: self.slot.id,
                reason: e.to_string(),
            })?;
        if let Some(reason) = taken.reset {
            tracing::warn!(device = %self.device.path.display(), reason = reason.code(), "the change map started over");
            *state.resets.entry(reason).or_default() += 1;
            state.doubts.told = None;
            // As they were at the look: what came later is about this generation.
            let Counts {
                misses,
                passthrough,
                errors,
            } = evidence.now;
            state.misses = misses
                .map(|misses| (self.shared.programs, misses))
                .into_iter()
                .collect();
            state.seen.passthrough = passthrough;
            state.seen.errors = errors;
        }
        state.unsaved = true;
        tracing::debug!(device = %self.device.path.display(), number = %taken.number, "the change map is taken");
        Ok((taken, state.periods.map.read_map()))
    }

    /// Looks, and declares the doubt that is found.
    fn look(&self, state: &mut State) -> Evidence {
        let misses = self.shared.object().run_misses();
        let misses = misses
            .inspect_err(
                |error| tracing::warn!(%error, "can't tell whether the kernel skipped a tracking program"),
            )
            .ok();
        let seen = self.shared.slot_state(self.slot.id);
        let (lost, resized) = look_for_device(&mut state.doubts, &self.device);
        let evidence = Evidence {
            lost,
            resized,
            dax: lost.is_none() && self.is_dax(),
            before: Counts {
                misses: state.misses.get(&self.shared.programs).copied(),
                passthrough: state.seen.passthrough,
                errors: state.seen.errors,
            },
            now: Counts {
                misses: misses.map(|misses| misses.steady),
                passthrough: seen.passthrough,
                errors: seen.errors,
            },
        };
        if let Some(reason) = evidence.judge() {
            state.periods.map.corrupt(reason);
        }
        state.tell(&self.device);
        evidence
    }

    fn is_dax(&self) -> bool {
        match dax::of(&self.device) {
            Ok(found) => found.is_some(),
            Err(error) => {
                tracing::warn!(%error, "can't tell whether {} is mounted with dax", self.device.path.display());
                true
            }
        }
    }

    /// Guards the disks that the device stands on now, where they are others than before.
    pub(in super::super) fn refresh_guards(&self) {
        let mut state = self.state();
        let now = Stack::beneath(Path::new(SYSFS), self.device.id);
        // One that is gone keeps its guards until it is detached.
        if now == state.doubts.stack || now.disks.is_empty() || state.doubts.lost.is_some() {
            return;
        }
        match self.shared.object().guards.set(self.slot.id, self.device.id) {
            Ok(stack) => state.doubts.stack = stack,
            Err(error) => {
                tracing::error!(%error, device = %self.device.path.display(), "passthrough commands may not be seen");
                state.corrupt(&self.device, ResetReason::MapError);
            }
        }
    }

    /// I/O that the disk had completed at the last look.
    pub(in super::super) fn completed(&self) -> Option<Completed> {
        self.state().doubts.presence.as_ref()?.completed
    }

    /// Reads and operations of the device's disk that the programs saw.
    ///
    /// # Errors
    /// The maps can't be read.
    pub(in super::super) fn events(&self) -> Result<u64, TrackerError> {
        self.shared.object().events(self.device.disk_id.kernel_dev())
    }

    /// Reads the device past the page cache and looks whether the programs saw it. A read that fails may have been
    /// seen all the same.
    pub(in super::super) fn hook_is_alive(&self) -> Result<bool, TrackerError> {
        let disk = self.device.disk_id.kernel_dev();
        let before = self.shared.object().reads(disk)?;
        let read = probe::direct_read(&self.device);
        if self.shared.object().reads(disk)? > before {
            return Ok(true);
        }
        read.map(|()| false).map_err(|source| TrackerError::Io {
            action: format!(
                "read {} directly for the self test",
                self.device.disk_path.display()
            ),
            source,
        })
    }
}

/// What became of the device, and whether it has another size.
fn look_for_device(doubts: &mut Doubts, device: &BlockDevice) -> (Option<ResetReason>, bool) {
    if doubts.lost.is_some() {
        return (doubts.lost, false);
    }
    let now = Presence::look(Path::new(SYSFS), device);
    let change = match (&now, &doubts.presence) {
        (Some(now), Some(before)) => now.change_since(before),
        _ => Some(Change::Gone),
    };
    doubts.lost = change.and_then(reason_to_lose);
    if let (None, Some(presence), Some(now)) = (doubts.lost, &mut doubts.presence, now) {
        presence.completed = now.completed;
    }
    (doubts.lost, change == Some(Change::Resized))
}

#[cfg(test)]
mod tests {
    use super::*;

    const COUNTS: Counts = Counts {
        misses: Some(3),
        passthrough: 1,
        errors: 0,
    };

    const NOTHING: Evidence = Evidence {
        lost: None,
        resized: false,
        dax: false,
        before: COUNTS,
        now: COUNTS,
    };

    #[test]
    fn each_sign_is_told_by_its_reason() {
        assert_eq!(NOTHING.judge(), None);
        let counts = |change: fn(&mut Counts)| {
            let mut now = COUNTS;
            change(&mut now);
            Evidence { now, ..NOTHING }.judge()
        };
        assert_eq!(counts(|now| now.misses = Some(4)), Some(ResetReason::RunMissed));
        assert_eq!(counts(|now| now.misses = None), Some(ResetReason::RunMissed));
        assert_eq!(
            counts(|now| now.passthrough = 2),
            Some(ResetReason::PassthroughWrite)
        );
        assert_eq!(counts(|now| now.errors = 1), Some(ResetReason::MapError));
        let unknown = Counts {
            misses: None,
            ..COUNTS
        };
        let still_unknown = Evidence {
            before: unknown,
            now: unknown,
            ..NOTHING
        };
        assert_eq!(still_unknown.judge(), Some(ResetReason::RunMissed));
        let dax = Evidence { dax: true, ..NOTHING };
        assert_eq!(dax.judge(), Some(ResetReason::DaxMount));
        let resized = Evidence {
            resized: true,
            ..NOTHING
        };
        assert_eq!(resized.judge(), Some(ResetReason::Resized));
        for reason in [
            ResetReason::DeviceGone,
            ResetReason::DeviceReplaced,
            ResetReason::MediumChanged,
        ] {
            let lost = Evidence {
                lost: Some(reason),
                dax: true,
                ..NOTHING
            };
            assert_eq!(lost.judge(), Some(reason));
        }
    }
}

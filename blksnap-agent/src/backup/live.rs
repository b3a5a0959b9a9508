//! Live backup: a device in use is copied to the target with [`converge`], which ends at the point in time.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::plan::{DeviceFacts, FullWhy, Plan};
use super::report::{Mode, Report};
use super::session::Session;
use super::sidecar::SidecarDevice;
use super::{BackupError, Control};
use crate::cbt::{Base, CbtMap, FullNeeded, FullReason, ResetReason};
use crate::filter::converge::{self, ConvergeError, Converged, FreezeHook, Initial, Limits, Target};
use crate::tracker::TrackedDevice;

/// How often a full copy is begun again because the tracker may have missed writes meanwhile.
const FULL_ATTEMPTS: u32 = 2;

/// How a device in use is brought to a point in time.
#[derive(Clone, Copy)]
pub struct Taking<'a> {
    /// Bounds of the copy and of the freeze.
    pub limits: &'a Limits,
    /// Program to be run around the freeze.
    pub hook: Option<&'a dyn FreezeHook>,
}

/// Writes the device to the file at `target`, if `incremental` only what changed since the take that it shows, and
/// ends its snapshot period.
///
/// # Errors
/// The target can't be used or written, or the copy does not come to an end; nothing is frozen and the device is
/// untouched. A target made for this is removed; another one is marked as unfinished, or as good for one more
/// incremental backup.
pub fn from_device(
    device: &Arc<TrackedDevice>,
    target: &Path,
    incremental: bool,
    taking: Taking<'_>,
    control: Control<'_>,
) -> Result<Report, BackupError> {
    let began = Instant::now();
    let session = Session::open(target, |target| target.check_not_on(device.device()))?;
    let live = Live {
        device,
        described: SidecarDevice::of(device.device()),
        session: &session,
        taking,
        control,
    };
    match live.write(incremental) {
        Ok(Written { mode, copied, base }) => Ok(Report {
            mode,
            device: device.device().path.clone(),
            target: session.path().to_owned(),
            bytes_copied: copied.copied_bytes,
            bytes_total: live.described.capacity,
            taken: base,
            consistency: copied.consistency,
            frozen_ms: copied.frozen.as_secs_f64() * 1000.0,
            rounds: copied.rounds,
            seconds: began.elapsed().as_secs_f64(),
        }),
        Err(error) => {
            session.abandon();
            Err(error)
        }
    }
}

struct Live<'a> {
    device: &'a Arc<TrackedDevice>,
    described: SidecarDevice,
    session: &'a Session,
    taking: Taking<'a>,
    control: Control<'a>,
}

struct Written {
    mode: Mode,
    copied: Converged,
    base: Base,
}

impl Live<'_> {
    fn write(&self, incremental: bool) -> Result<Written, BackupError> {
        // Doubt that is there belongs to the plan.
        self.device.check_doubt();
        let facts = DeviceFacts {
            path: self.described.path.clone(),
            capacity: self.described.capacity,
            map: self.device.with_map(CbtMap::info),
        };
        let reason = match self.session.plan(incremental, &facts) {
            Plan::Full { why } => why,
            Plan::Incremental { base } => match self.write_changed(base)? {
                Ok(written) => return Ok(written),
                Err(why) => why,
            },
        };
        self.write_all(reason)
    }

    /// Writes what changed since `since`, or says why that is not enough.
    fn write_changed(&self, since: Base) -> Result<Result<Written, FullWhy>, BackupError> {
        self.session.start(&self.described, self.block_size(), false)?;
        match self.converge(Initial::Since(since), false) {
            Ok(copied) => Ok(match doubt_of(&copied) {
                None => Ok(self.complete(Mode::Incremental { since }, copied)?),
                Some(reason) => Err(FullNeeded::from(FullReason::Corrupted(reason)).into()),
            }),
            Err(BackupError::Converge(ConvergeError::FullNeeded(full))) => Ok(Err(full.into())),
            Err(BackupError::Converge(ConvergeError::Doubt { reason, .. })) => {
                Ok(Err(FullNeeded::from(FullReason::Corrupted(reason)).into()))
            }
            Err(error) => {
                // The error to tell is the first one; where this one fails too, the target stays unfinished.
                let _ = self.session.stop(&self.described, self.block_size(), since);
                Err(error)
            }
        }
    }

    fn write_all(&self, reason: FullWhy) -> Result<Written, BackupError> {
        let mut attempt = 1;
        loop {
            self.session.start(&self.described, self.block_size(), true)?;
            // A map that is in doubt already starts over at the beginning of the run.
            let doubt = match self.converge(Initial::All, true) {
                Ok(copied) => match late_doubt(&copied) {
                    None => return self.complete(Mode::Full { reason }, copied),
                    Some(reason) => ConvergeError::Doubt {
                        device: self.described.path.clone(),
                        reason,
                    },
                },
                Err(BackupError::Converge(error @ ConvergeError::Doubt { .. })) => error,
                Err(error) => return Err(error),
            };
            if attempt == FULL_ATTEMPTS {
                return Err(doubt.into());
            }
            tracing::warn!(device = %self.described.path.display(), %doubt, "the backup starts again");
            attempt += 1;
        }
    }

    fn converge(&self, initial: Initial, fresh: bool) -> Result<Converged, BackupError> {
        let target = Target {
            device: Arc::clone(self.device) as Arc<_>,
            initial,
            sink: Box::new(self.session.sink(fresh)?),
        };
        let Taking { limits, hook } = self.taking;
        let Control { progress, cancel } = self.control;
        let copied = converge::run(vec![target], limits, hook, progress, cancel)?;
        copied.into_iter().next().ok_or(ConvergeError::NoDevice.into())
    }

    fn complete(&self, mode: Mode, copied: Converged) -> Result<Written, BackupError> {
        let base = Base {
            generation: copied.taken.generation,
            number: copied.taken.number,
        };
        self.session.complete(&self.described, self.block_size(), base)?;
        Ok(Written { mode, copied, base })
    }

    fn block_size(&self) -> u64 {
        self.device.block_size().bytes()
    }
}

/// Why writes may be missing from a copy of what changed, if they may. A map that wrapped was right until its take.
fn doubt_of(copied: &Converged) -> Option<ResetReason> {
    copied
        .taken
        .reset
        .filter(|reason| *reason != ResetReason::Wrapped)
        .or_else(|| late_doubt(copied))
}

/// Doubt that came up after the take, but may be about writes before it.
fn late_doubt(copied: &Converged) -> Option<ResetReason> {
    match &copied.read_map {
        Some(map) => map.doubt(),
        None => Some(ResetReason::Corrupted),
    }
}

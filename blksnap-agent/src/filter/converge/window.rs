//! Window: the file systems are frozen, the last rest is copied, the instant is taken, and they go on.
//!
//! Nothing in here writes anywhere but to the sinks: no log, no progress.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::hook::{HookError, Stage};
use super::party::Party;
use super::rounds::{Converge, POLL, Window};
use super::{Consistency, ConvergeError, Converged};
use crate::cbt::{ReadMap, ResetReason, Taken};
use crate::engine::CopyError;

/// Part of the freeze limit after which the window gives up by itself, so that it thaws before the watchdog does.
const OWN_SHARE: f64 = 0.9;

/// What was taken of a device.
type Take = (Taken, Option<std::sync::Arc<ReadMap>>);

impl Converge<'_> {
    /// Freezes, copies the rest, takes, thaws.
    pub(super) fn window(&mut self) -> Result<Window, ConvergeError> {
        self.tell_frozen();
        let told = self.run_hook(Stage::Freeze, Instant::now() + self.limits.freeze_limit);
        let outcome = match told {
            Ok(()) => self.frozen_part(),
            Err(error) => Err(error.into()),
        };
        // Nothing is frozen any more.
        let thawed = self.run_hook(Stage::Thaw, Instant::now() + self.limits.freeze_limit);
        if let Err(error) = thawed {
            tracing::warn!(%error, "the snapshot is not affected");
        }
        let Some(takes) = outcome? else {
            return Ok(Window::Again);
        };
        for party in &self.parties {
            party.device.keep()?;
        }
        let converged = self.parties.iter().zip(takes);
        Ok(Window::Taken(
            converged
                .map(|(party, take)| self.converged(party, take))
                .collect(),
        ))
    }

    /// From the freeze to the thaw; `None` if everything has to be copied again.
    fn frozen_part(&mut self) -> Result<Option<Vec<Take>>, ConvergeError> {
        // The hook may have taken its time.
        self.check_cancel()?;
        let limit = self.limits.freeze_limit;
        let deadline = Instant::now() + limit.mul_f64(OWN_SHARE);
        self.freezer.freeze(limit)?;
        let outcome = self.settle_and_take(deadline);
        // Whatever happened: first of all the file systems go on.
        let thawed = self.freezer.thaw();
        let takes = outcome?;
        self.frozen += thawed?;
        Ok(takes)
    }

    fn settle_and_take(&mut self, deadline: Instant) -> Result<Option<Vec<Take>>, ConvergeError> {
        self.collect()?;
        loop {
            if !self.all_followed()? {
                return Ok(None);
            }
            if self.rest() > 0 {
                self.copy_rest(&self.cancel.until(deadline), &|_| {})
                    .map_err(|error| self.late(error))?;
            }
            // A look at the open periods comes after the look whether all is idle.
            let idle = self.all_idle()?;
            if idle && self.all_clean() {
                self.run_hook(Stage::Frozen, deadline)?;
                // Any moment between the first pair of looks and this one is the instant.
                if self.all_idle()? && self.all_clean() {
                    // What the driver had, and completed before it was found idle, is counted by now.
                    return if self.all_followed()? {
                        self.take().map(Some)
                    } else {
                        Ok(None)
                    };
                }
            }
            self.check_cancel()?;
            if Instant::now() >= deadline {
                return Err(self.never_quiet());
            }
            if !idle {
                std::thread::sleep(POLL);
            }
            if !self.all_clean() {
                self.collect()?;
            }
        }
    }

    /// Whether nothing was written since what was written was collected.
    fn all_clean(&self) -> bool {
        self.parties.iter().all(Party::is_clean)
    }

    fn all_idle(&self) -> Result<bool, ConvergeError> {
        for party in &self.parties {
            if !party.is_idle()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn take(&self) -> Result<Vec<Take>, ConvergeError> {
        // As above; who cancelled does not want the take, and nothing is taken yet.
        self.check_cancel()?;
        for party in &self.parties {
            party.check_doubt()?;
        }
        let takes: Result<Vec<Take>, _> = self.parties.iter().map(|party| party.device.take()).collect();
        for party in &self.parties {
            party.settle();
        }
        let takes = takes?;
        for (party, (taken, _)) in self.parties.iter().zip(&takes) {
            // Doubt from before the run has ended with its beginning: this one came up between the look and the take.
            if let Some(reason) = taken.reset.filter(|reason| *reason != ResetReason::Wrapped) {
                return Err(ConvergeError::Doubt {
                    device: party.device.device().path.clone(),
                    reason,
                });
            }
        }
        Ok(takes)
    }

    fn converged(&self, party: &Party, (mut taken, read_map): Take) -> Converged {
        let device = party.device.device().id;
        taken.reset = taken.reset.or(party.reset);
        Converged {
            device,
            taken,
            read_map,
            consistency: if self.freezer.froze(device) {
                Consistency::FileSystem
            } else {
                Consistency::Crash
            },
            copied_bytes: party.copied,
            rounds: self.rounds,
            frozen: self.frozen,
        }
    }

    fn run_hook(&self, stage: Stage, deadline: Instant) -> Result<(), HookError> {
        let Some(hook) = self.hook else { return Ok(()) };
        let devices: Vec<PathBuf> = self
            .parties
            .iter()
            .map(|party| party.device.device().path.clone())
            .collect();
        hook.run(stage, &devices, deadline)
    }

    /// The error of a copy that was not done by the deadline says what the user can do.
    fn late(&self, error: ConvergeError) -> ConvergeError {
        match error {
            ConvergeError::Copy(CopyError::Late) => self.never_quiet(),
            error => error,
        }
    }

    fn never_quiet(&self) -> ConvergeError {
        let busy = self.parties.iter().find(|party| {
            // A device that fails here is as good a name as any.
            party.rest() > 0 || !party.is_idle().unwrap_or(false)
        });
        let limit: Duration = self.limits.freeze_limit;
        ConvergeError::NeverQuiet {
            device: busy.unwrap_or(&self.parties[0]).device.device().path.clone(),
            limit_ms: limit.as_millis(),
        }
    }
}

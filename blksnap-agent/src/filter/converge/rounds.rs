//! Rounds: copying until what is left is small enough to be copied while frozen.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::hook::FreezeHook;
use super::party::Party;
use super::tracked::Quiesce;
use super::turn::Turn;
use super::{ConvergeError, Converged, Limits, MAX_PASSES};
use crate::engine::{CancelToken, Copier, CopyError, Job, Phase, Progress};

/// How long to wait before the first pass for writes that began before the ledger. Those that take longer are
/// found out later; this makes it rare.
const QUIET_WAIT: Duration = Duration::from_secs(1);

/// No write from before the ledger completed for so long: there is probably none.
const SETTLED: Duration = Duration::from_millis(20);

/// Pause between looks at something that changes by itself.
pub(super) const POLL: Duration = Duration::from_millis(1);

/// Part of the freeze limit that the copy of the rest may be expected to take.
const FREEZE_SHARE: u32 = 4;

/// A rest that is copied in less time than this is small: another round would not be worth its time.
const SMALL: Duration = Duration::from_millis(20);

/// A round that leaves more than this part of the one before does not shrink it.
const SHRINKING: f64 = 0.7;

/// Rounds that don't shrink before the freeze is tried with what fits.
const PATIENCE: u32 = 2;

/// Rate assumed before one is known, in bytes per second. Low, so that a first rest is not thought small.
const FIRST_RATE: f64 = 50e6;

/// Turns that are given back because they came late, so that not everybody waits for one that is always late.
const LATE_TURNS: u32 = 3;

/// Bytes that must be copied before their rate counts.
const RATE_SAMPLE: u64 = 1 << 20;

/// How a window ended.
pub(super) enum Window {
    /// The instant was taken.
    Taken(Vec<Converged>),
    /// Writes could not be followed: everything has to be copied again.
    Again,
}

/// A run.
pub(super) struct Converge<'a> {
    /// First, so that a panic thaws before anything else ends.
    pub(super) freezer: Box<dyn Quiesce>,
    pub(super) parties: Vec<Party>,
    pub(super) limits: &'a Limits,
    pub(super) hook: Option<&'a dyn FreezeHook>,
    progress: &'a dyn Progress,
    pub(super) cancel: &'a CancelToken,
    copier: Copier,
    /// Bytes per second.
    rate: f64,
    pub(super) rounds: u32,
    /// Time that file systems were frozen, over all windows.
    pub(super) frozen: Duration,
}

impl<'a> Converge<'a> {
    pub(super) fn new(
        parties: Vec<Party>,
        freezer: Box<dyn Quiesce>,
        copier: Copier,
        limits: &'a Limits,
        hook: Option<&'a dyn FreezeHook>,
        progress: &'a dyn Progress,
        cancel: &'a CancelToken,
    ) -> Self {
        Self {
            freezer,
            parties,
            limits,
            hook,
            progress,
            cancel,
            copier,
            rate: FIRST_RATE,
            rounds: 0,
            frozen: Duration::ZERO,
        }
    }

    pub(super) fn run(mut self) -> Result<Vec<Converged>, ConvergeError> {
        self.check_sinks()?;
        self.freezer.arm()?;
        self.progress.update(Phase::Preparing, 0, 0);
        self.wait_quiet()?;
        for _ in 0..MAX_PASSES {
            for party in &mut self.parties {
                party.begin()?;
            }
            self.copy(Phase::Copying)?;
            if let Some(turn) = self.rounds_and_turn()?
                && let Window::Taken(converged) = self.window()?
            {
                drop(turn);
                self.progress.update(Phase::Done, 0, 0);
                return Ok(converged);
            }
            tracing::info!("writes from before the copy ended during it, or were lost: copying again");
        }
        Err(ConvergeError::NotFollowed {
            device: self.first_unfollowed()?,
            passes: MAX_PASSES,
        })
    }

    /// Refuses sinks that can't be written while the file systems are frozen.
    fn check_sinks(&self) -> Result<(), ConvergeError> {
        for party in &self.parties {
            if let Some(file) = party.sink.file()
                && let Some(mountpoint) = self.freezer.hold(file)?
            {
                return Err(ConvergeError::SinkFrozen {
                    sink: party.sink.name(),
                    mountpoint,
                });
            }
        }
        Ok(())
    }

    fn wait_quiet(&self) -> Result<(), ConvergeError> {
        let deadline = Instant::now() + QUIET_WAIT;
        for party in &self.parties {
            let mut unknown = party.unknown()?;
            let mut since = Instant::now();
            // The driver may hold none of ours, and yet some of the disk's.
            while Instant::now() < deadline
                && (since.elapsed() < SETTLED || party.device.driver_writes()? > 0)
            {
                self.check_cancel()?;
                std::thread::sleep(POLL);
                let now = party.unknown()?;
                if now != unknown {
                    unknown = now;
                    since = Instant::now();
                }
            }
        }
        Ok(())
    }

    /// Copies what was written meanwhile until it is little, and waits for the turn to freeze. If that took long,
    /// it may be much again. `None` if the pass has to start again.
    fn rounds_and_turn(&mut self) -> Result<Option<Turn>, ConvergeError> {
        let mut late = 0;
        while self.rounds()? {
            let turn = Turn::wait(|| self.check_cancel())?;
            late += 1;
            if turn.waited <= SMALL || late > LATE_TURNS {
                return Ok(Some(turn));
            }
        }
        Ok(None)
    }

    /// Copies what was written meanwhile until it is little. False if the pass has to start again.
    fn rounds(&mut self) -> Result<bool, ConvergeError> {
        let begin = Instant::now();
        let budget = self.limits.freeze_limit.as_secs_f64() / f64::from(FREEZE_SHARE);
        let small = SMALL.as_secs_f64().min(budget);
        let mut previous = f64::INFINITY;
        let mut stuck = 0;
        let mut round = 0;
        loop {
            self.check_cancel()?;
            // What the file systems hold back would otherwise be written, and copied, while frozen.
            self.freezer.sync()?;
            for party in &self.parties {
                if !self.freezer.froze(party.device.device().id) {
                    party.device.sync_node()?;
                }
            }
            self.collect()?;
            if !self.all_followed()? {
                return Ok(false);
            }
            let rest = self.rest();
            let seconds = to_float(rest) / self.rate;
            self.copy(Phase::CatchingUp)?;
            stuck = if to_float(rest) <= previous * SHRINKING {
                0
            } else {
                stuck + 1
            };
            previous = to_float(rest);
            if seconds <= small || (seconds <= budget && stuck >= PATIENCE) {
                return Ok(true);
            }
            round += 1;
            self.rounds += 1;
            let elapsed = begin.elapsed();
            if round >= self.limits.max_rounds || elapsed >= self.limits.max_time {
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "a rate for a message"
                )]
                return Err(ConvergeError::NotConverging {
                    rounds: round,
                    seconds: elapsed.as_secs(),
                    rest,
                    rate: self.rate as u64,
                });
            }
        }
    }

    /// Closes the period of every device, in parallel: each waits for the kernel. True if nothing was written.
    pub(super) fn collect(&mut self) -> Result<bool, ConvergeError> {
        if let [party] = &mut self.parties[..] {
            return party.collect();
        }
        let results: Vec<Result<bool, ConvergeError>> = std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .parties
                .iter_mut()
                .map(|party| scope.spawn(|| party.collect()))
                .collect();
            threads
                .into_iter()
                .map(|thread| {
                    thread
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                })
                .collect()
        });
        results
            .into_iter()
            .try_fold(true, |all, nothing| Ok(all & nothing?))
    }

    pub(super) fn all_followed(&self) -> Result<bool, ConvergeError> {
        for party in &self.parties {
            if !party.is_followed()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn first_unfollowed(&self) -> Result<PathBuf, ConvergeError> {
        for party in &self.parties {
            if !party.is_followed()? {
                return Ok(party.device.device().path.clone());
            }
        }
        Ok(self.parties[0].device.device().path.clone())
    }

    /// Bytes to be copied.
    pub(super) fn rest(&self) -> u64 {
        self.parties.iter().map(Party::rest).sum()
    }

    /// Copies what is to be copied, and tells the progress.
    fn copy(&mut self, phase: Phase) -> Result<(), ConvergeError> {
        let total = self.rest();
        let done = std::sync::atomic::AtomicU64::new(0);
        self.progress.update(phase, 0, total);
        let progress = self.progress;
        self.copy_rest(&self.cancel.clone(), &|bytes| {
            let before = done.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
            progress.update(phase, before + bytes, total);
        })
    }

    /// Copies what is to be copied.
    pub(super) fn copy_rest(
        &mut self,
        cancel: &CancelToken,
        copied: &(dyn Fn(u64) + Sync),
    ) -> Result<(), ConvergeError> {
        let begin = Instant::now();
        let jobs: Vec<Job<'_>> = self.parties.iter().map(Party::job).collect();
        let bytes = self.copier.copy(&jobs, cancel, copied)?;
        if bytes >= RATE_SAMPLE {
            let rate = to_float(bytes) / begin.elapsed().as_secs_f64().max(1e-6);
            // The lower one: a large sequential pass is faster than scattered blocks.
            self.rate = if self.rate == FIRST_RATE {
                rate
            } else {
                rate.min((self.rate + rate) / 2.0)
            };
        }
        self.parties.iter_mut().for_each(Party::done);
        Ok(())
    }

    pub(super) fn check_cancel(&self) -> Result<(), ConvergeError> {
        if self.cancel.is_cancelled() {
            return Err(ConvergeError::Cancelled);
        }
        Ok(())
    }

    pub(super) fn tell_frozen(&self) {
        self.progress.update(Phase::Frozen, 0, self.rest());
    }
}

impl From<CopyError> for ConvergeError {
    fn from(error: CopyError) -> Self {
        match error {
            CopyError::Cancelled => Self::Cancelled,
            error => Self::Copy(error),
        }
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "rates and shares need no more than 53 bits"
)]
fn to_float(bytes: u64) -> f64 {
    bytes as f64
}

//! Converge: copies of devices in use that become equal to the devices at one instant.
//!
//! Everything is copied while writers go on; then again what was written meanwhile, and so on until the rest is
//! small. Then the file systems are frozen, the last rest is copied, the change maps are taken, and the file
//! systems go on. The point in time is the end. Nobody's write ever waits but for the freeze.
//!
//! # Why the copy is right
//! Trouble comes from the time between the event of a write (its bio is queued) and its data reaching the disk,
//! which may be long, in pieces, and overlapped by our reads. The argument, for one block `b` and the instant `T`
//! below; *mark* means setting the bit of `b` in the bitmap of the period that is open then:
//!
//! 1. A write is marked when it is queued. While the *ledger* is kept, a write queued is also entered there, and
//!    marked again when it completes, after its data landed; then its entry goes.
//! 2. A period's bitmap is final when it is closed, and every block in it is read again afterwards
//!    (`Party::todo` only loses blocks when a copy of them succeeded that began after the close).
//! 3. `T` is a moment in the last window, after everything of the periods closed so far was copied. Before it and
//!    after it all of this was found, of all devices and in this order: the ledger has no entry, the driver holds no
//!    write, the open period is empty. If one of them fails, the window goes on; if its time is up, the take fails.
//!    The look at the open period does not wait for programs that run meanwhile, and need not: they mark a write
//!    before it goes to the driver, and again before its entry goes. (Closing the period instead would wait for the
//!    kernel, several times as long as the rest of the window.)
//!
//! Let `r` be the beginning of the last read of `b`, and suppose that a write `W` changes `b` between `r` and
//! `T`. If `W` is in the ledger, it completed before `T` (3: no entry) and its second mark came after its
//! data, thus after `r`, and before its entry went. That mark lies in a period closed after `r`, whose blocks
//! were read after the close (2), so `r` was not the last read; or in the open one, which is empty (3): a
//! contradiction. If `W` was queued after `T`, its data came after `T`. What remains are writes that were
//! queued *before the ledger*:
//!
//! 4. If such a write completes, it is counted as unknown. The count is read before the first read of a pass, and
//!    again after the driver was found idle for the second time; if it has risen, or the ledger has lost a write,
//!    the whole pass starts again (`MAX_PASSES`).
//! 5. If it has not completed by then, the driver did not have it (3), and so never had it: no data of it has
//!    reached the disk. It is not in the image, and lands later.
//!    Only raw devices can have such a write: `FIFREEZE` returns when all writes of the file system are complete.
//!
//! So the copy is the device at `T`, as good as the numbers of the driver in (3) are; those of bio-based drivers
//! without I/O accounting are always 0, and then (5) rests on the freeze alone.
//!
//! # The change map
//! The map is taken after `T`, and must not call a block older than the image that the image does not have. A
//! write after `T` is marked in a period that is closed after the take, with the number after it, and so is in the
//! next difference (being in this one too does no harm). Somebody else may close a period between `T` and the
//! take: what it held is marked once more after the take (`Watch::drain`). Writes in flight when the ledger ends
//! are marked by the tracker then. One limit remains, of raw devices only: a write of (5), queued before the run
//! began and still kept from the driver at its end (by a throttle, say), lands without a mark in either period.
//!
//! # What the freeze is for
//! The argument does not need it: a frozen file system has nothing in its caches that is not on the disk, its log is
//! clean, and it does not write, which ends the race with a writer that never pauses. Without a file system the
//! image is that of a power cut at `T`.
//!
//! # The origin
//! An error, a full target or a cancel while frozen thaws first. A watchdog process thaws if the agent is killed or
//! late ([`crate::disk::watchdog`]); a take whose file systems were thawed by somebody else fails. A target on one
//! of the file systems is refused before anything is frozen: the copy of the rest would wait for the thaw. Takes
//! that run at the same time freeze one after the other (`Turn`).

mod hook;
mod party;
mod rounds;
mod tracked;
pub(super) mod turn;
mod window;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::cbt::{Base, FullNeeded, ReadMap, ResetReason, Taken};
use crate::disk::{DiskError, FileSystems, FreezeError, Freezer, WatchdogCommand};
use crate::engine::{CancelToken, Copier, CopyError, Method, Progress, Sink};
use crate::tracker::TrackerError;
use crate::units::DeviceId;

pub use hook::{FreezeHook, Hook, HookError, Stage};
pub use tracked::{Quiesce, Tracked, Watch};

use party::Party;
use rounds::Converge;

/// Most passes over everything before the take is given up.
const MAX_PASSES: u32 = 3;

/// What is copied first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Initial {
    /// The whole device.
    All,
    /// What changed since this take; the sink holds the device as of then.
    Since(Base),
}

/// A device and where its copy goes.
#[derive(Debug)]
pub struct Target {
    /// The device.
    pub device: Arc<dyn Tracked>,
    /// What is copied first.
    pub initial: Initial,
    /// Where to, at least as long as the device. If the run fails, what it holds is no image of anything.
    pub sink: Box<dyn Sink>,
}

/// Bounds of a run.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Most rounds of copying what changed meanwhile.
    pub max_rounds: u32,
    /// Longest time for these rounds, after the first pass.
    pub max_time: Duration,
    /// Longest time from the first freeze to the last thaw.
    pub freeze_limit: Duration,
    /// The program that thaws if this one can't.
    pub watchdog: WatchdogCommand,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_rounds: 64,
            max_time: Duration::from_secs(600),
            freeze_limit: Duration::from_secs(5),
            watchdog: WatchdogCommand::own(),
        }
    }
}

/// What an image is as good as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Consistency {
    /// All file systems on the device were frozen: nothing to replay or repair.
    FileSystem,
    /// As after a power cut at the instant.
    Crash,
}

/// A copy that equals its device at the instant.
#[derive(Clone, Debug)]
pub struct Converged {
    /// The device.
    pub device: DeviceId,
    /// Number and generation of the take.
    pub taken: Taken,
    /// The change map as of the take; `None` only if it is doubtful already.
    pub read_map: Option<Arc<ReadMap>>,
    /// What the image is as good as.
    pub consistency: Consistency,
    /// Bytes read for it, over all rounds.
    pub copied_bytes: u64,
    /// Rounds of copying after the first pass, the frozen ones not counted.
    pub rounds: u32,
    /// How long the file systems of the run were frozen; zero if there were none.
    pub frozen: Duration,
}

/// A run that failed. Nothing is frozen, the devices are untouched, the sinks hold nothing of use.
#[derive(Debug, thiserror::Error)]
pub enum ConvergeError {
    /// No targets.
    #[error("no device given")]
    NoDevice,
    /// A device is given twice.
    #[error("{0} is given twice")]
    Twice(PathBuf),
    /// Tracking.
    #[error(transparent)]
    Tracker(#[from] TrackerError),
    /// A device.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Freezing or thawing.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// Copying.
    #[error(transparent)]
    Copy(CopyError),
    /// The freeze hook.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// There is no way to say what changed since the base of the sink.
    #[error(transparent)]
    FullNeeded(#[from] FullNeeded),
    /// The sink can't be written while the file systems are frozen.
    #[error(
        "{sink} is on {mountpoint}, or on a file system that needs it, which has to be frozen: choose another place"
    )]
    SinkFrozen {
        /// The sink.
        sink: String,
        /// The file system that is to be frozen.
        mountpoint: PathBuf,
    },
    /// The writers are faster than the copy.
    #[error(
        "no end after {rounds} rounds in {seconds} s: {rest} bytes are still to be copied, at {rate} bytes/s; \
         lessen the load, or raise the limits of rounds, time and freeze"
    )]
    NotConverging {
        /// Rounds made.
        rounds: u32,
        /// Time that they took.
        seconds: u64,
        /// What is left.
        rest: u64,
        /// How fast it is copied.
        rate: u64,
    },
    /// Writes went on in the last window until its end.
    #[error(
        "{device} was written until the freeze limit of {limit_ms} ms: stop what writes past the file system, or raise the limit"
    )]
    NeverQuiet {
        /// The device.
        device: PathBuf,
        /// The limit.
        limit_ms: u128,
    },
    /// Writes could not be followed.
    #[error("writes to {device} could not be followed in {passes} passes: try again under less load")]
    NotFollowed {
        /// The device.
        device: PathBuf,
        /// Passes made.
        passes: u32,
    },
    /// The tracker may have missed writes.
    #[error("the copy of {device} can't be proven: {reason}; try again")]
    Doubt {
        /// The device.
        device: PathBuf,
        /// Why.
        reason: ResetReason,
    },
    /// Somebody asked to stop.
    #[error("cancelled")]
    Cancelled,
}

impl ConvergeError {
    /// A sink has no space left.
    #[must_use]
    pub fn is_no_space(&self) -> bool {
        matches!(self, Self::Copy(error) if error.is_no_space())
    }
}

/// Copies all targets until they equal their devices at one instant, and takes the change maps then.
///
/// It blocks, for as long as the copy takes. Results are in the order of the targets.
///
/// # Errors
/// See [`ConvergeError`]; the devices are untouched and thawed.
pub fn run(
    targets: Vec<Target>,
    limits: &Limits,
    hook: Option<&dyn FreezeHook>,
    progress: &dyn Progress,
    cancel: &CancelToken,
) -> Result<Vec<Converged>, ConvergeError> {
    check(&targets)?;
    let devices: Vec<_> = targets.iter().map(|target| target.device.device()).collect();
    let file_systems = FileSystems::on(&devices)?;
    let freezer = Freezer::new(file_systems, limits.watchdog.clone());
    let copier = Copier::new(Method::Auto);
    run_with(targets, Box::new(freezer), copier, limits, hook, progress, cancel)
}

fn run_with(
    targets: Vec<Target>,
    freezer: Box<dyn Quiesce>,
    copier: Copier,
    limits: &Limits,
    hook: Option<&dyn FreezeHook>,
    progress: &dyn Progress,
    cancel: &CancelToken,
) -> Result<Vec<Converged>, ConvergeError> {
    let parties = targets
        .into_iter()
        .map(Party::new)
        .collect::<Result<Vec<_>, _>>()?;
    Converge::new(parties, freezer, copier, limits, hook, progress, cancel).run()
}

fn check(targets: &[Target]) -> Result<(), ConvergeError> {
    if targets.is_empty() {
        return Err(ConvergeError::NoDevice);
    }
    for (index, target) in targets.iter().enumerate() {
        let device = target.device.device();
        if targets[..index]
            .iter()
            .any(|other| other.device.device().id == device.id)
        {
            return Err(ConvergeError::Twice(device.path.clone()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod model;

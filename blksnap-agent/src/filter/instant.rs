//! Instant: one moment for several tracked devices, from which on a filter in the kernel keeps their old data.
//!
//! # Order
//! While everybody goes on, what file systems hold back is written, and the periods of the bitmaps are closed. Then the
//! file systems are frozen, the filter is armed, the change maps are taken at the instant, and everything goes on. A
//! watchdog process thaws if the agent is killed or late; a take that was late fails.
//!
//! # Nothing waits for the kernel at the instant
//! A filter may make writers wait within a read section of RCU (a gate does), and the close of a bitmap's period waits
//! for the end of all of these. So the periods are closed before, and at the instant the open bitmaps are only read: what
//! they have belongs to the map of this take. They stay open, so the next difference has it as well, and a backup may
//! be larger than it must, never wrong.
//!
//! # Writes under way
//! What is marked before the close and lands after the instant is marked again by [`Follow`], in the open bitmap, and so
//! is in the next difference.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::converge::turn::Turn;
use super::converge::{Consistency, ConvergeError, FreezeHook, Limits, Stage, Tracked as _};
use crate::cbt::{ReadMap, Taken};
use crate::disk::{FileSystems, Freezer};
use crate::engine::CancelToken;
use crate::tracker::{Follow, TrackedDevice, TrackerError};

/// How a take is made.
#[derive(Clone, Copy, Debug)]
pub struct Terms<'a> {
    /// The longest freeze, and who thaws.
    pub limits: &'a Limits,
    /// Told about the freeze.
    pub hook: Option<&'a dyn FreezeHook>,
    /// Ends the waiting.
    pub cancel: &'a CancelToken,
}

/// What is known of a device at the instant.
#[derive(Clone, Debug)]
pub struct Moment {
    /// Number and generation of the take.
    pub taken: Taken,
    /// The change map as of the take; `None` if it is doubtful.
    pub read_map: Option<Arc<ReadMap>>,
    /// What an image is as good as.
    pub consistency: Consistency,
    /// How long the file systems of the take were frozen; zero if there were none.
    pub frozen: Duration,
}

/// What a change map says of a take.
type Take = (Taken, Option<Arc<ReadMap>>);

/// Takes all `devices` at one instant. `arm` is called when their file systems are frozen: it makes the filter hold
/// their writes, calls what it is given at the instant, once, when no write goes on, and lets them go on. What it armed
/// is the caller's to release if this fails.
///
/// # Errors
/// Freezing, the hook, the change maps, or `arm` itself fails; nothing is frozen any more.
pub fn take<E: From<ConvergeError>>(
    devices: &[Arc<TrackedDevice>],
    terms: &Terms<'_>,
    arm: impl FnOnce(&mut dyn FnMut() -> Result<(), ConvergeError>) -> Result<(), E>,
) -> Result<Vec<Moment>, E> {
    check(terms)?;
    let mut followed = devices
        .iter()
        .map(Follow::start)
        .collect::<Result<Vec<_>, _>>()
        .map_err(ConvergeError::from)?;
    let mut freezer = prepare(devices, terms)?;
    let turn = Turn::wait(|| check(terms))?;
    for (device, follow) in devices.iter().zip(&mut followed) {
        // What others wait for ends before the freeze: little is left to be written, and little to be marked twice.
        device.sync_node().map_err(ConvergeError::from)?;
        follow.close_period().map_err(ConvergeError::from)?;
    }
    let told = tell(devices, terms, Stage::Freeze);
    let outcome = match told {
        Ok(()) => frozen(devices, terms, &mut freezer, arm),
        Err(error) => Err(error.into()),
    };
    if let Err(error) = tell(devices, terms, Stage::Thaw) {
        tracing::warn!(%error, "the snapshot is not affected");
    }
    let (takes, duration) = outcome?;
    drop(turn);
    followed.into_iter().for_each(Follow::end);
    for device in devices {
        // Nobody is told of a number that the next agent could give again.
        device.save().map_err(ConvergeError::from)?;
    }
    let moment = |(device, (taken, read_map)): (&Arc<TrackedDevice>, Take)| Moment {
        taken,
        read_map,
        consistency: if freezer.froze(device.device().id) {
            Consistency::FileSystem
        } else {
            Consistency::Crash
        },
        frozen: duration,
    };
    Ok(devices.iter().zip(takes).map(moment).collect())
}

fn prepare(devices: &[Arc<TrackedDevice>], terms: &Terms<'_>) -> Result<Freezer, ConvergeError> {
    let nodes: Vec<_> = devices.iter().map(|device| device.device()).collect();
    let mut freezer = Freezer::new(FileSystems::on(&nodes)?, terms.limits.watchdog.clone());
    freezer.arm()?;
    freezer.file_systems().sync()?;
    Ok(freezer)
}

/// From the freeze to the thaw.
fn frozen<E: From<ConvergeError>>(
    devices: &[Arc<TrackedDevice>],
    terms: &Terms<'_>,
    freezer: &mut Freezer,
    arm: impl FnOnce(&mut dyn FnMut() -> Result<(), ConvergeError>) -> Result<(), E>,
) -> Result<(Vec<Take>, Duration), E> {
    // The hook may have taken its time.
    check(terms)?;
    freezer
        .freeze(terms.limits.freeze_limit)
        .map_err(ConvergeError::from)?;
    let mut takes = Vec::new();
    let armed = tell(devices, terms, Stage::Frozen)
        .map_err(E::from)
        .and_then(|()| {
            arm(&mut || {
                takes = maps(devices)?;
                Ok(())
            })
        });
    // Whatever happened: first of all the file systems go on.
    let thawed = freezer.thaw();
    armed?;
    let duration = thawed.map_err(ConvergeError::from)?;
    Ok((takes, duration))
}

fn maps(devices: &[Arc<TrackedDevice>]) -> Result<Vec<Take>, TrackerError> {
    let take = |device: &Arc<TrackedDevice>| {
        device.refresh_for_take();
        device.take()
    };
    devices.iter().map(take).collect()
}

fn check(terms: &Terms<'_>) -> Result<(), ConvergeError> {
    if terms.cancel.is_cancelled() {
        return Err(ConvergeError::Cancelled);
    }
    Ok(())
}

fn tell(devices: &[Arc<TrackedDevice>], terms: &Terms<'_>, stage: Stage) -> Result<(), ConvergeError> {
    let Some(hook) = terms.hook else { return Ok(()) };
    let paths: Vec<PathBuf> = devices.iter().map(|device| device.path().clone()).collect();
    Ok(hook.run(stage, &paths, Instant::now() + terms.limits.freeze_limit)?)
}

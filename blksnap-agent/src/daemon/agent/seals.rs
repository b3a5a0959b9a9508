//! Seals: devices are tracked with a record, tracked again at the start, and sealed at the end.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::super::errors::Tell as _;
use super::Agent;
use crate::cbt::{CbtMap, ResetReason, SavedMap};
use crate::control::error::ApiError;
use crate::disk::BlockDevice;
use crate::seal::{Begin, SavedGranularity, Sealable, Seals};
use crate::tracker::{DeviceWatch, Granularity, TrackedDevice, TrackerError};
use crate::units::{BlockSize, DeviceId};

/// How long writes that were on their way when a device began to be tracked are waited for.
const ON_THEIR_WAY: Duration = Duration::from_secs(60);

/// Between the last write that nothing sees and the look at the counters: a completion that is being counted is.
const COUNTING: Duration = Duration::from_millis(20);

/// How often recorded devices are looked for while the daemon starts.
const LOOK: Duration = Duration::from_millis(50);

/// Records and seals, with what the daemon needs beside.
#[derive(Debug)]
pub(super) struct Recorded {
    pub(super) seals: Seals,
    /// One attach or detach at a time.
    changing: Mutex<()>,
    /// Watches of devices whose maps went on, until the second time.
    watches: Mutex<Vec<(DeviceWatch, Instant)>>,
    /// Recorded devices that were not there at the last look, and the names of those that were.
    absent: Mutex<Absent>,
}

#[derive(Debug, Default)]
struct Absent {
    paths: Vec<PathBuf>,
    present: Vec<(OsString, String)>,
}

impl Recorded {
    pub(super) fn new(seals: Seals) -> Self {
        Self {
            seals,
            changing: Mutex::default(),
            watches: Mutex::default(),
            absent: Mutex::default(),
        }
    }

    pub(super) fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn saved(granularity: Granularity) -> SavedGranularity {
    match granularity {
        Granularity::Adaptive(params) => SavedGranularity::Adaptive(params),
        Granularity::Fixed(size) => SavedGranularity::Fixed(size.bytes()),
    }
}

impl Agent {
    /// Tracks a device, with the map of before if that has every change until now.
    pub(super) fn track(
        &self,
        device: BlockDevice,
        granularity: Granularity,
        action: &str,
    ) -> Result<Arc<TrackedDevice>, ApiError> {
        let _changing = self.recorded.changing();
        let seals = &self.recorded.seals;
        if let Some(tracked) = self.tracker.device(device.id) {
            tracked.check_doubt();
            // One that was lost makes room for what has its number now.
            if tracked.lost().is_none() {
                return Err(TrackerError::Already(device.path.display().to_string()).tell(action));
            }
        }
        let block_size = granularity.block_size(&device);
        let prepared = seals
            .prepare(&device, saved(granularity), block_size)
            .map_err(|error| error.tell(action))?;
        let id = device.id;
        let (attached, resumed) = match prepared.begin {
            Begin::Resume(map) => (self.tracker.attach_with(device, *map), true),
            Begin::Fresh(reason) => (self.tracker.attach_anew(device, granularity, reason), false),
        };
        let tracked = match attached {
            Ok(tracked) => tracked,
            Err(error) => {
                if let Err(error) = seals.give_up(id, prepared.known) {
                    tracing::error!(%error, "a device that is not tracked is tracked at the next start");
                }
                return Err(error.tell(action));
            }
        };
        if resumed {
            // What was on its way before the hook was there is marked when it completes.
            match DeviceWatch::start(Arc::clone(&tracked)) {
                Ok(watch) => self.watches().push((watch, Instant::now() + ON_THEIR_WAY)),
                Err(error) => {
                    tracing::warn!(
                        %error,
                        device = %tracked.path().display(),
                        "writes in flight can't be followed"
                    );
                    tracked.corrupt(ResetReason::ContinuityUnproven);
                }
            }
            std::thread::sleep(COUNTING);
            if let Err(doubt) = seals.settle(tracked.device(), &prepared.identity) {
                tracing::warn!(
                    device = %tracked.path().display(),
                    reason = doubt.reason().code(),
                    why = %doubt,
                    "the change map can't go on"
                );
                tracked.corrupt(doubt.reason());
            }
        }
        Ok(tracked)
    }

    /// Ends tracking of a device on purpose.
    pub(super) fn untrack(&self, id: DeviceId, action: &str) -> Result<(), ApiError> {
        let _changing = self.recorded.changing();
        self.watches()
            .retain(|(watch, _)| watch.device().device().id != id);
        self.tracker.detach(id).map_err(|error| error.tell(action))?;
        self.recorded.seals.forget(id).map_err(|error| error.tell(action))
    }

    fn watches(&self) -> MutexGuard<'_, Vec<(DeviceWatch, Instant)>> {
        self.recorded
            .watches
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// At the start: what the kernel tracks gets its record, and what is recorded is tracked. Devices that are not
    /// there yet are waited for as long as `wait`.
    pub(in crate::daemon) fn restore(&self, wait: Duration) {
        for tracked in self.tracker.devices() {
            if let Err(error) = self
                .recorded
                .seals
                .adopted(tracked.device(), tracked.block_size())
            {
                tracing::error!(
                    %error,
                    device = %tracked.path().display(),
                    "the device would not be tracked after a reboot"
                );
            }
        }
        let end = Instant::now() + wait;
        self.track_recorded();
        while !self.absent().paths.is_empty() && Instant::now() < end {
            std::thread::sleep(LOOK);
            self.look();
        }
        for path in &self.absent().paths {
            tracing::warn!(device = %path.display(), "a device that was tracked is not there; it is tracked when it comes");
        }
    }

    /// Now and then: tracks recorded devices that have come, and ends watches whose time is over.
    pub(in crate::daemon) fn look(&self) {
        let now = Instant::now();
        self.watches().retain(|(_, end)| *end > now);
        let absent = self.absent();
        let unchanged = absent.paths.is_empty() || absent.present == self.recorded.seals.present();
        drop(absent);
        if !unchanged {
            self.track_recorded();
        }
    }

    fn track_recorded(&self) {
        let present = self.recorded.seals.present();
        let (found, paths) = match self.recorded.seals.untracked() {
            Ok(found) => found,
            Err(error) => {
                tracing::error!(%error, "can't tell which devices were tracked");
                return;
            }
        };
        *self.absent() = Absent { paths, present };
        for device in found {
            let path = device.device.path.clone();
            let granularity = match device.granularity {
                SavedGranularity::Adaptive(params) => Granularity::Adaptive(params),
                SavedGranularity::Fixed(bytes) => match BlockSize::from_bytes(bytes) {
                    Ok(size) => Granularity::Fixed(size),
                    Err(_) => Granularity::Adaptive(self.parameters),
                },
            };
            match self.track(device.device, granularity, "track again") {
                Ok(tracked) => tracing::info!(
                    device = %path.display(),
                    generation = %tracked.with_map(CbtMap::generation),
                    "tracked again"
                ),
                Err(error) => {
                    tracing::error!(device = %path.display(), %error, "the device is not tracked any more");
                }
            }
        }
    }

    fn absent(&self) -> MutexGuard<'_, Absent> {
        self.recorded
            .absent
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// At the end: seals what nothing can write to any more.
    pub(in crate::daemon) fn seal(&self) {
        let _changing = self.recorded.changing();
        self.watches().clear();
        let devices = self.tracker.devices();
        if devices.is_empty() || !self.recorded.seals.applies() {
            return;
        }
        // Disks are read: all at a time.
        std::thread::scope(|scope| {
            for tracked in &devices {
                scope.spawn(move || self.seal_device(tracked));
            }
        });
    }

    fn seal_device(&self, tracked: &TrackedDevice) {
        let path = tracked.path().display();
        match self.recorded.seals.seal(&OfTracker(tracked)) {
            Ok(()) => tracing::info!(device = %path, "sealed: its change map goes on after the reboot"),
            Err(why) => {
                tracing::warn!(device = %path, %why, "not sealed: its change map begins anew after a reboot");
            }
        }
    }
}

/// A tracked device as [`Seals::seal`] sees it.
struct OfTracker<'a>(&'a TrackedDevice);

impl Sealable for OfTracker<'_> {
    fn device(&self) -> &BlockDevice {
        self.0.device()
    }

    fn copy(&self) -> Result<SavedMap, String> {
        self.0.close_period().map_err(|error| error.to_string())?;
        self.0.check_doubt();
        Ok(self.0.with_map(CbtMap::save))
    }

    fn is_unchanged(&self) -> bool {
        self.0.is_clean() && self.0.check_doubt().is_none()
    }
}

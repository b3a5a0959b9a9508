//! Mapped: a snapshot of devices of device-mapper, whose old data the kernel keeps.
//!
//! It outlives its agent: what keeps it is in the kernel. The next agent goes on with it, until the machine is started
//! again.

use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use uuid::Uuid;

use super::document::{Document, MemberDocument};
use super::events::{EventData, Events};
use super::held::{HoldOptions, HoldPlace, remove, seconds};
use super::owner::{Content, Image, Owner, Take, TakeOptions};
use super::{FilterKind, Member, SnapshotError};
use crate::cbt::Taken;
use crate::disk::BlockDevice;
use crate::engine::CancelToken;
use crate::filter::converge::Consistency;
use crate::filter::dm::{
    Condition, Dm, DmError, DmImage, DmOptions, MappedImage, Origin, Place, Recovered, Taken as Made,
};
use crate::filter::instant::{self, Moment, Terms};
use crate::storage::{DeviceExtent, StorageSpec, Usage};
use crate::tracker::Tracker;
use crate::units::{SECTOR_BYTES, Sectors, SnapshotId};

/// How often images are looked at.
const LOOK: Duration = Duration::from_millis(200);

/// How long storage that could not grow is left alone before it is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// The dm filter, opened when it is needed first, and what it found then.
#[derive(Debug)]
pub struct DmKeeper {
    options: DmOptions,
    opened: OnceLock<Arc<Dm>>,
    found: Mutex<Recovered>,
}

impl DmKeeper {
    /// Nothing is opened.
    #[must_use]
    pub fn new(options: DmOptions) -> Self {
        Self {
            options,
            opened: OnceLock::new(),
            found: Mutex::default(),
        }
    }

    /// The filter. What an agent before left is gone on with, or undone.
    ///
    /// # Errors
    /// There is no device-mapper, or what was left can't be undone.
    pub fn dm(&self) -> Result<Arc<Dm>, DmError> {
        // Also keeps two from opening it.
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(dm) = self.opened.get() {
            return Ok(Arc::clone(dm));
        }
        let dm = Arc::new(Dm::open(self.options.clone())?);
        *found = dm.recover(true)?;
        Ok(Arc::clone(self.opened.get_or_init(|| dm)))
    }

    /// Undoes what an agent before has left and nobody goes on with, if there is anything.
    pub fn sweep(&self, wanted: &[SnapshotId]) {
        if !self.options.journal.exists() {
            return;
        }
        let dm = match self.dm() {
            Ok(dm) => dm,
            Err(error) => {
                tracing::warn!(%error, "what device-mapper snapshots have left stays until the next start");
                return;
            }
        };
        let left: Vec<SnapshotId> = {
            let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut found.held).into_keys().collect()
        };
        for id in left.into_iter().filter(|id| !wanted.contains(id)) {
            if let Err(error) = dm.release(id) {
                tracing::warn!(snapshot = %id, %error, "a snapshot that nobody knows stays");
            }
        }
    }

    /// The images of a snapshot that goes on, or why it does not.
    fn found(&self, id: SnapshotId) -> Result<Vec<DmImage>, String> {
        self.dm().map_err(|error| error.to_string())?;
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(images) = found.held.remove(&id) {
            return Ok(images);
        }
        let lost = found.lost.iter().find(|lost| lost.snapshot == id);
        Err(lost.map_or_else(
            || "nothing is left of its devices".to_owned(),
            |lost| lost.why.clone(),
        ))
    }
}

/// A take of devices of device-mapper.
pub(super) struct MappedHold {
    pub(super) id: SnapshotId,
    pub(super) created: SystemTime,
    pub(super) devices: Vec<BlockDevice>,
    pub(super) storage: Vec<StorageSpec>,
    pub(super) tracker: Arc<Tracker>,
    pub(super) keeper: Arc<DmKeeper>,
    pub(super) options: HoldOptions,
    pub(super) place: HoldPlace,
    pub(super) events: Arc<Events>,
    pub(super) take: TakeOptions,
    pub(super) cancel: CancelToken,
}

impl Owner {
    /// A take of devices of device-mapper, of which `device` is one.
    pub(super) fn mapped_hold(&self, device: &BlockDevice, take: &Take) -> Result<MappedHold, SnapshotError> {
        let keeper = self.dm.clone().ok_or_else(|| DmError::Refused {
            device: device.path.display().to_string(),
            why: "this agent does not ask device-mapper; choose another filter".to_owned(),
        })?;
        let devices = self.info.devices.iter().filter_map(Member::tracked);
        Ok(MappedHold {
            id: self.info.id,
            created: self.info.created,
            devices: devices.cloned().collect(),
            storage: self.info.storage.clone(),
            tracker: Arc::clone(&self.tracker),
            keeper,
            options: self.options.clone(),
            place: self.place.clone(),
            events: Arc::clone(&self.events),
            take: take.options.clone(),
            cancel: take.cancel.clone(),
        })
    }
}

impl MappedHold {
    /// Takes the devices.
    pub(super) fn run(&self) -> Result<(MappedHeld, Vec<Image>), SnapshotError> {
        let dm = self.keeper.dm()?;
        let tracked = self
            .devices
            .iter()
            .map(|device| Ok(self.tracker.device_for_take(device.id)?))
            .collect::<Result<Vec<_>, SnapshotError>>()?;
        let origins = self.origins()?;
        let mut prepared = dm.prepare(self.id, &origins)?;
        let terms = Terms {
            limits: &self.take.limits,
            hook: self.take.hook.as_deref(),
            cancel: &self.cancel,
        };
        // Origins are suspended for less time than file systems are frozen.
        let moments = instant::take(&tracked, &terms, |close| {
            prepared.arm(|| close().map_err(SnapshotError::from))
        })?;
        let taken = prepared.finish()?;
        tracing::info!(snapshot = %self.id, suspended = ?taken.suspended, "devices of device-mapper were suspended");
        let kept = self.keep(&dm, &moments, &taken);
        if kept.is_err()
            && let Err(error) = dm.release(self.id)
        {
            tracing::warn!(snapshot = %self.id, %error, "a snapshot that could not be kept stays until the next start");
        }
        kept
    }

    fn keep(
        &self,
        dm: &Arc<Dm>,
        moments: &[Moment],
        made: &Made,
    ) -> Result<(MappedHeld, Vec<Image>), SnapshotError> {
        let images = &made.images;
        let mut found = Vec::with_capacity(images.len());
        for ((device, moment), image) in self.devices.iter().zip(moments).zip(images) {
            let content = MappedImage::open(Arc::clone(dm), self.id, *image, Arc::clone(&self.tracker))?;
            let content = content.with_suspended(made.suspended);
            found.push(Image {
                size: content.size(),
                member: Member::Mapped(device.clone()),
                content: Content::Mapped(content),
                taken: moment.taken,
                read_map: moment.read_map.clone(),
                consistency: moment.consistency,
                frozen: moment.frozen,
                copied_bytes: 0,
                rounds: 0,
            });
        }
        let member = |image: &Image| MemberDocument {
            name: image.member.name().to_owned(),
            path: image.member.path().to_owned(),
            size: image.size,
            chunk: 0,
            generation: image.taken.generation,
            number: image.taken.number,
            session: Uuid::nil(),
            session_before: None,
            free: Vec::new(),
        };
        let document = Document {
            id: self.id,
            created: seconds(self.created),
            taken: seconds(SystemTime::now()),
            boot: self.place.boot.clone(),
            stopped: false,
            filter: FilterKind::Dm,
            promise: self.options.promise,
            minimum: self.options.minimum,
            autogrow: self.options.autogrow,
            storage: self.storage.clone(),
            members: found.iter().map(member).collect(),
        };
        if let Some(directory) = self.directory() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&directory)
                .map_err(|source| SnapshotError::state("make", &directory, source))?;
            document.write(&directory).inspect_err(|_| remove(&directory))?;
        }
        let held = MappedHeld::watched(dm, self.id, self.directory(), &found, &self.options, &self.events);
        Ok((held, found))
    }

    fn directory(&self) -> Option<PathBuf> {
        let root = self.place.directory.as_ref()?;
        Some(root.join(self.id.to_string()))
    }

    /// The devices with a place for the old data of each.
    fn origins(&self) -> Result<Vec<Origin>, SnapshotError> {
        let places = places(&self.storage, self.devices.len())?;
        let origins = self.devices.iter().zip(places);
        Ok(origins
            .map(|(device, place)| Origin {
                device: device.clone(),
                place,
                bytes: self.options.minimum,
            })
            .collect())
    }
}

/// A place for each of `count` devices: a file of its own in a directory, or ranges of its own.
fn places(storage: &[StorageSpec], count: usize) -> Result<Vec<Place>, DmError> {
    let refused = |why: &str| {
        let given: Vec<String> = storage.iter().map(ToString::to_string).collect();
        Err(DmError::Storage {
            place: given.join(" and "),
            why: why.to_owned(),
        })
    };
    if let [StorageSpec::Directory { path, .. }] = storage {
        return Ok(vec![Place::Directory(path.clone()); count]);
    }
    if storage.len() != count {
        return refused(
            "the kernel keeps old data of each device apart; give one directory, or as many devices or ranges as are taken",
        );
    }
    let mut places = Vec::with_capacity(count);
    for spec in storage {
        let StorageSpec::Device { path, ranges } = spec else {
            return refused("give one directory, or block devices or ranges of them");
        };
        let device = BlockDevice::open(path)?;
        let whole = crate::units::Extent {
            offset: 0,
            length: device.capacity.bytes(),
        };
        let ranges = if ranges.is_empty() {
            vec![whole]
        } else {
            ranges.clone()
        };
        let extents = ranges.iter().map(|range| DeviceExtent {
            device: device.id,
            sector: range.offset / SECTOR_BYTES,
            count: range.length / SECTOR_BYTES,
        });
        places.push(Place::Ranges(extents.collect()));
    }
    Ok(places)
}

/// A snapshot that the kernel keeps, and who looks after it.
#[derive(Debug)]
pub(super) struct MappedHeld {
    dm: Arc<Dm>,
    id: SnapshotId,
    directory: Option<PathBuf>,
    images: Vec<MappedImage>,
    stop: Arc<AtomicBool>,
    watch: Option<JoinHandle<()>>,
}

impl MappedHeld {
    fn watched(
        dm: &Arc<Dm>,
        id: SnapshotId,
        directory: Option<PathBuf>,
        images: &[Image],
        options: &HoldOptions,
        events: &Arc<Events>,
    ) -> Self {
        let of_mapped = |image: &Image| match &image.content {
            Content::Mapped(mapped) => Some((image.member.shown(), mapped.clone())),
            Content::Copy(_) | Content::Held(_) => None,
        };
        let all: Vec<(String, MappedImage)> = images.iter().filter_map(of_mapped).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let watcher = Watcher {
            dm: Arc::clone(dm),
            id,
            images: all.clone(),
            minimum: options.minimum,
            autogrow: options.autogrow,
            events: Arc::clone(events),
            told: BTreeMap::new(),
            failed: BTreeMap::new(),
        };
        let stopped = Arc::clone(&stop);
        let watch = std::thread::Builder::new()
            .name("blksnap-dm-watch".to_owned())
            .spawn(move || watcher.run(&stopped));
        if let Err(error) = &watch {
            tracing::error!(snapshot = %id, %error, "nobody looks after the storage of a snapshot");
        }
        Self {
            dm: Arc::clone(dm),
            id,
            directory,
            images: all.into_iter().map(|(_, image)| image).collect(),
            stop,
            watch: watch.ok(),
        }
    }

    /// Goes on with a snapshot of the agent before.
    pub(super) fn resume(
        keeper: &DmKeeper,
        directory: PathBuf,
        document: &Document,
        tracker: &Arc<Tracker>,
        options: &HoldOptions,
        events: &Arc<Events>,
    ) -> Result<(Self, Vec<Image>), String> {
        let id = document.id;
        let images = keeper.found(id)?;
        let dm = keeper.dm().map_err(|error| error.to_string())?;
        let found = Self::images(&dm, &images, document, tracker).inspect_err(|_| {
            // Nobody goes on with it: it must not stand in the way of the device, or of another one with its number.
            if let Err(error) = dm.release(id) {
                tracing::warn!(snapshot = %id, %error, "devices of a snapshot that is lost stay until it is destroyed");
            }
        })?;
        let options = HoldOptions {
            minimum: document.minimum,
            autogrow: document.autogrow,
            ..options.clone()
        };
        let held = Self::watched(&dm, id, Some(directory), &found, &options, events);
        Ok((held, found))
    }

    /// The images of an agent before this one, each with its origin.
    fn images(
        dm: &Arc<Dm>,
        images: &[DmImage],
        document: &Document,
        tracker: &Arc<Tracker>,
    ) -> Result<Vec<Image>, String> {
        let mut found = Vec::with_capacity(images.len());
        for (image, member) in images.iter().zip(&document.members) {
            let device = BlockDevice::open(&member.path).map_err(|error| error.to_string())?;
            let content = MappedImage::open(Arc::clone(dm), document.id, *image, Arc::clone(tracker));
            let content = content.map_err(|error| error.to_string())?;
            if device.id != image.origin || content.size() != member.size {
                return Err(format!("{} is another device now", member.path.display()));
            }
            found.push(Image {
                size: content.size(),
                member: Member::Mapped(device),
                content: Content::Mapped(content),
                taken: Taken {
                    generation: member.generation,
                    number: member.number,
                    reset: None,
                },
                read_map: None,
                consistency: Consistency::Crash,
                frozen: Duration::ZERO,
                copied_bytes: 0,
                rounds: 0,
            });
        }
        Ok(found)
    }

    /// Its storage.
    pub(super) fn usage(&self) -> Usage {
        let usages: Vec<_> = self.images.iter().filter_map(MappedImage::usage).collect();
        Usage {
            used: usages.iter().map(|usage| usage.used).sum(),
            bytes: usages.iter().map(|usage| usage.bytes).sum(),
            limit: None,
            regions: self.images.len(),
        }
    }

    /// The agent ends; the next one goes on with it.
    pub(super) fn leave(mut self) {
        self.end_watch();
    }

    /// Ends the snapshot.
    pub(super) fn destroy(mut self) {
        self.end_watch();
        // Who has an image open still gets errors.
        self.images.clear();
        match self.dm.release(self.id) {
            Ok(()) => self.directory.iter().for_each(|directory| remove(directory)),
            Err(error) => {
                tracing::error!(snapshot = %self.id, %error, "devices of a destroyed snapshot stay until the next start");
            }
        }
    }

    fn end_watch(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(watch) = self.watch.take() {
            // It has told what went wrong.
            let _ = watch.join();
        }
    }
}

/// Looks after the storage of a snapshot.
struct Watcher {
    dm: Arc<Dm>,
    id: SnapshotId,
    images: Vec<(String, MappedImage)>,
    minimum: u64,
    autogrow: bool,
    events: Arc<Events>,
    /// By number in `images`: the bytes at which little space was told of last.
    told: BTreeMap<usize, u64>,
    /// By number in `images`: when it could not grow.
    failed: BTreeMap<usize, Instant>,
}

impl Watcher {
    fn run(mut self, stop: &AtomicBool) {
        let mut lost = vec![false; self.images.len()];
        while !stop.load(Ordering::Acquire) {
            for (number, lost) in lost.iter_mut().enumerate() {
                *lost = *lost || !self.look(number);
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Whether the image is still there.
    fn look(&mut self, number: usize) -> bool {
        let (device, image) = &self.images[number];
        let condition = image.condition();
        if condition != Condition::Whole {
            let errno = condition.errno().map_or(0, |errno| errno as i32);
            tracing::error!(snapshot = %self.id, device, errno, why = condition.why(), "the image is lost; the device goes on");
            let origin = image.device().origin;
            self.events.send(EventData::Corrupted {
                device: device.clone(),
                major: origin.major,
                minor: origin.minor,
                errno,
                reason: condition.why().to_owned(),
            });
            return false;
        }
        let Some(usage) = image.usage() else { return true };
        if usage.bytes.saturating_sub(usage.used) > self.minimum / 2 {
            return true;
        }
        if self.told.get(&number) != Some(&usage.bytes) {
            self.told.insert(number, usage.bytes);
            self.failed.remove(&number);
            self.events.send(EventData::LowFreeSpace {
                requested: Sectors::new(self.minimum / SECTOR_BYTES),
            });
        }
        let waits = self
            .failed
            .get(&number)
            .is_some_and(|when| when.elapsed() < RETRY);
        if self.autogrow
            && !waits
            && let Err(error) = self.dm.grow(self.id, image.device().origin, self.minimum)
        {
            tracing::warn!(snapshot = %self.id, device, %error, "the difference storage does not grow");
            self.failed.insert(number, Instant::now());
        }
        true
    }
}

//! Gated: a snapshot of devices whose writes are held by programs in the kernel.
//!
//! Such a snapshot ends with the agent: what holds the writes goes with the process, and from then on its images would
//! be wrong. What is written down of it only lets the next agent say that it was there, and is lost.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use uuid::Uuid;

use super::document::{Document, MemberDocument};
use super::events::Events;
use super::gated_own::OwnStorage;
use super::held::{Held, HoldOptions, HoldPlace, seconds};
use super::owner::{Content, Image, TakeOptions};
use super::stores::{Parts, new_store};
use super::{FilterKind, Member, SnapshotError};
use crate::cow::ChunkParams;
use crate::disk::stack::Stack;
use crate::disk::{BlockDevice, DiskError, FileSystems};
use crate::engine::CancelToken;
use crate::engine::cow::Promise;
use crate::filter::gate::{self, Gate, GateError, GateImage, Gates};
use crate::filter::held::HeldImage;
use crate::filter::instant::{self, Moment, Terms};
use crate::storage::{Own, Pool, StorageSpec};
use crate::sys::sched;
use crate::tracker::{TrackedDevice, Tracker};
use crate::units::SnapshotId;

/// How often a take is tried whose instant a writer spoiled.
const ATTEMPTS: u32 = 3;

/// Between two of them.
const PAUSE: Duration = Duration::from_millis(200);

/// What a snapshot of devices with gates promises to survive: nothing, so that a write waits until its old data is in
/// memory, not until it is stored.
pub(super) const PROMISE: Promise = Promise::Nothing;

/// The gates of all snapshots, and how the size of chunks follows from that of a device.
#[derive(Clone, Debug)]
pub struct GateKeeper {
    /// The gates.
    pub gates: Arc<Gates>,
    /// Chunk sizes.
    pub chunks: ChunkParams,
}

/// A take of devices that get a gate.
pub(super) struct GateHold {
    pub(super) id: SnapshotId,
    pub(super) created: SystemTime,
    pub(super) devices: Vec<BlockDevice>,
    pub(super) tracker: Arc<Tracker>,
    pub(super) keeper: GateKeeper,
    pub(super) pool: Arc<Pool>,
    pub(super) options: HoldOptions,
    pub(super) place: HoldPlace,
    pub(super) events: Arc<Events>,
    pub(super) take: TakeOptions,
    pub(super) cancel: CancelToken,
}

impl GateHold {
    /// Takes the devices.
    pub(super) fn run(&self) -> Result<(Held, Vec<Image>), SnapshotError> {
        let mut own = OwnStorage::make(self)?;
        let taken = self.attempts(own.as_ref());
        match (taken, &mut own) {
            (Ok((mut held, images)), _) => {
                held.own = own.map(Box::new);
                Ok((held, images))
            }
            (Err(error), Some(own)) => {
                own.undo(&self.pool);
                Err(error)
            }
            (Err(error), None) => Err(error),
        }
    }

    fn attempts(&self, own: Option<&OwnStorage>) -> Result<(Held, Vec<Image>), SnapshotError> {
        let mut attempt = 1;
        loop {
            match self.attempt(own) {
                Err(SnapshotError::Gate(error @ (GateError::Busy { .. } | GateError::Broken { .. })))
                    if attempt < ATTEMPTS =>
                {
                    tracing::info!(snapshot = %self.id, %error, "the take is tried again");
                    attempt += 1;
                    std::thread::sleep(PAUSE);
                }
                ended => return ended,
            }
        }
    }

    fn attempt(&self, own: Option<&OwnStorage>) -> Result<(Held, Vec<Image>), SnapshotError> {
        let tracked = self
            .devices
            .iter()
            .map(|device| Ok(self.tracker.device_for_take(device.id)?))
            .collect::<Result<Vec<_>, SnapshotError>>()?;
        let gates = tracked
            .iter()
            .map(|device| self.gate(device))
            .collect::<Result<Vec<_>, _>>()?;
        check_storage(&gates, &self.pool.specs())?;
        // The threads that store old data are started by this one.
        sched::flush_for_others();
        let member = |gate: &Arc<Gate>| {
            let parts = Parts {
                pool: &self.pool,
                journal: None,
                excluded: Vec::new(),
                free: None,
            };
            let path = &gate.device().path;
            gate::Member {
                gate: Arc::clone(gate),
                store: Arc::new(new_store(self.id, path, parts, &self.options, &self.events)),
            }
        };
        let members: Vec<_> = gates.iter().map(member).collect();
        let terms = Terms {
            limits: &self.take.limits,
            hook: self.take.hook.as_deref(),
            cancel: &self.cancel,
        };
        let mut images = Vec::new();
        let moments = instant::take(&tracked, &terms, |close| {
            let close = || close().map_err(|error| GateError::Close(error.to_string()));
            images = Gates::take(&members, close)?;
            if let Some(own) = own {
                images.iter().for_each(|image| own.used_by(image));
            }
            Ok::<_, SnapshotError>(())
        })
        .inspect_err(|_| {
            for (gate, image) in gates.iter().zip(&images) {
                gate.release(image.key());
            }
        })?;
        let held: Vec<_> = tracked
            .iter()
            .zip(images)
            .zip(&moments)
            .map(|((device, image), moment)| GateImage::new(Arc::clone(device), image, moment.taken))
            .collect();
        self.keep(&tracked, gates, &held, &moments)
    }

    pub(super) fn gate(&self, device: &TrackedDevice) -> Result<Arc<Gate>, SnapshotError> {
        let gate = self.keeper.gates.gate(device.device(), &self.keeper.chunks)?;
        if gate.device().capacity == device.device().capacity {
            return Ok(gate);
        }
        Err(GateError::Device {
            action: "hold writes of",
            device: device.path().clone(),
            reason: "its size has changed while a snapshot of it is held; destroy that one first".to_owned(),
        }
        .into())
    }

    /// Writes down what was taken.
    fn keep(
        &self,
        tracked: &[Arc<TrackedDevice>],
        gates: Vec<Arc<Gate>>,
        images: &[GateImage],
        moments: &[Moment],
    ) -> Result<(Held, Vec<Image>), SnapshotError> {
        let all = || tracked.iter().zip(images).zip(moments);
        let document = Document {
            id: self.id,
            created: seconds(self.created),
            taken: seconds(SystemTime::now()),
            boot: self.place.boot.clone(),
            stopped: false,
            filter: FilterKind::Gate,
            promise: self.options.promise,
            minimum: self.options.minimum,
            autogrow: self.options.autogrow,
            storage: self.pool.specs(),
            members: all()
                .map(|((device, image), moment)| document_of(device.device(), image, moment))
                .collect(),
        };
        let directory = self
            .place
            .directory
            .as_ref()
            .map(|root| root.join(self.id.to_string()));
        let held = Held {
            directory: directory.clone(),
            document,
            pool: Arc::clone(&self.pool),
            images: images.iter().cloned().map(HeldImage::Gate).collect(),
            guards: Vec::new(),
            own: None,
            gates,
        };
        let made = directory.map_or(Ok(()), |directory| {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&directory)
                .map_err(|source| SnapshotError::state("make", &directory, source))
        });
        if let Err(error) = made.and_then(|()| held.write()) {
            held.release();
            return Err(error);
        }
        let image = |((device, image), moment): ((&Arc<TrackedDevice>, &GateImage), &Moment)| Image {
            size: image.image().size(),
            member: Member::Gated(device.device().clone()),
            content: Content::Held(HeldImage::Gate(image.clone())),
            taken: moment.taken,
            read_map: moment.read_map.clone(),
            consistency: moment.consistency,
            frozen: moment.frozen,
            copied_bytes: 0,
            rounds: 0,
        };
        let images = all().map(image).collect();
        Ok((held, images))
    }
}

fn document_of(device: &BlockDevice, image: &GateImage, moment: &Moment) -> MemberDocument {
    let layout = image.image().origin().layout();
    MemberDocument {
        name: device.name.clone(),
        path: device.path.clone(),
        size: layout.size(),
        chunk: layout.chunk_bytes(),
        generation: moment.taken.generation,
        number: moment.taken.number,
        session: Uuid::nil(),
        session_before: None,
        free: Vec::new(),
    }
}

/// Refuses storage that stands on a device with a gate: what is stored there would wait for what waits for it. Files
/// that are used beneath the file system do not.
pub(super) fn check_storage(gates: &[Arc<Gate>], specs: &[StorageSpec]) -> Result<(), SnapshotError> {
    if gates.is_empty() {
        return Ok(());
    }
    let devices: Vec<&BlockDevice> = gates.iter().map(|gate| gate.device()).collect();
    let file_systems = FileSystems::on(&devices).map_err(on_disk)?;
    for spec in specs {
        let origin = match spec {
            StorageSpec::Memory { .. } => None,
            StorageSpec::Directory { path, .. } | StorageSpec::File { path, .. } => {
                let file = open_near(path).map_err(|source| SnapshotError::state("open", path, source))?;
                file_systems.hold(&file).map_err(on_disk)?
            }
            StorageSpec::Device { path, .. } => {
                let storage = BlockDevice::open(path).map_err(on_disk)?;
                devices
                    .iter()
                    .find(|origin| shares(origin, &storage))
                    .map(|origin| origin.path.clone())
            }
            // Its writes do not wait: see [`super::gated_own`].
            StorageSpec::Own(own) if own.file.is_some() && is_gated(own, &devices) => None,
            StorageSpec::Own(own) => Some(PathBuf::from(&own.device)),
        };
        if let Some(origin) = origin {
            return Err(SnapshotError::OnOrigin {
                place: spec.to_string(),
                origin,
            });
        }
    }
    Ok(())
}

fn is_gated(own: &Own, devices: &[&BlockDevice]) -> bool {
    devices.iter().any(|device| device.path == Path::new(&own.device))
}

pub(super) fn on_disk(error: DiskError) -> SnapshotError {
    SnapshotError::Gate(GateError::Close(error.to_string()))
}

/// The file, or the directory that it will be in.
fn open_near(path: &Path) -> std::io::Result<File> {
    match (File::open(path), path.parent()) {
        (Err(error), Some(parent)) if error.kind() == std::io::ErrorKind::NotFound => File::open(parent),
        (opened, _) => opened,
    }
}

/// Whether sectors of the one may be sectors of the other.
fn shares(origin: &BlockDevice, storage: &BlockDevice) -> bool {
    if origin.disk_id == storage.disk_id {
        let end = |device: &BlockDevice| device.first_sector.count() + device.capacity.count();
        return origin.first_sector.count() < end(storage) && storage.first_sector.count() < end(origin);
    }
    let beneath = Stack::beneath(Path::new("/sys/dev/block"), storage.id);
    beneath.disks.iter().any(|disk| disk.id == origin.disk_id)
}

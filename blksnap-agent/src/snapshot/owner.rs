//! Owner: the thread that keeps the state of one snapshot.

use std::fs::File;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, SystemTime};

use super::events::Events;
use super::files::{Devices, FileInUse, Files, NewFile, Watch};
use super::gated::{self, GateHold, GateKeeper};
use super::held::{Held, HoldOptions, HoldPlace, logical_block};
use super::mapped::{DmKeeper, MappedHeld, MappedHold};
use super::stores::{kept, pool_events, pool_options};
use super::{FilterWish, Member, SnapshotError, places};
use crate::cbt::{ReadMap, Taken};
use crate::cow::SnapshotKey;
use crate::disk::BlockDevice;
use crate::engine::{CancelToken, FileSink, Progress};
use crate::filter::converge::{self, Consistency, Converged, FreezeHook, Initial, Limits, Target};
use crate::filter::dm::MappedImage;
use crate::filter::held::HeldImage;
use crate::filter::served::Served;
use crate::own::Helper;
use crate::storage::{DirStorage, Pool, StorageSpec, Usage};
use crate::tracker::{TrackedDevice, Tracker};
use crate::units::SnapshotId;

/// How far a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Not taken yet; a take that failed leaves it so.
    Created,
    /// Being taken.
    Taking,
    /// Its images can be read.
    Taken,
    /// It was taken by an agent before this one, and nothing is left of its images.
    Lost,
}

/// What an image is made of.
#[derive(Clone, Debug)]
pub enum Content {
    /// A whole copy, from offset 0 on. Shared, and never written.
    Copy(Arc<File>),
    /// What was preserved, and the device.
    Held(HeldImage),
    /// A snapshot device of device-mapper.
    Mapped(MappedImage),
}

/// A device as it was at the instant.
#[derive(Clone, Debug)]
pub struct Image {
    /// The device.
    pub member: Member,
    /// Its bytes.
    pub content: Content,
    /// Length in bytes.
    pub size: u64,
    /// Number and generation of the take.
    pub taken: Taken,
    /// What changed before it; `None` if the map is doubtful.
    pub read_map: Option<Arc<ReadMap>>,
    /// What it is as good as.
    pub consistency: Consistency,
    /// How long the file systems of all devices were frozen.
    pub frozen: Duration,
    /// Bytes read to make it.
    pub copied_bytes: u64,
    /// Rounds of copying what changed meanwhile.
    pub rounds: u32,
}

/// A snapshot, as it is at a moment.
#[derive(Clone, Debug)]
pub struct Info {
    /// Identifier.
    pub id: SnapshotId,
    /// How far it is.
    pub state: State,
    /// When it was created.
    pub created: SystemTime,
    /// The instant; none before the take.
    pub taken: Option<SystemTime>,
    /// Its difference storage.
    pub storage: Vec<StorageSpec>,
    /// How much of that is used; none where devices are copied.
    pub usage: Option<Usage>,
    /// Its devices, in the order in which they were added.
    pub devices: Vec<Member>,
    /// Their images, in the same order; none before the take.
    pub images: Vec<Arc<Image>>,
    /// Why its images are lost, if they are.
    pub lost: Option<String>,
    /// Which filter was wished.
    pub wish: FilterWish,
    /// Why its filter was chosen, if nobody named one.
    pub chosen: Option<String>,
}

/// How a snapshot is taken.
#[derive(Clone, Debug, Default)]
pub struct TakeOptions {
    /// Bounds.
    pub limits: Limits,
    /// Told about the freeze.
    pub hook: Option<Arc<dyn FreezeHook>>,
}

/// What an owner is told.
pub(super) enum Command {
    Add(Member, Sender<Result<Info, SnapshotError>>),
    Append(StorageSpec, Sender<Result<Info, SnapshotError>>),
    Take(Take),
    Info(Sender<Info>),
    /// The pool, for questions that take long.
    Pool(Sender<Option<Arc<Pool>>>),
    Destroy(Sender<()>),
    /// The agent ends: what can go on with the next one is left for it.
    Leave(Sender<()>),
    /// Less space is left than there should be.
    Low(u64),
    /// A file that the storage grows by was made, or could not be.
    Grown(Result<NewFile, SnapshotError>),
    /// The take that was started has ended.
    Finished(Result<Outcome, SnapshotError>),
}

/// A take to be started.
pub(super) struct Take {
    pub(super) options: TakeOptions,
    pub(super) progress: Arc<dyn Progress>,
    pub(super) cancel: CancelToken,
    pub(super) reply: Sender<Result<Info, SnapshotError>>,
}

/// The take under way.
struct Running {
    cancel: CancelToken,
    reply: Sender<Result<Info, SnapshotError>>,
}

/// What a take made.
#[derive(Default)]
pub(super) struct Outcome {
    images: Vec<Image>,
    held: Option<Held>,
    mapped: Option<MappedHeld>,
}

/// State of one snapshot.
pub(super) struct Owner {
    pub(super) info: Info,
    pub(super) tracker: Arc<Tracker>,
    pub(super) options: HoldOptions,
    pub(super) place: HoldPlace,
    /// What makes gates; none: nothing does.
    pub(super) keeper: Option<GateKeeper>,
    pub(super) dm: Option<Arc<DmKeeper>>,
    pub(super) mapped: Option<MappedHeld>,
    pub(super) events: Arc<Events>,
    /// Storage of held devices; made when the first is there.
    pub(super) pool: Option<Arc<Pool>>,
    pub(super) held: Option<Held>,
    /// What makes files on the devices themselves; none: nothing can.
    pub(super) files: Option<Files>,
    pub(super) files_in_use: Vec<Arc<FileInUse>>,
    /// Until the take.
    pub(super) watches: Vec<Watch>,
    /// A file is being made.
    pub(super) growing: bool,
    /// Bytes that were asked for while it was.
    pub(super) asked: Option<u64>,
    /// For the end of a take.
    pub(super) queue: Sender<Command>,
    running: Option<Running>,
    /// Who waits for the end of the snapshot.
    destroying: Vec<Sender<()>>,
    /// The end leaves it for the next agent.
    leaving: bool,
}

/// What an owner begins with.
pub(super) struct Start {
    pub(super) id: SnapshotId,
    pub(super) storage: Vec<StorageSpec>,
    pub(super) options: HoldOptions,
    pub(super) place: HoldPlace,
    pub(super) tracker: Arc<Tracker>,
    pub(super) keeper: Option<GateKeeper>,
    pub(super) dm: Option<Arc<DmKeeper>>,
    pub(super) events: Arc<Events>,
    pub(super) devices: Option<Arc<dyn Devices>>,
    pub(super) queue: Sender<Command>,
}

impl Owner {
    pub(super) fn new(start: Start) -> Self {
        let files = start.devices.zip(start.place.directory.clone());
        let files = files.map(|(devices, root)| Files {
            id: start.id,
            root,
            helper: Helper::default(),
            devices,
        });
        Self {
            info: Info {
                id: start.id,
                state: State::Created,
                created: SystemTime::now(),
                taken: None,
                storage: start.storage,
                usage: None,
                devices: Vec::new(),
                images: Vec::new(),
                lost: None,
                wish: start.options.filter,
                chosen: start.options.chosen.clone(),
            },
            tracker: start.tracker,
            options: start.options,
            place: start.place,
            keeper: start.keeper,
            dm: start.dm,
            mapped: None,
            events: start.events,
            pool: None,
            held: None,
            files,
            files_in_use: Vec::new(),
            watches: Vec::new(),
            growing: false,
            asked: None,
            queue: start.queue,
            running: None,
            destroying: Vec::new(),
            leaving: false,
        }
    }

    /// Does what it is told until the snapshot is destroyed.
    pub(super) fn run(mut self, commands: &Receiver<Command>) {
        // The owner holds a sender itself, so the queue never ends by itself.
        while let Ok(command) = commands.recv() {
            // Whoever asked may have gone: an answer that nobody takes is no failure.
            match command {
                Command::Add(device, reply) => {
                    let _ = reply.send(self.add(device));
                }
                Command::Append(spec, reply) => {
                    let _ = reply.send(self.append(&spec));
                }
                Command::Take(take) => self.take(take),
                Command::Info(reply) => {
                    let _ = reply.send(self.info_now());
                }
                Command::Pool(reply) => {
                    let _ = reply.send(self.pool.clone());
                }
                Command::Destroy(reply) => self.end(reply, false),
                Command::Leave(reply) => self.end(reply, true),
                Command::Low(requested) if self.growing || self.running.is_some() => {
                    self.asked = Some(requested.max(self.asked.unwrap_or(0)));
                }
                Command::Low(requested) => self.low(requested),
                Command::Grown(made) => self.grown(made),
                Command::Finished(result) => self.finish(result),
            }
            if self.running.is_none() && !self.destroying.is_empty() {
                break;
            }
        }
        let waiting = std::mem::take(&mut self.destroying);
        // Images go before anybody is told that they are gone.
        self.info.images.clear();
        match (self.mapped.take(), self.leaving) {
            (Some(mapped), true) => mapped.leave(),
            (Some(mapped), false) => mapped.destroy(),
            (None, _) => {}
        }
        match (self.held.take(), self.leaving) {
            (Some(held), true) => held.leave(),
            (Some(held), false) => held.destroy(),
            (None, _) => self.discard(),
        }
        // Where the devices answer no more, the next agent removes what is not written down.
        if !self.leaving {
            self.release_files();
        }
        self.events.close();
        drop(self);
        for reply in waiting {
            let _ = reply.send(());
        }
    }

    fn end(&mut self, reply: Sender<()>, leave: bool) {
        self.leaving = leave;
        self.destroying.push(reply);
        if let Some(running) = &self.running {
            running.cancel.cancel();
        }
    }

    /// Removes what storage there is of a snapshot that was never taken, or lost.
    fn discard(&self) {
        if let Some(pool) = &self.pool {
            match (pool.remove_kept(), &self.place.directory) {
                (Ok(()), Some(root)) => places::forget(root, self.info.id),
                (Ok(()), None) => {}
                (Err(error), _) => tracing::warn!(%error, "a file of a destroyed snapshot stays"),
            }
        }
        // One that was lost stays until somebody has seen it.
        if self.info.state == State::Lost
            && !self.leaving
            && let Some(directory) = &self.place.directory
        {
            super::held::remove(&directory.join(self.info.id.to_string()));
            places::clear(directory, self.info.id);
        }
    }

    fn info_now(&self) -> Info {
        let mut info = self.info.clone();
        if let Some(pool) = &self.pool {
            info.storage = pool.specs();
            info.usage = Some(pool.usage());
        }
        if let Some(mapped) = &self.mapped {
            info.usage = Some(mapped.usage());
        }
        info
    }

    pub(super) fn add(&mut self, device: Member) -> Result<Info, SnapshotError> {
        let id = self.info.id;
        if self.info.state != State::Created {
            return Err(SnapshotError::AlreadyTaken(id));
        }
        if self.info.devices.iter().any(|known| known.id() == device.id()) {
            return Err(SnapshotError::AlreadyAdded {
                device: device.shown(),
                snapshot: id,
            });
        }
        if self
            .info
            .devices
            .iter()
            .any(|known| known.filter() != device.filter())
        {
            return Err(SnapshotError::Mixed {
                device: device.shown(),
                snapshot: id,
            });
        }
        match (&device, &self.pool) {
            (Member::Served(served), None) => self.make_pool(logical_block(&[Arc::clone(served)]))?,
            (Member::Gated(device), None) => {
                self.options.promise = gated::PROMISE;
                self.make_pool(device.logical_block)?;
            }
            _ => {}
        }
        self.info.devices.push(device);
        Ok(self.info_now())
    }

    fn make_pool(&mut self, logical_block: u32) -> Result<(), SnapshotError> {
        let options = pool_options(self.options.minimum, self.options.autogrow, logical_block);
        let pool = Arc::new(Pool::new(options, pool_events(&self.events, &self.queue)));
        for spec in &self.info.storage.clone() {
            self.give(&pool, spec).inspect_err(|_| {
                // Those before it.
                let _ = pool.remove_kept();
                self.release_files();
            })?;
        }
        self.pool = Some(pool);
        Ok(())
    }

    /// Storage as this snapshot has it, noted for the next agent if it outlives this one.
    pub(super) fn keep(&self, spec: &StorageSpec) -> Result<StorageSpec, SnapshotError> {
        let id = self.info.id;
        let spec = kept(spec, id, self.options.promise);
        if let Some(root) = &self.place.directory {
            places::note(root, id, &spec).map_err(|source| SnapshotError::state("note in", root, source))?;
        }
        Ok(spec)
    }

    fn append(&mut self, spec: &StorageSpec) -> Result<Info, SnapshotError> {
        let id = self.info.id;
        match self.pool.clone() {
            Some(pool) => self.give(&pool, spec)?,
            None if self.info.devices.is_empty() => self.info.storage.push(spec.clone()),
            None => return Err(SnapshotError::NotAppendable(id)),
        }
        Ok(self.info_now())
    }

    fn take(&mut self, take: Take) {
        let refusal = if self.info.state != State::Created {
            Some(SnapshotError::AlreadyTaken(self.info.id))
        } else if self.info.devices.is_empty() {
            Some(SnapshotError::Empty(self.info.id))
        } else {
            None
        };
        if let Some(error) = refusal {
            let _ = take.reply.send(Err(error));
            return;
        }
        let work = match self.plan(&take) {
            Ok(work) => work,
            Err(error) => {
                let _ = take.reply.send(Err(error));
                return;
            }
        };
        let finished = Finish {
            id: self.info.id,
            queue: self.queue.clone(),
            result: None,
        };
        let started = std::thread::Builder::new()
            .name("blksnap-take".to_owned())
            .spawn(move || {
                let mut finished = finished;
                finished.result = Some(work.run());
            });
        match started {
            Ok(_) => {
                self.info.state = State::Taking;
                self.running = Some(Running {
                    cancel: take.cancel,
                    reply: take.reply,
                });
            }
            Err(source) => {
                tracing::error!(%source, "can't start the thread of a take");
                let _ = take.reply.send(Err(SnapshotError::Defect(self.info.id)));
            }
        }
    }

    /// How it is taken.
    fn plan(&self, take: &Take) -> Result<Plan, SnapshotError> {
        if let Some(pool) = &self.pool {
            for spec in pool.specs() {
                if let StorageSpec::Own(own) = spec {
                    self.check_member(&own)?;
                }
            }
            let served = |member: &Member| match member {
                Member::Served(served) => Some(Arc::clone(served)),
                Member::Tracked(_) | Member::Gated(_) | Member::Mapped(_) => None,
            };
            if let Some(Member::Gated(device)) = self.info.devices.first() {
                let keeper = self.keeper.clone();
                let shown = device.path.display();
                return Ok(Plan::Gate(GateHold {
                    id: self.info.id,
                    created: self.info.created,
                    devices: self
                        .info
                        .devices
                        .iter()
                        .filter_map(Member::tracked)
                        .cloned()
                        .collect(),
                    tracker: Arc::clone(&self.tracker),
                    keeper: keeper.ok_or_else(|| SnapshotError::NoGates(shown.to_string()))?,
                    pool: Arc::clone(pool),
                    options: self.options.clone(),
                    place: self.place.clone(),
                    events: Arc::clone(&self.events),
                    take: take.options.clone(),
                    cancel: take.cancel.clone(),
                }));
            }
            return Ok(Plan::Hold(Hold {
                id: self.info.id,
                created: self.info.created,
                devices: self.info.devices.iter().filter_map(served).collect(),
                pool: Arc::clone(pool),
                options: self.options.clone(),
                place: self.place.clone(),
                events: Arc::clone(&self.events),
                files: self.files_in_use.clone(),
                free: self.free_keys(),
            }));
        }
        if let Some(Member::Mapped(device)) = self.info.devices.first() {
            return Ok(Plan::Mapped(self.mapped_hold(device, take)?));
        }
        let [
            StorageSpec::Directory {
                path, limit: None, ..
            },
        ] = self.info.storage.as_slice()
        else {
            let given: Vec<String> = self.info.storage.iter().map(ToString::to_string).collect();
            return Err(SnapshotError::OneDirectory {
                snapshot: self.info.id,
                given: given.join(" and "),
            });
        };
        let tracked = self.info.devices.iter().filter_map(Member::tracked);
        Ok(Plan::Copy(Work {
            tracker: Arc::clone(&self.tracker),
            storage: DirStorage::open(path)?,
            devices: tracked.cloned().collect(),
            options: take.options.clone(),
            progress: Arc::clone(&take.progress),
            cancel: take.cancel.clone(),
        }))
    }

    /// What is watched of the devices, in their order.
    fn free_keys(&self) -> Vec<Option<SnapshotKey>> {
        let of = |member: &Member| match member {
            Member::Served(served) => self.watches.iter().find_map(|watch| watch.key_of(served)),
            Member::Tracked(_) | Member::Gated(_) | Member::Mapped(_) => None,
        };
        self.info.devices.iter().map(of).collect()
    }

    fn finish(&mut self, result: Result<Outcome, SnapshotError>) {
        let Some(running) = self.running.take() else {
            return;
        };
        let answer = match result {
            Ok(Outcome { images, held, mapped }) => {
                self.info.state = State::Taken;
                self.info.taken = Some(SystemTime::now());
                self.info.devices = images.iter().map(|image| image.member.clone()).collect();
                self.info.images = images.into_iter().map(Arc::new).collect();
                self.held = held;
                self.mapped = mapped;
                self.watches.clear();
                if let Some(requested) = self.asked.take() {
                    self.low(requested);
                }
                Ok(self.info_now())
            }
            Err(error) => {
                self.info.state = State::Created;
                Err(error)
            }
        };
        let _ = running.reply.send(answer);
    }
}

/// Reports the end of a take, also of one that panicked.
struct Finish {
    id: SnapshotId,
    queue: Sender<Command>,
    result: Option<Result<Outcome, SnapshotError>>,
}

impl Drop for Finish {
    fn drop(&mut self) {
        let result = self.result.take().unwrap_or(Err(SnapshotError::Defect(self.id)));
        // The owner waits for this before it ends.
        let _ = self.queue.send(Command::Finished(result));
    }
}

/// What the thread of a take does.
enum Plan {
    Copy(Work),
    Hold(Hold),
    Gate(GateHold),
    Mapped(MappedHold),
}

impl Plan {
    fn run(self) -> Result<Outcome, SnapshotError> {
        match self {
            Self::Copy(work) => work.run().map(|images| Outcome {
                images,
                ..Outcome::default()
            }),
            Self::Hold(hold) => hold.run(),
            Self::Gate(hold) => hold.run().map(|(held, images)| Outcome {
                images,
                held: Some(held),
                ..Outcome::default()
            }),
            Self::Mapped(hold) => hold.run().map(|(held, images)| Outcome {
                images,
                mapped: Some(held),
                ..Outcome::default()
            }),
        }
    }
}

/// A take of served devices.
pub(super) struct Hold {
    pub(super) id: SnapshotId,
    pub(super) created: SystemTime,
    pub(super) devices: Vec<Arc<Served>>,
    pub(super) pool: Arc<Pool>,
    pub(super) options: HoldOptions,
    pub(super) place: HoldPlace,
    pub(super) events: Arc<Events>,
    pub(super) files: Vec<Arc<FileInUse>>,
    /// Keys of what is watched of the devices.
    pub(super) free: Vec<Option<SnapshotKey>>,
}

impl Hold {
    fn run(&self) -> Result<Outcome, SnapshotError> {
        let (held, images) = Held::take(self)?;
        Ok(Outcome {
            images,
            held: Some(held),
            mapped: None,
        })
    }
}

/// A take of devices that are copied.
struct Work {
    tracker: Arc<Tracker>,
    storage: DirStorage,
    devices: Vec<BlockDevice>,
    options: TakeOptions,
    progress: Arc<dyn Progress>,
    cancel: CancelToken,
}

impl Work {
    fn run(self) -> Result<Vec<Image>, SnapshotError> {
        let mut targets = Vec::new();
        let mut files = Vec::new();
        for device in &self.devices {
            let device = self.tracker.device_for_take(device.id)?;
            let size = device.device().capacity.bytes();
            let file = Arc::new(self.storage.create(size)?);
            targets.push(self.target(&device, &file, size)?);
            files.push((device, file));
        }
        let hook = self.options.hook.as_deref();
        let converged = converge::run(targets, &self.options.limits, hook, &*self.progress, &self.cancel)?;
        Ok(files
            .into_iter()
            .zip(converged)
            .map(|((device, file), converged)| image(&device, file, converged))
            .collect())
    }

    fn target(
        &self,
        device: &Arc<TrackedDevice>,
        file: &Arc<File>,
        size: u64,
    ) -> Result<Target, SnapshotError> {
        let path = self.storage.path();
        let name = format!(
            "the image of {} in {}",
            device.device().path.display(),
            path.display()
        );
        let sink = FileSink::fresh(Arc::clone(file), name, size).map_err(|source| {
            crate::storage::StorageError::Create {
                path: path.to_owned(),
                length: size,
                source,
            }
        })?;
        Ok(Target {
            device: Arc::clone(device) as _,
            initial: Initial::All,
            sink: Box::new(sink),
        })
    }
}

fn image(device: &Arc<TrackedDevice>, file: Arc<File>, converged: Converged) -> Image {
    let device = device.device().clone();
    Image {
        size: device.capacity.bytes(),
        member: Member::Tracked(device),
        content: Content::Copy(file),
        taken: converged.taken,
        read_map: converged.read_map,
        consistency: converged.consistency,
        frozen: converged.frozen,
        copied_bytes: converged.copied_bytes,
        rounds: converged.rounds,
    }
}

//! Owner: the thread that keeps the state of one snapshot.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, SystemTime};

use super::SnapshotError;
use crate::cbt::{ReadMap, Taken};
use crate::disk::BlockDevice;
use crate::engine::{CancelToken, FileSink, Progress};
use crate::filter::converge::{self, Consistency, Converged, FreezeHook, Initial, Limits, Target};
use crate::storage::DirStorage;
use crate::tracker::{TrackedDevice, Tracker};
use crate::units::{DeviceId, SnapshotId};

/// How far a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Not taken yet; a take that failed leaves it so.
    Created,
    /// Being taken.
    Taking,
    /// Its images can be read.
    Taken,
}

/// A device as it was at the instant.
#[derive(Clone, Debug)]
pub struct Image {
    /// The device.
    pub device: BlockDevice,
    /// Its bytes, from offset 0 on. Shared, and never written.
    pub file: Arc<File>,
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
    /// Directory of the difference storage.
    pub storage: PathBuf,
    /// Its devices, in the order in which they were added.
    pub devices: Vec<BlockDevice>,
    /// Their images, in the same order; none before the take.
    pub images: Vec<Arc<Image>>,
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
    Add(BlockDevice, Sender<Result<Info, SnapshotError>>),
    Take(Take),
    Info(Sender<Info>),
    Destroy(Sender<()>),
    /// The take that was started has ended.
    Finished(Result<Vec<Image>, SnapshotError>),
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

/// State of one snapshot.
pub(super) struct Owner {
    pub(super) info: Info,
    pub(super) tracker: Arc<Tracker>,
    pub(super) storage: DirStorage,
    /// For the end of a take.
    pub(super) queue: Sender<Command>,
    running: Option<Running>,
    /// Who waits for the end of the snapshot.
    destroying: Vec<Sender<()>>,
}

impl Owner {
    pub(super) fn new(
        id: SnapshotId,
        devices: Vec<BlockDevice>,
        tracker: Arc<Tracker>,
        storage: DirStorage,
        queue: Sender<Command>,
    ) -> Self {
        Self {
            info: Info {
                id,
                state: State::Created,
                created: SystemTime::now(),
                taken: None,
                storage: storage.path().to_owned(),
                devices,
                images: Vec::new(),
            },
            tracker,
            storage,
            queue,
            running: None,
            destroying: Vec::new(),
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
                Command::Take(take) => self.take(take),
                Command::Info(reply) => {
                    let _ = reply.send(self.info.clone());
                }
                Command::Destroy(reply) => {
                    self.destroying.push(reply);
                    if let Some(running) = &self.running {
                        running.cancel.cancel();
                    }
                }
                Command::Finished(result) => self.finish(result),
            }
            if self.running.is_none() && !self.destroying.is_empty() {
                break;
            }
        }
        let waiting = std::mem::take(&mut self.destroying);
        // The files go before anybody is told that they are gone.
        drop(self);
        for reply in waiting {
            let _ = reply.send(());
        }
    }

    fn add(&mut self, device: BlockDevice) -> Result<Info, SnapshotError> {
        if self.info.state != State::Created {
            return Err(SnapshotError::AlreadyTaken(self.info.id));
        }
        if self.info.devices.iter().any(|known| known.id == device.id) {
            return Err(SnapshotError::AlreadyAdded {
                device: device.path.display().to_string(),
                snapshot: self.info.id,
            });
        }
        self.info.devices.push(device);
        Ok(self.info.clone())
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
        let work = Work {
            tracker: Arc::clone(&self.tracker),
            storage: self.storage.clone(),
            devices: self.info.devices.iter().map(|device| device.id).collect(),
            options: take.options,
            progress: take.progress,
            cancel: take.cancel.clone(),
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

    fn finish(&mut self, result: Result<Vec<Image>, SnapshotError>) {
        let Some(running) = self.running.take() else {
            return;
        };
        let answer = match result {
            Ok(images) => {
                self.info.state = State::Taken;
                self.info.taken = Some(SystemTime::now());
                self.info.devices = images.iter().map(|image| image.device.clone()).collect();
                self.info.images = images.into_iter().map(Arc::new).collect();
                Ok(self.info.clone())
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
    result: Option<Result<Vec<Image>, SnapshotError>>,
}

impl Drop for Finish {
    fn drop(&mut self) {
        let result = self.result.take().unwrap_or(Err(SnapshotError::Defect(self.id)));
        // The owner waits for this before it ends.
        let _ = self.queue.send(Command::Finished(result));
    }
}

/// What the thread of a take does.
struct Work {
    tracker: Arc<Tracker>,
    storage: DirStorage,
    devices: Vec<DeviceId>,
    options: TakeOptions,
    progress: Arc<dyn Progress>,
    cancel: CancelToken,
}

impl Work {
    fn run(self) -> Result<Vec<Image>, SnapshotError> {
        let mut targets = Vec::new();
        let mut files = Vec::new();
        for id in &self.devices {
            let device = self.tracker.device_for_take(*id)?;
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
        device,
        file,
        taken: converged.taken,
        read_map: converged.read_map,
        consistency: converged.consistency,
        frozen: converged.frozen,
        copied_bytes: converged.copied_bytes,
        rounds: converged.rounds,
    }
}

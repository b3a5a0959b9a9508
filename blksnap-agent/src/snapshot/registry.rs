//! Registry: all snapshots of the agent.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use uuid::Uuid;

use super::document::Document;
use super::events::{EventData, Events, Waited};
use super::files::{Devices, Files};
use super::gated::GateKeeper;
use super::held::{Held, HoldOptions, HoldPlace, Resumed, remove};
use super::mapped::{DmKeeper, MappedHeld};
use super::owner::{Command, Image, Info, Owner, Start, State, Take, TakeOptions};
use super::{FilterKind, Member, MemberId, SnapshotError, places};
use crate::engine::{CancelToken, Progress};
use crate::filter::dm;
use crate::filter::served::Served;
use crate::own::Helper;
use crate::storage::{DeviceExtent, Pool, StorageSpec};
use crate::tracker::Tracker;
use crate::units::SnapshotId;

/// A snapshot's owner, as others reach it.
#[derive(Clone, Debug)]
struct Handle {
    queue: Sender<Command>,
    events: Arc<Events>,
}

/// A snapshot that an agent before has left.
#[derive(Debug)]
pub struct Left {
    directory: PathBuf,
    document: Document,
}

impl Left {
    /// Names of the served devices that it needs.
    pub fn devices(&self) -> impl Iterator<Item = &str> {
        self.document.members.iter().map(|member| member.name.as_str())
    }
}

/// All snapshots. Calls block until they are done; only a take, and waiting for an event, are long.
#[derive(Debug)]
pub struct Snapshots {
    tracker: Arc<Tracker>,
    place: HoldPlace,
    devices: Option<Arc<dyn Devices>>,
    keeper: Option<GateKeeper>,
    dm: Option<Arc<DmKeeper>>,
    /// Ended with the agent before: nothing of their storage is of use any more.
    ended: Mutex<BTreeSet<SnapshotId>>,
    /// Held for look-ups only, never while waiting for an answer.
    owners: Mutex<BTreeMap<SnapshotId, Handle>>,
}

impl Snapshots {
    /// No snapshots, of the devices of `tracker`. Held ones are written down at `place`.
    #[must_use]
    pub fn new(tracker: Arc<Tracker>, place: HoldPlace) -> Self {
        Self {
            tracker,
            place,
            devices: None,
            keeper: None,
            dm: None,
            ended: Mutex::default(),
            owners: Mutex::default(),
        }
    }

    /// Files on these devices may be difference storage of their snapshots.
    #[must_use]
    pub fn with_devices(mut self, devices: Arc<dyn Devices>) -> Self {
        self.devices = Some(devices);
        self
    }

    /// Devices may have gates.
    #[must_use]
    pub fn with_gates(mut self, keeper: GateKeeper) -> Self {
        self.keeper = Some(keeper);
        self
    }

    /// Devices of device-mapper may be taken by it.
    #[must_use]
    pub fn with_dm(mut self, keeper: Arc<DmKeeper>) -> Self {
        self.dm = Some(keeper);
        self
    }

    /// Lets the files on snapshotted devices go whose snapshots are gone, or have ended. The devices answer by now; who waits for this is
    /// nobody.
    pub fn sweep_files(&self) {
        let (Some(devices), Some(root)) = (&self.devices, &self.place.directory) else {
            return;
        };
        let ended = std::mem::take(&mut *self.ended.lock().unwrap_or_else(PoisonError::into_inner));
        let owners = self.owners();
        let gone: Vec<SnapshotId> = places::own_notes(root)
            .into_iter()
            .filter(|id| ended.contains(id) || !owners.contains_key(id))
            .collect();
        drop(owners);
        if gone.is_empty() {
            return;
        }
        let (devices, root) = (Arc::clone(devices), root.clone());
        let swept = std::thread::Builder::new()
            .name("blksnap-sweep".to_owned())
            .spawn(move || {
                for id in gone {
                    let files = Files {
                        id,
                        root: root.clone(),
                        helper: Helper::default(),
                        devices: Arc::clone(&devices),
                    };
                    files.release(false);
                }
            });
        if let Err(error) = swept {
            tracing::error!(%error, "can't start the thread that removes files of snapshots that are gone");
        }
    }

    /// Creates a snapshot with the given devices; more can be added. `storage` is used in this order.
    ///
    /// # Errors
    /// A device is not tracked or given twice, devices are of two kinds, or storage can't be used. No snapshot is
    /// created then.
    pub fn create(
        &self,
        devices: Vec<Member>,
        storage: Vec<StorageSpec>,
        options: HoldOptions,
    ) -> Result<Info, SnapshotError> {
        let id = SnapshotId::new(Uuid::new_v4());
        let (owner, handle, commands) = self.owner(id, storage, options);
        let mut owner = owner;
        let added = devices.into_iter().try_fold((), |(), device| {
            self.check(&device)?;
            owner.add(device).map(|_| ())
        });
        self.start(owner, handle, commands)?;
        if let Err(error) = added {
            // It may have storage already.
            let _ = self.destroy(id);
            return Err(error);
        }
        self.info(id)
    }

    fn owner(
        &self,
        id: SnapshotId,
        storage: Vec<StorageSpec>,
        options: HoldOptions,
    ) -> (Owner, Handle, std::sync::mpsc::Receiver<Command>) {
        let (queue, commands) = channel();
        let events = Arc::new(Events::default());
        let owner = Owner::new(Start {
            id,
            storage,
            options,
            place: self.place.clone(),
            keeper: self.keeper.clone(),
            dm: self.dm.clone(),
            tracker: Arc::clone(&self.tracker),
            events: Arc::clone(&events),
            devices: self.devices.clone(),
            queue: queue.clone(),
        });
        (owner, Handle { queue, events }, commands)
    }

    fn start(
        &self,
        owner: Owner,
        handle: Handle,
        commands: std::sync::mpsc::Receiver<Command>,
    ) -> Result<(), SnapshotError> {
        let id = owner.info.id;
        std::thread::Builder::new()
            .name("blksnap-snapshot".to_owned())
            .spawn(move || owner.run(&commands))
            .map_err(|source| {
                tracing::error!(%source, "can't start the thread of a snapshot");
                SnapshotError::Defect(id)
            })?;
        self.owners().insert(id, handle);
        Ok(())
    }

    /// What agents before this one have left, oldest first. What can't be read is told in the log and left alone.
    #[must_use]
    pub fn left(&self) -> Vec<Left> {
        let Some(directory) = &self.place.directory else {
            return Vec::new();
        };
        let mut all: Vec<Left> = Vec::new();
        let mut readable = true;
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let directory = entry.path();
            if places::is_note(&directory) {
                continue;
            }
            match Document::read(&directory) {
                Ok(Some(document)) => all.push(Left { directory, document }),
                // A take that did not come to its end: nobody was told of it.
                Ok(None) => remove(&directory),
                Err(error) => {
                    // Nobody knows whose files are still of use.
                    readable = false;
                    tracing::error!(%error, "a snapshot of the agent before can't be read");
                }
            }
        }
        if readable {
            let written_down = all.iter().map(|left| left.document.id).collect();
            places::sweep(directory, &written_down);
        }
        all.sort_by_key(|left| (left.document.taken, left.document.id));
        all
    }

    /// Goes on with what an agent before has left. `served` finds a device by its name; nothing may have been written
    /// to it yet. A snapshot that can't go on is there, too, and says why.
    ///
    /// # Errors
    /// The snapshot's thread can't be started.
    pub fn resume(
        &self,
        left: Left,
        options: &HoldOptions,
        served: &dyn Fn(&str) -> Option<Arc<Served>>,
    ) -> Result<Info, SnapshotError> {
        let Left { directory, document } = left;
        let id = document.id;
        let (mut owner, handle, commands) = self.owner(id, document.storage.clone(), options.clone());
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        owner.info.created = at(document.created);
        owner.info.taken = Some(at(document.taken));
        if document.filter == FilterKind::Dm {
            return self.resume_mapped(owner, handle, commands, directory, &document);
        }
        if document.filter != FilterKind::Served {
            let how = if document.stopped { "was stopped" } else { "ended" };
            let why = format!(
                "its agent {how}, and with it the programs that held writes: a snapshot by the filter {} does not outlive its agent",
                document.filter.label()
            );
            self.ended
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(id);
            return self.resume_none(owner, handle, commands, &document, why);
        }
        let found: Vec<_> = document
            .members
            .iter()
            .map(|member| served(&member.name))
            .collect();
        owner.info.devices = found.iter().flatten().cloned().map(Member::Served).collect();
        let devices: Option<Vec<_>> = found.into_iter().collect();
        let resumed = match devices {
            None => Err("a device of it is not served any more".to_owned()),
            Some(devices) => Held::resume(&directory, document, &devices, &self.place, options, &owner)
                .map_err(|error| error.to_string()),
        };
        match resumed {
            Ok(Resumed { held, images, files }) => {
                owner.info.state = State::Taken;
                owner.info.images = images.into_iter().map(Arc::new).collect();
                owner.options = held.options(&owner.options);
                owner.pool = Some(Arc::clone(held.pool()));
                owner.held = Some(held);
                owner.files_in_use = files;
            }
            Err(why) => {
                owner.info.state = State::Lost;
                for member in &owner.info.devices {
                    owner.events.send(EventData::Corrupted {
                        device: member.shown(),
                        major: 0,
                        minor: 0,
                        errno: nix::errno::Errno::EIO as i32,
                        reason: why.clone(),
                    });
                }
                owner.info.lost = Some(why);
            }
        }
        self.start(owner, handle, commands)?;
        self.info(id)
    }

    /// A snapshot that the kernel has kept goes on, or says why it can't.
    fn resume_mapped(
        &self,
        mut owner: Owner,
        handle: Handle,
        commands: std::sync::mpsc::Receiver<Command>,
        directory: PathBuf,
        document: &Document,
    ) -> Result<Info, SnapshotError> {
        let resumed = match &self.dm {
            None => Err("this agent does not ask device-mapper".to_owned()),
            Some(keeper) => MappedHeld::resume(
                keeper,
                directory,
                document,
                &self.tracker,
                &owner.options,
                &owner.events,
            ),
        };
        match resumed {
            Ok((held, images)) => {
                owner.info.state = State::Taken;
                owner.info.devices = images.iter().map(|image| image.member.clone()).collect();
                owner.info.images = images.into_iter().map(Arc::new).collect();
                owner.mapped = Some(held);
                self.start(owner, handle, commands)?;
                self.info(document.id)
            }
            // An agent that was cut off meanwhile may have undone it already, and nothing else says what it was.
            Err(_) if document.boot != self.place.boot => {
                self.resume_none(owner, handle, commands, document, dm::ANOTHER_BOOT.to_owned())
            }
            Err(why) => self.resume_none(owner, handle, commands, document, why),
        }
    }

    /// A snapshot that has ended is there, and says so.
    fn resume_none(
        &self,
        mut owner: Owner,
        handle: Handle,
        commands: std::sync::mpsc::Receiver<Command>,
        document: &Document,
        why: String,
    ) -> Result<Info, SnapshotError> {
        let found = document.members.iter().filter_map(|member| {
            let device = crate::disk::BlockDevice::open(&member.path).ok()?;
            Some(match document.filter {
                FilterKind::Gate => Member::Gated(device),
                FilterKind::Dm => Member::Mapped(device),
                FilterKind::Converge | FilterKind::Served => Member::Tracked(device),
            })
        });
        owner.info.devices = found.collect();
        owner.info.state = State::Lost;
        for member in &document.members {
            owner.events.send(EventData::Corrupted {
                device: member.path.display().to_string(),
                major: 0,
                minor: 0,
                errno: nix::errno::Errno::EIO as i32,
                reason: why.clone(),
            });
        }
        owner.info.lost = Some(why);
        self.start(owner, handle, commands)?;
        self.info(document.id)
    }

    /// Adds a device to a snapshot that is not taken yet.
    ///
    /// # Errors
    /// No such snapshot, taken already, or the device is not tracked or in it, or of another kind.
    pub fn add(&self, id: SnapshotId, device: Member) -> Result<Info, SnapshotError> {
        let queue = self.queue(id)?;
        self.check(&device)?;
        ask(id, &queue, |reply| Command::Add(device, reply))?
    }

    /// Adds difference storage, also while the snapshot is held.
    ///
    /// # Errors
    /// No such snapshot, the storage can't be used, or the snapshot's devices are copied.
    pub fn append(&self, id: SnapshotId, storage: StorageSpec) -> Result<Info, SnapshotError> {
        ask(id, &self.queue(id)?, |reply| Command::Append(storage, reply))?
    }

    /// Takes a snapshot: all its devices at one instant. If it fails, it can be tried again.
    ///
    /// # Errors
    /// No such snapshot, taken already, no device, or the copy fails. Nothing is left of it then.
    pub fn take(
        &self,
        id: SnapshotId,
        options: TakeOptions,
        progress: Arc<dyn Progress>,
        cancel: CancelToken,
    ) -> Result<Info, SnapshotError> {
        ask(id, &self.queue(id)?, |reply| {
            Command::Take(Take {
                options,
                progress,
                cancel,
                reply,
            })
        })?
    }

    /// One snapshot.
    ///
    /// # Errors
    /// No such snapshot.
    pub fn info(&self, id: SnapshotId) -> Result<Info, SnapshotError> {
        ask(id, &self.queue(id)?, Command::Info)
    }

    /// Where the difference storage of a snapshot is now, in sectors of block devices. Empty if its devices are copied.
    ///
    /// # Errors
    /// No such snapshot, or the storage is in no block device, or nobody can tell where.
    pub fn storage_extents(&self, id: SnapshotId) -> Result<Vec<DeviceExtent>, SnapshotError> {
        let pool: Option<Arc<Pool>> = ask(id, &self.queue(id)?, Command::Pool)?;
        match pool {
            Some(pool) => Ok(pool.extents()?),
            None => Ok(Vec::new()),
        }
    }

    /// Takes the oldest event of a snapshot, or waits for one, as long as `interrupted` says no.
    ///
    /// # Errors
    /// No such snapshot.
    pub fn wait_event(
        &self,
        id: SnapshotId,
        timeout: Duration,
        interrupted: &dyn Fn() -> bool,
    ) -> Result<Waited, SnapshotError> {
        let handle = self.owners().get(&id).cloned();
        Ok(handle
            .ok_or(SnapshotError::Unknown(id))?
            .events
            .wait(timeout, interrupted))
    }

    /// Events of a snapshot: those that nobody has taken, and those sent so far, by code.
    #[must_use]
    pub fn events(&self, id: SnapshotId) -> Option<(usize, [u64; 2])> {
        let handle = self.owners().get(&id).cloned()?;
        Some((handle.events.pending(), handle.events.sent()))
    }

    /// The image of a device in a snapshot.
    ///
    /// # Errors
    /// No such snapshot, not taken, or the device is not in it.
    pub fn image(&self, id: SnapshotId, device: &MemberId) -> Result<Arc<Image>, SnapshotError> {
        let info = self.info(id)?;
        if info.images.is_empty() {
            return Err(SnapshotError::NotTaken(id));
        }
        let mut images = info.images.into_iter();
        images
            .find(|image| image.member.id() == *device)
            .ok_or(SnapshotError::NotInSnapshot(id))
    }

    /// All snapshots, in the order of their creation.
    #[must_use]
    pub fn list(&self) -> Vec<Info> {
        let ids: Vec<SnapshotId> = self.owners().keys().copied().collect();
        // One that is destroyed meanwhile is not in the list.
        let mut list: Vec<Info> = ids.into_iter().filter_map(|id| self.info(id).ok()).collect();
        list.sort_by_key(|info| info.created);
        list
    }

    /// Releases a snapshot; one that is being taken is cancelled. Its files are gone as soon as nobody reads them.
    ///
    /// # Errors
    /// No such snapshot.
    pub fn destroy(&self, id: SnapshotId) -> Result<(), SnapshotError> {
        self.end(id, Command::Destroy)
    }

    /// Releases all snapshots. Those that are held and written down are left for the next agent.
    pub fn leave_all(&self) {
        let ids: Vec<SnapshotId> = self.owners().keys().copied().collect();
        for id in ids {
            // Somebody else may have done it.
            let _ = self.end(id, Command::Leave);
        }
    }

    fn end(&self, id: SnapshotId, how: impl FnOnce(Sender<()>) -> Command) -> Result<(), SnapshotError> {
        let queue = self.queue(id)?;
        let done = ask(id, &queue, how);
        self.owners().remove(&id);
        done
    }

    /// Whether a device can be taken at all.
    fn check(&self, member: &Member) -> Result<(), SnapshotError> {
        match member {
            Member::Tracked(device) | Member::Gated(device) | Member::Mapped(device) => self
                .tracker
                .device(device.id)
                .map(|_| ())
                .ok_or(SnapshotError::NotTracked(device.id)),
            Member::Served(_) => Ok(()),
        }
    }

    fn queue(&self, id: SnapshotId) -> Result<Sender<Command>, SnapshotError> {
        let owners = self.owners();
        let handle = owners.get(&id).ok_or(SnapshotError::Unknown(id))?;
        Ok(handle.queue.clone())
    }

    fn owners(&self) -> MutexGuard<'_, BTreeMap<SnapshotId, Handle>> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Snapshots {
    fn drop(&mut self) {
        self.leave_all();
    }
}

/// Puts a question into an owner's queue and waits for the answer.
fn ask<T>(
    id: SnapshotId,
    queue: &Sender<Command>,
    question: impl FnOnce(Sender<T>) -> Command,
) -> Result<T, SnapshotError> {
    let (reply, answer) = channel();
    // An owner ends when its snapshot is destroyed.
    let gone = SnapshotError::Unknown(id);
    if queue.send(question(reply)).is_err() {
        return Err(gone);
    }
    answer.recv().map_err(|_| gone)
}

//! Registry: all snapshots of the agent.

use std::collections::BTreeMap;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use super::SnapshotError;
use super::owner::{Command, Image, Info, Owner, Take, TakeOptions};
use crate::disk::BlockDevice;
use crate::engine::{CancelToken, Progress};
use crate::storage::DirStorage;
use crate::tracker::Tracker;
use crate::units::{DeviceId, SnapshotId};

/// All snapshots. Calls block until they are done; only a take is long.
#[derive(Debug)]
pub struct Snapshots {
    tracker: Arc<Tracker>,
    /// The queues of the owners. Held for look-ups only, never while waiting for an answer.
    owners: Mutex<BTreeMap<SnapshotId, Sender<Command>>>,
}

impl Snapshots {
    /// No snapshots, of the devices of `tracker`.
    #[must_use]
    pub fn new(tracker: Arc<Tracker>) -> Self {
        Self {
            tracker,
            owners: Mutex::default(),
        }
    }

    /// Creates a snapshot with the given devices; more can be added.
    ///
    /// # Errors
    /// A device is not tracked or given twice. No snapshot is created then.
    pub fn create(&self, devices: &[DeviceId], storage: DirStorage) -> Result<Info, SnapshotError> {
        let id = SnapshotId::new(Uuid::new_v4());
        let mut list: Vec<BlockDevice> = Vec::new();
        for device in devices {
            let device = self.tracked(*device)?;
            if list.iter().any(|known| known.id == device.id) {
                return Err(SnapshotError::AlreadyAdded {
                    device: device.path.display().to_string(),
                    snapshot: id,
                });
            }
            list.push(device);
        }
        let (queue, commands) = channel();
        let owner = Owner::new(id, list, Arc::clone(&self.tracker), storage, queue.clone());
        let info = owner.info.clone();
        std::thread::Builder::new()
            .name("blksnap-snapshot".to_owned())
            .spawn(move || owner.run(&commands))
            .map_err(|source| {
                tracing::error!(%source, "can't start the thread of a snapshot");
                SnapshotError::Defect(id)
            })?;
        self.owners().insert(id, queue);
        Ok(info)
    }

    /// Adds a device to a snapshot that is not taken yet.
    ///
    /// # Errors
    /// No such snapshot, taken already, or the device is not tracked or in it.
    pub fn add(&self, id: SnapshotId, device: DeviceId) -> Result<Info, SnapshotError> {
        let queue = self.queue(id)?;
        let device = self.tracked(device)?;
        ask(id, &queue, |reply| Command::Add(device, reply))?
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

    /// The image of a device in a snapshot.
    ///
    /// # Errors
    /// No such snapshot, not taken, or the device is not in it.
    pub fn image(&self, id: SnapshotId, device: DeviceId) -> Result<Arc<Image>, SnapshotError> {
        let info = self.info(id)?;
        if info.images.is_empty() {
            return Err(SnapshotError::NotTaken(id));
        }
        let mut images = info.images.into_iter();
        images
            .find(|image| image.device.id == device)
            .ok_or(SnapshotError::NotTracked(device))
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
        let queue = self.queue(id)?;
        let done = ask(id, &queue, Command::Destroy);
        self.owners().remove(&id);
        done
    }

    /// Releases all snapshots.
    pub fn destroy_all(&self) {
        let ids: Vec<SnapshotId> = self.owners().keys().copied().collect();
        for id in ids {
            // Somebody else may have done it.
            let _ = self.destroy(id);
        }
    }

    fn tracked(&self, id: DeviceId) -> Result<BlockDevice, SnapshotError> {
        let device = self.tracker.device(id).ok_or(SnapshotError::NotTracked(id))?;
        Ok(device.device().clone())
    }

    fn queue(&self, id: SnapshotId) -> Result<Sender<Command>, SnapshotError> {
        self.owners().get(&id).cloned().ok_or(SnapshotError::Unknown(id))
    }

    fn owners(&self) -> MutexGuard<'_, BTreeMap<SnapshotId, Sender<Command>>> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Snapshots {
    fn drop(&mut self) {
        self.destroy_all();
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

//! Served devices: opened, exported, found again at the next start.
//!
//! Each has a directory of its own in the state directory, with what it takes to serve it again. A daemon that starts
//! opens them all, goes on with the snapshots that hold them, and only then offers them to clients.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::super::errors::Tell as _;
use super::Agent;
use super::devices::cbt_facts;
use crate::control::api;
use crate::control::client::encode;
use crate::control::error::{ApiError, Code};
use crate::cow::ChunkParams;
use crate::disk::{Disk as _, DiskError, FileDisk};
use crate::filter::served::{Place, Served, ServedOptions};
use crate::nbd::cow::ServedExport;
use crate::statefile::{self, Format};
use crate::ublk;
use crate::units::{BlockSize, Sectors};

const FORMAT: Format = Format {
    name: "blksnap-served-device",
    version: 1,
};

/// Longest wait for a daemon before this one, which was killed and is not wholly gone, to let a disk go.
const ENDING: Duration = Duration::from_secs(3);

/// The devices that are served, by name.
#[derive(Debug, Default)]
pub(super) struct ServedList(Mutex<BTreeMap<String, Arc<Served>>>);

impl ServedList {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Served>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// By name.
    pub(super) fn get(&self, name: &str) -> Option<Arc<Served>> {
        self.lock().get(name).cloned()
    }

    /// By the file or device, or by the name.
    pub(super) fn find(&self, path: &str) -> Option<Arc<Served>> {
        let resolved = fs::canonicalize(path).ok();
        let list = self.lock();
        list.values()
            .find(|served| Some(served.path()) == resolved.as_deref() || served.name() == path)
            .cloned()
    }

    pub(super) fn all(&self) -> Vec<Arc<Served>> {
        self.lock().values().cloned().collect()
    }
}

impl Agent {
    pub(super) fn list_served(&self) -> api::ServedDevices {
        api::ServedDevices {
            served: self
                .served
                .all()
                .iter()
                .map(|served| self.describe_served(served))
                .collect(),
        }
    }

    pub(super) fn serve_device(&self, request: &api::Serve) -> Result<api::ServedDevice, ApiError> {
        let action = format!("serve {}", request.path);
        let wrong =
            |why: &str, remedy: &str| ApiError::new(Code::InvalidRequest, format!("{action}: {why}"), remedy);
        let path = fs::canonicalize(&request.path).map_err(|error| {
            ApiError::new(
                Code::NoDevice,
                format!("{action}: {error}"),
                "give the path of a block device or an image file",
            )
        })?;
        let name = match &request.name {
            Some(name) => name.clone(),
            None => path
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default(),
        };
        if !is_name(&name) {
            return Err(wrong(
                "its name is not 1 to 64 of letters, digits, '.', '_' and '-'",
                "choose one with --name",
            ));
        }
        // One at a time: the name is free until the device is in the list.
        let mut list = self.served.lock();
        if let Some(known) = list.values().find(|served| served.path() == path) {
            return Err(ApiError::new(
                Code::Already,
                format!("{action}: it is served as {}", known.name()),
                "`blksnap-agent served` shows where",
            ));
        }
        if list.contains_key(&name) {
            return Err(ApiError::new(
                Code::Already,
                format!("{action}: another disk is served as {name}"),
                "choose another name with --name",
            ));
        }
        let resolved = api::Serve {
            path: path.display().to_string(),
            name: Some(name.clone()),
            ..request.clone()
        };
        if request.ublk {
            ublk::available().map_err(|error| error.tell(&action))?;
        }
        let served = self.open_served(&resolved, &name, &path, &action, Duration::ZERO)?;
        begin(&served, &action)?;
        let directory = self.served_directory(&name);
        if let Err(error) = statefile::write(&directory.join("device"), FORMAT, &resolved) {
            return Err(error.tell(&action));
        }
        self.exports
            .add(Arc::new(ServedExport::new(Arc::clone(&served))))
            .map_err(|error| ApiError::of(Code::Already, &action, &error))?;
        if request.ublk
            && let Err(error) = self.open_ublk(&served, &action)
        {
            self.exports.remove(&name);
            served.close();
            if let Err(error) = fs::remove_dir_all(&directory) {
                tracing::warn!(%error, directory = %directory.display(), "what was written down in vain stays");
            }
            return Err(error);
        }
        list.insert(name, Arc::clone(&served));
        drop(list);
        tracing::info!(device = %path.display(), name = served.name(), "served");
        Ok(self.describe_served(&served))
    }

    fn open_served(
        &self,
        request: &api::Serve,
        name: &str,
        path: &Path,
        action: &str,
        patience: Duration,
    ) -> Result<Arc<Served>, ApiError> {
        let disk = FileDisk::open(path, true).map_err(|error| error.tell(action))?;
        claim(&disk, patience).map_err(|error| error.tell(action))?;
        let size = disk.size();
        let invalid = |error: &dyn std::error::Error| {
            ApiError::new(
                Code::InvalidRequest,
                format!("{action}: {error}"),
                "give a power of two within the bounds",
            )
        };
        let tracking_block = match request.block_size {
            Some(bytes) => BlockSize::from_bytes(bytes).map_err(|error| invalid(&error))?,
            None => self.parameters.block_size(Sectors::new(size / 512)),
        };
        let chunks = match request.chunk_size {
            Some(bytes) if !bytes.is_power_of_two() => {
                return Err(ApiError::new(
                    Code::InvalidRequest,
                    format!("{action}: chunks of {bytes} bytes: not a power of two"),
                    "give 32K to 64M",
                ));
            }
            Some(bytes) => {
                ChunkParams::new(bytes.trailing_zeros(), 26, 40).map_err(|error| invalid(&error))?
            }
            None => self.chunks,
        };
        let options = ServedOptions {
            chunks,
            tracking_block,
            boot: self.boot.clone(),
            sysfs: self.sysfs.clone(),
        };
        let place = Place {
            path: path.to_owned(),
            state: Some(self.served_directory(name)),
        };
        Served::open(name, Arc::new(disk), place, &options)
            .map_err(|error| ApiError::of(Code::Io, action, &error))
    }

    pub(super) fn unserve_device(&self, name: &str) -> Result<(), ApiError> {
        let action = format!("stop serving {name}");
        let mut list = self.served.lock();
        let Some(served) = list.get(name).cloned() else {
            return self.forget_served(name, &action);
        };
        let counters = served.origin().counters();
        let held = counters.snapshots.max(counters.stored);
        if held > 0 {
            return Err(ApiError::new(
                Code::Busy,
                format!("{action}: {held} snapshots hold it"),
                "destroy them, `blksnap-agent snapshot list` shows them",
            ));
        }
        self.remove_ublk(name, &action)?;
        self.exports.remove(name);
        list.remove(name);
        drop(list);
        // Requests under way have it still.
        served.close();
        served
            .stop()
            .map_err(|error| ApiError::of(Code::Io, &action, &error))?;
        let directory = self.served_directory(name);
        fs::remove_dir_all(&directory).map_err(|error| ApiError::of(Code::Io, &action, &error))?;
        tracing::info!(name, "no longer served");
        Ok(())
    }

    /// Gives up a disk that could not be served again.
    fn forget_served(&self, name: &str, action: &str) -> Result<(), ApiError> {
        let directory = self.served_directory(name);
        if !is_name(name) || !directory.join("device").exists() {
            return Err(ApiError::new(
                Code::NotAttached,
                format!("{action}: there is no such device"),
                "`blksnap-agent served` lists them",
            ));
        }
        self.give_up_ublk(name, action)?;
        fs::remove_dir_all(&directory).map_err(|error| ApiError::of(Code::Io, action, &error))?;
        tracing::info!(name, "not to be served any more");
        Ok(())
    }

    /// Opens what an agent before has served, and goes on with its snapshots.
    pub(in crate::daemon) fn resume_served(&self) {
        let root = self.state.join("served");
        let mut opened = Vec::new();
        for entry in fs::read_dir(&root).into_iter().flatten().flatten() {
            let path = entry.path().join("device");
            let request = match statefile::read::<api::Serve>(&path, FORMAT) {
                Ok(Some(request)) => request,
                Ok(None) => continue,
                Err(error) => {
                    tracing::error!(%error, "a device that was served is not served any more");
                    continue;
                }
            };
            let name = entry.file_name().to_string_lossy().into_owned();
            let action = format!("serve {}", request.path);
            match self.open_served(&request, &name, Path::new(&request.path), &action, ENDING) {
                Ok(served) => {
                    self.served.lock().insert(name, Arc::clone(&served));
                    opened.push((served, request.ublk));
                }
                Err(error) => tracing::error!(%error, "a device that was served is not served any more"),
            }
        }
        let mut infos = Vec::new();
        for left in self.snapshots.left() {
            let resumed = self
                .snapshots
                .resume(left, &self.hold_options, &|name| self.served.get(name));
            match resumed {
                Ok(info) => {
                    match &info.lost {
                        None => tracing::info!(snapshot = %info.id, "the snapshot goes on"),
                        Some(why) => tracing::error!(snapshot = %info.id, why, "the snapshot is lost"),
                    }
                    infos.push(info);
                }
                Err(error) => tracing::error!(%error, "a snapshot can't go on"),
            }
        }
        let known: Vec<_> = infos.iter().map(|info| info.id).collect();
        self.dm.sweep(&known);
        // What was not resumed by now never will be: before the first write.
        opened.retain(|(served, _)| {
            let begun = begin(served, &format!("serve {}", served.path().display()));
            if let Err(error) = &begun {
                self.served.lock().remove(served.name());
                tracing::error!(%error, "a device that was served is not served any more");
            }
            begun.is_ok()
        });
        for info in infos {
            if let Err(error) = self.offer(&info) {
                tracing::error!(snapshot = %info.id, %error, "an image can't be exported");
            }
        }
        for (served, ublk) in opened {
            tracing::info!(device = %served.path().display(), name = served.name(), "served again");
            if let Err(error) = self.exports.add(Arc::new(ServedExport::new(Arc::clone(&served)))) {
                tracing::error!(%error, "a served device can't be exported");
            }
            let action = format!("serve {} as a block device", served.path().display());
            if ublk && let Err(error) = self.open_ublk(&served, &action) {
                tracing::error!(%error, "a block device that was served is not served any more");
            }
        }
        self.snapshots.sweep_files();
    }

    /// Waits for the last write to each, and refuses all others.
    pub(super) fn close_served(&self) {
        self.served.all().iter().for_each(|served| served.close());
    }

    /// Ends all, after the snapshots were left.
    pub(super) fn stop_served(&self) {
        for served in self.served.all() {
            if let Err(error) = served.stop() {
                tracing::warn!(%error, "the change map of a served device begins anew at the next start");
            }
        }
    }

    pub(super) fn served_directory(&self, name: &str) -> PathBuf {
        self.state.join("served").join(name)
    }

    fn describe_served(&self, served: &Served) -> api::ServedDevice {
        let counters = served.origin().counters();
        let times = served.origin().times();
        let layout = served.origin().layout();
        api::ServedDevice {
            name: served.name().to_owned(),
            path: served.path().display().to_string(),
            uri: format!(
                "nbd+unix:///{}?socket={}",
                encode(served.name()),
                encode(&self.nbd_socket.to_string_lossy())
            ),
            node: self.ublk.node(served.name()),
            size: served.size(),
            chunk_size: layout.chunk_bytes(),
            unit_size: layout.unit_bytes(),
            clients: self.exports.clients(served.name()) as u64,
            snapshots: counters.snapshots,
            held_writes: counters.held_writes,
            held_seconds: times.sum().as_secs_f64(),
            longest_hold_seconds: times.longest().as_secs_f64(),
            preserved_bytes: counters.preserved_bytes,
            jobs: counters.jobs,
            queued: counters.queued,
            cbt: cbt_facts(served.path(), &served.changes().info(), served.changes().active()),
            unproven: served.unproven().map(ToString::to_string),
        }
    }
}

/// Writes may come from here on.
fn begin(served: &Served, action: &str) -> Result<(), ApiError> {
    served
        .begin()
        .map_err(|error| ApiError::of(Code::Io, action, &error))
}

/// Whether a served device may be called so: it is the name of a directory, too.
fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    !name.is_empty() && name.len() <= 64 && !name.starts_with('.') && name.chars().all(plain)
}

/// Takes a disk for this process alone; tries again as long as patience lasts.
fn claim(disk: &FileDisk, patience: Duration) -> Result<(), DiskError> {
    let end = Instant::now() + patience;
    loop {
        match disk.claim() {
            Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(20)),
            claimed => return claimed,
        }
    }
}

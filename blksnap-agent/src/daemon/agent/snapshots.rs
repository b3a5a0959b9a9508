//! Snapshots: the registry's calls in the words of the control interface, and the images as exports.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::super::errors::Tell as _;
use super::{Agent, Ensured, Purpose};
use crate::control::api;
use crate::control::client::encode;
use crate::control::error::{ApiError, Code};
use crate::control::stream::{OnCancel, Reporter};
use crate::engine::{CancelToken, Phase, Progress};
use crate::filter::converge::{Consistency, Hook, Limits};
use crate::nbd::file::FileExport;
use crate::snapshot::{Image, Info, State, TakeOptions};
use crate::storage::{DirStorage, stored_bytes};
use crate::units::SnapshotId;

impl Agent {
    pub(super) fn list_snapshots(&self) -> Result<api::Snapshots, ApiError> {
        let snapshots = self
            .snapshots
            .list()
            .iter()
            .map(|info| self.describe(info))
            .collect();
        Ok(api::Snapshots { snapshots })
    }

    pub(super) fn show_snapshot(&self, id: SnapshotId) -> Result<api::Snapshot, ApiError> {
        let info = self
            .snapshots
            .info(id)
            .map_err(|error| error.tell("show a snapshot"))?;
        Ok(self.describe(&info))
    }

    pub(super) fn create_snapshot(&self, request: &api::CreateSnapshot) -> Result<api::Snapshot, ApiError> {
        let (info, ensured) = self.create(request)?;
        ensured.into_iter().for_each(Ensured::keep);
        Ok(self.describe(&info))
    }

    /// A new snapshot, and its devices, which are detached again unless they are kept.
    fn create(&self, request: &api::CreateSnapshot) -> Result<(Info, Vec<Ensured<'_>>), ApiError> {
        let storage = self.storage(request.storage.as_deref())?;
        let ensured = request
            .devices
            .iter()
            .map(|path| self.ensure_tracked(path, Purpose::Take, "snapshot"))
            .collect::<Result<Vec<_>, _>>()?;
        let ids: Vec<_> = ensured.iter().map(|ensured| ensured.device.device().id).collect();
        let info = self
            .snapshots
            .create(&ids, storage)
            .map_err(|error| error.tell("create a snapshot"))?;
        tracing::info!(snapshot = %info.id, devices = ids.len(), storage = %info.storage.display(), "snapshot created");
        Ok((info, ensured))
    }

    fn storage(&self, directory: Option<&str>) -> Result<DirStorage, ApiError> {
        let path = directory.map_or(&*self.storage, Path::new);
        if !path.is_absolute() {
            return Err(ApiError::new(
                Code::InvalidRequest,
                format!("store in {}: not an absolute path", path.display()),
                "give the whole path of a directory",
            ));
        }
        DirStorage::open(path).map_err(|error| error.tell("create a snapshot"))
    }

    pub(super) fn add_to_snapshot(
        &self,
        id: SnapshotId,
        request: &api::DeviceName,
    ) -> Result<api::Snapshot, ApiError> {
        let action = format!("add {}", request.device);
        // Nothing is attached for a snapshot that is not there.
        self.snapshots.info(id).map_err(|error| error.tell(&action))?;
        let ensured = self.ensure_tracked(&request.device, Purpose::Take, "add")?;
        let info = self
            .snapshots
            .add(id, ensured.device.device().id)
            .map_err(|error| error.tell(&action))?;
        ensured.keep();
        Ok(self.describe(&info))
    }

    pub(super) fn take_snapshot(
        &self,
        id: SnapshotId,
        limits: &api::Limits,
        reporter: &Reporter,
    ) -> Result<api::Snapshot, ApiError> {
        let action = format!("take {id}");
        let options = take_options(limits, &action)?;
        let info = self.snapshots.info(id).map_err(|error| error.tell(&action))?;
        let devices: Vec<_> = info.devices.iter().collect();
        let _claim = self.claim(&devices, Purpose::Take, "take a snapshot of")?;
        self.take(id, options, &action, reporter)
    }

    pub(super) fn create_and_take_snapshot(
        &self,
        request: &api::TakeSnapshot,
        reporter: &Reporter,
    ) -> Result<api::Snapshot, ApiError> {
        let devices = request.create.devices.join(", ");
        let action = format!("snapshot {devices}");
        let options = take_options(&request.limits, &action)?;
        let (info, ensured) = self.create(&request.create)?;
        let taken = self.take(info.id, options, &action, reporter);
        match taken {
            Ok(snapshot) => {
                ensured.into_iter().for_each(Ensured::keep);
                Ok(snapshot)
            }
            Err(error) => {
                // Somebody else may have destroyed it, which is why it was not taken.
                let _ = self.snapshots.destroy(info.id);
                Err(error)
            }
        }
    }

    fn take(
        &self,
        id: SnapshotId,
        options: TakeOptions,
        action: &str,
        reporter: &Reporter,
    ) -> Result<api::Snapshot, ApiError> {
        let (progress, cancel, _guard) = listen(reporter);
        let info = self
            .snapshots
            .take(id, options, progress, cancel)
            .map_err(|error| {
                self.takes.failed();
                tracing::warn!(snapshot = %id, %error, "the take failed");
                error.tell(action)
            })?;
        let copied = info.images.iter().map(|image| image.copied_bytes).sum();
        let frozen = info
            .images
            .iter()
            .map(|image| image.frozen)
            .max()
            .unwrap_or_default();
        self.takes.succeeded(frozen.as_secs_f64(), copied);
        tracing::info!(snapshot = %id, copied, ?frozen, "snapshot taken");
        for image in &info.images {
            self.exports
                .add(Arc::new(export(id, image)))
                .map_err(|error| ApiError::of(Code::Io, action, &error))?;
        }
        // One that was destroyed meanwhile must not be offered.
        self.snapshots.info(id).map_err(|error| {
            self.remove_exports(id);
            error.tell(action)
        })?;
        Ok(self.describe(&info))
    }

    pub(super) fn destroy_snapshot(&self, id: SnapshotId) -> Result<(), ApiError> {
        let destroyed = self.snapshots.destroy(id);
        self.remove_exports(id);
        destroyed.map_err(|error| error.tell("destroy a snapshot"))?;
        tracing::info!(snapshot = %id, "snapshot destroyed");
        Ok(())
    }

    fn remove_exports(&self, id: SnapshotId) {
        let prefix = format!("{id}/");
        for name in self.exports.names() {
            if name.starts_with(&prefix) {
                self.exports.remove(&name);
            }
        }
    }

    /// Releases everything, at the end of the daemon.
    pub(in crate::daemon) fn end(&self) {
        for name in self.exports.names() {
            self.exports.remove(&name);
        }
        self.snapshots.destroy_all();
    }

    fn describe(&self, info: &Info) -> api::Snapshot {
        let devices: Vec<_> = info
            .devices
            .iter()
            .map(|device| api::SnapshotDevice {
                device: device.path.display().to_string(),
                name: device.name.clone(),
                id: device.id,
                capacity: device.capacity.bytes(),
                image: info
                    .images
                    .iter()
                    .find(|image| image.device.id == device.id)
                    .map(|image| self.describe_image(info.id, image)),
            })
            .collect();
        api::Snapshot {
            id: info.id,
            state: match info.state {
                State::Created => api::SnapshotState::Created,
                State::Taking => api::SnapshotState::Taking,
                State::Taken => api::SnapshotState::Taken,
            },
            created: seconds(info.created),
            taken: info.taken.map(seconds),
            storage: info.storage.display().to_string(),
            storage_bytes: devices
                .iter()
                .filter_map(|device| Some(device.image.as_ref()?.stored_bytes))
                .sum(),
            devices,
        }
    }

    fn describe_image(&self, id: SnapshotId, image: &Image) -> api::Image {
        let export = export_name(id, image);
        api::Image {
            uri: format!(
                "nbd+unix:///{}?socket={}",
                encode(&export),
                encode(&self.nbd_socket.to_string_lossy())
            ),
            export,
            size: image.size,
            // A file whose size can't be asked for is shown as empty rather than not at all.
            stored_bytes: stored_bytes(&image.file).unwrap_or_default(),
            taken: api::Base {
                generation: image.taken.generation,
                number: image.taken.number,
            },
            consistency: consistency(image.consistency),
            frozen_seconds: image.frozen.as_secs_f64(),
            error_code: 0,
        }
    }
}

fn export_name(id: SnapshotId, image: &Image) -> String {
    format!("{id}/{}", image.device.name)
}

fn export(id: SnapshotId, image: &Image) -> FileExport {
    let export = FileExport::new(export_name(id, image), Arc::clone(&image.file), image.size)
        .with_description(format!("{} as of snapshot {id}", image.device.path.display()));
    match &image.read_map {
        Some(map) => export.with_changes(Arc::clone(map)),
        None => export,
    }
}

pub(super) const fn consistency(of: Consistency) -> api::Consistency {
    match of {
        Consistency::FileSystem => api::Consistency::FileSystem,
        Consistency::Crash => api::Consistency::Crash,
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// Bounds and hook of a request, where they can be used.
pub(super) fn take_options(request: &api::Limits, action: &str) -> Result<TakeOptions, ApiError> {
    let default = Limits::default();
    let limits = Limits {
        max_rounds: request.max_rounds.unwrap_or(default.max_rounds),
        max_time: request.max_seconds.map_or(default.max_time, Duration::from_secs),
        freeze_limit: request
            .freeze_limit_ms
            .map_or(default.freeze_limit, Duration::from_millis),
        watchdog: default.watchdog,
    };
    let hook = request
        .freeze_hook
        .as_ref()
        .map(|program| freeze_hook(program, action))
        .transpose()?;
    Ok(TakeOptions {
        limits,
        hook: hook.map(|hook| Arc::new(hook) as _),
    })
}

/// A hook that can't be run is told before everything was copied for nothing.
fn freeze_hook(program: &str, action: &str) -> Result<Hook, ApiError> {
    let wrong = |why: &str| {
        ApiError::new(
            Code::Hook,
            format!("{action}: run the freeze hook {program}: {why}"),
            "give the absolute path of an executable file",
        )
    };
    let path = PathBuf::from(program);
    if !path.is_absolute() {
        return Err(wrong("not an absolute path"));
    }
    let metadata = std::fs::metadata(&path).map_err(|error| wrong(&error.to_string()))?;
    if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 {
        return Err(wrong("not an executable file"));
    }
    Ok(Hook { program: path })
}

/// Hands the progress of a copy on to the client.
struct Forward(Reporter);

impl Progress for Forward {
    fn update(&self, phase: Phase, done: u64, total: u64) {
        let phase = match phase {
            Phase::Preparing => "waiting for earlier writes",
            Phase::Copying => "copying",
            Phase::CatchingUp => "copying what was written meanwhile",
            Phase::Frozen => "frozen, copying the rest",
            Phase::Done => "done",
        };
        self.0.progress(phase, done, total);
    }
}

/// A client as a copy knows it: who listens, who may cancel, and what connects the two while it lives.
pub(super) fn listen(reporter: &Reporter) -> (Arc<dyn Progress>, CancelToken, OnCancel) {
    let cancel = CancelToken::new();
    let guard = reporter.on_cancel({
        let cancel = cancel.clone();
        move || cancel.cancel()
    });
    (Arc::new(Forward(reporter.clone())), cancel, guard)
}

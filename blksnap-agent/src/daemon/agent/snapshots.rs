//! Snapshots: the registry's calls in the words of the control interface, and the images as exports.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::super::errors::Tell as _;
use super::filters::Chosen;
use super::{Agent, Ensured, Purpose};
use crate::control::api;
use crate::control::client::encode;
use crate::control::error::{ApiError, Code};
use crate::control::stream::{OnCancel, Reporter};
use crate::engine::cow::Promise;
use crate::engine::{CancelToken, Phase, Progress};
use crate::filter::converge::{Consistency, Hook, Limits};
use crate::nbd::cow::HeldExport;
use crate::nbd::export::Export;
use crate::nbd::file::FileExport;
use crate::nbd::mapped::MappedExport;
use crate::nbd::registry::RegistryError;
use crate::own::{Helper, Looked, On};
use crate::snapshot::{
    Content, Event, EventData, FilterKind, FilterWish, HoldOptions, Image, Info, Member, SnapshotError,
    State, TakeOptions, Waited,
};
use crate::storage::{DirStorage, Own, SpecError, StorageSpec, stored_bytes};
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
        let storage = self.storage(&request.storage)?;
        let action = "snapshot";
        let wish = request.filter.unwrap_or(self.hold_options.filter);
        let chosen = self.chosen(wish, &request.devices, action)?;
        if let (FilterKind::Gate, Some(promise)) = (chosen.kind, request.promise)
            && promise != Promise::Nothing
        {
            return Err(ApiError::new(
                Code::InvalidRequest,
                format!(
                    "{action}: writes that a gate holds are let go when the agent ends, so that it can't survive that"
                ),
                "leave the promise out, or choose another filter",
            ));
        }
        let options = HoldOptions {
            filter: wish,
            chosen: chosen.why,
            promise: request.promise.unwrap_or_default(),
            minimum: request.minimum.unwrap_or(self.hold_options.minimum),
            autogrow: !request.no_autogrow,
            ..self.hold_options.clone()
        };
        let mut ensured = Vec::new();
        let mut members = Vec::new();
        for path in &request.devices {
            let (member, guard) = self.member(path, chosen.kind, action)?;
            members.push(member);
            ensured.extend(guard);
        }
        let count = members.len();
        let info = self
            .snapshots
            .create(members, storage, options)
            .map_err(|error| error.tell("create a snapshot"))?;
        tracing::info!(snapshot = %info.id, devices = count, storage = %places(&info).join(" "), "snapshot created");
        Ok((info, ensured))
    }

    /// The filter of devices, those that are served apart.
    fn chosen(&self, wish: FilterWish, paths: &[String], action: &str) -> Result<Chosen, ApiError> {
        let others = paths.iter().filter(|path| self.served.find(path).is_none());
        let devices = others
            .map(|path| Self::open(path, action))
            .collect::<Result<Vec<_>, _>>()?;
        if devices.is_empty() {
            // Nothing to choose for, or not yet.
            return Ok(Chosen {
                kind: FilterKind::Converge,
                why: None,
            });
        }
        self.choose(wish, &devices, action)
    }

    /// A device of a snapshot: one that is served, or one that is tracked from now on.
    fn member(
        &self,
        path: &str,
        kind: FilterKind,
        action: &str,
    ) -> Result<(Member, Option<Ensured<'_>>), ApiError> {
        if let Some(served) = self.served.find(path) {
            return Ok((Member::Served(served), None));
        }
        let ensured = self.ensure_tracked(path, Purpose::Take, action)?;
        let device = ensured.device.device().clone();
        let member = match kind {
            FilterKind::Gate => Member::Gated(device),
            FilterKind::Dm => Member::Mapped(device),
            FilterKind::Converge | FilterKind::Served => Member::Tracked(device),
        };
        Ok((member, Some(ensured)))
    }

    fn storage(&self, given: &[String]) -> Result<Vec<StorageSpec>, ApiError> {
        if given.is_empty() {
            return Ok(vec![StorageSpec::Directory {
                path: self.storage.clone(),
                limit: None,
                keep: None,
            }]);
        }
        given
            .iter()
            .map(|text| {
                let spec = self.storage_spec(text)?;
                // One that can't be used is told before anything is done.
                if let StorageSpec::Directory { path, .. } = &spec {
                    DirStorage::open(path).map_err(|error| error.tell("create a snapshot"))?;
                }
                Ok(spec)
            })
            .collect()
    }

    /// What a text says of storage; where it is on a served device that is found out.
    fn storage_spec(&self, text: &str) -> Result<StorageSpec, ApiError> {
        let nodes = self.ublk.nodes();
        if nodes.is_empty() {
            return storage_spec(text);
        }
        let action = format!("store in {text}");
        // Not by this process: see [`crate::own`].
        let Looked { spec, on } = Helper::default()
            .look(text, &nodes)
            .map_err(|error| error.tell(&action))?;
        let refused = |why: String, remedy: &str| {
            ApiError::new(Code::InvalidRequest, format!("{action}: {why}"), remedy)
        };
        let (device, start) = match on {
            On::Elsewhere => return Ok(spec),
            On::Above { device, source } => {
                return Err(refused(
                    format!(
                        "it is on {source}, which stands on {device}, so that the agent would wait for itself"
                    ),
                    "give a place on another device, or one directly on the served device or a partition of it",
                ));
            }
            On::Served { device, start } => (device, start),
        };
        let (path, directory, limit) = match spec {
            StorageSpec::Directory { keep: Some(_), .. } => {
                return Err(refused(
                    format!("it is on {device}, where there are no names to keep files by"),
                    "leave `keep` out",
                ));
            }
            StorageSpec::Directory { path, limit, .. } => (path, true, limit),
            StorageSpec::File { path, limit } => (path, false, limit),
            other => return Ok(other),
        };
        Ok(StorageSpec::Own(Own {
            device,
            start,
            path,
            directory,
            limit,
            file: None,
        }))
    }

    pub(super) fn append_storage(
        &self,
        id: SnapshotId,
        request: &api::AppendStorage,
    ) -> Result<api::Snapshot, ApiError> {
        let spec = self.storage_spec(&request.storage)?;
        let info = self
            .snapshots
            .append(id, spec)
            .map_err(|error| error.tell(format_args!("add storage to {id}")))?;
        tracing::info!(snapshot = %id, storage = request.storage, "storage added");
        Ok(self.describe(&info))
    }

    pub(super) fn wait_for_event(
        &self,
        id: SnapshotId,
        request: &api::WaitEvent,
        reporter: &Reporter,
    ) -> Result<api::WaitedEvent, ApiError> {
        let action = format!("wait for an event of {id}");
        let (_, cancel, _guard) = listen(reporter);
        let timeout = Duration::from_millis(request.timeout_ms);
        let waited = self
            .snapshots
            .wait_event(id, timeout, &|| cancel.is_requested())
            .map_err(|error| error.tell(&action))?;
        match waited {
            Waited::Event(event) => Ok(described(event)),
            Waited::TimedOut => Ok(api::WaitedEvent::None),
            Waited::Interrupted => Err(ApiError::new(
                Code::Cancelled,
                format!("{action}: interrupted"),
                "wait again",
            )),
            Waited::Gone => Err(SnapshotError::Unknown(id).tell(&action)),
        }
    }

    pub(super) fn add_to_snapshot(
        &self,
        id: SnapshotId,
        request: &api::DeviceName,
    ) -> Result<api::Snapshot, ApiError> {
        let action = format!("add {}", request.device);
        // Nothing is attached for a snapshot that is not there.
        let info = self.snapshots.info(id).map_err(|error| error.tell(&action))?;
        let kind = match info.devices.first() {
            Some(first) => first.filter(),
            None => {
                self.chosen(info.wish, std::slice::from_ref(&request.device), "add")?
                    .kind
            }
        };
        let (member, ensured) = self.member(&request.device, kind, "add")?;
        let info = self
            .snapshots
            .add(id, member)
            .map_err(|error| error.tell(&action))?;
        ensured.into_iter().for_each(Ensured::keep);
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
        let devices: Vec<_> = info.devices.iter().filter_map(Member::tracked).collect();
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
        let suspended = info.images.iter().find_map(|image| suspended(image));
        self.takes.succeeded(frozen.as_secs_f64(), copied);
        self.takes.suspended(suspended.unwrap_or_default());
        tracing::info!(snapshot = %id, copied, ?frozen, ?suspended, "snapshot taken");
        self.offer(&info)
            .map_err(|error| ApiError::of(Code::Io, action, &error))?;
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

    /// Exports the images of a snapshot.
    pub(super) fn offer(&self, info: &Info) -> Result<(), RegistryError> {
        let mut images = info.images.iter();
        images.try_for_each(|image| self.exports.add(export(info.id, image)))
    }

    /// Offers nothing any more, at the end of the daemon.
    pub(in crate::daemon) fn withdraw(&self) {
        for name in self.exports.names() {
            self.exports.remove(&name);
        }
    }

    /// Releases everything, after the last request has ended. Held snapshots are left for the next daemon.
    pub(in crate::daemon) fn end(&self) {
        self.end_ublk();
        self.close_served();
        self.snapshots.leave_all();
        self.stop_served();
    }

    fn describe(&self, info: &Info) -> api::Snapshot {
        let devices: Vec<_> = info
            .devices
            .iter()
            .map(|device| api::SnapshotDevice {
                device: device.shown(),
                name: device.name().to_owned(),
                id: device.device_id(),
                capacity: device.size(),
                image: info
                    .images
                    .iter()
                    .find(|image| image.member.id() == device.id())
                    .map(|image| self.describe_image(info.id, image)),
            })
            .collect();
        let broken = devices
            .iter()
            .filter_map(|device| device.image.as_ref())
            .find(|image| image.error_code != 0);
        let reason = info.lost.clone().or_else(|| {
            let error = std::io::Error::from_raw_os_error(broken?.error_code);
            let told = info.images.iter().find_map(|image| match &image.content {
                Content::Held(held) => held.image().store().failure().map(str::to_owned),
                Content::Mapped(mapped) => {
                    let why = mapped.condition().why();
                    (!why.is_empty()).then(|| why.to_owned())
                }
                Content::Copy(_) => None,
            });
            let why = told.map(|why| format!("; {why}")).unwrap_or_default();
            Some(format!("old data could not be kept: {error}{why}"))
        });
        api::Snapshot {
            id: info.id,
            state: match info.state {
                State::Created => api::SnapshotState::Created,
                State::Taking => api::SnapshotState::Taking,
                State::Taken if broken.is_none() => api::SnapshotState::Taken,
                State::Taken | State::Lost => api::SnapshotState::Corrupted,
            },
            created: seconds(info.created),
            taken: info.taken.map(seconds),
            filter: info
                .devices
                .first()
                .map(|device| device.filter().label().to_owned()),
            filter_reason: info.chosen.clone(),
            storage: places(info),
            storage_bytes: match &info.usage {
                Some(usage) => usage.used,
                None => devices
                    .iter()
                    .filter_map(|device| Some(device.image.as_ref()?.stored_bytes))
                    .sum(),
            },
            usage: info.usage,
            events: self
                .snapshots
                .events(info.id)
                .map_or(0, |(pending, _)| pending as u64),
            reason,
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
            stored_bytes: match &image.content {
                // A file whose size can't be asked for is shown as empty rather than not at all.
                Content::Copy(file) => stored_bytes(file).unwrap_or_default(),
                Content::Held(held) => held.image().store().preserved(),
                Content::Mapped(mapped) => mapped.usage().map_or(0, |usage| usage.used),
            },
            taken: api::Base {
                generation: image.taken.generation,
                number: image.taken.number,
            },
            consistency: consistency(image.consistency),
            frozen_seconds: image.frozen.as_secs_f64(),
            suspended_seconds: suspended(image).map(|suspended| suspended.as_secs_f64()),
            error_code: match &image.content {
                Content::Copy(_) => 0,
                Content::Held(held) => held.image().state().ok().flatten().unwrap_or(0),
                Content::Mapped(mapped) => mapped.condition().errno().map_or(0, |errno| errno as i32),
            },
        }
    }
}

/// How long devices were suspended, where a take does that.
fn suspended(image: &Image) -> Option<Duration> {
    match &image.content {
        Content::Mapped(mapped) => mapped.suspended(),
        Content::Copy(_) | Content::Held(_) => None,
    }
}

fn export_name(id: SnapshotId, image: &Image) -> String {
    format!("{id}/{}", image.member.name())
}

fn export(id: SnapshotId, image: &Image) -> Arc<dyn Export> {
    let name = export_name(id, image);
    let description = format!("{} as of snapshot {id}", image.member.shown());
    match &image.content {
        Content::Copy(file) => {
            let export = FileExport::new(name, Arc::clone(file), image.size).with_description(description);
            Arc::new(match &image.read_map {
                Some(map) => export.with_changes(Arc::clone(map)),
                None => export,
            })
        }
        Content::Mapped(mapped) => {
            let export = MappedExport::new(name, description, mapped.clone());
            Arc::new(match &image.read_map {
                Some(map) => export.with_changes(Arc::clone(map)),
                None => export,
            })
        }
        Content::Held(held) => {
            let export = HeldExport::new(name, description, held.clone());
            Arc::new(match &image.read_map {
                Some(map) => export.with_changes(Arc::clone(map)),
                None => export,
            })
        }
    }
}

/// The difference storage of a snapshot as text.
fn places(info: &Info) -> Vec<String> {
    info.storage.iter().map(ToString::to_string).collect()
}

fn storage_spec(text: &str) -> Result<StorageSpec, ApiError> {
    text.parse().map_err(|error: SpecError| {
        ApiError::new(
            Code::InvalidRequest,
            format!("store in {text}: {error}"),
            "give the whole path of a directory, a file or a block device, or memory:SIZE",
        )
    })
}

fn described(event: Event) -> api::WaitedEvent {
    let since = event
        .time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let time_us = u64::try_from(since.as_micros()).unwrap_or(u64::MAX);
    let code = event.data.code();
    match event.data {
        EventData::LowFreeSpace { requested } => api::WaitedEvent::LowFreeSpace {
            time_us,
            code,
            requested_nr_sect: requested.count(),
        },
        EventData::Corrupted {
            device,
            major,
            minor,
            errno,
            reason,
        } => api::WaitedEvent::Corrupted {
            time_us,
            code,
            device,
            dev_id_mj: major,
            dev_id_mn: minor,
            err_code: errno,
            reason,
        },
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

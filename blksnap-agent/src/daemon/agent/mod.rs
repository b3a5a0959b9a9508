//! Agent: what the daemon does for its clients, on top of tracker, snapshots, backups and exports.
//!
//! Every call comes on a thread of its own and may block. Nothing long happens under a lock: a take or a backup
//! claims its devices instead, so that nobody detaches them, and everybody else is answered at once.

mod backups;
mod claims;
mod devices;
mod filters;
mod marks;
mod metrics;
mod nbd;
mod plan;
mod seals;
mod served;
mod snapshots;
mod ublk;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blksnap_common::track::ABI_VERSION;

use self::claims::{Claim, Claimed, Claims, Purpose};
use self::devices::cbt_facts;
use self::filters::GateCheck;
use self::metrics::Takes;
use self::nbd::NbdView;
use self::seals::Recorded;
use self::served::ServedList;
use self::ublk::UblkList;
use super::doctor;
use super::errors::Tell as _;
use super::lifecycle::Config;
use crate::cbt::{ChangedReport, TrackingParams};
use crate::control::api;
use crate::control::error::{ApiError, Code};
use crate::control::server::{MapPieces, Service};
use crate::control::stream::Reporter;
use crate::cow::ChunkParams;
use crate::disk::BlockDevice;
use crate::filter::dm::DmOptions;
use crate::filter::gate::{self, Gates, Switch};
use crate::nbd::registry::Exports;
use crate::nbd::server::Server;
use crate::seal::{Seals, shutdown};
use crate::snapshot::{DmKeeper, GateKeeper, HoldOptions, HoldPlace, Snapshots};
use crate::tracker::{Granularity, TrackedDevice, Tracker};
use crate::units::SnapshotId;

/// The facade behind the control interface.
pub struct Agent {
    tracker: Arc<Tracker>,
    recorded: Recorded,
    parameters: TrackingParams,
    /// Most memory that tracking one device may take, in bytes.
    memory_limit: u64,
    snapshots: Snapshots,
    hold_options: HoldOptions,
    chunks: ChunkParams,
    keeper: GateKeeper,
    dm: Arc<DmKeeper>,
    gate_check: GateCheck,
    served: Arc<ServedList>,
    ublk: Arc<UblkList>,
    storage: PathBuf,
    /// The state directory.
    state: PathBuf,
    /// The boot that this is; empty if the kernel does not say.
    boot: String,
    /// `/sys`, or what a test has in its place.
    sysfs: PathBuf,
    nbd_socket: PathBuf,
    exports: Arc<Exports>,
    nbd: NbdView,
    claims: Claims,
    takes: Takes,
}

impl Agent {
    /// An agent without devices and snapshots.
    pub(super) fn new(
        config: &Config,
        tracker: Arc<Tracker>,
        exports: Arc<Exports>,
        nbd: &Server,
        seals: Seals,
    ) -> Self {
        let boot = shutdown::boot(&config.seal.roots.boot).unwrap_or_default();
        let place = HoldPlace {
            directory: Some(config.seal.directory.join("snapshots")),
            boot: boot.clone(),
        };
        let served = Arc::<ServedList>::default();
        let ublk = Arc::<UblkList>::default();
        let devices = Arc::new(ublk::Devices {
            served: Arc::clone(&served),
            ublk: Arc::clone(&ublk),
        });
        let dm = DmOptions::new(config.seal.directory.join("dm"));
        let dm = Arc::new(DmKeeper::new(dm));
        // Whether this one may or not: the one before may have been killed.
        Switch::new(config.seal.directory.join("preempt"), boot.clone()).put_back();
        gate::remove_left_aliases();
        let keeper = GateKeeper {
            gates: Arc::new(Gates::new(config.gate.clone())),
            chunks: config.chunks,
        };
        Self {
            snapshots: Snapshots::new(Arc::clone(&tracker), place)
                .with_dm(Arc::clone(&dm))
                .with_devices(devices)
                .with_gates(keeper.clone()),
            keeper,
            dm,
            gate_check: GateCheck::default(),
            hold_options: config.holding.clone(),
            chunks: config.chunks,
            served,
            ublk,
            state: config.seal.directory.clone(),
            boot,
            sysfs: config.seal.roots.sysfs.clone(),
            tracker,
            recorded: Recorded::new(seals),
            parameters: config.parameters,
            memory_limit: config.memory_limit,
            storage: config.storage.clone(),
            nbd_socket: config.nbd_socket.clone(),
            exports,
            nbd: NbdView::of(nbd),
            claims: Claims::default(),
            takes: Takes::default(),
        }
    }

    /// The device at `path` as the kernel knows it now.
    fn open(path: &str, action: &str) -> Result<BlockDevice, ApiError> {
        if !path.starts_with('/') {
            return Err(ApiError::new(
                Code::InvalidRequest,
                format!("{action} {path}: not an absolute path"),
                "give a path such as /dev/sdb1",
            ));
        }
        BlockDevice::open(Path::new(path)).map_err(|error| error.tell(format_args!("{action} {path}")))
    }

    /// The tracked device at `path`.
    fn tracked(&self, path: &str, action: &str) -> Result<Arc<TrackedDevice>, ApiError> {
        let opened = Self::open(path, action);
        let known = opened
            .as_ref()
            .ok()
            .and_then(|device| self.tracker.device(device.id));
        // One that is gone is known by its path.
        let lost = || {
            self.tracker
                .devices()
                .into_iter()
                .find(|device| device.path() == Path::new(path) && device.check_doubt().is_some())
                .filter(|device| device.lost().is_some())
        };
        if let Some(device) = known.or_else(lost) {
            return Ok(device);
        }
        opened.and_then(|_| {
            Err(ApiError::new(
                Code::NotAttached,
                format!("{action} {path}: it is not tracked"),
                format!("attach it with `blksnap-agent attach {path}`"),
            ))
        })
    }

    /// The tracked device at `path`, claimed; it is attached where it was not.
    fn ensure_tracked(&self, path: &str, purpose: Purpose, action: &str) -> Result<Ensured<'_>, ApiError> {
        let device = Self::open(path, action)?;
        // From here on nobody detaches it.
        let claim = self.claim(&[&device], purpose, action)?;
        let id = device.id;
        let (device, attached_here) = if let Some(device) = self.tracker.device(id) {
            (device, false)
        } else {
            let granularity = Granularity::Adaptive(self.parameters);
            let action = format!("{action} {path}");
            self.check_memory(&device, granularity, &action)?;
            match self.track(device, granularity, &action) {
                Ok(device) => {
                    tracing::info!(device = %device.device().path.display(), "attached for {action}");
                    (device, true)
                }
                Err(error) => match self.tracker.device(id) {
                    // Somebody else was faster.
                    Some(device) if error.code() == Code::Already => (device, false),
                    _ => return Err(error),
                },
            }
        };
        Ok(Ensured {
            agent: self,
            claim: Some(claim),
            device,
            attached_here,
        })
    }

    fn claim(&self, devices: &[&BlockDevice], purpose: Purpose, action: &str) -> Result<Claim, ApiError> {
        let ids: Vec<_> = devices.iter().map(|device| device.id).collect();
        self.claims
            .claim(&ids, purpose)
            .map_err(|Claimed { device, purpose }| {
                let path = devices
                    .iter()
                    .find(|known| known.id == device)
                    .map_or_else(|| device.to_string(), |known| known.path.display().to_string());
                ApiError::new(
                    Code::Busy,
                    format!("{action} {path}: {purpose}"),
                    "wait for its end, or end the command that does it",
                )
            })
    }
}

/// A tracked device, claimed for a piece of work. If it was attached for that and the work fails, it is detached
/// again.
struct Ensured<'a> {
    agent: &'a Agent,
    claim: Option<Claim>,
    device: Arc<TrackedDevice>,
    attached_here: bool,
}

impl Ensured<'_> {
    /// The work was done: the device stays tracked.
    fn keep(mut self) {
        self.attached_here = false;
    }
}

impl Drop for Ensured<'_> {
    fn drop(&mut self) {
        self.claim = None;
        if !self.attached_here {
            return;
        }
        let id = self.device.device().id;
        // Somebody else may have found it attached meanwhile, and works on it.
        if let Ok(_claim) = self.agent.claims.claim(&[id], Purpose::Detach)
            && let Err(error) = self.agent.untrack(id, "detach")
        {
            tracing::warn!(%error, "a device that was attached in vain stays attached");
        }
    }
}

impl Service for Agent {
    fn version(&self) -> api::Version {
        api::Version {
            name: env!("CARGO_PKG_NAME").to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            api: api::API_VERSION,
            abi: ABI_VERSION,
            kernel: doctor::release(),
            pid: std::process::id(),
        }
    }

    fn devices(&self) -> Result<api::Devices, ApiError> {
        self.list_devices()
    }

    fn attach(&self, request: &api::Attach) -> Result<api::DeviceStatus, ApiError> {
        self.attach_device(request)
    }

    fn plan(&self, request: &api::Attach) -> Result<api::AttachPlan, ApiError> {
        self.plan_attach(request)
    }

    fn detach(&self, request: &api::DeviceName) -> Result<(), ApiError> {
        self.detach_device(request)
    }

    fn cbt_info(&self, request: &api::DeviceName) -> Result<api::CbtInfo, ApiError> {
        if let Some(served) = self.served.find(&request.device) {
            let changes = served.changes();
            return Ok(cbt_facts(served.path(), &changes.info(), changes.active()));
        }
        let device = self.tracked(&request.device, "show the change map of")?;
        Ok(Self::cbt_of(&device))
    }

    fn cbt_extents(&self, request: &api::ChangesQuery) -> Result<ChangedReport, ApiError> {
        self.changes(request)
    }

    fn cbt_map(&self, request: &api::MapQuery) -> Result<MapPieces, ApiError> {
        self.read_map(request)
    }

    fn cbt_heat(&self, request: &api::HeatQuery) -> Result<api::Heat, ApiError> {
        self.heat(request)
    }

    fn cbt_mark(&self, request: &api::Mark) -> Result<api::Marked, ApiError> {
        self.mark(request)
    }

    fn snapshots(&self) -> Result<api::Snapshots, ApiError> {
        self.list_snapshots()
    }

    fn snapshot(&self, id: SnapshotId) -> Result<api::Snapshot, ApiError> {
        self.show_snapshot(id)
    }

    fn snapshot_create(&self, request: &api::CreateSnapshot) -> Result<api::Snapshot, ApiError> {
        self.create_snapshot(request)
    }

    fn snapshot_add(&self, id: SnapshotId, request: &api::DeviceName) -> Result<api::Snapshot, ApiError> {
        self.add_to_snapshot(id, request)
    }

    fn snapshot_take(
        &self,
        id: SnapshotId,
        limits: &api::Limits,
        reporter: &Reporter,
    ) -> Result<api::Snapshot, ApiError> {
        self.take_snapshot(id, limits, reporter)
    }

    fn snapshot_create_and_take(
        &self,
        request: &api::TakeSnapshot,
        reporter: &Reporter,
    ) -> Result<api::Snapshot, ApiError> {
        self.create_and_take_snapshot(request, reporter)
    }

    fn snapshot_destroy(&self, id: SnapshotId) -> Result<(), ApiError> {
        self.destroy_snapshot(id)
    }

    fn snapshot_append(
        &self,
        id: SnapshotId,
        request: &api::AppendStorage,
    ) -> Result<api::Snapshot, ApiError> {
        self.append_storage(id, request)
    }

    fn snapshot_storage(&self, id: SnapshotId) -> Result<api::StorageExtents, ApiError> {
        let extents = self
            .snapshots
            .storage_extents(id)
            .map_err(|error| error.tell("show where the difference storage is"))?;
        Ok(api::StorageExtents { extents })
    }

    fn snapshot_wait(
        &self,
        id: SnapshotId,
        request: &api::WaitEvent,
        reporter: &Reporter,
    ) -> Result<api::WaitedEvent, ApiError> {
        self.wait_for_event(id, request, reporter)
    }

    fn served(&self) -> Result<api::ServedDevices, ApiError> {
        Ok(self.list_served())
    }

    fn serve(&self, request: &api::Serve) -> Result<api::ServedDevice, ApiError> {
        self.serve_device(request)
    }

    fn unserve(&self, name: &str) -> Result<(), ApiError> {
        self.unserve_device(name)
    }

    fn backup(&self, request: &api::Backup, reporter: &Reporter) -> Result<api::BackupResult, ApiError> {
        self.make_backup(request, reporter)
    }

    fn nbd(&self) -> Result<api::NbdStatus, ApiError> {
        Ok(self.nbd_status())
    }

    fn metrics(&self) -> Result<String, ApiError> {
        self.render_metrics()
    }
}

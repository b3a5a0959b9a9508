//! Devices: attach, detach, status, and the change maps.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use axum::body::Bytes;
use blksnap_common::track::OpKind;

use super::super::errors::Tell as _;
use super::{Agent, Purpose};
use crate::cbt::{Base, CbtInfo, CbtMap, ChangedReport, FullNeeded, FullReason, Heat, ReadMap, ResetReason};
use crate::control::api;
use crate::control::error::{ApiError, Code};
use crate::control::server::MapPieces;
use crate::tracker::TrackedDevice;

/// Buckets of a heat map when the request does not say.
const DEFAULT_BUCKETS: u64 = 1024;

impl Agent {
    pub(super) fn list_devices(&self) -> Result<api::Devices, ApiError> {
        let mut devices = self
            .tracker
            .devices()
            .iter()
            .map(|device| self.status_of(device))
            .collect::<Result<Vec<_>, _>>()?;
        devices.sort_by(|a, b| a.device.cmp(&b.device));
        Ok(api::Devices { devices })
    }

    pub(super) fn attach_device(&self, request: &api::Attach) -> Result<api::DeviceStatus, ApiError> {
        let path = &request.device;
        let action = format!("attach {path}");
        let device = Self::open(path, "attach")?;
        let granularity = self.granularity(request, &action)?;
        self.check_memory(&device, granularity, &action)?;
        let tracked = self.track(device, granularity, &action)?;
        tracing::info!(
            device = %tracked.device().path.display(),
            block_size = tracked.block_size().bytes(),
            "attached"
        );
        self.status_of(&tracked)
    }

    pub(super) fn detach_device(&self, request: &api::DeviceName) -> Result<(), ApiError> {
        let device = self.tracked(&request.device, "detach")?;
        let _claim = self.claim(&[device.device()], Purpose::Detach, "detach")?;
        self.untrack(device.device().id, &format!("detach {}", request.device))?;
        tracing::info!(device = %device.device().path.display(), "detached");
        Ok(())
    }

    fn status_of(&self, tracked: &Arc<TrackedDevice>) -> Result<api::DeviceStatus, ApiError> {
        let device = tracked.device();
        let path = device.path.display().to_string();
        let action = format!("show {path}");
        tracked.refresh();
        tracked.check_doubt();
        let lost = tracked.lost();
        let by_reason = |counts: &BTreeMap<ResetReason, u64>| -> BTreeMap<String, u64> {
            counts
                .iter()
                .map(|(reason, count)| (reason.code().to_owned(), *count))
                .collect()
        };
        let counters = tracked.counters().map_err(|error| error.tell(&action))?;
        let by_kind = |values: [u64; _]| -> BTreeMap<String, u64> {
            OpKind::ALL
                .iter()
                .map(|kind| kind.label().to_owned())
                .zip(values)
                .collect()
        };
        // A device that is gone has no mounts; those of another one with its number are not its own.
        let mounts = match lost {
            None => device.mounts().unwrap_or_default(),
            Some(_) => Vec::new(),
        };
        Ok(api::DeviceStatus {
            name: device.name.clone(),
            id: device.id,
            disk: device.disk_name.clone(),
            capacity: device.capacity.bytes(),
            mounts: mounts
                .into_iter()
                .map(|mount| api::Mount {
                    mountpoint: mount.mountpoint.display().to_string(),
                    fs_type: mount.fs_type,
                })
                .collect(),
            lost,
            memory: self.memory(tracked.block_size().blocks_in(device.capacity)),
            cbt: Self::cbt_of(tracked),
            counters: api::Counters {
                operations: by_kind(counters.ops),
                bytes: by_kind(counters.bytes),
                ring_records: counters.records,
                ring_full: counters.ring_full,
                run_misses: counters.run_misses,
                passthrough: counters.passthrough,
                doubts: by_reason(&counters.doubts),
                resets: by_reason(&counters.resets),
            },
            device: path,
        })
    }

    pub(super) fn cbt_of(tracked: &Arc<TrackedDevice>) -> api::CbtInfo {
        tracked.refresh();
        tracked.check_doubt();
        let (info, active) = tracked.with_map(|map| (map.info(), map.active()));
        cbt_facts(&tracked.device().path, &info, active)
    }

    pub(super) fn changes(&self, request: &api::ChangesQuery) -> Result<ChangedReport, ApiError> {
        let map = self.frozen(&request.device, "list the changes of")?;
        match (request.generation, request.number) {
            (Some(generation), Some(number)) => Ok(ChangedReport::since(map, &Base { generation, number })),
            (None, None) => Ok(ChangedReport::last(map)),
            _ => Err(ApiError::new(
                Code::InvalidRequest,
                format!("list the changes of {}: half a base", request.device),
                "give generation and number, or neither for what changed before the last take",
            )),
        }
    }

    pub(super) fn read_map(&self, request: &api::MapQuery) -> Result<MapPieces, ApiError> {
        let action = "read the change map of";
        let map = self.frozen(&request.device, action)?.map_err(|full| {
            let (code, remedy) = match full.reason {
                FullReason::NotTaken => (
                    Code::NoTake,
                    "take a snapshot or make a backup of it first: the map is of the last take",
                ),
                _ => (
                    Code::Corrupted,
                    "make a full backup: the next take begins a new map",
                ),
            };
            ApiError::new(code, format!("{action} {}: {full}", request.device), remedy)
        })?;
        let blocks = map.blocks().clone();
        let all = blocks.len() as u64;
        let end = match request.length {
            Some(length) => request.offset.checked_add(length),
            None => Some(all),
        };
        let range = end
            .filter(|end| *end <= all && request.offset <= *end)
            .and_then(|end| Some((usize::try_from(request.offset).ok()?, usize::try_from(end).ok()?)));
        let Some((start, end)) = range else {
            return Err(ApiError::new(
                Code::OutOfRange,
                format!(
                    "{action} {}: the range ends past its {all} blocks",
                    request.device
                ),
                "ask for a range within the map",
            ));
        };
        let mut at = start;
        Ok(Box::new(std::iter::from_fn(move || {
            let piece = blocks.slices(at, end).next().map(Bytes::copy_from_slice)?;
            at += piece.len();
            Some(piece)
        })))
    }

    pub(super) fn heat(&self, request: &api::HeatQuery) -> Result<api::Heat, ApiError> {
        let most = request.buckets.unwrap_or(DEFAULT_BUCKETS);
        if let Some(served) = self.served.find(&request.device) {
            let changes = served.changes();
            let heat = Heat::new(&changes.info(), changes.active(), &changes.map_blocks(), most);
            let device = served.path().display().to_string();
            return Ok(api::Heat { device, heat });
        }
        let device = self.tracked(&request.device, "draw the heat of")?;
        device.refresh();
        device.check_doubt();
        let (info, active, blocks) = device.with_map(|map| (map.info(), map.active(), map.blocks().clone()));
        let heat = Heat::new(&info, active, &blocks, most);
        Ok(api::Heat {
            device: device.device().path.display().to_string(),
            heat,
        })
    }

    /// The map of the last take of a served or tracked device.
    fn frozen(&self, path: &str, action: &str) -> Result<Result<Arc<ReadMap>, FullNeeded>, ApiError> {
        if let Some(served) = self.served.find(path) {
            return Ok(served.changes().frozen());
        }
        let device = self.tracked(path, action)?;
        device.check_doubt();
        Ok(device.with_map(CbtMap::frozen))
    }
}

/// The facts about a change map in the words of the control interface.
pub(super) fn cbt_facts(path: &Path, info: &CbtInfo, active: u8) -> api::CbtInfo {
    api::CbtInfo {
        device: path.display().to_string(),
        device_capacity: info.device_capacity,
        block_size: info.block_size,
        block_count: info.block_count,
        generation_id: info.generation,
        changes_number: info.changes_number,
        active_number: active,
        dirty_blocks: info.dirty_blocks,
        began: info.began,
        corrupted: info.corrupted,
    }
}

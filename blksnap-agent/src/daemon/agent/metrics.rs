//! Metrics: the sample that `/metrics` shows.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use blksnap_common::gate::broken;
use blksnap_common::track::OpKind;

use super::super::doctor;
use super::Agent;
use crate::cbt::{CbtMap, ResetReason};
use crate::control::api::{Snapshot, SnapshotState};
use crate::control::error::{ApiError, Code};
use crate::filter::gate::Gate;
use crate::filter::served::Served;
use crate::snapshot::EventData;
use crate::telemetry::metrics::{
    self, DeviceSample, GateSample, HeldSample, Sample, ServedSample, TakeSample,
};

/// Takes since the start.
#[derive(Debug, Default)]
pub(super) struct Takes(Mutex<TakeSample>);

impl Takes {
    /// A take that ended well.
    pub(super) fn succeeded(&self, frozen_seconds: f64, copied_bytes: u64) {
        let mut takes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        takes.succeeded += 1;
        takes.frozen_seconds += frozen_seconds;
        takes.copied_bytes += copied_bytes;
    }

    /// How long a take suspended devices of device-mapper.
    pub(super) fn suspended(&self, suspended: Duration) {
        let mut takes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        takes.suspended_seconds += suspended.as_secs_f64();
    }

    /// One that did not.
    pub(super) fn failed(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).failed += 1;
    }

    fn sample(&self) -> TakeSample {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Agent {
    pub(super) fn render_metrics(&self) -> Result<String, ApiError> {
        let devices = self
            .tracker
            .devices()
            .iter()
            .filter_map(|device| {
                // A device that is detached at this moment has no counters any more.
                let counters = device.counters().ok()?;
                let info = device.with_map(CbtMap::info);
                Some(DeviceSample {
                    device: device.device().name.clone(),
                    capacity: info.device_capacity,
                    block_size: info.block_size,
                    dirty_blocks: info.dirty_blocks,
                    changes_number: info.changes_number,
                    operations: OpKind::ALL
                        .iter()
                        .zip(counters.ops)
                        .zip(counters.bytes)
                        .map(|((kind, operations), bytes)| (kind.label(), operations, bytes))
                        .collect(),
                    lost: device.lost().is_some(),
                    passthrough: counters.passthrough,
                    doubts: ResetReason::ALL
                        .iter()
                        .map(|reason| {
                            (
                                reason.code(),
                                counters.doubts.get(reason).copied().unwrap_or_default(),
                            )
                        })
                        .collect(),
                    resets: ResetReason::ALL
                        .iter()
                        .map(|reason| {
                            (
                                reason.code(),
                                counters.resets.get(reason).copied().unwrap_or_default(),
                            )
                        })
                        .collect(),
                    ring_records: counters.records,
                    ring_full: counters.ring_full,
                    run_misses: counters.run_misses,
                })
            })
            .collect();
        let snapshots = self.list_snapshots()?.snapshots;
        let by_state = |state| {
            snapshots
                .iter()
                .filter(|snapshot| snapshot.state == state)
                .count() as u64
        };
        metrics::render(Sample {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: doctor::release(),
            devices,
            served: self.served_samples(),
            gates: self.gate_samples(),
            held: self.held_samples(&snapshots),
            snapshots: SnapshotState::ALL
                .iter()
                .map(|state| (state.label(), by_state(*state)))
                .collect(),
            storage_bytes: snapshots.iter().map(|snapshot| snapshot.storage_bytes).sum(),
            takes: self.takes.sample(),
            nbd: self.nbd_sample(),
        })
        .map_err(|error| ApiError::of(Code::Io, "show the metrics", &error))
    }

    fn served_samples(&self) -> Vec<ServedSample> {
        let sample = |served: &Arc<Served>| {
            let counters = served.origin().counters();
            let times = served.origin().times();
            ServedSample {
                device: served.name().to_owned(),
                held_writes: counters.held_writes,
                held: times.sum(),
                hold_times: times.cumulative().collect(),
                preserved_bytes: counters.preserved_bytes,
                queued: counters.queued,
            }
        };
        self.served.all().iter().map(sample).collect()
    }

    fn gate_samples(&self) -> Vec<GateSample> {
        let sample = |gate: &Arc<Gate>| {
            let state = gate.state();
            let last = state.hold_buckets.len() - 1;
            GateSample {
                device: gate.device().name.clone(),
                technique: gate.technique().name(),
                // One whose counters can't be read is shown as one that nothing passed.
                passed: gate.passed().unwrap_or_default(),
                held: state.held,
                hold_time: Duration::from_nanos(state.held_nanoseconds),
                hold_times: state
                    .hold_buckets
                    .iter()
                    .enumerate()
                    .map(|(bucket, count)| {
                        let bound = Duration::from_nanos(1 << (10 + bucket)).as_secs_f64();
                        (if bucket == last { f64::INFINITY } else { bound }, *count)
                    })
                    .collect(),
                bypassed: state.bypassed,
                copies: state.copies,
                preserved_bytes: gate.origin().counters().preserved_bytes,
                broken: broken::CODES
                    .iter()
                    .map(|(code, bit)| (*code, state.broken & bit != 0))
                    .collect(),
            }
        };
        self.keeper.gates.all().iter().map(sample).collect()
    }

    fn held_samples(&self, snapshots: &[Snapshot]) -> Vec<HeldSample> {
        let sample = |snapshot: &Snapshot| {
            let usage = snapshot.usage?;
            let sent = self
                .snapshots
                .events(snapshot.id)
                .map_or([0; 2], |(_, sent)| sent);
            Some(HeldSample {
                snapshot: snapshot.id.to_string(),
                used_bytes: usage.used,
                free_bytes: usage.bytes.saturating_sub(usage.used),
                events: EventData::LABELS.into_iter().zip(sent).collect(),
            })
        };
        snapshots.iter().filter_map(sample).collect()
    }
}

//! Held: metrics of devices that the agent serves, and of the snapshots that hold their writes.

use std::collections::HashMap;
use std::time::Duration;

use prometheus_client::encoding::NoLabelSet;
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::exemplar::Exemplar;
use prometheus_client::registry::Unit;

use super::{Encoded, Families};

/// A device that the agent serves.
#[derive(Clone, Debug, Default)]
pub struct ServedSample {
    /// Value of the label `device`: its name.
    pub device: String,
    /// Writes that had to wait for old data to be kept.
    pub held_writes: u64,
    /// Time for which they waited.
    pub held: Duration,
    /// Upper bounds of that time and how many were not longer, ascending. The last bound stands for none.
    pub hold_times: Vec<(Duration, u64)>,
    /// Bytes of old data that snapshots held now have of it.
    pub preserved_bytes: u64,
    /// Buffers in memory that wait to be stored.
    pub queued: u64,
}

/// A snapshot that holds served devices.
#[derive(Clone, Debug, Default)]
pub struct HeldSample {
    /// Value of the label `snapshot`: its id.
    pub snapshot: String,
    /// Bytes of its difference storage in use.
    pub used_bytes: u64,
    /// Bytes that may be used as it is now, before it grows.
    pub free_bytes: u64,
    /// Events sent, by code, each code present.
    pub events: Vec<(&'static str, u64)>,
}

pub(super) fn encode(served: &[ServedSample], held: &[HeldSample], out: &mut Families<'_>) -> Encoded {
    out.gauge(
        "served_devices",
        "Devices that are served.",
        None,
        served.len() as u64,
    )?;
    out.counters(
        "held_writes",
        "Writes that waited until old data was kept.",
        None,
        each_device(served, |device| device.held_writes),
    )?;
    out.family(
        "hold",
        "How long writes waited until old data was kept.",
        Some(Unit::Seconds),
        MetricType::Histogram,
        |mut encoder| {
            for device in served {
                let buckets = buckets(&device.hold_times);
                encoder
                    .encode_family(&[("device", device.device.as_str())])?
                    .encode_histogram(
                        device.held.as_secs_f64(),
                        buckets.iter().map(|(_, count)| count).sum(),
                        &buckets,
                        None::<&HashMap<usize, Exemplar<NoLabelSet, f64>>>,
                    )?;
            }
            Ok(())
        },
    )?;
    out.gauges(
        "preserved",
        "Old data that snapshots held now have of a device.",
        Some(Unit::Bytes),
        each_device(served, |device| device.preserved_bytes),
    )?;
    out.gauges(
        "store_queue_depth",
        "Buffers of old data in memory that wait to be stored.",
        None,
        each_device(served, |device| device.queued),
    )?;
    out.gauges(
        "storage_used",
        "Difference storage that a snapshot uses.",
        Some(Unit::Bytes),
        each_snapshot(held, |snapshot| snapshot.used_bytes),
    )?;
    out.gauges(
        "storage_free",
        "Difference storage that a snapshot may use before it has to grow.",
        Some(Unit::Bytes),
        each_snapshot(held, |snapshot| snapshot.free_bytes),
    )?;
    out.counters(
        "snapshot_events",
        "Events of a snapshot, by code.",
        None,
        held.iter().flat_map(|snapshot| {
            let labelled = |(code, count): &(&'static str, u64)| {
                (
                    [("snapshot", snapshot.snapshot.as_str()), ("code", *code)],
                    *count,
                )
            };
            snapshot.events.iter().map(labelled)
        }),
    )
}

/// Bounds in seconds, and how many are in each bucket alone.
fn buckets(cumulative: &[(Duration, u64)]) -> Vec<(f64, u64)> {
    let mut before = 0;
    let last = cumulative.len().saturating_sub(1);
    cumulative
        .iter()
        .enumerate()
        .map(|(n, (bound, count))| {
            let alone = count.saturating_sub(before);
            before = *count;
            let bound = if n == last {
                f64::INFINITY
            } else {
                bound.as_secs_f64()
            };
            (bound, alone)
        })
        .collect()
}

type Labelled<'s> = ([(&'static str, &'s str); 1], u64);

fn each_device(
    served: &[ServedSample],
    value: impl Fn(&ServedSample) -> u64,
) -> impl Iterator<Item = Labelled<'_>> {
    served
        .iter()
        .map(move |device| ([("device", device.device.as_str())], value(device)))
}

fn each_snapshot(
    held: &[HeldSample],
    value: impl Fn(&HeldSample) -> u64,
) -> impl Iterator<Item = Labelled<'_>> {
    held.iter()
        .map(move |snapshot| ([("snapshot", snapshot.snapshot.as_str())], value(snapshot)))
}

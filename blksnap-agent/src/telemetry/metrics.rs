//! Metrics: counters and gauges of the daemon as OpenMetrics text, named as node_exporter names its own.
//!
//! Every series of loss (`ring_full`, `run_misses`) and of doubt (`generation_resets` by reason) is there from the
//! attach on with the value 0, so that an alert can be written before anything has gone wrong.

mod gate;
mod held;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

pub use gate::GateSample;
pub use held::{HeldSample, ServedSample};

/// First word of every name.
const PREFIX: &str = "blksnap";

/// What is to be shown, as it is at one moment.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// Version of the program.
    pub version: String,
    /// Release of the running kernel.
    pub kernel: String,
    /// The tracked devices.
    pub devices: Vec<DeviceSample>,
    /// The devices that the agent serves.
    pub served: Vec<ServedSample>,
    /// The devices with a gate.
    pub gates: Vec<GateSample>,
    /// The snapshots that hold any of them.
    pub held: Vec<HeldSample>,
    /// Snapshots by state, each state present.
    pub snapshots: Vec<(&'static str, u64)>,
    /// Bytes that the difference storage occupies.
    pub storage_bytes: u64,
    /// Takes since the start, successful ones and others.
    pub takes: TakeSample,
    /// The NBD server.
    pub nbd: NbdSample,
}

/// A tracked device.
#[derive(Clone, Debug, Default)]
pub struct DeviceSample {
    /// Value of the label `device`: the kernel's name.
    pub device: String,
    /// Capacity in bytes.
    pub capacity: u64,
    /// Size of a tracking block in bytes.
    pub block_size: u64,
    /// Blocks written since the last take.
    pub dirty_blocks: u64,
    /// Number of the last take in its generation.
    pub changes_number: u8,
    /// Operations and bytes by kind, each kind present.
    pub operations: Vec<(&'static str, u64, u64)>,
    /// Whether another device, or none, is in its place.
    pub lost: bool,
    /// Passthrough commands that may have changed it.
    pub passthrough: u64,
    /// Doubts that came up by reason, each reason present.
    pub doubts: Vec<(&'static str, u64)>,
    /// Generations begun by reason, each reason present.
    pub resets: Vec<(&'static str, u64)>,
    /// Records that came by the ring.
    pub ring_records: u64,
    /// Records that found the ring full.
    pub ring_full: u64,
    /// Runs of the tracking programs that the kernel left out.
    pub run_misses: u64,
}

/// Takes since the start of the daemon, of snapshots and of backups.
#[derive(Clone, Copy, Debug, Default)]
pub struct TakeSample {
    /// Those that succeeded.
    pub succeeded: u64,
    /// Those that failed or were cancelled.
    pub failed: u64,
    /// Time for which file systems were frozen, in seconds.
    pub frozen_seconds: f64,
    /// Time for which devices of device-mapper were suspended, in seconds.
    pub suspended_seconds: f64,
    /// Bytes copied.
    pub copied_bytes: u64,
}

/// The NBD server since its start.
#[derive(Clone, Debug, Default)]
pub struct NbdSample {
    /// Connections now.
    pub connections: u64,
    /// Most connections.
    pub connections_limit: u64,
    /// Connections accepted.
    pub connections_accepted: u64,
    /// Connections closed at once, because there were too many.
    pub connections_refused: u64,
    /// Handshakes that failed.
    pub handshakes_failed: u64,
    /// Clients that TLS could not be started with.
    pub tls_failed: u64,
    /// Clients dropped in transmission.
    pub sessions_dropped: u64,
    /// Clients dropped by time-out, each time-out present.
    pub timeouts: Vec<(&'static str, u64)>,
    /// Requests of workers now.
    pub in_flight: u64,
    /// Bytes of requests and answers now.
    pub memory_bytes: u64,
    /// Most bytes of requests and answers.
    pub memory_limit_bytes: u64,
    /// Exports now.
    pub exports: u64,
    /// Requests by command, each command present.
    pub requests: Vec<(&'static str, u64)>,
    /// Bytes of images sent.
    pub read_bytes: u64,
    /// Bytes written to exports.
    pub written_bytes: u64,
    /// Requests answered with an error, by error, each error present.
    pub errors: Vec<(&'static str, u64)>,
}

/// The sample as OpenMetrics text.
///
/// # Errors
/// It can't be formatted.
pub fn render(sample: Sample) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register_collector(Box::new(sample));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry)?;
    Ok(text)
}

type Encoded = Result<(), std::fmt::Error>;

/// Writes one family after the other.
struct Families<'a>(DescriptorEncoder<'a>);

impl Families<'_> {
    fn family(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        kind: MetricType,
        write: impl FnOnce(MetricEncoder<'_>) -> Encoded,
    ) -> Encoded {
        write(self.0.encode_descriptor(name, help, unit.as_ref(), kind)?)
    }

    fn counters<'v, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        values: impl Iterator<Item = ([(&'static str, &'v str); N], u64)>,
    ) -> Encoded {
        self.family(name, help, unit, MetricType::Counter, |mut encoder| {
            for (labels, value) in values {
                ConstCounter::new(value).encode(encoder.encode_family(&labels)?)?;
            }
            Ok(())
        })
    }

    fn gauges<'v, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        values: impl Iterator<Item = ([(&'static str, &'v str); N], u64)>,
    ) -> Encoded {
        self.family(name, help, unit, MetricType::Gauge, |mut encoder| {
            for (labels, value) in values {
                ConstGauge::new(value).encode(encoder.encode_family(&labels)?)?;
            }
            Ok(())
        })
    }

    fn counter(&mut self, name: &str, help: &str, unit: Option<Unit>, value: u64) -> Encoded {
        self.family(name, help, unit, MetricType::Counter, |mut encoder| {
            encoder.encode_counter::<NoLabelSet, _, u64>(&value, None)
        })
    }

    fn gauge(&mut self, name: &str, help: &str, unit: Option<Unit>, value: u64) -> Encoded {
        self.family(name, help, unit, MetricType::Gauge, |mut encoder| {
            encoder.encode_gauge(&value)
        })
    }
}

impl Sample {
    fn each<'s>(
        &'s self,
        value: impl Fn(&DeviceSample) -> u64 + 's,
    ) -> impl Iterator<Item = ([(&'static str, &'s str); 1], u64)> + 's {
        self.devices
            .iter()
            .map(move |device| ([("device", device.device.as_str())], value(device)))
    }

    fn encode_devices(&self, out: &mut Families<'_>) -> Encoded {
        let by_kind = |value: fn(&(&'static str, u64, u64)) -> u64| {
            self.devices.iter().flat_map(move |device| {
                device.operations.iter().map(move |kind| {
                    (
                        [("device", device.device.as_str()), ("operation", kind.0)],
                        value(kind),
                    )
                })
            })
        };
        out.gauge("devices", "Tracked devices.", None, self.devices.len() as u64)?;
        out.counters(
            "device_operations",
            "Operations that change a device, by kind.",
            None,
            by_kind(|kind| kind.1),
        )?;
        out.counters(
            "device_written",
            "Bytes that operations change, by kind.",
            Some(Unit::Bytes),
            by_kind(|kind| kind.2),
        )?;
        out.gauges(
            "device_capacity",
            "Capacity.",
            Some(Unit::Bytes),
            self.each(|device| device.capacity),
        )?;
        out.gauges(
            "device_block_size",
            "Size of a tracking block.",
            Some(Unit::Bytes),
            self.each(|device| device.block_size),
        )?;
        out.gauges(
            "device_dirty_blocks",
            "Tracking blocks written since the last take.",
            None,
            self.each(|device| device.dirty_blocks),
        )?;
        out.gauges(
            "device_changes_number",
            "Number of the last take in its generation.",
            None,
            self.each(|device| device.changes_number.into()),
        )?;
        let by_reason = |counts: fn(&DeviceSample) -> &Vec<(&'static str, u64)>| {
            self.devices.iter().flat_map(move |device| {
                counts(device)
                    .iter()
                    .map(|(reason, count)| ([("device", device.device.as_str()), ("reason", reason)], *count))
            })
        };
        out.counters(
            "device_doubts",
            "Reasons to doubt that the change map is complete, as they came up: the next backup is a full one.",
            None,
            by_reason(|device| &device.doubts),
        )?;
        out.counters(
            "device_generation_resets",
            "Generations of the change map begun, by reason.",
            None,
            by_reason(|device| &device.resets),
        )?;
        out.gauges(
            "device_lost",
            "1 where another device, or none, is in the place of the one attached.",
            None,
            self.each(|device| u64::from(device.lost)),
        )?;
        out.counters(
            "device_passthrough_commands",
            "Commands past the block layer that may have changed the device.",
            None,
            self.each(|device| device.passthrough),
        )?;
        out.counters(
            "device_ring_records",
            "Records that came by the ring.",
            None,
            self.each(|device| device.ring_records),
        )?;
        out.counters(
            "device_ring_full",
            "Records that found the ring full; the bitmap had their blocks.",
            None,
            self.each(|device| device.ring_full),
        )?;
        out.counters(
            "device_run_misses",
            "Runs of the tracking programs that the kernel left out.",
            None,
            self.each(|device| device.run_misses),
        )
    }

    fn encode_snapshots(&self, out: &mut Families<'_>) -> Encoded {
        out.gauges(
            "snapshots",
            "Snapshots by state.",
            None,
            self.snapshots
                .iter()
                .map(|(state, count)| ([("state", *state)], *count)),
        )?;
        out.gauge(
            "difference_storage",
            "Space that the difference storage occupies.",
            Some(Unit::Bytes),
            self.storage_bytes,
        )?;
        out.counters(
            "takes",
            "Takes of snapshots and live backups, by result.",
            None,
            [
                ([("result", "failed")], self.takes.failed),
                ([("result", "succeeded")], self.takes.succeeded),
            ]
            .into_iter(),
        )?;
        out.family(
            "frozen",
            "Time for which file systems were frozen.",
            Some(Unit::Seconds),
            MetricType::Counter,
            |mut encoder| encoder.encode_counter::<NoLabelSet, _, u64>(&self.takes.frozen_seconds, None),
        )?;
        out.family(
            "suspended",
            "Time for which devices of device-mapper were suspended.",
            Some(Unit::Seconds),
            MetricType::Counter,
            |mut encoder| encoder.encode_counter::<NoLabelSet, _, u64>(&self.takes.suspended_seconds, None),
        )?;
        out.counter(
            "copied",
            "Bytes copied for takes.",
            Some(Unit::Bytes),
            self.takes.copied_bytes,
        )
    }

    fn encode_nbd(&self, out: &mut Families<'_>) -> Encoded {
        out.gauge(
            "nbd_connections",
            "Connections of NBD clients.",
            None,
            self.nbd.connections,
        )?;
        out.gauge(
            "nbd_connections_limit",
            "Most connections of NBD clients.",
            None,
            self.nbd.connections_limit,
        )?;
        out.counters(
            "nbd_clients",
            "Connections of NBD clients since the start, by what became of them.",
            None,
            [
                ([("outcome", "accepted")], self.nbd.connections_accepted),
                ([("outcome", "refused")], self.nbd.connections_refused),
                ([("outcome", "handshake_failed")], self.nbd.handshakes_failed),
                ([("outcome", "tls_failed")], self.nbd.tls_failed),
                ([("outcome", "dropped")], self.nbd.sessions_dropped),
            ]
            .into_iter(),
        )?;
        out.counters(
            "nbd_timeouts",
            "NBD clients dropped by a time-out, by time-out.",
            None,
            self.nbd
                .timeouts
                .iter()
                .map(|(timeout, count)| ([("timeout", *timeout)], *count)),
        )?;
        out.gauge(
            "nbd_in_flight",
            "Requests of NBD clients that wait for a disk.",
            None,
            self.nbd.in_flight,
        )?;
        out.gauge(
            "nbd_memory",
            "Memory of requests and answers of NBD clients.",
            Some(Unit::Bytes),
            self.nbd.memory_bytes,
        )?;
        out.gauge(
            "nbd_memory_limit",
            "Most memory of requests and answers of NBD clients.",
            Some(Unit::Bytes),
            self.nbd.memory_limit_bytes,
        )?;
        out.gauge(
            "nbd_exports",
            "Exports of the NBD server.",
            None,
            self.nbd.exports,
        )?;
        out.counters(
            "nbd_requests",
            "Requests of NBD clients, by command.",
            None,
            self.nbd
                .requests
                .iter()
                .map(|(command, count)| ([("command", *command)], *count)),
        )?;
        out.counter(
            "nbd_read",
            "Bytes of images sent to NBD clients.",
            Some(Unit::Bytes),
            self.nbd.read_bytes,
        )?;
        out.counter(
            "nbd_written",
            "Bytes that NBD clients wrote to exports.",
            Some(Unit::Bytes),
            self.nbd.written_bytes,
        )?;
        out.counters(
            "nbd_errors",
            "Requests of NBD clients answered with an error, by error.",
            None,
            self.nbd
                .errors
                .iter()
                .map(|(error, count)| ([("error", *error)], *count)),
        )
    }
}

impl Collector for Sample {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Encoded {
        let mut out = Families(encoder);
        out.family(
            "build",
            "Version of the agent and release of the kernel.",
            None,
            MetricType::Info,
            |encoder| {
                Info::new(vec![
                    ("version", self.version.clone()),
                    ("kernel", self.kernel.clone()),
                ])
                .encode(encoder)
            },
        )?;
        self.encode_devices(&mut out)?;
        self.encode_snapshots(&mut out)?;
        held::encode(&self.served, &self.held, &mut out)?;
        gate::encode(&self.gates, &mut out)?;
        self.encode_nbd(&mut out)
    }
}

#[cfg(test)]
mod tests;

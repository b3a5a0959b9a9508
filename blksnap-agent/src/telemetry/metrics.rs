//! Metrics: counters and gauges of the daemon as OpenMetrics text, named as node_exporter names its own.
//!
//! Every series of loss (`ring_full`, `run_misses`) and of doubt (`generation_resets` by reason) is there from the
//! attach on with the value 0, so that an alert can be written before anything has gone wrong.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

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
        self.encode_nbd(&mut out)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    /// Series of a text: (name, labels) to value.
    type Series = BTreeMap<(String, BTreeMap<String, String>), f64>;

    fn is_name(text: &str) -> bool {
        text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
    }

    /// Labels and the rest of the line behind `}`.
    fn labels(mut text: &str) -> (BTreeMap<String, String>, &str) {
        let mut labels = BTreeMap::new();
        loop {
            let (key, rest) = text.split_once("=\"").expect("a label has a value");
            assert!(is_name(key), "label {key:?}");
            let mut value = String::new();
            let mut chars = rest.char_indices();
            let end = loop {
                match chars.next().expect("a value ends") {
                    (at, '"') => break at,
                    (_, '\\') => value.push(match chars.next().expect("an escape ends").1 {
                        'n' => '\n',
                        c @ ('"' | '\\') => c,
                        c => panic!("escape of {c:?}"),
                    }),
                    (_, c) => value.push(c),
                }
            };
            assert!(
                labels.insert(key.to_owned(), value).is_none(),
                "label {key} twice"
            );
            text = &rest[end + 1..];
            if let Some(rest) = text.strip_prefix('}') {
                return (labels, rest);
            }
            text = text.strip_prefix(',').expect("labels are separated by commas");
        }
    }

    /// A parser that takes only what the OpenMetrics 1.0 text format allows of counters, gauges and infos.
    fn parse(text: &str) -> Series {
        let body = text.strip_suffix("# EOF\n").expect("the text ends with # EOF");
        let mut series = Series::new();
        let mut families = BTreeSet::new();
        let mut family: Option<(String, Option<String>)> = None;
        for line in body.lines() {
            assert!(!line.is_empty() && line == line.trim(), "{line:?}");
            if let Some(comment) = line.strip_prefix("# ") {
                let mut words = comment.splitn(3, ' ');
                let (what, name, rest) = (
                    words.next().unwrap(),
                    words.next().unwrap(),
                    words.next().expect("text"),
                );
                assert!(is_name(name), "{line:?}");
                match what {
                    "HELP" => {
                        assert!(families.insert(name.to_owned()), "family {name} twice");
                        family = Some((name.to_owned(), None));
                    }
                    "TYPE" => {
                        let (current, kind) = family.as_mut().expect("HELP comes first");
                        assert_eq!(current, name);
                        assert!(["counter", "gauge", "info"].contains(&rest));
                        assert!(kind.replace(rest.to_owned()).is_none());
                    }
                    "UNIT" => {
                        assert_eq!(family.as_ref().unwrap().0, name);
                        assert!(name.ends_with(&format!("_{rest}")), "{line:?}");
                    }
                    other => panic!("comment {other}"),
                }
                continue;
            }
            let (name, rest) = line.split_at(line.find(['{', ' ']).expect("a value"));
            let (labels, rest) = rest
                .strip_prefix('{')
                .map_or_else(|| (BTreeMap::new(), rest), labels);
            let value: f64 = rest.strip_prefix(' ').expect("one blank").parse().unwrap();
            assert!(is_name(name));
            let (current, kind) = family.as_ref().unwrap();
            let suffix = match kind.as_deref().expect("a type") {
                "counter" => "_total",
                "info" => "_info",
                _ => "",
            };
            assert_eq!(name, format!("{current}{suffix}"), "{line:?}");
            assert!(
                series.insert((name.to_owned(), labels), value).is_none(),
                "{line:?} twice"
            );
        }
        series
    }

    fn sample() -> Sample {
        let device = |name: &str| DeviceSample {
            device: name.to_owned(),
            capacity: 1 << 40,
            block_size: 1 << 20,
            dirty_blocks: 7,
            changes_number: 255,
            operations: vec![("write", 3, 12_288), ("discard", 0, 0)],
            lost: false,
            passthrough: 0,
            doubts: vec![("run_missed", 0)],
            resets: vec![("wrapped", 1), ("run_missed", 0)],
            ring_records: u64::MAX,
            ring_full: 0,
            run_misses: 0,
        };
        Sample {
            version: "0.1.0".to_owned(),
            kernel: "6.18.0".to_owned(),
            devices: vec![device("sda1"), device("a\"b\\c\nd")],
            snapshots: vec![("created", 0), ("taken", 2)],
            storage_bytes: 4096,
            takes: TakeSample {
                frozen_seconds: 0.25,
                ..TakeSample::default()
            },
            nbd: NbdSample {
                requests: vec![("read", 10), ("block_status", 0)],
                errors: vec![("eio", 0), ("eperm", 2)],
                ..NbdSample::default()
            },
        }
    }

    fn value(series: &Series, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let labels = labels
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        series.get(&(name.to_owned(), labels)).copied()
    }

    #[test]
    fn the_text_is_strict_openmetrics() {
        let series = parse(&render(sample()).unwrap());
        let get = |name: &str, labels: &[(&str, &str)]| value(&series, name, labels);
        assert_eq!(
            get(
                "blksnap_build_info",
                &[("version", "0.1.0"), ("kernel", "6.18.0")]
            ),
            Some(1.0)
        );
        let write = [("device", "sda1"), ("operation", "write")];
        assert_eq!(get("blksnap_device_written_bytes_total", &write), Some(12_288.0));
        assert_eq!(get("blksnap_device_operations_total", &write), Some(3.0));
        assert_eq!(
            get("blksnap_device_ring_full_total", &[("device", "a\"b\\c\nd")]),
            Some(0.0)
        );
        assert_eq!(
            get("blksnap_device_dirty_blocks", &[("device", "sda1")]),
            Some(7.0)
        );
        assert_eq!(get("blksnap_snapshots", &[("state", "taken")]), Some(2.0));
        assert_eq!(get("blksnap_difference_storage_bytes", &[]), Some(4096.0));
        assert_eq!(get("blksnap_frozen_seconds_total", &[]), Some(0.25));
        assert_eq!(
            get("blksnap_nbd_requests_total", &[("command", "read")]),
            Some(10.0)
        );
        assert_eq!(get("blksnap_nbd_errors_total", &[("error", "eio")]), Some(0.0));
    }

    #[test]
    fn loss_and_doubt_are_there_before_they_happen() {
        let series = parse(&render(sample()).unwrap());
        for name in ["ring_full", "run_misses", "passthrough_commands"] {
            let name = format!("blksnap_device_{name}_total");
            assert_eq!(value(&series, &name, &[("device", "sda1")]), Some(0.0), "{name}");
        }
        let reason = [("device", "sda1"), ("reason", "run_missed")];
        for name in ["doubts", "generation_resets"] {
            let name = format!("blksnap_device_{name}_total");
            assert_eq!(value(&series, &name, &reason), Some(0.0), "{name}");
        }
        assert_eq!(
            value(&series, "blksnap_device_lost", &[("device", "sda1")]),
            Some(0.0)
        );
        // Without a device there is no series of a device, and the text is still right.
        parse(&render(Sample::default()).unwrap());
    }
}

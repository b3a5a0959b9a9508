//! What the text looks like, and that it is one.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

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

/// A parser that takes only what the OpenMetrics 1.0 text format allows of counters, gauges, histograms and infos.
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
                    assert!(["counter", "gauge", "histogram", "info"].contains(&rest));
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
        let suffixes: &[&str] = match kind.as_deref().expect("a type") {
            "counter" => &["_total"],
            "info" => &["_info"],
            "histogram" => &["_sum", "_count", "_bucket"],
            _ => &[""],
        };
        let named = |suffix: &&str| name == format!("{current}{suffix}");
        assert!(suffixes.iter().any(named), "{line:?}");
        assert_eq!(labels.contains_key("le"), name.ends_with("_bucket"), "{line:?}");
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
        served: vec![ServedSample {
            device: "web.img".to_owned(),
            held_writes: 5,
            held: Duration::from_millis(9),
            hold_times: [(1, 2), (2, 2), (4, 5)]
                .map(|(micros, count)| (Duration::from_micros(micros), count))
                .to_vec(),
            preserved_bytes: 8192,
            queued: 3,
        }],
        gates: vec![GateSample {
            device: "sdb1".to_owned(),
            technique: "park",
            passed: 40,
            held: 3,
            hold_times: vec![(1e-6, 1), (f64::INFINITY, 2)],
            bypassed: 1,
            broken: vec![("bypassed", true), ("deadline", false)],
            ..GateSample::default()
        }],
        held: vec![HeldSample {
            snapshot: "one".to_owned(),
            used_bytes: 4096,
            free_bytes: 1 << 30,
            events: vec![("low_free_space", 0), ("corrupted", 1)],
        }],
        snapshots: vec![("created", 0), ("taken", 2)],
        storage_bytes: 4096,
        takes: TakeSample {
            frozen_seconds: 0.25,
            suspended_seconds: 0.5,
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
    assert_eq!(get("blksnap_suspended_seconds_total", &[]), Some(0.5));
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

#[test]
fn a_histogram_is_cumulative_and_has_no_last_bound() {
    let series = parse(&render(sample()).unwrap());
    let get = |name: &str, labels: &[(&str, &str)]| value(&series, name, labels);
    let device = ("device", "web.img");
    let mut buckets: Vec<(f64, f64)> = series
        .iter()
        .filter(|((name, _), _)| name == "blksnap_hold_seconds_bucket")
        .map(|((_, labels), count)| (labels["le"].parse().unwrap(), *count))
        .collect();
    buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
    assert_eq!(buckets, [(1e-6, 2.0), (2e-6, 2.0), (f64::INFINITY, 5.0)]);
    assert_eq!(get("blksnap_hold_seconds_count", &[device]), Some(5.0));
    assert_eq!(get("blksnap_hold_seconds_sum", &[device]), Some(0.009));
    assert_eq!(get("blksnap_held_writes_total", &[device]), Some(5.0));
    assert_eq!(get("blksnap_preserved_bytes", &[device]), Some(8192.0));
    assert_eq!(get("blksnap_store_queue_depth", &[device]), Some(3.0));
    let snapshot = ("snapshot", "one");
    assert_eq!(get("blksnap_storage_used_bytes", &[snapshot]), Some(4096.0));
    for (code, count) in [("low_free_space", 0.0), ("corrupted", 1.0)] {
        let labels = [snapshot, ("code", code)];
        assert_eq!(
            get("blksnap_snapshot_events_total", &labels),
            Some(count),
            "{code}"
        );
    }
}

//! Gate: metrics of devices whose writes programs in the kernel hold.

use std::collections::HashMap;
use std::time::Duration;

use prometheus_client::encoding::NoLabelSet;
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::exemplar::Exemplar;
use prometheus_client::registry::Unit;

use super::{Encoded, Families};

/// A gate, as it was counted since it was made.
#[derive(Clone, Debug, Default)]
pub struct GateSample {
    /// Value of the label `device`: the kernel's name.
    pub device: String,
    /// How writes wait.
    pub technique: &'static str,
    /// Writes that found everything kept.
    pub passed: u64,
    /// Writes that waited.
    pub held: u64,
    /// Time for which they waited.
    pub hold_time: Duration,
    /// Upper bounds in seconds, ascending, and how many waits are in each bucket alone. The last bound is infinity.
    pub hold_times: Vec<(f64, u64)>,
    /// Writes that came by with old data not kept.
    pub bypassed: u64,
    /// The most copies of the program in use on a CPU.
    pub copies: u64,
    /// Bytes of old data that snapshots held now have of it.
    pub preserved_bytes: u64,
    /// By reason, each reason present: whether the gate is broken by that.
    pub broken: Vec<(&'static str, bool)>,
}

pub(super) fn encode(gates: &[GateSample], out: &mut Families<'_>) -> Encoded {
    out.gauge("gates", "Devices with a gate.", None, gates.len() as u64)?;
    out.gauges(
        "gate_technique",
        "1 for how writes of the device wait: in a loop (spin), or asleep (park).",
        None,
        gates.iter().map(|gate| {
            let labels = [("device", gate.device.as_str()), ("technique", gate.technique)];
            (labels, 1)
        }),
    )?;
    out.counters(
        "gate_passed_writes",
        "Writes that found all old data kept.",
        None,
        each(gates, |gate| gate.passed),
    )?;
    out.counters(
        "gate_held_writes",
        "Writes that waited in the kernel until old data was kept.",
        None,
        each(gates, |gate| gate.held),
    )?;
    out.family(
        "gate_hold",
        "How long writes waited in the kernel.",
        Some(Unit::Seconds),
        MetricType::Histogram,
        |mut encoder| {
            for gate in gates {
                encoder
                    .encode_family(&[("device", gate.device.as_str())])?
                    .encode_histogram(
                        gate.hold_time.as_secs_f64(),
                        gate.hold_times.iter().map(|(_, count)| count).sum(),
                        &gate.hold_times,
                        None::<&HashMap<usize, Exemplar<NoLabelSet, f64>>>,
                    )?;
            }
            Ok(())
        },
    )?;
    out.counters(
        "gate_bypassed_writes",
        "Writes that came by a gate with old data not kept; each breaks the snapshots of the device.",
        None,
        each(gates, |gate| gate.bypassed),
    )?;
    out.gauges(
        "gate_copies_used",
        "The most writers that waited on one CPU.",
        None,
        each(gates, |gate| gate.copies),
    )?;
    out.gauges(
        "gate_preserved",
        "Old data that snapshots held now have of a device with a gate.",
        Some(Unit::Bytes),
        each(gates, |gate| gate.preserved_bytes),
    )?;
    out.gauges(
        "gate_broken",
        "1 if a gate lets everything pass for this reason.",
        None,
        gates.iter().flat_map(|gate| {
            let labelled = |(reason, broken): &(&'static str, bool)| {
                (
                    [("device", gate.device.as_str()), ("reason", *reason)],
                    u64::from(*broken),
                )
            };
            gate.broken.iter().map(labelled)
        }),
    )
}

fn each<'s>(
    gates: &'s [GateSample],
    value: impl Fn(&GateSample) -> u64 + 's,
) -> impl Iterator<Item = ([(&'static str, &'s str); 1], u64)> + 's {
    gates
        .iter()
        .map(move |gate| ([("device", gate.device.as_str())], value(gate)))
}

//! Gate: 4 KiB random writes to a partition whose writes are held, beside dm-snapshot with the same chunk size, in a guest
//! of the lab.
//!
//! All use one partition, one after the other in each round, and all keep old data on one other disk. fio writes once
//! to every chunk, in random order (first touches), and then to the same blocks again (rewrites). A ratio is that of
//! one round.

mod disks;
mod held;
mod load;

use anyhow::Result;
use blksnap_agent::filter::gate::park::{self, ParkerCommand};
use blksnap_agent::filter::gate::{Availability, GateOptions, Wish};
use blksnap_common::gate::GateState;
use blksnap_tests::{agent_binary, complain, lab};

use self::disks::{Disks, Snapshot};
use self::held::Held;
use self::load::Load;
use crate::Bench;

/// Rounds.
const ROUNDS: usize = 3;

/// Bytes of a chunk of all of them.
const CHUNK: u64 = 64 << 10;

/// Ways of holding writes that this kernel has, with their names in figures.
fn techniques() -> Vec<(&'static str, GateOptions)> {
    let spin = GateOptions {
        technique: Wish::Spin,
        ..GateOptions::default()
    };
    let mut found = vec![("spin", spin)];
    let park = agent_binary().map(|program| GateOptions {
        technique: Wish::Park,
        parker: ParkerCommand {
            program,
            arguments: vec![park::SUBCOMMAND.into()],
        },
        ..GateOptions::default()
    });
    match park {
        Ok(park) => match Availability::check_park(&park) {
            Ok(()) => found.push(("park", park)),
            Err(error) => complain(format_args!("bench: no park: {error}")),
        },
        Err(error) => complain(format_args!("bench: no park: {error:#}")),
    }
    found
}

/// Writes a second.
#[derive(Clone, Copy)]
struct Rates {
    first: f64,
    again: f64,
}

/// Of all rounds.
#[derive(Default)]
struct Samples {
    none: Vec<Rates>,
    dm: Vec<Rates>,
    /// Of each technique.
    held: Vec<Vec<(Rates, GateState)>>,
}

pub(crate) fn measure(bench: &mut Bench) -> Result<()> {
    lab::inside()?;
    bench.step("gate: filling the disk")?;
    let disks = Disks::new()?;
    let load = Load::new(disks.origin(), disks::SIZE, CHUNK)?;
    let techniques = techniques();
    let mut samples = Samples {
        held: vec![Vec::new(); techniques.len()],
        ..Samples::default()
    };
    let rounds = bench.rounds(ROUNDS);
    for round in 1..=rounds {
        bench.step(&format!("gate: {round} of {rounds}: no snapshot"))?;
        samples.none.push(rates(&load)?);
        bench.step(&format!("gate: {round} of {rounds}: dm-snapshot"))?;
        let snapshot = Snapshot::new(&disks, CHUNK)?;
        samples.dm.push(rates(&load.on(snapshot.origin())?)?);
        drop(snapshot);
        for (number, (name, options)) in techniques.iter().enumerate() {
            bench.step(&format!("gate: {round} of {rounds}: {name}"))?;
            let held = Held::new(&disks, options, CHUNK)?;
            let rates = rates(&load)?;
            samples.held[number].push((rates, held.end()?));
        }
    }
    report(bench, &samples, &techniques);
    Ok(())
}

/// Every chunk is written to, and then the same blocks are.
fn rates(load: &Load) -> Result<Rates> {
    let first = load.run(1)?;
    let again = load.run(load::PASSES)?;
    Ok(Rates { first, again })
}

fn report(bench: &mut Bench, samples: &Samples, techniques: &[(&'static str, GateOptions)]) {
    let report = &mut bench.report;
    let what = "fio randwrite 4k direct, 4 threads, a partition of 256 MiB";
    let once = format!("{what}, one write to each chunk of 64 KiB");
    let again = format!("{what}, the same blocks again");
    let none: Vec<f64> = samples.none.iter().map(|rates| rates.again).collect();
    report.add("gate_none_iops", "", format!("{what}, no snapshot"), none);
    let dm: Vec<f64> = samples.dm.iter().map(|rates| rates.first).collect();
    report.add("gate_dm_first_touch_iops", "", format!("{once}, dm-snapshot"), dm);
    let dm: Vec<f64> = samples.dm.iter().map(|rates| rates.again).collect();
    report.add("gate_dm_rewrite_iops", "", format!("{again}, dm-snapshot"), dm);
    for ((name, _), held) in techniques.iter().zip(&samples.held) {
        let mut add = |figure: &str, aim, command: String, value: &dyn Fn(usize) -> f64| {
            let samples = (0..held.len()).map(value).collect();
            report.add(&format!("{figure}_{name}"), aim, command, samples);
        };
        add(
            "gate_first_touch_ratio",
            ">= 1.0",
            format!("{once}, to dm-snapshot"),
            &|n| held[n].0.first / samples.dm[n].first,
        );
        add(
            "gate_rewrite_ratio",
            ">= 1.2",
            format!("{again}, to dm-snapshot"),
            &|n| held[n].0.again / samples.dm[n].again,
        );
        add(
            "gate_rewrite_vs_none",
            ">= 0.9",
            format!("{again}, to no snapshot"),
            &|n| held[n].0.again / samples.none[n].again,
        );
        add("gate_first_touch_iops", "", once.clone(), &|n| held[n].0.first);
        add("gate_rewrite_iops", "", again.clone(), &|n| held[n].0.again);
        let holds = "length of a hold";
        add("gate_hold_median_ms", "", format!("median {holds}"), &|n| {
            held::quantile(&held[n].1, 0.5)
        });
        add(
            "gate_hold_p99_ms",
            "",
            format!("99th percentile, {holds}"),
            &|n| held::quantile(&held[n].1, 0.99),
        );
        add("gate_hold_longest_ms", "", format!("longest, {holds}"), &|n| {
            held::longest(&held[n].1)
        });
        add(
            "gate_hold_longest_ratio",
            "<= 5",
            format!("longest to median, {holds}"),
            &|n| held::longest(&held[n].1) / held::quantile(&held[n].1, 0.5),
        );
    }
}

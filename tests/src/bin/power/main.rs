//! Power: what a guest does between two power cuts. `cargo xtask power` runs it and kills the guest.
//!
//! `/dev/vda` has everything that must outlive a cut: the state and the storage of an agent, and a file that it serves.
//! `/dev/vdb` has a file system that is in use and tracked. Each boot looks at what the cut before left, then takes
//! snapshots, destroys some and writes, until the power goes.
//!
//! What must be known after the cut is printed, for the host keeps it: each line is a word and JSON. `started N`: the
//! newest write that the cut left. `flushed N`: the writes of this boot up to N are durable. `known {…}`: a snapshot and the sums of its image's blocks. `ending "ID"`: a
//! snapshot is about to be destroyed. `checked {…}`: what was found after the cut. `writing`: how far it is.

mod agent;
mod blocks;
mod mapped;

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use blksnap_tests::{Writer, run};
use clap::Parser;
use serde_json::{Value, json};

use agent::Agent;
use blocks::{Numbers, sums};

/// Where `/dev/vda` is mounted.
const HOME: &str = "/mnt/power";
/// Where `/dev/vdb` is mounted.
const TRACKED: &str = "/mnt/tracked";
const DISK: &str = "/mnt/power/disk.img";
const DISK_BYTES: u64 = 8 << 20;
/// Snapshots of the served file that are held at the same time.
const HELD: usize = 4;

/// Write between two power cuts, and look at what the last one left. Run by `cargo xtask power`, in a guest.
#[derive(Debug, Parser)]
#[command(name = "blksnap-power")]
struct Arguments {
    /// Makes both disks new first
    #[arg(long)]
    new: bool,
    /// Only looks at what the last cut left
    #[arg(long)]
    last: bool,
    /// With snapshots by the dm filter, of a volume of LVM on /dev/vdb
    #[arg(long)]
    dm: bool,
    /// Seed of the writes
    #[arg(long)]
    seed: u64,
    /// What the host knows, as JSON: `flushed`, ranges of writes that are durable, and `known`, snapshots as they were
    /// printed
    #[arg(long)]
    before: Option<PathBuf>,
}

/// A line for the host.
fn say(word: &str, value: &Value) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{word} {value}")?;
    Ok(out.flush()?)
}

/// The disk's file system was used when the power went: its log is replayed, then it must be clean.
fn recover(node: &str, at: &str) -> Result<()> {
    fs::create_dir_all(at)?;
    run("mount", [node, at])?;
    run("umount", [at])?;
    run("fsck.ext4", ["-f", "-n", node]).context("the origin's file system is damaged")?;
    run("mount", [node, at]).map(drop)
}

fn make() -> Result<()> {
    for (node, at) in [("/dev/vda", HOME), ("/dev/vdb", TRACKED)] {
        run("mkfs.ext4", ["-q", "-F", node])?;
        fs::create_dir_all(at)?;
        run("mount", [node, at])?;
    }
    fs::create_dir(Path::new(TRACKED).join("busy"))?;
    fs::write(DISK, vec![0; usize::try_from(DISK_BYTES)?])?;
    run("sync", [HOME]).map(drop)
}

/// What became of the snapshots.
#[derive(Debug, Default, serde::Serialize)]
struct Found {
    /// Declared right, and every byte is.
    exact: u32,
    /// Declared lost, with a reason.
    refused: u32,
    /// Gone with the agent that kept its images in memory of its own.
    gone: u32,
    /// Was being destroyed.
    ended: u32,
    /// Of a take that the cut interrupted: there, and taken.
    born: u32,
    /// Change maps that began anew, with a reason.
    anew: u32,
    /// Change maps that went on, and miss nothing.
    went_on: u32,
    reasons: std::collections::BTreeSet<String>,
}

fn text<'a>(value: &'a Value, name: &str) -> Result<&'a str> {
    let text = value[name].as_str();
    text.with_context(|| format!("no {name} in {value}"))
}

/// The blocks that differ are among the extents of this answer.
fn misses_nothing(known: &Value, now: &[u64], extents: &[Value]) -> Result<()> {
    let before = known["sums"].as_array().context("sums")?;
    ensure!(before.len() == now.len(), "another size");
    for (number, (before, now)) in before.iter().zip(now).enumerate() {
        let (from, to) = (
            number as u64 * blocks::SUMMED,
            (number as u64 + 1) * blocks::SUMMED,
        );
        let told = extents.iter().any(|extent| {
            let offset = extent["offset"].as_u64().unwrap_or(u64::MAX);
            let length = extent["length"].as_u64().unwrap_or(0);
            offset < to && from < offset.saturating_add(length)
        });
        ensure!(
            before.as_u64() == Some(*now) || told,
            "the change map misses a change at {from}"
        );
    }
    Ok(())
}

/// Why the change map of a device began anew, as it is told.
fn why_anew(agent: &Agent, device: &str) -> Result<String> {
    let (command, list, key) = if device == DISK {
        ("served", "served", "path")
    } else {
        ("status", "devices", "device")
    };
    let answer = agent.json(&[command])?;
    let mut devices = answer[list].as_array().into_iter().flatten();
    let found = devices.find(|found| found[key] == device);
    let found = found.with_context(|| format!("{device} is not in {answer}"))?;
    let why = found.pointer("/cbt/began").and_then(Value::as_str);
    let why = why.with_context(|| format!("no reason in {found}"))?;
    ensure!(!why.is_empty(), "no reason in {found}");
    Ok(why.to_owned())
}

/// Every snapshot that the host knows of is right, or says that it is not; so is every change map.
fn check(agent: &Agent, known: &[Value]) -> Result<Found> {
    let mut found = Found::default();
    let list = agent.json(&["snapshot", "list"])?;
    let list = list["snapshots"].as_array().context("a list")?;
    for known in known {
        let (id, promise) = (text(known, "id")?, text(known, "promise")?);
        let ending = known["ending"] == true;
        let there = list.iter().find(|snapshot| snapshot["id"] == id);
        match there {
            Some(snapshot) if snapshot["state"] == "taken" => {
                let now = sums(&agent.content(text(known, "export")?)?);
                ensure!(json!(now) == known["sums"], "{id} ({promise}) is not what it was");
                found.exact += 1;
            }
            Some(snapshot) => {
                ensure!(snapshot["state"] == "corrupted", "{snapshot}");
                let reason = text(snapshot, "reason")?;
                ensure!(!reason.is_empty(), "{id} is lost without a reason");
                ensure!(
                    promise != "power-cut" || ending,
                    "{id} was to survive a power cut: {reason}"
                );
                found.refused += 1;
                found.reasons.insert(reason.to_owned());
            }
            None if ending => found.ended += 1,
            None => {
                ensure!(promise == "nothing", "{id} ({promise}) is gone");
                found.gone += 1;
            }
        }
        let device = text(known, "device")?;
        let since = format!("--since={}:{}", text(known, "generation")?, known["number"]);
        let answer = agent.json(&["cbt", "extents", device, &since])?;
        if let Some(extents) = answer["extents"].as_array() {
            let now = sums(&fs::read(device)?);
            misses_nothing(known, &now, extents)?;
            found.went_on += 1;
        } else {
            ensure!(!text(&answer["full_needed"], "reason")?.is_empty(), "{answer}");
            found.reasons.insert(why_anew(agent, device)?);
            found.anew += 1;
        }
    }
    for snapshot in list {
        let id = text(snapshot, "id")?;
        if known.iter().all(|known| known["id"] != id) {
            ensure!(
                snapshot["state"] == "taken" || snapshot["state"] == "corrupted",
                "{snapshot}"
            );
            found.born += 1;
        }
        destroy(agent, id)?;
    }
    Ok(found)
}

/// Destroys a snapshot, of which the host hears first.
fn destroy(agent: &Agent, id: &str) -> Result<()> {
    say("ending", &json!(id))?;
    agent.json(&["snapshot", "destroy", id]).map(drop)
}

/// Takes a snapshot and tells the host what is in it.
fn take(agent: &Agent, device: &str, promise: &str) -> Result<String> {
    let mut arguments = vec!["snapshot", "create", device];
    if promise != "nothing" {
        arguments.extend(["--promise", promise]);
    }
    let taken = agent.json(&arguments)?;
    ensure!(taken["state"] == "taken", "{taken}");
    let (id, image) = (text(&taken, "id")?, &taken["devices"][0]["image"]);
    let export = text(image, "export")?;
    say(
        "known",
        &json!({
            "id": id,
            "promise": promise,
            "device": device,
            "export": export,
            "generation": image["generation"],
            "number": image["number"],
            "sums": sums(&agent.content(export)?),
        }),
    )?;
    Ok(id.to_owned())
}

/// What the host knows.
#[derive(Debug, Default, serde::Deserialize)]
struct Before {
    flushed: Vec<(u64, u64)>,
    known: Vec<Value>,
}

fn work(arguments: &Arguments) -> Result<()> {
    let numbers = Numbers {
        seed: arguments.seed,
        blocks: DISK_BYTES / blocks::BLOCK,
    };
    let before: Before = match &arguments.before {
        Some(path) => serde_json::from_slice(&fs::read(path)?)?,
        None => Before::default(),
    };
    if arguments.new {
        make()?;
    } else {
        recover("/dev/vda", HOME)?;
        recover("/dev/vdb", TRACKED)?;
    }
    let last = numbers.check(&fs::read(DISK)?, &before.flushed)?;
    say("started", &json!(last))?;
    let agent = Agent::start(Path::new(HOME))?;
    if arguments.new {
        agent.json(&["serve", DISK])?;
        agent.json(&["attach", "/dev/vdb"])?;
    }
    say("checked", &json!(check(&agent, &before.known)?))?;
    if arguments.last {
        drop(agent);
        run("umount", [HOME, TRACKED])?;
        for node in ["/dev/vda", "/dev/vdb"] {
            run("fsck.ext4", ["-f", "-n", node])?;
        }
        return Ok(());
    }
    let tracked = Writer::files(&Path::new(TRACKED).join("busy"), arguments.seed);
    // What the writer of the boot before had sent is lost or not; the numbers go on behind it.
    let writer = numbers.start(agent.socket(), last)?;
    take(&agent, "/dev/vdb", "nothing")?;
    let mut held = Vec::new();
    for promise in ["power-cut", "agent-crash"].into_iter().cycle() {
        held.push(take(&agent, DISK, promise)?);
        if held.len() == 2 {
            say("writing", &Value::Null)?;
        }
        if held.len() > HELD {
            let id = held.remove(0);
            destroy(&agent, &id)?;
        }
        std::thread::sleep(Duration::from_millis(300));
        ensure!(
            !writer.is_finished(),
            "the writer has failed: {:?}",
            writer.join()
        );
    }
    drop(tracked);
    bail!("there is no end of this but a power cut")
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if arguments.dm {
        return mapped::work(&arguments);
    }
    work(&arguments)
}

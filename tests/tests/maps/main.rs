//! Maps: what can be asked of a change map and done to it, through the commands.

mod marks;
mod sizes;

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::Daemon;
use serde_json::Value;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// The take of a backup as `GENERATION:NUMBER`.
fn backup(daemon: &Daemon, node: &str, incremental: bool) -> Result<Value> {
    let target = daemon.scratch().join("disk.img").display().to_string();
    let how = incremental.then_some("--incremental");
    daemon.json(["backup"].into_iter().chain(how).chain([node, &target]))
}

fn base(backup: &Value) -> Result<String> {
    let taken = &backup["taken"];
    let generation = taken["generation"].as_str().context("a generation")?;
    Ok(format!("{generation}:{}", taken["number"]))
}

/// What the map of the last take says, as (offset, length).
fn extents(answer: &Value) -> Result<Vec<(u64, u64)>> {
    let list = answer["extents"].as_array().with_context(|| answer.to_string())?;
    list.iter()
        .map(|extent| Some((extent["offset"].as_u64()?, extent["length"].as_u64()?)))
        .collect::<Option<_>>()
        .context("numbers")
}

fn since(daemon: &Daemon, node: &str, base: &str) -> Result<Vec<(u64, u64)>> {
    extents(&daemon.json(["cbt", "extents", node, "--since", base])?)
}

/// A command that is refused says all of `expected`.
fn refused(daemon: &Daemon, arguments: &[&str], expected: &[&str]) -> Result<()> {
    let answer = daemon.try_run(arguments)?;
    ensure!(answer.code == 1 && answer.stdout.is_empty(), "{answer:?}");
    for text in expected {
        ensure!(answer.stderr.contains(text), "no {text:?} in {answer:?}");
    }
    Ok(())
}

//! Heat: `cbt heat` of a device that was written at known places and times.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use blksnap_agent::sys::AlignedBuffer;
use blksnap_tests::{Daemon, LoopDevice};
use serde_json::{Value, json};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

fn write(node: &Path, offset: u64, length: u64) -> Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(node)?;
    let buffer = AlignedBuffer::zeroed(usize::try_from(length)?);
    Ok(file.write_all_at(buffer.as_slice(), offset)?)
}

fn take(daemon: &Daemon, node: &str) -> Result<()> {
    let snapshot = daemon.json(["snapshot", "create", node])?;
    let id = snapshot["id"].as_str().context("no id")?;
    daemon.run(["snapshot", "destroy", id]).map(drop)
}

#[test]
fn what_was_written_when_is_drawn_where() -> Result<()> {
    let disk = LoopDevice::new(16 * MIB)?;
    let node = disk.path().to_str().context("a path")?;
    let daemon = Daemon::start()?;
    daemon.run(["attach", "--block-size=4K", node])?;
    take(&daemon, node)?;
    write(disk.path(), 5 * MIB, 256 * KIB)?;
    take(&daemon, node)?;
    write(disk.path(), 5 * MIB, 64 * KIB)?;
    write(disk.path(), 15 * MIB, MIB)?;

    let heat = daemon.json(["cbt", "heat", node, "--cells=16"])?;
    let ages: Vec<Value> = [(3, (64 + 1024) / 4), (2, 192 / 4), (1, 0)]
        .map(|(number, blocks)| json!({"newest": number, "oldest": number, "blocks": blocks}))
        .to_vec();
    ensure!(heat["ages"] == json!(ages), "{heat}");
    ensure!(heat["bucket_size"] == MIB && heat["device"] == node, "{heat}");
    let buckets = heat["buckets"].as_array().context("no buckets")?;
    ensure!(buckets.len() == 16, "{heat}");
    for (bucket, number) in buckets.iter().zip(0_u64..) {
        ensure!(
            bucket["offset"] == number * MIB && bucket["blocks"] == 256,
            "{bucket}"
        );
        let (newest, changed) = match number {
            5 => (json!(3), json!([16, 48, 0])),
            15 => (json!(3), json!([256, 0, 0])),
            _ => (Value::Null, json!([0, 0, 0])),
        };
        ensure!(
            bucket["newest"] == newest && bucket["changed"] == changed,
            "{bucket}"
        );
    }

    let text = daemon.run(["cbt", "heat", node, "--cells=16"])?;
    ensure!(!text.contains('\x1b'), "{text}");
    ensure!(text.contains("|     @         @|"), "{text}");
    ensure!(text.contains("now: since take 2"), "{text}");
    let colourful = daemon.run(["cbt", "heat", node, "--color=always"])?;
    ensure!(colourful.contains("\x1b[38;"), "{colourful}");

    let png = daemon.scratch().join("heat.png");
    daemon.run(["cbt".as_ref(), "heat".as_ref(), disk.path(), &png])?;
    ensure!(fs::read(&png)?.starts_with(b"\x89PNG\r\n\x1a\n"), "no PNG");
    let svg = daemon.run(["cbt", "heat", node, "--output=svg"])?;
    ensure!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"), "{svg}");

    let refused = daemon.try_run(["status", "--output=svg"])?;
    ensure!(
        refused.code == 2 && refused.stderr.contains("cbt heat"),
        "{refused:?}"
    );
    Ok(())
}

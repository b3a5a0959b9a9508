//! Story: what happens in the demonstration, in order.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use blksnap_tests::{Daemon, Interrupt};
use serde_json::Value;

use crate::compare::{differing_blocks, same};
use crate::devices::Volume;
use crate::table::{Row, mib, table};
use crate::writers::{COUNT, Writers};

/// How long the writers work between the two snapshots.
const WORK: Duration = Duration::from_secs(3);

/// Longest freeze, in milliseconds. The first one has both devices copied in it.
const FREEZE_LIMIT: &str = "--freeze-limit=60000";

/// Copies the devices while they are frozen, as they are on the disk.
const HOOK: &str = r#"#!/bin/sh
[ "$1" = frozen ] || exit 0
for device in $BLKSNAP_DEVICES; do
    dd if="$device" of="${0%/*}/${device##*/}.frozen" iflag=direct bs=1M conv=sparse status=none || exit 1
done
"#;

const NEXT: &str = "\
Next, on devices of your own:
  cargo xtask build --release        prints the path of the agent
  blksnap-agent doctor               what this machine has and lacks
  blksnap-agent daemon &             then attach, snapshot, backup: --help has examples of each
  README.md, docs/                   limits, architecture, decisions";

/// Says what happens, with the time since the beginning.
struct Teller<'a> {
    interrupt: &'a Interrupt,
    start: Instant,
}

impl Teller<'_> {
    /// An error if nobody reads any more, rather than the panic of `println!`.
    fn print(&self, text: impl std::fmt::Display) -> Result<()> {
        writeln!(io::stdout(), "{text}").context("nobody reads any more")
    }

    fn say(&self, what: &str) -> Result<()> {
        let seconds = self.start.elapsed().as_secs_f64();
        self.print(format_args!("[{seconds:5.1} s] {what}"))?;
        self.interrupt.check()
    }
}

/// A snapshot, as the agent describes it.
struct Snapshot(Value);

impl Snapshot {
    fn id(&self) -> Result<&str> {
        self.0["id"].as_str().context("a snapshot has an id")
    }

    /// A field of the image of a volume.
    fn image(&self, volume: &Volume, field: &str) -> Result<&Value> {
        let name = volume.name();
        let devices = self.0["devices"].as_array().context("a snapshot has devices")?;
        devices
            .iter()
            .find(|device| device["name"] == name.as_str())
            .and_then(|device| device["image"].get(field))
            .with_context(|| format!("the snapshot has no {field} of {name}: {}", self.0))
    }

    fn frozen_ms(&self, volume: &Volume) -> Result<f64> {
        let seconds = self.image(volume, "frozen_seconds")?.as_f64();
        Ok(seconds.context("frozen_seconds is a number")? * 1000.0)
    }
}

/// The agent at work: a daemon, and its commands.
struct Agent<'a> {
    daemon: Daemon,
    interrupt: &'a Interrupt,
}

impl Agent<'_> {
    fn json(&self, arguments: &[&str]) -> Result<Value> {
        let mut command = self.daemon.command(arguments);
        let text = self.interrupt.output(command.arg("--output=json"))?;
        serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.daemon.scratch().join(name)
    }

    /// Copies the image of a volume by an NBD client.
    fn read_image(&self, snapshot: &Snapshot, volume: &Volume, suffix: &str) -> Result<PathBuf> {
        let uri = snapshot.image(volume, "uri")?.as_str().context("a URI is text")?;
        let path = self.file(&format!("{}.{suffix}", volume.name()));
        self.interrupt
            .output(Command::new("nbdcopy").arg(uri).arg(&path))?;
        Ok(path)
    }

    fn backup(&self, snapshot: &Snapshot, volume: &Volume, incremental: bool) -> Result<(PathBuf, Value)> {
        let target = self.file(&format!("{}.backup", volume.name()));
        let (node, path) = (text(&volume.node)?, text(&target)?);
        let mut arguments = vec!["backup", "--snapshot", snapshot.id()?];
        if incremental {
            arguments.push("--incremental");
        }
        arguments.extend([node, path]);
        let result = self.json(&arguments)?;
        let kind = if incremental { "incremental" } else { "full" };
        ensure!(result["kind"] == kind, "the backup is not {kind}: {result}");
        Ok((target, result))
    }

    /// Write operations on a volume that the programs have seen.
    fn writes(&self, volume: &Volume) -> Result<u64> {
        let status = self.json(&["status", text(&volume.node)?])?;
        let operations = status["devices"][0]["counters"]["operations"].as_object();
        let operations = operations.with_context(|| format!("no counters in {status}"))?;
        Ok(operations.values().filter_map(Value::as_u64).sum())
    }
}

fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))
}

/// The whole of it. Values are dropped from the last to the first.
pub(crate) fn tell(interrupt: &Interrupt) -> Result<()> {
    let teller = Teller {
        interrupt,
        start: Instant::now(),
    };
    teller.print("blksnap: snapshots and incremental backups of block devices in use\n")?;
    let volumes = [Volume::ext4()?, Volume::xfs()?];
    let [first, second] = volumes.each_ref().map(|volume| text(&volume.node));
    let nodes = [first?, second?];
    teller.say(&format!(
        "two disks: {} (ext4 in a partition) and {} (xfs), both mounted",
        nodes[0], nodes[1]
    ))?;
    let agent = Agent {
        daemon: Daemon::start()?,
        interrupt,
    };
    let writers = Writers::start([&volumes[0].mountpoint, &volumes[1].mountpoint])?;
    teller.say("the daemon runs, and writers work on both file systems until the end")?;
    agent.json(&["attach", nodes[0]])?;
    agent.json(&["attach", nodes[1]])?;
    teller.say("both are attached: every write is seen from here on")?;

    let hook = agent.file("hook");
    fs::write(&hook, HOOK)?;
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o700))?;
    let base = Snapshot(agent.json(&[
        "snapshot",
        "create",
        FREEZE_LIMIT,
        "--freeze-hook",
        text(&hook)?,
        nodes[0],
        nodes[1],
    ])?);
    teller.say(&format!(
        "one snapshot of both at one instant: frozen {:.0} ms, since a freeze hook copied the disks meanwhile",
        base.frozen_ms(&volumes[0])?
    ))?;
    let before = prove_images(&teller, &agent, &base, &volumes)?;
    for volume in &volumes {
        let (target, _) = agent.backup(&base, volume, false)?;
        let file = fs::metadata(&target)?;
        teller.say(&format!(
            "full backup of {} from the snapshot: a raw image of {}, {} without its holes",
            volume.name(),
            mib(file.len()),
            mib(file.blocks() * 512)
        ))?;
    }

    let writes = [agent.writes(&volumes[0])?, agent.writes(&volumes[1])?];
    agent.daemon.run(["snapshot", "destroy", base.id()?])?;
    interrupt.sleep(WORK)?;
    let later = Snapshot(agent.json(&["snapshot", "create", FREEZE_LIMIT, nodes[0], nodes[1]])?);
    teller.say(&format!(
        "after {} s more of writing, a second snapshot of both: frozen {:.0} ms",
        WORK.as_secs(),
        later.frozen_ms(&volumes[0])?
    ))?;
    let mut rows = Vec::new();
    for ((volume, before), writes) in volumes.iter().zip(before).zip(writes) {
        let seen = agent.writes(volume)? - writes;
        rows.push(prove_incremental(
            &teller, &agent, &base, &later, volume, &before, seen,
        )?);
    }
    writers.stop()?;
    agent.daemon.run(["snapshot", "destroy", later.id()?])?;
    let table = table(&rows);
    teller.print(format_args!(
        "\nBetween the two snapshots, in blocks of 64 KiB:\n{table}\n{NEXT}"
    ))
}

/// Reads both images by NBD, and shows that they are the devices at the freeze, sound, and of one instant. Gives
/// the files.
fn prove_images(
    teller: &Teller<'_>,
    agent: &Agent<'_>,
    snapshot: &Snapshot,
    volumes: &[Volume; 2],
) -> Result<[PathBuf; 2]> {
    let mut counts = Vec::new();
    let mut images = Vec::new();
    for volume in volumes {
        let image = agent.read_image(snapshot, volume, "image")?;
        let frozen = agent.file(&format!("{}.frozen", volume.name()));
        same("the image and the frozen disk", &image, &frozen)?;
        let (verdict, count) = volume.check(agent.interrupt, &frozen, COUNT)?;
        teller.say(&format!(
            "{} read by nbdcopy: equals the frozen disk byte for byte; {verdict}",
            volume.name()
        ))?;
        let count: u64 = count
            .trim()
            .parse()
            .with_context(|| format!("{count:?} is no count"))?;
        counts.push(count);
        images.push(image);
    }
    let [first, second] = counts[..] else {
        bail!("there are two volumes");
    };
    ensure!(
        first == second || first == second + 1,
        "the images are not of one instant: a writer that counts in both was at {first} and at {second}"
    );
    teller.say(&format!(
        "one instant: a writer that counts on one disk and then on the other is at {first} and {second}"
    ))?;
    <[PathBuf; 2]>::try_from(images).map_err(|_| anyhow::anyhow!("there are two volumes"))
}

/// Makes an incremental backup, and shows that it equals a full copy of the same instant.
fn prove_incremental(
    teller: &Teller<'_>,
    agent: &Agent<'_>,
    base: &Snapshot,
    snapshot: &Snapshot,
    volume: &Volume,
    before: &Path,
    writes: u64,
) -> Result<Row> {
    let (target, result) = agent.backup(snapshot, volume, true)?;
    let full = agent.read_image(snapshot, volume, "full")?;
    same("the incremental backup and a full copy", &target, &full)?;
    teller.say(&format!(
        "incremental backup of {}: equals a full copy of the same instant byte for byte",
        volume.name()
    ))?;
    let since = format!(
        "{}:{}",
        base.image(volume, "generation")?
            .as_str()
            .context("a generation is text")?,
        base.image(volume, "number")?
    );
    let changes = agent.json(&["cbt", "extents", text(&volume.node)?, "--since", &since])?;
    let number = |value: &Value| {
        value
            .as_u64()
            .with_context(|| format!("a number is missing in {changes}"))
    };
    let block_size = number(&changes["block_size"])?;
    let mut reported = Vec::new();
    for extent in changes["extents"].as_array().context("extents are a list")? {
        let (offset, length) = (number(&extent["offset"])?, number(&extent["length"])?);
        reported.extend(offset / block_size..(offset + length).div_ceil(block_size));
    }
    let changed = differing_blocks(before, &full, block_size)?;
    let missed = changed
        .iter()
        .filter(|block| reported.binary_search(block).is_err())
        .count() as u64;
    ensure!(
        missed == 0,
        "{missed} blocks of {} changed and were not reported",
        volume.name()
    );
    Ok(Row {
        device: volume.node.display().to_string(),
        kind: volume.kind,
        writes,
        changed: changed.len() as u64,
        reported: reported.len() as u64,
        missed,
        copied: number(&result["copied_bytes"])?,
        capacity: number(&result["size"])?,
        frozen_ms: snapshot.frozen_ms(volume)?,
    })
}

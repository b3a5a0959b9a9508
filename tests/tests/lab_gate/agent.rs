//! Agent: snapshots by the gate as a user takes them, with file systems in use.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use blksnap_agent::filter::gate::Preemption;
use blksnap_tests::lab::KernelLog;
use blksnap_tests::nbd::{Client, Framing};
use blksnap_tests::{Daemon, DaemonOptions, Writer, lab, run, seed, unmount};
use serde_json::Value;
use tempfile::TempDir;

use super::scene::{MIB, partition};

/// Bytes of each file system.
pub(crate) const SIZE: u64 = 24 * MIB;

/// Bound against hanging for ever.
const PATIENCE: Duration = Duration::from_secs(60);

/// A number that the caller of the lab may raise.
pub(crate) fn rounds(variable: &str, default: u32) -> u32 {
    std::env::var(variable)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

/// A mounted ext4 with a writer of files. Unmounted when dropped.
pub(crate) struct Busy {
    node: PathBuf,
    directory: TempDir,
    writer: Option<Writer>,
    mounted: bool,
}

impl Busy {
    pub(crate) fn new(node: &Path, seed: u64) -> Result<Self> {
        run(
            "mkfs.ext4",
            [
                OsStr::new("-q"),
                "-F".as_ref(),
                node.as_os_str(),
                format!("{}k", SIZE / 1024).as_ref(),
            ],
        )?;
        let directory = tempfile::Builder::new().prefix("blksnap-gate-").tempdir()?;
        run("mount", [node.as_os_str(), directory.path().as_os_str()])?;
        let mut busy = Self {
            node: node.to_owned(),
            directory,
            writer: None,
            mounted: true,
        };
        busy.go_on(seed);
        Ok(busy)
    }

    fn go_on(&mut self, seed: u64) {
        let writer = Writer::files(self.directory.path(), seed);
        writer.wait_for(10);
        self.writer = Some(writer);
    }

    pub(crate) fn wait_for(&self, writes: u64) -> Result<()> {
        self.writer.as_ref().context("a writer")?.wait_for(writes);
        Ok(())
    }

    /// The writers make so many steps more, in this time.
    pub(crate) fn goes_on(&self, writes: u64, patience: Duration) -> Result<()> {
        let writer = self.writer.as_ref().context("a writer")?;
        let (goal, started) = (writer.writes() + writes, Instant::now());
        while writer.writes() < goal {
            ensure!(
                started.elapsed() < patience,
                "a writer waits, and nobody lets it go on"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// No file system suffered.
    pub(crate) fn check(mut self) -> Result<()> {
        let errors = self.writer.take().context("a writer")?.errors();
        ensure!(errors == 0, "{errors} writes failed");
        unmount(self.directory.path())?;
        self.mounted = false;
        run("fsck.ext4", [OsStr::new("-fn"), self.node.as_os_str()])?;
        Ok(())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.writer = None;
        if self.mounted {
            let _ = unmount(self.directory.path());
        }
    }
}

/// Makes the kernel one that can have writers wait, if it can be changed.
pub(crate) fn prepare() -> Result<()> {
    lab::inside()?;
    if lab::gate_technique() == "park" {
        return Ok(());
    }
    if !Preemption::now().can_spin() {
        let _ = fs::write("/sys/kernel/debug/sched/preempt", "full");
    }
    if Preemption::now().can_spin() {
        Ok(())
    } else {
        lab::absent("preemption")
    }
}

/// In an emulated guest time runs in jerks.
pub(crate) fn daemon_options() -> DaemonOptions {
    options_for(&lab::gate_technique())
}

fn options_for(technique: &str) -> DaemonOptions {
    DaemonOptions {
        arguments: vec![
            "--gate-deadline=10000".into(),
            "--gate-preempt".into(),
            format!("--gate-technique={technique}").into(),
        ],
        ..DaemonOptions::default()
    }
}

pub(crate) fn start() -> Result<Daemon> {
    Daemon::with_options(&daemon_options())
}

/// A program that copies the devices while they are frozen, for the test to compare with.
fn copying_hook(daemon: &Daemon) -> Result<PathBuf> {
    let script = format!(
        "#!/bin/sh\nset -e\n[ \"$1\" = frozen ] || exit 0\nfor d in $BLKSNAP_DEVICES; do\n  dd if=$d \
         of={}/frozen-$(basename $d) bs=1M count={} iflag=direct 2>/dev/null\ndone\n",
        daemon.scratch().display(),
        SIZE / MIB
    );
    let path = daemon.scratch().join("hook");
    fs::write(&path, script)?;
    fs::set_permissions(&path, Permissions::from_mode(0o755))?;
    Ok(path)
}

fn frozen(daemon: &Daemon, device: &Path) -> Result<Vec<u8>> {
    let name = device.file_name().context("a name")?.to_string_lossy();
    Ok(fs::read(daemon.scratch().join(format!("frozen-{name}")))?)
}

pub(crate) fn take(daemon: &Daemon, devices: &[&Path], more: &[&OsStr]) -> Result<Value> {
    take_on(daemon, devices, "memory:256M", more)
}

/// Takes them, with old data kept in `storage`.
pub(crate) fn take_on(daemon: &Daemon, devices: &[&Path], storage: &str, more: &[&OsStr]) -> Result<Value> {
    let command = [
        "snapshot",
        "create",
        "--filter",
        "gate",
        "--storage",
        storage,
        "--minimum",
        "16M",
    ];
    let devices = devices.iter().map(|device| device.as_os_str());
    let more = more.iter().copied();
    let taken = daemon.json(command.iter().map(OsStr::new).chain(devices).chain(more))?;
    ensure!(taken["state"] == "taken" && taken["filter"] == "gate", "{taken}");
    Ok(taken)
}

pub(crate) fn id(snapshot: &Value) -> Result<&str> {
    snapshot["id"].as_str().context("an id")
}

/// Waits for the event that says that a snapshot is lost; others come before it.
pub(crate) fn corrupted(daemon: &Daemon, snapshot: &str) -> Result<Value> {
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        let event = daemon.json(["snapshot", "wait", snapshot, "--timeout", "60000"])?;
        if event["event"] == "corrupted" {
            return Ok(event);
        }
    }
    bail!("no event says that {snapshot} is lost")
}

/// The first bytes of image `number`, read over NBD.
pub(crate) fn read_image(daemon: &Daemon, snapshot: &Value, number: usize) -> Result<Vec<u8>> {
    let export = snapshot["devices"][number]["image"]["export"]
        .as_str()
        .context("an export")?;
    let mut client = Client::connect(&daemon.nbd_socket(), export, Framing::Structured, &[])?;
    let mut bytes = Vec::new();
    for offset in (0..SIZE).step_by(usize::try_from(MIB)?) {
        bytes.extend(client.read(offset, MIB)?);
    }
    client.disconnect()?;
    Ok(bytes)
}

fn same(found: &[u8], expected: &[u8], what: &str) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    let differs = found.iter().zip(expected).position(|(a, b)| a != b);
    bail!("{what}: wrong byte at {differs:?}")
}

/// How many programs of gates there are, by the name of the first copy.
pub(crate) fn attached() -> usize {
    aya::programs::loaded_programs()
        .filter_map(Result::ok)
        .filter(|program| {
            program
                .name_as_str()
                .is_some_and(|name| name.starts_with("wait_") || name.starts_with("park_"))
        })
        .count()
}

pub(crate) fn nothing_is_left(alias: &Path) -> Result<()> {
    let started = Instant::now();
    // The kernel frees programs some time after they are detached.
    while attached() > 0 {
        ensure!(started.elapsed() < PATIENCE, "{} programs are left", attached());
        std::thread::sleep(Duration::from_millis(50));
    }
    ensure!(!alias.exists(), "{} is left", alias.display());
    Ok(())
}

pub(crate) fn alias_of(disk: &Path) -> PathBuf {
    PathBuf::from(format!("{}255", disk.display()))
}

#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn images_are_the_devices_as_they_were_frozen() -> Result<()> {
    prepare()?;
    let seed = seed("gate agent");
    let daemon = start()?;
    let hook = copying_hook(&daemon)?;
    let hooked: [&OsStr; 4] = [
        "--freeze-hook".as_ref(),
        hook.as_ref(),
        // Copies take long in a guest.
        "--freeze-limit".as_ref(),
        "120000".as_ref(),
    ];
    let (part, disk) = (partition(SIZE)?, lab::virtio(1)?);
    let busy = [Busy::new(&part, seed)?, Busy::new(&disk, seed ^ 1)?];
    let devices = [part.as_path(), disk.as_path()];

    let first = take(&daemon, &devices, &hooked)?;
    ensure!(attached() > 0 && alias_of(&disk).exists());
    let before = [frozen(&daemon, &part)?, frozen(&daemon, &disk)?];
    for one in &busy {
        one.wait_for(60)?;
    }
    for (number, expected) in before.iter().enumerate() {
        ensure!(
            first["devices"][number]["image"]["consistency"] == "file_system",
            "{first}"
        );
        same(&read_image(&daemon, &first, number)?, expected, "the first image")?;
    }
    // A second one shares the gates.
    let second = take(&daemon, &devices, &hooked)?;
    let between = [frozen(&daemon, &part)?, frozen(&daemon, &disk)?];
    for one in &busy {
        one.wait_for(60)?;
    }
    for number in 0..2 {
        same(
            &read_image(&daemon, &first, number)?,
            &before[number],
            "the first image, again",
        )?;
        same(
            &read_image(&daemon, &second, number)?,
            &between[number],
            "the second image",
        )?;
        changed(
            &daemon,
            devices[number],
            &first,
            number,
            &before[number],
            &between[number],
        )?;
    }
    let metrics = run(
        "curl",
        [
            OsStr::new("-s"),
            "--unix-socket".as_ref(),
            daemon.control_socket().as_os_str(),
            "http://localhost/metrics".as_ref(),
        ],
    );
    // A guest may have no curl.
    if let Ok(metrics) = metrics {
        ensure!(metrics.contains("blksnap_gate_held_writes_total"), "{metrics}");
    }
    daemon.run(["snapshot", "destroy", id(&first)?, id(&second)?])?;
    nothing_is_left(&alias_of(&disk))?;
    for one in busy {
        one.check()?;
    }
    Ok(())
}

/// What differs between two takes is in the list of changes.
fn changed(
    daemon: &Daemon,
    device: &Path,
    base: &Value,
    number: usize,
    before: &[u8],
    after: &[u8],
) -> Result<()> {
    let image = &base["devices"][number]["image"];
    let since = format!(
        "{}:{}",
        image["generation"].as_str().context("one")?,
        image["number"]
    );
    let arguments: [&OsStr; 5] = [
        "cbt".as_ref(),
        "extents".as_ref(),
        device.as_ref(),
        "--since".as_ref(),
        since.as_ref(),
    ];
    let report = daemon.json(arguments)?;
    let extents = report["extents"]
        .as_array()
        .with_context(|| format!("no extents: {report}"))?;
    let extents: BTreeMap<u64, u64> = extents
        .iter()
        .filter_map(|extent| {
            let offset = extent["offset"].as_u64()?;
            Some((offset, offset + extent["length"].as_u64()?))
        })
        .collect();
    let mut differ = 0;
    for (offset, (before, after)) in (0_u64..)
        .step_by(512)
        .zip(before.chunks(512).zip(after.chunks(512)))
    {
        if before != after {
            differ += 1;
            let covered = extents
                .range(..=offset)
                .next_back()
                .is_some_and(|(_, end)| *end > offset);
            ensure!(
                covered,
                "a change at {offset} of {} is not told",
                device.display()
            );
        }
    }
    ensure!(differ > 0, "nothing was written between the takes");
    Ok(())
}

/// An agent that is killed lets all writers go on, and the next one says that the snapshot is lost.
#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn a_killed_agent_lets_writers_go_on() -> Result<()> {
    prepare()?;
    let seed = seed("gate kills");
    let mut daemon = start()?;
    let disk = lab::virtio(1)?;
    let busy = Busy::new(&disk, seed)?;
    let mut log = KernelLog::follow()?;
    let started = Instant::now();
    for round in 0..rounds("BLKSNAP_GATE_AGENT_KILLS", 3) {
        println!("kill {round} after {:?}", started.elapsed());
        let taken = take(&daemon, &[&disk], &[])?;
        busy.wait_for(u64::from(round % 8) * 3)?;
        daemon.kill()?;
        busy.wait_for(20)?;
        daemon.launch(&daemon_options())?;
        ensure!(
            !alias_of(&disk).exists(),
            "a partition of the agent before is left"
        );
        let shown = daemon.json(["snapshot", "info", id(&taken)?])?;
        ensure!(shown["state"] == "corrupted", "{shown}");
        let reason = shown["reason"].as_str().unwrap_or_default();
        ensure!(reason.contains("does not outlive its agent"), "{shown}");
        daemon.run(["snapshot", "destroy", id(&taken)?])?;
    }
    // One that a killed agent has left is taken over, and taken back.
    let taken = take(&daemon, &[&disk], &[])?;
    daemon.run(["snapshot", "destroy", id(&taken)?])?;
    nothing_is_left(&alias_of(&disk))?;
    log.is_quiet()?;
    busy.check()
}

/// Writers wait for an agent that hangs no longer than it may be silent; the snapshot says that it is lost.
#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn a_silent_agent_loses_the_snapshot_and_nothing_else() -> Result<()> {
    prepare()?;
    let seed = seed("gate silence");
    let daemon = start()?;
    let part = partition(SIZE)?;
    let busy = Busy::new(&part, seed)?;
    let taken = take(&daemon, &[&part], &[])?;
    let pid = daemon.pid().context("a pid")?.to_string();
    run("kill", ["-STOP", &pid])?;
    busy.wait_for(40)?;
    run("kill", ["-CONT", &pid])?;
    let event = corrupted(&daemon, id(&taken)?)?;
    ensure!(event.to_string().contains("no longer held"), "{event}");
    let shown = daemon.json(["snapshot", "info", id(&taken)?])?;
    ensure!(shown["state"] == "corrupted", "{shown}");
    ensure!(
        shown["reason"]
            .as_str()
            .is_some_and(|reason| reason.contains("no longer held")),
        "{shown}"
    );
    ensure!(read_image(&daemon, &taken, 0).is_err(), "a lost image was read");
    // The gate holds again for the next one.
    let next = take(&daemon, &[&part], &[])?;
    busy.wait_for(20)?;
    read_image(&daemon, &next, 0)?;
    daemon.run(["snapshot", "destroy", id(&taken)?, id(&next)?])?;
    busy.check()
}

/// Storage that would wait for itself, and a promise that can't be kept, are refused.
#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn what_can_not_be_held_is_refused() -> Result<()> {
    prepare()?;
    let daemon = start()?;
    let part = partition(SIZE)?;
    let busy = Busy::new(&part, seed("gate refusals"))?;
    let part_text = part.to_string_lossy().into_owned();
    let inside = busy.directory.path().to_string_lossy().into_owned();
    let refused = |storage: &str, more: &[&str]| {
        let command = [
            "snapshot",
            "create",
            &part_text,
            "--filter",
            "gate",
            "--storage",
            storage,
        ];
        daemon.try_run(command.iter().chain(more))
    };
    let file = format!("{inside}/file,limit=2M");
    for (place, why) in [
        // 1 GiB, if nobody says how much.
        (inside.as_str(), "are kept free"),
        (file.as_str(), "another device"),
        (part_text.as_str(), "it is mounted"),
    ] {
        let answer = refused(place, &[])?;
        ensure!(answer.code == 1 && answer.stderr.contains(why), "{answer:?}");
    }
    let answer = refused("memory:64M", &["--promise", "power-cut"])?;
    ensure!(
        answer.code == 1 && answer.stderr.contains("promise"),
        "{answer:?}"
    );
    let chosen = daemon.json([
        "snapshot",
        "create",
        &part_text,
        "--filter",
        "auto",
        "--storage",
        "memory:64M",
    ])?;
    ensure!(
        chosen["filter"] == "gate"
            && chosen["filter_reason"]
                .as_str()
                .is_some_and(|why| why.contains(&lab::gate_technique())),
        "{chosen}"
    );
    daemon.run(["snapshot", "destroy", id(&chosen)?])?;
    busy.check()
}

/// A kernel that does not preempt enough is told to while there is a gate, and put back, also after a kill.
#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn the_kernel_preempts_as_before() -> Result<()> {
    lab::inside()?;
    if fs::write("/sys/kernel/debug/sched/preempt", "voluntary").is_err() {
        return lab::absent("a choice of preemption with voluntary");
    }
    let before = Preemption::now();
    ensure!(!before.can_spin(), "{before:?}");
    let options = options_for("spin");
    let mut daemon = Daemon::with_options(&options)?;
    let part = partition(SIZE)?;
    let taken = take(&daemon, &[&part], &[])?;
    ensure!(Preemption::now() == Preemption::Full);
    daemon.run(["snapshot", "destroy", id(&taken)?])?;
    ensure!(Preemption::now() == before, "{:?}", Preemption::now());
    take(&daemon, &[&part], &[])?;
    ensure!(Preemption::now() == Preemption::Full);
    daemon.kill()?;
    daemon.launch(&options)?;
    ensure!(Preemption::now() == before, "{:?}", Preemption::now());
    Ok(())
}

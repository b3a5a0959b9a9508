//! Told: the reason is in the status, in every answer, in the metrics and in the log; the next take begins anew.

use std::fs::OpenOptions;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use blksnap_agent::control::client::Client;
use blksnap_tests::{Daemon, DaemonOptions, LoopDevice, Tamper, run, write_block};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// A bound against hanging for ever.
const PATIENCE: Duration = Duration::from_secs(60);

/// A daemon, a device that it tracks, and a backup of it.
struct Scene {
    daemon: Daemon,
    disk: LoopDevice,
    node: String,
    /// `GENERATION:NUMBER` of the backup.
    base: String,
}

impl Scene {
    fn new(bytes: u64) -> Result<Self> {
        Self::with(bytes, &DaemonOptions::default())
    }

    fn with(bytes: u64, options: &DaemonOptions) -> Result<Self> {
        let daemon = Daemon::with_options(options)?;
        let disk = LoopDevice::new(bytes)?;
        let node = disk.path().display().to_string();
        daemon.run(["attach", "--block-size", "4K", &node])?;
        let mut scene = Self {
            daemon,
            disk,
            node,
            base: String::new(),
        };
        scene.base = base(&scene.backup(false)?);
        let status = scene.status()?;
        ensure!(
            status["cbt"]["corrupted"].is_null(),
            "{status}\n{}",
            scene.daemon.log()
        );
        ensure!(scene.changes()?["extents"].is_array(), "{}", scene.changes()?);
        Ok(scene)
    }

    fn backup(&self, incremental: bool) -> Result<Value> {
        let target = self.daemon.scratch().join("disk.img").display().to_string();
        let incremental = incremental.then_some("--incremental");
        self.daemon.json(
            ["backup"]
                .into_iter()
                .chain(incremental)
                .chain([self.node.as_str(), &target]),
        )
    }

    fn status(&self) -> Result<Value> {
        let all = self.daemon.json(["status"])?;
        let device = all["devices"].as_array().and_then(|devices| devices.first());
        device.cloned().context("a device is tracked")
    }

    fn changes(&self) -> Result<Value> {
        self.daemon
            .json(["cbt", "extents", &self.node, "--since", &self.base])
    }

    fn tamper(&self) -> Result<Tamper> {
        Tamper::with(self.daemon.pid().context("the daemon runs")?)
    }

    /// Value of the metric `name` with the label `reason`.
    fn metric(&self, name: &str, reason: &str) -> Result<f64> {
        let client = Client::new(&self.daemon.control_socket());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let text = runtime.block_on(client.get_bytes("/metrics"))?;
        let text = std::str::from_utf8(&text)?;
        let wanted = format!("reason=\"{reason}\"");
        let line = text
            .lines()
            .find(|line| line.starts_with(&format!("{name}{{")) && line.contains(&wanted));
        let value = line.and_then(|line| line.rsplit_once(' ')?.1.parse().ok());
        value.with_context(|| format!("{name} by {reason} is not in {text}"))
    }

    /// Everywhere the reason is said.
    fn told(&self, reason: &str) -> Result<()> {
        let status = self.status()?;
        ensure!(status["cbt"]["corrupted"] == reason, "{status}");
        ensure!(status["counters"]["doubts"][reason] == 1, "{status}");
        let changes = self.changes()?;
        ensure!(changes["full_needed"]["reason"] == reason, "{changes}");
        let map = self.daemon.try_run(["cbt", "map", &self.node])?;
        ensure!(map.code == 1 && map.stderr.contains("full"), "{map:?}");
        let text = self.daemon.run(["status"])?;
        ensure!(text.contains(&format!(": {reason}")), "{text}");
        ensure!(self.metric("blksnap_device_doubts_total", reason)? == 1.0);
        let log = self.daemon.log();
        let told: Vec<&str> = log
            .lines()
            .filter(|line| line.contains("the change map may miss writes"))
            .collect();
        ensure!(
            told.len() == 1 && told[0].contains("ERROR") && told[0].contains(reason),
            "{log}"
        );
        Ok(())
    }

    /// The next backup is a full one for that reason, the one after it is not.
    fn begins_anew(&self, reason: &str) -> Result<()> {
        let backup = self.backup(true)?;
        ensure!(backup["kind"] == "full" && backup["reason"] == reason, "{backup}");
        let status = self.status()?;
        ensure!(status["cbt"]["corrupted"].is_null(), "{status}");
        ensure!(status["cbt"]["began"] == reason, "{status}");
        ensure!(status["counters"]["resets"][reason] == 1, "{status}");
        ensure!(self.metric("blksnap_device_generation_resets_total", reason)? == 1.0);
        // What was told before stays to be seen.
        ensure!(self.metric("blksnap_device_doubts_total", reason)? == 1.0);
        let changes = self.changes()?;
        ensure!(changes["full_needed"]["reason"] == reason, "{changes}");
        let backup = self.backup(true)?;
        ensure!(backup["kind"] == "incremental", "{backup}");
        Ok(())
    }
}

fn base(backup: &Value) -> String {
    let taken = &backup["taken"];
    format!(
        "{}:{}",
        taken["generation"].as_str().unwrap_or_default(),
        taken["number"]
    )
}

#[test]
fn a_passthrough_command() -> Result<()> {
    let scene = Scene::new(16 * MIB)?;
    // As the program counts one; that it does is seen in the tracker's own tests.
    scene.tamper()?.state(|state| state.passthrough += 1)?;
    scene.told("passthrough_write")?;
    ensure!(scene.status()?["counters"]["passthrough"] == 1);
    scene.begins_anew("passthrough_write")
}

#[test]
fn a_map_that_fails() -> Result<()> {
    let scene = Scene::new(16 * MIB)?;
    scene.tamper()?.shrink_bitmap()?;
    write_block(scene.disk.path(), 8 * MIB)?;
    scene.told("map_error")?;
    scene.begins_anew("map_error")
}

#[test]
fn a_bit_past_the_end() -> Result<()> {
    // 4099 blocks: most of the last word is past the end.
    let scene = Scene::new(16 * MIB + 12 * 1024)?;
    scene.tamper()?.fill_word(64)?;
    scene.told("out_of_range")?;
    scene.begins_anew("out_of_range")
}

#[test]
fn a_state_that_somebody_else_wrote() -> Result<()> {
    let scene = Scene::new(16 * MIB)?;
    scene.tamper()?.state(|state| state.period += 1000)?;
    // It is found when the period is closed, and the copy of that run is not trusted.
    let backup = scene.backup(true)?;
    ensure!(
        backup["kind"] == "full" && backup["reason"] == "corrupted",
        "{backup}"
    );
    let status = scene.status()?;
    ensure!(status["counters"]["doubts"]["corrupted"] == 1, "{status}");
    ensure!(status["cbt"]["began"] == "corrupted", "{status}");
    ensure!(scene.metric("blksnap_device_doubts_total", "corrupted")? == 1.0);
    ensure!(
        scene.daemon.log().contains("reason=\"corrupted\""),
        "{}",
        scene.daemon.log()
    );
    Ok(())
}

#[test]
fn a_hook_that_no_longer_fires() -> Result<()> {
    let options = DaemonOptions {
        arguments: vec!["--self-test-interval=1".into()],
        ..DaemonOptions::default()
    };
    let scene = Scene::with(16 * MIB, &options)?;
    // Tests that find it alive change nothing.
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(2500) {
        std::fs::File::open(scene.disk.path())?.sync_all()?;
        std::thread::sleep(Duration::from_millis(100));
    }
    ensure!(
        scene.status()?["cbt"]["corrupted"].is_null(),
        "{}",
        scene.daemon.log()
    );
    scene.tamper()?.forget_disk()?;
    // An idle device is left alone: the kernel knows of no I/O that could have been missed.
    std::thread::sleep(Duration::from_millis(2500));
    ensure!(
        scene.status()?["cbt"]["corrupted"].is_null(),
        "idle, and yet: {}",
        scene.daemon.log()
    );
    while scene.status()?["cbt"]["corrupted"].is_null() {
        ensure!(begin.elapsed() < PATIENCE, "{}", scene.daemon.log());
        write_block(scene.disk.path(), MIB)?;
        std::thread::sleep(Duration::from_millis(100));
    }
    scene.told("hook_dead")?;
    // A take sets the ledger up, and with it the table; that the hook fires again is proven before the generation ends.
    scene.begins_anew("hook_dead")
}

#[test]
fn a_device_that_grew() -> Result<()> {
    let scene = Scene::new(16 * MIB)?;
    OpenOptions::new()
        .write(true)
        .open(scene.disk.image())?
        .set_len(24 * MIB)?;
    run("losetup", [Path::new("--set-capacity"), scene.disk.path()])?;
    scene.told("resized")?;
    ensure!(scene.status()?["lost"].is_null());
    let backup = scene.backup(true)?;
    ensure!(backup["kind"] == "full" && backup["size"] == 24 * MIB, "{backup}");
    let status = scene.status()?;
    ensure!(status["cbt"]["began"] == "resized", "{status}");
    ensure!(
        status["capacity"] == 24 * MIB && status["cbt"]["block_count"] == 6144,
        "{status}"
    );
    // Past the old end is tracked, too.
    write_block(scene.disk.path(), 20 * MIB)?;
    ensure!(scene.backup(true)?["kind"] == "incremental");
    Ok(())
}

#[test]
fn a_device_that_is_gone_and_back() -> Result<()> {
    let mut scene = Scene::new(16 * MIB)?;
    scene.disk.detach()?;
    scene.told("device_gone")?;
    let status = scene.status()?;
    ensure!(
        status["lost"] == "device_gone" && status["device"] == scene.node,
        "{status}"
    );
    let log = scene.daemon.log();
    // It stays in the list, and no take is made of it.
    let backup = scene
        .daemon
        .try_run(["backup", &scene.node, "/nonexistent/x.img"])?;
    ensure!(backup.code == 1, "{backup:?}");
    // The same name again.
    let image = scene.disk.image();
    scene.disk.attach(&image, &[])?;
    write_block(scene.disk.path(), 0)?;
    ensure!(scene.status()?["lost"] == "device_gone");
    let changes = scene.changes()?;
    ensure!(changes["full_needed"]["reason"] == "device_gone", "{changes}");
    let target = scene.daemon.scratch().join("x.img").display().to_string();
    let backup = scene.daemon.try_run(["backup", &scene.node, &target])?;
    ensure!(
        backup.code == 1 && backup.stderr.contains("attach it again"),
        "{backup:?}"
    );
    let snapshot = scene.daemon.try_run(["snapshot", "create", &scene.node])?;
    ensure!(
        snapshot.code == 1 && snapshot.stderr.contains("attach it again"),
        "{snapshot:?}"
    );
    ensure!(scene.daemon.log().starts_with(&log), "the log was begun anew");
    // Attached again it is tracked, and says why the map began.
    let attached = scene.daemon.json(["attach", &scene.node])?;
    ensure!(
        attached["devices"][0]["cbt"]["began"] == "device_gone",
        "{attached}"
    );
    ensure!(scene.status()?["lost"].is_null());
    let backup = scene.backup(true)?;
    ensure!(
        backup["kind"] == "full" && backup["reason"] == "device_gone",
        "{backup}"
    );
    Ok(())
}

#[test]
fn a_device_that_is_gone_can_be_detached() -> Result<()> {
    let mut scene = Scene::new(16 * MIB)?;
    scene.disk.detach()?;
    scene.daemon.run(["detach", &scene.node])?;
    ensure!(scene.daemon.json(["status"])?["devices"] == serde_json::json!([]));
    Ok(())
}

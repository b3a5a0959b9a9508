//! Agent: a snapshot by the dm filter as a user takes it.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::{Daemon, DaemonOptions, LoopDevice, lab, run};
use serde_json::Value;

use crate::scene::{Group, MIB, Scene, fill, ours, table};

/// The bytes of the only image of a snapshot, as a client gets them.
fn copy(daemon: &Daemon, snapshot: &Value, to: &Path) -> Result<Vec<u8>> {
    let export = snapshot["devices"][0]["image"]["export"].as_str();
    let uri = daemon.nbd_uri(export.with_context(|| format!("no image in {snapshot}"))?);
    run("nbdcopy", [uri.as_ref(), to.as_os_str()])?;
    Ok(std::fs::read(to)?)
}

#[test]
#[ignore = "needs a kernel with device mapper: cargo xtask test --vm 6.12"]
fn a_volume_is_taken_and_outlives_the_agent() -> Result<()> {
    lab::target("snapshot", "dm_snapshot")?;
    let scene = Scene::new()?;
    let disk = LoopDevice::new(40 * MIB)?;
    let group = Group::new("dmagent", disk.path())?;
    let node = group.thick("volume", 16)?;
    let before = table(&node)?;
    fill(&node, 0, 16 * MIB, 1)?;

    let options = DaemonOptions::default();
    let mut daemon = Daemon::with_options(&options)?;
    let (device, storage) = (node.to_string_lossy(), scene.storage.to_string_lossy());
    let create = [
        "snapshot",
        "create",
        &device,
        "--storage",
        &storage,
        "--minimum",
        "8M",
        "--filter",
    ];
    let taken = daemon.json(create.iter().copied().chain(["auto"]))?;
    ensure!(taken["state"] == "taken" && taken["filter"] == "dm", "{taken}");
    ensure!(
        taken["filter_reason"]
            .as_str()
            .is_some_and(|why| why.contains("device-mapper")),
        "{taken}"
    );
    fill(&node, 0, 4 * MIB, 2)?;
    let file = daemon.scratch().join("image");
    let bytes = copy(&daemon, &taken, &file)?;
    ensure!(bytes.len() as u64 == 16 * MIB && bytes.iter().all(|byte| *byte == 1));
    let id = taken["id"].as_str().context("an id")?.to_owned();

    // The kernel keeps on keeping while there is no agent.
    daemon.kill()?;
    fill(&node, 4 * MIB, 2 * MIB, 3)?;
    daemon.launch(&options)?;
    let shown = daemon.json(["snapshot", "info", &id])?;
    ensure!(shown["state"] == "taken", "{shown}");
    let bytes = copy(&daemon, &shown, &file)?;
    ensure!(bytes.iter().all(|byte| *byte == 1), "the image changed");
    ensure!(
        shown["devices"][0]["image"]["suspended_seconds"].is_null(),
        "this agent suspended nothing: {shown}"
    );

    daemon.run(["snapshot", "destroy", &id])?;
    ensure!(ours()?.is_empty() && table(&node)? == before);
    // One that is full says so, and the volume goes on.
    let small = daemon.json(create.iter().copied().chain(["dm", "--no-autogrow"]))?;
    fill(&node, 0, 16 * MIB, 4)?;
    let id = small["id"].as_str().context("an id")?.to_owned();
    let shown = daemon.json(["snapshot", "info", &id])?;
    ensure!(shown["state"] == "corrupted", "{shown}");
    ensure!(
        shown["reason"].as_str().is_some_and(|why| why.contains("full")),
        "{shown}"
    );
    ensure!(
        copy(&daemon, &shown, &file).is_err(),
        "it reads as if it were good"
    );
    daemon.run(["snapshot", "destroy", &id])?;
    ensure!(ours()?.is_empty() && table(&node)? == before);
    daemon.stop()?;
    Ok(())
}

/// What `/metrics` says.
fn metrics(daemon: &Daemon) -> Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let client = blksnap_agent::control::client::Client::new(&daemon.control_socket());
    let bytes = runtime.block_on(client.get_bytes("/metrics"))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The value of a series.
fn value(metrics: &str, series: &str) -> Result<f64> {
    let line = metrics.lines().find_map(|line| line.strip_prefix(series));
    let line = line.with_context(|| format!("no {series} in {metrics}"))?;
    Ok(line.trim().parse()?)
}

#[test]
#[ignore = "needs a kernel with device mapper: cargo xtask test --vm 6.12"]
fn storage_is_told_of_grows_and_is_full() -> Result<()> {
    lab::target("snapshot", "dm_snapshot")?;
    let scene = Scene::new()?;
    let disk = LoopDevice::new(48 * MIB)?;
    let group = Group::new("dmtold", disk.path())?;
    let node = group.thick("volume", 24)?;
    let before = table(&node)?;
    fill(&node, 0, 24 * MIB, 1)?;
    let daemon = Daemon::start()?;
    let doctor = daemon.try_run(["doctor", "--output=json"])?;
    let doctor: Value = serde_json::from_str(&doctor.stdout)?;
    let row = doctor.to_string();
    ensure!(row.contains("dmtold-volume: dm"), "{row}");

    let (device, storage) = (node.to_string_lossy(), scene.storage.to_string_lossy());
    let create = |filter: &str, more: &[&str]| -> Result<Value> {
        let words = ["snapshot", "create", &device, "--storage", &storage];
        let words = words.into_iter().chain(["--minimum", "8M", "--filter", filter]);
        daemon.json(words.chain(more.iter().copied()))
    };
    // It grows as it is written, and says so.
    let taken = create("auto", &[])?;
    ensure!(taken["state"] == "taken" && taken["filter"] == "dm", "{taken}");
    let suspended = &taken["devices"][0]["image"]["suspended_seconds"];
    let suspended = suspended.as_f64().with_context(|| format!("{taken}"))?;
    let id = taken["id"].as_str().context("an id")?.to_owned();
    let mut grown = 0;
    for at in 0..24 {
        fill(&node, at * MIB, MIB, 2)?;
        // As long as it takes until a look finds it too full, and it has grown.
        let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
        loop {
            let usage = daemon.json(["snapshot", "info", &id])?["usage"].clone();
            let (used, bytes) = (usage["used"].as_u64(), usage["bytes"].as_u64());
            let (used, bytes) = used.zip(bytes).with_context(|| format!("{usage}"))?;
            grown = bytes;
            if bytes - used > 4 * MIB {
                break;
            }
            ensure!(std::time::Instant::now() < until, "it does not grow: {usage}");
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }
    ensure!(grown > 24 * MIB, "{grown}");
    let event = daemon.json(["snapshot", "wait", &id, "--timeout", "60000"])?;
    ensure!(event.to_string().contains("low_free_space"), "{event}");
    let shown = daemon.json(["snapshot", "info", &id])?;
    let bytes = copy(&daemon, &shown, &daemon.scratch().join("image"))?;
    ensure!(bytes.iter().all(|byte| *byte == 1), "the image changed");
    let text = metrics(&daemon)?;
    let total = value(&text, "blksnap_suspended_seconds_total")?;
    ensure!((total - suspended).abs() < 1e-6, "{total}, not {suspended}");
    let of = |name: &str| value(&text, &format!("blksnap_{name}{{snapshot=\"{id}\"}}"));
    ensure!(of("storage_used_bytes")? >= 24.0 * (1 << 20) as f64, "{text}");
    ensure!(of("storage_free_bytes")? > 0.0, "{text}");
    let events = format!("blksnap_snapshot_events_total{{snapshot=\"{id}\",code=\"low_free_space\"}}");
    ensure!(value(&text, &events)? >= 1.0, "{text}");
    daemon.run(["snapshot", "destroy", &id])?;
    ensure!(ours()?.is_empty() && table(&node)? == before);

    // One that may not grow is full.
    let taken = create("dm", &["--no-autogrow"])?;
    let id = taken["id"].as_str().context("an id")?.to_owned();
    fill(&node, 0, 5 * MIB, 3)?;
    let event = daemon.json(["snapshot", "wait", &id, "--timeout", "60000"])?;
    ensure!(event.to_string().contains("low_free_space"), "{event}");
    fill(&node, 5 * MIB, 19 * MIB, 3)?;
    let event = daemon.json(["snapshot", "wait", &id, "--timeout", "60000"])?;
    let text = event.to_string();
    ensure!(
        text.contains("corrupted") && text.contains("\"err_code\":28"),
        "{event}"
    );
    let shown = daemon.json(["snapshot", "info", &id])?;
    ensure!(shown["state"] == "corrupted", "{shown}");
    ensure!(shown["devices"][0]["image"]["error_code"] == 28, "{shown}");
    ensure!(
        value(&metrics(&daemon)?, "blksnap_snapshots{state=\"corrupted\"}")? == 1.0,
        "{shown}"
    );
    ensure!(
        blksnap_tests::read_device(&node)?.iter().all(|byte| *byte == 3),
        "the origin suffered"
    );
    daemon.run(["snapshot", "destroy", &id])?;
    ensure!(ours()?.is_empty() && table(&node)? == before);
    Ok(())
}

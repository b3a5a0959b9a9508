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
    let doctor = daemon.try_run(["doctor"])?;
    println!("{doctor:?}");

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

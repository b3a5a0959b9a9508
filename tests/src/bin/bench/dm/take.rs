//! Take: how long four origins are suspended for a take by the agent, with their file systems, change maps and writers.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::{Daemon, LoopDevice, Pace, Writer, run, seed, unmount};

use super::Scene;
use crate::{Bench, REPEATS};

const ORIGINS: usize = 4;

/// A load that leaves the machine some time.
const PACE: Pace = Pace {
    burst: 8,
    pause: std::time::Duration::from_millis(5),
};

pub(super) fn measure(bench: &mut Bench, scene: &Scene) -> Result<()> {
    bench.step("dm: take of four origins")?;
    let first = blksnap_tests::lab::virtio(0)?.display().to_string();
    let mut nodes = Vec::new();
    for number in 0..ORIGINS {
        nodes.push(scene.group.thick_on(&format!("origin{number}"), 64, &[&first])?);
    }
    let mut mounted = Vec::new();
    // Two have a file system, two are written as they are.
    for node in &nodes[..2] {
        LoopDevice::mkfs_on(node, "ext4")?;
        let at = PathBuf::from("/run").join(node.file_name().context("a name")?);
        std::fs::create_dir_all(&at)?;
        run("mount", [node, &at])?;
        mounted.push(super::Mounted(at));
    }
    let result = rounds(bench, scene, &nodes, &mounted);
    for one in mounted {
        unmount(&one.0)?;
        std::mem::forget(one);
    }
    let (suspended, frozen) = result?;
    bench.report.add(
        "dm_take_4_suspended_ms",
        "<= 50",
        "four volumes, two with an ext4, all written meanwhile".to_owned(),
        suspended,
    );
    bench.report.add(
        "dm_take_4_frozen_ms",
        "",
        "of these, the two with an ext4".to_owned(),
        frozen,
    );
    Ok(())
}

fn rounds(
    bench: &Bench,
    scene: &Scene,
    nodes: &[PathBuf],
    mounted: &[super::Mounted],
) -> Result<(Vec<f64>, Vec<f64>)> {
    let daemon = Daemon::start()?;
    let seed = seed("dm take");
    let _files: Vec<_> = mounted.iter().map(|at| Writer::files(&at.0, seed)).collect();
    let _raw: Vec<_> = nodes[mounted.len()..]
        .iter()
        .map(|node| Writer::raw(node, seed, PACE))
        .collect();
    let mut arguments = vec!["snapshot".to_owned(), "create".to_owned()];
    arguments.extend(nodes.iter().map(|node| node.display().to_string()));
    arguments.extend(["--filter", "dm", "--minimum", "16M", "--storage"].map(str::to_owned));
    arguments.push(scene.directory.display().to_string());
    let (mut suspended, mut frozen) = (Vec::new(), Vec::new());
    for _ in 0..bench.rounds(REPEATS * 2) {
        let taken = daemon.json(&arguments)?;
        ensure!(taken["state"] == "taken", "{taken}");
        let image = &taken["devices"][0]["image"];
        let milliseconds = |name: &str| -> Result<f64> {
            let seconds = image[name].as_f64();
            Ok(seconds.with_context(|| format!("no {name} in {taken}"))? * 1000.0)
        };
        suspended.push(milliseconds("suspended_seconds")?);
        frozen.push(milliseconds("frozen_seconds")?);
        let id = taken["id"].as_str().context("an id")?;
        daemon.run(["snapshot", "destroy", id])?;
    }
    Ok((suspended, frozen))
}

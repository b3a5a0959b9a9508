//! Park: writers that sleep, on a kernel with function error injection, however it is preempted.

use std::ffi::OsStr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use blksnap_agent::filter::gate::{GateOptions, Technique, Wish};
use blksnap_common::gate::broken;
use blksnap_tests::run;

use super::scene::{Load, MIB, Scene, partition};
use super::{exact_under_load, options};

/// Bound against hanging for ever.
const PATIENCE: Duration = Duration::from_secs(120);

fn sleeping() -> GateOptions {
    GateOptions {
        technique: Wish::Park,
        ..options()
    }
}

/// Processes in whose memory writes sleep.
fn parkers() -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        let line = std::fs::read(path.join("cmdline")).unwrap_or_default();
        if line.windows(11).any(|word| word == b"gate-parker") {
            found.extend(path.file_name().map(|pid| pid.to_string_lossy().into_owned()));
        }
    }
    Ok(found)
}

#[test]
#[ignore = "needs function error injection: cargo xtask test --vm fei"]
fn images_are_exact_while_writers_sleep() -> Result<()> {
    let node = partition(32 * MIB)?;
    let scene = Scene::new(&node, sleeping())?;
    ensure!(scene.gate().technique() == Technique::Park);
    ensure!(parkers()?.len() == 1, "{:?}", parkers()?);
    exact_under_load(&scene, 4, Duration::from_secs(8))?;

    let before = scene.read_device()?;
    let image = scene.take()?;
    let written = Load::new(&scene).run(30, Duration::from_secs(8))?;
    scene.compare_to(&image, &before)?;
    let state = scene.gate().state();
    println!("30 writers, {written} writes: {state:?}");
    ensure!(state.broken == 0 && state.copies > 4, "{state:?}");
    scene.release(&image);

    let before = scene.read_device()?;
    let image = scene.take()?;
    // Requests in flight, sent by one thread.
    run(
        "fio",
        [
            OsStr::new("--name=deep"),
            format!("--filename={}", node.display()).as_ref(),
            "--rw=randwrite".as_ref(),
            "--bs=4k".as_ref(),
            "--direct=1".as_ref(),
            "--ioengine=libaio".as_ref(),
            "--iodepth=32".as_ref(),
            "--time_based".as_ref(),
            "--runtime=5".as_ref(),
        ],
    )?;
    scene.compare_to(&image, &before)?;
    let state = scene.gate().state();
    ensure!(state.broken == 0, "{state:?}");
    scene.release(&image);
    drop(scene);
    ensure!(parkers()?.is_empty(), "{:?} is left", parkers()?);
    Ok(())
}

/// A parker that is killed: writers go on, the snapshot says that it is lost, and the next one has another parker.
#[test]
#[ignore = "needs function error injection: cargo xtask test --vm fei"]
fn a_parker_that_is_killed_loses_the_snapshot_and_nothing_else() -> Result<()> {
    let scene = Scene::new(&partition(32 * MIB)?, sleeping())?;
    let image = scene.take()?;
    let load = Load::new(&scene);
    load.run(4, Duration::from_secs(2))?;
    let parker = parkers()?.pop().context("a parker")?;
    run("kill", ["-KILL", &parker])?;
    let started = Instant::now();
    while scene.gate().state().broken & broken::PLACE == 0 {
        ensure!(started.elapsed() < PATIENCE, "{:?}", scene.gate().state());
        load.run(2, Duration::from_millis(200))?;
    }
    ensure!(scene.compare(&image).is_err(), "a lost image was read");
    scene.release(&image);
    let before = scene.read_device()?;
    let image = scene.take()?;
    load.run(4, Duration::from_secs(3))?;
    scene.compare_to(&image, &before)?;
    ensure!(scene.gate().state().broken == 0, "{:?}", scene.gate().state());
    Ok(())
}

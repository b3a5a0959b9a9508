//! Ends: the agent ends in every way, and the device goes on with the next one.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use blksnap_tests::{DaemonOptions, seed};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::scene::{self, MIB, Scene};
use super::writers::Writers;

/// Kills of a run, and the fewest of one that a slow machine ends.
const KILLS: u32 = 8;
const FEWEST: u32 = 3;
/// What a run may take; a bound for machines that are slow, not a measurement.
const TIME: Duration = Duration::from_secs(150);

fn launch(scene: &mut Scene) -> Result<()> {
    scene.daemon.launch(&DaemonOptions::default())
}

/// An image that was read, and what it was.
struct Known {
    id: String,
    bytes: Vec<u8>,
}

/// Takes a snapshot while all is being written, and judges its image.
fn take(scene: &Scene, writers: &Writers) -> Result<Known> {
    let answered = writers.answered();
    let id = scene.take()?;
    let bounds = writers.bounds(answered);
    let bytes = scene.image(&id)?;
    writers.judge("a new image", &bytes, &bounds)?;
    Ok(Known { id, bytes })
}

#[test]
#[ignore = "needs a kernel with ublk: cargo xtask test --vm fei"]
fn writers_see_no_error_when_the_agent_is_killed() -> Result<()> {
    let seed = seed("writers_see_no_error_when_the_agent_is_killed");
    let mut random = StdRng::seed_from_u64(seed);
    let mut scene = Scene::new(8 * MIB)?;
    let node = scene.node()?;
    let mut writers = Writers::start(&scene, 6, seed)?;
    let mut known: Vec<Known> = Vec::new();
    let (mut exact, mut lost) = (0, 0);
    let started = Instant::now();
    let mut kills = 0;
    while kills < FEWEST || (kills < KILLS && started.elapsed() < TIME) {
        kills += 1;
        writers.run_for(random.random_range(1..60))?;
        if known.len() < 2 {
            known.push(take(&scene, &writers)?);
        } else if random.random_bool(0.3) {
            scene.daemon.run(["snapshot", "destroy", &known.remove(0).id])?;
        }
        writers.run_for(random.random_range(1..20))?;
        scene.daemon.kill()?;
        if random.random_bool(0.3) {
            // Once more, while it takes the device over.
            scene.daemon.begin_launch(&DaemonOptions::default())?;
            std::thread::sleep(Duration::from_millis(random.random_range(0..4000)));
            scene.daemon.kill()?;
        }
        launch(&mut scene)?;
        ensure!(scene.node()? == node, "kill {kills}: another device");
        writers.run_for(10)?;
        for Known { id, bytes } in &known {
            let info = scene.daemon.json(["snapshot", "info", id])?;
            if info["state"] == "taken" {
                ensure!(
                    &scene.image(id)? == bytes,
                    "kill {kills}: the image of {id} differs"
                );
                exact += 1;
            } else {
                ensure!(info["state"] == "corrupted", "{info}");
                println!("lost: {}", info["reason"]);
                lost += 1;
            }
        }
    }
    let writes = writers.writes();
    println!("{kills} kills, {writes} writes, {exact} exact images, {lost} declared lost");
    // A file goes on after a kill.
    ensure!(lost == 0 && exact > 0);
    writers.end(&mut scene)
}

#[test]
#[ignore = "needs a kernel with ublk: cargo xtask test --vm fei"]
fn writers_see_no_error_when_the_agent_is_stopped() -> Result<()> {
    let seed = seed("writers_see_no_error_when_the_agent_is_stopped");
    let mut scene = Scene::new(8 * MIB)?;
    let node = scene.node()?;
    let mut writers = Writers::start(&scene, 4, seed)?;
    for _ in 0..3 {
        writers.run_for(40)?;
        let known = take(&scene, &writers)?;
        ensure!(scene.daemon.stop()? == 0);
        ensure!(node.exists(), "the device did not stay");
        let file = std::fs::read(&scene.file)?;
        // Nobody writes now: requests wait.
        std::thread::sleep(Duration::from_millis(200));
        ensure!(std::fs::read(&scene.file)? == file, "the file was written");
        launch(&mut scene)?;
        ensure!(scene.node()? == node);
        writers.run_for(20)?;
        ensure!(scene.image(&known.id)? == known.bytes, "the image differs");
        scene.daemon.run(["snapshot", "destroy", &known.id])?;
    }
    writers.end(&mut scene)
}

#[test]
#[ignore = "needs a kernel with ublk: cargo xtask test --vm fei"]
fn a_device_that_nobody_uses_goes_with_the_agent_and_comes_back() -> Result<()> {
    let mut scene = Scene::new(4 * MIB)?;
    let node = scene.node()?;
    scene.write(MIB, &[5; 8192])?;
    for _ in 0..3 {
        ensure!(scene.daemon.stop()? == 0);
        ensure!(scene::gone(&node), "{} stays", node.display());
        launch(&mut scene)?;
        ensure!(scene.node()? == node, "it has another name");
        ensure!(scene.read(MIB, 8192)? == [5; 8192]);
    }
    // Killed while nobody uses it, too.
    scene.daemon.kill()?;
    launch(&mut scene)?;
    ensure!(scene.node()? == node);
    ensure!(scene.read(MIB, 8192)? == [5; 8192]);
    scene.daemon.run(["unserve", scene::NAME])?;
    ensure!(scene::gone(&node));
    ensure!(scene.daemon.stop()? == 0);
    launch(&mut scene)?;
    ensure!(!node.exists(), "{} is back", node.display());
    Ok(())
}

#[test]
#[ignore = "needs a kernel with ublk: cargo xtask test --vm fei"]
fn a_disk_that_is_gone_can_be_waited_for_or_given_up() -> Result<()> {
    let mut scene = Scene::new(4 * MIB)?;
    let node = scene.node()?;
    scene.write(MIB, &[5; 8192])?;
    let moved = scene.daemon.scratch().join("moved");
    scene.daemon.kill()?;
    std::fs::rename(&scene.file, &moved)?;
    launch(&mut scene)?;
    ensure!(scene.daemon.json(["served"])?["served"] == serde_json::json!([]));
    let device = scene::open(&node)?;
    let waiting = std::thread::spawn(move || scene::write(&device, 0, &[6; 4096]));
    // It is put back.
    scene.daemon.kill()?;
    std::fs::rename(&moved, &scene.file)?;
    launch(&mut scene)?;
    ensure!(
        waiting.join().is_ok_and(|written| written.is_ok()),
        "the write failed"
    );
    ensure!(scene.read(0, 4096)? == [6; 4096] && scene.read(MIB, 8192)? == [5; 8192]);
    // It is not.
    scene.daemon.kill()?;
    std::fs::rename(&scene.file, &moved)?;
    launch(&mut scene)?;
    let device = scene::open(&node)?;
    let waiting = std::thread::spawn(move || scene::write(&device, 0, &[7; 4096]));
    std::thread::sleep(Duration::from_millis(500));
    ensure!(!waiting.is_finished(), "the write did not wait");
    scene.daemon.run(["unserve", scene::NAME])?;
    ensure!(
        waiting.join().is_ok_and(|written| written.is_err()),
        "the write did not fail"
    );
    ensure!(scene::gone(&node));
    let again = scene.daemon.try_run(["unserve", scene::NAME])?;
    ensure!(
        again.code != 0 && again.stderr.contains("no such device"),
        "{again:?}"
    );
    Ok(())
}

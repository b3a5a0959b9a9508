//! Served disks as block devices of a kernel: /dev/ublkbN is the disk, byte for byte, and outlives the agent.
//!
//! What is written through the device is compared with a model in memory, with the file behind it, and with images of
//! snapshots that were taken in between. The seed of each run is printed; `BLKSNAP_SEED` repeats it.

mod bytes;
mod ends;
mod own_file;
mod scene;
mod writers;

use anyhow::{Result, ensure};
use blksnap_tests::{DaemonOptions, run, seed};
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use self::bytes::Model;
use self::scene::{MIB, Mounted, Scene};
use self::writers::Writers;

#[test]
#[ignore = "needs a kernel with ublk: cargo xtask test --vm fei"]
fn the_device_is_the_disk() -> Result<()> {
    let mut random = StdRng::seed_from_u64(seed("the_device_is_the_disk"));
    let scene = Scene::new(24 * MIB)?;
    let mut model = Model::fill(&scene, &mut random)?;
    for _ in 0..300 {
        model.step(&scene, &mut random)?;
    }
    model.check_device(&scene)?;
    // Durable is what was flushed; the disk of the agent is the file.
    scene.device()?.sync_all()?;
    model.check_file(&scene)
}

#[test]
#[ignore = "needs a kernel with ublk: cargo xtask test --vm fei"]
fn images_are_exact_while_the_device_is_written() -> Result<()> {
    let mut random = StdRng::seed_from_u64(seed("images_are_exact_while_the_device_is_written"));
    let scene = Scene::new(16 * MIB)?;
    let mut model = Model::fill(&scene, &mut random)?;
    let mut held = Vec::new();
    for _ in 0..3 {
        let id = scene.take()?;
        held.push((id, model.clone()));
        for _ in 0..60 {
            model.step(&scene, &mut random)?;
        }
        for (id, instant) in &held {
            instant.check_image(&scene, id)?;
        }
    }
    model.check_device(&scene)?;
    for (id, _) in &held {
        scene.daemon.run(["snapshot", "destroy", id])?;
    }
    model.check_device(&scene)
}

#[test]
#[ignore = "needs a kernel with ublk: cargo xtask test --vm fei"]
fn the_change_map_knows_what_was_written() -> Result<()> {
    let scene = Scene::new(16 * MIB)?;
    let first = scene.take()?;
    scene.daemon.run(["snapshot", "destroy", &first])?;
    scene.write(5 * MIB + 4096, &[7; 4096])?;
    scene.discard(9 * MIB, MIB)?;
    scene.take()?;
    let file = scene.file.as_os_str();
    let args = ["cbt".as_ref(), "extents".as_ref(), file, "--last".as_ref()];
    let answer = scene.daemon.json(args)?;
    let extents = answer["extents"].as_array().cloned().unwrap_or_default();
    let covers = |offset: u64| {
        extents.iter().any(|extent| {
            let start = extent["offset"].as_u64().unwrap_or(u64::MAX);
            offset >= start && offset - start < extent["length"].as_u64().unwrap_or(0)
        })
    };
    for (offset, changed) in [
        (5 * MIB + 4096, true),
        (9 * MIB, true),
        (10 * MIB - 512, true),
        (0, false),
        (14 * MIB, false),
    ] {
        ensure!(covers(offset) == changed, "byte {offset}: {answer}");
    }
    Ok(())
}

#[test]
#[ignore = "needs a kernel with ublk: cargo xtask test --vm fei"]
fn fio_finds_no_wrong_byte_with_a_snapshot_held() -> Result<()> {
    let scene = Scene::new(16 * MIB)?;
    scene.take()?;
    let node = format!("--filename={}", scene.node()?.display());
    // Every byte once in each pass, then read: fio finds errors on any disk that it wrote more of than its size.
    run(
        "fio",
        [
            "--name=verify",
            node.as_str(),
            "--rw=randwrite",
            "--bsrange=4k-128k",
            "--ioengine=libaio",
            "--iodepth=16",
            "--direct=1",
            "--size=16m",
            "--loops=3",
            "--fsync=64",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--randrepeat=0",
            "--output=/dev/null",
        ],
    )?;
    Ok(())
}

#[test]
#[ignore = "needs a kernel with ublk: cargo xtask test --vm fei"]
fn a_file_system_lives_on_it() -> Result<()> {
    let mut scene = Scene::new(64 * MIB)?;
    let node = scene.node()?;
    run("mkfs.ext4", ["-q".as_ref(), node.as_os_str()])?;
    let mounted = Mounted::new(&node, "rw")?;
    let place = mounted.0.path();
    let content: Vec<u8> = (0..3_u32 << 20).map(|at| at.to_le_bytes()[1]).collect();
    std::fs::write(place.join("before"), &content)?;
    run("sync", ["-f".as_ref(), place.as_os_str()])?;
    let id = scene.take()?;
    std::fs::write(place.join("after"), &content)?;
    std::fs::remove_file(place.join("before"))?;
    // The agent may end, and be killed, under the file system.
    ensure!(scene.daemon.stop()? == 0);
    scene.daemon.launch(&DaemonOptions::default())?;
    std::fs::write(place.join("later"), &content)?;
    scene.daemon.kill()?;
    scene.daemon.launch(&DaemonOptions::default())?;
    run("sync", ["-f".as_ref(), place.as_os_str()])?;
    for name in ["after", "later"] {
        ensure!(std::fs::read(place.join(name))? == content, "{name}");
    }
    let image = scene.daemon.scratch().join("image");
    std::fs::write(&image, scene.image(&id)?)?;
    scene.daemon.run(["snapshot", "destroy", &id])?;
    // Who has a file system on it must not lose it.
    let refused = scene.daemon.try_run(["unserve", scene::NAME])?;
    ensure!(
        refused.code != 0 && refused.stderr.contains("in use"),
        "{refused:?}"
    );
    drop(mounted);
    run("fsck.ext4", ["-fn".as_ref(), node.as_os_str()])?;
    // As after a power cut: with a journal that was not replayed.
    let mounted = Mounted::new(&image, "loop")?;
    let place = mounted.0.path();
    ensure!(std::fs::read(place.join("before"))? == content && !place.join("after").exists());
    drop(mounted);
    scene.daemon.run(["unserve", scene::NAME])?;
    ensure!(scene::gone(&node), "{} is there", node.display());
    run("fsck.ext4", ["-fn".as_ref(), scene.file.as_os_str()])?;
    Ok(())
}

#[test]
#[ignore = "needs a kernel with ublk: cargo xtask test --vm fei"]
fn a_write_that_waits_holds_up_no_read() -> Result<()> {
    let mut scene = Scene::new(16 * MIB)?;
    let before = scene.read(0, 4096)?;
    let mut writers = Writers::start(&scene, 20, 1)?;
    writers.run_for(40)?;
    for _ in 0..3 {
        // While it is taken, all writes wait; reads go on and see what was answered.
        let id = scene.take()?;
        ensure!(scene.read(0, 4096)?.len() == before.len());
        scene.daemon.run(["snapshot", "destroy", &id])?;
        writers.run_for(20)?;
    }
    writers.end(&mut scene)
}

#[test]
#[ignore = "needs a kernel with ublk: cargo xtask test --vm fei"]
fn doctor_finds_the_driver() -> Result<()> {
    let scene = Scene::new(MIB)?;
    let report = scene.daemon.try_run(["doctor"])?;
    ensure!(
        report.stdout.contains("served devices can be block devices"),
        "{report:?}"
    );
    Ok(())
}

//! Peers: a served block device, and the programs that people use with NBD.

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::nbd::{Request, cmd};
use blksnap_tests::{LoopDevice, LoopOptions, read_device, run, seed};
use rand::rngs::StdRng;
use rand::{RngCore as _, SeedableRng as _};

use crate::scene::{MIB, Scene, done, same, scribble, size, text};

#[test]
fn a_block_device_is_served_with_snapshots() -> Result<()> {
    let seed = seed("a_block_device_is_served_with_snapshots");
    let mut random = StdRng::seed_from_u64(seed);
    for sector_size in [0, 4096] {
        let options = LoopOptions {
            sector_size,
            ..LoopOptions::default()
        };
        // Dropped after the daemon, which has it open.
        let device = LoopDevice::with_options(8 * MIB, &options)?;
        let mut scene = Scene::new()?;
        let name = device.name();
        scene.serve_path(device.path(), &[])?;
        let mut disk = scene.client(&name)?;
        let mut memory = vec![0; size(8 * MIB)?];
        scribble(&mut disk, &mut memory, &mut random, 60)?;
        let taken = scene.snapshot(&[device.path()], &[])?;
        let original = memory.clone();
        let info = scene.info(&taken.id)?;
        ensure!(
            info["devices"][0]["device"] == device.path().display().to_string(),
            "{info}"
        );
        scribble(&mut disk, &mut memory, &mut random, 60)?;
        done(&mut disk, Request::new(cmd::FLUSH, 0, 0))?;
        same(&scene.image(&taken, &name)?, &original, "the image")?;
        same(&scene.content(&name)?, &memory, "the disk")?;
        same(&read_device(device.path())?, &memory, "the device")?;
        let next = scene.snapshot(&[device.path()], &[])?;
        ensure!(!scene.extents(device.path(), &["--last"])?.is_empty());
        same(&scene.image(&next, &name)?, &memory, "the next image")?;
        // A device does not say who wrote to it: a snapshot of it does not outlive the daemon, and says so.
        scene.daemon.kill()?;
        scene.launch()?;
        same(&scene.content(&name)?, &memory, "the disk after a kill")?;
        for lost in [&taken, &next] {
            let info = scene.info(&lost.id)?;
            ensure!(info["state"] == "corrupted", "{info}");
            ensure!(text(&info["reason"])?.contains("block device"), "{info}");
        }
        ensure!(scene.served(&name)?["cbt"]["began"] == "continuity_unproven");
    }
    Ok(())
}

/// A copy of an export by `program`, compared.
fn copied(scene: &Scene, program: &str, uri: &str, expected: &[u8]) -> Result<()> {
    let copy = scene.beside("copy");
    let target = copy.display().to_string();
    let uri = uri.to_owned();
    match program {
        "nbdcopy" => run("nbdcopy", ["--connections=4".to_owned(), uri, target])?,
        "qemu-img" => run(
            "qemu-img",
            ["convert", "-f", "raw", "-O", "raw", &uri, &target].map(str::to_owned),
        )?,
        _ => {
            let script = format!("nbdcopy \"$uri\" {target}");
            run(
                "nbdkit",
                ["-U", "-", "nbd", &format!("uri={uri}"), "--run", &script],
            )?
        }
    };
    same(&std::fs::read(&copy)?, expected, program)?;
    Ok(std::fs::remove_file(copy)?)
}

#[test]
fn other_programs_copy_images_and_disks() -> Result<()> {
    let seed = seed("other_programs_copy_images_and_disks");
    let mut random = StdRng::seed_from_u64(seed);
    let scene = Scene::new()?;
    let path = scene.serve("disk", 16 * MIB, seed, &[])?;
    let original = std::fs::read(&path)?;
    let mut memory = original.clone();
    let taken = scene.snapshot(&[&path], &[])?;
    // A whole image onto the disk, as one restores it.
    let source = scene.beside("source");
    random.fill_bytes(&mut memory[..size(10 * MIB)?]);
    memory[size(10 * MIB)?..].fill(0);
    std::fs::write(&source, &memory)?;
    let disk = scene.daemon.nbd_uri("disk");
    let from = source.display().to_string();
    run("nbdcopy", [&from, &disk])?;
    same(&std::fs::read(&path)?, &memory, "the file after nbdcopy")?;
    for program in ["nbdcopy", "qemu-img", "nbdkit"] {
        copied(&scene, program, &taken.uri("disk")?, &original)?;
        copied(&scene, program, &disk, &memory)?;
    }
    // Back to what the snapshot has, while it is held.
    run(
        "qemu-img",
        [
            "convert",
            "-n",
            "-f",
            "raw",
            "-O",
            "raw",
            &taken.uri("disk")?,
            &disk,
        ],
    )?;
    same(&std::fs::read(&path)?, &original, "the file after qemu-img")?;
    let compared = run(
        "qemu-img",
        ["compare", "-f", "raw", "-F", "raw", &taken.uri("disk")?, &disk],
    )?;
    ensure!(compared.contains("identical"), "{compared}");
    let listed = run("nbdinfo", ["--json", &taken.uri("disk")?])?;
    ensure!(
        serde_json::from_str::<serde_json::Value>(&listed).is_ok(),
        "{listed}"
    );
    Ok(())
}

#[test]
fn qemu_storage_daemon_uses_disk_and_image() -> Result<()> {
    let seed = seed("qemu_storage_daemon_uses_disk_and_image");
    let scene = Scene::new()?;
    let path = scene.serve("disk", 8 * MIB, seed, &[])?;
    let original = std::fs::read(&path)?;
    let taken = scene.snapshot(&[&path], &[])?;
    let socket = scene.beside("qemu.sock");
    let node = |name: &str, export: &str| {
        let server = scene.daemon.nbd_socket();
        format!(
            "driver=nbd,node-name={name},server.type=unix,server.path={},export={export},discard=unmap",
            server.display()
        )
    };
    let export = |name: &str| format!("type=nbd,id={name},node-name={name},name={name},writable=on");
    let mut qemu = Command::new("qemu-storage-daemon")
        .args(["--blockdev", &node("disk", "disk")])
        .args(["--blockdev", &node("image", &taken.export("disk")?)])
        .arg("--nbd-server")
        .arg(format!("addr.type=unix,addr.path={}", socket.display()))
        .args(["--export", &export("disk"), "--export", &export("image")])
        .stdin(Stdio::null())
        .spawn()
        .context("start qemu-storage-daemon")?;
    let outcome = through(&socket, &mut || Ok(qemu.try_wait()?.is_none()));
    qemu.kill()?;
    qemu.wait()?;
    outcome?;
    let mut memory = original.clone();
    memory[1 << 20..2 << 20].fill(7);
    same(&std::fs::read(&path)?, &memory, "the file")?;
    let mut image = original;
    image[3 << 20..4 << 20].fill(8);
    same(&scene.image(&taken, "disk")?, &image, "the image")
}

/// Writes to both exports of the server at `socket` and reads them back.
fn through(socket: &Path, lives: &mut dyn FnMut() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !socket.exists() {
        ensure!(
            lives()? && begun.elapsed() < Duration::from_secs(60),
            "qemu does not start"
        );
        sleep(Duration::from_millis(20));
    }
    for (name, command) in [("disk", "write -P 7 1M 1M"), ("image", "write -P 8 3M 1M")] {
        let uri = format!("nbd+unix:///{name}?socket={}", socket.display());
        let read = command.replace("write", "read");
        let said = run(
            "qemu-io",
            ["-f", "raw", &uri, "-c", command, "-c", "flush", "-c", &read],
        )?;
        ensure!(!said.contains("failed") && !said.contains("error"), "{said}");
    }
    Ok(())
}

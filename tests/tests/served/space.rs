//! Space: difference storage of each kind, its events, its end, and where it is.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::nbd::{Request, cmd, err};
use blksnap_tests::{LoopDevice, read_device, run, seed};
use rand::rngs::StdRng;
use rand::{RngCore as _, SeedableRng as _};
use serde_json::Value;

use crate::scene::{KIB, MIB, Scene, Taken, done, same, scribble, size, text};

/// All events that nobody has taken yet.
fn events(scene: &Scene, taken: &Taken) -> Result<Vec<Value>> {
    let mut events = Vec::new();
    loop {
        let answer = scene
            .daemon
            .try_run(["snapshot", "wait", &taken.id, "--timeout=0", "--output=json"])?;
        match answer.code {
            3 => return Ok(events),
            0 => events.push(serde_json::from_str(&answer.stdout)?),
            _ => anyhow::bail!("{answer:?}"),
        }
    }
}

/// Writes to each chunk of a disk.
fn rewrite(scene: &Scene, name: &str, from: u64, to: u64) -> Result<()> {
    let mut disk = scene.client(name)?;
    for offset in (from..to).step_by(size(256 * KIB)?) {
        let length = (to - offset).min(256 * KIB);
        done(&mut disk, Request::write(offset, vec![0xee; size(length)?]))?;
    }
    disk.disconnect()
}

#[test]
fn without_space_the_disk_goes_on_and_the_image_is_lost() -> Result<()> {
    let seed = seed("without_space_the_disk_goes_on_and_the_image_is_lost");
    for storage in ["memory:2M", "dir", "file"] {
        let scene = Scene::new()?;
        let path = scene.serve("disk", 8 * MIB, seed, &[])?;
        // No holes: zeroes that nobody wrote take no room.
        let mut data = vec![0; size(8 * MIB)?];
        StdRng::seed_from_u64(seed).fill_bytes(&mut data);
        let mut disk = scene.client("disk")?;
        for (piece, bytes) in data.chunks(size(MIB)?).enumerate() {
            done(&mut disk, Request::write(piece as u64 * MIB, bytes.to_vec()))?;
        }
        let place = match storage {
            "dir" => {
                let directory = scene.beside("more");
                std::fs::create_dir(&directory)?;
                format!("--storage={},limit=2M", directory.display())
            }
            "file" => {
                let file = scene.beside("diff");
                std::fs::File::create(&file)?.set_len(2 * MIB)?;
                format!("--storage={}", file.display())
            }
            memory => format!("--storage={memory}"),
        };
        let small = scene.snapshot(&[&path], &[&place, "--no-autogrow", "--minimum=1M"])?;
        let large = scene.snapshot(&[&path], &[])?;
        let mut image = scene.client(&small.export("disk")?)?;
        rewrite(&scene, "disk", 0, MIB)?;
        same(
            &image.read(0, MIB)?,
            &data[..size(MIB)?],
            "the image while there is space",
        )?;
        ensure!(scene.info(&small.id)?["state"] == "taken");
        rewrite(&scene, "disk", MIB, 8 * MIB)?;
        ensure!(
            std::fs::read(&path)?.iter().all(|byte| *byte == 0xee),
            "{storage}"
        );
        // The image answers everything with an error, also what it had.
        for request in [
            Request::new(cmd::READ, 0, 4096),
            Request::new(cmd::READ, 7 * MIB, 4096),
            Request::write(0, vec![1; 512]),
        ] {
            let answer = image.ask(request)?;
            ensure!(
                answer.error == err::EIO,
                "{storage}: {} {}",
                answer.error,
                answer.message
            );
        }
        let info = scene.info(&small.id)?;
        ensure!(info["state"] == "corrupted", "{info}");
        ensure!(
            info["devices"][0]["image"]["error_code"] == libc::ENOSPC,
            "{info}"
        );
        ensure!(text(&info["reason"])?.contains("No space"), "{info}");
        let told = events(&scene, &small)?;
        let corrupted: Vec<_> = told.iter().filter(|event| event["code"] == 1).collect();
        ensure!(corrupted.len() == 1, "{told:?}");
        ensure!(corrupted[0]["err_code"] == libc::ENOSPC, "{told:?}");
        ensure!(corrupted[0]["device"] == path.display().to_string(), "{told:?}");
        ensure!(
            told.iter().any(|event| event["event"] == "low_free_space"),
            "{told:?}"
        );
        // The other snapshot of the disk is whole.
        same(&scene.image(&large, "disk")?, &data, "the image with space")?;
        ensure!(scene.info(&large.id)?["state"] == "taken");
        // More writes, another snapshot: all goes on.
        let mut memory = std::fs::read(&path)?;
        scribble(&mut disk, &mut memory, &mut StdRng::seed_from_u64(seed), 30)?;
        same(&std::fs::read(&path)?, &memory, "the file")?;
        scene.destroy(&small)?;
        same(&scene.image(&large, "disk")?, &data, "the image at the end")?;
    }
    Ok(())
}

#[test]
fn storage_that_is_appended_in_time_saves_the_image() -> Result<()> {
    let seed = seed("storage_that_is_appended_in_time_saves_the_image");
    let scene = Scene::new()?;
    let path = scene.serve("disk", 8 * MIB, seed, &[])?;
    let original = std::fs::read(&path)?;
    let taken = scene.snapshot(
        &[&path],
        &["--storage=memory:2M", "--minimum=1M", "--no-autogrow"],
    )?;
    let mut asked = 0;
    for piece in 0..8 {
        rewrite(&scene, "disk", piece * MIB, (piece + 1) * MIB)?;
        for event in events(&scene, &taken)? {
            ensure!(event["event"] == "low_free_space", "{event}");
            ensure!(event["requested_nr_sect"] == 2048, "{event}");
            scene.daemon.run(["snapshot", "append", &taken.id, "memory:2M"])?;
            asked += 1;
        }
    }
    ensure!(asked > 1, "asked {asked} times");
    let info = scene.info(&taken.id)?;
    ensure!(info["state"] == "taken", "{info}");
    ensure!(
        info["usage"]["regions"].as_u64().context("regions")? == asked + 1,
        "{info}"
    );
    same(&scene.image(&taken, "disk")?, &original, "the image")
}

#[test]
fn a_directory_grows_by_itself_and_says_so() -> Result<()> {
    let seed = seed("a_directory_grows_by_itself_and_says_so");
    let mut scene = Scene::new()?;
    let path = scene.serve("disk", 8 * MIB, seed, &[])?;
    let original = std::fs::read(&path)?;
    let taken = scene.snapshot(&[&path], &["--minimum=1M"])?;
    rewrite(&scene, "disk", 0, 4 * MIB)?;
    let told = events(&scene, &taken)?;
    ensure!(told.len() > 2, "{told:?}");
    ensure!(
        told.iter().all(|event| event["event"] == "low_free_space"),
        "{told:?}"
    );
    same(&scene.image(&taken, "disk")?, &original, "the image")?;
    // It goes on growing after the next daemon took over.
    scene.daemon.kill()?;
    scene.launch()?;
    rewrite(&scene, "disk", 4 * MIB, 8 * MIB)?;
    same(&scene.image(&taken, "disk")?, &original, "the image after a kill")?;
    let used = scene.info(&taken.id)?["usage"]["used"].as_u64().context("used")?;
    ensure!(used > 4 * MIB, "{used} bytes used");
    scene.destroy(&taken)?;
    ensure!(
        std::fs::read_dir(scene.daemon.storage())?.count() == 0,
        "files are left"
    );
    Ok(())
}

#[test]
fn storage_of_several_kinds_at_once_outlives_a_kill() -> Result<()> {
    let seed = seed("storage_of_several_kinds_at_once_outlives_a_kill");
    let mut random = StdRng::seed_from_u64(seed);
    for volatile in [false, true] {
        // Dropped after the daemon, which has it open.
        let device = LoopDevice::new(16 * MIB)?;
        let mut scene = Scene::new()?;
        let path = scene.serve("disk", 12 * MIB, seed, &[])?;
        let original = std::fs::read(&path)?;
        let mut memory = original.clone();
        let file = scene.beside("diff");
        std::fs::File::create(&file)?.set_len(MIB)?;
        let directory = scene.beside("more");
        std::fs::create_dir(&directory)?;
        // Two ranges of 1 MiB, with a gap that is nobody's.
        let mut places = vec![
            format!("--storage={}:2048+2048:8192+2048", device.path().display()),
            format!("--storage={}", file.display()),
            format!("--storage={},limit=64M", directory.display()),
        ];
        if volatile {
            places.insert(0, "--storage=memory:1M".to_owned());
        }
        let more: Vec<&str> = places.iter().map(String::as_str).collect();
        let taken = scene.snapshot(&[&path], &more)?;
        rewrite(&scene, "disk", 0, 12 * MIB)?;
        memory.fill(0xee);
        let usage = scene.info(&taken.id)?["usage"].clone();
        ensure!(usage["regions"] == places.len() + 1, "{usage}");
        same(&scene.image(&taken, "disk")?, &original, "the image")?;
        let bytes = read_device(device.path())?;
        for range in [0..2048, 4096..8192, 10240..32768] {
            let gap = &bytes[range.start * 512..range.end * 512];
            ensure!(
                gap.iter().all(|byte| *byte == 0),
                "sectors {range:?} were written"
            );
        }
        ensure!(bytes.iter().any(|byte| *byte != 0), "the device was not used");
        scene.daemon.kill()?;
        scene.launch()?;
        same(&std::fs::read(&path)?, &memory, "the file")?;
        let info = scene.info(&taken.id)?;
        if volatile {
            ensure!(info["state"] == "corrupted", "{info}");
        } else {
            ensure!(info["state"] == "taken", "{info}");
            scribble(&mut scene.client("disk")?, &mut memory, &mut random, 20)?;
            same(&scene.image(&taken, "disk")?, &original, "the image after a kill")?;
        }
        scene.destroy(&taken)?;
    }
    Ok(())
}

/// The bytes of these extents of one device, in their order.
fn bytes_at(extents: &[Value], node: &Path) -> Result<Vec<u8>> {
    let device = std::fs::File::open(node)?;
    let mut bytes = Vec::new();
    for extent in extents {
        let number = |name: &str| extent[name].as_u64().context("a number");
        let mut part = vec![0; size(number("count")? * 512)?];
        device.read_exact_at(&mut part, number("sector")? * 512)?;
        bytes.extend(part);
    }
    Ok(bytes)
}

#[test]
fn the_extents_of_the_storage_have_the_old_data() -> Result<()> {
    let seed = seed("the_extents_of_the_storage_have_the_old_data");
    // Dropped after the daemon, which has a file in it.
    let mut device = LoopDevice::new(96 * MIB)?;
    device.mkfs("ext4")?;
    let mount = device.mount()?;
    let scene = Scene::new()?;
    let path = scene.serve("disk", 4 * MIB, seed, &[])?;
    let original = std::fs::read(&path)?;
    let place = format!("--storage={}", mount.display());
    let taken = scene.snapshot(&[&path], &[&place, "--promise=power-cut"])?;
    rewrite(&scene, "disk", 0, 4 * MIB)?;
    same(&scene.image(&taken, "disk")?, &original, "the image")?;
    // On the device, not in its page cache.
    run("sync", ["-f".as_ref(), mount.as_os_str()])?;
    let answer = scene.daemon.json(["snapshot", "storage", &taken.id])?;
    let extents = answer["extents"].as_array().context("extents")?;
    ensure!(!extents.is_empty(), "{answer}");
    let devices: BTreeMap<String, usize> = extents.iter().fold(BTreeMap::new(), |mut found, extent| {
        *found.entry(extent["device"].to_string()).or_default() += 1;
        found
    });
    ensure!(devices.len() == 1, "{devices:?}");
    let kept = bytes_at(extents, device.path())?;
    // Each chunk of the disk that is not all zeroes is there.
    let (mut found, mut all) = (0, 0);
    for chunk in original.chunks(size(256 * KIB)?) {
        if chunk.iter().all(|byte| *byte == 0) {
            continue;
        }
        all += 1;
        let places = kept.chunks(size(4 * KIB)?).enumerate();
        let mut starts = places.filter(|(_, sector)| chunk.starts_with(sector));
        found += u32::from(starts.any(|(at, _)| kept[at * 4096..].starts_with(chunk)));
    }
    ensure!(all > 0 && found == all, "{found} of {all} chunks");
    let shown = scene.daemon.run(["snapshot", "storage", &taken.id])?;
    ensure!(shown.contains("SECTOR"), "{shown}");
    scene.destroy(&taken)
}

#[test]
fn storage_on_the_disk_itself_is_in_no_image_and_in_no_map() -> Result<()> {
    let seed = seed("storage_on_the_disk_itself_is_in_no_image_and_in_no_map");
    let mut random = StdRng::seed_from_u64(seed);
    // Dropped after the daemon, which has it open.
    let device = LoopDevice::new(32 * MIB)?;
    let mut original = vec![0; size(32 * MIB)?];
    random.fill_bytes(&mut original);
    std::fs::File::options()
        .write(true)
        .open(device.path())?
        .write_all_at(&original, 0)?;
    let scene = Scene::new()?;
    let node = device.path();
    scene.serve_path(node, &["--name=disk"])?;
    // The whole disk is no place for its own old data.
    let whole = format!("--storage={}", node.display());
    let refused = scene
        .daemon
        .try_run(["snapshot", "create", &node.display().to_string(), &whole])?;
    ensure!(refused.code == 1, "{refused:?}");

    let (first, last) = (16 * MIB, 28 * MIB);
    let range = |from: u64, to: u64| format!("{}:{}+{}", node.display(), from / 512, (to - from) / 512);
    let place = format!("--storage={}", range(first, 20 * MIB));
    let taken = scene.snapshot(&[node], &[&place])?;
    let other = scene.snapshot(&[node], &[])?;
    // More than the first 4 MiB can hold.
    scene
        .daemon
        .run(["snapshot", "append", &taken.id, &range(20 * MIB, last)])?;
    let mut memory = original.clone();
    let below = size(first)?;
    scribble(
        &mut scene.client("disk")?,
        &mut memory[..below / 2],
        &mut random,
        300,
    )?;
    let outside = [0..below, size(last)?..original.len()];
    for snapshot in [&taken, &other] {
        let image = scene.image(snapshot, "disk")?;
        for part in outside.clone() {
            same(&image[part.clone()], &original[part], "the image")?;
        }
    }
    let served = scene.content("disk")?;
    for part in outside {
        same(&served[part.clone()], &memory[part], "the disk")?;
    }
    let used = served[below..size(last)?]
        .iter()
        .zip(&original[below..])
        .any(|(one, two)| one != two);
    ensure!(used, "the range was not used");
    let later = scene.snapshot(&[node], &[])?;
    let changed = scene.extents(node, &["--since", &taken.base("disk")?])?;
    scene.destroy(&later)?;
    ensure!(!changed.is_empty());
    ensure!(
        changed.iter().all(|(offset, length)| offset + length <= first),
        "{changed:?}"
    );

    // Who writes there all the same destroys that snapshot, and no other, and is not refused.
    let data = vec![0x5a; size(4 * KIB)?];
    let mut disk = scene.client("disk")?;
    done(&mut disk, Request::write(24 * MIB + 512, data.clone()))?;
    ensure!(disk.read(24 * MIB + 512, 4 * KIB)? == data);
    let info = scene.info(&taken.id)?;
    ensure!(info["state"] == "corrupted", "{info}");
    let told = events(&scene, &taken)?;
    let broken = told.iter().find(|event| event["event"] == "corrupted");
    let reason = text(&broken.context("no event")?["reason"])?;
    ensure!(reason.contains("difference storage"), "{reason}");
    let mut image = scene.client(&taken.export("disk")?)?;
    let answer = image.ask(Request::new(cmd::READ, 0, 512))?;
    ensure!(answer.error == err::EIO, "{}", answer.error);
    same(
        &scene.image(&other, "disk")?[..below],
        &original[..below],
        "the other image",
    )?;
    scene.destroy(&taken)?;
    scene.destroy(&other)
}

#[test]
fn who_writes_over_storage_on_a_disk_loses_the_images_of_all_disks() -> Result<()> {
    let seed = seed("who_writes_over_storage_on_a_disk");
    // Dropped after the daemon, which has it open.
    let device = LoopDevice::new(16 * MIB)?;
    let scene = Scene::new()?;
    let node = device.path();
    scene.serve_path(node, &["--name=disk"])?;
    let file = scene.serve("other", 8 * MIB, seed, &[])?;
    let before = std::fs::read(&file)?;
    let place = format!("--storage={}:{}+{}", node.display(), 8 * MIB / 512, 8 * MIB / 512);
    let taken = scene.snapshot(&[node, &file], &[&place])?;
    let apart = scene.snapshot(&[&file], &[])?;
    rewrite(&scene, "other", 0, MIB)?;
    same(&scene.image(&taken, "other")?, &before, "the image")?;
    // Nothing of this disk was stored; what is written over is of the other one.
    done(
        &mut scene.client("disk")?,
        Request::write(8 * MIB, vec![1; size(4 * KIB)?]),
    )?;
    let info = scene.info(&taken.id)?;
    ensure!(info["state"] == "corrupted", "{info}");
    for name in ["disk", "other"] {
        let mut image = scene.client(&taken.export(name)?)?;
        let answer = image.ask(Request::new(cmd::READ, 0, 512))?;
        ensure!(answer.error == err::EIO, "{name}: {}", answer.error);
    }
    same(
        &scene.image(&apart, "other")?,
        &before,
        "an image stored elsewhere",
    )?;
    rewrite(&scene, "other", MIB, 2 * MIB)?;
    scene.destroy(&taken)?;
    scene.destroy(&apart)
}

//! Change maps of served disks: right between takes, over kills and stops, and never silently wrong.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use blksnap_tests::nbd::{Request, cmd};
use blksnap_tests::{LoopDevice, run, seed};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::Value;

use crate::scene::{KIB, MIB, Scene, Taken, blocks, done, same, scribble, text};

/// Longer than a lease of the daemon: what is written after so long is seen.
const LEASE: Duration = Duration::from_millis(1600);

/// The blocks in which two disks differ.
fn differing(one: &[u8], two: &[u8], block: usize) -> BTreeSet<u64> {
    let pairs = one.chunks(block).zip(two.chunks(block)).enumerate();
    pairs
        .filter(|(_, (one, two))| one != two)
        .map(|(number, _)| number as u64)
        .collect()
}

/// The generation of the map, and why it began.
fn generation(scene: &Scene, name: &str) -> Result<(String, String)> {
    let cbt = &scene.served(name)?["cbt"];
    Ok((text(&cbt["generation_id"])?, text(&cbt["began"])?))
}

#[test]
fn extents_are_what_two_images_differ_in() -> Result<()> {
    let seed = seed("extents_are_what_two_images_differ_in");
    let mut random = StdRng::seed_from_u64(seed);
    for (block, option) in [(4 * KIB, "--block-size=4K"), (64 * KIB, "--block-size=64K")] {
        let scene = Scene::new()?;
        let path = scene.serve("disk", 6 * MIB + 1024, seed, &[option])?;
        let mut memory = std::fs::read(&path)?;
        let mut disk = scene.client("disk")?;
        let mut takes: Vec<(Taken, Vec<u8>, BTreeSet<u64>)> = Vec::new();
        for _ in 0..4 {
            let count = random.random_range(0..40);
            let ranges = scribble(&mut disk, &mut memory, &mut random, count)?;
            let trim = random.random_range(0..4 * MIB);
            done(&mut disk, Request::new(cmd::TRIM, trim, 100_000))?;
            memory.copy_from_slice(&std::fs::read(&path)?);
            let taken = scene.snapshot(&[&path], &[])?;
            let image = scene.image(&taken, "disk")?;
            same(&image, &memory, "the image")?;
            let mut touched = blocks(&ranges, block);
            touched.extend(blocks(&[(trim, 100_000)], block));
            if let Some((_, before, _)) = takes.last() {
                let told = blocks(&scene.extents(&path, &["--last"])?, block);
                let differ = differing(before, &image, usize::try_from(block)?);
                ensure!(differ.is_subset(&told), "missed: {:?}", &differ - &told);
                ensure!(told == touched, "{:?}", &told ^ &touched);
            }
            for (base, before, _) in &takes {
                let since = format!("--since={}", base.base("disk")?);
                let told = blocks(&scene.extents(&path, &[&since])?, block);
                let differ = differing(before, &image, usize::try_from(block)?);
                ensure!(differ.is_subset(&told), "missed: {:?}", &differ - &told);
            }
            takes.push((taken, image, touched));
        }
        let since = format!("--since={}", takes[0].0.base("disk")?);
        let all: BTreeSet<u64> = takes[1..]
            .iter()
            .flat_map(|(_, _, touched)| touched)
            .copied()
            .collect();
        let told = blocks(&scene.extents(&path, &[&since])?, block);
        ensure!(told == all, "{:?}", &told ^ &all);
    }
    Ok(())
}

#[test]
fn a_map_goes_on_after_kills_and_misses_nothing() -> Result<()> {
    const BLOCK: u64 = 16 * KIB;
    let seed = seed("a_map_goes_on_after_kills_and_misses_nothing");
    let mut random = StdRng::seed_from_u64(seed);
    let mut scene = Scene::new()?;
    let path = scene.serve("disk", 8 * MIB, seed, &["--block-size=16K"])?;
    let mut memory = std::fs::read(&path)?;
    let base = scene.snapshot(&[&path], &[])?;
    let original = memory.clone();
    let (before, _) = generation(&scene, "disk")?;
    let since = format!("--since={}", base.base("disk")?);
    let mut all = BTreeSet::new();
    for round in 0..5 {
        let mut disk = scene.client("disk")?;
        let count = random.random_range(0..12);
        let ranges = scribble(&mut disk, &mut memory, &mut random, count)?;
        all.extend(blocks(&ranges, BLOCK));
        if round == 2 {
            // What is written to an image is kept in the map, too.
            let mut image = scene.client(&base.export("disk")?)?;
            done(
                &mut image,
                Request::write(5 * MIB, original[5 << 20..][..100].to_vec()),
            )?;
            all.extend(blocks(&[(5 * MIB, 100)], BLOCK));
        }
        if round == 4 {
            ensure!(scene.daemon.stop()? == 0);
        } else {
            scene.daemon.kill()?;
        }
        scene.launch()?;
        let (after, _) = generation(&scene, "disk")?;
        ensure!(after == before, "{after} after {before}: {}", scene.daemon.log());
        ensure!(scene.served("disk")?["unproven"].is_null());
        same(&std::fs::read(&path)?, &memory, "the file")?;
        same(&scene.image(&base, "disk")?, &original, "the image")?;
        if round % 2 == 1 {
            let taken = scene.snapshot(&[&path], &[])?;
            let told = blocks(&scene.extents(&path, &[&since])?, BLOCK);
            ensure!(told == all, "round {round}: {:?}", &told ^ &all);
            scene.destroy(&taken)?;
        }
    }
    let taken = scene.snapshot(&[&path], &[])?;
    let told = blocks(&scene.extents(&path, &[&since])?, BLOCK);
    ensure!(told == all, "{:?}", &told ^ &all);
    same(&scene.image(&taken, "disk")?, &memory, "the last image")
}

/// The image is declared lost for this reason, and can't be read.
fn lost(scene: &Scene, taken: &Taken, reason: &str) -> Result<()> {
    let info = scene.info(&taken.id)?;
    ensure!(info["state"] == "corrupted", "{info}");
    ensure!(text(&info["reason"])?.contains(reason), "{info}");
    let event = scene
        .daemon
        .json(["snapshot", "wait", &taken.id, "--timeout=0"])?;
    ensure!(event["event"] == "corrupted" && event["code"] == 1, "{event}");
    ensure!(text(&event["reason"])?.contains(reason), "{event}");
    if let Ok(mut client) = scene.client(&taken.export("disk")?) {
        let answer = client.ask(Request::new(cmd::READ, 0, 512))?;
        ensure!(answer.error != 0, "a lost image is readable");
    }
    scene.destroy(taken)
}

/// Another generation began for this reason; the file is served, and can be taken.
fn began_anew(scene: &Scene, path: &Path, before: &str, base: &Taken) -> Result<()> {
    let (after, why) = generation(scene, "disk")?;
    ensure!(after != before, "{after} goes on: {}", scene.daemon.log());
    ensure!(why == "continuity_unproven", "{why}");
    let taken = scene.snapshot(&[path], &[])?;
    same(
        &scene.image(&taken, "disk")?,
        &std::fs::read(path)?,
        "the next image",
    )?;
    let since = format!("--since={}", base.base("disk")?);
    let arguments = [
        "cbt".as_ref(),
        "extents".as_ref(),
        path.as_os_str(),
        since.as_ref(),
    ];
    let answer = scene
        .daemon
        .try_run(arguments.into_iter().chain(["--output=json".as_ref()]))?;
    ensure!(
        answer.stdout.contains("full_needed") || answer.code != 0,
        "{answer:?}"
    );
    scene.destroy(&taken)
}

#[test]
fn what_somebody_else_wrote_is_seen() -> Result<()> {
    let seed = seed("what_somebody_else_wrote_is_seen");
    for clean in [false, true] {
        let mut scene = Scene::new()?;
        let path = scene.serve("disk", 4 * MIB, seed, &[])?;
        let mut disk = scene.client("disk")?;
        let base = scene.snapshot(&[&path], &[])?;
        done(&mut disk, Request::write(MIB, vec![1; 4096]))?;
        let (before, _) = generation(&scene, "disk")?;
        if clean {
            scene.daemon.stop()?;
        } else {
            scene.daemon.kill()?;
        }
        sleep(LEASE);
        let target = format!("of={}", path.display());
        run(
            "dd",
            [
                "if=/dev/urandom",
                &target,
                "bs=4k",
                "count=1",
                "seek=99",
                "conv=notrunc",
                "status=none",
            ],
        )?;
        scene.launch()?;
        let why = text(&scene.served("disk")?["unproven"])?;
        ensure!(why.contains("written while no agent served it"), "{why}");
        lost(&scene, &base, "written while no agent served it")?;
        began_anew(&scene, &path, &before, &base)?;
    }
    Ok(())
}

#[test]
fn another_file_is_another_disk() -> Result<()> {
    let seed = seed("another_file_is_another_disk");
    let mut scene = Scene::new()?;
    let path = scene.serve("disk", 4 * MIB, seed, &[])?;
    let base = scene.snapshot(&[&path], &[])?;
    let (before, _) = generation(&scene, "disk")?;
    scene.daemon.kill()?;
    // With the same content, size and times.
    let copy = scene.beside("copy");
    run("cp", ["-a".as_ref(), path.as_os_str(), copy.as_os_str()])?;
    std::fs::rename(&copy, &path)?;
    scene.launch()?;
    lost(&scene, &base, "another disk is there")?;
    let (after, why) = generation(&scene, "disk")?;
    ensure!(after != before && why == "device_replaced", "{why}");
    // A longer one is told, too.
    let base = scene.snapshot(&[&path], &[])?;
    ensure!(scene.daemon.stop()? == 0);
    std::fs::File::options()
        .write(true)
        .open(&path)?
        .set_len(5 * MIB)?;
    scene.launch()?;
    lost(&scene, &base, "its size")?;
    ensure!(generation(&scene, "disk")?.1 == "resized");
    ensure!(scene.served("disk")?["size"] == Value::from(5 * MIB));
    Ok(())
}

#[test]
fn a_missing_file_loses_its_snapshots_only() -> Result<()> {
    let seed = seed("a_missing_file_loses_its_snapshots_only");
    let mut scene = Scene::new()?;
    let path = scene.serve("disk", 4 * MIB, seed, &[])?;
    let other = scene.serve("other", 4 * MIB, seed ^ 1, &[])?;
    let base = scene.snapshot(&[&path], &[])?;
    let kept = scene.snapshot(&[&other], &[])?;
    scene.daemon.kill()?;
    let away = scene.beside("away");
    std::fs::rename(&path, &away)?;
    scene.launch()?;
    let info = scene.info(&base.id)?;
    ensure!(info["state"] == "corrupted", "{info}");
    ensure!(text(&info["reason"])?.contains("not served any more"), "{info}");
    same(
        &scene.image(&kept, "other")?,
        &std::fs::read(&other)?,
        "the other image",
    )?;
    scene.destroy(&base)
}

#[test]
fn a_snapshot_that_was_lost_never_comes_back() -> Result<()> {
    let seed = seed("a_snapshot_that_was_lost_never_comes_back");
    // What is hidden from the second daemon: a file of the snapshot, a journal, or the file of another disk in it.
    for hidden in ["disk", "journal", "other"] {
        let mut scene = Scene::new()?;
        let path = scene.serve("disk", 4 * MIB, seed, &[])?;
        let other = scene.serve("other", 4 * MIB, seed ^ 1, &[])?;
        let base = scene.snapshot(&[&path, &other], &[])?;
        scene.daemon.kill()?;
        let file = match hidden {
            "disk" => path.clone(),
            "other" => other.clone(),
            _ => scene
                .daemon
                .state_dir()
                .join("snapshots")
                .join(&base.id)
                .join("journal-0"),
        };
        let away = scene.beside("away");
        std::fs::rename(&file, &away)?;
        scene.launch()?;
        ensure!(scene.info(&base.id)?["state"] == "corrupted", "{hidden}");
        // The disk is written without the snapshot.
        std::fs::rename(&away, &file)?;
        if hidden == "disk" {
            scene.serve_path(&path, &[])?;
        }
        done(&mut scene.client("disk")?, Request::write(MIB, vec![1; 4096]))?;
        scene.daemon.kill()?;
        scene.launch()?;
        lost(&scene, &base, "served without the snapshot")?;
    }
    Ok(())
}

#[test]
fn a_daemon_killed_before_it_serves_again_loses_nothing() -> Result<()> {
    let seed = seed("a_daemon_killed_before_it_serves_again_loses_nothing");
    let mut scene = Scene::new()?;
    let path = scene.serve("disk", 4 * MIB, seed, &[])?;
    let before = std::fs::read(&path)?;
    let taken = scene.snapshot(&[&path], &[])?;
    let left = scene.daemon.state_dir().join("served/disk/left");
    done(&mut scene.client("disk")?, Request::write(MIB, vec![1; 4096]))?;
    // As if each had been killed after it resumed the snapshot and before it said that it serves the disk.
    for _ in 0..2 {
        let said = std::fs::read(&left)?;
        scene.daemon.kill()?;
        scene.launch()?;
        same(&scene.image(&taken, "disk")?, &before, "the image")?;
        scene.daemon.kill()?;
        std::fs::write(&left, said)?;
        scene.launch()?;
        ensure!(scene.info(&taken.id)?["state"] == "taken");
        same(&scene.image(&taken, "disk")?, &before, "the image after")?;
    }
    Ok(())
}

/// A daemon in a boot that the test makes.
fn booted(file: &str) -> Result<(Scene, tempfile::TempDir)> {
    let directory = tempfile::tempdir()?;
    let boot = directory.path().join("boot");
    std::fs::write(&boot, file)?;
    let scene = Scene::with(&[OsStr::new("--boot-id"), boot.as_os_str()])?;
    Ok((scene, directory))
}

#[test]
fn a_clean_stop_outlives_the_boot_and_a_kill_does_not() -> Result<()> {
    let seed = seed("a_clean_stop_outlives_the_boot_and_a_kill_does_not");
    let mut random = StdRng::seed_from_u64(seed);
    let (mut scene, root) = booted("boot-1\n")?;
    let boot = root.path().join("boot");
    let path = scene.serve("disk", 4 * MIB, seed, &["--block-size=4K"])?;
    let original = std::fs::read(&path)?;
    let mut memory = original.clone();
    let base = scene.snapshot(&[&path], &[])?;
    let (before, _) = generation(&scene, "disk")?;
    let mut written = scribble(&mut scene.client("disk")?, &mut memory, &mut random, 20)?;
    ensure!(scene.daemon.stop()? == 0);
    std::fs::write(&boot, "boot-2\n")?;
    scene.launch()?;
    ensure!(generation(&scene, "disk")?.0 == before, "{}", scene.daemon.log());
    same(
        &scene.image(&base, "disk")?,
        &original,
        "the image after the boot",
    )?;
    written.extend(scribble(
        &mut scene.client("disk")?,
        &mut memory,
        &mut random,
        20,
    )?);
    same(
        &scene.image(&base, "disk")?,
        &original,
        "the image after more writes",
    )?;
    let next = scene.snapshot(&[&path], &[])?;
    let since = format!("--since={}", base.base("disk")?);
    let told = blocks(&scene.extents(&path, &[&since])?, 4 * KIB);
    ensure!(told == blocks(&written, 4 * KIB));
    scene.destroy(&next)?;
    scene.daemon.kill()?;
    std::fs::write(&boot, "boot-3\n")?;
    scene.launch()?;
    lost(&scene, &base, "the system went down while it was")?;
    began_anew(&scene, &path, &before, &base)?;
    same(&std::fs::read(&path)?, &memory, "the file")
}

#[test]
fn a_promise_of_power_cuts_outlives_a_kill_and_a_boot() -> Result<()> {
    let seed = seed("a_promise_of_power_cuts_outlives_a_kill_and_a_boot");
    let mut random = StdRng::seed_from_u64(seed);
    let (mut scene, root) = booted("boot-1\n")?;
    let path = scene.serve("disk", 4 * MIB, seed, &[])?;
    let original = std::fs::read(&path)?;
    let mut memory = original.clone();
    let kept = scene.snapshot(&[&path], &["--promise=power-cut"])?;
    let fragile = scene.snapshot(&[&path], &["--promise=agent-crash"])?;
    let volatile = scene.snapshot(&[&path], &["--promise=nothing"])?;
    let (before, _) = generation(&scene, "disk")?;
    scribble(&mut scene.client("disk")?, &mut memory, &mut random, 30)?;
    for taken in [&kept, &fragile, &volatile] {
        same(
            &scene.image(taken, "disk")?,
            &original,
            "an image before the kill",
        )?;
    }
    scene.daemon.kill()?;
    std::fs::write(root.path().join("boot"), "boot-2\n")?;
    scene.launch()?;
    same(&std::fs::read(&path)?, &memory, "the file")?;
    same(&scene.image(&kept, "disk")?, &original, "the image that survives")?;
    lost(&scene, &fragile, "went down while it was held")?;
    // The map's notes may be lost with the page cache: it begins anew, the snapshot does not.
    let (after, why) = generation(&scene, "disk")?;
    ensure!(after != before && why == "continuity_unproven", "{why}");
    let gone = scene.daemon.try_run(["snapshot", "info", &volatile.id])?;
    ensure!(gone.code != 0 && gone.stderr.contains("no snapshot"), "{gone:?}");
    scribble(&mut scene.client("disk")?, &mut memory, &mut random, 30)?;
    same(
        &scene.image(&kept, "disk")?,
        &original,
        "the image that survives, after more writes",
    )
}

#[test]
fn a_promise_of_nothing_ends_with_the_daemon() -> Result<()> {
    let seed = seed("a_promise_of_nothing_ends_with_the_daemon");
    for clean in [true, false] {
        let mut scene = Scene::new()?;
        let path = scene.serve("disk", 4 * MIB, seed, &[])?;
        let taken = scene.snapshot(&[&path], &["--promise=nothing"])?;
        let (before, _) = generation(&scene, "disk")?;
        done(&mut scene.client("disk")?, Request::write(0, vec![7; 9000]))?;
        if clean {
            ensure!(scene.daemon.stop()? == 0);
        } else {
            scene.daemon.kill()?;
        }
        scene.launch()?;
        let list = scene.daemon.json(["snapshot", "list"])?;
        ensure!(list["snapshots"] == Value::Array(Vec::new()), "{list}");
        ensure!(scene.client(&taken.export("disk")?).is_err());
        ensure!(generation(&scene, "disk")?.0 == before);
        let left = std::fs::read_dir(scene.daemon.storage())?.count();
        ensure!(left == 0, "{left} files are left");
    }
    Ok(())
}

/// Where a loop device is in the sysfs of the test: a disk that was there from the start of the system on.
fn plug(sysfs: &Path, disk: &LoopDevice) -> Result<std::path::PathBuf> {
    let place = Path::new("devices/pci0000:00/0000:00:05.0/virtio2/block").join(disk.name());
    let directory = sysfs.join(&place);
    std::fs::create_dir_all(directory.join("queue"))?;
    for (name, value) in [
        ("removable", "0"),
        ("queue/iostats", "1"),
        ("inflight", "0 0"),
        ("diskseq", "7"),
    ] {
        std::fs::write(directory.join(name), value)?;
    }
    let number = std::fs::metadata(disk.path())?.rdev();
    let number = format!(
        "{}:{}",
        nix::sys::stat::major(number),
        nix::sys::stat::minor(number)
    );
    std::fs::create_dir_all(sysfs.join("dev/block"))?;
    std::os::unix::fs::symlink(
        Path::new("../..").join(&place),
        sysfs.join("dev/block").join(number),
    )?;
    Ok(directory.join("stat"))
}

#[test]
fn a_block_device_goes_on_if_its_disk_counted_no_write() -> Result<()> {
    let seed = seed("a_block_device_goes_on_if_its_disk_counted_no_write");
    let mut random = StdRng::seed_from_u64(seed);
    // Dropped after the daemon, which has it open.
    let disk = LoopDevice::new(4 * MIB)?;
    let root = tempfile::tempdir()?;
    let stat = plug(root.path(), &disk)?;
    let counted = |sectors: u32| std::fs::write(&stat, format!("1 0 8 0 5 0 {sectors} 0 0 0 0 0 0 0 0 0 0"));
    counted(80)?;
    let sysfs = [OsStr::new("--sysfs"), root.path().as_os_str()];
    let mut scene = Scene::with(&sysfs)?;
    let node = disk.path();
    scene.serve_path(node, &["--name=disk"])?;
    let original = scene.content("disk")?;
    let mut memory = original.clone();
    let taken = scene.snapshot(&[node], &[])?;
    scribble(&mut scene.client("disk")?, &mut memory, &mut random, 20)?;
    let (before, _) = generation(&scene, "disk")?;
    counted(880)?;
    ensure!(scene.daemon.stop()? == 0);
    scene.launch()?;
    ensure!(scene.served("disk")?["unproven"].is_null());
    ensure!(generation(&scene, "disk")?.0 == before);
    same(&scene.image(&taken, "disk")?, &original, "the image")?;
    same(&scene.content("disk")?, &memory, "the disk")?;
    // Somebody writes while no daemon is there.
    ensure!(scene.daemon.stop()? == 0);
    counted(888)?;
    scene.launch()?;
    lost(&scene, &taken, "written while no agent served it")?;
    // After a kill nobody knows what the last count of the daemon's own was.
    let taken = scene.snapshot(&[node], &[])?;
    scene.daemon.kill()?;
    scene.launch()?;
    lost(&scene, &taken, "nothing proves")
}

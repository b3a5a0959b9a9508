//! Own file: difference storage in a file on the file system of the very device that is snapshotted.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use blksnap_tests::{DaemonOptions, run, seed};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::scene::{MIB, Mounted, Scene};

const SECTOR: usize = 512;
/// Longest wait for storage to grow; a bound against hanging.
const PATIENCE: Duration = Duration::from_secs(400);

/// A served file with a file system that has files.
fn scene(kind: &str, random: &mut StdRng) -> Result<(Scene, Mounted)> {
    let size = if kind == "xfs" { 320 } else { 112 };
    let scene = Scene::new(size * MIB)?;
    let node = scene.node()?;
    let force = if kind == "ext4" { "-F" } else { "-f" };
    run(
        &format!("mkfs.{kind}"),
        ["-q".as_ref(), force.as_ref(), node.as_os_str()],
    )?;
    let mounted = Mounted::new(&node, "rw")?;
    load(mounted.0.path(), random, 24)?;
    run("sync", ["-f".as_ref(), mounted.0.path().as_os_str()])?;
    Ok((scene, mounted))
}

/// Writes, overwrites and removes files.
fn load(place: &Path, random: &mut StdRng, steps: usize) -> Result<()> {
    for _ in 0..steps {
        let path = place.join(format!("f{}", random.random_range(0..24)));
        if random.random_range(0..4) == 0 && path.exists() {
            fs::remove_file(&path)?;
            continue;
        }
        let mut bytes = vec![0; random.random_range(1..200) * 1024];
        random.fill(&mut bytes[..]);
        let mut file = File::create(&path)?;
        file.write_all(&bytes)?;
        if random.random_bool(0.3) {
            file.sync_all()?;
        }
    }
    run("sync", ["-f".as_ref(), place.as_os_str()])?;
    Ok(())
}

/// A snapshot, and the bytes of the disk at its instant.
struct Known {
    id: String,
    bytes: Vec<u8>,
}

/// Takes a snapshot with this storage while the file system stands still.
fn take(scene: &Scene, place: &Path, storage: &str, more: &[&str]) -> Result<Known> {
    let file = scene.file.display().to_string();
    let mut words = vec![
        "snapshot",
        "create",
        &file,
        "--no-take",
        "--storage",
        storage,
        "--minimum",
        "16M",
    ];
    words.extend(more);
    let answer = scene.daemon.json(words)?;
    let id = answer["id"].as_str().context("an id")?.to_owned();
    run("fsfreeze", ["-f".as_ref(), place.as_os_str()])?;
    let bytes = fs::read(&scene.file);
    let taken = scene.daemon.run(["snapshot", "take", &id]);
    run("fsfreeze", ["-u".as_ref(), place.as_os_str()])?;
    taken?;
    Ok(Known { id, bytes: bytes? })
}

/// Sectors of the storage of a snapshot.
fn sectors(scene: &Scene, id: &str) -> Result<BTreeSet<usize>> {
    let answer = scene.daemon.json(["snapshot", "storage", id])?;
    let mut sectors = BTreeSet::new();
    for extent in answer["extents"].as_array().context("extents")? {
        let number = |name: &str| {
            extent[name]
                .as_u64()
                .with_context(|| format!("{name} in {extent}"))
        };
        let (first, count) = (number("sector")?, number("count")?);
        sectors.extend(usize::try_from(first)?..usize::try_from(first + count)?);
    }
    Ok(sectors)
}

/// The image is the disk at the instant, but for the sectors of storage.
fn check(scene: &Scene, known: &Known) -> Result<()> {
    let own = sectors(scene, &known.id)?;
    ensure!(!own.is_empty(), "the storage is nowhere");
    let image = scene.image(&known.id)?;
    let pairs = image.chunks(SECTOR).zip(known.bytes.chunks(SECTOR));
    for (sector, (found, wanted)) in pairs.enumerate() {
        ensure!(
            found == wanted || own.contains(&sector),
            "sector {sector} of the image differs"
        );
    }
    Ok(())
}

fn info(scene: &Scene, id: &str) -> Result<serde_json::Value> {
    scene.daemon.json(["snapshot", "info", id])
}

fn files_of(place: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(place)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "diff") {
            found.push(path);
        }
    }
    Ok(found)
}

/// Writes until the storage has more than so many files, and gives their number.
fn grow(scene: &Scene, place: &Path, id: &str, files: usize, random: &mut StdRng) -> Result<usize> {
    let started = Instant::now();
    for number in 0_u32.. {
        load(place, random, 2)?;
        // Where nothing was before, or what is long gone.
        fs::write(place.join(format!("n{number}")), vec![random.random(); 700 << 10])?;
        let old = number.checked_sub(20).map(|old| place.join(format!("n{old}")));
        old.filter(|old| old.exists()).map_or(Ok(()), fs::remove_file)?;
        run("sync", ["-f".as_ref(), place.as_os_str()])?;
        let now = info(scene, id)?;
        ensure!(now["state"] == "taken", "{now}; {}", scene.daemon.log());
        let found = now["storage"].as_array().map_or(0, Vec::len);
        if found > files {
            return Ok(found);
        }
        ensure!(started.elapsed() < PATIENCE, "it does not grow: {now}");
    }
    bail!("it does not grow")
}

fn a_directory_on_the_device_is_storage(kind: &str) -> Result<()> {
    let mut random = StdRng::seed_from_u64(seed(kind));
    let (mut scene, mounted) = scene(kind, &mut random)?;
    let place = mounted.0.path().to_owned();
    let storage = place.display().to_string();
    let known = take(&scene, &place, &storage, &[])?;
    let files = files_of(&place)?;
    ensure!(files.len() == 1, "{files:?}");
    check(&scene, &known)?;
    // Nobody takes it away by mistake.
    ensure!(fs::remove_file(&files[0]).is_err());
    let files = grow(&scene, &place, &known.id, 1, &mut random)?;
    check(&scene, &known)?;
    // The agent is killed and goes on with it.
    scene.daemon.kill()?;
    scene.daemon.launch(&DaemonOptions::default())?;
    let now = info(&scene, &known.id)?;
    ensure!(now["state"] == "taken", "{now}");
    check(&scene, &known)?;
    grow(&scene, &place, &known.id, files, &mut random)?;
    check(&scene, &known)?;
    // Somebody takes the sectors from the file: the image says that it is lost, the file system is not harmed.
    let file = files_of(&place)?.pop().context("a file")?;
    run("chattr", ["-i".as_ref(), file.as_os_str()])?;
    fs::remove_file(&file)?;
    run("sync", ["-f".as_ref(), place.as_os_str()])?;
    run("fstrim", [place.as_os_str()])?;
    let now = info(&scene, &known.id)?;
    ensure!(now["state"] == "corrupted", "{now}");
    load(&place, &mut random, 4)?;
    scene.daemon.run(["snapshot", "destroy", &known.id])?;
    ensure!(
        files_of(&place)?.is_empty(),
        "files stay: {:?}",
        files_of(&place)?
    );
    end(&scene, mounted, kind)
}

/// Unmounts, and looks at the file system.
fn end(scene: &Scene, mounted: Mounted, kind: &str) -> Result<()> {
    drop(mounted);
    let node = scene.node()?;
    let (program, option) = match kind {
        "xfs" => ("xfs_repair", "-n"),
        _ => ("fsck.ext4", "-fn"),
    };
    run(program, [option.as_ref(), node.as_os_str()]).map(drop)
}

#[test]
#[ignore = "needs a kernel with ublk: cargo xtask test --vm fei"]
fn a_directory_of_ext4_on_the_device_is_storage() -> Result<()> {
    a_directory_on_the_device_is_storage("ext4")
}

#[test]
#[ignore = "needs a kernel with ublk: cargo xtask test --vm fei"]
fn a_directory_of_xfs_on_the_device_is_storage() -> Result<()> {
    a_directory_on_the_device_is_storage("xfs")
}

#[test]
#[ignore = "needs a kernel with ublk: cargo xtask test --vm fei"]
fn a_file_that_is_full_loses_the_snapshot_and_nothing_else() -> Result<()> {
    let mut random = StdRng::seed_from_u64(seed("a_file_that_is_full"));
    let (mut scene, mounted) = scene("ext4", &mut random)?;
    let place = mounted.0.path().to_owned();
    let file = place.join("diff.img");
    let known = take(&scene, &place, &format!("{},limit=8M", file.display()), &[])?;
    check(&scene, &known)?;
    fs::write(place.join("large"), vec![7; 16 << 20])?;
    run("sync", ["-f".as_ref(), place.as_os_str()])?;
    let now = info(&scene, &known.id)?;
    ensure!(now["state"] == "corrupted", "{now}");
    ensure!(
        now["reason"].as_str().is_some_and(|why| why.contains("space")),
        "{now}"
    );
    fs::remove_file(place.join("large"))?;
    // An agent that is killed before it can let the file go: the next one does.
    let second = take(&scene, &place, &storage_of(&place), &["--promise", "nothing"])?;
    ensure!(files_of(&place)?.len() == 1);
    scene.daemon.kill()?;
    scene.daemon.launch(&DaemonOptions::default())?;
    ensure!(scene.daemon.try_run(["snapshot", "info", &second.id])?.code != 0);
    let started = Instant::now();
    while !files_of(&place)?.is_empty() {
        ensure!(
            started.elapsed() < PATIENCE,
            "the file stays: {}",
            scene.daemon.log()
        );
        std::thread::sleep(Duration::from_millis(200));
    }
    // The one that was given stays, and may be changed again.
    scene.daemon.run(["snapshot", "destroy", &known.id])?;
    fs::remove_file(&file)?;
    end(&scene, mounted, "ext4")
}

fn storage_of(place: &Path) -> String {
    place.display().to_string()
}

#[test]
#[ignore = "needs a kernel with ublk: cargo xtask test --vm fei"]
fn what_can_not_be_storage_on_the_device_is_refused() -> Result<()> {
    let mut random = StdRng::seed_from_u64(seed("refused"));
    let (scene, mounted) = scene("ext4", &mut random)?;
    let place = mounted.0.path();
    let file = scene.file.display().to_string();
    let refused = |storage: String, why: &str| -> Result<()> {
        let answer = scene
            .daemon
            .try_run(["snapshot", "create", &file, "--storage", &storage])?;
        if answer.code == 0 || !answer.stderr.contains(why) {
            bail!("{storage}: {answer:?}");
        }
        Ok(())
    };
    let path = |name: &str| place.join(name).display().to_string();
    File::create(path("holes"))?.set_len(8 * MIB)?;
    refused(path("holes"), "it has holes")?;
    refused(
        format!("{},keep=name", storage_of(place)),
        "no names to keep files by",
    )?;
    // What stands on the device waits for the agent, too.
    File::create(path("inner.img"))?.set_len(32 * MIB)?;
    run("mkfs.ext4", ["-q", "-F", &path("inner.img")])?;
    let inner = Mounted::new(Path::new(&path("inner.img")), "loop")?;
    refused(storage_of(inner.0.path()), "would wait for itself")?;
    drop(inner);
    let listed = scene.daemon.json(["snapshot", "list"])?;
    ensure!(
        listed["snapshots"].as_array().is_some_and(Vec::is_empty),
        "{listed}"
    );
    ensure!(files_of(place)?.is_empty());
    fs::remove_file(path("holes"))?;
    // An older snapshot may need what is free now.
    let older = scene.take()?;
    refused(storage_of(place), "may need what was there")?;
    ensure!(files_of(place)?.is_empty());
    scene.daemon.run(["snapshot", "destroy", &older])?;
    end(&scene, mounted, "ext4")
}

#[test]
#[ignore = "needs a kernel with ublk: cargo xtask test --vm fei"]
fn btrfs_on_the_device_is_refused() -> Result<()> {
    let scene = Scene::new(128 * MIB)?;
    let node = scene.node()?;
    run("mkfs.btrfs", ["-q".as_ref(), "-f".as_ref(), node.as_os_str()])?;
    let mounted = Mounted::new(&node, "rw")?;
    let storage = storage_of(mounted.0.path());
    let file = scene.file.display().to_string();
    let answer = scene
        .daemon
        .try_run(["snapshot", "create", &file, "--storage", &storage])?;
    ensure!(
        answer.code != 0 && answer.stderr.contains("is on btrfs, which does not tell"),
        "{answer:?}"
    );
    ensure!(fs::read_dir(mounted.0.path())?.count() == 0);
    Ok(())
}

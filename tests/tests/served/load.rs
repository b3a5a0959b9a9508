//! Load: snapshots come and go while clients write, and each image is what the disks were at one instant.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::numbered::{Numbered, Sequence};
use blksnap_tests::{run, seed};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::scene::{MIB, Scene, Taken, same};

/// Snapshots that are held at the same time, at most.
const HELD: usize = 3;

#[test]
fn images_of_several_disks_are_one_instant() -> Result<()> {
    const NAMES: [&str; 3] = ["one", "two", "three"];
    const SIZE: u64 = 6 * MIB;
    let seed = seed("images_of_several_disks_are_one_instant");
    let mut random = StdRng::seed_from_u64(seed);
    let scene = Scene::new()?;
    let mut files = Vec::new();
    for (name, more) in NAMES
        .iter()
        .zip([&["--chunk-size=32K"][..], &[], &["--block-size=4K"]])
    {
        let path = scene.beside(name);
        std::fs::File::create(&path)?.set_len(SIZE)?;
        files.push((path, more));
    }
    let sequences = [0, 1].map(|writer: u64| Sequence {
        seed: seed ^ writer,
        disks: NAMES.len(),
        first: writer * SIZE / 1024,
        count: SIZE / 1024,
    });
    let paths: Vec<PathBuf> = files.iter().map(|(path, _)| path.clone()).collect();
    for sequence in &sequences {
        sequence.fill(&paths, 400)?;
    }
    for (path, more) in &files {
        scene.serve_path(path, more)?;
    }
    let mut writers = sequences.map(|sequence| {
        let exports = NAMES.map(str::to_owned).to_vec();
        Numbered::start(scene.daemon.nbd_socket(), exports, sequence, 400, false)
    });
    let mut held: VecDeque<(Taken, Vec<Option<Vec<u8>>>)> = VecDeque::new();
    let (mut snapshots, mut together) = (0, 0);
    for _ in 0..12 {
        for writer in &mut writers {
            writer.wait_for(random.random_range(50..150))?;
        }
        let mut chosen: Vec<usize> = (0..NAMES.len()).filter(|_| random.random_bool(0.8)).collect();
        if chosen.is_empty() || random.random_bool(0.5) {
            // The order in which they are named must not matter.
            chosen = vec![2, 0, 1];
        }
        let disks: Vec<&Path> = chosen.iter().map(|disk| paths[*disk].as_path()).collect();
        let before = [0, 1].map(|writer| writers[writer].answered());
        let taken = scene.snapshot(&disks, &[])?;
        let after = [0, 1].map(|writer| writers[writer].sent());
        snapshots += 1;
        let mut images = vec![None; NAMES.len()];
        for disk in chosen {
            images[disk] = Some(scene.image(&taken, NAMES[disk])?);
        }
        let shown: Vec<Option<&[u8]>> = images.iter().map(Option::as_deref).collect();
        for (writer, sequence) in sequences.iter().enumerate() {
            let instant = sequence.judge(&shown, false).context(taken.id.clone())?;
            ensure!(
                instant.latest >= before[writer] && instant.earliest <= after[writer],
                "{instant:?} is not within the take: {} to {}",
                before[writer],
                after[writer]
            );
        }
        held.push_back((taken, images));
        together = together.max(held.len());
        if held.len() == HELD || random.random_bool(0.3) {
            let which = random.random_range(0..held.len());
            let (taken, images) = held.remove(which).context("a snapshot")?;
            for (name, image) in NAMES.iter().zip(images) {
                if let Some(image) = image {
                    same(&scene.image(&taken, name)?, &image, name)?;
                }
            }
            scene.destroy(&taken)?;
        }
    }
    let mut ends = Vec::new();
    for writer in &mut writers {
        ends.push(writer.stop()?);
    }
    let now: Vec<Vec<u8>> = paths.iter().map(std::fs::read).collect::<Result<_, _>>()?;
    let now: Vec<Option<&[u8]>> = now.iter().map(|bytes| Some(bytes.as_slice())).collect();
    for (sequence, end) in sequences.iter().zip(&ends) {
        let instant = sequence.judge(&now, false)?;
        ensure!(
            (instant.earliest..=instant.latest).contains(end),
            "{instant:?}, {end}"
        );
    }
    println!("{snapshots} snapshots, {together} at a time, steps {ends:?}");
    ensure!(together > 1);
    for (taken, images) in held {
        for (name, image) in NAMES.iter().zip(images) {
            if let Some(image) = image {
                same(&scene.image(&taken, name)?, &image, name)?;
            }
        }
    }
    Ok(())
}

#[test]
fn fio_verifies_while_snapshots_come_and_go() -> Result<()> {
    let seed = seed("fio_verifies_while_snapshots_come_and_go");
    let mut random = StdRng::seed_from_u64(seed);
    let scene = Scene::new()?;
    let path = scene.serve("fio", 32 * MIB, seed, &[])?;
    let verify = [
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--verify_state_save=0",
    ];
    let mut arguments = vec![
        "--ioengine=nbd".to_owned(),
        format!("--uri={}", scene.daemon.nbd_uri("fio")),
        format!("--randseed={}", seed >> 1),
        "--size=7M".to_owned(),
        // Long enough for some snapshots, whatever the machine.
        "--rate=1m,1m,1m".to_owned(),
    ];
    arguments.extend(verify.map(str::to_owned));
    for job in [
        &[
            "random",
            "offset=0",
            "rw=randwrite",
            "bsrange=512-64k",
            "iodepth=32",
        ],
        &["mixed", "offset=8M", "rw=randrw", "bs=4k", "iodepth=16"],
        &["trims", "offset=16M", "rw=randtrimwrite", "bs=16k", "iodepth=1"],
        &["sequential", "offset=24M", "rw=write", "bs=1M", "iodepth=8"],
    ] {
        arguments.push(format!("--name={}", job[0]));
        arguments.extend(job[1..].iter().map(|option| format!("--{option}")));
    }
    let mut fio = Command::new("fio")
        .args(&arguments)
        .current_dir(scene.daemon.scratch())
        .stdin(Stdio::null())
        .stdout(std::fs::File::create(scene.beside("fio.out"))?)
        .stderr(std::fs::File::create(scene.beside("fio.err"))?)
        .spawn()
        .context("start fio")?;
    let outcome = snapshots_under(&scene, &path, &mut random, &mut || Ok(fio.try_wait()?.is_none()));
    if outcome.is_err() {
        fio.kill()?;
    }
    let status = fio.wait()?;
    let (snapshots, changed) = outcome?;
    let said = std::fs::read_to_string(scene.beside("fio.out"))?
        + &std::fs::read_to_string(scene.beside("fio.err"))?;
    ensure!(status.success() && said.matches("err= 0").count() == 4, "{said}");
    println!("fio: {snapshots} snapshots, {changed} bytes kept for them");
    ensure!(snapshots > 2 && changed > 0);
    // Nobody writes: the image is the disk.
    let last = scene.snapshot(&[&path], &[])?;
    same(
        &scene.image(&last, "fio")?,
        &std::fs::read(&path)?,
        "the last image",
    )
}

/// Takes and destroys snapshots while `goes_on`; an image read twice is the same. Gives how many there were, and the
/// bytes that were kept for them.
fn snapshots_under(
    scene: &Scene,
    path: &Path,
    random: &mut StdRng,
    goes_on: &mut dyn FnMut() -> Result<bool>,
) -> Result<(u32, u64)> {
    let mut held: VecDeque<(Taken, PathBuf)> = VecDeque::new();
    let (mut snapshots, mut kept) = (0_u32, 0);
    let mut more = true;
    while more || !held.is_empty() {
        more = goes_on()?;
        if more && held.len() < HELD {
            let taken = scene.snapshot(&[path], &[])?;
            let copy = scene.beside(&taken.id);
            // Read by another client the first time.
            run("nbdcopy", [taken.uri("fio")?.as_ref(), copy.as_os_str()])?;
            held.push_back((taken, copy));
            snapshots += 1;
        }
        std::thread::sleep(Duration::from_millis(random.random_range(0..300)));
        if !more || held.len() == HELD || random.random_bool(0.3) {
            let Some((taken, copy)) = held.remove(random.random_range(0..held.len().max(1))) else {
                continue;
            };
            kept += scene.info(&taken.id)?["storage_bytes"]
                .as_u64()
                .context("bytes")?;
            same(
                &scene.image(&taken, "fio")?,
                &std::fs::read(&copy)?,
                "an image read twice",
            )?;
            std::fs::remove_file(copy)?;
            scene.destroy(&taken)?;
        }
    }
    Ok((snapshots, kept))
}

/// Runs commands of qemu-io on an export.
fn qemu_io(uri: &str, commands: &[&str]) -> Result<()> {
    let commands = commands.iter().flat_map(|command| ["-c", command]);
    let said = run("qemu-io", ["-f", "raw", uri].into_iter().chain(commands))?;
    ensure!(!said.contains("failed") && !said.contains("error"), "{said}");
    Ok(())
}

#[test]
fn qemu_io_finds_its_patterns_in_the_images() -> Result<()> {
    let seed = seed("qemu_io_finds_its_patterns_in_the_images");
    let scene = Scene::new()?;
    let path = scene.serve("vm", 16 * MIB, seed, &[])?;
    let origin = scene.daemon.nbd_uri("vm");
    qemu_io(&origin, &["write -P 1 0 16M", "flush"])?;
    let first = scene.snapshot(&[&path], &[])?;
    qemu_io(
        &origin,
        &[
            "write -P 2 64k 1M",
            "write -z 2M 1M",
            "write -z -u 3M 512k",
            "discard 4M 1M",
            "aio_write -P 5 6M 700k",
            "aio_write -P 6 7M 64k",
            "aio_write -f -P 7 8388096 1k",
            "aio_flush",
            "write -P 8 16776704 512",
        ],
    )?;
    let second = scene.snapshot(&[&path], &[])?;
    qemu_io(&origin, &["write -f -P 3 0 16M", "read -P 3 0 16M"])?;
    qemu_io(&first.uri("vm")?, &["read -P 1 0 16M"])?;
    let second_uri = second.uri("vm")?;
    qemu_io(
        &second_uri,
        &[
            "read -P 1 0 64k",
            "read -P 2 64k 1M",
            "read -P 0 2M 1536k",
            "read -P 1 3584k 512k",
            "read -P 0 4M 1M",
            "read -P 5 6M 700k",
            "read -P 6 7M 64k",
            "read -P 7 8388096 1k",
            "read -P 1 9M 7339520",
            "read -P 8 16776704 512",
        ],
    )?;
    // An image takes writes of qemu, too, and the others do not see them.
    qemu_io(&second_uri, &["write -P 9 1M 3M", "flush", "read -P 9 1M 3M"])?;
    qemu_io(&first.uri("vm")?, &["read -P 1 0 16M"])?;
    qemu_io(&origin, &["read -P 3 0 16M"])
}

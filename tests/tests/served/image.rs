//! Images that are written to: what is written stays in the image, and is taken again by the next backup.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::nbd::{Request, cmd, err, flag, trans};
use blksnap_tests::seed;
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use crate::scene::{KIB, MIB, Scene, blocks, content, done, same, scribble, size};

#[test]
fn what_is_written_to_an_image_stays_there() -> Result<()> {
    let seed = seed("what_is_written_to_an_image_stays_there");
    let mut random = StdRng::seed_from_u64(seed);
    let scene = Scene::new()?;
    let path = scene.serve("disk", 8 * MIB + 512, seed, &["--block-size=64K"])?;
    let original = std::fs::read(&path)?;
    let base = scene.snapshot(&[&path], &[])?;
    scene.destroy(&base)?;
    let [one, two] = [scene.snapshot(&[&path], &[])?, scene.snapshot(&[&path], &[])?];
    let mut client = scene.client(&one.export("disk")?)?;
    let mut other = scene.client(&two.export("disk")?)?;
    let served = scene.client("disk")?;
    let agreed = |client: &blksnap_tests::nbd::Client| {
        let agreed = client.agreed();
        (agreed.size, agreed.minimum, agreed.maximum)
    };
    ensure!(agreed(&client) == agreed(&served), "{:?}", client.agreed());
    ensure!(client.agreed().size == 8 * MIB + 512);
    let flags = client.agreed().flags;
    ensure!(
        flags & trans::READ_ONLY == 0 && flags & trans::SEND_FLUSH != 0,
        "{flags:#x}"
    );
    let mut first = original.clone();
    let mut second = original.clone();
    let mut ranges = scribble(&mut client, &mut first, &mut random, 60)?;
    done(&mut client, Request::new(cmd::FLUSH, 0, 0))?;
    ranges.extend(scribble(&mut other, &mut second, &mut random, 60)?);
    let last = vec![0x5a; 700];
    let end = original.len() - last.len();
    first[end..].copy_from_slice(&last);
    done(&mut client, Request::write(end as u64, last).with(flag::FUA))?;
    ranges.push((end as u64, 700));
    same(&content(&mut client)?, &first, "the first image")?;
    same(&content(&mut other)?, &second, "the second image")?;
    same(&std::fs::read(&path)?, &original, "the file")?;
    // What the disk gets goes into none of them.
    let mut now = original;
    let mut disk = scene.client("disk")?;
    let written = scribble(&mut disk, &mut now, &mut random, 60)?;
    same(
        &content(&mut client)?,
        &first,
        "the first image after writes to the disk",
    )?;
    same(
        &content(&mut other)?,
        &second,
        "the second image after writes to the disk",
    )?;
    same(&std::fs::read(&path)?, &now, "the file after writes to the disk")?;
    // Both maps have what was written to images: the one of the last take, and the one of the next.
    let since = format!("--since={}", base.base("disk")?);
    let due = blocks(&ranges, 64 * KIB);
    let told = blocks(&scene.extents(&path, &[&since])?, 64 * KIB);
    ensure!(
        told == due,
        "{:?}",
        due.symmetric_difference(&told).collect::<Vec<_>>()
    );
    let next = scene.snapshot(&[&path], &[])?;
    let all: BTreeSet<u64> = &due | &blocks(&written, 64 * KIB);
    for how in ["--last", since.as_str()] {
        let told = blocks(&scene.extents(&path, &[how])?, 64 * KIB);
        ensure!(
            told == all,
            "{how}: {:?}",
            all.symmetric_difference(&told).collect::<Vec<_>>()
        );
    }
    same(&scene.image(&next, "disk")?, &now, "the next image")?;
    same(&content(&mut client)?, &first, "the first image at the end")?;
    same(&content(&mut other)?, &second, "the second image at the end")
}

#[test]
fn writes_to_an_image_are_in_its_dirty_bitmap() -> Result<()> {
    let seed = seed("writes_to_an_image_are_in_its_dirty_bitmap");
    let scene = Scene::new()?;
    let path = scene.serve("disk", 8 * MIB, seed, &["--block-size=64K"])?;
    scene.destroy(&scene.snapshot(&[&path], &[])?)?;
    let mut disk = scene.client("disk")?;
    done(&mut disk, Request::write(MIB, vec![1; 4096]))?;
    let taken = scene.snapshot(&[&path], &[])?;
    let export = taken.export("disk")?;
    let dirty = || -> Result<BTreeSet<u64>> {
        let mut client = scene.client_with(&export, &["qemu:dirty-bitmap:last"])?;
        let mut at = 0;
        let mut ranges = Vec::new();
        while at < 8 * MIB {
            let answer = client.ask(Request::new(cmd::BLOCK_STATUS, at, 8 * MIB - at))?;
            ensure!(answer.error == 0, "{}: {}", answer.error, answer.message);
            for (length, flags) in answer.status.values().next().context("a context")? {
                if *flags & 1 == 1 {
                    ranges.push((at, *length));
                }
                at += length;
            }
        }
        client.disconnect()?;
        Ok(blocks(&ranges, 64 * KIB))
    };
    ensure!(dirty()? == BTreeSet::from([16]), "{:?}", dirty()?);
    let mut image = scene.client(&export)?;
    done(&mut image, Request::write(4 * MIB - 1, vec![2; 2]))?;
    done(&mut image, Request::new(cmd::WRITE_ZEROES, 6 * MIB, 100))?;
    ensure!(dirty()? == BTreeSet::from([16, 63, 64, 96]), "{:?}", dirty()?);
    Ok(())
}

#[test]
fn zeroes_trims_and_bounds_of_an_image() -> Result<()> {
    let seed = seed("zeroes_trims_and_bounds_of_an_image");
    let scene = Scene::new()?;
    let path = scene.serve("disk", 4 * MIB, seed, &["--chunk-size=32K"])?;
    let mut memory = std::fs::read(&path)?;
    let original = memory.clone();
    let taken = scene.snapshot(&[&path], &[])?;
    let mut image = scene.client(&taken.export("disk")?)?;
    for (offset, length, flags) in [
        (0, 32 * KIB, 0),
        (32 * KIB - 1, 2, flag::NO_HOLE),
        (MIB + 5, MIB, flag::FUA),
        (4 * MIB - 77, 77, 0),
    ] {
        done(
            &mut image,
            Request::new(cmd::WRITE_ZEROES, offset, length).with(flags),
        )?;
        memory[size(offset)?..size(offset + length)?].fill(0);
        // A hint: either way the rest of the image is as it was.
        done(&mut image, Request::new(cmd::TRIM, offset, length))?;
    }
    same(&content(&mut image)?, &memory, "the image")?;
    // Zeroes that are not faster than writing them are refused, and nothing is done.
    let fast = Request::new(cmd::WRITE_ZEROES, 3 * MIB, 4096).with(flag::FAST_ZERO);
    let answer = image.ask(fast)?;
    ensure!(
        answer.error == 0 || answer.error == err::ENOTSUP,
        "{}",
        answer.message
    );
    if answer.error == 0 {
        memory[size(3 * MIB)?..size(3 * MIB + 4096)?].fill(0);
    }
    let beyond = image.ask(Request::write(4 * MIB - 1, vec![1; 2]))?;
    ensure!(
        beyond.error == err::ENOSPC || beyond.error == err::EINVAL,
        "{}",
        beyond.error
    );
    same(&content(&mut image)?, &memory, "the image at the end")?;
    same(&std::fs::read(&path)?, &original, "the file")
}

//! What a device is when it is connected, and what it refuses.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use blksnap_agent::sys::{AlignedBuffer, ioctl};
use blksnap_tests::{Daemon, LoopDevice, LoopOptions, read_device, run, seed};
use rand::rngs::StdRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};

use super::scene::{Attached, MIB, daemon, export, nobody_hangs, snapshot};

/// A loop device with random bytes.
fn filled(bytes: u64, sector: u32, seed: u64) -> Result<(LoopDevice, Vec<u8>)> {
    let options = LoopOptions {
        sector_size: sector,
        ..LoopOptions::default()
    };
    let device = LoopDevice::with_options(bytes, &options)?;
    let mut content = vec![0; usize::try_from(bytes)?];
    StdRng::seed_from_u64(seed).fill_bytes(&mut content);
    let file = OpenOptions::new().write(true).open(device.path())?;
    file.write_all_at(&content, 0)?;
    file.sync_all()?;
    Ok((device, content))
}

/// A file with random bytes that is served.
fn served(daemon: &Daemon, name: &str, bytes: u64, seed: u64) -> Result<(PathBuf, Vec<u8>)> {
    let path = daemon.scratch().join(name);
    let mut content = vec![0; usize::try_from(bytes)?];
    StdRng::seed_from_u64(seed).fill_bytes(&mut content);
    fs::write(&path, &content)?;
    daemon.run(["serve".as_ref(), path.as_os_str()])?;
    Ok((path, content))
}

fn clients(daemon: &Daemon, export: &str) -> Result<u64> {
    let status = daemon.json(["nbd", "status"])?;
    let exports = status["exports"].as_array().context("exports")?;
    let found = exports.iter().find(|found| found["name"] == export);
    found
        .and_then(|found| found["clients"].as_u64())
        .with_context(|| format!("{export} is not in {status}"))
}

#[test]
#[ignore = "needs a kernel with nbd: cargo xtask test --vm fei"]
fn an_image_of_a_tracked_disk_is_a_device_with_its_names() -> Result<()> {
    let daemon = daemon()?;
    let (disk, content) = filled(16 * MIB, 0, seed("names"))?;
    daemon.run(["attach".as_ref(), disk.path().as_os_str()])?;
    let taken = snapshot(&daemon, &[disk.path()], &[])?;
    let (id, name) = (taken["id"].as_str().context("an id")?, export(&taken, 0)?);
    fs::OpenOptions::new()
        .write(true)
        .open(disk.path())?
        .write_all_at(&[7; 4096], MIB)?;

    let mut device = Attached::new(&daemon, name, &["--connections", "3"])?;
    ensure!(device.told["connections"] == 3, "{}", device.told);
    ensure!(clients(&daemon, name)? == 3);
    ensure!(device.sysfs("size")? == (16 * MIB / 512).to_string());
    ensure!(device.sysfs("ro")? == "1");
    ensure!(device.sysfs("queue/logical_block_size")? == "512");
    ensure!(read_device(&device.node)? == content, "the image differs");

    let number = fs::metadata(disk.path())?.rdev();
    let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
    let links = [
        format!("/dev/blksnap-image_{major}:{minor}"),
        format!("/dev/disk/by-blksnap/{id}/{}", disk.name()),
    ];
    let told = device.links();
    ensure!(told == links.each_ref().map(PathBuf::from), "{told:?}");
    for link in &links {
        ensure!(fs::canonicalize(link)? == device.node, "{link}");
    }
    let list = daemon.json(["nbd", "list"])?;
    let listed = list["devices"].as_array().context("devices")?;
    let listed = listed.iter().find(|listed| listed["export"] == name);
    ensure!(listed == Some(&device.told), "{list}");

    let again = daemon.try_run(["nbd", "connect", name])?;
    ensure!(again.code == 1 && again.stderr.contains("already"), "{again:?}");
    device.disconnect(&daemon, &[])?;
    ensure!(clients(&daemon, name)? == 0);
    for link in &links {
        ensure!(fs::symlink_metadata(link).is_err(), "{link} is still there");
    }
    ensure!(device.sysfs("size")? == "0");
    // The name and the device can be used again.
    let mut again = Attached::new(&daemon, name, &[])?;
    ensure!(read_device(&again.node)? == content);
    again.disconnect(&daemon, &[])?;
    nobody_hangs()
}

#[test]
#[ignore = "needs a kernel with nbd: cargo xtask test --vm fei"]
fn blocks_of_a_device_are_those_of_its_disk() -> Result<()> {
    let daemon = daemon()?;
    let (disk, content) = filled(8 * MIB, 4096, seed("blocks"))?;
    daemon.run(["attach".as_ref(), disk.path().as_os_str()])?;
    let taken = snapshot(&daemon, &[disk.path()], &[])?;
    let mut device = Attached::new(&daemon, export(&taken, 0)?, &[])?;
    ensure!(device.sysfs("queue/logical_block_size")? == "4096");
    ensure!(read_device(&device.node)? == content);
    device.disconnect(&daemon, &[])?;
    nobody_hangs()
}

/// No byte gets through to an image, whatever is tried.
fn refuses_writes(device: &Attached, content: &[u8]) -> Result<()> {
    let write = |file: &File| file.write_all_at(&[1; 4096], 8192).and_then(|()| file.sync_all());
    let refused = OpenOptions::new()
        .write(true)
        .open(&device.node)
        .and_then(|file| write(&file));
    ensure!(refused.is_err(), "a device that is read-only took a write");
    // Root may tell the kernel that the device takes writes; the server and the kernel's client know better.
    run("blockdev", [Path::new("--setrw"), &device.node])?;
    let insisted = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(&device.node)
        .and_then(|file| {
            let mut block = AlignedBuffer::zeroed(4096);
            block.as_mut_slice().fill(1);
            file.write_all_at(block.as_slice(), 8192)
        });
    ensure!(insisted.is_err(), "a read-only export took a write");
    ensure!(read_device(&device.node)? == content, "the image was changed");
    Ok(())
}

#[test]
#[ignore = "needs a kernel with nbd: cargo xtask test --vm fei"]
fn the_kernel_keeps_an_image_as_it_is() -> Result<()> {
    let daemon = daemon()?;
    let seed = seed("read-only");
    let (disk, content) = filled(8 * MIB, 0, seed)?;
    daemon.run(["attach".as_ref(), disk.path().as_os_str()])?;
    let taken = snapshot(&daemon, &[disk.path()], &[])?;
    let mut device = Attached::new(&daemon, export(&taken, 0)?, &[])?;
    ensure!(device.sysfs("ro")? == "1");
    refuses_writes(&device, &content)?;
    device.disconnect(&daemon, &[])?;

    // An export that takes writes, of which the user wants none.
    let (path, content) = served(&daemon, "asked.img", 8 * MIB, seed ^ 1)?;
    let mut device = Attached::new(&daemon, "asked.img", &["--read-only"])?;
    ensure!(device.sysfs("ro")? == "1");
    refuses_writes(&device, &content)?;
    device.disconnect(&daemon, &[])?;
    ensure!(fs::read(path)? == content);
    nobody_hangs()
}

#[test]
#[ignore = "needs a kernel with nbd: cargo xtask test --vm fei"]
fn every_kind_of_write_reaches_the_image_and_nothing_else() -> Result<()> {
    let daemon = daemon()?;
    let seed = seed("writes");
    let mut random = StdRng::seed_from_u64(seed);
    let (path, content) = served(&daemon, "written.img", 16 * MIB, seed)?;
    let taken = snapshot(&daemon, &[&path], &[])?;
    let mut image = Attached::new(&daemon, export(&taken, 0)?, &[])?;
    let mut origin = Attached::new(&daemon, "written.img", &[])?;
    ensure!(image.sysfs("ro")? == "0" && origin.sysfs("ro")? == "0");
    let mut memories = [content.clone(), content];
    for step in 0..120 {
        let which = random.random_range(0..2);
        let device = if which == 0 { &image } else { &origin };
        let flags = libc::O_DIRECT | if step % 7 == 0 { libc::O_DSYNC } else { 0 };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(&device.node)?;
        let length = 512 * random.random_range(1..256_usize);
        let offset = 512 * random.random_range(0..(memories[which].len() - length) / 512);
        let range = &mut memories[which][offset..offset + length];
        match random.random_range(0..4) {
            0 => {
                range.fill(0);
                ioctl::blkzeroout(&file, offset as u64, length as u64)?;
            }
            1 => {
                // What a discard leaves is up to the server: whatever it is, it stays.
                ioctl::blkdiscard(&file, offset as u64, length as u64)?;
                let mut after = AlignedBuffer::zeroed(length.next_multiple_of(4096));
                file.read_exact_at(&mut after.as_mut_slice()[..length], offset as u64)?;
                let zeroes = after.as_slice()[..length].iter().all(|byte| *byte == 0);
                ensure!(zeroes || after.as_slice()[..length] == *range);
                range.copy_from_slice(&after.as_slice()[..length]);
            }
            _ => {
                random.fill_bytes(range);
                let mut data = AlignedBuffer::zeroed(length.next_multiple_of(4096));
                data.as_mut_slice()[..length].copy_from_slice(range);
                file.write_all_at(&data.as_slice()[..length], offset as u64)?;
            }
        }
    }
    for (device, memory) in [&image, &origin].into_iter().zip(&memories) {
        let found = read_device(&device.node)?;
        let first = found.iter().zip(memory).position(|(a, b)| a != b);
        ensure!(first.is_none(), "{} differs at {first:?}", device.node.display());
    }
    image.disconnect(&daemon, &[])?;
    origin.disconnect(&daemon, &[])?;
    ensure!(fs::read(path)? == memories[1], "the file of the origin differs");
    nobody_hangs()
}

#[test]
#[ignore = "needs a kernel with nbd: cargo xtask test --vm fei"]
fn what_cannot_be_connected_leaves_nothing_behind() -> Result<()> {
    let daemon = daemon()?;
    let (_, content) = served(&daemon, "taken.img", MIB, seed("refused"))?;
    let mut device = Attached::new(&daemon, "taken.img", &[])?;
    served(&daemon, "other.img", MIB, 1)?;
    let node = device.node.display().to_string();
    for (arguments, word) in [
        (&["no such export"][..], "no such export"),
        (&["other.img", "--device", &node], "in use"),
        (&["other.img", "--device", "/dev/nbd70000"], "--device"),
        (&["other.img", "--block-size", "1000"], "power of two"),
        (&["other.img", "--server", "/nonexistent"], "/nonexistent"),
    ] {
        let answer = daemon.try_run(["nbd", "connect"].iter().chain(arguments))?;
        ensure!(
            answer.code == 1 && answer.stderr.contains(word),
            "{arguments:?}: {answer:?}"
        );
        ensure!(clients(&daemon, "other.img")? == 0, "{arguments:?}");
    }
    ensure!(read_device(&device.node)? == content);
    device.disconnect(&daemon, &[])?;
    let answer = daemon.try_run(["nbd".as_ref(), "disconnect".as_ref(), device.node.as_os_str()])?;
    ensure!(
        answer.code == 1 && answer.stderr.contains("nbd list"),
        "{answer:?}"
    );
    nobody_hangs()
}

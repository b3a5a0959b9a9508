//! Marks: ranges and files, in both maps, and what the next copies make of them.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::{Daemon, LoopDevice, LoopOptions, read_device, run, write_block};
use nix::fcntl::{FallocateFlags, fallocate};

use crate::{KIB, MIB, backup, base, extents, refused, since};

/// Size of what file contents are told apart by: a block of a small ext4.
const BLOCK: usize = 1024;

/// A block of a test's file: no other block on the device has these bytes.
fn block(seed: u64, number: u64) -> Vec<u8> {
    let mut state = (seed << 20 | number << 1) | 1;
    (0..BLOCK / 8)
        .flat_map(|_| {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .collect()
}

/// The ranges of `node` that hold blocks of the file, as the bytes on it show.
fn holding(node: &Path, seed: u64, blocks: &[u64]) -> Result<Vec<(u64, u64)>> {
    let wanted: std::collections::HashSet<Vec<u8>> =
        blocks.iter().map(|number| block(seed, *number)).collect();
    let content = read_device(node)?;
    let mut found: Vec<(u64, u64)> = Vec::new();
    let mut count = 0;
    for (bytes, offset) in content.chunks(BLOCK).zip((0_u64..).step_by(BLOCK)) {
        if !wanted.contains(bytes) {
            continue;
        }
        count += 1;
        match found.last_mut() {
            Some((start, length)) if *start + *length == offset => *length += BLOCK as u64,
            _ => found.push((offset, BLOCK as u64)),
        }
    }
    ensure!(
        count == wanted.len(),
        "{count} of {} blocks are on the device",
        wanted.len()
    );
    Ok(found)
}

/// Marks a file with holes and several extents, through each of `nodes`, in which the file system begins at the
/// given byte, and compares with where its bytes are.
fn marked_file(kind: &str, bytes: u64, options: &LoopOptions, partition: bool) -> Result<()> {
    let daemon = Daemon::start()?;
    let mut disk = LoopDevice::with_options(bytes, options)?;
    let own = if partition {
        disk.partition(1)
    } else {
        disk.path().to_owned()
    };
    LoopDevice::mkfs_on(&own, kind)?;
    let directory = if partition {
        disk.mount_partition(1)?
    } else {
        disk.mount()?
    };
    let seed = rand::random::<u64>();
    // The other one grows between the parts of it.
    let mut present = Vec::new();
    let (file, other) = (directory.join("file"), directory.join("other"));
    {
        use std::os::unix::fs::FileExt as _;
        let (mine, theirs) = (fs::File::create(&file)?, fs::File::create(&other)?);
        for number in 0..8000_u64 {
            if number % 500 == 0 {
                mine.sync_all()?;
                theirs.write_all_at(&[7; 1 << 16], number << 16)?;
                theirs.sync_all()?;
            }
            // A hole at the end of each part.
            if number % 500 < 448 {
                mine.write_all_at(&block(seed, number), number * BLOCK as u64)?;
                present.push(number);
            }
        }
        mine.sync_all()?;
    }
    let nodes = if partition {
        vec![own.clone(), disk.path().to_owned()]
    } else {
        vec![own.clone()]
    };
    for node in &nodes {
        let node = node.display().to_string();
        daemon.run(["attach", "--block-size", "4K", &node])?;
        run("sync", ["--file-system".as_ref(), directory.as_os_str()])?;
        let taken = backup(&daemon, &node, false)?;
        let before = base(&taken)?;
        let path = file.display().to_string();
        let marked = daemon.json(["cbt", "mark", &node, "--file", &path])?;
        run("sync", ["--file-system".as_ref(), directory.as_os_str()])?;
        let wanted = holding(Path::new(&node), seed, &present)?;
        let bytes: u64 = wanted.iter().map(|(_, length)| length).sum();
        let mut blocks: Vec<u64> = wanted
            .iter()
            .flat_map(|(offset, length)| offset / 4096..(offset + length).div_ceil(4096))
            .collect();
        blocks.dedup();
        let (ranges, blocks) = (wanted.len(), blocks.len());
        println!("{kind}: {marked}, of {bytes} bytes in {ranges} ranges, {blocks} blocks");
        ensure!(ranges > 1);
        // XFS allocates more than is written, which is marked, too.
        let right = if kind == "xfs" {
            marked["bytes"].as_u64() >= Some(bytes) && marked["bytes"].as_u64() < Some(2 * bytes)
        } else {
            marked["bytes"] == bytes && marked["blocks"] == blocks && marked["ranges"] == ranges
        };
        ensure!(right, "{marked}, {wanted:?}");
        // The read map has the marks in the period before, whatever else the file system wrote meanwhile.
        let last = extents(&daemon.json(["cbt", "changes", &node, "--last"])?)?;
        for (offset, length) in &wanted {
            ensure!(
                last.iter()
                    .any(|(start, long)| start <= offset && offset + length <= start + long),
                "{offset}:{length} is not in {last:?}"
            );
        }
        // The live one, in the next.
        backup(&daemon, &node, true)?;
        let changed = since(&daemon, &node, &before)?;
        for (offset, length) in &wanted {
            ensure!(
                changed
                    .iter()
                    .any(|(start, long)| start <= offset && offset + length <= start + long),
                "{offset}:{length} is not in {changed:?}"
            );
        }
    }
    drop(daemon);
    disk.unmount()
}

#[test]
fn a_file_of_ext4_is_marked_where_its_bytes_are() -> Result<()> {
    marked_file("ext4", 128 * MIB, &LoopOptions::default(), false)
}

#[test]
fn a_file_of_xfs_is_marked_where_its_bytes_are() -> Result<()> {
    marked_file("xfs", 320 * MIB, &LoopOptions::default(), false)
}

#[test]
fn a_file_on_a_partition_is_marked_on_the_disk_too() -> Result<()> {
    let options = LoopOptions {
        partitions: vec![("2056s".to_owned(), "200000s".to_owned())],
        ..LoopOptions::default()
    };
    marked_file("ext4", 128 * MIB, &options, true)
}

#[test]
fn delayed_unwritten_and_empty_files_have_the_ranges_they_should() -> Result<()> {
    let daemon = Daemon::start()?;
    let mut disk = LoopDevice::new(64 * MIB)?;
    disk.mkfs("ext4")?;
    let directory = disk.mount()?;
    let node = disk.path().display().to_string();
    daemon.run(["attach", "--block-size", "4K", &node])?;
    let mark = |name: &str| {
        let file = directory.join(name).display().to_string();
        daemon.json(["cbt", "mark", &node, "--file", &file])
    };
    // Not on the device before it is asked for.
    fs::write(directory.join("delayed"), vec![1; 100_000])?;
    let block = nix::sys::statvfs::statvfs(&directory)?.block_size();
    let delayed = 100_000_u64.next_multiple_of(block);
    ensure!(mark("delayed")?["bytes"] == delayed);
    let file = fs::File::create(directory.join("unwritten"))?;
    fallocate(&file, FallocateFlags::empty(), 0, 65_536)?;
    ensure!(mark("unwritten")?["bytes"] == 65_536);
    fs::File::create(directory.join("hole"))?.set_len(1 << 20)?;
    ensure!(mark("hole")?["bytes"] == 0);
    // Several files, and ranges beside them.
    let (first, second) = (directory.join("delayed"), directory.join("unwritten"));
    let marked = daemon.json([
        "cbt",
        "mark",
        &node,
        "--range",
        "63M:4K",
        "--file",
        &first.display().to_string(),
        "--file",
        &second.display().to_string(),
    ])?;
    ensure!(marked["bytes"] == delayed + 65_536 + 4096, "{marked}");
    drop((daemon, file));
    disk.unmount()
}

#[test]
fn files_whose_place_is_not_known_are_refused() -> Result<()> {
    let daemon = Daemon::start()?;
    let mut disk = LoopDevice::new(144 * MIB)?;
    disk.mkfs("btrfs")?;
    let directory = disk.mount()?;
    let file = directory.join("file");
    fs::write(&file, vec![3; 1 << 20])?;
    let node = disk.path().display().to_string();
    daemon.run(["attach", &node])?;
    let path = file.display().to_string();
    refused(
        &daemon,
        &["cbt", "mark", &node, "--file", &path],
        &["is on btrfs, which does not tell", "give ranges"],
    )?;
    let root = directory.display().to_string();
    refused(
        &daemon,
        &["cbt", "mark", &node, "--file", &root],
        &["is not a regular file"],
    )?;
    refused(
        &daemon,
        &["cbt", "mark", &node, "--file", "/no/such"],
        &["can't open /no/such"],
    )?;
    // On another device.
    let mut elsewhere = LoopDevice::new(16 * MIB)?;
    elsewhere.mkfs("ext4")?;
    let file = elsewhere.mount()?.join("file");
    fs::write(&file, b"x")?;
    let path = file.display().to_string();
    refused(
        &daemon,
        &["cbt", "mark", &node, "--file", &path],
        &["is not on /dev/loop", "name the device"],
    )?;
    // Nothing is marked where a part of the request can't be.
    let before = daemon.json(["cbt", "info", &node])?[0]["dirty_blocks"].clone();
    refused(
        &daemon,
        &["cbt", "mark", &node, "--range", "0:64K", "--file", "/no/such"],
        &["can't open"],
    )?;
    refused(
        &daemon,
        &["cbt", "mark", &node, "--range", "0:64K", "--range", "200M:64K"],
        &["nothing was marked"],
    )?;
    ensure!(daemon.json(["cbt", "info", &node])?[0]["dirty_blocks"] == before);
    drop(daemon);
    elsewhere.unmount()?;
    disk.unmount()
}

#[test]
fn every_range_counts_in_both_maps() -> Result<()> {
    let daemon = Daemon::start()?;
    let disk = LoopDevice::new(16 * MIB)?;
    let node = disk.path().display().to_string();
    daemon.run(["attach", "--block-size", "4K", &node])?;
    let first = base(&backup(&daemon, &node, false)?)?;
    write_block(disk.path(), 8 * MIB)?;
    let second = base(&backup(&daemon, &node, true)?)?;
    ensure!(since(&daemon, &node, &first)? == [(8 * MIB, 4 * KIB)]);
    daemon.run([
        "cbt", "mark", &node, "--range", "0:1", "1M:4K", "--range", "15M:1M",
    ])?;
    let marked = [(0, 4 * KIB), (MIB, 4 * KIB), (15 * MIB, MIB)];
    // The read map: as if written before the last take. So who holds the first copy takes them, and who copies
    // what changed in the last period does.
    let all = [marked[0], marked[1], (8 * MIB, 4 * KIB), marked[2]];
    ensure!(since(&daemon, &node, &first)? == all);
    ensure!(extents(&daemon.json(["cbt", "extents", &node, "--last"])?)? == all);
    ensure!(since(&daemon, &node, &second)?.is_empty());
    // The live map: in the period that is open.
    ensure!(daemon.json(["cbt", "info", &node])?[0]["dirty_blocks"] == 258);
    let incremental = backup(&daemon, &node, true)?;
    ensure!(incremental["kind"] == "incremental" && incremental["copied_bytes"] == MIB + 8 * KIB);
    ensure!(since(&daemon, &node, &second)? == marked);
    ensure!(extents(&daemon.json(["cbt", "changes", &node, "--last"])?)? == marked);
    // Differential: since any older number.
    ensure!(since(&daemon, &node, &first)? == all);
    let zero = format!("{}:0", first.split_once(':').context("a base")?.0);
    ensure!(since(&daemon, &node, &zero)? == all);
    Ok(())
}

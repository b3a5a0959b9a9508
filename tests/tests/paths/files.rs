//! Files: a file system that is written in every way, on every kind of device.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result, ensure};
use blksnap_agent::sys::AlignedBuffer;
use blksnap_agent::sys::mman::SharedWords;
use blksnap_common::track::OpKind;
use blksnap_tests::{LoopDevice, LoopOptions, Zram, run, unmount};
use nix::fcntl::{FallocateFlags, fallocate};

use crate::{KIB, MIB};
use blksnap_tests::path::Subject;

/// Size of a device, by what the file system needs.
fn size(kind: &str) -> u64 {
    match kind {
        "xfs" => 320 * MIB,
        "btrfs" => 144 * MIB,
        _ => 64 * MIB,
    }
}

/// Makes a file system on `node`, mounts it, writes in every way, trims, unmounts: each step is compared.
fn file_system(kind: &str, node: &Path, also: &[&Path]) -> Result<()> {
    let nodes = also.iter().copied().chain([node]);
    let mut subject = Subject::new(nodes.map(|node| (node, 4 * KIB)))?;
    let own = also.len();
    let (_, seen) = subject.observe(|| LoopDevice::mkfs_on(node, kind))?;
    ensure!(!seen[own].changed.is_empty(), "mkfs.{kind} changed nothing");
    let mount = tempfile::tempdir()?;
    let mut trimmed = 0;
    for (name, work) in steps() {
        let (_, seen) = subject
            .observe(|| mounted(node, mount.path(), work))
            .with_context(|| format!("{kind} on {}: {name}", node.display()))?;
        for seen in &seen {
            ensure!(
                !seen.reported.is_empty(),
                "{name} on {kind}: {} reports nothing",
                seen.node.display()
            );
        }
        ensure!(!seen[own].changed.is_empty(), "{name} on {kind} changed nothing");
        if name == "trim" {
            trimmed += seen[own].operations[usize::from(OpKind::Discard.code())];
        }
    }
    ensure!(trimmed > 0, "the trim of {kind} discarded nothing");
    Ok(())
}

/// Mounts, works, unmounts: afterwards nothing is held back.
fn mounted(node: &Path, target: &Path, work: fn(&Path) -> Result<()>) -> Result<()> {
    run("mount", [node, target])?;
    let done = work(target);
    if let Err(error) = unmount(target) {
        // Nothing can be compared, and the device has to go.
        let _ = run("umount", [Path::new("--lazy"), target]);
        return Err(error);
    }
    done
}

type Step = (&'static str, fn(&Path) -> Result<()>);

/// What is done to a mounted file system.
fn steps() -> [Step; 8] {
    [
        ("buffered", |root| {
            for number in 0..40 {
                fs::write(root.join(format!("file{number}")), noise(number, 100_000))?;
            }
            Ok(())
        }),
        ("O_DIRECT and O_SYNC", |root| {
            let mut buffer = AlignedBuffer::zeroed(256 << 10);
            buffer.as_mut_slice().copy_from_slice(&noise(77, 256 << 10));
            for (name, flags) in [("direct", libc::O_DIRECT), ("sync", libc::O_SYNC)] {
                open(&root.join(name), flags)?.write_all_at(buffer.as_slice(), 4096)?;
            }
            Ok(())
        }),
        ("mmap", |root| {
            let file = open(&root.join("mapped"), 0)?;
            file.set_len(MIB)?;
            let mapped = SharedWords::map(&file, 128 << 10)?;
            for (word, number) in mapped.words().iter().zip(rand::random::<u32>()..) {
                word.store(u64::from(number) << 20 | 1, Ordering::Relaxed);
            }
            Ok(())
        }),
        ("io_uring", |root| {
            run(
                "fio",
                [
                    "--name=path",
                    "--ioengine=io_uring",
                    "--direct=1",
                    "--rw=randwrite",
                    "--bs=4k",
                    "--iodepth=8",
                    "--size=4m",
                    "--randrepeat=0",
                    &format!("--filename={}", root.join("uring").display()),
                ],
            )?;
            Ok(())
        }),
        ("in place, over old data", |root| {
            let file = open(&root.join("file3"), 0)?;
            for at in [0, 5000, 77_777] {
                file.write_all_at(&noise(at, 3000), at)?;
            }
            open(&root.join("uring"), libc::O_DSYNC)?.write_all_at(&noise(9, 8192), MIB)?;
            Ok(())
        }),
        ("holes and sizes", |root| {
            let file = open(&root.join("uring"), 0)?;
            let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(&file, keep | FallocateFlags::FALLOC_FL_PUNCH_HOLE, 65536, 1 << 20)?;
            fallocate(&file, FallocateFlags::empty(), 8 << 20, 1 << 20)?;
            open(&root.join("file5"), 0)?.set_len(10)?;
            Ok(())
        }),
        ("names", |root| {
            fs::create_dir(root.join("directory"))?;
            fs::rename(root.join("file1"), root.join("directory/file1"))?;
            fs::hard_link(root.join("file2"), root.join("directory/link"))?;
            std::os::unix::fs::symlink("file2", root.join("directory/symlink"))?;
            for number in 6..30 {
                fs::remove_file(root.join(format!("file{number}")))?;
            }
            Ok(())
        }),
        ("trim", |root| {
            fs::remove_file(root.join("uring"))?;
            fs::remove_file(root.join("mapped"))?;
            run("sync", ["--file-system".as_ref(), root.as_os_str()])?;
            run("fstrim", [root])?;
            Ok(())
        }),
    ]
}

fn open(path: &Path, flags: i32) -> Result<File> {
    Ok(OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)?)
}

/// `length` bytes that differ from those of other seeds and runs.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let start = rand::random::<u64>() ^ seed;
    (0_u64..)
        .flat_map(|word| {
            (start.wrapping_add(word))
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .to_le_bytes()
        })
        .take(length)
        .collect()
}

fn on_loop(kind: &str) -> Result<()> {
    let disk = LoopDevice::new(size(kind))?;
    file_system(kind, disk.path(), &[])
}

fn on_direct_loop(kind: &str) -> Result<()> {
    let options = LoopOptions {
        direct_io: true,
        ..LoopOptions::default()
    };
    let disk = LoopDevice::with_options(size(kind), &options)?;
    file_system(kind, disk.path(), &[])
}

fn on_zram(kind: &str) -> Result<()> {
    let disk = Zram::new(size(kind))?;
    file_system(kind, &disk.path(), &[])
}

fn on_partition(kind: &str) -> Result<()> {
    let end = size(kind) / 512 + 2055;
    let options = LoopOptions {
        partitions: vec![("2056s".to_owned(), format!("{end}s"))],
        ..LoopOptions::default()
    };
    let disk = LoopDevice::with_options(size(kind) + 4 * MIB, &options)?;
    // The disk's map has what is written to the partition, too.
    file_system(kind, &disk.partition(1), &[disk.path()])
}

#[test]
fn ext4_on_loop() -> Result<()> {
    on_loop("ext4")
}

#[test]
fn xfs_on_loop() -> Result<()> {
    on_loop("xfs")
}

#[test]
fn btrfs_on_loop() -> Result<()> {
    on_loop("btrfs")
}

#[test]
fn ext4_on_loop_with_direct_io() -> Result<()> {
    on_direct_loop("ext4")
}

#[test]
fn xfs_on_loop_with_direct_io() -> Result<()> {
    on_direct_loop("xfs")
}

#[test]
fn btrfs_on_loop_with_direct_io() -> Result<()> {
    on_direct_loop("btrfs")
}

#[test]
fn ext4_on_zram() -> Result<()> {
    on_zram("ext4")
}

#[test]
fn xfs_on_zram() -> Result<()> {
    on_zram("xfs")
}

#[test]
fn btrfs_on_zram() -> Result<()> {
    on_zram("btrfs")
}

#[test]
fn ext4_on_a_partition() -> Result<()> {
    on_partition("ext4")
}

#[test]
fn xfs_on_a_partition() -> Result<()> {
    on_partition("xfs")
}

#[test]
fn btrfs_on_a_partition() -> Result<()> {
    on_partition("btrfs")
}

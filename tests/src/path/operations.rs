//! Operations: every way in which a program can change a range of a block device through its node.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result};
use blksnap_agent::sys::mman::SharedWords;
use blksnap_agent::sys::uring::InFlight;
use blksnap_agent::sys::{AlignedBuffer, ioctl};
use blksnap_common::track::OpKind;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

/// One way.
#[derive(Debug)]
pub struct Operation {
    /// What it is called.
    pub name: &'static str,
    /// What the block layer makes of it, on a device that can do it.
    pub kinds: &'static [OpKind],
    /// Nothing but the range is written.
    pub exact: bool,
    /// Changes `length` bytes from `offset` on of the node; `false` if the device can't do that.
    pub run: fn(node: &Path, offset: u64, length: u64) -> Result<bool>,
}

/// All ways. Offsets and lengths are multiples of 4096.
pub const ALL: [Operation; 14] = [
    Operation {
        name: "buffered write, fsync",
        kinds: &[OpKind::Write],
        exact: true,
        run: |node, offset, length| {
            let file = open(node, 0)?;
            file.write_all_at(&pattern(length), offset)?;
            file.sync_all()?;
            Ok(true)
        },
    },
    Operation {
        name: "O_DIRECT write",
        kinds: &[OpKind::Write],
        exact: true,
        run: |node, offset, length| write_with(node, libc::O_DIRECT, offset, length),
    },
    Operation {
        name: "O_SYNC write",
        kinds: &[OpKind::Write],
        exact: true,
        run: |node, offset, length| write_with(node, libc::O_SYNC, offset, length),
    },
    Operation {
        name: "O_DIRECT|O_DSYNC write",
        kinds: &[OpKind::Write],
        exact: true,
        run: |node, offset, length| write_with(node, libc::O_DIRECT | libc::O_DSYNC, offset, length),
    },
    Operation {
        name: "io_uring write, O_DIRECT",
        kinds: &[OpKind::Write],
        exact: true,
        run: |node, offset, length| by_uring(node, libc::O_DIRECT, offset, length),
    },
    Operation {
        name: "io_uring write, buffered",
        kinds: &[OpKind::Write],
        exact: true,
        run: |node, offset, length| by_uring(node, 0, offset, length),
    },
    Operation {
        name: "mmap store, msync",
        kinds: &[OpKind::Write],
        // The page cache may have a larger folio there, which is dirty as a whole.
        exact: false,
        run: |node, offset, length| {
            let file = open(node, 0)?;
            let words = |bytes: u64| usize::try_from(bytes / 8);
            let (first, end) = (words(offset)?, words(offset + length)?);
            let mapped = SharedWords::map(&file, end)?;
            for (word, number) in mapped.words()[first..].iter().zip(fresh()..) {
                word.store(number, Ordering::Relaxed);
            }
            file.sync_all()?;
            Ok(true)
        },
    },
    Operation {
        name: "sendfile from a file",
        kinds: &[OpKind::Write],
        exact: true,
        run: |node, offset, length| {
            let mut source = tempfile::tempfile()?;
            source.write_all_at(&pattern(length), 0)?;
            source.seek(SeekFrom::Start(0))?;
            let mut target = open(node, 0)?;
            target.seek(SeekFrom::Start(offset))?;
            io::copy(&mut source, &mut target)?;
            target.sync_all()?;
            Ok(true)
        },
    },
    Operation {
        name: "libaio write, O_DIRECT (fio)",
        kinds: &[OpKind::Write],
        exact: true,
        run: |node, offset, length| {
            crate::run(
                "fio",
                [
                    "--name=path",
                    "--ioengine=libaio",
                    "--direct=1",
                    "--rw=write",
                    "--bs=4k",
                    "--iodepth=4",
                    "--allow_file_create=0",
                    "--randrepeat=0",
                    &format!("--filename={}", node.display()),
                    &format!("--offset={offset}"),
                    &format!("--size={length}"),
                ],
            )?;
            Ok(true)
        },
    },
    Operation {
        name: "BLKDISCARD",
        kinds: &[OpKind::Discard],
        exact: true,
        run: |node, offset, length| supported(ioctl::blkdiscard(open(node, 0)?, offset, length)),
    },
    Operation {
        name: "BLKSECDISCARD",
        kinds: &[OpKind::SecureErase],
        exact: true,
        run: |node, offset, length| supported(ioctl::blksecdiscard(open(node, 0)?, offset, length)),
    },
    Operation {
        name: "BLKZEROOUT",
        // A device without write zeroes gets pages of zeroes.
        kinds: &[OpKind::WriteZeroes, OpKind::Write],
        exact: true,
        run: |node, offset, length| supported(ioctl::blkzeroout(open(node, 0)?, offset, length)),
    },
    Operation {
        name: "fallocate, punch hole",
        kinds: &[OpKind::WriteZeroes],
        exact: true,
        run: |node, offset, length| allocate(node, FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, length),
    },
    Operation {
        name: "fallocate, zero range",
        kinds: &[OpKind::WriteZeroes, OpKind::Write],
        exact: true,
        run: |node, offset, length| allocate(node, FallocateFlags::FALLOC_FL_ZERO_RANGE, offset, length),
    },
];

fn open(node: &Path, flags: i32) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(node)
        .with_context(|| format!("open {}", node.display()))
}

/// A number that no word written before has.
fn fresh() -> u64 {
    rand::random::<u64>() | 1
}

/// Bytes of which no two sectors are equal.
fn pattern(length: u64) -> Vec<u8> {
    let start = fresh();
    (0..length / 8)
        .flat_map(|word| {
            start
                .wrapping_add(word.wrapping_mul(0x9e37_79b9_7f4a_7c15))
                .to_le_bytes()
        })
        .collect()
}

fn write_with(node: &Path, flags: i32, offset: u64, length: u64) -> Result<bool> {
    let mut buffer = AlignedBuffer::zeroed(usize::try_from(length)?);
    buffer.as_mut_slice().copy_from_slice(&pattern(length));
    open(node, flags)?.write_all_at(buffer.as_slice(), offset)?;
    Ok(true)
}

fn by_uring(node: &Path, flags: i32, offset: u64, length: u64) -> Result<bool> {
    let (source, target) = (tempfile::tempfile()?, open(node, flags)?);
    source.write_all_at(&pattern(length), 0)?;
    let length = usize::try_from(length)?;
    let mut ring = InFlight::new(1, length)?;
    ring.read(0, source.as_fd(), 0, length)?;
    finish(&mut ring)?;
    ring.write(0, target.as_fd(), offset, 0..length)?;
    finish(&mut ring)?;
    drop(ring);
    target.sync_all()?;
    Ok(true)
}

fn finish(ring: &mut InFlight<'_>) -> Result<()> {
    let mut ended = Vec::new();
    ring.wait(&mut ended)?;
    for (_, outcome) in ended {
        outcome?;
    }
    Ok(())
}

fn allocate(node: &Path, how: FallocateFlags, offset: u64, length: u64) -> Result<bool> {
    supported(fallocate(
        open(node, 0)?,
        how | FallocateFlags::FALLOC_FL_KEEP_SIZE,
        i64::try_from(offset)?,
        i64::try_from(length)?,
    ))
}

fn supported(outcome: Result<(), Errno>) -> Result<bool> {
    match outcome {
        Ok(()) => Ok(true),
        Err(Errno::EOPNOTSUPP) => Ok(false),
        Err(errno) => Err(io::Error::from(errno).into()),
    }
}

//! Direct: reads and writes of a device past the page cache, which may hold what is no longer so.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use anyhow::{Context as _, Result};
use blksnap_agent::sys::{AlignedBuffer, ioctl};
use rand::rngs::StdRng;
use rand::{RngCore as _, SeedableRng as _};

/// What is read at a time.
const CHUNK: usize = 1 << 20;

fn open(node: &Path, write: bool) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(libc::O_DIRECT)
        .open(node)
        .with_context(|| format!("open {}", node.display()))
}

/// All bytes of the device at `node`.
///
/// # Errors
/// It can't be read.
pub fn read_device(node: &Path) -> Result<Vec<u8>> {
    let file = open(node, false)?;
    let length = usize::try_from(ioctl::blkgetsize64(&file)?)?;
    let mut bytes = Vec::with_capacity(length);
    let mut chunk = AlignedBuffer::zeroed(CHUNK);
    while bytes.len() < length {
        let part = &mut chunk.as_mut_slice()[..CHUNK.min(length - bytes.len())];
        file.read_exact_at(part, bytes.len() as u64)?;
        bytes.extend_from_slice(part);
    }
    Ok(bytes)
}

/// Writes 4 KiB of zeroes at `offset` of the device at `node`.
///
/// # Errors
/// It can't be written there.
pub fn write_block(node: &Path, offset: u64) -> Result<()> {
    let buffer = AlignedBuffer::zeroed(4096);
    Ok(open(node, true)?.write_all_at(&buffer.as_slice()[..4096], offset)?)
}

/// Writes `size` bytes to the device at `node` of which no two blocks of 4 KiB are alike, and gives them. Few of them are
/// drawn: that takes long in a guest.
///
/// # Errors
/// It can't be written.
pub fn fill_device(node: &Path, size: u64, seed: u64) -> Result<Vec<u8>> {
    let mut content = vec![0; usize::try_from(size)?];
    let mut drawn = vec![0; CHUNK];
    StdRng::seed_from_u64(seed).fill_bytes(&mut drawn);
    let file = open(node, true)?;
    let mut buffer = AlignedBuffer::zeroed(CHUNK);
    for (number, part) in content.chunks_mut(CHUNK).enumerate() {
        part.copy_from_slice(&drawn[..part.len()]);
        for (block, bytes) in part.chunks_exact_mut(4096).enumerate() {
            bytes[..8].copy_from_slice(&((number << 32 | block) as u64).to_le_bytes());
        }
        buffer.as_mut_slice()[..part.len()].copy_from_slice(part);
        file.write_all_at(&buffer.as_slice()[..part.len()], (number * CHUNK) as u64)?;
    }
    file.sync_all()?;
    Ok(content)
}

//! Blocks: numbered writes to a served disk, of which one can tell after a power cut which are there.
//!
//! Write N goes to a block that N and the seed choose, and every byte of it follows from N. After a cut each block has
//! some write that was sent to it, whole, and none older than the last one that was flushed.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::PathBuf;
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::nbd::{Client, Framing, Request, cmd};
use serde_json::json;

use crate::say;

/// Bytes of a write.
pub(crate) const BLOCK: u64 = 4096;
/// Bytes that have a sum.
pub(crate) const SUMMED: u64 = 64 << 10;
/// Writes between two flushes.
const FLUSHED: u64 = 8;

/// A sum for each [`SUMMED`] bytes.
pub(crate) fn sums(bytes: &[u8]) -> Vec<u64> {
    let chunks = bytes.chunks(usize::try_from(SUMMED).unwrap_or(usize::MAX));
    chunks
        .map(|chunk| {
            // Its keys are the same in every process.
            let mut hasher = DefaultHasher::new();
            chunk.hash(&mut hasher);
            hasher.finish()
        })
        .collect()
}

/// Writes of one seed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Numbers {
    pub(crate) seed: u64,
    /// Blocks of the disk.
    pub(crate) blocks: u64,
}

impl Numbers {
    fn mix(self, number: u64) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.seed, number).hash(&mut hasher);
        hasher.finish()
    }

    /// The block that a write goes to.
    pub(crate) fn block(self, number: u64) -> u64 {
        self.mix(number) % self.blocks
    }

    /// Its bytes.
    pub(crate) fn data(self, number: u64) -> Vec<u8> {
        let salt = self.mix(!number);
        let words = (0..BLOCK / 8).map(|at| {
            if at == 0 {
                number
            } else {
                salt.rotate_left(7).wrapping_mul(at | 1)
            }
        });
        words.flat_map(u64::to_le_bytes).collect()
    }

    /// The disk has nothing that was not written there, and every write of the ranges `flushed` that no later one
    /// replaced. Gives the newest write that is there.
    pub(crate) fn check(self, disk: &[u8], flushed: &[(u64, u64)]) -> Result<u64> {
        let mut least = vec![0; usize::try_from(self.blocks)?];
        let mut newest = 0;
        for (first, last) in flushed {
            for number in *first..=*last {
                least[usize::try_from(self.block(number))?] = number;
            }
            newest = *last;
        }
        let blocks = disk.chunks_exact(usize::try_from(BLOCK)?);
        ensure!(blocks.len() == least.len(), "the disk has {} bytes", disk.len());
        for ((at, block), least) in blocks.enumerate().zip(least) {
            let number = u64::from_le_bytes(block[..8].try_into()?);
            ensure!(
                number >= least,
                "block {at} has write {number}: write {least} was flushed"
            );
            if number == 0 {
                ensure!(block.iter().all(|byte| *byte == 0), "block {at} has no write");
            } else {
                ensure!(
                    self.block(number) == at as u64 && block == self.data(number),
                    "block {at} is not what write {number} wrote"
                );
            }
            newest = newest.max(number);
        }
        Ok(newest)
    }

    /// Sends the writes behind number `last`, and tells the host what was flushed.
    pub(crate) fn start(self, socket: PathBuf, last: u64) -> Result<JoinHandle<Result<()>>> {
        let mut client = Client::connect(&socket, "disk.img", Framing::Structured, &[])?;
        let flush = |client: &mut Client, number: u64| -> Result<()> {
            let answer = client.ask(Request::new(cmd::FLUSH, 0, 0))?;
            ensure!(answer.error == 0, "flush: {}", answer.message);
            say("flushed", &json!(number))
        };
        Ok(std::thread::spawn(move || {
            for number in last + 1.. {
                let offset = self.block(number) * BLOCK;
                let answer = client
                    .ask(Request::write(offset, self.data(number)))
                    .context("write")?;
                ensure!(answer.error == 0, "write {number}: {}", answer.message);
                if number % FLUSHED == 0 {
                    flush(&mut client, number)?;
                }
            }
            Ok(())
        }))
    }
}

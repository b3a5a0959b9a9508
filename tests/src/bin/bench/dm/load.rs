//! Load: writes of blocks of a device past the page cache, several at a time.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};
use blksnap_agent::sys::AlignedBuffer;

/// Bytes of a write.
pub(super) const BLOCK: u64 = 4096;
/// Writers.
pub(super) const THREADS: usize = 8;

/// Writes `value` to the blocks with these numbers, and gives the seconds that it took.
pub(super) fn write(node: &Path, blocks: &[u64], value: u8) -> Result<f64> {
    let file = File::options()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(node)
        .with_context(|| format!("open {}", node.display()))?;
    let file = &file;
    let started = Instant::now();
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..THREADS)
            .map(|first| {
                scope.spawn(move || -> Result<()> {
                    let mut buffer = AlignedBuffer::zeroed(4096);
                    buffer.as_mut_slice().fill(value);
                    for block in blocks.iter().skip(first).step_by(THREADS) {
                        file.write_all_at(buffer.as_slice(), block * BLOCK)?;
                    }
                    Ok(())
                })
            })
            .collect();
        for writer in writers {
            writer
                .join()
                .map_err(|_| anyhow::anyhow!("a writer panicked"))??;
        }
        Ok(started.elapsed().as_secs_f64())
    })
}

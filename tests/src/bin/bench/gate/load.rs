//! Load: fio, which writes 4 KiB to each chunk of a device once, in random order, by four threads.
//!
//! What it writes is in a list, so that the second run writes the same blocks as the first one.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use blksnap_tests::{run, seed};
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};
use serde_json::Value;
use tempfile::TempDir;

/// Writers at once.
const WRITERS: usize = 4;

/// Bytes of a write.
const BLOCK: u64 = 4096;

/// How often the blocks are written in a run that measures rewrites.
pub(crate) const PASSES: usize = 3;

/// A list of blocks, and where they are written to.
pub(crate) struct Load {
    node: PathBuf,
    /// Of each writer.
    blocks: Vec<Vec<u64>>,
    directory: TempDir,
}

impl Load {
    /// One block of each chunk of a device of `size` bytes.
    pub(crate) fn new(node: &Path, size: u64, chunk: u64) -> Result<Self> {
        let mut random = StdRng::seed_from_u64(seed("gate"));
        let mut blocks: Vec<u64> = (0..size / chunk)
            .map(|number| number * chunk + random.random_range(0..chunk / BLOCK) * BLOCK)
            .collect();
        blocks.shuffle(&mut random);
        let each = blocks.len() / WRITERS;
        Ok(Self {
            node: node.to_owned(),
            blocks: blocks.chunks(each).map(<[u64]>::to_vec).collect(),
            directory: tempfile::Builder::new().prefix("blksnap-bench-").tempdir()?,
        })
    }

    /// The same blocks of another device.
    pub(crate) fn on(&self, node: &Path) -> Result<Self> {
        Ok(Self {
            node: node.to_owned(),
            blocks: self.blocks.clone(),
            directory: tempfile::Builder::new().prefix("blksnap-bench-").tempdir()?,
        })
    }

    /// Writes all blocks so many times; gives the writes a second.
    pub(crate) fn run(&self, passes: usize) -> Result<f64> {
        let node = self.node.display();
        let mut job = format!(
            "[global]\nioengine=psync\ndirect=1\nthread=1\ngroup_reporting=1\nfilename={node}\nrw=write\n\
             bs={BLOCK}\nreplay_no_stall=1\n"
        );
        for (number, blocks) in self.blocks.iter().enumerate() {
            let list = self.directory.path().join(format!("list-{number}"));
            let mut text = format!("fio version 2 iolog\n{node} add\n{node} open\n");
            for offset in std::iter::repeat_n(blocks, passes).flatten() {
                writeln!(text, "{node} write {offset} {BLOCK}")?;
            }
            writeln!(text, "{node} close")?;
            fs::write(&list, text)?;
            writeln!(job, "[writer-{number}]\nread_iolog={}", list.display())?;
        }
        let file = self.directory.path().join("job");
        fs::write(&file, job)?;
        let said = run(
            "fio",
            [
                "--output-format=json".as_ref(),
                "--disk_util=0".as_ref(),
                file.as_os_str(),
            ],
        )?;
        let json = said.find('{').context("fio printed no JSON")?;
        let said: Value = serde_json::from_str(&said[json..]).context("what fio printed is no JSON")?;
        let write = &said["jobs"][0]["write"];
        let (count, milliseconds) = (write["total_ios"].as_f64(), write["runtime"].as_f64());
        let (Some(count), Some(milliseconds)) = (count, milliseconds) else {
            anyhow::bail!("fio said nothing of its writes");
        };
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let expected = (self.blocks.iter().map(Vec::len).sum::<usize>() * passes) as f64;
        anyhow::ensure!(
            (count - expected).abs() < 0.5 && milliseconds > 0.0,
            "fio made {count} writes of {expected} in {milliseconds} ms"
        );
        Ok(count * 1000.0 / milliseconds)
    }
}

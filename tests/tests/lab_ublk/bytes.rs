//! Bytes: what the disk must hold, in memory.

use std::os::unix::fs::FileExt as _;

use anyhow::{Result, bail, ensure};
use rand::Rng as _;
use rand::rngs::StdRng;

use super::scene::{MIB, Scene};

const SECTOR: u64 = 512;

/// The bytes of the disk; `None` where a discard left any.
#[derive(Clone)]
pub(crate) struct Model(Vec<u8>);

impl Model {
    /// Fills the disk with bytes that tell where they are from.
    pub(crate) fn fill(scene: &Scene, random: &mut StdRng) -> Result<Self> {
        let mut bytes = vec![0; usize::try_from(scene.size)?];
        random.fill(&mut bytes[..]);
        for (at, piece) in bytes.chunks(1 << 20).enumerate() {
            scene.write(at as u64 * MIB, piece)?;
        }
        Ok(Self(bytes))
    }

    /// A random write, write of zeroes, discard or read.
    pub(crate) fn step(&mut self, scene: &Scene, random: &mut StdRng) -> Result<()> {
        let most = match random.random_range(0..8) {
            0 => 2 * MIB / SECTOR,
            1..3 => 256,
            _ => 16,
        };
        let sectors = random.random_range(1..=most);
        let first = random.random_range(0..=scene.size / SECTOR - sectors);
        let (offset, length) = (first * SECTOR, sectors * SECTOR);
        let range = usize::try_from(offset)?..usize::try_from(offset + length)?;
        match random.random_range(0..10) {
            0 => {
                scene.zero(offset, length)?;
                self.0[range].fill(0);
            }
            1 => {
                // The kernel discards whole granules; a file that has a hole there reads as zeroes.
                let offset = offset.next_multiple_of(4096);
                let length = length.next_multiple_of(4096).min(scene.size - offset);
                if length == 0 {
                    return Ok(());
                }
                scene.discard(offset, length)?;
                self.0[usize::try_from(offset)?..usize::try_from(offset + length)?].fill(0);
            }
            2 | 3 => {
                let found = scene.read(offset, range.len())?;
                ensure!(found == self.0[range], "{length} bytes at {offset} differ");
            }
            _ => {
                random.fill(&mut self.0[range.clone()]);
                scene.write(offset, &self.0[range])?;
            }
        }
        Ok(())
    }

    fn check(&self, what: &str, found: &[u8]) -> Result<()> {
        ensure!(found.len() == self.0.len(), "{what} has {} bytes", found.len());
        // As a whole first: byte by byte takes long in a guest.
        if found != self.0 {
            let differs = self.0.iter().zip(found).position(|(model, found)| model != found);
            bail!("{what} differs at byte {differs:?}");
        }
        Ok(())
    }

    pub(crate) fn check_device(&self, scene: &Scene) -> Result<()> {
        self.check("the device", &blksnap_tests::read_device(&scene.node()?)?)
    }

    pub(crate) fn check_file(&self, scene: &Scene) -> Result<()> {
        let file = std::fs::File::open(&scene.file)?;
        let mut bytes = vec![0; self.0.len()];
        file.read_exact_at(&mut bytes, 0)?;
        self.check("the file", &bytes)
    }

    pub(crate) fn check_image(&self, scene: &Scene, id: &str) -> Result<()> {
        self.check("an image", &scene.image(id)?)
    }
}

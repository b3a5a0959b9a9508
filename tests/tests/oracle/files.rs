//! Files: random changes of a mounted file system.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use blksnap_agent::sys::AlignedBuffer;
use blksnap_tests::run;
use nix::fcntl::{FallocateFlags, fallocate};
use rand::Rng;
use rand::rngs::StdRng;

use crate::KIB;

/// Most files at a time.
const MOST_FILES: usize = 120;
/// Longest file that is written in one go.
const LONGEST: usize = 2 << 20;

/// Files below a mount point, each named by a number.
pub(crate) struct Tree {
    root: PathBuf,
    names: Vec<PathBuf>,
    next: u32,
    content: AlignedBuffer,
}

impl Tree {
    /// An empty tree at `root`.
    pub(crate) fn new(root: PathBuf) -> Self {
        Self {
            root,
            names: Vec::new(),
            next: 0,
            content: AlignedBuffer::zeroed(LONGEST),
        }
    }

    /// The file system is mounted somewhere else now.
    pub(crate) fn moved(&mut self, root: PathBuf) {
        self.root = root;
    }

    /// Makes `count` random changes. What the kernel still holds back is not written out here.
    pub(crate) fn change(&mut self, random: &mut StdRng, count: u32) -> Result<()> {
        let start = random.random_range(0..LONGEST - 64 * 1024);
        random.fill(&mut self.content.as_mut_slice()[start..start + 64 * 1024]);
        for _ in 0..count {
            let changed = self.change_once(random);
            let full = changed.as_ref().err().is_some_and(|error| {
                error
                    .downcast_ref::<io::Error>()
                    .is_some_and(|error| error.kind() == io::ErrorKind::StorageFull)
            });
            if full || self.names.len() > MOST_FILES {
                for _ in 0..self.names.len() / 2 {
                    self.remove(random)?;
                }
            }
            if !full {
                changed?;
            }
        }
        if random.random_ratio(1, 3) {
            run("fstrim", [&self.root])?;
        }
        Ok(())
    }

    fn change_once(&mut self, random: &mut StdRng) -> Result<()> {
        let Some(file) = self.pick(random) else {
            return self.create(random);
        };
        match random.random_range(0..100) {
            0..20 => self.create(random),
            20..32 => self.remove(random),
            32..52 => self.overwrite(random, &file),
            52..80 => self.overwrite_directly(random, &file),
            80..86 => {
                let length = random.random_range(0..256 * KIB);
                Ok(OpenOptions::new().write(true).open(&file)?.set_len(length)?)
            }
            86..92 => Ok(File::open(&file)?.sync_all()?),
            92..95 => self.punch(random, &file),
            95..98 => self.rename(random),
            _ => {
                let directory = self.root.join(format!("d{}", random.random_range(0..20)));
                if directory.exists() {
                    Ok(())
                } else {
                    Ok(fs::create_dir(directory)?)
                }
            }
        }
    }

    fn pick(&self, random: &mut StdRng) -> Option<PathBuf> {
        let count = self.names.len();
        (count > 0).then(|| self.root.join(&self.names[random.random_range(0..count)]))
    }

    fn name(&mut self, random: &mut StdRng) -> PathBuf {
        self.next += 1;
        let directory = format!("d{}", random.random_range(0..20));
        let name = self.next.to_string();
        if self.root.join(&directory).is_dir() {
            Path::new(&directory).join(name)
        } else {
            name.into()
        }
    }

    fn create(&mut self, random: &mut StdRng) -> Result<()> {
        let name = self.name(random);
        let length = match random.random_range(0..100) {
            0..70 => random.random_range(0..32 * KIB),
            70..98 => random.random_range(0..256 * KIB),
            _ => random.random_range(0..LONGEST as u64),
        };
        self.names.push(name.clone());
        let bytes = &self.content.as_slice()[..usize::try_from(length)?];
        fs::write(self.root.join(&name), bytes).with_context(|| format!("create {}", name.display()))
    }

    fn remove(&mut self, random: &mut StdRng) -> Result<()> {
        let count = self.names.len();
        if count == 0 {
            return Ok(());
        }
        let name = self.names.swap_remove(random.random_range(0..count));
        fs::remove_file(self.root.join(&name)).with_context(|| format!("remove {}", name.display()))
    }

    fn rename(&mut self, random: &mut StdRng) -> Result<()> {
        let new = self.name(random);
        let at = random.random_range(0..self.names.len());
        let old = std::mem::replace(&mut self.names[at], new.clone());
        Ok(fs::rename(self.root.join(old), self.root.join(new))?)
    }

    /// Through the page cache, sometimes brought to the disk at once.
    fn overwrite(&self, random: &mut StdRng, path: &Path) -> Result<()> {
        let file = OpenOptions::new().write(true).open(path)?;
        let length = usize::try_from(random.random_range(1..64 * KIB))?;
        let from = random.random_range(0..LONGEST - length);
        file.write_all_at(
            &self.content.as_slice()[from..from + length],
            random.random_range(0..256 * KIB),
        )?;
        if random.random_ratio(1, 4) {
            file.sync_data()?;
        }
        Ok(())
    }

    fn overwrite_directly(&self, random: &mut StdRng, path: &Path) -> Result<()> {
        let file = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(path)?;
        for _ in 0..random.random_range(1..10) {
            let pages = random.random_range(1..=8);
            let from = random.random_range(0..LONGEST / 4096 - pages) * 4096;
            file.write_all_at(
                &self.content.as_slice()[from..from + pages * 4096],
                random.random_range(0..64) * 4096,
            )?;
        }
        Ok(())
    }

    fn punch(&self, random: &mut StdRng, path: &Path) -> Result<()> {
        let file = OpenOptions::new().write(true).open(path)?;
        fallocate(
            &file,
            FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
            i64::try_from(random.random_range(0..64 * KIB))?,
            i64::try_from(random.random_range(1..64 * KIB))?,
        )
        .map_err(io::Error::from)?;
        Ok(())
    }
}

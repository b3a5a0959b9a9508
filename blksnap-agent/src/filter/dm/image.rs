//! Image: a snapshot device as it is given to others, and looked at before anything of it is.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;

use super::error::DmError;
use super::take::{Dm, DmImage};
use super::watch::{Condition, Usage};
use crate::tracker::{DirtyBlocks, MarkError, Tracker};
use crate::units::{Generation, SECTOR_BYTES, Sectors, SnapshotId};

/// An image can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum MappedError {
    /// It is not what it was.
    #[error("{}", .0.why())]
    Lost(Condition),
    /// The device fails.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A change of it can't be noted.
    #[error("can't note a change of the image: {0}")]
    Mark(String),
}

impl MappedError {
    /// The number that says it.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Lost(condition) => condition.errno().unwrap_or(Errno::EIO) as i32,
            Self::Io(error) => error.raw_os_error().unwrap_or(Errno::EIO as i32),
            Self::Mark(_) => Errno::EIO as i32,
        }
    }
}

impl From<MarkError> for MappedError {
    fn from(error: MarkError) -> Self {
        Self::Mark(error.to_string())
    }
}

/// An image of a device of device-mapper.
#[derive(Clone, Debug)]
pub struct MappedImage {
    dm: Arc<Dm>,
    snapshot: SnapshotId,
    image: DmImage,
    file: Arc<File>,
    tracker: Arc<Tracker>,
    suspended: Option<Duration>,
    marked: Arc<Mutex<Marked>>,
}

/// Blocks that are marked in the read map and in the open period.
#[derive(Debug, Default)]
struct Marked {
    /// Of this generation and this period.
    of: Option<(Generation, u8)>,
    blocks: DirtyBlocks,
}

impl MappedImage {
    /// Opens `image`, whose origin `tracker` tracks.
    ///
    /// # Errors
    /// Its node can't be opened.
    pub fn open(
        dm: Arc<Dm>,
        snapshot: SnapshotId,
        image: DmImage,
        tracker: Arc<Tracker>,
    ) -> Result<Self, DmError> {
        let node = image.node();
        let file = File::options().read(true).write(true).open(&node);
        let file = file.map_err(|source| DmError::Io {
            action: "open",
            path: node,
            source,
        })?;
        Ok(Self {
            dm,
            snapshot,
            image,
            file: Arc::new(file),
            tracker,
            suspended: None,
            marked: Arc::default(),
        })
    }

    /// With what the take cost its origins: how long the first one that was suspended was.
    #[must_use]
    pub const fn with_suspended(mut self, suspended: Duration) -> Self {
        self.suspended = Some(suspended);
        self
    }

    /// How long origins were suspended for the take; `None` if that was an agent before this one.
    #[must_use]
    pub const fn suspended(&self) -> Option<Duration> {
        self.suspended
    }

    /// Length in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.image.sectors * SECTOR_BYTES
    }

    /// The snapshot device.
    #[must_use]
    pub const fn device(&self) -> &DmImage {
        &self.image
    }

    /// Whether it is what it was at the instant.
    #[must_use]
    pub fn condition(&self) -> Condition {
        self.dm.check(self.snapshot, &self.image)
    }

    /// How full its storage is; `None` if it is lost.
    #[must_use]
    pub fn usage(&self) -> Option<Usage> {
        self.dm.usage(self.snapshot, &self.image)
    }

    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// What was read may be wrong, or could not be read.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), MappedError> {
        let read = self.file.read_exact_at(buffer, offset);
        // After the bytes came: what was written to the origin past the image may be among them.
        self.proven()?;
        Ok(read?)
    }

    /// Writes to the image, and never to its origin. The blocks are marked as changed in the maps of the origin first.
    ///
    /// # Errors
    /// The marks or the image fail.
    pub fn write_at(&self, data: &[u8], offset: u64) -> Result<(), MappedError> {
        self.proven()?;
        self.mark(offset, data.len() as u64)?;
        Ok(self.file.write_all_at(data, offset)?)
    }

    /// Makes what was written durable, as far as the image is.
    ///
    /// # Errors
    /// The device fails.
    pub fn flush(&self) -> Result<(), MappedError> {
        self.file.sync_data()?;
        self.proven()
    }

    fn proven(&self) -> Result<(), MappedError> {
        match self.condition() {
            Condition::Whole => Ok(()),
            condition => Err(MappedError::Lost(condition)),
        }
    }

    /// Marks blocks that are not marked yet: each mark is written to a file.
    fn mark(&self, offset: u64, length: u64) -> Result<(), MappedError> {
        let size = self.size();
        let Some(last) = length
            .checked_sub(1)
            .and_then(|rest| offset.checked_add(rest))
            .filter(|last| *last < size)
        else {
            // Nothing is changed, or the write fails.
            return Ok(());
        };
        let Some(tracked) = self.tracker.device(self.image.origin) else {
            return Err(MappedError::Mark("its device is not tracked any more".to_owned()));
        };
        let shift = tracked.block_size().shift();
        let (first, last) = (offset >> shift, last >> shift);
        let mut marked = self.marked.lock().unwrap_or_else(PoisonError::into_inner);
        let (generation, active) = tracked.with_map(|map| (map.generation(), map.active()));
        if marked.of != Some((generation, active)) {
            // Taken again since: the next backup reads another map.
            *marked = Marked {
                of: Some((generation, active)),
                blocks: DirtyBlocks::default(),
            };
        }
        let is_marked = |block: u64| {
            let word = usize::try_from(block / 64).ok();
            word.and_then(|word| marked.blocks.words().get(word))
                .is_some_and(|word| word >> (block % 64) & 1 == 1)
        };
        if (first..=last).all(is_marked) {
            return Ok(());
        }
        let sectors = tracked.block_size().bytes() / SECTOR_BYTES;
        let start = first * sectors;
        let end = ((last + 1) * sectors).min(size / SECTOR_BYTES);
        tracked.mark_both(&[(Sectors::new(start), Sectors::new(end - start))])?;
        marked.blocks.insert(first, last);
        Ok(())
    }
}

//! Changes: the change map of a served device, in a form that survives the agent.
//!
//! Files in the device's state directory:
//! - `map`: the whole map, written at each take and at a clean stop;
//! - `period-GENERATION-NUMBER`: a byte a block for the period with that number: 1 if it changed, 2 if the read map has
//!   to say so, too. A block is marked here before the write that changes it goes on.
//!
//! The map is as it was saved, with the marks of its own period and of the one after it, if a take had just begun that.
//! They are in the page cache, which outlives the agent but not the system.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use crate::cbt::{Blocks, CbtMap, FullNeeded, MapError, ReadMap, ResetReason, SavedHeader, Taken};
use crate::statefile::{self, Format, StateFileError};
use crate::units::{BlockSize, Generation, Sectors};

const MAP: Format = Format {
    name: "blksnap-served-map",
    version: 1,
};

/// The change map can't be kept.
#[derive(Debug, thiserror::Error)]
pub enum ChangesError {
    /// A state file.
    #[error(transparent)]
    State(#[from] StateFileError),
    /// A period's file.
    #[error("can't {action} {path}: {source}")]
    Period {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The map.
    #[error(transparent)]
    Map(#[from] MapError),
}

/// The change map of one served device.
#[derive(Debug)]
pub struct Changes {
    state: Mutex<State>,
    /// A bit a block: it is marked in the open period, in the file and in the map.
    marked: Vec<AtomicU64>,
    block_size: BlockSize,
    capacity: Sectors,
}

#[derive(Debug)]
struct State {
    map: CbtMap,
    directory: Option<PathBuf>,
    period: Option<File>,
}

impl Changes {
    /// A new map, because of `reason`, whose files are in `directory`; without one it ends with the agent.
    ///
    /// # Errors
    /// The files can't be made, or the map would be too large.
    pub fn begin(
        directory: Option<&Path>,
        block_size: BlockSize,
        capacity: Sectors,
        reason: ResetReason,
    ) -> Result<Self, ChangesError> {
        let generation = Generation::new(Uuid::new_v4());
        let map = CbtMap::begin(generation, reason, block_size, capacity)?;
        let changes = Self::of(map, directory.map(Path::to_owned));
        changes.lock().open_period()?;
        changes.save()?;
        Ok(changes)
    }

    /// Goes on with the map in `directory`; the caller has proof that nothing was written since. `None` if there is
    /// none, or it is of another size.
    ///
    /// # Errors
    /// A file is damaged or can't be read. The caller begins anew then.
    pub fn resume(directory: &Path, capacity: Sectors) -> Result<Option<Self>, ChangesError> {
        let Some((header, sections)) = statefile::read_sections::<SavedHeader>(&directory.join("map"), MAP)?
        else {
            return Ok(None);
        };
        let path = directory.join("map");
        let damaged = |why: String| StateFileError::Damaged {
            path: path.clone(),
            why,
        };
        let mut map =
            CbtMap::restore_sections(&header, sections).map_err(|error| damaged(error.to_string()))?;
        if map.capacity() != capacity {
            return Ok(None);
        }
        if has_other_generation(directory, map.generation()) {
            return Err(damaged("a generation that came after it was not saved".to_owned()).into());
        }
        apply(&mut map, directory)?.ok_or_else(|| damaged("its period has no marks".to_owned()))?;
        // A take that had begun the next period, and did not come to save the map.
        let next = period_path(directory, map.generation(), map.active().wrapping_add(1));
        if map.active() < u8::MAX && next.exists() {
            map.take(map.generation(), capacity)?;
            apply(&mut map, directory)?;
        }
        let changes = Self::of(map, Some(directory.to_owned()));
        let mut state = changes.lock();
        state.open_period()?;
        changes.learn(&state);
        drop(state);
        changes.save()?;
        Ok(Some(changes))
    }

    fn of(map: CbtMap, directory: Option<PathBuf>) -> Self {
        let words = usize::try_from(map.block_count().div_ceil(64)).expect("a map is in memory");
        Self {
            marked: (0..words).map(|_| AtomicU64::new(0)).collect(),
            block_size: map.block_size(),
            capacity: map.capacity(),
            state: Mutex::new(State {
                map,
                directory,
                period: None,
            }),
        }
    }

    /// Bytes of a tracking block.
    #[must_use]
    pub const fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// Marks a write before it goes on. A mark that can't be kept makes the map doubtful, and the write goes on.
    pub fn mark(&self, offset: u64, length: u64) {
        let Some((first, last)) = self.blocks(offset, length) else {
            return;
        };
        if (first..=last).all(|block| self.is_marked(block)) {
            return;
        }
        let mut state = self.lock();
        state.mark(first, last, 1);
        state.map.mark_blocks(first, last);
        (first..=last).for_each(|block| self.set_marked(block));
    }

    /// Marks a write to an image: the next backup has to take these blocks, whichever map it reads.
    pub fn mark_both(&self, offset: u64, length: u64) {
        let Some((first, last)) = self.blocks(offset, length) else {
            return;
        };
        let mut state = self.lock();
        state.mark(first, last, 2);
        let sectors = self.block_size.bytes() / crate::units::SECTOR_BYTES;
        let start = Sectors::new(first * sectors);
        let end = ((last + 1) * sectors).min(self.capacity.count());
        if state
            .map
            .mark_both(start, Sectors::new(end - start.count()))
            .is_err()
        {
            state.map.corrupt(ResetReason::OutOfRange);
        }
        (first..=last).for_each(|block| self.set_marked(block));
    }

    /// Closes the period. No write may be under way.
    ///
    /// # Errors
    /// The map can't be made anew, where it had to be.
    pub fn take(&self) -> Result<Taken, ChangesError> {
        let mut state = self.lock();
        let taken = state.map.take(Generation::new(Uuid::new_v4()), self.capacity)?;
        if let Err(error) = state.open_period() {
            tracing::error!(%error, "the marks of a new period can't be kept");
            state.map.corrupt(ResetReason::StateDamaged);
        }
        self.marked
            .iter()
            .for_each(|word| word.store(0, Ordering::Relaxed));
        Ok(taken)
    }

    /// Writes the map to its file, durably, and removes the marks of periods that it covers.
    ///
    /// # Errors
    /// The file can't be written. The marks stay, so nothing is lost.
    pub fn save(&self) -> Result<(), ChangesError> {
        self.save_by(statefile::write_sections)
    }

    /// As [`Changes::save`], for the next agent of this boot: the map is in the page cache, as the marks of the open
    /// period are. No other boot believes it until the agent has stopped, and saved it durably.
    ///
    /// # Errors
    /// As there.
    pub fn save_in_boot(&self) -> Result<(), ChangesError> {
        self.save_by(statefile::write_sections_in_boot)
    }

    fn save_by(
        &self,
        write: impl FnOnce(&Path, Format, &SavedHeader, &[Blocks]) -> Result<(), StateFileError>,
    ) -> Result<(), ChangesError> {
        let state = self.lock();
        let Some(directory) = state.directory.clone() else {
            return Ok(());
        };
        let saved = state.map.save();
        let current = period_path(&directory, state.map.generation(), state.map.active());
        drop(state);
        write(&directory.join("map"), MAP, &saved.header, &saved.sections())?;
        remove_periods(&directory, Some(&current));
        Ok(())
    }

    /// The map as of the last take.
    ///
    /// # Errors
    /// There is none, or it is doubtful.
    pub fn frozen(&self) -> Result<Arc<ReadMap>, FullNeeded> {
        self.lock().map.frozen()
    }

    /// The map with the open period.
    ///
    /// # Errors
    /// It is doubtful.
    pub fn live(&self) -> Result<Arc<ReadMap>, FullNeeded> {
        self.lock().map.live_map()
    }

    /// The facts about the map.
    #[must_use]
    pub fn info(&self) -> crate::cbt::CbtInfo {
        self.lock().map.info()
    }

    /// Number of the open period.
    #[must_use]
    pub fn active(&self) -> u8 {
        self.lock().map.active()
    }

    /// The bytes of the live map.
    #[must_use]
    pub fn map_blocks(&self) -> crate::cbt::Blocks {
        self.lock().map.blocks().clone()
    }

    fn blocks(&self, offset: u64, length: u64) -> Option<(u64, u64)> {
        let last = offset.checked_add(length.checked_sub(1)?)?;
        let count = self.block_size.blocks_in(self.capacity);
        let shift = self.block_size.shift();
        Some((offset >> shift, (last >> shift).min(count.checked_sub(1)?)))
    }

    fn is_marked(&self, block: u64) -> bool {
        let word = usize::try_from(block / 64).unwrap_or(usize::MAX);
        self.marked
            .get(word)
            .is_some_and(|word| word.load(Ordering::Relaxed) & (1 << (block % 64)) != 0)
    }

    fn set_marked(&self, block: u64) {
        let word = usize::try_from(block / 64).unwrap_or(usize::MAX);
        if let Some(word) = self.marked.get(word) {
            word.fetch_or(1 << (block % 64), Ordering::Relaxed);
        }
    }

    /// Takes over what the map has of the open period.
    fn learn(&self, state: &State) {
        let active = state.map.active();
        for (block, byte) in (0..).zip(state.map.blocks().iter()) {
            if byte == active {
                self.set_marked(block);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Opens the file of the open period, and gives it what the map knows of that already.
    fn open_period(&mut self) -> Result<(), ChangesError> {
        let Some(directory) = &self.directory else {
            return Ok(());
        };
        let path = period_path(directory, self.map.generation(), self.map.active());
        let failed = |action| {
            let path = path.clone();
            move |source| ChangesError::Period { action, path, source }
        };
        self.period = None;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed("open"))?;
        file.set_len(self.map.block_count()).map_err(failed("size"))?;
        self.period = Some(file);
        Ok(())
    }

    /// Marks blocks in the period's file.
    fn mark(&mut self, first: u64, last: u64, how: u8) {
        if self.directory.is_none() {
            return;
        }
        let marks = [how; 512];
        let mut next = first;
        while next <= last {
            let count = (last - next + 1).min(marks.len() as u64);
            let bytes = &marks[..usize::try_from(count).unwrap_or(marks.len())];
            let written = match &self.period {
                Some(file) => file.write_all_at(bytes, next),
                None => Err(io::ErrorKind::NotFound.into()),
            };
            if let Err(error) = written {
                if self.map.corrupted().is_none() {
                    tracing::error!(%error, "a change can't be noted: the change map is doubtful from now on");
                }
                // Also for who comes after this agent: no marks, no map.
                if let Some(directory) = &self.directory {
                    let _ = fs::remove_file(directory.join("map"));
                }
                self.map.corrupt(ResetReason::StateDamaged);
                return;
            }
            next += count;
        }
    }
}

/// Adds the marks of the map's open period; `None` if it has no file.
fn apply(map: &mut CbtMap, directory: &Path) -> Result<Option<()>, ChangesError> {
    let path = period_path(directory, map.generation(), map.active());
    let marks = match fs::read(&path) {
        Ok(marks) => marks,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(ChangesError::Period {
                action: "read",
                path,
                source,
            });
        }
    };
    if marks.len() as u64 != map.block_count() || marks.iter().any(|mark| *mark > 2) {
        return Err(StateFileError::Damaged {
            path,
            why: "it is not a byte of 0, 1 or 2 a block".to_owned(),
        }
        .into());
    }
    let sectors = map.block_size().bytes() / crate::units::SECTOR_BYTES;
    for (block, mark) in (0_u64..).zip(marks) {
        match mark {
            1 => map.mark_blocks(block, block),
            2 => {
                let start = Sectors::new(block * sectors);
                let count = sectors.min(map.capacity().count() - start.count());
                map.mark_both(start, Sectors::new(count))?;
            }
            _ => {}
        }
    }
    Ok(Some(()))
}

fn period_path(directory: &Path, generation: Generation, number: u8) -> PathBuf {
    directory.join(format!("period-{generation}-{number}"))
}

/// Whether there are marks of another generation: a take began it and did not come to save the map.
fn has_other_generation(directory: &Path, generation: Generation) -> bool {
    let own = format!("period-{generation}-");
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .any(|name| name.starts_with("period-") && !name.starts_with(&own))
}

/// Removes all files of periods but `keep`.
fn remove_periods(directory: &Path, keep: Option<&Path>) {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    for entry in entries {
        let path = entry.path();
        let is_period = entry.file_name().to_string_lossy().starts_with("period-");
        if is_period && Some(path.as_path()) != keep {
            // One that stays is of a period that nobody asks for.
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests;

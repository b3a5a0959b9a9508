//! Journal: which snapshots are held, and which files are their difference storage.
//!
//! A document is written before the first step of a take, without `taken`, and again after the last one, with it. In
//! between nothing is written anywhere. Who finds one without `taken` undoes what there is of the snapshot; who finds
//! device-mapper devices of a snapshot without a document does so, too. No table is written down: the old table of an
//! origin is in its real device, with its key.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::statefile::{self, Format, StateFileError};
use crate::units::{DeviceId, SnapshotId};

const FORMAT: Format = Format {
    name: "blksnap dm snapshot",
    version: 1,
};

const ENDING: &str = "json";

/// The journal can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A document.
    #[error(transparent)]
    Document(#[from] StateFileError),
    /// The directory.
    #[error("can't {action} {}: {source}", path.display())]
    Directory {
        /// What was tried.
        action: &'static str,
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A snapshot, as it is written down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// The boot in which it was taken (`/proc/sys/kernel/random/boot_id`): nothing of it outlives that.
    pub boot: String,
    /// It was taken, and whoever asked for it was told.
    pub taken: bool,
    /// Its devices.
    pub origins: Vec<OriginEntry>,
}

/// A device of a snapshot, as it is written down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OriginEntry {
    /// Its number in that boot.
    pub device: DeviceId,
    /// Its name in device-mapper.
    pub name: String,
    /// Its uuid in device-mapper; may be empty.
    pub uuid: String,
    /// Files that were made for its old data, to be removed.
    pub files: Vec<PathBuf>,
}

/// A directory of documents.
#[derive(Clone, Debug)]
pub struct Journal {
    directory: PathBuf,
}

impl Journal {
    /// The journal in `directory`, which is made if it is not there.
    ///
    /// # Errors
    /// It can't be made.
    pub fn open(directory: &Path) -> Result<Self, JournalError> {
        fs::create_dir_all(directory).map_err(|source| JournalError::Directory {
            action: "make",
            path: directory.to_owned(),
            source,
        })?;
        Ok(Self {
            directory: directory.to_owned(),
        })
    }

    /// The directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    fn path(&self, snapshot: SnapshotId) -> PathBuf {
        self.directory.join(snapshot.to_string()).with_extension(ENDING)
    }

    /// Writes an entry down, durably.
    ///
    /// # Errors
    /// It is not.
    pub fn write(&self, entry: &Entry) -> Result<(), JournalError> {
        Ok(statefile::write(&self.path(entry.snapshot), FORMAT, entry)?)
    }

    /// Forgets a snapshot.
    ///
    /// # Errors
    /// Its document stays.
    pub fn remove(&self, snapshot: SnapshotId) -> Result<(), JournalError> {
        Ok(statefile::remove(&self.path(snapshot))?)
    }

    /// Removes what an agent that was killed while it wrote an entry has left beside it. Nobody writes meanwhile.
    ///
    /// # Errors
    /// Something stays.
    pub fn tidy(&self) -> Result<(), JournalError> {
        let failed = |action| {
            let path = self.directory.clone();
            move |source| JournalError::Directory { action, path, source }
        };
        for file in fs::read_dir(&self.directory).map_err(failed("read"))? {
            let file = file.map_err(failed("read"))?;
            let path = file.path();
            let is_file = file.file_type().map_err(failed("read"))?.is_file();
            if is_file && path.extension().is_none_or(|ending| ending != ENDING) {
                fs::remove_file(&path).map_err(failed("remove what was left in"))?;
            }
        }
        Ok(())
    }

    /// All entries; what can't be read is told as well, each with its error.
    ///
    /// # Errors
    /// The directory can't be read.
    pub fn read(&self) -> Result<(Vec<Entry>, Vec<StateFileError>), JournalError> {
        let failed = |source| JournalError::Directory {
            action: "read",
            path: self.directory.clone(),
            source,
        };
        let (mut entries, mut damaged) = (Vec::new(), Vec::new());
        for file in fs::read_dir(&self.directory).map_err(failed)? {
            let path = file.map_err(failed)?.path();
            if path.extension().is_none_or(|ending| ending != ENDING) {
                continue;
            }
            match statefile::read::<Entry>(&path, FORMAT) {
                Ok(entry) => entries.extend(entry),
                Err(error) => damaged.push(error),
            }
        }
        entries.sort_by_key(|entry| entry.snapshot);
        Ok((entries, damaged))
    }
}

/// The boot that this is.
///
/// # Errors
/// `/proc` is not mounted.
pub fn boot_id() -> io::Result<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn what_was_written_is_found_and_what_is_damaged_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(&directory.path().join("dm")).unwrap();
        let entry = |number: u128| Entry {
            snapshot: SnapshotId::new(Uuid::from_u128(number)),
            boot: boot_id().unwrap(),
            taken: number.is_multiple_of(2),
            origins: vec![OriginEntry {
                device: DeviceId { major: 253, minor: 1 },
                name: "vg-root".to_owned(),
                uuid: "LVM-x".to_owned(),
                files: vec!["/srv/a".into()],
            }],
        };
        journal.write(&entry(2)).unwrap();
        journal.write(&entry(1)).unwrap();
        // Of an agent that was killed in between.
        let left = directory.path().join("dm/.3.json.new");
        fs::write(&left, "{ half a docum").unwrap();
        journal.tidy().unwrap();
        assert!(!left.exists());
        assert_eq!(journal.read().unwrap().0, [entry(1), entry(2)]);
        fs::write(journal.path(entry(1).snapshot), "{").unwrap();
        let (entries, damaged) = journal.read().unwrap();
        assert_eq!((entries, damaged.len()), (vec![entry(2)], 1));
        journal.remove(entry(1).snapshot).unwrap();
        journal.remove(entry(2).snapshot).unwrap();
        assert_eq!(journal.read().unwrap().0, []);
    }
}

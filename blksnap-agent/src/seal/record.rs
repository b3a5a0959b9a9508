//! Record and seal: the two files of a tracked device in the state directory.
//!
//! The *record*, `NAME.device`, says that a device is tracked, and how. It is written before tracking begins and
//! removed when tracking is ended on purpose, so that the next system start knows what to track again.
//!
//! The *seal*, `NAME.seal`, is the whole change map with what proves that nothing was written after it. It is there
//! only from a clean stop to the next start: before a device is tracked, its seal is removed for good. A crash
//! therefore leaves none, and none is used twice.
//!
//! `NAME` is a UUID, because names and numbers of devices change with each boot.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::counters::WriteCounters;
use super::fingerprint::Fingerprint;
use crate::cbt::{CbtMap, SavedHeader, SavedMap, TrackingParams};
use crate::disk::DeviceIdentity;
use crate::statefile::{self, Format, StateFileError};

/// The record's form.
const RECORD: Format = Format {
    name: "blksnap-tracked",
    version: 1,
};

/// The seal's form.
const SEAL: Format = Format {
    name: "blksnap-seal",
    version: 1,
};

/// The form of the list of boots.
const BOOTS: Format = Format {
    name: "blksnap-boots",
    version: 1,
};

/// The file with the list of boots.
const BOOTS_FILE: &str = "boots";

const RECORD_SUFFIX: &str = "device";
const SEAL_SUFFIX: &str = "seal";

/// How the tracking block size was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SavedGranularity {
    /// By the capacity, as the parameters say.
    Adaptive(TrackingParams),
    /// This many bytes.
    Fixed(u64),
}

/// A device that is tracked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Name of its files.
    pub name: Uuid,
    /// The node that it was attached by.
    pub path: PathBuf,
    /// The device.
    pub identity: DeviceIdentity,
    /// How its blocks are sized.
    pub granularity: SavedGranularity,
}

/// What a disk below the device had counted when it was sealed; for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SealedCounters {
    /// The kernel's name of the disk or partition.
    pub name: String,
    /// Its counters.
    pub counters: WriteCounters,
}

/// What a seal says besides the bytes of the map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SealHeader {
    /// The record that it belongs to.
    pub record: Record,
    /// The boot that it was made in.
    pub boot: String,
    /// When, in seconds since 1970; for people.
    pub at: u64,
    /// The device then. Its capacity may differ from the record's.
    pub identity: DeviceIdentity,
    /// Writes of that boot.
    pub counters: Vec<SealedCounters>,
    /// Content of the device.
    pub fingerprint: Fingerprint,
    /// The change map.
    pub map: SavedHeader,
}

/// A seal as it was found.
#[derive(Clone, Debug)]
pub struct Sealed {
    /// What it says.
    pub header: SealHeader,
    /// Bytes of the map.
    pub sections: Vec<Vec<u8>>,
}

impl Sealed {
    /// The change map.
    ///
    /// # Errors
    /// It is none.
    pub fn into_map(self) -> Result<CbtMap, crate::cbt::RestoreError> {
        CbtMap::restore_sections(&self.header.map, self.sections)
    }
}

/// The boots in which a daemon used the state directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Boots {
    /// The last one.
    last: String,
    /// The one before.
    before: Option<String>,
}

/// The state directory.
#[derive(Clone, Debug)]
pub struct StateDirectory {
    path: PathBuf,
}

impl StateDirectory {
    /// The directory at `path`, which is made when something is written to it.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn file(&self, name: Uuid, suffix: &str) -> PathBuf {
        self.path.join(format!("{name}.{suffix}"))
    }

    /// Says for good that a daemon started in this boot, before it does anything else, and gives the boot before in
    /// which one did; `None` if that is not known. A seal of an older one was not used when it should have been:
    /// since then its device may have been written with nobody tracking it.
    ///
    /// # Errors
    /// The directory can't be written.
    pub fn enter(&self, boot: &str) -> Result<Option<String>, StateFileError> {
        self.make()?;
        let path = self.path.join(BOOTS_FILE);
        let known = statefile::read::<Boots>(&path, BOOTS).unwrap_or_else(|error| {
            tracing::warn!(%error, "no change map goes on");
            None
        });
        let before = match known {
            Some(known) if known.last == boot => return Ok(known.before),
            known => known.map(|known| known.last),
        };
        let boots = Boots {
            last: boot.to_owned(),
            before: before.clone(),
        };
        statefile::write(&path, BOOTS, &boots)?;
        Ok(before)
    }

    /// All records, in the order of their names. One that can't be read is said to the log; what its seal says of
    /// it is used instead, if there is one.
    ///
    /// # Errors
    /// The directory can't be read.
    pub fn records(&self) -> io::Result<Vec<Record>> {
        let mut records = Vec::new();
        for name in self.names(RECORD_SUFFIX)? {
            let path = self.file(name, RECORD_SUFFIX);
            let read = match statefile::read::<Record>(&path, RECORD) {
                Ok(Some(record)) if record.name == name => Ok(Some(record)),
                Ok(Some(_)) => Err("it has another name".to_owned()),
                Ok(None) => Ok(None),
                Err(error) => Err(error.to_string()),
            };
            match read {
                Ok(record) => records.extend(record),
                Err(why) => {
                    tracing::error!(path = %path.display(), why, "the record of a tracked device is damaged");
                    records.extend(self.of_seal(name));
                }
            }
        }
        Ok(records)
    }

    fn of_seal(&self, name: Uuid) -> Option<Record> {
        let sealed = self.seal(name).ok().flatten()?;
        Some(sealed.header.record).filter(|record| record.name == name)
    }

    /// The UUIDs of the files with this suffix.
    fn names(&self, suffix: &str) -> io::Result<Vec<Uuid>> {
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let file = entry?.file_name();
            let name = Path::new(&file)
                .extension()
                .filter(|found| *found == suffix)
                .and(Path::new(&file).file_stem())
                .and_then(|stem| stem.to_str()?.parse::<Uuid>().ok());
            names.extend(name);
        }
        names.sort();
        Ok(names)
    }

    /// Writes a record. Whatever seal its device had is gone before this returns: from here on the device may be
    /// tracked.
    ///
    /// # Errors
    /// The directory can't be written.
    pub fn begin(&self, record: &Record) -> Result<(), StateFileError> {
        self.make()?;
        // Both orders are right, as a seal needs its record; this one leaves the record with the seal for a reader
        // of what a crash left.
        statefile::remove(&self.file(record.name, SEAL_SUFFIX))?;
        statefile::write(&self.file(record.name, RECORD_SUFFIX), RECORD, record)
    }

    fn make(&self) -> Result<(), StateFileError> {
        use std::os::unix::fs::DirBuilderExt as _;
        let made = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.path);
        made.map_err(|source| StateFileError::Io {
            action: "make the directory",
            path: self.path.clone(),
            source,
        })
    }

    /// Forgets a device: tracking was ended on purpose.
    ///
    /// # Errors
    /// The files can't be removed.
    pub fn forget(&self, name: Uuid) -> Result<(), StateFileError> {
        statefile::remove(&self.file(name, SEAL_SUFFIX))?;
        statefile::remove(&self.file(name, RECORD_SUFFIX))
    }

    /// Writes a seal.
    ///
    /// # Errors
    /// The directory can't be written.
    pub fn write_seal(&self, header: &SealHeader, map: &SavedMap) -> Result<(), StateFileError> {
        let path = self.file(header.record.name, SEAL_SUFFIX);
        statefile::write_sections(&path, SEAL, header, &map.sections())
    }

    /// Removes a seal, for good.
    ///
    /// # Errors
    /// It can't be removed.
    pub fn break_seal(&self, name: Uuid) -> Result<(), StateFileError> {
        statefile::remove(&self.file(name, SEAL_SUFFIX))
    }

    /// Reads a seal; `None` if there is none.
    ///
    /// # Errors
    /// It can't be read, or is damaged.
    pub fn seal(&self, name: Uuid) -> Result<Option<Sealed>, StateFileError> {
        let read = statefile::read_sections(&self.file(name, SEAL_SUFFIX), SEAL)?;
        Ok(read.map(|(header, sections)| Sealed { header, sections }))
    }

    /// Removes all records and seals; true if there was one.
    ///
    /// # Errors
    /// They can't be removed.
    pub fn purge(&self) -> Result<bool, StateFileError> {
        let failed = |source| StateFileError::Io {
            action: "read the directory",
            path: self.path.clone(),
            source,
        };
        let mut any = false;
        for suffix in [SEAL_SUFFIX, RECORD_SUFFIX] {
            for name in self.names(suffix).map_err(failed)? {
                statefile::remove(&self.file(name, suffix))?;
                any = true;
            }
        }
        Ok(any)
    }
}

#[cfg(test)]
mod tests;

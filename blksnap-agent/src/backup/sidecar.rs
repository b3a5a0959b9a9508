//! Sidecar: the file beside a backup that says what the backup is.
//!
//! It is a [state file](crate::statefile). What it claims is only worth something together with the target's
//! [`Fingerprint`]: length, inode and time of the last change as they were after the last sync. A file that was
//! replaced, cut or written by anybody else since no longer has it.

use std::ffi::OsString;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cbt::Base;
use crate::disk::BlockDevice;
use crate::statefile::{self, Format, StateFileError};
use crate::units::{BlockSize, DeviceId, Sectors};

/// Name and version of the format.
pub const FORMAT: Format = Format {
    name: "blksnap-backup",
    version: 1,
};

/// What follows the target's name.
const SUFFIX: &str = ".blksnap.json";

/// The device that a backup is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SidecarDevice {
    /// Canonical path at that time.
    pub path: PathBuf,
    /// The kernel's name.
    pub name: String,
    /// Number.
    pub id: DeviceId,
    /// Capacity in bytes.
    pub capacity: u64,
}

impl SidecarDevice {
    /// Of this device.
    #[must_use]
    pub fn of(device: &BlockDevice) -> Self {
        Self {
            path: device.path.clone(),
            name: device.name.clone(),
            id: device.id,
            capacity: device.capacity.bytes(),
        }
    }
}

/// How the target looked after its last sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fingerprint {
    /// Bytes.
    pub length: u64,
    /// Number of the file in its file system.
    pub inode: u64,
    /// Seconds of the time of the last change.
    pub modified_seconds: i64,
    /// Nanoseconds of it.
    pub modified_nanoseconds: i64,
}

impl Fingerprint {
    /// Of a file with this metadata. The number of the file system is left out: it changes with a reboot.
    #[must_use]
    pub fn of(metadata: &Metadata) -> Self {
        Self {
            length: metadata.len(),
            inode: metadata.ino(),
            modified_seconds: metadata.mtime(),
            modified_nanoseconds: metadata.mtime_nsec(),
        }
    }
}

/// How much of the target can be relied on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is", deny_unknown_fields)]
pub enum SidecarState {
    /// A backup is being written, or was killed: the target is no image.
    Writing {
        /// A full backup, not an incremental one.
        full: bool,
    },
    /// An incremental backup stopped in order. The target is no image, but every block that did not change since
    /// `base` is right in it.
    Stopped {
        /// The take that the file showed before.
        base: Base,
        /// The target, after it was synced.
        target: Fingerprint,
    },
    /// The target is the device at the take `base`.
    Complete {
        /// The take.
        base: Base,
        /// The target, after it was synced.
        target: Fingerprint,
    },
}

/// Content of a sidecar.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sidecar {
    /// The device.
    pub device: SidecarDevice,
    /// Tracking block size in bytes.
    pub block_size: u64,
    /// State of the target.
    pub state: SidecarState,
}

impl Sidecar {
    /// The sidecar's path for the target at `target`.
    #[must_use]
    pub fn path_of(target: &Path) -> PathBuf {
        let mut name = OsString::from(target.file_name().unwrap_or_default());
        name.push(SUFFIX);
        target.with_file_name(name)
    }

    /// Reads the sidecar at `path`; `None` if there is none.
    ///
    /// # Errors
    /// It can't be read, is damaged, or has values that none is ever written with.
    pub fn read(path: &Path) -> Result<Option<Self>, StateFileError> {
        let sidecar: Option<Self> = statefile::read(path, FORMAT)?;
        if let Some(sidecar) = &sidecar {
            sidecar.check().map_err(|why| StateFileError::Damaged {
                path: path.to_owned(),
                why,
            })?;
        }
        Ok(sidecar)
    }

    /// Writes the sidecar to `path`, see [`statefile::write`].
    ///
    /// # Errors
    /// The directory can't be written.
    pub fn write(&self, path: &Path) -> Result<(), StateFileError> {
        statefile::write(path, FORMAT, self)
    }

    /// The take that the target shows or showed last.
    #[must_use]
    pub const fn base(&self) -> Option<Base> {
        match &self.state {
            SidecarState::Writing { .. } => None,
            SidecarState::Stopped { base, .. } | SidecarState::Complete { base, .. } => Some(*base),
        }
    }

    fn check(&self) -> Result<(), String> {
        BlockSize::from_bytes(self.block_size).map_err(|error| error.to_string())?;
        Sectors::from_bytes(self.device.capacity).map_err(|error| error.to_string())?;
        match &self.state {
            SidecarState::Stopped { base, .. } | SidecarState::Complete { base, .. } if base.number == 0 => {
                Err("no take has number 0".to_owned())
            }
            SidecarState::Stopped { target, .. } | SidecarState::Complete { target, .. }
                if target.length != self.device.capacity =>
            {
                Err("the lengths of target and device differ".to_owned())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Generation;
    use uuid::Uuid;

    fn sidecar(state: SidecarState) -> Sidecar {
        Sidecar {
            device: SidecarDevice {
                path: "/dev/loop7".into(),
                name: "loop7".to_owned(),
                id: DeviceId { major: 7, minor: 7 },
                capacity: 1 << 20,
            },
            block_size: 65_536,
            state,
        }
    }

    fn complete(number: u8, length: u64) -> Sidecar {
        sidecar(SidecarState::Complete {
            base: Base {
                generation: Generation::new(Uuid::from_u128(5)),
                number,
            },
            target: Fingerprint {
                length,
                inode: 12,
                modified_seconds: -1,
                modified_nanoseconds: 999_999_999,
            },
        })
    }

    #[test]
    fn the_path_is_the_targets_with_a_suffix() {
        let path = Sidecar::path_of(Path::new("/backup/sda1.img"));
        assert_eq!(path, Path::new("/backup/sda1.img.blksnap.json"));
    }

    #[test]
    fn all_states_are_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.blksnap.json");
        let full = complete(3, 1 << 20);
        let SidecarState::Complete { base, target } = full.state.clone() else {
            unreachable!()
        };
        for state in [
            full.state,
            SidecarState::Stopped { base, target },
            SidecarState::Writing { full: true },
            SidecarState::Writing { full: false },
        ] {
            let written = sidecar(state);
            written.write(&path).unwrap();
            assert_eq!(Sidecar::read(&path).unwrap(), Some(written));
        }
    }

    #[test]
    fn impossible_values_are_damage() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.blksnap.json");
        let mut odd = complete(1, 1 << 20);
        odd.block_size = 65_537;
        for wrong in [complete(0, 1 << 20), complete(1, 1 << 19), odd] {
            wrong.write(&path).unwrap();
            let error = Sidecar::read(&path).unwrap_err();
            assert!(matches!(error, StateFileError::Damaged { .. }), "{error}");
        }
    }
}

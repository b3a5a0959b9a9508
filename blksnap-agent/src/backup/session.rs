//! Session: one backup of a target, in the order that makes it safe to be killed at any point.
//!
//! [`Session::open`] locks the target and reads its sidecar; [`Session::plan`] decides; [`Session::start`] marks the
//! sidecar as unfinished, and only then may the target be written. [`Session::complete`] syncs the target, then
//! completes the sidecar. A session that is merely dropped leaves the unfinished mark, which is the truth.

use std::io;
use std::path::Path;

use super::BackupError;
use super::plan::{self, DeviceFacts, Plan};
use super::sidecar::{Fingerprint, Sidecar, SidecarDevice, SidecarState};
use super::target::Target;
use crate::cbt::Base;
use crate::engine::FileSink;
use crate::statefile::{self, StateFileError};

/// A backup being made.
#[derive(Debug)]
pub struct Session {
    target: Target,
    earlier: Option<Fingerprint>,
    prior: Result<Option<Sidecar>, StateFileError>,
}

impl Session {
    /// Opens and locks the target and reads its sidecar. `check` may refuse the target; if this made the file, it
    /// is removed then.
    ///
    /// # Errors
    /// The target can't be used.
    pub fn open<E>(path: &Path, check: impl FnOnce(&Target) -> Result<(), E>) -> Result<Self, BackupError>
    where
        BackupError: From<E>,
    {
        let target = Target::open(path)?;
        let checked = check(&target).map_err(BackupError::from);
        match checked.and_then(|()| Ok(target.earlier()?)) {
            Ok(earlier) => {
                let prior = Sidecar::read(&target.sidecar_path());
                Ok(Self {
                    target,
                    earlier,
                    prior,
                })
            }
            Err(error) => {
                target.abandon();
                Err(error)
            }
        }
    }

    /// Where a copy is to write: the target, which is one hole (`fresh`), or holds older data.
    ///
    /// # Errors
    /// The target does not have the device's length, or no descriptor is left.
    pub fn sink(&self, fresh: bool) -> Result<FileSink, BackupError> {
        Ok(self.target.sink(fresh)?)
    }

    /// The error for a write to the target that failed.
    pub(super) fn write_failed(&self, source: io::Error) -> BackupError {
        self.target.write_failed(source).into()
    }

    /// The target's path, symbolic links resolved.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.target.path()
    }

    /// Whether the backup can be incremental.
    #[must_use]
    pub fn plan(&self, incremental: bool, device: &DeviceFacts) -> Plan {
        plan::plan(incremental, &self.prior, self.earlier.as_ref(), device)
    }

    /// Marks the target as unfinished, for good. For a full backup it then becomes one hole.
    ///
    /// # Errors
    /// The sidecar can't be written; the target is as it was. Or its length can't be set.
    pub fn start(&self, device: &SidecarDevice, block_size: u64, full: bool) -> Result<(), BackupError> {
        let sidecar = Sidecar {
            device: device.clone(),
            block_size,
            state: SidecarState::Writing { full },
        };
        sidecar.write(&self.target.sidecar_path())?;
        if full {
            self.target.clear(device.capacity)?;
        }
        Ok(())
    }

    /// Makes the target permanent, then says in its sidecar that it is the device at `base`.
    ///
    /// # Errors
    /// Something can't be written; the target stays unfinished.
    pub fn complete(&self, device: &SidecarDevice, block_size: u64, base: Base) -> Result<(), BackupError> {
        let target = self.target.sync()?;
        self.write(device, block_size, SidecarState::Complete { base, target })
    }

    /// Ends an incremental backup that failed in order: what did not change since `base` is still right in the
    /// target, so that the next one can begin from there again.
    ///
    /// # Errors
    /// Something can't be written; the target stays unfinished.
    pub fn stop(&self, device: &SidecarDevice, block_size: u64, base: Base) -> Result<(), BackupError> {
        let target = self.target.sync()?;
        self.write(device, block_size, SidecarState::Stopped { base, target })
    }

    /// Ends a full backup that failed. A target made for it is removed with its sidecar; one that was there before
    /// stays, marked as unfinished once it was [started](Self::start).
    pub fn abandon(self) {
        if self.earlier.is_none() {
            // A sidecar that stays without its target claims nothing.
            let _ = statefile::remove(&self.target.sidecar_path());
        }
        self.target.abandon();
    }

    fn write(&self, device: &SidecarDevice, block_size: u64, state: SidecarState) -> Result<(), BackupError> {
        let sidecar = Sidecar {
            device: device.clone(),
            block_size,
            state,
        };
        Ok(sidecar.write(&self.target.sidecar_path())?)
    }
}

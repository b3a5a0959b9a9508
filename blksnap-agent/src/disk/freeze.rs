//! Freezer: stops the file systems of several devices, and lets them go on again.
//!
//! # Order
//! A file system that stands on another one (through a loop device) is frozen first and thawed last: freezing
//! writes back, thawing writes a superblock, and both would wait for ever on a frozen file system below.
//!
//! # What can't be frozen
//! File systems without support (vfat, exfat) are synchronised instead, and the device's copy then counts as
//! crash consistent. One that somebody else has frozen is an error: when it thaws is not ours to know.
//!
//! # Locking
//! From [`Freezer::freeze`] to [`Freezer::thaw`] no thread of the agent may write to one of these file systems:
//! it would sleep until the watchdog's deadline. [`FileSystems::hold`] tells which files are out of bounds.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::mounts::{Mount, Table};
use super::watchdog::{Watchdog, WatchdogCommand, WatchdogError};
use super::{BlockDevice, DiskError};
use crate::sys::ioctl;
use crate::units::DeviceId;

/// Freezing or thawing failed.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// The watchdog.
    #[error(transparent)]
    Watchdog(#[from] WatchdogError),
    /// Frozen by somebody else.
    #[error("{mountpoint} is frozen already: `fsfreeze --unfreeze {mountpoint}` ends that")]
    Frozen {
        /// Where it is mounted.
        mountpoint: PathBuf,
    },
    /// The file system does not freeze.
    #[error("can't freeze {mountpoint}: {source}")]
    Freeze {
        /// Where it is mounted.
        mountpoint: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file system does not sync.
    #[error("can't write back {mountpoint}: {source}")]
    Sync {
        /// Where it is mounted, or the node.
        mountpoint: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody else has thawed.
    #[error(
        "{mountpoint} was thawed before the copy was complete: the freeze limit passed, or somebody else thawed it"
    )]
    ThawedEarly {
        /// Where it is mounted.
        mountpoint: PathBuf,
    },
    /// The file system does not thaw.
    #[error("can't thaw {mountpoint}: {source}; `fsfreeze --unfreeze {mountpoint}` tries again")]
    Thaw {
        /// Where it is mounted.
        mountpoint: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A file system, open through one of its mounts.
#[derive(Debug)]
struct FileSystem {
    mount: Mount,
    file: File,
    /// Superblocks below, itself included.
    beneath: std::collections::BTreeSet<DeviceId>,
}

/// The file systems of several devices, in the order of freezing.
#[derive(Debug, Default)]
pub struct FileSystems {
    list: Vec<FileSystem>,
    /// Superblocks of the file systems of each device.
    of_device: BTreeMap<DeviceId, Vec<DeviceId>>,
}

impl FileSystems {
    /// Finds and opens the file systems on `devices`.
    ///
    /// # Errors
    /// `/proc` is not mounted, or a file system can't be opened at any of its mount points.
    pub fn on(devices: &[&BlockDevice]) -> Result<Self, DiskError> {
        let table = Table::read()?;
        let mut this = Self::default();
        for device in devices {
            let mounts = table.on_device(device);
            let mut superblocks: Vec<DeviceId> = mounts.iter().map(|mount| mount.superblock).collect();
            superblocks.sort_unstable();
            superblocks.dedup();
            for superblock in &superblocks {
                if this
                    .list
                    .iter()
                    .any(|known| known.mount.superblock == *superblock)
                {
                    continue;
                }
                let candidates = mounts.iter().filter(|mount| mount.superblock == *superblock);
                let (mount, file) = open_any(candidates)?;
                let beneath = table.beneath(&mount);
                this.list.push(FileSystem { mount, file, beneath });
            }
            this.of_device.insert(device.id, superblocks);
        }
        // What stands on another one stands on all that one stands on, and on itself: it has more beneath.
        this.list.sort_by_key(|one| std::cmp::Reverse(one.beneath.len()));
        Ok(this)
    }

    /// The mount point of a file system of ours that must be written to when `file` is: the one that holds it,
    /// or one that this stands on.
    ///
    /// # Errors
    /// `/proc` is not mounted.
    pub fn hold(&self, file: impl AsFd) -> Result<Option<PathBuf>, DiskError> {
        let table = Table::read()?;
        let Ok(mount) = table.of_file(file) else {
            // Not in the table: an internal mount (memfd), or one of another name space.
            return Ok(None);
        };
        let beneath = table.beneath(mount);
        Ok(self
            .list
            .iter()
            .find(|one| beneath.contains(&one.mount.superblock))
            .map(|one| one.mount.mountpoint.clone()))
    }

    /// Writes back all of them (`syncfs`).
    ///
    /// # Errors
    /// The first failure.
    pub fn sync(&self) -> Result<(), FreezeError> {
        self.list.iter().try_for_each(FileSystem::sync)
    }
}

impl FileSystem {
    fn sync(&self) -> Result<(), FreezeError> {
        nix::unistd::syncfs(&self.file).map_err(|errno| FreezeError::Sync {
            mountpoint: self.mount.mountpoint.clone(),
            source: errno.into(),
        })
    }

    /// True if it is frozen now, false if it can't be.
    fn freeze(&self) -> Result<bool, FreezeError> {
        let mountpoint = || self.mount.mountpoint.clone();
        match ioctl::fifreeze(&self.file) {
            Ok(()) => Ok(true),
            Err(Errno::EOPNOTSUPP) => self.sync().map(|()| false),
            Err(Errno::EBUSY) => Err(FreezeError::Frozen {
                mountpoint: mountpoint(),
            }),
            Err(errno) => Err(FreezeError::Freeze {
                mountpoint: mountpoint(),
                source: errno.into(),
            }),
        }
    }

    fn thaw(&self) -> Result<(), FreezeError> {
        let mountpoint = self.mount.mountpoint.clone();
        match ioctl::fithaw(&self.file) {
            Ok(()) => Ok(()),
            Err(Errno::EINVAL) => Err(FreezeError::ThawedEarly { mountpoint }),
            Err(errno) => Err(FreezeError::Thaw {
                mountpoint,
                source: errno.into(),
            }),
        }
    }
}

fn open_any<'a>(mounts: impl Iterator<Item = &'a Mount>) -> Result<(Mount, File), DiskError> {
    let mut failure = None;
    for mount in mounts {
        match mount.open() {
            Ok(file) => return Ok((mount.clone(), file)),
            Err(error) => failure = Some(error),
        }
    }
    Err(failure.expect("a superblock comes from at least one mount"))
}

/// Freezes and thaws [`FileSystems`], with a watchdog beside it. Dropped, it thaws.
#[derive(Debug)]
pub struct Freezer {
    file_systems: FileSystems,
    command: WatchdogCommand,
    watchdog: Option<Watchdog>,
    /// Which are frozen by us: indices into the list, in the order of freezing.
    frozen: Vec<usize>,
    /// Superblocks that could not be frozen the last time.
    unsupported: Vec<DeviceId>,
    since: Option<Instant>,
}

impl Freezer {
    /// A freezer for `file_systems`, whose watchdog is run by `command`.
    #[must_use]
    pub fn new(file_systems: FileSystems, command: WatchdogCommand) -> Self {
        Self {
            file_systems,
            command,
            watchdog: None,
            frozen: Vec::new(),
            unsupported: Vec::new(),
            since: None,
        }
    }

    /// The file systems.
    #[must_use]
    pub fn file_systems(&self) -> &FileSystems {
        &self.file_systems
    }

    /// Starts the watchdog; a separate step, so that none of its time passes while frozen.
    ///
    /// # Errors
    /// The process does not start.
    pub fn arm(&mut self) -> Result<(), FreezeError> {
        if self.watchdog.is_none() && !self.file_systems.list.is_empty() {
            let thaw_order = self.file_systems.list.iter().rev();
            let mountpoints: Vec<_> = thaw_order.map(|one| one.file.as_fd()).collect();
            self.watchdog = Some(Watchdog::start(&self.command, &mountpoints)?);
        }
        Ok(())
    }

    /// Freezes all of them, to be thawed before `limit` has passed. If one fails, all are thawed.
    ///
    /// # Errors
    /// The watchdog, or a file system that can't be frozen now.
    pub fn freeze(&mut self, limit: Duration) -> Result<(), FreezeError> {
        self.arm()?;
        if let Some(watchdog) = &mut self.watchdog
            && watchdog.go(limit).is_err()
        {
            // It was armed long ago, and somebody has ended it since.
            self.watchdog = None;
            self.arm()?;
            self.watchdog
                .as_mut()
                .map_or(Ok(()), |watchdog| watchdog.go(limit))?;
        }
        self.since = (!self.file_systems.list.is_empty()).then(Instant::now);
        self.unsupported.clear();
        for (index, one) in self.file_systems.list.iter().enumerate() {
            match one.freeze() {
                Ok(true) => self.frozen.push(index),
                Ok(false) => {
                    if !one.mount.read_only() {
                        self.unsupported.push(one.mount.superblock);
                    }
                }
                Err(error) => {
                    self.release();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Thaws all of them; gives how long they were frozen, which is nothing if there are none.
    ///
    /// # Errors
    /// One was thawed before, by the watchdog's deadline or somebody else: then there was no single instant.
    pub fn thaw(&mut self) -> Result<Duration, FreezeError> {
        let mut failure = None;
        for index in std::mem::take(&mut self.frozen).into_iter().rev() {
            let one = &self.file_systems.list[index];
            if let Err(error) = one.thaw() {
                failure.get_or_insert(error);
            }
        }
        let duration = self.since.take().map(|since| since.elapsed()).unwrap_or_default();
        if let Some(watchdog) = self.watchdog.take() {
            // An error other than "not frozen" leaves the thaw to the watchdog: closing its socket starts it.
            let left_frozen = matches!(failure, Some(FreezeError::Thaw { .. }));
            let fired = if left_frozen { Ok(false) } else { watchdog.disarm() };
            if let (Ok(true), None, Some(one)) = (&fired, &failure, self.file_systems.list.first()) {
                failure = Some(FreezeError::ThawedEarly {
                    mountpoint: one.mount.mountpoint.clone(),
                });
            }
        }
        match failure {
            None => Ok(duration),
            Some(error) => Err(error),
        }
    }

    /// True if the device has file systems and all of them were frozen the last time.
    #[must_use]
    pub fn froze(&self, device: DeviceId) -> bool {
        self.file_systems
            .of_device
            .get(&device)
            .is_some_and(|list| !list.is_empty() && !list.iter().any(|one| self.unsupported.contains(one)))
    }

    fn release(&mut self) {
        if self.watchdog.is_some() || !self.frozen.is_empty() {
            let _ = self.thaw();
        }
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        self.release();
    }
}

//! Seal: change maps that go on after a reboot, where nothing was missed.
//!
//! Tracking lives in the kernel and ends with it. What is written after tracking stopped and before it begins again
//! is seen by nobody. A map goes on over that gap only with proof that nothing was written in it; everything else
//! is a new generation with a reason.
//!
//! - [`record`]: what is on disk. A record for each tracked device, and a seal from a clean stop to the next start.
//! - [`quiet`], [`fingerprint`], [`counters`]: what is found out about a device at the stop and at the start.
//! - [`decide()`]: the proof.
//! - [`shutdown`]: whether a stop is one of the system.
//!
//! The daemon calls [`Seals::prepare`] before it tracks a device and [`Seals::settle`] after, [`Seals::adopted`] for
//! what the kernel tracked while no agent ran, [`Seals::forget`] at a detach, and [`Seals::seal`] at its stop.
//!
//! # Order
//! The seal of a device is removed for good before the device is tracked, so that it is used once; a crash leaves
//! none. It is written when nothing can write to the device any more, and removed again if something did.

pub mod counters;
pub mod decide;
pub mod fingerprint;
#[cfg(test)]
mod model;
pub mod quiet;
pub mod record;
pub mod shutdown;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use uuid::Uuid;

pub use decide::{Doubt, Evidence, decide};
pub use record::{Record, SavedGranularity, StateDirectory};
pub use shutdown::SealPolicy;

use crate::cbt::{CbtMap, ResetReason, SavedMap};
use crate::disk::{BlockDevice, DeviceIdentity, Difference, DirectReader, DiskError};
use crate::statefile::StateFileError;
use crate::units::{BlockSize, DeviceId};
use counters::{Unprovable, WriteCounters, grounds};
use fingerprint::{ContentDiffers, Fingerprint, places};
use quiet::{Claim, InUse};
use record::{SealHeader, SealedCounters};

/// Where the kernel tells of itself; other places in tests.
#[derive(Clone, Debug)]
pub struct Roots {
    /// `/sys`.
    pub sysfs: PathBuf,
    /// `/proc`.
    pub proc: PathBuf,
    /// The file with the number of this boot.
    pub boot: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self {
            sysfs: PathBuf::from("/sys"),
            proc: PathBuf::from("/proc"),
            boot: PathBuf::from("/proc/sys/kernel/random/boot_id"),
        }
    }
}

/// How devices are carried over reboots.
#[derive(Clone, Debug)]
pub struct SealConfig {
    /// The state directory.
    pub directory: PathBuf,
    /// When maps are sealed.
    pub policy: SealPolicy,
    /// Where the kernel tells of itself.
    pub roots: Roots,
}

/// Keeps other daemons out of a state directory as long as it lives.
#[derive(Debug)]
pub struct StateLock {
    _directory: Flock<File>,
}

impl StateLock {
    /// Makes the directory where it is missing, and locks it; `None` if another daemon has it.
    ///
    /// # Errors
    /// It can't be made or opened.
    pub fn take(path: &Path) -> io::Result<Option<Self>> {
        DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        match Flock::lock(File::open(path)?, FlockArg::LockExclusiveNonblock) {
            Ok(directory) => Ok(Some(Self {
                _directory: directory,
            })),
            Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => Err(errno.into()),
        }
    }
}

/// A record can't be kept.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateFileError),
    /// The device.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The list of records.
    #[error("can't read the directory {path}: {source}")]
    Directory {
        /// The state directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Why a map was not sealed: the next start of the system begins a new generation.
#[derive(Debug, thiserror::Error)]
pub enum Unsealed {
    /// The device has no record.
    #[error("it has no record")]
    Unrecorded,
    /// Something may still write to it.
    #[error("{0}")]
    InUse(#[from] InUse),
    /// It was written to meanwhile.
    #[error("it was written to meanwhile")]
    Written,
    /// The map is in doubt.
    #[error("its map can't be relied on: {0}")]
    Corrupted(ResetReason),
    /// The tracker fails.
    #[error("{0}")]
    Tracker(String),
    /// Not the device of the record.
    #[error("{0}")]
    Device(#[from] Difference),
    /// The device can't be looked at.
    #[error("{0}")]
    Disk(#[from] DiskError),
    /// Nothing could be proven by it.
    #[error("{0}")]
    Counters(#[from] Unprovable),
    /// The kernel does not say which boot this is.
    #[error("the kernel does not say which boot this is")]
    BootUnknown,
    /// The disk fails.
    #[error("{0}")]
    Content(#[from] ContentDiffers),
    /// The state directory.
    #[error("{0}")]
    State(#[from] StateFileError),
}

/// What a device is tracked with from now on.
#[derive(Debug)]
pub enum Begin {
    /// This map goes on.
    Resume(Box<CbtMap>),
    /// A new one begins, for this reason.
    Fresh(ResetReason),
}

/// A device that is about to be tracked.
#[derive(Debug)]
pub struct Prepared {
    /// It had a record before.
    pub known: bool,
    /// With what.
    pub begin: Begin,
    /// What the record says of it.
    pub identity: DeviceIdentity,
}

/// A device with a record that is present.
#[derive(Clone, Debug)]
pub struct Present {
    /// The device.
    pub device: BlockDevice,
    /// How its blocks are sized.
    pub granularity: SavedGranularity,
}

/// What the tracker gives of a device to be sealed.
pub trait Sealable {
    /// The device.
    fn device(&self) -> &BlockDevice;
    /// The map to be saved, with every write until now.
    ///
    /// # Errors
    /// The tracker fails.
    fn copy(&self) -> Result<SavedMap, String>;
    /// Whether nothing was written since [`Sealable::copy`], and nothing speaks against the map.
    fn is_unchanged(&self) -> bool;
}

/// Records and seals of all tracked devices.
#[derive(Debug)]
pub struct Seals {
    state: StateDirectory,
    policy: SealPolicy,
    roots: Roots,
    /// The last boot before this one in which an agent started.
    before: Option<String>,
    /// The records of the devices that are tracked now.
    tracked: Mutex<BTreeMap<DeviceId, Record>>,
}

impl Seals {
    /// Uses the state directory, and says there that an agent started in this boot. To be called before anything that
    /// the start may fail at.
    ///
    /// # Errors
    /// The directory can't be written.
    pub fn open(config: &SealConfig) -> Result<Self, SealError> {
        let state = StateDirectory::new(config.directory.clone());
        let before = match shutdown::boot(&config.roots.boot) {
            Some(boot) => state.enter(&boot)?,
            None => None,
        };
        Ok(Self {
            state,
            policy: config.policy,
            roots: config.roots.clone(),
            before,
            tracked: Mutex::default(),
        })
    }

    fn evidence<'a>(&'a self, device: &'a BlockDevice) -> Gathered<'a> {
        Gathered {
            roots: &self.roots,
            before: self.before.as_deref(),
            device,
        }
    }

    /// Whether a stop of the daemon now is one to seal at.
    #[must_use]
    pub fn applies(&self) -> bool {
        self.policy.applies()
    }

    fn records(&self) -> Result<Vec<Record>, SealError> {
        self.state.records().map_err(|source| SealError::Directory {
            path: self.state.path().to_owned(),
            source,
        })
    }

    /// The recorded devices that are present and not tracked yet, and the paths of those that are not there.
    ///
    /// # Errors
    /// The records can't be read.
    pub fn untracked(&self) -> Result<(Vec<Present>, Vec<PathBuf>), SealError> {
        let tracked: Vec<Uuid> = self.tracked().values().map(|record| record.name).collect();
        let mut present = Vec::new();
        let mut absent = Vec::new();
        for record in self
            .records()?
            .into_iter()
            .filter(|record| !tracked.contains(&record.name))
        {
            match self.find(&record) {
                Some(device) => present.push(Present {
                    device,
                    granularity: record.granularity,
                }),
                None => absent.push(record.path),
            }
        }
        Ok((present, absent))
    }

    /// The block devices that there are, with their sizes: where these are as before, nothing has come.
    #[must_use]
    pub fn present(&self) -> Vec<(OsString, String)> {
        let entries = fs::read_dir(self.roots.sysfs.join("class/block"));
        let mut present: Vec<_> = entries
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| {
                let size = fs::read_to_string(entry.path().join("size")).unwrap_or_default();
                (entry.file_name(), size)
            })
            .collect();
        present.sort();
        present
    }

    /// The device of a record, wherever it is now. One that nothing identifies is looked for at its path.
    fn find(&self, record: &Record) -> Option<BlockDevice> {
        let by_path = || {
            let device = BlockDevice::open(&record.path).ok()?;
            let now = DeviceIdentity::read(&self.roots.sysfs, &device).ok()?;
            // Another device in its place is none of ours; one that says less or more of itself than before may be.
            (!matches!(record.identity.same_device(&now), Err(Difference::Other { .. }))).then_some(device)
        };
        if !record.identity.is_unique() {
            return by_path();
        }
        let named = fs::read_dir(self.roots.sysfs.join("class/block"))
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| {
                let dev = fs::read_to_string(entry.path().join("dev")).ok();
                dev.and_then(|dev| dev.parse().ok())
                    .and_then(|id| DeviceIdentity::of(&self.roots.sysfs, id).ok())
                    .is_some_and(|seen| record.identity.may_be(&seen))
            })
            .find_map(|entry| {
                let name = entry.file_name().to_string_lossy().replace('!', "/");
                let device = BlockDevice::open(&Path::new("/dev").join(name)).ok()?;
                let now = DeviceIdentity::read(&self.roots.sysfs, &device).ok()?;
                record.identity.same_device(&now).ok().map(|()| device)
            });
        named.or_else(by_path)
    }

    /// The record of a device: the one of what it is, or the one that has its path if that is of nothing else here.
    fn record_of(
        &self,
        device: &BlockDevice,
        identity: &DeviceIdentity,
    ) -> Result<Option<Record>, SealError> {
        let records = self.records()?;
        let same = records
            .iter()
            .find(|record| record.identity.same_device(identity).is_ok());
        let at_path = || {
            let of_path = records.iter().find(|record| record.path == device.path)?;
            let elsewhere = self.find(of_path).is_some_and(|found| found.id != device.id);
            (!elsewhere).then_some(of_path)
        };
        Ok(same.or_else(at_path).cloned())
    }

    /// Finds out with what `device` is to be tracked, and writes its record. After that no seal of it is left.
    ///
    /// `block_size` is what would be taken for a new map; one that goes on has to have it.
    ///
    /// # Errors
    /// The device can't be identified, or the record not be written.
    pub fn prepare(
        &self,
        device: &BlockDevice,
        granularity: SavedGranularity,
        block_size: BlockSize,
    ) -> Result<Prepared, SealError> {
        let identity = DeviceIdentity::read(&self.roots.sysfs, device)?;
        let known = self.record_of(device, &identity)?;
        let begin = match &known {
            None => Begin::Fresh(ResetReason::NewAttach),
            Some(record) => {
                let evidence = self.evidence(device);
                match decide(record, self.state.seal(record.name), &evidence) {
                    Ok(map) if map.block_size() == block_size => {
                        tracing::info!(
                            device = %device.path.display(),
                            generation = %map.generation(),
                            "nothing was written since tracking stopped: the change map goes on"
                        );
                        Begin::Resume(Box::new(map))
                    }
                    Ok(_) => Begin::Fresh(ResetReason::Requested),
                    Err(doubt) => {
                        tracing::warn!(
                            device = %device.path.display(),
                            reason = doubt.reason().code(),
                            why = %doubt,
                            "the change map begins anew"
                        );
                        Begin::Fresh(doubt.reason())
                    }
                }
            }
        };
        let is_known = known.is_some();
        let record = Record {
            name: known.map_or_else(Uuid::new_v4, |record| record.name),
            path: device.path.clone(),
            identity: identity.clone(),
            granularity,
        };
        self.state.begin(&record)?;
        self.tracked().insert(device.id, record);
        Ok(Prepared {
            known: is_known,
            begin,
            identity,
        })
    }

    /// A device that was prepared could not be tracked. One that had a record before keeps it.
    ///
    /// # Errors
    /// Its files can't be removed.
    pub fn give_up(&self, id: DeviceId, known: bool) -> Result<(), SealError> {
        let record = self.tracked().remove(&id);
        if let Some(record) = record.filter(|_| !known) {
            self.state.forget(record.name)?;
        }
        Ok(())
    }

    /// Whether the proof of [`Seals::prepare`] still holds, now that the device is tracked.
    ///
    /// # Errors
    /// It does not: the map is to be declared wrong for [`Doubt::reason`].
    pub fn settle(&self, device: &BlockDevice, identity: &DeviceIdentity) -> Result<(), Doubt> {
        let evidence = self.evidence(device);
        decide::settle(identity, &evidence)
    }

    /// A device that the kernel tracked while no agent ran: it has a record from now on, and no seal.
    ///
    /// # Errors
    /// As [`Seals::prepare`].
    pub fn adopted(&self, device: &BlockDevice, block_size: BlockSize) -> Result<(), SealError> {
        let identity = DeviceIdentity::read(&self.roots.sysfs, device)?;
        let known = self.record_of(device, &identity)?;
        let record = Record {
            path: device.path.clone(),
            identity,
            granularity: known
                .as_ref()
                .map_or(SavedGranularity::Fixed(block_size.bytes()), |record| {
                    record.granularity
                }),
            name: known.map_or_else(Uuid::new_v4, |record| record.name),
        };
        self.state.begin(&record)?;
        self.tracked().insert(device.id, record);
        Ok(())
    }

    /// Tracking of a device was ended on purpose: it is not tracked again by itself.
    ///
    /// # Errors
    /// Its files can't be removed.
    pub fn forget(&self, id: DeviceId) -> Result<(), SealError> {
        let record = self.tracked().remove(&id);
        if let Some(record) = record {
            self.state.forget(record.name)?;
        }
        Ok(())
    }

    /// Seals the map of a device, if nothing can write to it any more.
    ///
    /// # Errors
    /// It stays unsealed.
    pub fn seal(&self, tracked: &impl Sealable) -> Result<(), Unsealed> {
        let device = tracked.device();
        let record = self
            .tracked()
            .get(&device.id)
            .cloned()
            .ok_or(Unsealed::Unrecorded)?;
        let boot = shutdown::boot(&self.roots.boot).ok_or(Unsealed::BootUnknown)?;
        let claim = Claim::take(device, &self.roots.sysfs, &self.roots.proc)?;
        claim.sync()?;
        let evidence = self.evidence(device);
        let identity = evidence.identity()?;
        record.identity.same_device(&identity)?;

        let counters = evidence.written()?;
        let map = tracked.copy().map_err(Unsealed::Tracker)?;
        if let Some(reason) = map.header.corrupted {
            return Err(Unsealed::Corrupted(reason));
        }
        let partitions = self.partitions(device);
        let places = places(
            device.capacity.bytes(),
            &partitions,
            &map.bytes,
            map.header.block_size,
        );
        let reader = DirectReader::open(device)?;
        let header = SealHeader {
            record: record.clone(),
            boot,
            at: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |time| time.as_secs()),
            identity,
            counters: counters
                .iter()
                .map(|(name, counters)| SealedCounters {
                    name: name.clone(),
                    counters: *counters,
                })
                .collect(),
            fingerprint: Fingerprint::of(&reader, &places)?,
            map: map.header.clone(),
        };
        self.state.write_seal(&header, &map)?;
        // What was written while this went on is in the map of the tracker or in the counters.
        let still = tracked.is_unchanged()
            && evidence.written()? == counters
            && counters.iter().all(|(_, counters)| counters.in_flight == 0)
            && device.writes_in_driver()? == 0;
        if still {
            return Ok(());
        }
        self.state.break_seal(record.name)?;
        Err(Unsealed::Written)
    }

    /// Where the partitions of a whole disk begin, in bytes.
    fn partitions(&self, device: &BlockDevice) -> Vec<u64> {
        if !device.is_whole_disk() {
            return Vec::new();
        }
        let place = self.roots.sysfs.join("dev/block").join(device.id.to_string());
        fs::read_dir(place)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let start = fs::read_to_string(entry.path().join("start")).ok()?;
                Some(
                    start
                        .trim()
                        .parse::<u64>()
                        .ok()?
                        .saturating_mul(crate::units::SECTOR_BYTES),
                )
            })
            .collect()
    }

    fn tracked(&self) -> MutexGuard<'_, BTreeMap<DeviceId, Record>> {
        self.tracked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the kernel tells of a device.
struct Gathered<'a> {
    roots: &'a Roots,
    before: Option<&'a str>,
    device: &'a BlockDevice,
}

impl Evidence for Gathered<'_> {
    fn boot(&self) -> Option<String> {
        shutdown::boot(&self.roots.boot)
    }

    fn boot_before(&self) -> Option<String> {
        self.before.map(str::to_owned)
    }

    fn identity(&self) -> Result<DeviceIdentity, DiskError> {
        DeviceIdentity::read(&self.roots.sysfs, self.device)
    }

    fn written(&self) -> Result<Vec<(String, WriteCounters)>, Unprovable> {
        grounds(&self.roots.sysfs, self.device.id)?
            .into_iter()
            .map(|ground| Ok((ground.name.clone(), ground.counters()?)))
            .collect()
    }

    fn content(&self, fingerprint: &Fingerprint) -> Result<(), ContentDiffers> {
        let reader = DirectReader::open(self.device).map_err(|error| ContentDiffers::Io {
            offset: 0,
            length: 0,
            source: io::Error::other(error),
        })?;
        fingerprint.check(&reader)
    }
}

//! Pool: the difference storage of one snapshot, shared by all its devices.
//!
//! It keeps a [`Space`] over the places that were given, and lets those that can grow do so before they are full. It
//! moves no data: the engine reads and writes the disk of a region at the offsets of its slots.
//!
//! # Growth
//! A directory, and a file with a limit, begin with `diff_storage_minimum` bytes and get as many again whenever
//! [`SpaceEvent::LowFreeSpace`] is due, or at the latest when there is no room. They take no time to make: their
//! file is a hole as long as its file system allows, of which only what is written takes room. What may be written is
//! bounded by the limit and by what the file system has free, less a reserve, looked up anew for every
//! MiB given out. Without growth they have their limit, or the minimum, from the beginning.
//!
//! # Locking
//! One lock, held for no input or output but asking a file system for its free space. The listener is called without
//! it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::growth::Growth;
use super::open::{Numbered, Opened, Terms};
use super::store::Store;
use super::{Own, OwnPlace, StorageError, StorageSpec};
use crate::cow::{Overflow, Region, RegionId, Slot, Space, SpaceEvent, Taken};
use crate::disk::{BlockDevice, Disk, MemoryDisk, extents};
use crate::units::{DeviceId, SECTOR_BYTES};

/// Bytes given out until a file system is asked again what it has left.
const LOOK_EVERY: u64 = 1 << 20;

/// What holds for all storage of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolOptions {
    /// Bytes that are asked for at a time; an event is due when half of them are left.
    #[doc(alias = "diff_storage_minimum")]
    pub minimum: u64,
    /// Whether directories and files with a limit grow by themselves.
    pub autogrow: bool,
    /// Largest logical block in bytes that a storage device may have: the origin's.
    pub logical_block: u32,
}

impl Default for PoolOptions {
    /// 1 GiB, growing, 512 bytes.
    fn default() -> Self {
        Self {
            minimum: 1 << 30,
            autogrow: true,
            logical_block: 512,
        }
    }
}

/// Space of a pool, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// In use.
    pub used: u64,
    /// May be used as it is now; less than `used` never.
    pub bytes: u64,
    /// May be used after all growth; `None` if only file systems bound it.
    pub limit: Option<u64>,
    /// Number of regions.
    pub regions: usize,
}

/// A range of sectors of a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DeviceExtent {
    /// The device; that of a file system for its files.
    pub device: DeviceId,
    /// First sector, of 512 bytes, on that device.
    pub sector: u64,
    /// Number of sectors.
    pub count: u64,
}

/// Called with what whoever provides storage should know.
type Listener = Arc<dyn Fn(SpaceEvent) + Send + Sync>;

/// The difference storage of one snapshot.
pub struct Pool {
    options: PoolOptions,
    listener: Listener,
    /// One is opened at a time.
    appending: Mutex<()>,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    space: Space,
    /// By number of the region.
    regions: Vec<Place>,
    specs: Vec<StorageSpec>,
    /// Given out since the file systems were asked.
    unlooked: u64,
}

/// What a region is in.
#[derive(Debug)]
struct Place {
    store: Arc<Store>,
    growth: Option<Growth>,
    /// Bytes that it may have, as far as its file system has them.
    given: u64,
    device: Option<DeviceId>,
    numbered: Option<Arc<dyn Numbered>>,
    kept: Option<PathBuf>,
}

impl Place {
    /// The device that the region is a range of.
    fn device_now(&self) -> Option<DeviceId> {
        let number = || self.numbered.as_ref()?.number();
        self.device.or_else(number)
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("options", &self.options)
            .field("inner", &self.inner)
            .finish_non_exhaustive()
    }
}

impl Pool {
    /// A pool without storage. The listener is told at once that some is wanted.
    pub fn new(options: PoolOptions, listener: Listener) -> Self {
        let (space, event) = Space::new(options.minimum);
        listener(event);
        Self::over(options, listener, space)
    }

    fn over(options: PoolOptions, listener: Listener, space: Space) -> Self {
        let inner = Inner {
            space,
            regions: Vec::new(),
            specs: Vec::new(),
            unlooked: 0,
        };
        Self {
            options,
            listener,
            appending: Mutex::new(()),
            inner: Mutex::new(inner),
        }
    }

    /// A pool over what one had before, in which `taken` are the slots of all tables; `own` finds what is on a served
    /// device. The listener is told what it would be told next.
    ///
    /// # Errors
    /// A place does not outlive its agent or can't be opened, or a slot can't be in it: see [`Space::restore`].
    pub fn reopen(
        options: PoolOptions,
        listener: Listener,
        specs: &[StorageSpec],
        own: &dyn Fn(&Own) -> Option<OwnPlace>,
        taken: impl IntoIterator<Item = Taken>,
    ) -> Result<Self, StorageError> {
        let (space, _) = Space::new(options.minimum);
        let pool = Self::over(options, listener, space);
        for spec in specs {
            let place = match spec {
                StorageSpec::Own(spec) => own(spec),
                _ => None,
            };
            pool.add(spec, &[], place, true)?;
        }
        let event = {
            let mut inner = pool.lock();
            inner.space.restore(taken)?;
            inner.look();
            pool.event(&mut inner)
        };
        pool.tell(event);
        Ok(pool)
    }

    /// Adds storage, also while the snapshot is held.
    ///
    /// # Errors
    /// It can't be used; the error says why, and what to do.
    pub fn append(&self, spec: &StorageSpec) -> Result<(), StorageError> {
        self.append_beside(spec, &[])
    }

    /// As [`Pool::append`], of a snapshot of `origins`: a whole device is refused that is one of them, or has its
    /// sectors.
    ///
    /// # Errors
    /// As [`Pool::append`].
    pub fn append_beside(&self, spec: &StorageSpec, origins: &[BlockDevice]) -> Result<(), StorageError> {
        self.add(spec, origins, None, false)
    }

    /// As [`Pool::append`], of an allocated file on a served device.
    ///
    /// # Errors
    /// As [`Pool::append`].
    pub fn append_own(&self, own: Own, place: OwnPlace) -> Result<(), StorageError> {
        self.add(&StorageSpec::Own(own), &[], Some(place), false)
    }

    /// Takes back all storage, of which nothing was given out yet: what is open is closed, and files that were kept by
    /// a name are removed.
    ///
    /// # Errors
    /// One of these stays.
    pub fn withdraw(&self) -> Result<(), StorageError> {
        self.remove_kept()?;
        let _one = self.appending.lock().unwrap_or_else(PoisonError::into_inner);
        let mut guard = self.lock();
        let inner = &mut *guard;
        for id in inner.space.regions() {
            inner.space.close(id);
        }
        for place in &mut inner.regions {
            *place = Place {
                store: Store::memory(MemoryDisk::new("nothing".to_owned(), 0, 0)),
                growth: None,
                given: 0,
                device: None,
                numbered: None,
                kept: None,
            };
        }
        inner.specs.clear();
        Ok(())
    }

    fn add(
        &self,
        spec: &StorageSpec,
        origins: &[BlockDevice],
        own: Option<OwnPlace>,
        again: bool,
    ) -> Result<(), StorageError> {
        let _one = self.appending.lock().unwrap_or_else(PoisonError::into_inner);
        let number = self.lock().regions.len();
        // Without the lock: writes to the origin wait for it.
        let opened = Opened::open(
            spec,
            &Terms {
                logical_block: self.options.logical_block,
                origins,
                number: u32::try_from(number).unwrap_or(u32::MAX),
                again,
                own,
            },
        )?;
        let mut inner = self.lock();
        inner.refuse_overlaps(spec, &opened)?;
        for region in &opened.regions {
            let first = match opened.growth.as_ref().and_then(Growth::limit) {
                Some(limit) if !self.options.autogrow => limit,
                Some(limit) => limit.min(self.options.minimum),
                None => self.options.minimum,
            };
            inner.space.append(*region);
            inner.regions.push(Place {
                store: Arc::clone(&opened.store),
                growth: opened.growth.clone(),
                given: first,
                device: opened.device,
                numbered: opened.numbered.clone(),
                kept: opened.kept.clone(),
            });
        }
        inner.look();
        inner.specs.push(spec.clone());
        Ok(())
    }

    /// Gives out a slot of `chunk_bytes` bytes. `first` bytes of it are written at once.
    ///
    /// # Errors
    /// There is no room, and none can be had.
    pub fn slot(&self, chunk_bytes: u64, first: u64) -> Result<Slot, Overflow> {
        self.give(first, None, |space| space.slot(chunk_bytes, first))
    }

    /// Counts `bytes` more that are written to a slot.
    ///
    /// # Errors
    /// Its region has no room, and can't grow.
    pub fn extend(&self, slot: Slot, bytes: u64) -> Result<(), Overflow> {
        self.give(bytes, Some(slot.region), |space| space.extend(slot, bytes))
    }

    /// Takes back `bytes` of a slot that were counted and not written.
    pub fn retract(&self, slot: Slot, bytes: u64) {
        self.lock().space.retract(slot, bytes);
    }

    fn give<T>(
        &self,
        bytes: u64,
        only: Option<RegionId>,
        take: impl Fn(&mut Space) -> Result<T, Overflow>,
    ) -> Result<T, Overflow> {
        let mut inner = self.lock();
        inner.unlooked = inner.unlooked.saturating_add(bytes);
        if inner.unlooked >= LOOK_EVERY {
            inner.look();
        }
        let mut taken = take(&mut inner.space);
        if taken.is_err() {
            inner.look();
            taken = take(&mut inner.space);
        }
        if taken.is_err() && self.options.autogrow {
            inner.grow(self.options.minimum.max(bytes), only);
            taken = take(&mut inner.space);
        }
        let event = self.event(&mut inner);
        drop(inner);
        self.tell(event);
        taken
    }

    /// The event that is due, after growing by what it asks for.
    fn event(&self, inner: &mut Inner) -> Option<SpaceEvent> {
        let event = inner.space.event();
        if let (Some(SpaceEvent::LowFreeSpace { requested }), true) = (event, self.options.autogrow) {
            inner.grow(requested, None);
        }
        event
    }

    fn tell(&self, event: Option<SpaceEvent>) {
        if let Some(event) = event {
            (self.listener)(event);
        }
    }

    /// The disk of a region: offsets of its slots are offsets in it. It knows whether it was written since
    /// [`Pool::flush`], unless somebody asks it for its file, from when on every flush counts.
    ///
    /// # Panics
    /// The pool never gave out a slot in this region.
    #[must_use]
    pub fn disk(&self, region: RegionId) -> Arc<dyn Disk> {
        (Arc::clone(&self.lock().regions[region.index()].store)) as _
    }

    /// What is used, and what can be.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let inner = self.lock();
        let limits = inner.space.regions().map(|id| {
            let growth = inner.regions[id.index()].growth.as_ref();
            match growth.filter(|_| self.options.autogrow) {
                Some(growth) => growth.limit(),
                None => Some(inner.space.region(id).bytes),
            }
        });
        Usage {
            used: inner.space.used(),
            bytes: inner.space.bytes(),
            limit: limits.sum(),
            regions: inner
                .space
                .regions()
                .filter(|id| inner.space.region(*id).length > 0)
                .count(),
        }
    }

    /// Where the storage is now, in the order of the regions: ranges of devices, and what files have of theirs. A file
    /// that grows has more a moment later.
    ///
    /// # Errors
    /// It is in memory, or in a file system whose addresses are not those of its device.
    pub fn extents(&self) -> Result<Vec<DeviceExtent>, StorageError> {
        let places: Vec<_> = {
            let inner = self.lock();
            let regions = inner.space.regions().zip(&inner.regions);
            regions
                .filter(|(id, _)| inner.space.region(*id).length > 0)
                .map(|(id, place)| {
                    (
                        inner.space.region(id),
                        Arc::clone(&place.store),
                        place.device_now(),
                    )
                })
                .collect()
        };
        let mut found = Vec::new();
        for (region, store, device) in places {
            let (device, ranges) = match (device, store.file_disk()) {
                (Some(device), _) => (device, vec![(region.start, region.bytes)]),
                (None, Some(file)) => {
                    let (device, ranges) = extents::of_open_file(file.shared(), file.name().as_ref())?;
                    let pairs = ranges.iter().map(|range| (range.offset, range.length));
                    (device, pairs.collect())
                }
                (None, None) => return Err(StorageError::NoDevice(store.name().to_owned())),
            };
            found.extend(ranges.into_iter().map(|(offset, length)| DeviceExtent {
                device,
                sector: offset / SECTOR_BYTES,
                count: length / SECTOR_BYTES,
            }));
        }
        Ok(found)
    }

    /// Makes durable what was written to the disks of all regions before; those not written since the last time are
    /// left alone.
    ///
    /// # Errors
    /// It is not, and what was written may be lost.
    pub fn flush(&self) -> io::Result<()> {
        let stores: BTreeMap<_, _> = {
            let inner = self.lock();
            let stores = inner.regions.iter().map(|place| &place.store);
            stores
                .map(|store| (Arc::as_ptr(store).addr(), Arc::clone(store)))
                .collect()
        };
        stores.values().try_for_each(|store| store.flush_if_written())
    }

    /// What [`Pool::reopen`] needs, in the order of the regions.
    #[must_use]
    pub fn specs(&self) -> Vec<StorageSpec> {
        self.lock().specs.clone()
    }

    /// Removes the files that were kept by a name, as the snapshot is not needed any more.
    ///
    /// # Errors
    /// One can't be removed; the others are.
    pub fn remove_kept(&self) -> Result<(), StorageError> {
        let kept: Vec<PathBuf> = {
            let inner = self.lock();
            inner
                .regions
                .iter()
                .filter_map(|place| place.kept.clone())
                .collect()
        };
        let mut result = Ok(());
        for path in kept {
            match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    result = Err(StorageError::Io {
                        action: "remove",
                        path,
                        source,
                    });
                }
                _ => {}
            }
        }
        result
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here is half done when something panics.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Lets regions have `more` bytes in all; `only` this one, if one is given.
    fn grow(&mut self, more: u64, only: Option<RegionId>) {
        let mut rest = more;
        for id in self.space.regions() {
            let Place { growth, given, .. } = &mut self.regions[id.index()];
            let Some(growth) = growth else { continue };
            if rest == 0 || only.is_some_and(|only| only != id) {
                continue;
            }
            let before = self.space.region(id).bytes;
            let allowed = growth.allowed(self.space.used_of(id), before.saturating_add(rest));
            *given = allowed.max(*given);
            self.space.resize(id, allowed);
            rest = rest.saturating_sub(self.space.region(id).bytes.saturating_sub(before));
        }
    }

    /// Takes from growing regions what their file systems do not have any more, and gives it back where they do.
    fn look(&mut self) {
        self.unlooked = 0;
        for (id, place) in self.space.regions().zip(&self.regions) {
            if let Some(growth) = &place.growth {
                self.space
                    .resize(id, growth.allowed(self.space.used_of(id), place.given));
            }
        }
    }

    /// Refuses ranges of a device that another place of this pool has already.
    fn refuse_overlaps(&self, spec: &StorageSpec, opened: &Opened) -> Result<(), StorageError> {
        let (Some(device), StorageSpec::Device { path, .. }) = (opened.device, spec) else {
            return Ok(());
        };
        let end = |region: &Region| region.start + region.length;
        for (id, place) in self.space.regions().zip(&self.regions) {
            let mine = self.space.region(id);
            let taken = |new: &&Region| new.start < end(&mine) && mine.start < end(new);
            if place.device == Some(device)
                && let Some(new) = opened.regions.iter().find(taken)
            {
                return Err(StorageError::Range {
                    path: path.clone(),
                    offset: new.start,
                    length: new.length,
                    why: "the snapshot has some of them already",
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;

//! Origin: a disk under copy on write.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockWriteGuard, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;

use super::fence::{Fence, Untouched, WRITTEN_TO};
use super::image::Image;
use super::mover::Mover;
use super::settled::Settled;
use super::store::{Promise, Store};
use crate::cow::{ChunkLayout, Hold, HoldError, Overflow, Slot, SnapshotKey, Table, UnitSet};
use crate::disk::Disk;
use crate::units::Extent;

/// Buckets of [`Times`]: below 1 µs, 2 µs, 4 µs, up to 2^30 µs.
const BUCKETS: usize = 31;

/// A snapshot can't be armed.
#[derive(Debug, thiserror::Error)]
pub enum ArmError {
    /// The core refuses it.
    #[error(transparent)]
    Hold(#[from] HoldError),
    /// No thread can be started.
    #[error("can't start the thread that stores old data: {0}")]
    Thread(std::io::Error),
}

/// How long writes were held.
#[derive(Debug, Default)]
pub struct Times {
    count: AtomicU64,
    nanoseconds: AtomicU64,
    longest: AtomicU64,
    buckets: [AtomicU64; BUCKETS],
}

impl Times {
    pub(super) fn add(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.count.fetch_add(1, Ordering::Relaxed);
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
        self.longest.fetch_max(nanoseconds, Ordering::Relaxed);
        let micros = nanoseconds.div_ceil(1000).max(1);
        let bucket = (micros.next_power_of_two().trailing_zeros() as usize).min(BUCKETS - 1);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
    }

    /// Held writes.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Time of all of them.
    #[must_use]
    pub fn sum(&self) -> Duration {
        Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed))
    }

    /// The longest of them.
    #[must_use]
    pub fn longest(&self) -> Duration {
        Duration::from_nanos(self.longest.load(Ordering::Relaxed))
    }

    /// Upper bounds and how many were not longer, ascending.
    pub fn cumulative(&self) -> impl Iterator<Item = (Duration, u64)> + '_ {
        let mut sum = 0;
        self.buckets.iter().enumerate().map(move |(n, bucket)| {
            sum += bucket.load(Ordering::Relaxed);
            (Duration::from_micros(1 << n), sum)
        })
    }
}

/// What an origin has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Writes that had to wait.
    pub held_writes: u64,
    /// Bytes of old data that were preserved for the snapshots held now.
    pub preserved_bytes: u64,
    /// Pieces of preserving under way.
    pub jobs: u64,
    /// Buffers in memory that wait to be stored.
    pub queued: u64,
    /// Snapshots held.
    pub snapshots: u64,
    /// Files of difference storage on the disk itself.
    pub stored: u64,
}

pub(super) struct State {
    pub(super) hold: Hold,
    pub(super) stores: BTreeMap<SnapshotKey, Armed>,
    /// Difference storage on the disk itself, by the keys under which it is excluded.
    fences: BTreeMap<SnapshotKey, Arc<Fence>>,
    /// What was not written since somebody asked, by key.
    untouched: BTreeMap<SnapshotKey, Untouched>,
}

impl State {
    /// Whether writes have to be looked at though no snapshot lacks anything.
    fn is_watched(&self) -> bool {
        self.hold.has_storage() || !self.untouched.is_empty()
    }
}

/// A snapshot that is held.
pub(super) struct Armed {
    pub(super) store: Arc<Store>,
    worker: Option<JoinHandle<()>>,
}

/// A disk whose old data is kept for any number of snapshots.
pub struct Origin {
    disk: Arc<dyn Disk>,
    layout: ChunkLayout,
    /// Writes have it for reading; who changes what is held, for writing.
    pub(super) gate: RwLock<()>,
    armed: AtomicUsize,
    /// Difference storage of a snapshot is on the disk itself, or is about to be.
    watched: AtomicBool,
    state: Mutex<State>,
    /// A job was settled, or a snapshot is gone.
    pub(super) settled: Settled,
    pub(super) times: Times,
    pub(super) mover: Mover,
    /// What a thread that stores old data does first.
    first: Option<Arc<dyn Fn() + Send + Sync>>,
}

impl std::fmt::Debug for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Origin")
            .field("disk", &self.disk)
            .field("layout", &self.layout)
            .finish_non_exhaustive()
    }
}

impl Origin {
    /// The disk, with no snapshot.
    #[must_use]
    pub fn new(disk: Arc<dyn Disk>, layout: ChunkLayout) -> Self {
        Self {
            disk,
            layout,
            gate: RwLock::default(),
            armed: AtomicUsize::new(0),
            watched: AtomicBool::new(false),
            state: Mutex::new(State {
                hold: Hold::new(layout),
                stores: BTreeMap::new(),
                fences: BTreeMap::new(),
                untouched: BTreeMap::new(),
            }),
            settled: Settled::default(),
            times: Times::default(),
            mover: Mover::default(),
            first: None,
        }
    }

    /// Has each thread that stores old data do this first: who waits for writes to be held gives them its priority.
    #[must_use]
    pub fn with_workers_that(mut self, first: impl Fn() + Send + Sync + 'static) -> Self {
        self.first = Some(Arc::new(first));
        self
    }

    /// The disk.
    #[must_use]
    pub fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    /// Chunks and units.
    #[must_use]
    pub const fn layout(&self) -> &ChunkLayout {
        &self.layout
    }

    /// How long writes were held.
    #[must_use]
    pub const fn times(&self) -> &Times {
        &self.times
    }

    /// What was counted.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let state = self.lock();
        let stores = || state.stores.values().map(|armed| &armed.store);
        Counters {
            held_writes: self.times.count(),
            preserved_bytes: stores().map(|store| store.preserved()).sum(),
            jobs: state.hold.jobs() as u64,
            queued: stores().map(|store| store.queued() as u64).sum(),
            snapshots: state.stores.len() as u64,
            stored: state.fences.len() as u64,
        }
    }

    /// Takes ranges out of all images, because they are difference storage of this snapshot; see [`Hold::exclude`].
    /// A write to one of them by anybody else breaks the snapshot before it goes on.
    pub fn exclude(&self, snapshot: SnapshotKey, ranges: &[Extent]) {
        self.storage_changes(|state| {
            ranges
                .iter()
                .for_each(|range| state.hold.exclude(snapshot, *range));
        });
    }

    /// Takes back [`Origin::exclude`].
    pub fn include(&self, snapshot: SnapshotKey, ranges: &[Extent]) {
        self.storage_changes(|state| {
            ranges
                .iter()
                .for_each(|range| state.hold.include(snapshot, *range));
        });
    }

    /// Makes ranges difference storage behind a fence, as far as no image needs them and they are none yet: those parts
    /// are out of all images, and a write to them by anybody else takes the fence down. `key` is that of no snapshot.
    /// Waits for the writes under way.
    #[must_use]
    pub fn claim(&self, key: SnapshotKey, fence: &Arc<Fence>, ranges: &[Extent]) -> Vec<Extent> {
        let _paused = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        self.storage_changes(|state| {
            let usable: Vec<Extent> = ranges
                .iter()
                .flat_map(|range| state.hold.usable(*range))
                .collect();
            usable.iter().for_each(|range| state.hold.exclude(key, *range));
            state.fences.insert(key, Arc::clone(fence));
            usable
        })
    }

    /// As [`Origin::claim`], of storage that an agent before has claimed. Nothing may have been written since.
    pub fn claim_again(&self, key: SnapshotKey, fence: &Arc<Fence>, ranges: &[Extent]) {
        self.storage_changes(|state| {
            ranges.iter().for_each(|range| state.hold.exclude(key, *range));
            state.fences.insert(key, Arc::clone(fence));
        });
    }

    /// Takes back [`Origin::claim`]: the fence is down, and the ranges belong to the images again.
    pub fn give_back(&self, key: SnapshotKey) {
        let fence = self.lock().fences.get(&key).cloned();
        if let Some(fence) = fence {
            fence.take_down();
        }
        self.storage_changes(|state| {
            state.fences.remove(&key);
            state.hold.give_back(key);
        });
    }

    /// Looks from now on which of the disk's bytes are written, under a key.
    pub fn watch(&self, key: SnapshotKey) {
        let _paused = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let all = Extent {
            offset: 0,
            length: self.layout.size(),
        };
        self.storage_changes(|state| state.untouched.insert(key, Untouched::new(vec![all])));
    }

    /// Looks on at these ranges only, which are ascending and apart.
    pub fn watch_within(&self, key: SnapshotKey, ranges: &[Extent]) {
        if let Some(untouched) = self.lock().untouched.get_mut(&key) {
            untouched.within(ranges);
        }
    }

    /// Looks no longer.
    pub fn unwatch(&self, key: SnapshotKey) {
        self.storage_changes(|state| state.untouched.remove(&key));
    }

    /// What was nobody's at the instant of a snapshot: ascending and apart; see [`Hold::set_free`].
    pub fn set_free(&self, snapshot: SnapshotKey, ranges: Vec<Extent>) {
        self.lock().hold.set_free(snapshot, ranges);
    }

    /// What was nobody's at the instant of a snapshot.
    #[must_use]
    pub fn free_of(&self, snapshot: SnapshotKey) -> Vec<Extent> {
        self.lock().hold.free_of(snapshot).to_vec()
    }

    /// The units that belong to nobody's image, by chunk: they need no preserving.
    #[must_use]
    pub fn excluded(&self) -> Vec<(u64, UnitSet)> {
        self.lock().hold.excluded().collect()
    }

    fn storage_changes<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let changed = change(&mut state);
        self.watched.store(state.is_watched(), Ordering::Release);
        changed
    }

    /// Breaks the snapshots whose difference storage a write is about to destroy.
    pub(super) fn guard_storage(&self, offset: u64, length: u64) {
        if !self.watched.load(Ordering::Acquire) || length == 0 {
            return;
        }
        let range = Extent { offset, length };
        let mut state = self.lock();
        state
            .untouched
            .values_mut()
            .for_each(|untouched| untouched.touch(range));
        let broken = state.hold.stored_in(range);
        let lost: Vec<_> = broken
            .iter()
            .filter_map(|key| state.fences.get(key).cloned())
            .collect();
        drop(state);
        lost.iter().for_each(|fence| fence.lose());
        for snapshot in broken {
            self.break_off(snapshot, Errno::EIO as i32, WRITTEN_TO);
        }
    }

    /// Keeps new writes back and waits for those under way. Several origins that are paused at once have one instant;
    /// whoever pauses several does it in one order everywhere.
    pub fn pause(self: &Arc<Self>) -> Paused<'_> {
        Paused {
            _gate: self.gate.write().unwrap_or_else(PoisonError::into_inner),
            origin: self,
        }
    }

    /// Breaks a snapshot; its images fail from now on, and writes wait for it no longer.
    pub fn break_off(&self, snapshot: SnapshotKey, errno: i32, what: &str) {
        let store = self
            .lock()
            .stores
            .get(&snapshot)
            .map(|armed| Arc::clone(&armed.store));
        let Some(store) = store else { return };
        store.fail(errno, what);
        self.lock().hold.fail(snapshot, errno);
        self.settled.notify_all();
    }

    /// Breaks all snapshots of the disk.
    pub fn break_all(&self, errno: i32, what: &str) {
        let keys: Vec<SnapshotKey> = self.lock().stores.keys().copied().collect();
        for key in keys {
            self.break_off(key, errno, what);
        }
    }

    /// Ends a snapshot. Its images fail from now on.
    pub fn release(&self, snapshot: SnapshotKey) {
        let mut state = self.lock();
        let Some(armed) = state.stores.remove(&snapshot) else {
            return;
        };
        // It is in both or in none.
        let _ = state.hold.release(snapshot);
        self.watched.store(state.is_watched(), Ordering::Release);
        self.armed.store(state.stores.len(), Ordering::Release);
        drop(state);
        self.settled.notify_all();
        armed.store.staging.close();
        if let Some(worker) = armed.worker
            && worker.join().is_err()
        {
            tracing::error!("the thread that stores old data ended by a defect");
        }
    }

    /// Waits until nothing is left in the snapshot's queue.
    pub fn drain(&self, snapshot: SnapshotKey) {
        let mut state = self.lock();
        while state
            .stores
            .get(&snapshot)
            .is_some_and(|armed| armed.store.queued() > 0 && state.hold.table(snapshot).is_ok())
        {
            let waited = self.settled.wait_timeout(state, Duration::from_millis(10));
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn is_armed(&self) -> bool {
        // Only changed while the gate is held for writing, or to fewer.
        self.armed.load(Ordering::Acquire) > 0
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place of a chunk, with room for `units` that are not stored yet: the one it has, or another where that has no
    /// room left. `None` if the snapshot is gone or broken.
    pub(super) fn place(&self, store: &Store, chunk: u64, units: UnitSet) -> Result<Option<Slot>, Overflow> {
        let bytes = self.layout.bytes_of(chunk, units);
        let mut state = self.lock();
        let Ok(table) = state.hold.table_mut(store.key) else {
            return Ok(None);
        };
        if let Some(slot) = table.slot(chunk)
            && store.storage.extend(slot, bytes).is_ok()
        {
            return Ok(Some(slot));
        }
        let slot = store.storage.slot(self.layout.chunk_bytes(), bytes)?;
        table.place(chunk, slot);
        Ok(Some(slot))
    }

    fn hold(self: &Arc<Self>, store: Arc<Store>, table: Option<Table>) -> Result<Image, ArmError> {
        let worker = match store.promise {
            Promise::Nothing => Some(self.start_worker(&store).map_err(ArmError::Thread)?),
            Promise::AgentCrash | Promise::PowerCut => None,
        };
        let mut state = self.lock();
        let held = match table {
            Some(table) => state.hold.resume(store.key, table),
            None => state.hold.arm(store.key),
        };
        if let Err(error) = held {
            drop(state);
            store.staging.close();
            return Err(error.into());
        }
        for range in &store.excluded {
            state.hold.exclude(store.key, *range);
        }
        if let Some(free) = store.free.and_then(|key| state.untouched.remove(&key)) {
            // This is the instant: what is written from here on is preserved before.
            state.hold.set_free(store.key, free.ranges());
        }
        self.watched.store(state.is_watched(), Ordering::Release);
        let armed = Armed {
            store: Arc::clone(&store),
            worker,
        };
        state.stores.insert(store.key, armed);
        self.armed.store(state.stores.len(), Ordering::Release);
        drop(state);
        Ok(Image::new(Arc::clone(self), store))
    }

    fn start_worker(self: &Arc<Self>, store: &Arc<Store>) -> std::io::Result<JoinHandle<()>> {
        let origin: Weak<Self> = Arc::downgrade(self);
        let store = Arc::clone(store);
        let first = self.first.clone();
        std::thread::Builder::new()
            .name("blksnap-store".to_owned())
            .spawn(move || {
                if let Some(first) = first {
                    first();
                }
                while let Some((id, staged)) = store.staging.next() {
                    let Some(origin) = origin.upgrade() else {
                        return;
                    };
                    origin.store_staged(&store, id, &staged);
                }
            })
    }
}

/// An origin whose writes are kept back until this is dropped.
#[derive(Debug)]
pub struct Paused<'a> {
    origin: &'a Arc<Origin>,
    _gate: RwLockWriteGuard<'a, ()>,
}

impl Paused<'_> {
    /// Begins a snapshot at this instant.
    ///
    /// # Errors
    /// It is armed already, or no thread can be started.
    pub fn arm(&self, store: Arc<Store>) -> Result<Image, ArmError> {
        self.origin.hold(store, None)
    }

    /// Goes on with a snapshot that an agent before has taken; `table` is what it has preserved.
    ///
    /// # Errors
    /// As [`Paused::arm`].
    pub fn resume(&self, store: Arc<Store>, table: Table) -> Result<Image, ArmError> {
        self.origin.hold(store, Some(table))
    }
}

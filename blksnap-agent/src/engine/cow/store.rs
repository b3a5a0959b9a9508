//! Store: where one snapshot keeps what was preserved of one origin.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::commit::Commit;
use super::journal::{Entry, Journal};
use super::staging::Staging;
use crate::cow::{Overflow, RegionId, Slot, SnapshotKey, UnitSet};
use crate::disk::Disk;
use crate::storage::Pool;
use crate::units::Extent;

/// Difference storage as the engine uses it: all devices of a snapshot share one.
pub trait DiffStorage: fmt::Debug + Send + Sync {
    /// A place for a chunk of `chunk` bytes, of which `first` are written at once.
    ///
    /// # Errors
    /// There is none.
    fn slot(&self, chunk: u64, first: u64) -> Result<Slot, Overflow>;

    /// Counts `bytes` more that are written to a slot.
    ///
    /// # Errors
    /// There is no room for them.
    fn extend(&self, slot: Slot, bytes: u64) -> Result<(), Overflow>;

    /// Takes back `bytes` of a slot that were counted and not written.
    fn retract(&self, slot: Slot, bytes: u64);

    /// The disk of a region: the slot's offsets are its.
    fn disk(&self, region: RegionId) -> Arc<dyn Disk>;

    /// Makes durable what was written.
    ///
    /// # Errors
    /// It is not.
    fn flush(&self) -> io::Result<()>;
}

impl DiffStorage for Pool {
    fn slot(&self, chunk: u64, first: u64) -> Result<Slot, Overflow> {
        self.slot(chunk, first)
    }

    fn extend(&self, slot: Slot, bytes: u64) -> Result<(), Overflow> {
        self.extend(slot, bytes)
    }

    fn retract(&self, slot: Slot, bytes: u64) {
        self.retract(slot, bytes);
    }

    fn disk(&self, region: RegionId) -> Arc<dyn Disk> {
        self.disk(region)
    }

    fn flush(&self) -> io::Result<()> {
        self.flush()
    }
}

/// What a snapshot survives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Promise {
    /// Not even the end of the agent; a write waits until its old data is in memory.
    Nothing,
    /// The agent's end.
    #[default]
    AgentCrash,
    /// A power cut.
    PowerCut,
}

/// Is told once that a snapshot is broken, with the error number.
pub trait Broken: Send + Sync {
    /// The snapshot lost what it had to keep of this origin. `what` is one line for people.
    fn broken(&self, errno: i32, what: &str);
}

/// How a store works.
pub struct StoreOptions {
    /// What the snapshot survives.
    pub promise: Promise,
    /// Most buffers that wait to be stored (`chunk_maximum_in_queue`); for [`Promise::Nothing`] only.
    pub queue: usize,
    /// Most free buffers that are kept (`free_diff_buffer_pool_size`).
    pub buffers: usize,
    /// Names what was preserved; none if nobody will go on with the snapshot.
    pub journal: Option<Journal>,
    /// Ranges in bytes of the origin that are storage of the snapshot themselves.
    pub excluded: Vec<Extent>,
    /// Key of what the origin watches to know what is nobody's at the instant ([`super::Origin::watch`]).
    pub free: Option<SnapshotKey>,
    /// Who is told.
    pub broken: Arc<dyn Broken>,
}

/// Where a snapshot keeps one origin's old data.
pub struct Store {
    pub(super) key: SnapshotKey,
    pub(super) storage: Arc<dyn DiffStorage>,
    pub(super) promise: Promise,
    pub(super) journal: Option<Journal>,
    pub(super) staging: Staging,
    pub(super) excluded: Vec<Extent>,
    pub(super) free: Option<SnapshotKey>,
    commit: Commit,
    broken: Arc<dyn Broken>,
    /// Why it is broken, when that was told.
    failure: OnceLock<String>,
    preserved: AtomicU64,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("key", &self.key)
            .field("storage", &self.storage)
            .field("promise", &self.promise)
            .finish_non_exhaustive()
    }
}

impl Store {
    /// A store in `storage` of what the snapshot `key` preserves.
    #[must_use]
    pub fn new(key: SnapshotKey, storage: Arc<dyn DiffStorage>, options: StoreOptions) -> Self {
        Self {
            key,
            storage,
            promise: options.promise,
            excluded: options.excluded,
            free: options.free,
            journal: options.journal,
            staging: Staging::new(options.queue, options.buffers),
            commit: Commit::default(),
            broken: options.broken,
            failure: OnceLock::new(),
            preserved: AtomicU64::new(0),
        }
    }

    /// The snapshot.
    #[must_use]
    pub const fn key(&self) -> SnapshotKey {
        self.key
    }

    /// Bytes of old data that were preserved.
    #[must_use]
    pub fn preserved(&self) -> u64 {
        self.preserved.load(Ordering::Relaxed)
    }

    /// Why the snapshot is broken, if it is; of one that an agent before has broken nobody knows.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    /// Buffers in memory that wait to be stored.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.staging.waiting()
    }

    /// Counts bytes of old data that are kept.
    pub fn count(&self, bytes: u64) {
        self.preserved.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Units of a chunk are in its slot: makes that as safe as was promised. On return the write that would destroy
    /// them may go on.
    pub(super) fn record(&self, chunk: u64, units: UnitSet, slot: Slot) -> io::Result<()> {
        if self.promise == Promise::PowerCut {
            // Data first: what the journal names must be there.
            self.commit.data(|| self.storage.flush())?;
        }
        let Some(journal) = &self.journal else {
            return Ok(());
        };
        journal.append(&Entry { chunk, units, slot })?;
        if self.promise == Promise::PowerCut {
            self.commit.journal(|| journal.flush())?;
        }
        Ok(())
    }

    /// Makes the writes to the image durable.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.storage.flush()?;
        self.journal.as_ref().map_or(Ok(()), Journal::flush)
    }

    /// The snapshot is broken: says so, once, also to who comes after this agent.
    pub(super) fn fail(&self, errno: i32, what: &str) {
        if self.failure.set(what.to_owned()).is_err() {
            return;
        }
        if let Some(journal) = &self.journal
            && let Err(error) = journal.break_off(errno)
        {
            tracing::error!(%error, "the journal of a broken snapshot can't be marked");
        }
        self.broken.broken(errno, what);
    }
}

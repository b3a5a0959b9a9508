//! Device: a disk that the agent serves.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use uuid::Uuid;

use super::changes::{Changes, ChangesError};
use super::continuity::{Facts, Left, Proof, Unproven, prove};
use super::lease::Lease;
use crate::cbt::ResetReason;
use crate::cow::{ChunkParams, Table};
use crate::disk::{Allocation, Disk, Zero};
use crate::engine::cow::{BeforeWrite, Image, ImageError, Origin, Store};
use crate::statefile::{self, Format, StateFileError};
use crate::units::{BlockSize, Sectors};

const LEFT: Format = Format {
    name: "blksnap-served-left",
    version: 2,
};

/// A disk can't be served.
#[derive(Debug, thiserror::Error)]
pub enum ServedError {
    /// Its size is not one of a disk.
    #[error("can't serve {path}: its size of {size} bytes is no multiple of 512")]
    Size {
        /// The disk.
        path: PathBuf,
        /// Its bytes.
        size: u64,
    },
    /// Something on the disk or in the state directory.
    #[error("can't serve {path}: {action}: {source}")]
    Io {
        /// The disk.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateFileError),
    /// The change map.
    #[error(transparent)]
    Changes(#[from] ChangesError),
}

/// How a disk is served.
#[derive(Clone, Debug)]
pub struct ServedOptions {
    /// Chunk sizes.
    pub chunks: ChunkParams,
    /// Bytes of a tracking block.
    pub tracking_block: BlockSize,
    /// The boot that this is; empty if the kernel does not say.
    pub boot: String,
    /// `/sys`, or what a test has in its place.
    pub sysfs: PathBuf,
}

/// Where a served disk is, and where its state is kept.
#[derive(Clone, Debug)]
pub struct Place {
    /// The file or device.
    pub path: PathBuf,
    /// Directory of its own for its state; none: everything ends with the agent.
    pub state: Option<PathBuf>,
}

/// A disk that the agent serves: everything that is written to it goes through here.
#[derive(Debug)]
pub struct Served {
    name: String,
    place: Place,
    origin: Arc<Origin>,
    changes: Changes,
    lease: Option<Lease>,
    boot: String,
    sysfs: PathBuf,
    opened: Facts,
    /// This time that the disk is served.
    session: Uuid,
    /// The time before this one, if nobody has written to the disk since.
    session_before: Option<Uuid>,
    /// Why what an agent before knew of the disk does not hold any more.
    unproven: Option<Unproven>,
    /// Writes are refused.
    closed: AtomicBool,
}

impl Served {
    /// Opens `disk`, which is what is at the place. The change map goes on where that is proven. Snapshots that were
    /// left may be resumed then, and [`Served::begin`] comes before the first write.
    ///
    /// # Errors
    /// The disk has no usable size, or the state directory can't be used.
    pub fn open(
        name: &str,
        disk: Arc<dyn Disk>,
        place: Place,
        options: &ServedOptions,
    ) -> Result<Arc<Self>, ServedError> {
        let size = disk.size();
        let path = place.path.clone();
        let failed = |action| {
            let path = path.clone();
            move |source| ServedError::Io { path, action, source }
        };
        let capacity = Sectors::from_bytes(size).map_err(|_| ServedError::Size {
            path: path.clone(),
            size,
        })?;
        // What somebody else wrote through the page cache counts now, or changes the file's times.
        disk.flush().map_err(failed("flush it"))?;
        let metadata = fs::metadata(&path).map_err(failed("look at it"))?;
        let now = Facts::of(&metadata, size, &options.sysfs);
        let layout = options
            .chunks
            .layout(capacity, disk.logical_block(), disk.minimum_io());
        let (found, lease) = match &place.state {
            None => {
                let reason = ResetReason::NewAttach;
                let changes = Changes::begin(None, options.tracking_block, capacity, reason)?;
                (Found::new(changes), None)
            }
            Some(state) => {
                DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(state)
                    .map_err(failed("make its state directory"))?;
                let found = find(state, &now, options, capacity)?;
                let lease = Lease::open(&state.join("lease")).map_err(failed("open its lease"))?;
                (found, Some(lease))
            }
        };
        let Found {
            changes,
            session,
            unproven,
        } = found;
        if let Some(why) = &unproven {
            tracing::warn!(device = %path.display(), %why, "the change map begins anew");
        }
        Ok(Arc::new(Self {
            name: name.to_owned(),
            place,
            origin: Arc::new(Origin::new(disk, layout)),
            changes,
            lease,
            boot: options.boot.clone(),
            sysfs: options.sysfs.clone(),
            opened: now,
            session: Uuid::new_v4(),
            session_before: session,
            unproven,
            closed: AtomicBool::new(false),
        }))
    }

    /// Says in the state directory that the disk is served from now on: a stop that is not clean is known as one, and
    /// snapshots that were not resumed before can't be resumed any more.
    ///
    /// # Errors
    /// The state directory can't be used.
    pub fn begin(&self) -> Result<(), ServedError> {
        self.write_left(None)?;
        match &self.lease {
            Some(lease) => lease.begin().map_err(self.failed("begin its lease")),
            None => Ok(()),
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file or device.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.place.path
    }

    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.origin.layout().size()
    }

    /// The disk under copy on write.
    #[must_use]
    pub const fn origin(&self) -> &Arc<Origin> {
        &self.origin
    }

    /// The change map.
    #[must_use]
    pub const fn changes(&self) -> &Changes {
        &self.changes
    }

    /// Why what an agent before knew of the disk does not hold any more; `None` if it does, or there was none.
    #[must_use]
    pub const fn unproven(&self) -> Option<&Unproven> {
        self.unproven.as_ref()
    }

    /// This time that the disk is served.
    #[must_use]
    pub const fn session(&self) -> Uuid {
        self.session
    }

    /// The time before this one, if nobody has written to the disk since: a snapshot that was held then can go on.
    #[must_use]
    pub const fn session_before(&self) -> Option<Uuid> {
        self.session_before
    }

    /// Fills `buffer` from byte `offset` on. Never waits for a copy.
    ///
    /// # Errors
    /// The disk fails.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.origin.disk().read_at(buffer, offset)
    }

    /// Writes `data` at byte `offset`, after what snapshots lack of it was preserved.
    ///
    /// # Errors
    /// The disk fails; never a snapshot.
    pub fn write_at(&self, data: &[u8], offset: u64, fua: bool) -> io::Result<()> {
        self.change(offset, data.len() as u64, fua, |disk| disk.write_at(data, offset))
    }

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// As [`Disk::zero_at`].
    pub fn zero_at(&self, offset: u64, length: u64, zero: Zero, fast: bool, fua: bool) -> io::Result<()> {
        self.change(offset, length, fua, |disk| {
            disk.zero_at(offset, length, zero, fast)
        })
    }

    /// Hints that a range is not needed any more.
    ///
    /// # Errors
    /// The disk fails.
    pub fn discard_at(&self, offset: u64, length: u64, fua: bool) -> io::Result<()> {
        self.change(offset, length, fua, |disk| disk.discard_at(offset, length))
    }

    /// Makes durable what was written.
    ///
    /// # Errors
    /// It is not.
    pub fn flush(&self) -> io::Result<()> {
        self.origin.disk().flush()
    }

    /// What is known of a range, as [`Disk::allocation`].
    ///
    /// # Errors
    /// The disk fails.
    pub fn allocation(&self, offset: u64, length: u64, most: usize) -> io::Result<Vec<Allocation>> {
        self.origin.disk().allocation(offset, length, most)
    }

    fn change(
        &self,
        offset: u64,
        length: u64,
        fua: bool,
        write: impl FnOnce(&dyn Disk) -> io::Result<()>,
    ) -> io::Result<()> {
        let admitted = self.origin.admit(offset, length);
        if self.closed.load(Ordering::Acquire) {
            return Err(Errno::ESHUTDOWN.into());
        }
        // Within the admission: a take is before or after both the mark and the write.
        self.changes.mark(offset, length);
        self.cover();
        let written = write(&**self.origin.disk());
        drop(admitted);
        written?;
        if fua { self.origin.disk().flush() } else { Ok(()) }
    }

    /// Covers a write to the disk that is none of a client's: old data in storage that is on the disk itself.
    #[must_use]
    pub fn before_own_write(self: &Arc<Self>) -> BeforeWrite {
        let served = Arc::downgrade(self);
        Arc::new(move || {
            if let Some(served) = served.upgrade() {
                served.cover();
            }
        })
    }

    fn cover(&self) {
        if let Some(lease) = &self.lease {
            // One that can't be renewed makes the next agent doubt what it finds, which is right then.
            if let Err(error) = lease.cover() {
                tracing::warn!(%error, "the lease on a served disk can't be renewed");
            }
        }
    }

    /// Whether writes are to be provable after a power cut; costs a flush of a few bytes each second of writing.
    ///
    /// # Errors
    /// The lease can't be written, or there is none as the device has no state directory.
    pub fn survive_power_cuts(&self, survive: bool) -> io::Result<()> {
        match &self.lease {
            Some(lease) => lease.make_durable(survive),
            None if survive => Err(io::ErrorKind::Unsupported.into()),
            None => Ok(()),
        }
    }

    /// An image, as the users of this device see it.
    #[must_use]
    pub fn image(self: &Arc<Self>, image: Image) -> ServedImage {
        ServedImage {
            served: Arc::clone(self),
            image,
        }
    }

    /// Goes on with a snapshot that an agent before has taken. Nothing may be written before.
    ///
    /// # Errors
    /// As [`crate::engine::cow::Paused::resume`].
    pub fn resume(
        self: &Arc<Self>,
        store: Arc<Store>,
        table: Table,
    ) -> Result<ServedImage, crate::engine::cow::ArmError> {
        let image = self.origin.pause().resume(store, table)?;
        Ok(self.image(image))
    }

    /// Refuses writes from now on; returns when the last one has landed. Snapshots that hold the device may be left for
    /// the next agent then.
    pub fn close(&self) {
        let _paused = self.origin.pause();
        self.closed.store(true, Ordering::Release);
    }

    /// Ends the service at a clean stop, after [`Served::close`]: everything is durable, and whoever comes next can see
    /// whether somebody else wrote in between.
    ///
    /// # Errors
    /// The disk or the state directory fails; the next agent begins anew then.
    pub fn stop(&self) -> Result<(), ServedError> {
        self.flush().map_err(self.failed("flush it"))?;
        if self.place.state.is_none() {
            return Ok(());
        }
        self.changes.save()?;
        let metadata = fs::metadata(&self.place.path).map_err(self.failed("look at it"))?;
        self.write_left(Some(Facts::of(&metadata, self.size(), &self.sysfs)))
    }

    fn write_left(&self, stopped: Option<Facts>) -> Result<(), ServedError> {
        let Some(state) = &self.place.state else {
            return Ok(());
        };
        let left = Left {
            session: self.session,
            boot: self.boot.clone(),
            opened: self.opened.clone(),
            stopped,
        };
        Ok(statefile::write(&state.join("left"), LEFT, &left)?)
    }

    fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> ServedError {
        let path = self.place.path.clone();
        move |source| ServedError::Io { path, action, source }
    }
}

/// What an agent before has left.
struct Found {
    changes: Changes,
    session: Option<Uuid>,
    unproven: Option<Unproven>,
}

impl Found {
    const fn new(changes: Changes) -> Self {
        Self {
            changes,
            session: None,
            unproven: None,
        }
    }
}

/// What is in a state directory, if nobody but agents wrote to the disk since, or a new change map and the reason for
/// it.
fn find(state: &Path, now: &Facts, options: &ServedOptions, capacity: Sectors) -> Result<Found, ServedError> {
    let begin = |reason| Changes::begin(Some(state), options.tracking_block, capacity, reason);
    let left = match statefile::read::<Left>(&state.join("left"), LEFT) {
        Ok(Some(left)) => left,
        Ok(None) => return Ok(Found::new(begin(ResetReason::NewAttach)?)),
        Err(error) => {
            tracing::warn!(%error, "what is known of a served disk can't be used");
            let reason = match error {
                StateFileError::Version { .. } => ResetReason::StateVersion,
                _ => ResetReason::StateDamaged,
            };
            return Ok(Found {
                changes: begin(reason)?,
                session: None,
                unproven: Some(Unproven::Unreadable),
            });
        }
    };
    let lease = Lease::read(&state.join("lease"));
    let proof = match prove(&left, now, lease, &options.boot) {
        Ok(proof) => proof,
        Err(why) => {
            let reason = match why {
                Unproven::Size { .. } => ResetReason::Resized,
                Unproven::Other => ResetReason::DeviceReplaced,
                _ => ResetReason::ContinuityUnproven,
            };
            return Ok(Found {
                changes: begin(reason)?,
                session: None,
                unproven: Some(why),
            });
        }
    };
    let changes = match proof {
        Proof::DiskOnly => begin(ResetReason::ContinuityUnproven)?,
        Proof::Everything => match Changes::resume(state, capacity) {
            Ok(Some(changes)) => changes,
            Ok(None) => begin(ResetReason::StateDamaged)?,
            Err(error) => {
                tracing::warn!(%error, "the change map of a served disk can't be used");
                begin(ResetReason::StateDamaged)?
            }
        },
    };
    Ok(Found {
        changes,
        session: Some(left.session),
        unproven: None,
    })
}

/// An image of a served device: what is written to it is marked as changed in the device's maps.
#[derive(Clone, Debug)]
pub struct ServedImage {
    served: Arc<Served>,
    image: Image,
}

impl ServedImage {
    /// The device.
    #[must_use]
    pub const fn served(&self) -> &Arc<Served> {
        &self.served
    }

    /// The image, for reading.
    #[must_use]
    pub const fn image(&self) -> &Image {
        &self.image
    }

    /// As [`Image::write_at`].
    ///
    /// # Errors
    /// As there.
    pub fn write_at(&self, data: &[u8], offset: u64) -> Result<(), ImageError> {
        self.served.changes.mark_both(offset, data.len() as u64);
        self.image.write_at(data, offset)
    }

    /// As [`Image::zero_at`].
    ///
    /// # Errors
    /// As there.
    pub fn zero_at(&self, offset: u64, length: u64, zero: Zero) -> Result<(), ImageError> {
        self.served.changes.mark_both(offset, length);
        self.image.zero_at(offset, length, zero)
    }
}

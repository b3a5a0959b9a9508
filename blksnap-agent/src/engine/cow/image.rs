//! Image: a disk as it was at the instant of a snapshot, and as its user has changed it since.

use std::io;
use std::sync::{Arc, PoisonError};

use nix::errno::Errno;

use super::origin::Origin;
use super::preserve::{Work, errno_of};
use super::store::Store;
use crate::cow::{ChunkRange, Decision, HoldError, Job, Piece, Place, Slot, SnapshotKey, UnitSet};
use crate::disk::{Allocation, Zero};

/// An image can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The snapshot is destroyed.
    #[error("the snapshot is gone")]
    Gone,
    /// The snapshot is broken.
    #[error("the snapshot is broken by error {0}")]
    Broken(i32),
    /// The storage has no room for what is written to the image; what it holds is still right.
    #[error("no space is left in the difference storage")]
    NoSpace,
    /// Input or output failed.
    #[error("{action} at byte {offset}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// First byte.
        offset: u64,
        /// Why.
        source: io::Error,
    },
}

impl ImageError {
    /// The error number.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Gone | Self::Broken(_) => Errno::EIO as i32,
            Self::NoSpace => Errno::ENOSPC as i32,
            Self::Io { source, .. } => errno_of(source),
        }
    }

    fn of_errno(action: &'static str, offset: u64, errno: i32) -> Self {
        if errno == Errno::ENOSPC as i32 {
            return Self::NoSpace;
        }
        Self::io(action, offset)(io::Error::from_raw_os_error(errno))
    }

    fn io(action: &'static str, offset: u64) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action,
            offset,
            source,
        }
    }
}

impl From<HoldError> for ImageError {
    fn from(error: HoldError) -> Self {
        match error {
            HoldError::Broken(errno) => Self::Broken(errno),
            HoldError::Unknown | HoldError::Armed | HoldError::Writing => Self::Gone,
        }
    }
}

/// What is written to an image.
#[derive(Clone, Copy)]
enum Content<'a> {
    /// Bytes, the first of which belongs at this byte of the device.
    Data(&'a [u8], u64),
    Zeroes(Zero),
}

/// A disk at the instant.
#[derive(Clone, Debug)]
pub struct Image {
    origin: Arc<Origin>,
    store: Arc<Store>,
}

impl Image {
    pub(super) fn new(origin: Arc<Origin>, store: Arc<Store>) -> Self {
        Self { origin, store }
    }

    /// The snapshot.
    #[must_use]
    pub fn key(&self) -> SnapshotKey {
        self.store.key
    }

    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.origin.layout().size()
    }

    /// The disk that it is an image of.
    #[must_use]
    pub fn origin(&self) -> &Arc<Origin> {
        &self.origin
    }

    /// Where its old data is.
    #[must_use]
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// The error number that broke the snapshot, if one did; `Err` if it is gone.
    ///
    /// # Errors
    /// [`ImageError::Gone`].
    pub fn state(&self) -> Result<Option<i32>, ImageError> {
        match self.origin.lock().hold.table(self.store.key) {
            Ok(_) => Ok(None),
            Err(HoldError::Broken(errno)) => Ok(Some(errno)),
            Err(_) => Err(ImageError::Gone),
        }
    }

    /// Fills `buffer` with the image's bytes from `offset` on.
    ///
    /// # Errors
    /// The snapshot is gone or broken, or input fails.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), ImageError> {
        let length = buffer.len() as u64;
        let pieces = self.resolve(offset, length)?;
        self.read_pieces(&pieces, buffer, offset)?;
        if pieces.iter().any(|piece| piece.place == Place::Origin) {
            // What a write has overwritten meanwhile was preserved before: it is elsewhere by now.
            let moved = self.origin.lock().hold.recheck(self.store.key, &pieces)?;
            self.read_pieces(&moved, buffer, offset)?;
        }
        Ok(())
    }

    fn resolve(&self, offset: u64, length: u64) -> Result<Vec<Piece>, ImageError> {
        Ok(self.origin.lock().hold.resolve(self.store.key, offset, length)?)
    }

    /// Reads pieces into a buffer whose first byte is that at `base`.
    fn read_pieces(&self, pieces: &[Piece], buffer: &mut [u8], base: u64) -> Result<(), ImageError> {
        for piece in pieces {
            let at = usize::try_from(piece.range.offset - base).expect("a piece is within the read");
            let part = &mut buffer[at..at + length_of(&piece.range)];
            let failed = ImageError::io("read", piece.range.offset);
            match piece.place {
                Place::Origin => self
                    .origin
                    .disk()
                    .read_at(part, piece.range.offset)
                    .map_err(failed)?,
                Place::Storage { region, offset } => {
                    let disk = self.store.storage.disk(region);
                    disk.read_at(part, offset).map_err(failed)?;
                }
                Place::Memory { buffer: id, .. } => match self.store.staging.get(id) {
                    Some(staged) => {
                        let from = usize::try_from(piece.range.offset - staged.start)
                            .expect("what is in the buffer begins there");
                        part.copy_from_slice(&staged.data[from..from + part.len()]);
                    }
                    // Stored meanwhile; it never goes back to the origin.
                    None => {
                        let now = self.resolve(piece.range.offset, piece.range.length)?;
                        if now.iter().any(|now| now.place == piece.place) {
                            return Err(failed(io::ErrorKind::NotFound.into()));
                        }
                        self.read_pieces(&now, buffer, base)?;
                    }
                },
            }
        }
        Ok(())
    }

    /// Writes to the image; the origin does not change.
    ///
    /// # Errors
    /// The snapshot is gone or broken, there is no room, or output fails. A part may have been written.
    pub fn write_at(&self, data: &[u8], offset: u64) -> Result<(), ImageError> {
        self.write(offset, data.len() as u64, Content::Data(data, offset))
    }

    /// Makes a range of the image read as zeroes.
    ///
    /// # Errors
    /// As [`Image::write_at`].
    pub fn zero_at(&self, offset: u64, length: u64, zero: Zero) -> Result<(), ImageError> {
        self.write(offset, length, Content::Zeroes(zero))
    }

    /// Makes durable what was written to the image.
    ///
    /// # Errors
    /// It is not, or the snapshot is gone or broken.
    pub fn flush(&self) -> Result<(), ImageError> {
        self.origin.lock().hold.table(self.store.key)?;
        self.store.flush().map_err(ImageError::io("flush", 0))
    }

    fn write(&self, offset: u64, length: u64, content: Content<'_>) -> Result<(), ImageError> {
        let parts: Vec<ChunkRange> = self.origin.layout().split(offset, length).collect();
        for part in parts {
            self.write_part(&part, content)?;
        }
        Ok(())
    }

    fn write_part(&self, part: &ChunkRange, content: Content<'_>) -> Result<(), ImageError> {
        let mut state = self.origin.lock();
        loop {
            match state.hold.begin_image(self.store.key, part)? {
                Decision::Copy(job) if job.needs.is_empty() => {
                    drop(state);
                    let mut claim = Claim {
                        image: self,
                        job,
                        written: None,
                    };
                    claim.written = self.land(&claim.job, part, content)?;
                    return Ok(());
                }
                // The part covers some units only in part: the rest of them is old data.
                Decision::Copy(job) => {
                    let work = Work::new(job, &state);
                    drop(state);
                    self.origin
                        .preserve_for_image(work)
                        .map_err(|unmet| ImageError::of_errno("keep old data", part.offset, unmet.errno))?;
                    state = self.origin.lock();
                }
                Decision::Wait(_) | Decision::Go => {
                    state = self
                        .origin
                        .settled
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Writes a part to the places of its units; nobody else touches them. Gives the place of those that were not stored
    /// before, if there are any.
    fn land(&self, job: &Job, part: &ChunkRange, content: Content<'_>) -> Result<Option<Slot>, ImageError> {
        let Parts {
            stored,
            fresh,
            staged,
        } = self.parts(job)?;
        for (slot, units) in stored {
            self.write_units(part, units, slot, content)?;
        }
        if fresh.is_empty() {
            return Ok(None);
        }
        let slot = self
            .origin
            .place(&self.store, job.chunk, fresh)
            .map_err(|_| ImageError::NoSpace)?
            .ok_or(ImageError::Gone)?;
        let landed = self.land_fresh(part, fresh, slot, staged, content);
        if landed.is_err() {
            let bytes = self.origin.layout().bytes_of(job.chunk, fresh);
            self.store.storage.retract(slot, bytes);
        }
        landed.map(|()| Some(slot))
    }

    /// Writes units that were not stored before to their place, and notes it.
    fn land_fresh(
        &self,
        part: &ChunkRange,
        fresh: UnitSet,
        slot: Slot,
        staged: Vec<Piece>,
        content: Content<'_>,
    ) -> Result<(), ImageError> {
        let disk = self.store.storage.disk(slot.region);
        let start = self.origin.layout().start_of(part.chunk);
        let failed = || ImageError::io("write", part.offset);
        // Units in memory are stored as a whole, with what is written to them.
        for piece in staged {
            let mut old = vec![0; length_of(&piece.range)];
            self.read_pieces(&[piece], &mut old, piece.range.offset)?;
            disk.write_at(&old, slot.offset + (piece.range.offset - start))
                .map_err(failed())?;
        }
        self.write_units(part, fresh, slot, content)?;
        self.store.record(part.chunk, fresh, slot).map_err(failed())
    }

    /// Writes those bytes of a part that are in `units` to the chunk's place `slot`.
    fn write_units(
        &self,
        part: &ChunkRange,
        units: UnitSet,
        slot: Slot,
        content: Content<'_>,
    ) -> Result<(), ImageError> {
        let layout = self.origin.layout();
        let disk = self.store.storage.disk(slot.region);
        let start = layout.start_of(part.chunk);
        for range in layout.ranges(part.chunk, units) {
            let from = range.offset.max(part.offset);
            let to = range.end().min(part.end());
            if from >= to {
                continue;
            }
            let at = slot.offset + (from - start);
            match content {
                Content::Data(data, base) => {
                    let within =
                        |byte: u64| usize::try_from(byte - base).expect("a part is within the write");
                    disk.write_at(&data[within(from)..within(to)], at)
                }
                Content::Zeroes(zero) => disk.zero_at(at, to - from, zero, false),
            }
            .map_err(ImageError::io("write", from))?;
        }
        Ok(())
    }

    /// Where the units of a job are.
    fn parts(&self, job: &Job) -> Result<Parts, ImageError> {
        let state = self.origin.lock();
        let table = state.hold.table(self.store.key)?;
        let stored: Vec<_> = table.stored_in(job.chunk, job.units).collect();
        let fresh = stored
            .iter()
            .fold(job.units, |left, (_, units)| left.without(*units));
        let mut staged = Vec::new();
        for range in self.origin.layout().ranges(job.chunk, fresh) {
            let pieces = table.resolve(range.offset, range.length).unwrap_or_default();
            staged.extend(
                pieces
                    .into_iter()
                    .filter(|piece| matches!(piece.place, Place::Memory { .. })),
            );
        }
        Ok(Parts {
            stored,
            fresh,
            staged,
        })
    }

    /// What is known of a range: pieces without gaps from `offset` on, at least one and at most `most`.
    ///
    /// # Errors
    /// The snapshot is gone or broken, or a disk fails.
    pub fn allocation(&self, offset: u64, length: u64, most: usize) -> Result<Vec<Allocation>, ImageError> {
        let pieces = self.resolve(offset, length)?;
        let mut found: Vec<(ChunkRange, Vec<Allocation>, bool)> = Vec::new();
        let mut count = 0;
        for piece in &pieces {
            if count >= most {
                break;
            }
            let range = piece.range;
            let failed = ImageError::io("look for holes", range.offset);
            let known = match piece.place {
                Place::Memory { .. } => vec![Allocation {
                    length: range.length,
                    hole: false,
                }],
                Place::Origin => self
                    .origin
                    .disk()
                    .allocation(range.offset, range.length, most - count)
                    .map_err(failed)?,
                Place::Storage { region, offset } => self
                    .store
                    .storage
                    .disk(region)
                    .allocation(offset, range.length, most - count)
                    .map_err(failed)?,
            };
            let whole = known.iter().map(|known| known.length).sum::<u64>() >= range.length;
            count += known.len();
            found.push((range, known, piece.place == Place::Origin));
            if !whole {
                break;
            }
        }
        // A hole of the origin may have been written meanwhile; then the old one is elsewhere now.
        let moved = self.origin.lock().hold.recheck(self.store.key, &pieces)?;
        let mut all: Vec<Allocation> = Vec::new();
        for (range, known, from_origin) in found {
            let stale = from_origin
                && moved
                    .iter()
                    .any(|piece| piece.range.offset < range.end() && range.offset < piece.range.end());
            let mut left = range.length;
            for part in known {
                let length = part.length.min(left);
                left -= length;
                push(&mut all, length, part.hole && !stale);
            }
        }
        Ok(all)
    }
}

/// Adds a piece, to the one before it where that is the same.
fn push(all: &mut Vec<Allocation>, length: u64, hole: bool) {
    match all.last_mut() {
        Some(last) if last.hole == hole => last.length += length,
        _ if length > 0 => all.push(Allocation { length, hole }),
        _ => {}
    }
}

fn length_of(range: &ChunkRange) -> usize {
    usize::try_from(range.length).expect("a range of a read or write fits into memory")
}

/// Where the units of an image write are.
struct Parts {
    /// Those that are stored, by their places.
    stored: Vec<(Slot, UnitSet)>,
    /// The others.
    fresh: UnitSet,
    /// Pieces of the others that are in memory.
    staged: Vec<Piece>,
}

/// Units that an image write has for itself, until it is settled.
struct Claim<'a> {
    image: &'a Image,
    job: Job,
    /// The place of those that were not stored before, when they are there.
    written: Option<Slot>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let origin = &self.image.origin;
        origin
            .lock()
            .hold
            .settle_image(self.image.store.key, &self.job, self.written);
        origin.settled.notify_all();
    }
}

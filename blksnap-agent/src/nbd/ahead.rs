//! Ahead: what is read of an export before clients ask for it.
//!
//! All connections of an export are watched together ([`ReadAhead`]): a client that copies with several of them reads
//! in order only when they are taken together. What comes next is then either hinted to the export, which has a cache
//! of its own ([`PrefetchBy::Hint`]: a file has the page cache), or read by workers and kept here for a moment
//! ([`PrefetchBy::Keeping`]).
//!
//! # What is kept
//! Pieces of [`PIECE`] bytes, at most [`MOST`] of an export, and [`TOTAL`] bytes of all. A piece goes when all of it was
//! asked for, when newer ones need its place, after [`AGE`] other reads, and when the last client leaves. A request never waits for a piece that nobody has begun to read: it
//! reads it itself, so that no order in which workers come can stop them.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::buffers::{Buffer, Buffers};
use super::export::{Export, ExportError, PrefetchBy};
use super::limits::{Budget, Held};
use super::readahead::ReadAhead;
use super::workers::Workers;

/// Bytes of a piece.
const PIECE: usize = 256 << 10;
/// Most pieces of one export.
const MOST: usize = 32;
/// Largest window where pieces are kept: half of them, so that a second client finds room.
const WINDOW: u64 = (PIECE * MOST / 2) as u64;
/// Most bytes of all exports.
const TOTAL: usize = 64 << 20;

/// Reads of an export after which a piece is no longer waited for.
const AGE: u64 = 1 << 14;

/// What a server needs for reading ahead.
#[derive(Clone, Debug)]
pub(super) struct Means {
    room: Arc<Budget>,
    buffers: Buffers,
    workers: Workers,
}

impl Means {
    pub(super) fn new(buffers: Buffers, workers: Workers) -> Self {
        Self {
            room: Arc::new(Budget::new(TOTAL)),
            buffers,
            workers,
        }
    }
}

#[derive(Debug)]
enum Load {
    Waiting,
    Loading,
    Ready(Buffer),
    Failed,
}

/// A part of an export that is read ahead.
#[derive(Debug)]
struct Piece {
    offset: u64,
    length: usize,
    load: Mutex<Load>,
    loaded: Condvar,
    _room: Held,
}

/// Says that a load failed, unless it was finished.
struct Unfinished<'piece>(&'piece Piece);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        let mut load = self.0.load();
        if matches!(*load, Load::Loading) {
            *load = Load::Failed;
        }
        drop(load);
        self.0.loaded.notify_all();
    }
}

impl Piece {
    fn load(&self) -> MutexGuard<'_, Load> {
        self.load.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self) -> u64 {
        self.offset + self.length as u64
    }

    fn is_ready(&self) -> bool {
        matches!(*self.load(), Load::Ready(_))
    }

    /// Reads it, unless somebody does.
    fn read(&self, export: &dyn Export, buffers: &Buffers) {
        let mut load = self.load();
        if !matches!(*load, Load::Waiting) {
            return;
        }
        *load = Load::Loading;
        drop(load);
        let _unfinished = Unfinished(self);
        let mut buffer = buffers.take(self.length);
        match export.read_at(buffer.as_mut_slice(), self.offset) {
            Ok(()) => *self.load() = Load::Ready(buffer),
            // Whoever asks for these bytes reads them, and is told.
            Err(error) => tracing::debug!(export = export.name(), %error, "a part was not read ahead"),
        }
    }

    /// Copies what it holds from `offset` on, once it is there; false if it can't be had.
    fn copy(&self, into: &mut [u8], offset: u64) -> bool {
        let load = self
            .loaded
            .wait_while(self.load(), |load| matches!(load, Load::Loading))
            .unwrap_or_else(PoisonError::into_inner);
        match (&*load, usize::try_from(offset - self.offset)) {
            (Load::Ready(buffer), Ok(start)) => {
                into.copy_from_slice(&buffer.as_ref()[start..][..into.len()]);
                true
            }
            _ => false,
        }
    }
}

/// Pieces that hold all of a range.
#[derive(Debug)]
pub(super) struct Kept {
    pieces: Vec<Arc<Piece>>,
    offset: u64,
}

impl Kept {
    /// Fills `into` with the range. Waits for pieces that are being read.
    pub(super) fn read(
        &self,
        export: &dyn Export,
        buffers: &Buffers,
        into: &mut [u8],
    ) -> Result<(), ExportError> {
        for piece in &self.pieces {
            piece.read(export, buffers);
        }
        if self.copy(into) {
            Ok(())
        } else {
            export.read_at(into, self.offset)
        }
    }

    /// Fills `into` with the range; false if a piece failed.
    pub(super) fn copy(&self, into: &mut [u8]) -> bool {
        let mut rest = into;
        let mut position = self.offset;
        for piece in &self.pieces {
            let count =
                usize::try_from(piece.end() - position).map_or(rest.len(), |left| left.min(rest.len()));
            let (part, behind) = rest.split_at_mut(count);
            if !piece.copy(part, position) {
                return false;
            }
            rest = behind;
            position += count as u64;
        }
        rest.is_empty()
    }
}

#[derive(Debug)]
struct Slot {
    piece: Arc<Piece>,
    /// Bytes that were asked for.
    used: u64,
    /// When it was made, in reads.
    born: u64,
}

#[derive(Debug, Default)]
struct State {
    policy: ReadAhead,
    /// Reads seen.
    reads: u64,
    slots: VecDeque<Slot>,
    /// A hint is on its way to the export.
    hinting: bool,
    closed: bool,
}

/// Reading ahead for one export, over all its connections.
#[derive(Debug, Default)]
pub(super) struct Ahead(Mutex<State>);

impl Ahead {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of a read, and has workers do what it makes likely.
    pub(super) fn observe(
        self: &Arc<Self>,
        means: &Means,
        export: &Arc<dyn Export>,
        offset: u64,
        length: u64,
    ) {
        let keeping = export.prefetch_by() == PrefetchBy::Keeping && export.read_only();
        let largest = if keeping { WINDOW } else { ReadAhead::LARGEST };
        let mut state = self.state();
        state.reads += 1;
        while let Some(oldest) = state.slots.front()
            && state.reads - oldest.born > AGE
        {
            state.slots.pop_front();
        }
        let ready = !state.hinting && !state.closed;
        let Some((from, length)) = state
            .policy
            .observe(offset, length, export.size(), largest, ready)
        else {
            return;
        };
        if keeping {
            for offset in (from..from + length).step_by(PIECE) {
                let length = (from + length - offset).min(PIECE as u64);
                if !state.add(means, export, offset, length) {
                    break;
                }
            }
            return;
        }
        state.hinting = true;
        drop(state);
        let (ahead, export) = (Arc::clone(self), Arc::clone(export));
        means.workers.run(move || {
            if let Err(error) = export.cache(from, length) {
                tracing::debug!(export = export.name(), %error, "nothing was read ahead");
            }
            drop(export);
            ahead.state().hinting = false;
        });
    }

    /// The pieces that hold a range, if they do, all of them read already if `ready` is set. Counts it as asked for.
    pub(super) fn kept(&self, offset: u64, length: u64, ready: bool) -> Option<Kept> {
        let mut state = self.state();
        let end = offset + length;
        let mut pieces = Vec::new();
        let mut position = offset;
        while position < end {
            let piece = state
                .slots
                .iter()
                .map(|slot| &slot.piece)
                .find(|piece| piece.offset <= position && position < piece.end())?;
            if ready && !piece.is_ready() {
                return None;
            }
            position = piece.end();
            pieces.push(Arc::clone(piece));
        }
        state.slots.retain_mut(|slot| {
            let piece = &slot.piece;
            if pieces.iter().any(|used| Arc::ptr_eq(used, piece)) {
                slot.used += end.min(piece.end()) - offset.max(piece.offset);
            }
            slot.used < piece.length as u64
        });
        Some(Kept { pieces, offset })
    }

    /// Lets go what was kept: nobody is left to ask for it.
    pub(super) fn forget(&self) {
        self.state().slots.clear();
    }

    /// Lets everything go: the export was removed.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        state.slots.clear();
    }
}

impl State {
    /// Has a piece read; false if there is no room.
    fn add(&mut self, means: &Means, export: &Arc<dyn Export>, offset: u64, length: u64) -> bool {
        if self.slots.len() == MOST {
            self.slots.pop_front();
        }
        // Something is always taken already: no share of its own for anybody.
        let (Some(room), Ok(length)) = (means.room.try_take(PIECE, 1), usize::try_from(length)) else {
            return false;
        };
        let piece = Arc::new(Piece {
            offset,
            length,
            load: Mutex::new(Load::Waiting),
            loaded: Condvar::new(),
            _room: room,
        });
        self.slots.push_back(Slot {
            piece: Arc::clone(&piece),
            used: 0,
            born: self.reads,
        });
        let (export, buffers) = (Arc::clone(export), means.buffers.clone());
        means.workers.run(move || piece.read(&*export, &buffers));
        true
    }
}

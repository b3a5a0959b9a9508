//! Batch: one thread that takes requests out of the ring, and reads for all of them at once.
//!
//! Most requests are for a few units. Their old data is read with io_uring into buffers that were made before, as many
//! reads in flight as there are requests, and the thread waits for requests and for reads at the same time: between a
//! write that has to wait and its old data there are two wake-ups and no other thread. When the data is there the units
//! are admitted as by anybody else; the read that this asks of the source is answered from memory ([`Ahead`]).
//!
//! # Why data that was read before the admission is right
//! It was read in the same epoch, which every arming and every beginning of an audit changes, and which can't change
//! while the units are being admitted. So no snapshot was taken in between, and what is said in [`super`] of a read of
//! the origin is true of this one: data that is too new comes with a broken gate, and that is looked at afterwards.
//!
//! Longer requests are left to the threads that preserve word after word.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use blksnap_common::blockrange::BlockRange;
use blksnap_common::gate::Request;

use super::serve::Gated;
use super::source::Ahead;
use crate::sys::reads::Reads;

/// Reads in flight.
const SLOTS: u32 = 32;

/// Most bytes of a request that is read at once.
const LONGEST: usize = 64 << 10;

/// Longest wait in a row: the end is noticed then.
const PAUSE: Duration = Duration::from_millis(50);

/// What a request came to, when its read is in flight.
struct Piece {
    gated: Arc<Gated>,
    range: BlockRange,
    epoch: u64,
    /// First byte of the device that is read.
    start: u64,
    length: usize,
}

/// Requests that are being read for.
pub(super) struct Batch {
    reads: Reads,
    /// By slot.
    pieces: Vec<Option<Piece>>,
    /// No slot was free.
    queued: VecDeque<(Arc<Gated>, BlockRange)>,
    ended: Vec<(usize, io::Result<()>)>,
}

impl Batch {
    /// Nothing in flight; a wait ends when `requests` can be read, too.
    pub(super) fn new(requests: std::os::fd::OwnedFd) -> io::Result<Self> {
        // Room for one logical block more at each end.
        let reads = Reads::new(SLOTS, LONGEST + 2 * 4096, requests)?;
        Ok(Self {
            reads,
            pieces: (0..SLOTS).map(|_| None).collect(),
            queued: VecDeque::new(),
            ended: Vec::new(),
        })
    }

    /// Takes a request, or says that it is too long.
    pub(super) fn take(&mut self, gated: &Arc<Gated>, request: &Request) -> bool {
        let range = BlockRange {
            first: request.first,
            last: request.last,
        };
        if gated
            .bytes_of(range)
            .is_none_or(|(_, length)| length > LONGEST as u64)
        {
            return false;
        }
        self.queued.push_back((Arc::clone(gated), range));
        true
    }

    /// Begins reads for what waits, as far as there is room.
    fn begin(&mut self) {
        while let Some(slot) = self.reads.free() {
            let Some((gated, range)) = self.queued.pop_front() else {
                return;
            };
            // Another writer waits for the same: it is being read, or was.
            let is_under_way = |piece: &Piece| {
                Arc::ptr_eq(&piece.gated, &gated)
                    && piece.range.first <= range.first
                    && piece.range.last >= range.last
            };
            if gated.are_kept(range) || self.pieces.iter().flatten().any(is_under_way) {
                continue;
            }
            let epoch = gated.source.epoch();
            let begun = gated
                .bytes_of(range)
                .and_then(|(offset, length)| gated.source.reach(offset, length))
                .and_then(|reach| {
                    self.reads
                        .read(slot, &reach.file, reach.position, reach.length)
                        .ok()?;
                    Some((reach.start, reach.length))
                });
            match begun {
                Some((start, length)) => {
                    self.pieces[slot] = Some(Piece {
                        gated,
                        range,
                        epoch,
                        start,
                        length,
                    });
                }
                // It is read, or fails, when it is admitted.
                None => gated.preserve(range),
            }
        }
    }

    /// Waits for requests or reads, and preserves what was read.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        self.begin();
        let mut ended = std::mem::take(&mut self.ended);
        let waited = self.reads.wait(PAUSE, &mut ended);
        for (slot, result) in ended.drain(..) {
            let Some(piece) = self.pieces[slot].take() else {
                continue;
            };
            if result.is_ok() {
                let ahead = Ahead {
                    epoch: piece.epoch,
                    start: piece.start,
                    data: &self.reads.buffer(slot)[..piece.length],
                };
                piece
                    .gated
                    .source
                    .with(&ahead, || piece.gated.preserve(piece.range));
            } else {
                // Read once more, with an error that says where.
                piece.gated.preserve(piece.range);
            }
        }
        self.ended = ended;
        waited
    }

    /// What is left when the ring has failed.
    pub(super) fn preserve_rest(mut self) {
        let pieces = self.pieces.iter_mut().filter_map(Option::take);
        let pieces: Vec<_> = pieces.map(|piece| (piece.gated, piece.range)).collect();
        for (gated, range) in pieces.into_iter().chain(self.queued.drain(..)) {
            gated.preserve(range);
        }
    }
}

//! Threads: the copy where io_uring is not permitted.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::cancel::CancelToken;
use super::copier::{CopyError, PIECE, Pieces, cancelled, length_of};
use super::zeroes::runs;
use crate::sys::AlignedBuffer;

/// Copies all pieces with `count` threads, each with a buffer of its own; gives the bytes read.
pub(super) fn copy(
    pieces: Pieces<'_>,
    count: NonZeroUsize,
    cancel: &CancelToken,
    copied: &(dyn Fn(u64) + Sync),
) -> Result<u64, CopyError> {
    let work = Work {
        pieces: Mutex::new(Some(pieces)),
        failure: Mutex::new(None),
        bytes: AtomicU64::new(0),
        cancel,
        copied,
    };
    std::thread::scope(|scope| {
        for _ in 1..count.get() {
            scope.spawn(|| work.run());
        }
        work.run();
    });
    match work.failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(work.bytes.into_inner()),
    }
}

struct Work<'a, 'c> {
    /// What is left; `None` after a failure.
    pieces: Mutex<Option<Pieces<'a>>>,
    failure: Mutex<Option<CopyError>>,
    bytes: AtomicU64,
    cancel: &'c CancelToken,
    copied: &'c (dyn Fn(u64) + Sync),
}

impl Work<'_, '_> {
    fn run(&self) {
        if let Err(error) = self.copy_pieces() {
            *self.pieces.lock().unwrap_or_else(PoisonError::into_inner) = None;
            let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
            failure.get_or_insert(error);
        }
    }

    fn copy_pieces(&self) -> Result<(), CopyError> {
        let mut buffer = AlignedBuffer::zeroed(PIECE);
        loop {
            let next = self
                .pieces
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .as_mut()
                .and_then(Iterator::next);
            let Some((job, piece)) = next else { return Ok(()) };
            if self.cancel.is_cancelled() {
                return Err(cancelled(self.cancel));
            }
            let length = length_of(piece);
            job.source
                .read(&mut buffer, piece.offset, length)
                .map_err(|source| CopyError::read(job.source.name(), piece, source))?;
            for run in runs(&buffer.as_slice()[..length], piece.offset) {
                let offset = piece.offset + run.range.start as u64;
                let count = run.range.len();
                let written = if run.zero {
                    job.sink.zero_at(offset, count as u64)
                } else {
                    job.sink.write_at(offset, &buffer.as_slice()[run.range])
                };
                written.map_err(|source| CopyError::write(job.sink, offset, count, source))?;
            }
            self.bytes.fetch_add(piece.length, Ordering::Relaxed);
            (self.copied)(piece.length);
        }
    }
}

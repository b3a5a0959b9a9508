//! Copier: extents of devices to sinks, with bounded memory.
//!
//! With io_uring one thread keeps [`DEPTH`] pieces of [`PIECE`] bytes in flight, each in a slot of an
//! [`InFlight`] table: first as a read of the device, then as one write of the sink's file after the other. The
//! first failure stops new work; what is in flight is waited for, then the failure is returned. A failed copy
//! says nothing about what the sink now holds.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd};

use super::cancel::CancelToken;
use super::sink::Sink;
use super::threads;
use super::zeroes::{Run, runs};
use crate::disk::DirectReader;
use crate::sys::AlignedBuffer;
use crate::sys::uring::InFlight;
use crate::units::Extent;

/// Bytes read at a time.
pub(super) const PIECE: usize = 1 << 20;

/// Pieces in flight: the copier's memory is `DEPTH * PIECE`.
const DEPTH: u32 = 8;

/// Threads of the fallback.
const THREADS: NonZeroUsize = NonZeroUsize::new(4).unwrap();

/// What is read: a device, or a model of one.
pub trait Source: fmt::Debug + Send + Sync {
    /// Name for messages.
    fn name(&self) -> &str;

    /// `extent` grown to what can be read at once, and cut at the source's end.
    fn aligned(&self, extent: Extent) -> Extent;

    /// Fills the first `length` bytes of `buffer` from byte `offset` on.
    ///
    /// # Errors
    /// The source fails, or the range is not within it or not aligned.
    fn read(&self, buffer: &mut AlignedBuffer, offset: u64, length: usize) -> io::Result<()>;

    /// A file from which the engine may read by itself, and the position there of byte `offset`. `None` keeps
    /// the engine from using io_uring.
    fn raw(&self, offset: u64) -> Option<(BorrowedFd<'_>, u64)>;
}

impl Source for DirectReader {
    fn name(&self) -> &str {
        self.name()
    }

    fn aligned(&self, extent: Extent) -> Extent {
        self.aligned(extent)
    }

    fn read(&self, buffer: &mut AlignedBuffer, offset: u64, length: usize) -> io::Result<()> {
        self.read(buffer, offset, length)
    }

    fn raw(&self, offset: u64) -> Option<(BorrowedFd<'_>, u64)> {
        Some(self.raw(offset))
    }
}

/// A copy that failed.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The device can't be read.
    #[error("can't read {length} bytes at byte {offset} of {source_name}: {source}")]
    Read {
        /// The device.
        source_name: String,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: usize,
        /// Why.
        source: io::Error,
    },
    /// The sink does not take the bytes.
    #[error(
        "can't write {length} bytes at byte {offset} of {target}: {source}{}",
        remedy_of_write(source)
    )]
    Write {
        /// The sink.
        target: String,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: usize,
        /// Why.
        source: io::Error,
    },
    /// The sink is shorter than what is to be copied.
    #[error("{target} has {length} bytes, which is less than the end of the copy at {end}")]
    TooShort {
        /// The sink.
        target: String,
        /// Its bytes.
        length: u64,
        /// End of the copy.
        end: u64,
    },
    /// io_uring itself fails.
    #[error("io_uring failed: {0}")]
    Ring(io::Error),
    /// Somebody asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// The deadline passed.
    #[error("not done within the time allowed")]
    Late,
}

impl CopyError {
    pub(super) fn read(source_name: &str, piece: Extent, source: io::Error) -> Self {
        Self::Read {
            source_name: source_name.to_owned(),
            offset: piece.offset,
            length: length_of(piece),
            source,
        }
    }

    pub(super) fn write(sink: &dyn Sink, offset: u64, length: usize, source: io::Error) -> Self {
        Self::Write {
            target: sink.name(),
            offset,
            length,
            source,
        }
    }

    /// The sink has no space left.
    #[must_use]
    pub fn is_no_space(&self) -> bool {
        matches!(self, Self::Write { source, .. } if is_no_space(source))
    }
}

fn is_no_space(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    )
}

fn remedy_of_write(source: &io::Error) -> &'static str {
    if is_no_space(source) {
        "; free some space there, or choose another place"
    } else {
        ""
    }
}

/// One device to one sink.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// What is read.
    pub source: &'a dyn Source,
    /// Where it goes.
    pub sink: &'a dyn Sink,
    /// What of it, in bytes; no two may overlap.
    pub extents: &'a [Extent],
}

/// How a copier works.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Method {
    /// io_uring if it is permitted, threads otherwise.
    #[default]
    Auto,
    /// As many threads.
    Threads(NonZeroUsize),
}

/// Copies extents of devices to sinks.
#[derive(Debug)]
pub struct Copier {
    /// Threads; `None` for io_uring.
    threads: Option<NonZeroUsize>,
}

impl Copier {
    /// A copier; finds out whether io_uring is permitted.
    #[must_use]
    pub fn new(method: Method) -> Self {
        let threads = match method {
            Method::Threads(count) => Some(count),
            Method::Auto => match InFlight::new(1, AlignedBuffer::ALIGNMENT) {
                Ok(_) => None,
                Err(error) => {
                    tracing::info!(%error, "io_uring is not available, copying with threads");
                    Some(THREADS)
                }
            },
        };
        Self { threads }
    }

    /// Copies all jobs, one after the other, and gives the number of bytes read. `copied` hears of every piece.
    ///
    /// # Errors
    /// The first failure.
    pub fn copy(
        &self,
        jobs: &[Job<'_>],
        cancel: &CancelToken,
        copied: &(dyn Fn(u64) + Sync),
    ) -> Result<u64, CopyError> {
        for job in jobs {
            let end = job.extents.iter().map(Extent::end).max().unwrap_or_default();
            let end = end.min(
                job.source
                    .aligned(Extent {
                        offset: 0,
                        length: end,
                    })
                    .end(),
            );
            if end > job.sink.length() {
                return Err(CopyError::TooShort {
                    target: job.sink.name(),
                    length: job.sink.length(),
                    end,
                });
            }
        }
        let pieces = Pieces::new(jobs);
        let raw = jobs.iter().all(|job| job.source.raw(0).is_some());
        match self.threads {
            None if raw => Ring::new(pieces, cancel, copied)?.run(),
            threads => threads::copy(pieces, threads.unwrap_or(THREADS), cancel, copied),
        }
    }
}

/// The error of a token that is cancelled.
pub(super) fn cancelled(cancel: &CancelToken) -> CopyError {
    if cancel.is_requested() {
        CopyError::Cancelled
    } else {
        CopyError::Late
    }
}

/// The extents of all jobs, cut into pieces.
#[derive(Debug)]
pub(super) struct Pieces<'a> {
    jobs: std::slice::Iter<'a, Job<'a>>,
    current: Option<(Job<'a>, std::slice::Iter<'a, Extent>)>,
    rest: Extent,
}

impl<'a> Pieces<'a> {
    fn new(jobs: &'a [Job<'a>]) -> Self {
        Self {
            jobs: jobs.iter(),
            current: None,
            rest: Extent { offset: 0, length: 0 },
        }
    }
}

impl<'a> Iterator for Pieces<'a> {
    type Item = (Job<'a>, Extent);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some((job, extents)) = &mut self.current {
                if self.rest.length > 0 {
                    // Ends are multiples of PIECE where possible, as file systems like them.
                    let boundary = (self.rest.offset + 1).next_multiple_of(PIECE as u64);
                    let piece = Extent {
                        offset: self.rest.offset,
                        length: self.rest.length.min(boundary - self.rest.offset),
                    };
                    self.rest.offset += piece.length;
                    self.rest.length -= piece.length;
                    return Some((*job, piece));
                }
                if let Some(extent) = extents.next() {
                    self.rest = job.source.aligned(*extent);
                    continue;
                }
            }
            let job = *self.jobs.next()?;
            self.current = Some((job, job.extents.iter()));
        }
    }
}

/// Length of a piece, which is at most [`PIECE`].
pub(super) fn length_of(piece: Extent) -> usize {
    usize::try_from(piece.length).expect("a piece is at most 1 MiB")
}

/// What a slot is doing.
#[derive(Debug)]
enum State<'a> {
    Idle,
    Reading(Job<'a>, Extent),
    Writing {
        job: Job<'a>,
        piece: Extent,
        /// In flight.
        run: Run,
        /// After that.
        rest: VecDeque<Run>,
    },
}

/// A copy with io_uring.
struct Ring<'a> {
    table: InFlight<'a>,
    states: Vec<State<'a>>,
    pieces: Pieces<'a>,
    cancel: &'a CancelToken,
    copied: &'a (dyn Fn(u64) + Sync),
    bytes: u64,
}

impl<'a> Ring<'a> {
    fn new(
        pieces: Pieces<'a>,
        cancel: &'a CancelToken,
        copied: &'a (dyn Fn(u64) + Sync),
    ) -> Result<Self, CopyError> {
        Ok(Self {
            table: InFlight::new(DEPTH, PIECE).map_err(CopyError::Ring)?,
            states: (0..DEPTH).map(|_| State::Idle).collect(),
            pieces,
            cancel,
            copied,
            bytes: 0,
        })
    }

    fn run(mut self) -> Result<u64, CopyError> {
        let mut ended = Vec::new();
        loop {
            for slot in 0..self.states.len() {
                if matches!(self.states[slot], State::Idle) {
                    self.begin(slot)?;
                }
            }
            if self.table.count() == 0 {
                return Ok(self.bytes);
            }
            self.table.wait(&mut ended).map_err(CopyError::Ring)?;
            for (slot, result) in ended.drain(..) {
                self.step(slot, result)?;
            }
        }
        // A return with operations in flight drops the table, which waits for them.
    }

    /// Starts the next piece in an idle slot.
    fn begin(&mut self, slot: usize) -> Result<(), CopyError> {
        let Some((job, piece)) = self.pieces.next() else {
            return Ok(());
        };
        if self.cancel.is_cancelled() {
            return Err(cancelled(self.cancel));
        }
        let (file, position) = job
            .source
            .raw(piece.offset)
            .expect("checked before the copy began");
        self.table
            .read(slot, file, position, length_of(piece))
            .map_err(CopyError::Ring)?;
        self.states[slot] = State::Reading(job, piece);
        Ok(())
    }

    /// Goes on with a slot whose operation has ended.
    fn step(&mut self, slot: usize, result: io::Result<()>) -> Result<(), CopyError> {
        match std::mem::replace(&mut self.states[slot], State::Idle) {
            State::Idle => unreachable!("an idle slot has no operation"),
            State::Reading(job, piece) => {
                result.map_err(|source| CopyError::read(job.source.name(), piece, source))?;
                let runs = runs(&self.table.buffer(slot)[..length_of(piece)], piece.offset);
                self.write_runs(slot, job, piece, runs.into())
            }
            State::Writing {
                job,
                piece,
                run,
                rest,
            } => {
                let offset = piece.offset + run.range.start as u64;
                result.map_err(|source| CopyError::write(job.sink, offset, run.range.len(), source))?;
                self.write_runs(slot, job, piece, rest)
            }
        }
    }

    /// Writes the runs that need no waiting, and starts the first that does.
    fn write_runs(
        &mut self,
        slot: usize,
        job: Job<'a>,
        piece: Extent,
        mut rest: VecDeque<Run>,
    ) -> Result<(), CopyError> {
        while let Some(run) = rest.pop_front() {
            let offset = piece.offset + run.range.start as u64;
            let length = run.range.len();
            let failed = |source| CopyError::write(job.sink, offset, length, source);
            if run.zero {
                job.sink.zero_at(offset, length as u64).map_err(failed)?;
            } else if let Some(file) = job.sink.file() {
                job.sink.will_write(offset, length as u64);
                self.table
                    .write(slot, file.as_fd(), offset, run.range.clone())
                    .map_err(CopyError::Ring)?;
                self.states[slot] = State::Writing {
                    job,
                    piece,
                    run,
                    rest,
                };
                return Ok(());
            } else {
                let data = &self.table.buffer(slot)[run.range];
                job.sink.write_at(offset, data).map_err(failed)?;
            }
        }
        self.bytes += piece.length;
        (self.copied)(piece.length);
        Ok(())
    }
}

#[cfg(test)]
mod tests;

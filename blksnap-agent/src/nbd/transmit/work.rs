//! Work: requests that a worker carries out, and their way back to the connection.
//!
//! # No request is lost
//! A [`Pending`] request is completed with an answer; dropped without one, as when a thread panics, it answers with
//! an error.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use crate::nbd::ahead::Kept;
use crate::nbd::buffers::{Buffer, Buffers};
use crate::nbd::counters::{Counters, add, subtract};
use crate::nbd::export::{Export, ExportError, ZeroOptions};
use crate::nbd::limits::Held;
use crate::nbd::proto::reply::{self, MAX_READ_PREFIX};
use crate::nbd::proto::{Command, ErrorCode, Request, SelectedContext, Session, StatusExtent, Ticket};
use crate::nbd::wake::Waker;

/// What a request in flight holds: its place and its memory.
#[derive(Debug)]
pub(super) struct Place {
    held: Option<Held>,
    counters: Arc<Counters>,
}

impl Place {
    pub(super) fn new(held: Option<Held>, counters: &Arc<Counters>) -> Self {
        let place = Self {
            held,
            counters: Arc::clone(counters),
        };
        add(&counters.in_flight, 1);
        add(&counters.memory, place.bytes() as u64);
        place
    }

    /// Bytes of memory.
    pub(super) fn bytes(&self) -> usize {
        self.held.as_ref().map_or(0, Held::bytes)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        subtract(&self.counters.memory, self.bytes() as u64);
        subtract(&self.counters.in_flight, 1);
    }
}

/// An answer on its way from a worker.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) head: Vec<u8>,
    pub(super) body: Option<Buffer>,
    pub(super) place: Place,
    /// It was one of the jobs that a connection may have at once.
    pub(super) counted: bool,
}

/// Answers of the workers for one connection.
#[derive(Debug)]
pub(super) struct Queue {
    done: Mutex<Vec<Done>>,
    waker: Arc<Waker>,
}

impl Queue {
    pub(super) fn new(waker: Arc<Waker>) -> Self {
        Self {
            done: Mutex::default(),
            waker,
        }
    }

    fn push(&self, done: Done) {
        self.done
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(done);
        self.waker.wake();
    }

    /// Whether there is something to take.
    pub(super) fn is_empty(&self) -> bool {
        self.done
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_empty()
    }

    /// Takes all answers.
    pub(super) fn take(&self) -> Vec<Done> {
        std::mem::take(&mut *self.done.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A request that must be answered. Dropping it answers with an error.
pub(super) struct Pending {
    ticket: Ticket,
    place: Option<Place>,
    queue: Arc<Queue>,
    counted: bool,
}

impl Pending {
    /// The request of one job.
    pub(super) const fn of_job(ticket: Ticket, place: Place, queue: Arc<Queue>) -> Self {
        Self {
            ticket,
            place: Some(place),
            queue,
            counted: true,
        }
    }

    /// A request that is answered otherwise.
    pub(super) const fn of_parts(ticket: Ticket, place: Place, queue: Arc<Queue>) -> Self {
        Self {
            ticket,
            place: Some(place),
            queue,
            counted: false,
        }
    }

    /// Queues success as the answer.
    pub(super) fn succeed(self) {
        let mut head = Vec::new();
        reply::done(&mut head, self.ticket);
        self.complete(head, None);
    }

    fn complete(mut self, head: Vec<u8>, body: Option<Buffer>) {
        self.send(head, body);
    }

    /// Queues an error as the answer.
    pub(super) fn fail(mut self, error: ErrorCode, message: &str) {
        self.send_error(error, message);
    }

    fn send_error(&mut self, error: ErrorCode, message: &str) {
        if let Some(place) = &self.place {
            place.counters.count_error(error);
        }
        let mut head = Vec::new();
        reply::error(&mut head, self.ticket, error, message);
        self.send(head, None);
    }

    fn send(&mut self, head: Vec<u8>, body: Option<Buffer>) {
        if let Some(place) = self.place.take() {
            self.queue.push(Done {
                head,
                body,
                place,
                counted: self.counted,
            });
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if self.place.is_some() {
            self.send_error(ErrorCode::Io, "the request was not carried out");
        }
    }
}

/// A request for a worker.
pub(super) struct Job {
    pub(super) request: Request,
    /// The data of a write.
    pub(super) payload: Bytes,
    /// What was read ahead of a read.
    pub(super) kept: Option<Kept>,
    pub(super) pending: Pending,
    pub(super) export: Arc<dyn Export>,
    pub(super) session: Arc<Session>,
    pub(super) buffers: Buffers,
    pub(super) counters: Arc<Counters>,
}

impl Job {
    /// Carries the request out and answers it. Blocks. The export is let go before the answer: a client that has all
    /// its answers keeps no removed export alive.
    pub(super) fn carry_out(self) {
        let Self {
            request,
            payload,
            kept,
            pending,
            export,
            session,
            buffers,
            counters,
        } = self;
        let ticket = request.ticket;
        let mut head = Vec::with_capacity(MAX_READ_PREFIX);
        let mut body = None;
        let outcome = match request.command {
            Command::Read { offset, length, .. } => {
                reply::read_prefix(&mut head, ticket, offset, length);
                let mut buffer = buffers.take(length as usize);
                let read = match kept {
                    Some(kept) => kept.read(&*export, &buffers, buffer.as_mut_slice()),
                    None => export.read_at(buffer.as_mut_slice(), offset),
                };
                read.map(|()| {
                    add(&counters.bytes_read, length.into());
                    body = Some(buffer);
                })
            }
            Command::BlockStatus {
                offset,
                length,
                one,
                contexts,
            } => session
                .contexts
                .iter()
                .enumerate()
                .filter(|(place, _)| contexts.contains(*place))
                .map(|(_, context)| {
                    let most = if one { 1 } else { session.most_extents() };
                    status(&*export, context, offset, length, most)
                })
                .collect::<Result<Vec<_>, _>>()
                .map(|contexts| reply::block_status(&mut head, ticket, &contexts)),
            Command::Write { offset, length, fua } => export
                .write_at(payload, offset, fua)
                .inspect(|()| add(&counters.bytes_written, length.into())),
            Command::Trim { offset, length, fua } => export.trim(offset, length, fua),
            Command::WriteZeroes {
                offset,
                length,
                fua,
                no_hole,
                fast,
            } => export.write_zeroes(offset, length, ZeroOptions { no_hole, fast, fua }),
            Command::Cache { offset, length } => export.cache(offset, length),
            Command::Flush => export.flush(),
        };
        match outcome {
            Ok(()) => {
                drop(export);
                if head.is_empty() {
                    reply::done(&mut head, ticket);
                }
                pending.complete(head, body);
            }
            Err(error) => {
                tracing::debug!(export = export.name(), %error, "an nbd request failed");
                drop(export);
                pending.fail(error.code(), &error.to_string());
            }
        }
    }
}

/// The status of a range in one context.
fn status(
    export: &dyn Export,
    context: &SelectedContext,
    offset: u64,
    length: u64,
    most: usize,
) -> Result<(u32, Vec<StatusExtent>), ExportError> {
    let extents = export.block_status(&context.name, offset, length, most)?;
    let extents = reply::merged(&extents, length, most);
    if extents.is_empty() {
        return Err(ExportError::Io {
            name: export.name().to_owned(),
            action: "find the status",
            offset,
            source: io::ErrorKind::UnexpectedEof.into(),
        });
    }
    Ok((context.id, extents))
}

//! Transmit: the requests of one client, on a thread of their own.
//!
//! ```text
//!  socket ─► input ─► Requests ─┬─► answered here: cached and in-memory data ─► output ─► socket
//!                               └─► worker: Export ─► queue ─────────────────────┘
//! ```
//! The thread owns everything of the connection, so that nothing of it is locked: it takes requests as long as there
//! are any, answers what it can without waiting for a disk, gives the rest to the workers, and sends all answers that
//! are ready by one system call. Then it waits in poll(2) for the client, for a worker, or for a time-out.
//!
//! Requests are answered in the order in which they finish.
//!
//! # Bounds
//! A request for a worker needs a place of the connection, and memory for its data out of the budget. They are given
//! back when the answer was sent. What is answered here waits while more than a batch is unsent. A client that does
//! not read its answers therefore stops being read, holds a bounded amount of memory, and is dropped by the write
//! time-out. Some clients send many requests before they read: if the client does not take the batch for a moment,
//! requests go to the workers until their places are used up.
//!
//! | file | role |
//! |---|---|
//! | [`stream`] | the socket, plain or with TLS |
//! | `output` | answers on their way |
//! | `direct` | data of files, without a worker |
//! | `payload` | data of writes on its way in |
//! | `work` | requests for workers |
//! | `clock` | time-outs |

mod clock;
mod direct;
mod output;
mod payload;
pub(super) mod stream;
#[cfg(test)]
mod tests;
mod work;

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use self::clock::{Clock, Expired};
use self::direct::Direct;
use self::output::{BATCH, Flushed, Output};
use self::payload::Collecting;
use self::stream::Stream;
use self::work::{Job, Pending, Place, Queue};
use super::ahead::Means;
use super::buffers::Buffers;
use super::counters::{Counters, add};
use super::end::{End, Phase};
use super::export::{Export, PrefetchBy};
use super::limits::{Budget, ServerLimits};
use super::pipes::Pipes;
use super::proto::reply::{self, MAX_READ_PREFIX};
use super::proto::wire::CommandType;
use super::proto::{
    Command, ErrorCode, Event, Framing, Request, Requests, Session, StatusExtent, Ticket, TransmissionError,
};
use super::registry::{Entry, Exports};
use super::wake::Waker;
use super::workers::Workers;

/// Bytes of input read at once.
const INPUT: usize = 64 << 10;

/// How long the client may leave a batch unread before its requests go to the workers.
const CLOGGED: Duration = Duration::from_millis(50);
/// Batches of small answers that a client may leave lying while it sends on. Larger answers are bounded by their places.
const CLOGGED_BATCHES: usize = 4;

/// From this length on the data of a write is not read together with its header.
const LARGE: u32 = 64 << 10;

/// What all connections of a server share.
pub(super) struct Shared {
    pub(super) exports: Arc<Exports>,
    pub(super) counters: Arc<Counters>,
    pub(super) limits: ServerLimits,
    /// Memory of all connections.
    pub(super) budget: Arc<Budget>,
    pub(super) buffers: Buffers,
    pub(super) ahead: Means,
    pub(super) pipes: Pipes,
    /// Threads for requests that wait.
    pub(super) workers: Workers,
    pub(super) end: Arc<End>,
}

/// Why a transmission ended early.
#[derive(Debug, thiserror::Error)]
pub(super) enum TransmitError {
    #[error("read from or write to the client")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Protocol(#[from] TransmissionError),
    #[error("the client took nothing of its answers for {0:?}")]
    WriteTimeout(Duration),
    #[error("the client stopped in a request for {0:?}")]
    RequestTimeout(Duration),
    #[error("the client asked nothing for {0:?}")]
    IdleTimeout(Duration),
    #[error("the server ended before the client did")]
    Dropped,
}

impl From<Errno> for TransmitError {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// Received bytes that were not looked at yet.
struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Input {
    fn rest(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    fn is_empty(&self) -> bool {
        self.start == self.end
    }
}

/// The transmission of one client.
pub(super) struct Transmission {
    shared: Arc<Shared>,
    entry: Arc<Entry>,
    session: Arc<Session>,
    stream: Stream,
    requests: Requests,
    input: Input,
    output: Output,
    /// The small parts of answers are put together here.
    scratch: Vec<u8>,
    queue: Arc<Queue>,
    waker: Arc<Waker>,
    /// Requests whose answers were not sent.
    in_flight: u32,
    /// Bytes of memory that they hold.
    own: usize,
    /// Requests that workers have now, and those that wait for one.
    running: usize,
    backlog: VecDeque<Box<dyn FnOnce() + Send>>,
    /// A request that waits for a place or for memory.
    waiting: Option<Request>,
    collecting: Option<Collecting>,
    direct: Option<Direct>,
    /// Parts of the export are read ahead and kept.
    keeps: bool,
    clock: Clock,
    /// The request before was a large write.
    large_writes: bool,
    /// The client sends nothing more.
    left: bool,
    ending: bool,
    /// The client does not take answers now.
    blocked: bool,
    clogged: bool,
    /// Nobody needs answers any more.
    finished: bool,
}

impl Transmission {
    /// The transmission of `session` on an export, with the bytes that were received behind the handshake.
    pub(super) fn new(
        shared: Arc<Shared>,
        entry: Arc<Entry>,
        session: Session,
        stream: Stream,
        received: &[u8],
    ) -> io::Result<Self> {
        let waker = Arc::new(Waker::new()?);
        shared.end.register(&waker);
        let mut bytes = vec![0; INPUT.max(received.len())].into_boxed_slice();
        bytes[..received.len()].copy_from_slice(received);
        let direct = entry
            .export()
            .and_then(|export| Direct::of(&*export, stream.is_plain()));
        let keeps = entry.export().is_some_and(|export| {
            direct.is_none() && export.read_only() && export.prefetch_by() == PrefetchBy::Keeping
        });
        let limits = shared.limits;
        Ok(Self {
            output: Output::new(shared.pipes.clone()),
            shared,
            entry,
            session: Arc::new(session.clone()),
            requests: Requests::new(session),
            stream,
            input: Input {
                bytes,
                start: 0,
                end: received.len(),
            },
            scratch: Vec::with_capacity(256),
            queue: Arc::new(Queue::new(Arc::clone(&waker))),
            waker,
            in_flight: 0,
            own: 0,
            running: 0,
            backlog: VecDeque::new(),
            waiting: None,
            collecting: None,
            direct,
            keeps,
            clock: Clock::new(&limits),
            large_writes: false,
            left: false,
            ending: false,
            blocked: false,
            clogged: false,
            finished: false,
        })
    }

    /// Serves the client until it leaves.
    ///
    /// # Errors
    /// It ended in another way.
    pub(super) fn run(mut self) -> Result<(), TransmitError> {
        let entry = Arc::clone(&self.entry);
        let _client = entry.client();
        loop {
            match self.shared.end.phase() {
                Phase::Serving => {}
                Phase::Ending => self.ending = true,
                Phase::Dropping => return Err(TransmitError::Dropped),
            }
            self.take_done();
            self.flush()?;
            if self.finished || self.is_done() {
                self.stream.close();
                return Ok(());
            }
            if !self.advance()? {
                self.wait()?;
            }
        }
    }

    fn take_done(&mut self) {
        if self.in_flight == 0 {
            return;
        }
        for done in self.queue.take() {
            self.running -= usize::from(done.counted);
            self.output.reply(done.head, done.body, done.place);
        }
        let most = self.at_once();
        while self.running < most
            && let Some(job) = self.backlog.pop_front()
        {
            self.running += 1;
            self.shared.workers.run(job);
        }
    }

    /// Workers that one connection may have: others need some too.
    fn at_once(&self) -> usize {
        (self.shared.limits.workers as usize / 2).max(1)
    }

    fn flush(&mut self) -> Result<(), TransmitError> {
        if self.output.is_empty() && !self.stream.wants_write() {
            return Ok(());
        }
        let (in_flight, own) = (&mut self.in_flight, &mut self.own);
        let before = self.output.sent();
        let flushed = self.output.flush(&mut self.stream, |place| {
            *in_flight -= 1;
            *own -= place.bytes();
        })?;
        let sent = self.output.sent() - before;
        add(&self.shared.counters.bytes_sent, sent);
        if sent > 0 || !self.blocked {
            self.clock.sent();
        }
        self.blocked = flushed == Flushed::Blocked;
        if !self.blocked {
            self.clogged = false;
        }
        Ok(())
    }

    /// Whether nothing is left to do for a client that leaves or a server that ends.
    fn is_done(&self) -> bool {
        (self.left || self.ending)
            && self.in_flight == 0
            && self.output.is_empty()
            && !self.stream.wants_write()
            && self.waiting.is_none()
            && self.collecting.is_none()
    }

    /// Whether answers wait that the client should take first.
    fn is_full(&self) -> bool {
        self.output.left() >= BATCH && (!self.clogged || self.output.batches() > CLOGGED_BATCHES)
    }

    /// Begins what was received; false if nothing could be begun.
    fn advance(&mut self) -> Result<bool, TransmitError> {
        let mut progress = false;
        while !self.is_full() {
            if self.collecting.is_some() {
                if !self.collect()? {
                    break;
                }
                progress = true;
                continue;
            }
            if let Some(request) = self.waiting.take() {
                if !self.start(request) {
                    self.waiting = Some(request);
                    break;
                }
                progress = true;
                continue;
            }
            if self.left {
                break;
            }
            let mut rest = self.input.rest();
            let before = rest.len();
            let event = self.requests.receive(&mut rest)?;
            let after = rest.len();
            self.input.start += before - after;
            match event {
                None => break,
                Some(event) => self.begin(event),
            }
            progress = true;
        }
        Ok(progress)
    }

    fn begin(&mut self, event: Event) {
        self.clock.received();
        match event {
            Event::Disconnect => {
                self.shared.counters.count_request(Some(CommandType::Disconnect));
                self.left = true;
            }
            Event::Refuse(refused) => {
                self.shared.counters.count_request(refused.kind);
                let (error, message) = if self.ending {
                    (ErrorCode::Shutdown, "the server is shutting down")
                } else {
                    (refused.error, refused.message)
                };
                self.refuse(refused.ticket, error, message);
            }
            Event::Do(request) => {
                self.shared.counters.count_request(Some(request.command.kind()));
                self.large_writes = request.command.payload() >= LARGE;
                if let Command::Read { offset, length, .. } = request.command {
                    self.read_ahead(offset, length.into());
                }
                if !self.start(request) {
                    self.waiting = Some(request);
                }
            }
        }
    }

    /// Answers with an error.
    fn refuse(&mut self, ticket: Ticket, error: ErrorCode, message: &str) {
        self.shared.counters.count_error(error);
        self.scratch.clear();
        reply::error(&mut self.scratch, ticket, error, message);
        self.output.small(&self.scratch, &self.shared.buffers);
    }

    /// Answers that it is done.
    fn succeed(&mut self, ticket: Ticket) {
        self.scratch.clear();
        reply::done(&mut self.scratch, ticket);
        self.output.small(&self.scratch, &self.shared.buffers);
    }

    /// The export, or the reason why requests are refused.
    fn export(&self) -> Result<Arc<dyn Export>, &'static str> {
        if self.ending {
            return Err("the server is shutting down");
        }
        self.export_now()
    }

    /// The export for a request that was begun before the end.
    fn export_now(&self) -> Result<Arc<dyn Export>, &'static str> {
        self.entry.export().ok_or("the export was removed")
    }

    /// Carries a request out, or has it carried out; false if it must wait for a place or for memory.
    fn start(&mut self, request: Request) -> bool {
        let export = match self.export() {
            Ok(export) => export,
            Err(message) => {
                self.requests.skip_payload();
                self.refuse(request.ticket, ErrorCode::Shutdown, message);
                return true;
            }
        };
        if let Command::Read { offset, length, .. } = request.command
            && !self.clogged
            && self.read_directly(request.ticket, offset, length)
        {
            return true;
        }
        let Some(place) = self.place(self.needs(&request)) else {
            // Nothing may be kept of an export while a request waits.
            return false;
        };
        if request.command.payload() > 0 {
            self.collecting = Some(self.collecting(request, place));
        } else {
            self.give(request, Bytes::new(), place, export);
        }
        true
    }

    /// Gives a request to the workers.
    fn give(&mut self, request: Request, payload: Bytes, place: Place, export: Arc<dyn Export>) {
        let job = Job {
            request,
            payload,
            kept: self.kept(&request.command),
            pending: Pending::of_job(request.ticket, place, Arc::clone(&self.queue)),
            export,
            session: Arc::clone(&self.session),
            buffers: self.shared.buffers.clone(),
            counters: Arc::clone(&self.shared.counters),
        };
        self.run_job(Box::new(move || job.carry_out()));
    }

    /// Has a worker run a job that answers one request.
    fn run_job(&mut self, job: Box<dyn FnOnce() + Send>) {
        if self.running < self.at_once() {
            self.running += 1;
            self.shared.workers.run(job);
        } else {
            self.backlog.push_back(job);
        }
    }

    /// Bytes that a request and its answer may need.
    fn needs(&self, request: &Request) -> usize {
        match request.command {
            Command::Write { length, .. } => length as usize,
            Command::Read { length, .. } => length as usize + MAX_READ_PREFIX,
            // Extents as the export gives them, merged, and on the wire.
            Command::BlockStatus {
                length,
                one,
                contexts,
                ..
            } => {
                let most = if one {
                    1
                } else {
                    usize::try_from(length)
                        .unwrap_or(usize::MAX)
                        .min(self.session.most_extents())
                };
                most * 4 * size_of::<StatusExtent>() * contexts.len()
            }
            Command::Flush | Command::Trim { .. } | Command::Cache { .. } | Command::WriteZeroes { .. } => 0,
        }
    }

    /// A place and memory for a request, if they can be had.
    fn place(&mut self, bytes: usize) -> Option<Place> {
        let limits = &self.shared.limits;
        let bounded = bytes.min(limits.connection_bytes);
        if self.in_flight >= limits.in_flight || self.own + bounded > limits.connection_bytes {
            return None;
        }
        let held = if bounded == 0 {
            None
        } else {
            let budget = &self.shared.budget;
            let held = budget.try_take(bounded, self.own).or_else(|| {
                budget.wake_later(&self.waker);
                // Some may have come back between.
                budget.try_take(bounded, self.own)
            });
            Some(held?)
        };
        let place = Place::new(held, &self.shared.counters);
        self.in_flight += 1;
        self.own += place.bytes();
        Some(place)
    }

    /// Gives a place back without an answer of its own.
    fn release(&mut self, place: Place) {
        self.in_flight -= 1;
        self.own -= place.bytes();
        drop(place);
    }

    /// Has workers read ahead what this read makes likely.
    fn read_ahead(&self, offset: u64, length: u64) {
        if length == 0 || self.ending || self.direct.as_ref().is_some_and(Direct::is_memory) {
            return;
        }
        if let Some(export) = self.entry.export() {
            let ahead = self.entry.ahead();
            ahead.observe(&self.shared.ahead, &export, offset, length);
        }
    }

    /// Whether bytes of the client can be used now.
    fn wants_input(&self) -> bool {
        !self.left && !self.is_full() && self.waiting.is_none()
    }

    /// Waits for the client, a worker or a time-out, and takes what the client sent.
    fn wait(&mut self) -> Result<(), TransmitError> {
        let wants_input = self.wants_input();
        let receives = wants_input && self.collecting.is_none();
        if receives && !self.stream.is_plain() {
            // What TLS has decrypted already makes no socket readable.
            self.receive()?;
            if !self.input.is_empty() || self.left {
                return Ok(());
            }
        }
        let blocked = self.blocked;
        let mut events = PollFlags::empty();
        events.set(PollFlags::POLLIN, wants_input);
        events.set(PollFlags::POLLOUT, blocked);
        let mut limit = self
            .clock
            .limit(blocked, self.is_stopped_inside(), self.is_idle());
        let may_clog = self.is_full() && !self.left;
        if may_clog {
            limit = Some(limit.map_or(CLOGGED, |limit| limit.min(CLOGGED)));
        }
        self.waker.prepare();
        // What came before the waker was prepared would not end the wait.
        let nothing_came = self.queue.is_empty() && self.phase_is_known();
        let (mut woken, mut ready) = (false, PollFlags::empty());
        if nothing_came {
            let timeout = limit.map_or(PollTimeout::NONE, |limit| {
                PollTimeout::try_from(limit + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
            });
            let mut both = [
                PollFd::new(self.stream.as_fd(), events),
                PollFd::new(self.waker.as_fd(), PollFlags::POLLIN),
            ];
            let count = match poll(&mut both, timeout) {
                Err(Errno::EINTR) => 0,
                other => other?,
            };
            ready = both[0].revents().unwrap_or(PollFlags::empty());
            woken = both[1].any().unwrap_or(false);
            if count == 0 && may_clog && limit == Some(CLOGGED) {
                self.clogged = true;
            }
        }
        self.waker.take(woken);
        if ready.is_empty() {
            return self.check_time(blocked);
        }
        let gone = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
        if receives && ready.intersects(PollFlags::POLLIN | gone) {
            return self.receive();
        }
        if !wants_input && ready.intersects(gone) {
            return self.lost();
        }
        Ok(())
    }

    /// The client is gone. What it asked for before it said so is still carried out.
    fn lost(&mut self) -> Result<(), TransmitError> {
        if !self.left {
            return Err(io::Error::from(io::ErrorKind::ConnectionReset).into());
        }
        for job in std::mem::take(&mut self.backlog) {
            self.shared.workers.run(job);
        }
        self.finished = true;
        Ok(())
    }

    fn phase_is_known(&self) -> bool {
        match self.shared.end.phase() {
            Phase::Serving => true,
            Phase::Ending => self.ending,
            Phase::Dropping => false,
        }
    }

    /// Whether the client began a request and does not go on with it.
    fn is_stopped_inside(&self) -> bool {
        !self.requests.is_at_rest()
    }

    fn is_idle(&self) -> bool {
        self.in_flight == 0 && self.output.is_empty()
    }

    fn check_time(&self, blocked: bool) -> Result<(), TransmitError> {
        let counters = &self.shared.counters;
        match self
            .clock
            .check(blocked, self.is_stopped_inside(), self.is_idle())
        {
            None => Ok(()),
            Some(Expired::Write(limit)) => {
                add(&counters.write_timeouts, 1);
                Err(TransmitError::WriteTimeout(limit))
            }
            Some(Expired::Request(limit)) => {
                add(&counters.request_timeouts, 1);
                Err(TransmitError::RequestTimeout(limit))
            }
            Some(Expired::Idle(limit)) => {
                add(&counters.idle_timeouts, 1);
                Err(TransmitError::IdleTimeout(limit))
            }
        }
    }

    /// Takes what the client sent.
    fn receive(&mut self) -> Result<(), TransmitError> {
        if !self.input.is_empty() {
            return Ok(());
        }
        (self.input.start, self.input.end) = (0, 0);
        // The data of a large write is not to come along with its header: it has a shorter way.
        let most = if self.large_writes && self.requests.is_at_rest() {
            self.header_length()
        } else {
            self.input.bytes.len()
        };
        match self.stream.receive(&mut self.input.bytes[..most]) {
            Ok(0) => self.left = true,
            Ok(count) => {
                self.input.end = count;
                self.clock.received();
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    fn header_length(&self) -> usize {
        use super::proto::wire::{ExtendedRequestHeader, RequestHeader};
        match self.session.framing {
            Framing::Extended => size_of::<ExtendedRequestHeader>(),
            Framing::Simple | Framing::Structured => size_of::<RequestHeader>(),
        }
    }
}

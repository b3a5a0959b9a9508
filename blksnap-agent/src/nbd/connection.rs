//! Connection: one client, from the greeting to the end.
//!
//! ```text
//!  socket ─► read ─► Handshake ─► Requests ─► permits ─► thread: Export ─┐
//!  socket ◄─ write, as many replies at once as are ready ◄───── queue ◄──┘
//! ```
//! Requests of one client run at once and are answered in the order in which they finish.
//!
//! # Bounds
//! A request takes a permit of the connection before it starts, and permits for the bytes of its answer, of the
//! connection and of the server. They are given back when the answer was written. A client that does not read its
//! answers therefore stops being read, holds a bounded amount of memory, and is dropped by the write time-out.
//!
//! # No request is lost
//! A [`Pending`] request is completed with an answer; dropped without one, as when a thread panics, it answers with
//! an error.

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::counters::{Counters, add, subtract};
use super::export::{Export, ExportError, ZeroOptions};
use super::proto::limits::MAX_EXTENTS;
use super::proto::reply::{self, MAX_READ_PREFIX};
use super::proto::transmission::Refused;
use super::proto::wire::CommandType;
use super::proto::{
    Command, ErrorCode, Established, Event, Handshake, HandshakeError, Request, Requests, SelectedContext,
    Session, StatusExtent, Step, Ticket, Tls, TransmissionError,
};
use super::registry::{Entry, Exports};

/// Bytes of input read at once.
const INPUT: usize = 64 << 10;
/// Replies written at once.
const BATCH: usize = 32;
/// Memory is counted in units of this many bytes.
pub(super) const MEMORY_UNIT: usize = 1 << 10;

/// What bounds a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) in_flight: u32,
    pub(super) memory: u32,
    pub(super) handshake_timeout: Duration,
    pub(super) write_timeout: Duration,
}

/// What all connections of a server share.
pub(super) struct Shared {
    pub(super) exports: Arc<Exports>,
    pub(super) counters: Arc<Counters>,
    pub(super) bounds: Bounds,
    /// Memory of all connections, in units.
    pub(super) memory: Arc<Semaphore>,
    /// Threads that serve requests at once.
    pub(super) workers: Arc<Semaphore>,
    /// The server ends: finish what is in flight.
    pub(super) ending: CancellationToken,
}

/// Why a connection ended early.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    #[error("read from or write to the client")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error(transparent)]
    Transmission(#[from] TransmissionError),
    #[error("the handshake took longer than {0:?}")]
    HandshakeTimeout(Duration),
    #[error("the client read nothing for {0:?}")]
    WriteTimeout(Duration),
}

/// Serves one client until it leaves.
pub(super) async fn serve<R, W>(
    mut reader: R,
    mut writer: W,
    shared: Arc<Shared>,
) -> Result<(), ConnectionError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let limit = shared.bounds.handshake_timeout;
    let mut input = BytesMut::with_capacity(INPUT);
    let handshake = shake_hands(&mut reader, &mut writer, &mut input, &shared);
    let outcome = match timeout(limit, handshake).await {
        Ok(outcome) => outcome,
        Err(_) => Err(ConnectionError::HandshakeTimeout(limit)),
    };
    let established = match outcome {
        Ok(Some(established)) => established,
        Ok(None) => return Ok(()),
        Err(error) => {
            add(&shared.counters.handshakes_failed, 1);
            return Err(error);
        }
    };
    tracing::debug!(export = %established.name, "nbd client enters transmission");
    let outcome = transmit(&mut reader, writer, input, *established, &shared).await;
    if outcome.is_err() {
        add(&shared.counters.sessions_dropped, 1);
    }
    outcome
}

/// Carries a handshake through; `None` if the client left in good order.
async fn shake_hands<R, W>(
    reader: &mut R,
    writer: &mut W,
    input: &mut BytesMut,
    shared: &Shared,
) -> Result<Option<Box<Established<Arc<Entry>>>>, ConnectionError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut output = Vec::new();
    let mut handshake = Handshake::start(Tls::Unavailable, &mut output);
    let mut told = false;
    loop {
        let mut rest: &[u8] = input;
        let step = handshake.receive(&mut rest, &*shared.exports, &mut output);
        let consumed = input.len() - rest.len();
        input.advance(consumed);
        writer.write_all(&output).await?;
        output = Vec::new();
        match step? {
            Step::NeedMore => {}
            Step::Replied => continue,
            // Not reached: TLS is not offered.
            Step::StartTls => return Err(HandshakeError::Over.into()),
            Step::Enter(established) => return Ok(Some(established)),
            Step::End => {
                writer.shutdown().await?;
                return Ok(None);
            }
        }
        tokio::select! {
            () = shared.ending.cancelled(), if !told => {
                told = true;
                handshake.shut_down();
            }
            read = reader.read_buf(input) => if read? == 0 {
                return Ok(None);
            },
        }
    }
}

/// A finished answer with what it holds until it was written.
struct Reply {
    bytes: Vec<u8>,
    _permits: Permits,
}

/// What a request holds: its place and its memory.
struct Permits {
    _place: OwnedSemaphorePermit,
    _memory: Option<(OwnedSemaphorePermit, OwnedSemaphorePermit)>,
    counters: Arc<Counters>,
}

impl Drop for Permits {
    fn drop(&mut self) {
        subtract(&self.counters.in_flight, 1);
    }
}

/// A request that must be answered. Dropping it answers with an error.
struct Pending {
    ticket: Ticket,
    permits: Option<Permits>,
    queue: UnboundedSender<Reply>,
}

impl Pending {
    /// Queues the answer.
    fn complete(mut self, bytes: Vec<u8>) {
        self.send(bytes);
    }

    /// Queues an error as the answer.
    fn fail(mut self, error: ErrorCode, message: &str) {
        self.send_error(error, message);
    }

    fn send_error(&mut self, error: ErrorCode, message: &str) {
        if let Some(permits) = &self.permits {
            permits.counters.count_error(error);
        }
        let mut bytes = Vec::new();
        reply::error(&mut bytes, self.ticket, error, message);
        self.send(bytes);
    }

    fn send(&mut self, bytes: Vec<u8>) {
        if let Some(permits) = self.permits.take() {
            // If the client is gone nobody needs the answer.
            let _ = self.queue.send(Reply {
                bytes,
                _permits: permits,
            });
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if self.permits.is_some() {
            self.send_error(ErrorCode::Io, "the request was not carried out");
        }
    }
}

/// The transmission of one client.
struct Transmission<'a> {
    shared: &'a Shared,
    entry: Arc<Entry>,
    session: Arc<Session>,
    queue: UnboundedSender<Reply>,
    places: Arc<Semaphore>,
    memory: Arc<Semaphore>,
    /// The client is gone or stuck.
    broken: CancellationToken,
}

async fn transmit<R, W>(
    reader: &mut R,
    writer: W,
    mut input: BytesMut,
    established: Established<Arc<Entry>>,
    shared: &Shared,
) -> Result<(), ConnectionError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let _client = established.export.client();
    let (queue, replies) = unbounded_channel();
    let broken = CancellationToken::new();
    let transmission = Transmission {
        shared,
        entry: established.export,
        session: Arc::new(established.session.clone()),
        queue,
        places: Arc::new(Semaphore::new(shared.bounds.in_flight as usize)),
        memory: Arc::new(Semaphore::new(shared.bounds.memory as usize)),
        broken: broken.clone(),
    };
    let limit = shared.bounds.write_timeout;
    let counters = Arc::clone(&shared.counters);
    // Ends by itself once the queue's senders are gone; aborted if this future is.
    let writing = AbortOnDrop(tokio::spawn(async move {
        let outcome = write_replies(writer, replies, limit, &counters).await;
        broken.cancel();
        outcome
    }));
    let outcome = transmission.run(reader, &mut input, established.session).await;
    drop(transmission);
    let written = writing.finish().await;
    outcome.and(written)
}

/// A task that does not outlive its owner.
struct AbortOnDrop<T>(tokio::task::JoinHandle<T>);

impl AbortOnDrop<Result<(), ConnectionError>> {
    async fn finish(mut self) -> Result<(), ConnectionError> {
        match (&mut self.0).await {
            Ok(outcome) => outcome,
            Err(error) => Err(io::Error::other(error).into()),
        }
    }
}

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Transmission<'_> {
    /// Reads and starts requests until the client leaves, breaks a rule, or the server ends.
    async fn run<R>(
        &self,
        reader: &mut R,
        input: &mut BytesMut,
        session: Session,
    ) -> Result<(), ConnectionError>
    where
        R: AsyncRead + Unpin,
    {
        let mut requests = Requests::new(session);
        let mut ending = self.shared.ending.is_cancelled();
        loop {
            let mut rest: &[u8] = input;
            let collecting = loop {
                let event = requests.receive(&mut rest)?;
                let permits = match event {
                    None => break None,
                    Some(Event::Disconnect) => {
                        self.shared.counters.count_request(Some(CommandType::Disconnect));
                        return Ok(());
                    }
                    Some(Event::Refuse(_)) => self.permits(0).await,
                    Some(Event::Do(request)) => self.permits(self.held_bytes(&request)).await,
                };
                let (Some(permits), Some(event)) = (permits, event) else {
                    return Ok(());
                };
                let mut payload = BytesMut::with_capacity(requests.payload_left());
                if requests.take_payload(&mut rest, &mut payload) {
                    ending = ending || self.shared.ending.is_cancelled();
                    self.start(event, payload.freeze(), permits, ending);
                } else {
                    break Some((event, payload, permits));
                }
            };
            let consumed = input.len() - rest.len();
            input.advance(consumed);
            if let Some((event, mut payload, permits)) = collecting {
                // The rest of the payload goes straight to its place.
                while requests.payload_left() > 0 {
                    let mut place = (&mut payload).limit(requests.payload_left());
                    let read = tokio::select! {
                        () = self.broken.cancelled() => return Ok(()),
                        read = reader.read_buf(&mut place) => read?,
                    };
                    if read == 0 {
                        return Ok(());
                    }
                    requests.payload_received(read);
                }
                ending = ending || self.shared.ending.is_cancelled();
                self.start(event, payload.freeze(), permits, ending);
                continue;
            }
            input.reserve(INPUT);
            tokio::select! {
                () = self.shared.ending.cancelled(), if !ending => ending = true,
                // All places are free: nothing is in flight.
                _ = self.places.acquire_many(self.shared.bounds.in_flight), if ending => return Ok(()),
                () = self.broken.cancelled() => return Ok(()),
                read = reader.read_buf(input) => if read? == 0 {
                    return Ok(());
                },
            }
        }
    }

    /// Bytes that a request and its answer may need.
    fn held_bytes(&self, request: &Request) -> usize {
        match request.command {
            Command::Write { length, .. } => length as usize,
            Command::Read { length, .. } => length as usize + MAX_READ_PREFIX,
            Command::BlockStatus { one: true, .. } => MEMORY_UNIT,
            // Extents as the export gives them, merged, and on the wire.
            Command::BlockStatus { length, contexts, .. } => {
                let most = usize::try_from(length).unwrap_or(usize::MAX).min(MAX_EXTENTS);
                most * 4 * size_of::<StatusExtent>() * contexts.len()
            }
            Command::Flush | Command::Trim { .. } | Command::Cache { .. } | Command::WriteZeroes { .. } => 0,
        }
    }

    /// Waits for a place and for memory; `None` when the client is gone.
    async fn permits(&self, bytes: usize) -> Option<Permits> {
        let units = u32::try_from(bytes.div_ceil(MEMORY_UNIT))
            .unwrap_or(u32::MAX)
            .min(self.shared.bounds.memory);
        let acquire = async {
            let place = Arc::clone(&self.places).acquire_owned().await.ok()?;
            let memory = if units == 0 {
                None
            } else {
                let own = Arc::clone(&self.memory).acquire_many_owned(units).await.ok()?;
                let all = Arc::clone(&self.shared.memory)
                    .acquire_many_owned(units)
                    .await
                    .ok()?;
                Some((own, all))
            };
            Some((place, memory))
        };
        let (place, memory) = tokio::select! {
            permits = acquire => permits?,
            () = self.broken.cancelled() => return None,
        };
        let counters = Arc::clone(&self.shared.counters);
        add(&counters.in_flight, 1);
        Some(Permits {
            _place: place,
            _memory: memory,
            counters,
        })
    }

    /// Starts a request, or answers it at once where nothing has to be done.
    fn start(&self, event: Event, payload: Bytes, permits: Permits, ending: bool) {
        let (ticket, kind) = match &event {
            Event::Do(request) => (request.ticket, Some(request.command.kind())),
            Event::Refuse(refused) => (refused.ticket, refused.kind),
            Event::Disconnect => return,
        };
        self.shared.counters.count_request(kind);
        let pending = Pending {
            ticket,
            permits: Some(permits),
            queue: self.queue.clone(),
        };
        let request = match event {
            Event::Do(request) if !ending => request,
            Event::Refuse(Refused { error, message, .. }) if !ending => return pending.fail(error, message),
            _ => return pending.fail(ErrorCode::Shutdown, "the server is shutting down"),
        };
        let Some(export) = self.entry.export() else {
            return pending.fail(ErrorCode::Shutdown, "the export was removed");
        };
        let session = Arc::clone(&self.session);
        let counters = Arc::clone(&self.shared.counters);
        let workers = Arc::clone(&self.shared.workers);
        tokio::spawn(async move {
            let Ok(_worker) = workers.acquire_owned().await else {
                return;
            };
            let done = tokio::task::spawn_blocking(move || {
                carry_out(export, &session, request, payload, pending, &counters);
            });
            if let Err(error) = done.await {
                tracing::error!(%error, "a thread that served an nbd request failed");
            }
        });
    }
}

/// Carries a request out and answers it. Blocks. The export is let go before the answer: a client that has all its
/// answers keeps no removed export alive.
fn carry_out(
    export: Arc<dyn Export>,
    session: &Session,
    request: Request,
    payload: Bytes,
    pending: Pending,
    counters: &Counters,
) {
    let ticket = request.ticket;
    let mut bytes = Vec::new();
    let outcome = match request.command {
        Command::Read { offset, length, .. } => {
            bytes.reserve_exact(length as usize + MAX_READ_PREFIX);
            reply::read_prefix(&mut bytes, ticket, offset, length);
            let prefix = bytes.len();
            bytes.resize(prefix + length as usize, 0);
            export
                .read_at(&mut bytes[prefix..], offset)
                .inspect(|()| add(&counters.bytes_read, length.into()))
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
            .map(|(_, context)| status(&*export, context, offset, length, one))
            .collect::<Result<Vec<_>, _>>()
            .map(|contexts| reply::block_status(&mut bytes, ticket, &contexts)),
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
    if outcome.is_ok() && bytes.is_empty() {
        reply::done(&mut bytes, ticket);
    }
    match outcome {
        Ok(()) => {
            drop(export);
            pending.complete(bytes);
        }
        Err(error) => {
            tracing::debug!(export = export.name(), %error, "an nbd request failed");
            drop(export);
            pending.fail(error.code(), &error.to_string());
        }
    }
}

/// The status of a range in one context.
fn status(
    export: &dyn Export,
    context: &SelectedContext,
    offset: u64,
    length: u64,
    one: bool,
) -> Result<(u32, Vec<StatusExtent>), ExportError> {
    let most = if one { 1 } else { MAX_EXTENTS };
    let extents = export.block_status(&context.name, offset, length, most)?;
    let extents = reply::merged(&extents, length, one);
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

/// Writes replies until all senders are gone.
async fn write_replies<W>(
    mut writer: W,
    mut queue: UnboundedReceiver<Reply>,
    limit: Duration,
    counters: &Counters,
) -> Result<(), ConnectionError>
where
    W: AsyncWrite + Unpin,
{
    let mut batch = Vec::with_capacity(BATCH);
    while queue.recv_many(&mut batch, BATCH).await > 0 {
        let mut slices: Vec<IoSlice<'_>> = batch.iter().map(|reply| IoSlice::new(&reply.bytes)).collect();
        let mut left = slices.as_mut_slice();
        while !left.is_empty() {
            let written = timeout(limit, writer.write_vectored(left))
                .await
                .map_err(|_| ConnectionError::WriteTimeout(limit))??;
            if written == 0 {
                return Err(io::Error::from(io::ErrorKind::WriteZero).into());
            }
            add(&counters.bytes_sent, written as u64);
            IoSlice::advance_slices(&mut left, written);
        }
        batch.clear();
    }
    writer.shutdown().await?;
    Ok(())
}

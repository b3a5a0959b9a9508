//! Connection: one client, from the greeting to the end.
//!
//! The handshake is a task, TLS included: thousands of clients that do not get on with it cost little. Once an export
//! is chosen the connection gets a thread ([`super::transmit`]).

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use rustls::ServerConnection;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::either::Either;

use super::counters::add;
use super::endpoint::ClientStream;
use super::proto::{Established, Handshake, HandshakeError, Step, Tls};
use super::registry::Entry;
use super::tls::ServerTls;
use super::transmit::stream::Stream;
use super::transmit::{Shared, Transmission, TransmitError};

/// Bytes of input read at once.
const INPUT: usize = 8 << 10;

/// Bytes of the stack of a connection's thread.
const STACK: usize = 512 << 10;

/// Why a connection ended early.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    #[error("read from or write to the client")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error("start TLS")]
    Tls(#[source] io::Error),
    #[error(transparent)]
    Transmit(#[from] TransmitError),
    #[error("the handshake took longer than {0:?}")]
    HandshakeTimeout(Duration),
    #[error("start a thread for the client")]
    Thread(#[source] io::Error),
}

/// A client that chose its export.
struct Ready {
    established: Box<Established<Arc<Entry>>>,
    socket: ClientStream,
    tls: Option<Box<ServerConnection>>,
    /// What came behind the handshake.
    received: BytesMut,
}

/// Serves one client until it leaves.
pub(super) async fn serve(
    socket: ClientStream,
    mode: Tls,
    tls: Option<Arc<ServerTls>>,
    shared: Arc<Shared>,
) -> Result<(), ConnectionError> {
    let limit = shared.limits.handshake_timeout;
    let handshake = timeout(limit, shake_hands(socket, mode, tls, &shared));
    let outcome = tokio::select! {
        outcome = handshake => outcome.unwrap_or_else(|_| {
            add(&shared.counters.handshake_timeouts, 1);
            Err(ConnectionError::HandshakeTimeout(limit))
        }),
        () = shared.end.dropping().cancelled() => {
            add(&shared.counters.sessions_dropped, 1);
            return Err(TransmitError::Dropped.into());
        }
    };
    let ready = match outcome {
        Ok(Some(ready)) => ready,
        Ok(None) => return Ok(()),
        Err(error) => {
            add(&shared.counters.handshakes_failed, 1);
            return Err(error);
        }
    };
    tracing::debug!(
        export = %ready.established.name,
        tls = ready.tls.is_some(),
        "nbd client enters transmission"
    );
    let outcome = transmit(ready, Arc::clone(&shared)).await;
    if outcome.is_err() {
        add(&shared.counters.sessions_dropped, 1);
    }
    outcome
}

/// Carries a handshake through; `None` if the client left in good order.
async fn shake_hands(
    mut socket: ClientStream,
    mode: Tls,
    tls: Option<Arc<ServerTls>>,
    shared: &Shared,
) -> Result<Option<Ready>, ConnectionError> {
    let mut output = Vec::new();
    let mut handshake = Handshake::start(mode, &mut output);
    let mut received = BytesMut::with_capacity(INPUT);
    match negotiate(&mut socket, &mut handshake, output, &mut received, shared).await? {
        Negotiated::Left => Ok(None),
        Negotiated::Chosen(established) => Ok(Some(Ready {
            established,
            socket,
            tls: None,
            received,
        })),
        Negotiated::Upgrade => {
            let Some(tls) = tls else {
                return Err(HandshakeError::Over.into());
            };
            // Files may have to be read.
            let config = tokio::task::spawn_blocking(move || tls.config())
                .await
                .map_err(|error| ConnectionError::Tls(io::Error::other(error)))?;
            let accepted = TlsAcceptor::from(config).accept(socket).await;
            let mut stream = accepted.map_err(|error| {
                add(&shared.counters.tls_failed, 1);
                ConnectionError::Tls(error)
            })?;
            handshake.tls_started();
            let negotiated =
                negotiate(&mut stream, &mut handshake, Vec::new(), &mut received, shared).await?;
            let Negotiated::Chosen(established) = negotiated else {
                return Ok(None);
            };
            let (socket, tls) = stream.into_inner();
            Ok(Some(Ready {
                established,
                socket,
                tls: Some(Box::new(tls)),
                received,
            }))
        }
    }
}

/// What a handshake has come to.
enum Negotiated {
    /// An export was chosen.
    Chosen(Box<Established<Arc<Entry>>>),
    /// TLS comes next.
    Upgrade,
    /// The client left in good order.
    Left,
}

async fn negotiate<S>(
    stream: &mut S,
    handshake: &mut Handshake,
    mut output: Vec<u8>,
    received: &mut BytesMut,
    shared: &Shared,
) -> Result<Negotiated, ConnectionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut told = false;
    loop {
        let mut rest: &[u8] = received;
        let step = handshake.receive(&mut rest, &*shared.exports, &mut output);
        let consumed = received.len() - rest.len();
        received.advance(consumed);
        stream.write_all(&output).await?;
        stream.flush().await?;
        output = Vec::new();
        match step? {
            Step::NeedMore => {}
            Step::Replied => continue,
            Step::Enter(established) => return Ok(Negotiated::Chosen(established)),
            Step::StartTls => return Ok(Negotiated::Upgrade),
            Step::End => {
                stream.shutdown().await?;
                return Ok(Negotiated::Left);
            }
        }
        tokio::select! {
            () = shared.end.ending().cancelled(), if !told => {
                told = true;
                handshake.shut_down();
            }
            read = stream.read_buf(received) => if read? == 0 {
                return Ok(Negotiated::Left);
            },
        }
    }
}

/// Gives the client a thread, and waits for its end.
async fn transmit(ready: Ready, shared: Arc<Shared>) -> Result<(), ConnectionError> {
    let socket: OwnedFd = match ready.socket {
        Either::Left(stream) => stream.into_std()?.into(),
        Either::Right(stream) => stream.into_std()?.into(),
    };
    let stream = Stream::new(socket, ready.tls)?;
    let Established { export, session, .. } = *ready.established;
    let transmission = Transmission::new(shared, export, session, stream, &ready.received)?;
    let (done, outcome) = oneshot::channel();
    std::thread::Builder::new()
        .name("blksnap-nbd".to_owned())
        .stack_size(STACK)
        .spawn(move || {
            // Nobody waits for it any more where the server was dropped.
            let _ = done.send(transmission.run());
        })
        .map_err(ConnectionError::Thread)?;
    match outcome.await {
        Ok(outcome) => Ok(outcome?),
        Err(_) => Err(io::Error::other("the client's thread failed").into()),
    }
}

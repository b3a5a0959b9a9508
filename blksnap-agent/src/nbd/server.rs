//! Server: accepts clients on a unix socket and ends in good order.
//!
//! # End
//! [`Server::stop`] closes the socket's name first, so that nobody new comes. Requests in flight are finished, new
//! ones are answered with `NBD_ESHUTDOWN` (options with `NBD_REP_ERR_SHUTDOWN`), and a connection with nothing in
//! flight is closed. What still runs after the grace time is dropped.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::connection::{Bounds, MEMORY_UNIT, Shared, serve};
use super::counters::{Counters, add, subtract};
use super::proto::limits::MAX_PAYLOAD;
use super::registry::Exports;
use super::socket::{SocketError, SocketName, listen_on};

/// Pause after a failed accept(2), so that a lack of descriptors does not burn the processor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Bounds of a server. The defaults suit a daemon beside other work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerLimits {
    /// Connections at once; more are closed at once.
    pub connections: u32,
    /// Requests in flight on one connection.
    pub in_flight: u32,
    /// Bytes of answers in flight on one connection; at least one answer of the largest payload fits.
    pub connection_bytes: usize,
    /// Bytes of answers in flight on all connections.
    pub total_bytes: usize,
    /// Requests that run at once, on all connections.
    pub workers: u32,
    /// Longest handshake.
    pub handshake_timeout: Duration,
    /// Longest time in which a client reads nothing of what it was sent.
    pub write_timeout: Duration,
    /// Longest time for requests in flight when the server stops.
    pub grace: Duration,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            connections: 256,
            in_flight: 64,
            connection_bytes: 64 << 20,
            total_bytes: 512 << 20,
            workers: 64,
            handshake_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(120),
            grace: Duration::from_secs(5),
        }
    }
}

/// The NBD server of a process. Dropped without [`Server::stop`] it ends too, but nobody waits for it.
pub struct Server {
    path: PathBuf,
    counters: Arc<Counters>,
    ending: DropGuard,
    accepting: JoinHandle<()>,
}

impl Server {
    /// Listens on the socket `path` (mode 0600) and serves `exports` from now on. Must be called in a tokio
    /// runtime; the server runs on it until [`Server::stop`].
    ///
    /// # Errors
    /// The socket can't be made; the error says why.
    pub fn start(path: &Path, exports: Arc<Exports>, limits: &ServerLimits) -> Result<Self, SocketError> {
        let (listener, name) = listen_on(path)?;
        let listener = UnixListener::from_std(listener).map_err(|source| SocketError::Io {
            path: path.to_owned(),
            action: "watch it",
            source,
        })?;
        let counters = Arc::new(Counters::default());
        let ending = CancellationToken::new();
        let shared = Arc::new(Shared {
            exports,
            counters: Arc::clone(&counters),
            bounds: Bounds {
                in_flight: limits.in_flight.max(1),
                memory: units(limits.connection_bytes),
                handshake_timeout: limits.handshake_timeout,
                write_timeout: limits.write_timeout,
            },
            memory: Arc::new(Semaphore::new(
                units(limits.total_bytes.max(limits.connection_bytes)) as usize,
            )),
            workers: Arc::new(Semaphore::new(limits.workers.max(1) as usize)),
            ending: ending.clone(),
        });
        let accepting = tokio::spawn(accept(listener, name, shared, *limits));
        tracing::info!(path = %path.display(), "nbd server listens");
        Ok(Self {
            path: path.to_owned(),
            counters,
            ending: ending.drop_guard(),
            accepting,
        })
    }

    /// The socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the server did.
    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// Ends the server: finishes what is in flight, at most for the grace time, and removes the socket.
    pub async fn stop(self) {
        drop(self.ending);
        if let Err(error) = self.accepting.await {
            tracing::error!(%error, "the nbd server failed");
        }
        tracing::info!(path = %self.path.display(), "nbd server ended");
    }
}

/// Memory units in `bytes`; at least what one answer of the largest payload needs.
fn units(bytes: usize) -> u32 {
    let least = MAX_PAYLOAD as usize + MEMORY_UNIT;
    let units = bytes.max(least).div_ceil(MEMORY_UNIT).min(Semaphore::MAX_PERMITS);
    u32::try_from(units).unwrap_or(u32::MAX)
}

/// A client counted as open.
struct Open(Arc<Counters>);

impl Drop for Open {
    fn drop(&mut self) {
        subtract(&self.0.connections_open, 1);
    }
}

/// Accepts clients until the server ends, then waits for them.
async fn accept(listener: UnixListener, name: SocketName, shared: Arc<Shared>, limits: ServerLimits) {
    let clients = TaskTracker::new();
    let drop_all = CancellationToken::new();
    loop {
        let accepted = tokio::select! {
            () = shared.ending.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                if shared.counters.connections_open.load(Ordering::Relaxed) >= limits.connections.into() {
                    add(&shared.counters.connections_refused, 1);
                    tracing::debug!(limit = limits.connections, "an nbd client was refused");
                    continue;
                }
                clients.spawn(client(stream, Arc::clone(&shared), drop_all.clone()));
            }
            Err(error) => {
                tracing::debug!(%error, "accept an nbd client");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(name);
    drop(listener);
    clients.close();
    if tokio::time::timeout(limits.grace, clients.wait()).await.is_err() {
        tracing::warn!(grace = ?limits.grace, clients = clients.len(), "nbd clients are dropped");
        drop_all.cancel();
        clients.wait().await;
    }
}

/// Serves one client and counts it.
fn client(
    stream: UnixStream,
    shared: Arc<Shared>,
    drop_all: CancellationToken,
) -> impl Future<Output = ()> + Send + 'static {
    let counters = Arc::clone(&shared.counters);
    add(&counters.connections, 1);
    add(&counters.connections_open, 1);
    let open = Open(Arc::clone(&counters));
    async move {
        let _open = open;
        let (reader, writer) = stream.into_split();
        let outcome = tokio::select! {
            outcome = serve(reader, writer, shared) => outcome,
            () = drop_all.cancelled() => {
                add(&counters.sessions_dropped, 1);
                return;
            }
        };
        if let Err(error) = outcome {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            tracing::debug!(%error, source, "an nbd client was dropped");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_answer_always_fits_the_memory() {
        assert!(
            units(0) as usize * MEMORY_UNIT
                > MAX_PAYLOAD as usize + super::super::proto::reply::MAX_READ_PREFIX
        );
        assert_eq!(units(1 << 30), 1 << 20);
        assert!(units(usize::MAX) > 0);
    }
}

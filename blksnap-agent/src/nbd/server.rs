//! Server: accepts clients on its endpoints and ends in good order.
//!
//! # End
//! [`Server::stop`] closes the endpoints first, so that nobody new comes. Requests in flight are finished, new
//! ones are answered with `NBD_ESHUTDOWN` (options with `NBD_REP_ERR_SHUTDOWN`), and a connection with nothing in
//! flight is closed. What still runs after the grace time is dropped.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

use super::address::Address;
use super::ahead::Means;
use super::buffers::Buffers;
use super::connection::serve;
use super::counters::{Counters, add, subtract};
use super::end::{End, Phase};
use super::endpoint::{ClientStream, Endpoint, EndpointError};
use super::limits::Budget;
pub use super::limits::ServerLimits;
use super::pipes::Pipes;
use super::proto::Tls;
use super::registry::Exports;
use super::tls::ServerTls;
use super::transmit::Shared;
use super::workers::Workers;

/// Pause after a failed accept(2), so that a lack of descriptors does not burn the processor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Longest wait for threads that were told to drop their clients. One that waits for a disk can't hear it.
const DROPPING: Duration = Duration::from_secs(2);

/// The NBD server of a process. Dropped without [`Server::stop`] it ends too, but nobody waits for it.
pub struct Server {
    endpoints: Vec<(Address, Tls)>,
    shared: Arc<Shared>,
    ending: EndOnDrop,
    accepting: Vec<JoinHandle<()>>,
    clients: TaskTracker,
}

struct EndOnDrop(Arc<End>);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.advance(Phase::Ending);
    }
}

impl Server {
    /// Listens on the socket `path` (mode 0600) and serves `exports` from now on. Must be called in a tokio
    /// runtime; the server runs on it until [`Server::stop`].
    ///
    /// # Errors
    /// The socket can't be made; the error says why.
    pub fn start(path: &Path, exports: Arc<Exports>, limits: &ServerLimits) -> Result<Self, EndpointError> {
        Ok(Self::start_on(vec![Endpoint::unix(path)?], exports, limits))
    }

    /// Serves `exports` on all of `endpoints`. Must be called in a tokio runtime.
    #[must_use]
    pub fn start_on(endpoints: Vec<Endpoint>, exports: Arc<Exports>, limits: &ServerLimits) -> Self {
        let limits = limits.sound();
        let end = Arc::new(End::new());
        let buffers = Buffers::default();
        let workers = Workers::new(limits.workers as usize);
        let shared = Arc::new(Shared {
            exports,
            counters: Arc::new(Counters::default()),
            limits,
            budget: Arc::new(Budget::new(limits.total_bytes)),
            ahead: Means::new(buffers.clone(), workers.clone()),
            buffers,
            pipes: Pipes::default(),
            workers,
            end: Arc::clone(&end),
        });
        let clients = TaskTracker::new();
        let known = endpoints
            .iter()
            .map(|endpoint| (endpoint.address().clone(), endpoint.mode()))
            .collect();
        let accepting = endpoints
            .into_iter()
            .map(|endpoint| {
                tracing::info!(address = %endpoint.address(), tls = ?endpoint.mode(), "nbd server listens");
                tokio::spawn(accept(endpoint, Arc::clone(&shared), clients.clone()))
            })
            .collect();
        Self {
            endpoints: known,
            shared,
            ending: EndOnDrop(end),
            accepting,
            clients,
        }
    }

    /// Where clients find it, and how each place stands to TLS.
    #[must_use]
    pub fn endpoints(&self) -> &[(Address, Tls)] {
        &self.endpoints
    }

    /// The first unix socket.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.endpoints.iter().find_map(|(address, _)| match address {
            Address::Unix(path) => Some(path.as_path()),
            Address::Tcp(_) => None,
        })
    }

    /// What the server did.
    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.shared.counters)
    }

    /// The bounds that hold.
    #[must_use]
    pub fn limits(&self) -> &ServerLimits {
        &self.shared.limits
    }

    /// Ends the server: finishes what is in flight, at most for the grace time, and removes its sockets.
    pub async fn stop(self) {
        let Self {
            endpoints,
            shared,
            ending,
            accepting,
            clients,
        } = self;
        drop(ending);
        for task in accepting {
            if let Err(error) = task.await {
                tracing::error!(%error, "the nbd server failed");
            }
        }
        clients.close();
        let grace = shared.limits.grace;
        if tokio::time::timeout(grace, clients.wait()).await.is_err() {
            tracing::warn!(?grace, clients = clients.len(), "nbd clients are dropped");
            shared.end.advance(Phase::Dropping);
            if tokio::time::timeout(DROPPING, clients.wait()).await.is_err() {
                tracing::warn!(clients = clients.len(), "threads of nbd clients are left alone");
            }
        }
        for (address, _) in endpoints {
            tracing::info!(%address, "nbd server ended");
        }
    }
}

/// A client counted as open.
struct Open(Arc<Counters>);

impl Drop for Open {
    fn drop(&mut self) {
        subtract(&self.0.connections_open, 1);
    }
}

/// Accepts clients until the server ends.
async fn accept(endpoint: Endpoint, shared: Arc<Shared>, clients: TaskTracker) {
    let most = shared.limits.connections;
    loop {
        let accepted = tokio::select! {
            () = shared.end.ending().cancelled() => break,
            accepted = endpoint.accept() => accepted,
        };
        match accepted {
            Ok(stream) => {
                if shared.counters.connections_open.load(Ordering::Relaxed) >= most.into() {
                    add(&shared.counters.connections_refused, 1);
                    tracing::debug!(limit = most, "an nbd client was refused");
                    continue;
                }
                let client = client(
                    stream,
                    endpoint.mode(),
                    endpoint.tls().cloned(),
                    Arc::clone(&shared),
                );
                clients.spawn(client);
            }
            Err(error) => {
                tracing::debug!(%error, "accept an nbd client");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Serves one client and counts it.
fn client(
    stream: ClientStream,
    mode: Tls,
    tls: Option<Arc<ServerTls>>,
    shared: Arc<Shared>,
) -> impl Future<Output = ()> + Send + 'static {
    let counters = Arc::clone(&shared.counters);
    add(&counters.connections, 1);
    add(&counters.connections_open, 1);
    let open = Open(Arc::clone(&counters));
    async move {
        let _open = open;
        let outcome = serve(stream, mode, tls, shared).await;
        if let Err(error) = outcome {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            tracing::debug!(%error, source, "an nbd client was dropped");
        }
    }
}

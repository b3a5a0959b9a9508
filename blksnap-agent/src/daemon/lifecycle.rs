//! Lifecycle: start, wait for a signal, end.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::agent::Agent;
use crate::cbt::TrackingParams;
use crate::control::directory::{DirectoryError, RuntimeDirectory};
use crate::control::{LOCK_FILE, Service, server};
use crate::cow::ChunkParams;
use crate::filter::gate::GateOptions;
use crate::nbd::activation::Inherited;
use crate::nbd::address::Address;
use crate::nbd::endpoint::{Endpoint, EndpointError, LocalTls};
use crate::nbd::kernel;
use crate::nbd::registry::Exports;
use crate::nbd::server::{Server, ServerLimits};
use crate::nbd::socket::{self as nbd_socket, SocketName};
use crate::nbd::tls::{Clients, ServerTls, TlsError};
use crate::seal::{SealConfig, SealError, Seals, StateLock};
use crate::snapshot::HoldOptions;
use crate::tracker::{Tracker, TrackerConfig, TrackerError};

/// Longest wait for requests that were cancelled at the end.
const GRACE: Duration = Duration::from_secs(30);

/// Longest wait for the lock of a daemon that is ending: a child of one that was killed holds it until its exec.
const ENDING: Duration = Duration::from_secs(3);

/// Longest wait for threads that are still busy after that.
const THREADS: Duration = Duration::from_secs(5);

/// How often devices that come late are looked for.
const LOOK: Duration = Duration::from_secs(1);

/// What a daemon is told at its start. All paths are absolute.
#[derive(Clone, Debug)]
pub struct Config {
    /// Directory of the sockets.
    pub runtime_dir: PathBuf,
    /// The control socket.
    pub control_socket: PathBuf,
    /// The NBD socket.
    pub nbd_socket: PathBuf,
    /// The NBD server.
    pub nbd: NbdConfig,
    /// Directory of the difference storage of snapshots that name none.
    pub storage: PathBuf,
    /// Address for `/metrics` over TCP, a loopback one.
    pub metrics_listen: Option<SocketAddr>,
    /// How the size of tracking blocks follows from the capacity.
    pub parameters: TrackingParams,
    /// How the size of chunks of served devices follows from theirs.
    pub chunks: ChunkParams,
    /// Parameters of held snapshots.
    pub holding: HoldOptions,
    /// How gates work.
    pub gate: GateOptions,
    /// Most memory that tracking one device may take, in bytes.
    pub memory_limit: u64,
    /// The tracker.
    pub tracker: TrackerConfig,
    /// How devices are carried over reboots.
    pub seal: SealConfig,
    /// How long the start waits for recorded devices that are not there yet.
    pub device_wait: Duration,
}

/// What the NBD server is told at its start.
#[derive(Clone, Debug, Default)]
pub struct NbdConfig {
    /// TCP addresses beside the socket.
    pub listen: Vec<SocketAddr>,
    /// Directory of the certificates, and who may connect with TLS.
    pub tls: Option<(PathBuf, Clients)>,
    /// Whether clients on this machine must use TLS over TCP.
    pub local_tls: LocalTls,
    /// Bounds.
    pub limits: ServerLimits,
}

/// The daemon can't start, or ended by an error.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The runtime directory can't be used.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// Another daemon has the runtime directory.
    #[error("start the daemon: another one uses {}; stop it, or choose another --runtime-dir", .0.display())]
    Running(PathBuf),
    /// The lock file can't be made.
    #[error("lock {}: {source}", path.display())]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The directory of the difference storage can't be used.
    #[error("use the storage directory {}: {source}; choose another one with --storage", path.display())]
    Storage {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The state directory can't be used.
    #[error("use the state directory {}: {source}; choose another one with --state-dir", path.display())]
    State {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file in the state directory can't be used.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// Another daemon has the state directory.
    #[error("start the daemon: another one uses {}; stop it, or choose another --state-dir", .0.display())]
    StateUsed(PathBuf),
    /// Metrics have no access control.
    #[error(
        "serve metrics on {0}: not a loopback address, and anybody could read them; use 127.0.0.1 or ::1"
    )]
    NotLoopback(SocketAddr),
    /// The port can't be had.
    #[error("serve metrics on {address}: {source}; choose another port")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The tracking programs can't be loaded.
    #[error(transparent)]
    Tracker(#[from] TrackerError),
    /// A socket can't be made.
    #[error(transparent)]
    Socket(#[from] nbd_socket::SocketError),
    /// A socket for NBD can't be made.
    #[error(transparent)]
    Nbd(#[from] EndpointError),
    /// The certificates can't be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The runtime, its signals or the server failed.
    #[error("run the daemon: {0}")]
    Io(#[from] io::Error),
}

/// Keeps other daemons out of a directory. The file goes with it.
#[derive(Debug)]
struct DirectoryLock {
    path: PathBuf,
    _file: Flock<File>,
}

impl DirectoryLock {
    fn take(directory: &Path) -> Result<Self, DaemonError> {
        let path = directory.join(LOCK_FILE);
        let wrong = |source: io::Error| DaemonError::Lock {
            path: path.clone(),
            source,
        };
        let deadline = Instant::now() + ENDING;
        loop {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
                .map_err(wrong)?;
            let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => file,
                Err((_, Errno::EWOULDBLOCK)) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20));
                    continue;
                }
                Err((_, Errno::EWOULDBLOCK)) => return Err(DaemonError::Running(directory.to_owned())),
                Err((_, errno)) => return Err(wrong(errno.into())),
            };
            // The daemon before may have removed the file between our open and our lock.
            let ours = file.metadata().map_err(wrong)?;
            if fs::metadata(&path).is_ok_and(|now| (now.dev(), now.ino()) == (ours.dev(), ours.ino())) {
                // For clients that come before the sockets.
                file.set_len(0)
                    .and_then(|()| (&*file).write_all(std::process::id().to_string().as_bytes()))
                    .map_err(wrong)?;
                return Ok(Self { path, _file: file });
            }
        }
    }
}

impl Drop for DirectoryLock {
    fn drop(&mut self) {
        // Still locked, so that it is ours. A file that stays does no harm.
        let _ = fs::remove_file(&self.path);
    }
}

/// Runs the daemon until SIGTERM, SIGINT or SIGHUP, on the sockets of the service manager where it has made some.
///
/// # Errors
/// It can't start: nothing is left behind then.
pub fn run(config: &Config, inherited: Inherited) -> Result<(), DaemonError> {
    let metrics = config.metrics_listen.map(listen_metrics).transpose()?;
    // Dropped in the opposite order: the lock file, then the directory.
    let _directory = RuntimeDirectory::prepare(&config.runtime_dir)?;
    let _lock = DirectoryLock::take(&config.runtime_dir)?;
    let state = &config.seal.directory;
    let _state = StateLock::take(state)
        .map_err(|source| DaemonError::State {
            path: state.clone(),
            source,
        })?
        .ok_or_else(|| DaemonError::StateUsed(state.clone()))?;
    let seals = Seals::open(&config.seal)?;
    let tracker = Tracker::load(&config.tracker)?;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&config.storage)
        .map_err(|source| DaemonError::Storage {
            path: config.storage.clone(),
            source,
        })?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .thread_name("blksnap")
        .enable_all()
        .build()?;
    let ended = runtime.block_on(serve(config.clone(), inherited, tracker, seals, metrics));
    runtime.shutdown_timeout(THREADS);
    ended
}

fn listen_metrics(address: SocketAddr) -> Result<TcpListener, DaemonError> {
    if !address.ip().is_loopback() {
        return Err(DaemonError::NotLoopback(address));
    }
    TcpListener::bind(address).map_err(|source| DaemonError::Listen { address, source })
}

/// The signals that end the daemon.
struct Signals([Signal; 3]);

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self([
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
            signal(SignalKind::hangup())?,
        ]))
    }

    /// The name of the one that came.
    async fn wait(&mut self) -> &'static str {
        let [terminate, interrupt, hangup] = &mut self.0;
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
            _ = hangup.recv() => "SIGHUP",
        }
    }
}

/// The endpoints of the NBD server. Inherited sockets take the place of the daemon's own one.
fn endpoints(config: &mut Config, inherited: Vec<OwnedFd>) -> Result<Vec<Endpoint>, DaemonError> {
    let NbdConfig {
        listen,
        tls,
        local_tls,
        ..
    } = &config.nbd;
    let tls = match tls {
        Some((directory, clients)) => Some(Arc::new(ServerTls::load(directory, *clients)?)),
        None => None,
    };
    let mut endpoints = Vec::new();
    for socket in inherited {
        endpoints.push(Endpoint::inherited(socket, tls.as_ref(), *local_tls)?);
    }
    let unix = endpoints.iter().find_map(|endpoint| match endpoint.address() {
        Address::Unix(path) => Some(path.clone()),
        Address::Tcp(_) => None,
    });
    for address in listen {
        endpoints.push(Endpoint::tcp(*address, tls.as_ref(), *local_tls)?);
    }
    match unix {
        Some(path) => config.nbd_socket = path,
        None => endpoints.push(Endpoint::unix(&config.nbd_socket)?),
    }
    Ok(endpoints)
}

/// The control socket: the inherited one, or a new one with its name.
fn control_socket(
    config: &Config,
    inherited: Option<OwnedFd>,
) -> Result<(UnixListener, Option<SocketName>), DaemonError> {
    match inherited {
        Some(socket) => Ok((UnixListener::from(socket), None)),
        None => {
            let (listener, name) = nbd_socket::listen_on(&config.control_socket)?;
            Ok((listener, Some(name)))
        }
    }
}

/// Gives the kernel's devices that were connected to a daemon before this one new connections, if their exports are
/// there again.
fn reconnect_devices(socket: &Path) {
    let server = Address::Unix(socket.to_owned());
    for (index, outcome) in kernel::reconnect_all(&server) {
        match outcome {
            Ok(backend) => tracing::info!(device = index, export = backend.export, "nbd device reconnected"),
            Err(error) => tracing::warn!(device = index, %error, "an nbd device stays without a server"),
        }
    }
}

async fn serve(
    mut config: Config,
    inherited: Inherited,
    tracker: Arc<Tracker>,
    seals: Seals,
    metrics: Option<TcpListener>,
) -> Result<(), DaemonError> {
    let mut signals = Signals::listen()?;
    let stop = CancellationToken::new();
    let exports = Arc::new(Exports::new());
    let endpoints = endpoints(&mut config, inherited.nbd)?;
    let (control, name) = control_socket(&config, inherited.control)?;
    let nbd = Server::start_on(endpoints, Arc::clone(&exports), &config.nbd.limits);
    let agent = Arc::new(Agent::new(&config, tracker, exports, &nbd, seals));
    let restored = Arc::clone(&agent);
    let wait = config.device_wait;
    tokio::task::spawn_blocking(move || {
        restored.restore(wait);
        restored.resume_served();
    })
    .await
    .map_err(io::Error::other)?;
    let service: Arc<dyn Service> = Arc::<Agent>::clone(&agent);
    let mut serving = tokio::spawn(server::serve_unix(
        control,
        server::router(Arc::clone(&service), stop.clone()),
        stop.clone(),
    ));
    if let Some(listener) = metrics {
        let router = server::metrics_router(service, stop.clone());
        tokio::spawn(server::serve_tcp(listener, router, stop.clone()));
    }
    tokio::spawn(look(Arc::clone(&agent), stop.clone()));
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        control = %config.control_socket.display(),
        nbd = %config.nbd_socket.display(),
        storage = %config.storage.display(),
        "ready"
    );
    notify(&[NotifyState::Ready]);
    let socket = config.nbd_socket.clone();
    tokio::task::spawn_blocking(move || reconnect_devices(&socket));

    let failed = tokio::select! {
        signal = signals.wait() => {
            tracing::info!(signal, "ends");
            None
        }
        ended = &mut serving => Some(ended.map_err(io::Error::other).and_then(|served| served)),
    };
    notify(&[NotifyState::Stopping]);
    drop(name);
    stop.cancel();
    if failed.is_none() && tokio::time::timeout(GRACE, &mut serving).await.is_err() {
        tracing::warn!(grace = ?GRACE, "requests under way are left alone");
    }
    agent.withdraw();
    nbd.stop().await;
    let ending = Arc::clone(&agent);
    if let Err(error) = tokio::task::spawn_blocking(move || ending.end()).await {
        tracing::error!(%error, "the end of the snapshots failed");
    }
    if let Err(error) = tokio::task::spawn_blocking(move || agent.seal()).await {
        tracing::error!(%error, "the change maps were not sealed");
    }
    match failed {
        Some(Err(error)) => Err(error.into()),
        _ => Ok(()),
    }
}

/// Lets the agent look for devices that come late, until the daemon ends.
async fn look(agent: Arc<Agent>, stop: CancellationToken) {
    while tokio::time::timeout(LOOK, stop.cancelled()).await.is_err() {
        let agent = Arc::clone(&agent);
        if let Err(error) = tokio::task::spawn_blocking(move || agent.look()).await {
            tracing::error!(%error, "looking for devices that come late failed");
        }
    }
}

/// Tells the service manager, where there is one.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "the service manager was not told");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_one_daemon() {
        let directory = tempfile::tempdir().unwrap();
        let first = DirectoryLock::take(directory.path()).unwrap();
        assert!(matches!(
            DirectoryLock::take(directory.path()),
            Err(DaemonError::Running(_))
        ));
        drop(first);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        DirectoryLock::take(directory.path()).unwrap();
    }

    #[test]
    fn metrics_are_for_this_machine_only() {
        for address in ["0.0.0.0:0", "192.0.2.1:9", "[::]:0"] {
            assert!(matches!(
                listen_metrics(address.parse().unwrap()),
                Err(DaemonError::NotLoopback(_))
            ));
        }
        let listener = listen_metrics("127.0.0.1:0".parse().unwrap()).unwrap();
        let again = listen_metrics(listener.local_addr().unwrap());
        assert!(matches!(again, Err(DaemonError::Listen { .. })));
    }
}

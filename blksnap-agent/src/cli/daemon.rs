//! `daemon`.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::{args, size};
use crate::cbt::TrackingParams;
use crate::control::{CONTROL_SOCKET, NBD_SOCKET};
use crate::cow::ChunkParams;
use crate::daemon::{self, Config, NbdConfig};
use crate::filter::gate::{GateOptions, Switch};
use crate::nbd::activation::Inherited;
use crate::nbd::endpoint::LocalTls;
use crate::nbd::server::ServerLimits;
use crate::nbd::tls::Clients;
use crate::seal::{Roots, SealConfig, StateDirectory, shutdown};
use crate::snapshot::HoldOptions;
use crate::telemetry::log;
use crate::tracker::{self, KeepConfig, TrackerConfig};

/// Directory of the devices' documents, in the runtime directory.
const DOCUMENTS: &str = "devices";

pub(super) fn run(options: args::Daemon, socket: &Path) -> Result<()> {
    let (runtime_dir, control_socket) = match options.runtime_dir {
        Some(directory) => {
            let socket = directory.join(CONTROL_SOCKET);
            (directory, socket)
        }
        None => (
            socket.parent().unwrap_or(Path::new(".")).to_owned(),
            socket.to_owned(),
        ),
    };
    let documents = std::path::absolute(runtime_dir.join(DOCUMENTS))?;
    if options.purge {
        return purge(&options.bpffs, &documents, &options.state_dir);
    }
    let default = TrackerConfig::default();
    let ring_bytes = match options.ring_bytes {
        // Too large for the field is too large for the kernel: the tracker says so.
        Some(bytes) => u32::try_from(bytes).unwrap_or(u32::MAX),
        None => default.ring_bytes,
    };
    let chunks = ChunkParams::new(
        options.holding.chunk_minimum_shift,
        options.holding.chunk_maximum_shift,
        options.holding.chunk_maximum_count_shift,
    )?;
    let parameters = TrackingParams::new(
        options.tracking_block_minimum_shift,
        options.tracking_block_maximum_count,
        options.tracking_block_maximum_shift,
    )?;
    let seal = SealConfig {
        directory: std::path::absolute(options.state_dir)?,
        policy: options.seal,
        roots: Roots {
            sysfs: options.sysfs,
            proc: options.proc,
            boot: options.boot_id,
        },
    };
    // Before anything else is opened.
    let inherited = Inherited::take()?;
    let _log = log::init(options.log_format, &options.log)?;
    let config = Config {
        nbd: options.nbd.config()?,
        nbd_socket: std::path::absolute(runtime_dir.join(NBD_SOCKET))?,
        runtime_dir,
        control_socket,
        storage: std::path::absolute(options.storage)?,
        metrics_listen: options.metrics_listen,
        parameters,
        chunks,
        holding: HoldOptions {
            minimum: options.holding.diff_storage_minimum,
            queue: options.holding.chunk_maximum_in_queue as usize,
            buffers: options.holding.free_diff_buffer_pool_size as usize,
            filter: options.holding.filter,
            ..HoldOptions::default()
        },
        gate: GateOptions {
            priority: options.holding.gate_priority,
            technique: options.holding.gate_technique,
            preempt: options.holding.gate_preempt.then(|| preempt_switch(&seal)),
            btf: options.btf.clone(),
            ..GateOptions::with_deadline(Duration::from_millis(options.holding.gate_deadline))
        },
        memory_limit: options.memory_limit,
        tracker: TrackerConfig {
            ring_bytes,
            btf: options.btf,
            keep: (!options.no_pins).then_some(KeepConfig {
                bpffs: options.bpffs,
                documents,
            }),
            doubt_interval: default.doubt_interval,
            self_test_interval: Duration::from_secs(options.self_test_interval),
        },
        seal,
        device_wait: Duration::from_secs(options.device_wait.into()),
    };
    raise_descriptors();
    daemon::run(&config, inherited)?;
    Ok(())
}

/// What was before is noted in the state directory.
fn preempt_switch(seal: &SealConfig) -> Switch {
    let boot = shutdown::boot(&seal.roots.boot).unwrap_or_default();
    Switch::new(seal.directory.join("preempt"), boot)
}

/// Lets the process have as many files open as the system allows: each NBD client takes two or more, and what is usual
/// (1024) suits programs that use select(2).
fn raise_descriptors() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files can't be raised: fewer nbd clients may get in");
    }
}

/// The NBD server of `daemon`.
#[derive(Debug, Args)]
#[command(next_help_heading = "NBD")]
pub struct NbdOptions {
    /// Serve images over TCP too; an address that is not a loopback one needs --nbd-tls
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub nbd_listen: Vec<SocketAddr>,

    /// Directory with server-cert.pem, server-key.pem and ca-cert.pem, as qemu and nbdkit have it
    #[arg(long, value_name = "DIR")]
    pub nbd_tls: Option<PathBuf>,

    /// Take clients without a certificate too: anybody who can reach the port reads every image
    #[arg(long, requires = "nbd_tls")]
    pub nbd_tls_any_client: bool,

    /// Want TLS of clients on this machine too; others always need it
    #[arg(long, requires = "nbd_tls")]
    pub nbd_tls_required: bool,

    /// Most connections
    #[arg(long, value_name = "COUNT", default_value_t = ServerLimits::default().connections, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub nbd_connections: u32,

    /// Most requests in flight on a connection
    #[arg(long, value_name = "COUNT", default_value_t = ServerLimits::default().in_flight, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub nbd_in_flight: u32,

    /// Most memory for requests and answers of a connection; at least 33M
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = size::parse)]
    pub nbd_connection_memory: u64,

    /// Most memory for requests and answers of all connections; at least 64M
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = size::parse)]
    pub nbd_memory: u64,

    /// Most threads for requests that wait for a disk
    #[arg(long, value_name = "COUNT", default_value_t = ServerLimits::default().workers, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub nbd_workers: u32,

    /// Longest handshake of a client
    #[arg(long, value_name = "SECONDS", default_value_t = ServerLimits::default().handshake_timeout.as_secs(), value_parser = clap::value_parser!(u64).range(1..))]
    pub nbd_handshake_timeout: u64,

    /// Drop a client that takes nothing of its answers, or stops in a request, for so long
    #[arg(long, value_name = "SECONDS", default_value_t = ServerLimits::default().write_timeout.as_secs(), value_parser = clap::value_parser!(u64).range(1..))]
    pub nbd_write_timeout: u64,

    /// Drop a client that asks nothing for so long; 0 for never
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub nbd_idle_timeout: u64,

    /// Longest time for requests in flight when the daemon ends
    #[arg(long, value_name = "SECONDS", default_value_t = ServerLimits::default().grace.as_secs())]
    pub nbd_grace: u64,
}

impl NbdOptions {
    fn config(self) -> Result<NbdConfig> {
        let clients = if self.nbd_tls_any_client {
            Clients::Anybody
        } else {
            Clients::Certified
        };
        Ok(NbdConfig {
            listen: self.nbd_listen,
            tls: match self.nbd_tls {
                Some(directory) => Some((std::path::absolute(directory)?, clients)),
                None => None,
            },
            local_tls: if self.nbd_tls_required {
                LocalTls::Required
            } else {
                LocalTls::Offered
            },
            limits: ServerLimits {
                connections: self.nbd_connections,
                in_flight: self.nbd_in_flight,
                connection_bytes: usize::try_from(self.nbd_connection_memory)?,
                total_bytes: usize::try_from(self.nbd_memory)?,
                workers: self.nbd_workers,
                handshake_timeout: Duration::from_secs(self.nbd_handshake_timeout),
                write_timeout: Duration::from_secs(self.nbd_write_timeout),
                idle_timeout: Duration::from_secs(self.nbd_idle_timeout),
                grace: Duration::from_secs(self.nbd_grace),
            },
        })
    }
}

/// Ends all tracking that goes on without a daemon, and removes what is kept of it.
fn purge(bpffs: &Path, documents: &Path, state: &Path) -> Result<()> {
    let mut any = tracker::purge(bpffs)?;
    any |= StateDirectory::new(state.to_owned()).purge()?;
    match std::fs::remove_dir_all(documents) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("remove {}", documents.display()));
        }
        _ => {}
    }
    println!(
        "{}",
        if any {
            "tracking has ended, and what was kept of it is removed: the next backup of every device is a full one"
        } else {
            "nothing was kept"
        }
    );
    Ok(())
}

//! Daemon: the long-running process. It owns the tracker, the snapshots and both servers.
//!
//! - [`agent`]: the facade behind the control interface.
//! - [`doctor`]: what the machine has and lacks.
//!
//! # Start and end
//! A lock file in the runtime directory keeps a second daemon out, also one whose sockets look stale. The sockets
//! come last, so that a client that can connect gets answers; only then is the service manager told `READY=1`.
//! SIGTERM and SIGINT end it in the opposite order: work under way is cancelled (which thaws what it froze), then
//! the exports go, the snapshots, the sockets, the programs. A daemon that is killed leaves no frozen file system
//! either: see [`crate::disk::watchdog`].

pub mod agent;
pub mod doctor;
mod errors;
mod lifecycle;

pub use lifecycle::{Config, DaemonError, NbdConfig, run};

/// Directory of the difference storage unless told otherwise.
pub const STORAGE: &str = "/var/lib/blksnap/storage";

/// The state directory unless told otherwise: what is tracked, and sealed change maps.
pub const STATE: &str = "/var/lib/blksnap/state";

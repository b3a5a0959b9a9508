//! NBD: what the control API says of the NBD server.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The NBD server.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NbdStatus {
    /// Where it listens.
    pub endpoints: Vec<NbdEndpoint>,
    /// What it serves, by name.
    pub exports: Vec<NbdExport>,
    /// What bounds it.
    pub limits: NbdLimits,
    /// What it did since its start.
    pub counters: NbdCounters,
}

/// Where the NBD server listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NbdEndpoint {
    /// Path of a socket, or IP:PORT.
    pub address: String,
    /// Whether clients use TLS: `none`, `offered` or `required`.
    pub tls: String,
}

/// An export.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NbdExport {
    /// Name by which clients open it.
    pub name: String,
    /// A sentence for people.
    pub description: String,
    /// Size in bytes.
    pub size: u64,
    /// Refuses writes.
    pub read_only: bool,
    /// Connections of clients.
    pub clients: u64,
    /// Metadata contexts.
    pub contexts: Vec<String>,
}

/// Bounds of the NBD server; times in seconds, 0 is for ever.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NbdLimits {
    /// Connections at once.
    pub connections: u32,
    /// Requests in flight on one connection.
    pub in_flight: u32,
    /// Bytes in flight on one connection.
    pub connection_bytes: u64,
    /// Bytes in flight on all connections.
    pub total_bytes: u64,
    /// Threads for requests that wait for a disk.
    pub workers: u32,
    /// Longest handshake.
    pub handshake_seconds: u64,
    /// Longest time in which a client takes nothing of its answers, or stops in a request.
    pub write_seconds: u64,
    /// Longest time between two requests.
    pub idle_seconds: u64,
    /// Longest time for requests in flight at the end.
    pub grace_seconds: u64,
}

/// What the NBD server did since its start; `connections_open`, `in_flight` and `memory_bytes` are of now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NbdCounters {
    /// Connections accepted.
    pub connections: u64,
    /// Connections now.
    pub connections_open: u64,
    /// Connections closed at once, because there were too many.
    pub connections_refused: u64,
    /// Handshakes that failed.
    pub handshakes_failed: u64,
    /// Clients that TLS could not be started with.
    pub tls_failed: u64,
    /// Clients dropped in transmission.
    pub sessions_dropped: u64,
    /// Clients dropped by a time-out: `handshake`, `write`, `request`, `idle`.
    pub timeouts: BTreeMap<String, u64>,
    /// Requests of workers that were not answered yet.
    pub in_flight: u64,
    /// Bytes that they hold.
    pub memory_bytes: u64,
    /// Bytes read from exports.
    pub read_bytes: u64,
    /// Bytes written to exports.
    pub written_bytes: u64,
    /// Requests by command.
    pub requests: BTreeMap<String, u64>,
    /// Errors answered.
    pub errors: BTreeMap<String, u64>,
}

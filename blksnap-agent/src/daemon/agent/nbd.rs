//! NBD: the server as the control interface and the metrics show it.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Agent;
use crate::control::api;
use crate::nbd::counters::{Counters, CountersSnapshot};
use crate::nbd::proto::Tls;
use crate::nbd::server::{Server, ServerLimits};
use crate::telemetry::metrics::NbdSample;

/// What is shown of the server.
#[derive(Clone, Debug)]
pub(super) struct NbdView {
    endpoints: Vec<api::NbdEndpoint>,
    limits: ServerLimits,
    counters: Arc<Counters>,
}

impl NbdView {
    pub(super) fn of(server: &Server) -> Self {
        let endpoints = server
            .endpoints()
            .iter()
            .map(|(address, tls)| api::NbdEndpoint {
                address: address.to_string(),
                tls: match tls {
                    Tls::Unavailable => "none",
                    Tls::Offered => "offered",
                    Tls::Required | Tls::Active => "required",
                }
                .to_owned(),
            })
            .collect();
        Self {
            endpoints,
            limits: *server.limits(),
            counters: server.counters(),
        }
    }
}

/// Dropped clients by time-out.
fn timeouts(now: &CountersSnapshot) -> [(&'static str, u64); 4] {
    [
        ("handshake", now.handshake_timeouts),
        ("idle", now.idle_timeouts),
        ("request", now.request_timeouts),
        ("write", now.write_timeouts),
    ]
}

/// Requests by command.
fn requests(now: &CountersSnapshot) -> impl Iterator<Item = (&'static str, u64)> {
    now.requests
        .iter()
        .map(|(command, count)| (command.name(), *count))
        .chain([("unknown", now.requests_unknown)])
}

/// Errors by name.
fn errors(now: &CountersSnapshot) -> impl Iterator<Item = (&'static str, u64)> {
    now.errors.iter().map(|(error, count)| (error.name(), *count))
}

fn by_name(counts: impl IntoIterator<Item = (&'static str, u64)>) -> BTreeMap<String, u64> {
    counts
        .into_iter()
        .map(|(name, count)| (name.to_owned(), count))
        .collect()
}

impl Agent {
    pub(super) fn nbd_status(&self) -> api::NbdStatus {
        let limits = &self.nbd.limits;
        let now = self.nbd.counters.snapshot();
        let exports = self
            .exports
            .names()
            .into_iter()
            .filter_map(|name| {
                let export = self.exports.open(&name)?.export()?;
                Some(api::NbdExport {
                    description: export.description().to_owned(),
                    size: export.size(),
                    read_only: export.read_only(),
                    clients: self.exports.clients(&name) as u64,
                    contexts: export
                        .contexts()
                        .iter()
                        .map(|context| context.as_str().to_owned())
                        .collect(),
                    name,
                })
            })
            .collect();
        api::NbdStatus {
            endpoints: self.nbd.endpoints.clone(),
            exports,
            limits: api::NbdLimits {
                connections: limits.connections,
                in_flight: limits.in_flight,
                connection_bytes: limits.connection_bytes as u64,
                total_bytes: limits.total_bytes as u64,
                workers: limits.workers,
                handshake_seconds: limits.handshake_timeout.as_secs(),
                write_seconds: limits.write_timeout.as_secs(),
                idle_seconds: limits.idle_timeout.as_secs(),
                grace_seconds: limits.grace.as_secs(),
            },
            counters: api::NbdCounters {
                connections: now.connections,
                connections_open: now.connections_open,
                connections_refused: now.connections_refused,
                handshakes_failed: now.handshakes_failed,
                tls_failed: now.tls_failed,
                sessions_dropped: now.sessions_dropped,
                timeouts: by_name(timeouts(&now)),
                in_flight: now.in_flight,
                memory_bytes: now.memory,
                read_bytes: now.bytes_read,
                written_bytes: now.bytes_written,
                requests: by_name(requests(&now)),
                errors: by_name(errors(&now)),
            },
        }
    }

    pub(super) fn nbd_sample(&self) -> NbdSample {
        let now = self.nbd.counters.snapshot();
        NbdSample {
            connections: now.connections_open,
            connections_limit: self.nbd.limits.connections.into(),
            connections_accepted: now.connections,
            connections_refused: now.connections_refused,
            handshakes_failed: now.handshakes_failed,
            tls_failed: now.tls_failed,
            sessions_dropped: now.sessions_dropped,
            timeouts: timeouts(&now).to_vec(),
            in_flight: now.in_flight,
            memory_bytes: now.memory,
            memory_limit_bytes: self.nbd.limits.total_bytes as u64,
            exports: self.exports.names().len() as u64,
            requests: requests(&now).collect(),
            read_bytes: now.bytes_read,
            written_bytes: now.bytes_written,
            errors: errors(&now).collect(),
        }
    }
}

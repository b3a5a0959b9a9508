//! Counters: what the NBD server did, for metrics. All grow except the gauges named so.

use super::proto::wire::{CommandType, ErrorCode};
use crate::sync::atomic::{AtomicU64, Ordering};

const COMMANDS: usize = CommandType::ALL.len();
const ERRORS: usize = ErrorCode::ALL.len();

/// Counters that the server writes and telemetry reads.
#[derive(Debug, Default)]
pub struct Counters {
    pub(super) connections: AtomicU64,
    pub(super) connections_open: AtomicU64,
    pub(super) connections_refused: AtomicU64,
    pub(super) handshakes_failed: AtomicU64,
    pub(super) handshake_timeouts: AtomicU64,
    pub(super) tls_failed: AtomicU64,
    pub(super) write_timeouts: AtomicU64,
    pub(super) request_timeouts: AtomicU64,
    pub(super) idle_timeouts: AtomicU64,
    pub(super) sessions_dropped: AtomicU64,
    pub(super) bytes_read: AtomicU64,
    pub(super) bytes_written: AtomicU64,
    pub(super) bytes_sent: AtomicU64,
    pub(super) in_flight: AtomicU64,
    pub(super) memory: AtomicU64,
    requests: [AtomicU64; COMMANDS],
    requests_unknown: AtomicU64,
    errors: [AtomicU64; ERRORS],
}

/// The counters at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CountersSnapshot {
    /// Connections accepted.
    pub connections: u64,
    /// Gauge: connections open now.
    pub connections_open: u64,
    /// Connections closed at once because too many were open.
    pub connections_refused: u64,
    /// Handshakes that ended by an error or a time-out.
    pub handshakes_failed: u64,
    /// Handshakes that took too long.
    pub handshake_timeouts: u64,
    /// Clients that TLS could not be started with: no certificate, a wrong one, no TLS.
    pub tls_failed: u64,
    /// Clients dropped because they took nothing of their answers.
    pub write_timeouts: u64,
    /// Clients dropped because they stopped in the middle of a request.
    pub request_timeouts: u64,
    /// Clients dropped because they asked nothing.
    pub idle_timeouts: u64,
    /// Transmissions that ended by an error of the client, a write time-out or the end of the grace time.
    pub sessions_dropped: u64,
    /// Bytes of exports sent in answers to reads.
    pub bytes_read: u64,
    /// Bytes written to exports by writes.
    pub bytes_written: u64,
    /// Bytes written to sockets in transmission, headers included.
    pub bytes_sent: u64,
    /// Gauge: requests of the workers, received and not yet answered.
    pub in_flight: u64,
    /// Gauge: bytes of requests and answers in memory.
    pub memory: u64,
    /// Requests by command, refused ones included; [`CommandType::name`] gives the label.
    pub requests: Vec<(CommandType, u64)>,
    /// Requests with an unknown command.
    pub requests_unknown: u64,
    /// Requests answered with an error, by error; [`ErrorCode::name`] gives the label.
    pub errors: Vec<(ErrorCode, u64)>,
}

pub(super) fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

pub(super) fn subtract(counter: &AtomicU64, count: u64) {
    counter.fetch_sub(count, Ordering::Relaxed);
}

impl Counters {
    pub(super) fn count_request(&self, kind: Option<CommandType>) {
        let counter = kind
            .and_then(|kind| CommandType::ALL.iter().position(|known| *known == kind))
            .map_or(&self.requests_unknown, |index| &self.requests[index]);
        add(counter, 1);
    }

    pub(super) fn count_error(&self, error: ErrorCode) {
        if let Some(index) = ErrorCode::ALL.iter().position(|known| *known == error) {
            add(&self.errors[index], 1);
        }
    }

    /// The counters now. Each is exact; together they may be of slightly different moments.
    #[must_use]
    pub fn snapshot(&self) -> CountersSnapshot {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CountersSnapshot {
            connections: get(&self.connections),
            connections_open: get(&self.connections_open),
            connections_refused: get(&self.connections_refused),
            handshakes_failed: get(&self.handshakes_failed),
            handshake_timeouts: get(&self.handshake_timeouts),
            tls_failed: get(&self.tls_failed),
            write_timeouts: get(&self.write_timeouts),
            request_timeouts: get(&self.request_timeouts),
            idle_timeouts: get(&self.idle_timeouts),
            sessions_dropped: get(&self.sessions_dropped),
            bytes_read: get(&self.bytes_read),
            bytes_written: get(&self.bytes_written),
            bytes_sent: get(&self.bytes_sent),
            in_flight: get(&self.in_flight),
            memory: get(&self.memory),
            requests: CommandType::ALL
                .iter()
                .copied()
                .zip(self.requests.iter().map(get))
                .collect(),
            requests_unknown: get(&self.requests_unknown),
            errors: ErrorCode::ALL
                .iter()
                .copied()
                .zip(self.errors.iter().map(get))
                .collect(),
        }
    }
}

impl CountersSnapshot {
    /// Requests of this command.
    #[must_use]
    pub fn requests_of(&self, kind: CommandType) -> u64 {
        self.requests
            .iter()
            .find(|(known, _)| *known == kind)
            .map_or(0, |(_, count)| *count)
    }

    /// Requests answered with this error.
    #[must_use]
    pub fn errors_of(&self, error: ErrorCode) -> u64 {
        self.errors
            .iter()
            .find(|(known, _)| *known == error)
            .map_or(0, |(_, count)| *count)
    }
}

impl CommandType {
    /// Its name in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Disconnect => "disconnect",
            Self::Flush => "flush",
            Self::Trim => "trim",
            Self::Cache => "cache",
            Self::WriteZeroes => "write_zeroes",
            Self::BlockStatus => "block_status",
            Self::Resize => "resize",
        }
    }
}

impl ErrorCode {
    /// Its name in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotPermitted => "eperm",
            Self::Io => "eio",
            Self::NoMemory => "enomem",
            Self::Invalid => "einval",
            Self::NoSpace => "enospc",
            Self::Overflow => "eoverflow",
            Self::NotSupported => "enotsup",
            Self::Shutdown => "eshutdown",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_errors_are_counted_by_kind() {
        let counters = Counters::default();
        counters.count_request(Some(CommandType::Read));
        counters.count_request(Some(CommandType::Read));
        counters.count_request(Some(CommandType::Resize));
        counters.count_request(None);
        counters.count_error(ErrorCode::NotPermitted);
        let now = counters.snapshot();
        assert_eq!(now.requests_of(CommandType::Read), 2);
        assert_eq!(now.requests_of(CommandType::Resize), 1);
        assert_eq!(now.requests_unknown, 1);
        assert_eq!(now.errors_of(ErrorCode::NotPermitted), 1);
        assert_eq!(now.errors.iter().map(|(_, count)| count).sum::<u64>(), 1);
    }
}

//! Clock: how long a client may let the server wait.

use std::time::{Duration, Instant};

use crate::nbd::limits::ServerLimits;

/// A time that is over, with its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expired {
    /// The client took nothing of its answers.
    Write(Duration),
    /// The client stopped in the middle of a request.
    Request(Duration),
    /// The client asked nothing.
    Idle(Duration),
}

/// When the client last did something.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    sent: Instant,
    received: Instant,
    write: Duration,
    /// Zero is for ever.
    idle: Duration,
}

impl Clock {
    pub(super) fn new(limits: &ServerLimits) -> Self {
        let now = Instant::now();
        Self {
            sent: now,
            received: now,
            write: limits.write_timeout,
            idle: limits.idle_timeout,
        }
    }

    /// The client took something, or has everything.
    pub(super) fn sent(&mut self) {
        self.sent = Instant::now();
    }

    /// The client sent something.
    pub(super) fn received(&mut self) {
        self.received = Instant::now();
    }

    /// Time left of each limit that applies.
    fn left(&self, blocked: bool, inside: bool, idle: bool) -> [Option<(Expired, Duration)>; 3] {
        let now = Instant::now();
        let left = |applies: bool, since: Instant, expired: Expired, limit: Duration| {
            applies.then(|| {
                (
                    expired,
                    limit.saturating_sub(now.saturating_duration_since(since)),
                )
            })
        };
        let last = self.sent.max(self.received);
        [
            // An answer that came late does not count as one that was not taken.
            left(blocked, last, Expired::Write(self.write), self.write),
            left(inside && !blocked, last, Expired::Request(self.write), self.write),
            left(
                idle && !inside && !self.idle.is_zero(),
                last,
                Expired::Idle(self.idle),
                self.idle,
            ),
        ]
    }

    /// Longest wait until [`Clock::check`] has something to say; `None`: for ever.
    pub(super) fn limit(&self, blocked: bool, inside: bool, idle: bool) -> Option<Duration> {
        self.left(blocked, inside, idle)
            .into_iter()
            .flatten()
            .map(|(_, left)| left)
            .min()
    }

    /// The limit that is over, if one is: `blocked` while answers can't be sent, `inside` a request, `idle` with
    /// nothing to answer.
    pub(super) fn check(&self, blocked: bool, inside: bool, idle: bool) -> Option<Expired> {
        self.left(blocked, inside, idle)
            .into_iter()
            .flatten()
            .find(|(_, left)| left.is_zero())
            .map(|(expired, _)| expired)
    }
}

//! Cancel token: ends a copy early, when somebody asks or a deadline passes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Asked between pieces of work whether to go on. Clones share the request; the deadline is each one's own.
#[derive(Clone, Debug, Default)]
pub struct CancelToken {
    requested: Arc<AtomicBool>,
    deadline: Option<Instant>,
}

impl CancelToken {
    /// A token that nobody has cancelled.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The same token with a deadline, after which it counts as cancelled.
    #[must_use]
    pub fn until(&self, deadline: Instant) -> Self {
        Self {
            requested: Arc::clone(&self.requested),
            deadline: Some(deadline),
        }
    }

    /// Asks to stop.
    pub fn cancel(&self) {
        self.requested.store(true, Ordering::Release);
    }

    /// True if somebody asked to stop.
    #[must_use]
    pub fn is_requested(&self) -> bool {
        self.requested.load(Ordering::Acquire)
    }

    /// True if the deadline is over.
    #[must_use]
    pub fn is_late(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// True if the work should stop, for either reason.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.is_requested() || self.is_late()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn clones_share_the_request_but_not_the_deadline() {
        let token = CancelToken::new();
        let late = token.until(Instant::now());
        let early = token.until(Instant::now() + Duration::from_secs(3600));
        assert!(late.is_cancelled() && late.is_late() && !late.is_requested());
        assert!(!early.is_cancelled() && !token.is_cancelled());
        early.cancel();
        assert!(token.is_cancelled() && early.is_requested() && !early.is_late());
    }
}

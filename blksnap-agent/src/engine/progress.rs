//! Progress: what a long copy says about itself.

use serde::{Deserialize, Serialize};

/// What a copy is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Waiting for writes that began before.
    Preparing,
    /// The first pass over everything asked for.
    Copying,
    /// Again what was written meanwhile.
    CatchingUp,
    /// The file systems are frozen and the last rest is copied. Nothing is reported during it.
    Frozen,
    /// The instant is taken.
    Done,
}

/// Listens to a copy. Called often, from the thread that copies: it must return soon, and is not called while
/// file systems are frozen, because it may want to write somewhere.
pub trait Progress: Send + Sync {
    /// `done` of `total` bytes of this phase are copied; `total` of 0 is unknown.
    fn update(&self, phase: Phase, done: u64, total: u64);
}

/// Listens to nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn update(&self, _phase: Phase, _done: u64, _total: u64) {}
}

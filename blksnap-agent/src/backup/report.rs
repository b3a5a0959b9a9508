//! Report: what a backup was.

use std::path::PathBuf;

use serde::Serialize;

use super::plan::FullWhy;
use crate::cbt::Base;
use crate::filter::converge::Consistency;

/// Which kind a backup was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "mode")]
pub enum Mode {
    /// Everything was written.
    Full {
        /// Why.
        reason: FullWhy,
    },
    /// What changed since `since` was written.
    Incremental {
        /// The take that the target showed.
        since: Base,
    },
}

/// A backup that was made.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Full or incremental.
    #[serde(flatten)]
    pub mode: Mode,
    /// The device.
    pub device: PathBuf,
    /// The target.
    pub target: PathBuf,
    /// Bytes that had to be copied, from the device or the image; what was written meanwhile counts each time.
    pub bytes_copied: u64,
    /// Bytes of the device.
    pub bytes_total: u64,
    /// The take that the target shows: the base of the next backup.
    #[serde(flatten)]
    pub taken: Base,
    /// What the target is as good as.
    pub consistency: Consistency,
    /// How long file systems were frozen for the take, in milliseconds.
    pub frozen_ms: f64,
    /// Rounds of copying what was written meanwhile; none for an image.
    pub rounds: u32,
    /// Time in all, in seconds.
    pub seconds: f64,
}

//! Snapshot: several devices, one instant.
//!
//! A snapshot is created, gets devices, is taken once, and is held until it is destroyed. Its images are files of
//! the difference storage; whoever reads them shares the file, so that destroying a snapshot takes nothing from
//! under a reader. A device may be in several snapshots. Tracking goes on through all of it.
//!
//! # Owner
//! Each snapshot has an owner thread that keeps its state and does what it is told in the order of a queue; it
//! never waits for anything else. A take runs in a thread beside it that reports its end to the same queue. So
//! listing never waits for a take, and a snapshot can be destroyed while it is being taken.

mod error;
mod owner;
mod registry;

pub use error::SnapshotError;
pub use owner::{Image, Info, State, TakeOptions};
pub use registry::Snapshots;

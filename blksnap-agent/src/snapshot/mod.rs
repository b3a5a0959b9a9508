//! Snapshot: several devices, one instant.
//!
//! A snapshot is created, gets devices, is taken once, and is held until it is destroyed. A device may be in several
//! snapshots. Tracking goes on through all of it.
//!
//! Block devices are copied ([`FilterKind::Converge`]): their images are files of the difference storage; whoever
//! reads them shares the file, so that destroying a snapshot takes nothing from under a reader. Devices that the agent
//! serves are held ([`FilterKind::Served`]): their images are what was preserved and, for the rest, the device itself.
//! Such a snapshot is written down, and the next agent goes on with it, or says why it can't. Block devices can be held by
//! programs in the kernel instead of being copied ([`FilterKind::Gate`]); their images are as those of served ones, but
//! end with the agent. Of devices of device-mapper the kernel keeps old data itself ([`FilterKind::Dm`]): these outlive it.
//!
//! # Owner
//! Each snapshot has an owner thread that keeps its state and does what it is told in the order of a queue; it
//! never waits for anything else. A take runs in a thread beside it that reports its end to the same queue. So
//! listing never waits for a take, and a snapshot can be destroyed while it is being taken.

mod document;
mod error;
mod events;
mod files;
mod gated;
mod gated_own;
mod growth;
mod held;
mod mapped;
mod member;
mod own;
mod owner;
mod places;
mod registry;
mod stores;

pub use error::SnapshotError;
pub use events::{Event, EventData, Events, Waited};
pub use files::Devices;
pub use gated::GateKeeper;
pub use held::{HoldOptions, HoldPlace};
pub use mapped::DmKeeper;
pub use member::{FilterKind, FilterWish, Member, MemberId};
pub use owner::{Content, Image, Info, State, TakeOptions};
pub use registry::{Left, Snapshots};

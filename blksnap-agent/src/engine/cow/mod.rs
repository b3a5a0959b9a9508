//! Copy on write: carries out what the core [`crate::cow`] decides, for every filter that can make a write wait.
//!
//! - [`Origin`]: a disk under copy on write. A filter has each write admitted ([`Origin::admit`]) before it goes on.
//! - [`Store`]: where one snapshot keeps what was preserved of one origin.
//! - [`Fence`]: storage that is on the origin itself, until somebody else writes there.
//! - [`Image`]: the disk at the instant; readable and writable.
//! - [`journal`]: what was preserved, so that another agent can go on with the snapshot.
//!
//! # Whose error is it
//! The origin's writer never sees an error of a snapshot. When old data can't be read or kept, the snapshot breaks: its
//! images answer every request with an error from then on, [`Broken`] is told once, and the write goes on.
//!
//! # Durability
//! With [`Promise::AgentCrash`] old data is in the storage's page cache, and the journal names it, before the new write
//! is let go: the end of the agent, however it comes, loses nothing. A power cut may, which is known by the boot's
//! number. With [`Promise::PowerCut`] both are flushed first, once for all writes that wait together. With
//! [`Promise::Nothing`] a write waits only until its old data is in memory.

mod admission;
mod commit;
mod fence;
mod image;
pub mod journal;
mod mover;
mod origin;
mod preserve;
mod settled;
mod staging;
mod store;

#[cfg(test)]
mod tests;

pub use admission::Admitted;
pub use fence::{BeforeWrite, Fence};
pub use image::{Image, ImageError};
pub use origin::{ArmError, Counters, Origin, Paused, Times};
pub use store::{Broken, DiffStorage, Promise, Store, StoreOptions};

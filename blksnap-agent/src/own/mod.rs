//! Own: files on a served device as difference storage of snapshots of that very device.
//!
//! A write to a served device may have to wait for old data to be stored. Stored through the file system that made the
//! write, it would wait for itself. So such a file is allocated, kept where it is, and the engine writes to its sectors
//! on the origin, beneath the file system ([`crate::engine::cow::Fence`]).
//!
//! # Who touches the file system
//! Never a thread of the agent: one that waits for a device that the agent serves can't be killed, and keeps the
//! device from the next agent for ever. A process does, a short run of the agent's own program ([`Helper`]), which has
//! none of its descriptors. If the agent ends first, the process takes back what it did; files that stay are noted
//! before they are made, and the next agent removes them ([`crate::snapshot`]).
//!
//! Files on devices whose writes are held in the kernel are made by the same process, and used by other rules
//! ([`crate::snapshot`], `gated_own`).
//!
//! # Which file systems
//! Those whose addresses are bytes of their device ([`crate::disk::extents`]): ext4 and XFS, directly on the served
//! device or on a partition of it. What stands on something that stands on it is refused.

mod file;
mod helper;
mod place;

pub use file::{Kept, Made, Make, make, ranges, release};
pub use helper::{Helper, HelperError, Looked, SUBCOMMAND, main};
pub use place::{Candidate, On, find};

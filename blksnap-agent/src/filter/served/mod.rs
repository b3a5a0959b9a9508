//! Served: the agent itself serves a disk, so it sees each write and can make it wait.
//!
//! For virtual machines, and for the kernel's NBD client. The [`Served`] device is read and written through the agent
//! only; it records what changes ([`changes`]) and keeps old data for snapshots ([`crate::engine::cow`]).
//!
//! # A take
//! All devices of the snapshot are paused: new writes wait, those under way end. Then the period of each change map is
//! closed and copy on write begins. That is the instant; it takes as long as the slowest write under way. Writes that
//! are still on their way to the agent come after it, so an image is what a power cut would have left.
//!
//! # After the agent's end
//! Change map and snapshots go on where that is proven ([`continuity`]): what the agent knew is in files that survive
//! it, and nobody else has written to the disk since.

pub mod changes;
pub mod continuity;
mod device;
pub mod lease;
mod take;

pub use device::{Place, Served, ServedError, ServedImage, ServedOptions};
pub use take::{Member, TakeError, TakenMember, take};

//! Copy on write: which old data has to be kept before a write goes on, where it is, and what an image reads.
//!
//! This is the core of every filter that holds writes: pure, one state machine per origin ([`Hold`]), no input or
//! output. The engine asks it what to do, moves the bytes, and tells it what has happened.
//!
//! # Terms
//! - A *chunk* is the piece of bookkeeping: a slot of difference storage, one entry of the table. Its size follows from
//!   the device ([`ChunkParams`]).
//! - A *unit* is the piece of preserving: a 64th of a chunk, at least 4 KiB. A write that touches one unit of a chunk
//!   makes the engine copy one unit, not the chunk.
//! - A *table* ([`Table`]) says of each chunk of one device in one snapshot which units were preserved and where they
//!   are. Units that are not in it are still in the origin.
//!
//! # The argument
//! *Preserve before write*: a write to a unit that some snapshot lacks goes on only after [`Hold::settle`] was told that
//! the old bytes are in that snapshot's memory or storage. So at every moment each unit of an image is either in the
//! table, with the bytes of the instant or what was written to the image since, or in the origin, unchanged since the
//! instant.
//!
//! *Read, then look again*: an image read that found a unit in the origin reads it without a lock. Meanwhile a write may
//! preserve and overwrite it. So the reader asks again ([`Hold::recheck`]): a unit that is in the table by now is
//! read from there; one that still is not was not overwritten before the second look, since preserving comes first.

mod hold;
mod layout;
#[cfg(any(test, feature = "testing"))]
pub mod model;
mod params;
mod space;
mod table;

pub use hold::{Decision, Hold, HoldError, Job, Kept, Need, SnapshotKey, Ticket};
pub use layout::{ChunkLayout, ChunkRange, UnitSet};
pub use params::{ChunkParams, ChunkParamsError};
pub use space::{Misplaced, Overflow, Region, RegionId, Slot, Space, SpaceEvent, Taken};
pub use table::{BufferId, ChunkState, Piece, Place, Table};

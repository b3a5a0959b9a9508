//! Filter: how the old data of a device survives while a snapshot is held.
//!
//! [`converge`] needs to hold no write: it copies while tracking until copy and device are equal.

pub mod converge;

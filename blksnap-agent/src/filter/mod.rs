//! Filter: how the old data of a device survives while a snapshot is held.
//!
//! - [`converge`] needs to hold no write: it copies while tracking until copy and device are equal.
//! - [`dm`] lets the kernel keep what is written over, on devices of device-mapper.
//! - [`gate`] holds the writes of any disk in use, by programs in the kernel.
//! - [`served`] holds the writes of disks that the agent serves itself.
//!
//! [`instant`] is the moment of a take of tracked devices whose filter is in the kernel, and [`held`] what their images
//! have in common.

pub mod converge;
pub mod dm;
pub mod gate;
pub mod held;
pub mod instant;
pub mod served;

//! ABI: every struct that crosses a boundary of blksnap, and nothing else.
//!
//! - [`track`]: what the tracking programs and the agent share (map keys and values, ring records, counters).
//! - [`gate`]: what the programs that make writes wait and the agent share.
//! - [`uapi`]: the names, numbers and layouts of the original's control interface.
//! - [`blockrange`]: the arithmetic from a bio to bits, pure, so that it is tested on the host and compiled for
//!   the kernel unchanged.
//! - [`passthrough`]: which commands past the block layer may change a disk, in the same way.
//!
//! All structs are `#[repr(C)]`, without implicit padding, `bool` or `Option`; their sizes are asserted at
//! compile time. A change of any of them raises [`track::ABI_VERSION`].
#![no_std]

pub mod blockrange;
pub mod gate;
pub mod passthrough;
pub mod track;
pub mod uapi;

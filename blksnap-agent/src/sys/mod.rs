//! System: the kernel's calls behind safe functions; the only unsafe code of the agent.

mod buffer;
pub mod cached;
pub mod dm;
pub mod fdpass;
pub mod fiemap;
pub mod flags;
pub mod fsmap;
pub mod fuse;
pub mod inherit;
pub mod ioctl;
pub mod loopdev;
pub mod mman;
pub mod reads;
pub mod sched;
#[cfg(feature = "ublk")]
pub mod ublk;
pub mod uring;

pub use buffer::AlignedBuffer;

//! System: the kernel's calls behind safe functions; the only unsafe code of the agent.

mod buffer;
pub mod fdpass;
pub mod ioctl;

pub use buffer::AlignedBuffer;

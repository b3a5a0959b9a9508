//! System: the kernel's calls behind safe functions; the only unsafe code of the agent.

pub mod ioctl;

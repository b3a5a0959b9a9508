//! Test disks: a disk that forgets at a power cut, a disk that fails when it is told to, and what every disk must do.

mod crash;
mod fault;
mod suite;

pub use crash::CrashDisk;
pub use fault::{FaultDisk, Operation};
pub use suite::conforms;

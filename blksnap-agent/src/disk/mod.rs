//! Disk: block devices, their identity and geometry.

pub mod device;
mod error;

pub use device::BlockDevice;
pub use error::DiskError;

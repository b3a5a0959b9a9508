//! Disk: block devices, their identity, geometry, direct reads, mounts and freezing.

mod contract;
pub mod dax;
pub mod device;
mod error;
pub mod extents;
pub mod freeze;
pub mod identity;
pub mod mounts;
pub mod presence;
mod reader;
pub mod stack;
pub mod watchdog;

pub use contract::{Allocation, Disk, Zero};
pub use device::BlockDevice;
pub use error::DiskError;
pub use freeze::{FileSystems, FreezeError, Freezer};
pub use identity::{DeviceIdentity, Difference};
pub use mounts::Mount;
pub use reader::DirectReader;
pub use watchdog::WatchdogCommand;

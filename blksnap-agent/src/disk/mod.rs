//! Disk: block devices, their identity, geometry, direct reads, mounts and freezing; and the disks that the
//! copy-on-write engine works on.

pub mod bcache;
mod claim;
mod contract;
pub mod dax;
pub mod device;
mod error;
pub mod extents;
mod file;
pub mod freeze;
pub mod identity;
mod memory;
pub mod mounts;
pub mod presence;
mod reader;
pub mod stack;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod watchdog;

pub use contract::{Allocation, Disk, Zero};
pub use device::BlockDevice;
pub use error::DiskError;
pub use file::FileDisk;
pub use freeze::{FileSystems, FreezeError, Freezer};
pub use identity::{DeviceIdentity, Difference};
pub use memory::MemoryDisk;
pub use mounts::Mount;
pub use reader::DirectReader;
pub use watchdog::WatchdogCommand;

//! Backup: raw image files of devices, full or only what changed.
//!
//! A *target* is a regular file with the device's bytes; zeros are holes. Beside it lies its *sidecar*
//! (`TARGET.blksnap.json`), which says which take of which generation the file shows and how the file looked then.
//! An incremental backup writes only what changed since that take, in place. Whenever it is not proven that the
//! file is that take ([`plan`]), a full backup is made and the reason given.
//!
//! # Crash consistency
//! The sidecar is marked as unfinished and synced before the first byte of the target changes, and is completed
//! only after the target was synced. A backup that was killed therefore leaves a file that is known not to be an
//! image, and the next one is full.

mod error;
pub mod image;
pub mod live;
pub mod plan;
mod report;
pub mod session;
pub mod sidecar;
mod sparse;
pub mod target;

pub use error::BackupError;
pub use image::{Control, ImageSource, from_image};
pub use live::{Taking, from_device};
pub use plan::{DeviceFacts, FullWhy, Plan};
pub use report::{Mode, Report};
pub use session::Session;
pub use sidecar::{Fingerprint, Sidecar, SidecarDevice, SidecarState};
pub use target::{Target, TargetError};

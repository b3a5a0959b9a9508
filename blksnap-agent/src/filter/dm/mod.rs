//! Dm: the kernel's own copy on write, for devices of device-mapper (LVM, dm-crypt).
//!
//! The table of the origin is swapped, while nothing passes, for `snapshot-origin` over a device that has the old table;
//! before a write goes on there the kernel copies what it overwrites to difference storage of ours. An image is a
//! `snapshot` device. The agent takes no part in I/O: an origin and its images go on when it ends.
//!
//! ```text
//!    before              while held
//!
//!    origin              origin                        image
//!      │ T                 │ snapshot-origin             │ snapshot
//!      ▼                   ▼                             ▼
//!    disks               real ◄──────────────────────────┤
//!                          │ T                           ▼
//!                          ▼                           storage: linear
//!                        disks                           │
//!                                                        ▼
//!                                                      a loop device on a file, or ranges of a device
//! ```
//!
//! # Names
//! `M.m` is the number of the origin, `ID` the snapshot's in 32 digits. The uuids have `BLKSNAP-` where names have
//! `blksnap-`; devices are found by them, and by nothing else.
//!
//! | | name | |
//! |---|---|---|
//! | real | `blksnap-M.m-real` | one for all snapshots of the origin |
//! | storage | `blksnap-ID-M.m-cow` | |
//! | image | `blksnap-ID-M.m` | |
//!
//! # A take, in order ([`Dm::prepare`], [`Prepared::arm`])
//! 1. The journal gets an entry ([`journal`]), and files for old data are made.
//! 2. For each origin: real with T, resumed; storage, resumed; image with its table loaded and not active; `snapshot-origin`
//!    loaded into the origin and not active. Nobody notices: the two devices with T have the same bytes, and nothing is
//!    written through the real one.
//! 3. A watchdog process gets ready ([`crate::disk::watchdog`]). The memory of the agent is locked. From here on nothing
//!    is written, nor logged.
//! 4. The caller freezes file systems.
//! 5. All origins are suspended: what was under way is done, what comes waits. **This is the instant.** The caller closes
//!    the periods of the change maps.
//! 6. The images are resumed, then the origins: these have the new table now. An image is active before its origin goes on.
//! 7. The caller thaws. The entry is written again, as taken ([`Prepared::finish`]).
//!
//! # What a crash leaves
//! The kernel's devices tell how far it came, so there is one way to undo everything ([`plan::settle`]): images that are
//! not to stay give errors; an origin without a snapshot that stays gets back what is in its real device; what is of no
//! use is removed. It runs after a failure, for a release, and when an agent starts ([`Dm::recover`]). An agent that is
//! killed between 5 and 6 leaves origins that are suspended: the watchdog resumes them at once, and they go on through the
//! real device. After a reboot there are no such devices; the origin's disks have had all along what it should have.
//!
//! The old table is kept nowhere but in the real device, where the kernel has it with its keys.
//!
//! # Why an image is right
//! While the origin's table is ours, everything that is written to it passes the kernel's copying. Somebody else can put
//! another table there (LVM does, when it extends a volume). Then writes pass the image by, and it is not what it was.
//! So who reads an image looks at the table of the origin *after* the data came ([`Dm::check`]): if it is ours then, it
//! was ours all the time, since nobody but this filter makes such a table. What the kernel gave up (storage full or
//! failed) gives errors by itself.
//!
//! # Locking
//! One lock for all takes and releases. What is asked for images ([`Dm::check`], [`Dm::usage`]) waits for no take.

mod error;
mod image;
pub mod journal;
mod mapper;
#[cfg(test)]
mod model;
pub mod plan;
mod recover;
mod storage;
pub mod table;
mod take;
mod verdict;
mod watch;

pub use error::DmError;
pub use image::{MappedError, MappedImage};
pub use mapper::Mapper;
pub use recover::{ANOTHER_BOOT, Lost, Recovered};
pub use storage::Place;
pub use take::{
    Dm, DmImage, DmOptions, Instants, Observer, Origin, Prepared, Taken, availability, mapped_devices,
};
pub use watch::{Condition, Usage};

//! Watch: whether images are still right, how full their storage is, and its growth.

use nix::errno::Errno;

use super::error::DmError;
use super::plan;
use super::table::{ImageStatus, Node, Table};
use super::take::{Dm, DmImage};
use crate::disk::watchdog::Watchdog;
use crate::sys::dm::{Flags, Which};
use crate::units::{DeviceId, SECTOR_BYTES, SnapshotId};

/// Why an image is of no use any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// It is what it was at the instant.
    Whole,
    /// The storage was full.
    Full,
    /// The kernel gave it up: storage or origin failed, or nobody knows whether the storage was full.
    Failed,
    /// The table of the origin is not ours: what was written since may have passed the image by.
    Swapped,
    /// Its device is gone.
    Gone,
}

impl Condition {
    /// One line for people; empty where it is whole.
    #[must_use]
    pub const fn why(self) -> &'static str {
        match self {
            Self::Whole => "",
            Self::Full => "the difference storage is full",
            Self::Failed => {
                "the kernel gave the image up: its difference storage was full, or it or the device failed"
            }
            Self::Swapped => {
                "the table of the device was changed by somebody else while the snapshot was held"
            }
            Self::Gone => "the device of the image is gone",
        }
    }

    /// The number that says it.
    #[must_use]
    pub const fn errno(self) -> Option<Errno> {
        match self {
            Self::Whole => None,
            Self::Full => Some(Errno::ENOSPC),
            Self::Failed => Some(Errno::EIO),
            Self::Swapped => Some(Errno::ESTALE),
            Self::Gone => Some(Errno::ENODEV),
        }
    }
}

/// How full the storage of an image is, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// In use.
    pub used: u64,
    /// All that there is now.
    pub bytes: u64,
}

impl Dm {
    /// Whether `image` is right: to be asked after a part of it was read, and before that part is given to anybody. Waits
    /// for no take.
    #[must_use]
    pub fn check(&self, snapshot: SnapshotId, image: &DmImage) -> Condition {
        let control = self.asker.control();
        let lines = match control.status(Which::Device(image.device)) {
            Ok(lines) => lines,
            Err(_) => return Condition::Gone,
        };
        // The number may be somebody else's by now.
        if control
            .names(Which::Device(image.device))
            .is_ok_and(|(_, uuid)| uuid != Node::Image(snapshot, image.origin).uuid())
        {
            return Condition::Gone;
        }
        let status = lines.first().map_or(ImageStatus::Unknown, |line| {
            ImageStatus::of(&line.kind, &line.parameters)
        });
        match status {
            ImageStatus::Unknown => return Condition::Gone,
            ImageStatus::Invalid => return self.verdicts().given_up(snapshot, image.origin),
            ImageStatus::Valid { .. } => {}
        }
        let real = control.info(Which::Uuid(&Node::Real(image.origin).uuid()));
        let table = control.table(Which::Device(image.origin)).map(Table::new);
        match (real, table) {
            (Ok(real), Ok(table)) if table.is_over(real.device) => Condition::Whole,
            _ => Condition::Swapped,
        }
    }

    /// How full the storage of an image is; `None` if the image is not whole. Waits for no take.
    pub fn usage(&self, snapshot: SnapshotId, image: &DmImage) -> Option<Usage> {
        let control = self.asker.control();
        let begun = self.verdicts().begin_look();
        let lines = control.status(Which::Device(image.device)).ok()?;
        let line = lines.first()?;
        let ImageStatus::Valid { used, total } = ImageStatus::of(&line.kind, &line.parameters) else {
            return None;
        };
        self.verdicts().seen_whole(snapshot, image.origin, begun);
        Some(Usage {
            used: used * SECTOR_BYTES,
            bytes: total * SECTOR_BYTES,
        })
    }

    /// Gives the storage of an origin `bytes` bytes more.
    ///
    /// # Errors
    /// It can't grow, or the kernel refuses: it is as it was.
    pub fn grow(&self, snapshot: SnapshotId, origin: DeviceId, bytes: u64) -> Result<(), DmError> {
        let mut inner = self.lock();
        let node = Node::Storage(snapshot, origin);
        let gone = || DmError::Gone {
            action: "grow",
            device: node.to_string(),
        };
        let held = inner.held.get_mut(&snapshot).ok_or_else(gone)?;
        let storage = held.storage.get_mut(&origin).ok_or_else(gone)?;
        storage.grow(bytes)?;
        let ranges = storage.extents();
        let number = inner.mapper.number(node).ok_or_else(gone)?;
        // Writes to the origin that need a copy wait while it is suspended.
        let mut watchdog = Watchdog::start_with(&self.options.watchdog, &[], &[number])?;
        watchdog.go(self.options.limit)?;
        let grown = self.run(&mut inner.mapper, &plan::grow(snapshot, origin, ranges));
        if grown.is_err()
            && inner
                .mapper
                .control()
                .info(Which::Device(number))
                .is_ok_and(|info| info.flags.contains(Flags::SUSPEND))
        {
            // The first error counts; the watchdog goes on trying.
            let _ = inner.mapper.control().resume(Which::Device(number), 0);
        }
        watchdog.disarm()?;
        grown
    }
}

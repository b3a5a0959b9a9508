//! Fence: difference storage that is on the origin itself, and who else writes there.
//!
//! Its sectors belong to a file of the file system on the origin. The file system may take them away from the file: the
//! file is cut by somebody who can, or moved. The first that is seen of it is a write to them through the origin. From
//! then on they are somebody else's, so before that write goes on the fence is *down*: no write of old data is under
//! way any more, and none comes after it; nothing is read, either. What was stored there is lost, and whoever
//! needs it is told.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use nix::errno::Errno;

use super::origin::Origin;
use crate::cow::SnapshotKey;
use crate::disk::{Allocation, Disk, Zero};
use crate::units::Extent;

/// Why a snapshot is broken whose storage on a device somebody else has written to.
pub(super) const WRITTEN_TO: &str = "its difference storage, which is on the device, was written to";

/// Called before something is written to the origin beside its own writes.
pub type BeforeWrite = Arc<dyn Fn() + Send + Sync>;

/// The origin as difference storage, as long as nobody else writes there.
pub struct Fence {
    name: String,
    disk: Arc<dyn Disk>,
    before_write: BeforeWrite,
    down: RwLock<bool>,
    /// Snapshots that need what is stored.
    users: Mutex<Vec<(Weak<Origin>, SnapshotKey)>>,
}

impl fmt::Debug for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fence")
            .field("name", &self.name)
            .field("disk", &self.disk)
            .field("down", &self.down)
            .finish_non_exhaustive()
    }
}

impl Fence {
    /// Storage on `disk`, the origin's, by a name for messages.
    pub fn new(name: String, disk: Arc<dyn Disk>, before_write: BeforeWrite) -> Arc<Self> {
        Arc::new(Self {
            name,
            disk,
            before_write,
            down: RwLock::new(false),
            users: Mutex::default(),
        })
    }

    /// A snapshot of this origin, or of another one, stores here. False if the fence is down.
    #[must_use]
    pub fn used_by(&self, origin: &Arc<Origin>, snapshot: SnapshotKey) -> bool {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        users.push((Arc::downgrade(origin), snapshot));
        drop(users);
        !self.is_down()
    }

    /// Whether what was stored is lost.
    #[must_use]
    pub fn is_down(&self) -> bool {
        *self.down.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets nothing more through, and waits for what is under way.
    pub fn take_down(&self) {
        *self.down.write().unwrap_or_else(PoisonError::into_inner) = true;
    }

    /// As [`Fence::take_down`], because somebody else writes there: breaks the snapshots that store here.
    pub(super) fn lose(&self) {
        self.take_down();
        let users = std::mem::take(&mut *self.users.lock().unwrap_or_else(PoisonError::into_inner));
        for (origin, snapshot) in users {
            if let Some(origin) = origin.upgrade() {
                self.break_off(&origin, snapshot);
            }
        }
    }

    /// Breaks a snapshot that stores here, or wanted to.
    pub fn break_off(&self, origin: &Origin, snapshot: SnapshotKey) {
        origin.break_off(snapshot, Errno::EIO as i32, WRITTEN_TO);
    }

    fn through<T>(&self, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let down = self.down.read().unwrap_or_else(PoisonError::into_inner);
        if *down {
            return Err(Errno::EIO.into());
        }
        call()
    }

    fn written<T>(&self, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        self.through(|| {
            (self.before_write)();
            call()
        })
    }
}

impl Disk for Fence {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn logical_block(&self) -> u32 {
        self.disk.logical_block()
    }

    fn minimum_io(&self) -> u32 {
        self.disk.minimum_io()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.through(|| self.disk.read_at(buffer, offset))
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.written(|| self.disk.write_at(data, offset))
    }

    fn zero_at(&self, offset: u64, length: u64, zero: Zero, fast: bool) -> io::Result<()> {
        self.written(|| self.disk.zero_at(offset, length, zero, fast))
    }

    fn discard_at(&self, offset: u64, length: u64) -> io::Result<()> {
        self.written(|| self.disk.discard_at(offset, length))
    }

    fn flush(&self) -> io::Result<()> {
        self.through(|| self.disk.flush())
    }

    fn allocation(&self, offset: u64, length: u64, most: usize) -> io::Result<Vec<Allocation>> {
        self.through(|| self.disk.allocation(offset, length, most))
    }

    // No file: what goes around this can't be held back.
}

/// What is free on an origin, until somebody writes there. Ascending and apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Untouched(Vec<Extent>);

impl Untouched {
    pub(super) fn new(ranges: Vec<Extent>) -> Self {
        Self(ranges)
    }

    pub(super) fn ranges(self) -> Vec<Extent> {
        self.0
    }

    /// Keeps what is in one of these ranges, too, which are ascending and apart.
    pub(super) fn within(&mut self, ranges: &[Extent]) {
        let mut both = Vec::new();
        for mine in &self.0 {
            let from = ranges.partition_point(|other| other.end() <= mine.offset);
            for other in ranges[from..]
                .iter()
                .take_while(|other| other.offset < mine.end())
            {
                let (offset, end) = (mine.offset.max(other.offset), mine.end().min(other.end()));
                both.push(Extent {
                    offset,
                    length: end - offset,
                });
            }
        }
        self.0 = both;
    }

    /// Somebody writes to a range.
    pub(super) fn touch(&mut self, range: Extent) {
        let from = self.0.partition_point(|mine| mine.end() <= range.offset);
        let to = self.0.partition_point(|mine| mine.offset < range.end());
        if from >= to {
            return;
        }
        let (first, last) = (self.0[from], self.0[to - 1]);
        let pieces = [
            (first.offset, range.offset.max(first.offset)),
            (range.end().min(last.end()), last.end()),
        ];
        let rest = pieces.into_iter().filter(|(start, end)| start < end);
        self.0.splice(
            from..to,
            rest.map(|(start, end)| Extent {
                offset: start,
                length: end - start,
            }),
        );
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ranges() -> impl Strategy<Value = Vec<(u64, u64)>> {
        proptest::collection::vec((0_u64..60, 1_u64..9), 0..12)
    }

    fn of(set: &[bool]) -> Vec<Extent> {
        let mut found: Vec<Extent> = Vec::new();
        for at in (0..set.len()).filter(|at| set[*at]) {
            match found.last_mut() {
                Some(last) if last.end() == at as u64 => last.length += 1,
                _ => found.push(Extent {
                    offset: at as u64,
                    length: 1,
                }),
            }
        }
        found
    }

    proptest! {
        #[test]
        fn untouched_is_what_was_free_and_not_written(written in ranges(), free in ranges(), later in ranges()) {
            let mut model = [true; 80];
            let mut untouched = Untouched::new(of(&model));
            let touch = |untouched: &mut Untouched, model: &mut [bool; 80], offset: u64, length: u64| {
                untouched.touch(Extent { offset, length });
                (offset..offset + length).for_each(|at| model[usize::try_from(at).unwrap()] = false);
            };
            for (offset, length) in written {
                touch(&mut untouched, &mut model, offset, length);
            }
            let mut allowed = [false; 80];
            for (offset, length) in free {
                (offset..offset + length).for_each(|at| allowed[usize::try_from(at).unwrap()] = true);
            }
            untouched.within(&of(&allowed));
            model.iter_mut().zip(allowed).for_each(|(mine, allowed)| *mine &= allowed);
            for (offset, length) in later {
                touch(&mut untouched, &mut model, offset, length);
            }
            prop_assert_eq!(untouched.ranges(), of(&model));
        }
    }
}

//! Party: one device of a run, and what of it is still to be copied.

use std::sync::Arc;

use super::tracked::{Tracked, Watch};
use super::{ConvergeError, Initial, Target};
use crate::cbt::ResetReason;
use crate::engine::{Job, Sink, Source};
use crate::tracker::{DirtyBlocks, LedgerStatus};
use crate::units::Extent;

/// One device of a run.
#[derive(Debug)]
pub(super) struct Party {
    pub(super) device: Arc<dyn Tracked>,
    pub(super) source: Box<dyn Source>,
    pub(super) sink: Box<dyn Sink>,
    watch: Box<dyn Watch>,
    initial: Initial,
    /// What is to be copied. It loses blocks only when a copy has succeeded that began after they were put in.
    todo: Vec<Extent>,
    /// The ledger before the pass began.
    before: LedgerStatus,
    /// A generation that ended in doubt before the first pass.
    pub(super) reset: Option<ResetReason>,
    /// Bytes read.
    pub(super) copied: u64,
}

impl Party {
    /// Opens and watches the device of `target`.
    pub(super) fn new(target: Target) -> Result<Self, ConvergeError> {
        let Target {
            device,
            initial,
            sink,
        } = target;
        Ok(Self {
            source: device.source()?,
            watch: Arc::clone(&device).watch()?,
            device,
            sink,
            initial,
            todo: Vec::new(),
            before: LedgerStatus::default(),
            reset: None,
            copied: 0,
        })
    }

    /// Begins a pass: from here on, what is read is followed, or [`Party::is_followed`] says that it was not.
    pub(super) fn begin(&mut self) -> Result<(), ConvergeError> {
        // Before the first read, so that no completion between the two is missed.
        self.before = self.watch.status()?;
        self.end_doubt()?;
        let first = self.close()?;
        self.todo = match &self.initial {
            Initial::All => vec![Extent {
                offset: 0,
                length: self.device.device().capacity.bytes(),
            }],
            // After the close: what was marked before is in the map, what is marked later will be collected.
            Initial::Since(base) => self.device.changed_since(base)?,
        };
        // The map has it, too, and the union costs nothing.
        self.add(&first);
        Ok(())
    }

    /// Ends a generation that is in doubt, so that a new reason to doubt can be told from the old one.
    fn end_doubt(&mut self) -> Result<(), ConvergeError> {
        if self.initial == Initial::All && self.device.doubt().is_some() {
            // What is in the open period is of that generation, and may be what the doubt is about.
            self.close()?;
            let (taken, _) = self.device.take()?;
            self.reset = self.reset.or(taken.reset);
        }
        Ok(())
    }

    /// Closes the period; what it held is to be copied. True if that was nothing.
    pub(super) fn collect(&mut self) -> Result<bool, ConvergeError> {
        let dirty = self.close()?;
        self.add(&dirty);
        Ok(dirty.is_empty())
    }

    fn close(&self) -> Result<DirtyBlocks, ConvergeError> {
        Ok(self.watch.close_period()?)
    }

    fn add(&mut self, dirty: &DirtyBlocks) {
        let capacity = self.device.device().capacity;
        let extents = dirty.extents(self.device.block_size(), capacity);
        if self.todo.is_empty() {
            self.todo = extents.collect();
        } else {
            self.todo.extend(extents);
            merge(&mut self.todo);
        }
    }

    /// Bytes to be copied.
    pub(super) fn rest(&self) -> u64 {
        self.todo.iter().map(|extent| extent.length).sum()
    }

    /// The copy of what is to be done.
    pub(super) fn job(&self) -> Job<'_> {
        Job {
            source: &*self.source,
            sink: &*self.sink,
            extents: &self.todo,
        }
    }

    /// The copy of [`Party::job`] succeeded.
    pub(super) fn done(&mut self) {
        self.copied += self.rest();
        self.todo.clear();
    }

    /// False if there were writes since the beginning of the pass that could not be followed.
    pub(super) fn is_followed(&self) -> Result<bool, ConvergeError> {
        let now = self.watch.status()?;
        Ok(now.unknown == self.before.unknown && now.lost == self.before.lost)
    }

    /// Completions of writes from before the ledger.
    pub(super) fn unknown(&self) -> Result<u64, ConvergeError> {
        Ok(self.watch.status()?.unknown)
    }

    /// True if nothing was written since the last [`Party::collect`].
    pub(super) fn is_clean(&self) -> bool {
        self.watch.is_clean()
    }

    /// True if neither the ledger nor the driver has a write.
    pub(super) fn is_idle(&self) -> Result<bool, ConvergeError> {
        Ok(self.watch.status()?.pending == 0 && self.device.driver_writes()? == 0)
    }

    /// Fails if there is a reason to doubt that all writes were seen.
    pub(super) fn check_doubt(&self) -> Result<(), ConvergeError> {
        match self.device.doubt() {
            None => Ok(()),
            Some(reason) => Err(ConvergeError::Doubt {
                device: self.device.device().path.clone(),
                reason,
            }),
        }
    }

    /// Marks again, in the period after the take, what somebody else closed between the instant and the take.
    pub(super) fn settle(&self) {
        let between = self.watch.drain();
        if !between.is_empty() {
            self.device.mark(&between);
        }
    }
}

/// Sorts extents, and joins those that touch or overlap.
fn merge(extents: &mut Vec<Extent>) {
    extents.sort_unstable();
    extents.dedup_by(|next, previous| {
        let join = next.offset <= previous.end();
        if join {
            let end = previous.end().max(next.end());
            previous.length = end - previous.offset;
        }
        join
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merged_extents_are_ascending_and_apart() {
        let extent = |offset, length| Extent { offset, length };
        let mut list = vec![
            extent(30, 5),
            extent(0, 10),
            extent(10, 5),
            extent(2, 3),
            extent(34, 10),
        ];
        merge(&mut list);
        assert_eq!(list, [extent(0, 15), extent(30, 14)]);
    }
}

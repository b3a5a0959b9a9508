//! Periods: the bitmap that the programs mark, the change map, and how what is in the one comes into the other.
//!
//! A device keeps this behind its lock. Programs mark the open bitmap at any time and take no lock; a thread drains
//! the ring; others close periods, take, and ask. What must hold in any order of their steps: a block whose write
//! has been sent on to the driver is in the open bitmap, or was handed on by the close that ended its period, to the
//! map and to every watch there was. The tests in `orders` draw such orders.

use std::sync::Weak;

use blksnap_common::track::Record;

use super::bitmap::DirtyBlocks;
use super::record;
use super::watch::{Collected, Watchers};
use crate::cbt::CbtMap;
use crate::sync::atomic::{AtomicU64, Ordering};

/// A bitmap of a period.
pub(super) trait Marked {
    /// A copy of the bits.
    fn bits(&self) -> Vec<u64>;
    /// Whether no bit is set.
    fn is_clear(&self) -> bool;
}

/// The open bitmap of a device and its change map.
#[derive(Debug)]
pub(super) struct Periods<B> {
    pub(super) map: CbtMap,
    bitmap: B,
    number: u64,
    watchers: Watchers,
}

impl<B: Marked> Periods<B> {
    /// Of a map, and the bitmap of period `number` that the programs mark.
    pub(super) fn new(map: CbtMap, bitmap: B, number: u64) -> Self {
        Self {
            map,
            bitmap,
            number,
            watchers: Watchers::default(),
        }
    }

    /// Number of the open period.
    pub(super) const fn number(&self) -> u64 {
        self.number
    }

    /// Opens the next period with `next`, which the programs mark already, and gives the bitmap of the one before,
    /// which no program marks any more. Its blocks have to be handed on before the lock is given up.
    pub(super) fn switched(&mut self, next: B) -> B {
        self.number += 1;
        std::mem::replace(&mut self.bitmap, next)
    }

    /// Marks the blocks of a closed period in the map, and gives them to every watch.
    pub(super) fn hand_on(&mut self, dirty: &DirtyBlocks) {
        dirty.mark(&mut self.map);
        self.watchers.tell(dirty);
    }

    /// Gives a watch the blocks of every period closed from now on.
    pub(super) fn add_watcher(&mut self, watcher: Weak<Collected>) {
        self.watchers.add(watcher);
    }

    /// Whether nothing was marked in the open period yet.
    pub(super) fn is_clean(&self) -> bool {
        self.bitmap.is_clear()
    }

    /// Brings the map up to what is marked in the open period.
    pub(super) fn refresh(&mut self) {
        let bits = self.bitmap.bits();
        self.map.mark_bits(&bits);
    }

    /// A record from the ring: of the open period, or of one whose bitmap had it.
    pub(super) fn apply(&mut self, record: &Record) {
        record::apply(record, self.number, &mut self.map);
    }
}

/// A count of records that found the ring full, and how far it was looked at.
#[derive(Debug)]
pub(super) struct RingFull {
    seen: AtomicU64,
}

impl RingFull {
    /// `seen` of them need no more looking at.
    pub(super) const fn new(seen: u64) -> Self {
        Self {
            seen: AtomicU64::new(seen),
        }
    }

    /// Whether `count` is not what was seen last: the open bitmap has to be read.
    pub(super) fn is_news(&self, count: u64) -> bool {
        self.seen.swap(count, Ordering::AcqRel) != count
    }
}

#[cfg(all(test, feature = "shuttle"))]
mod orders;

//! Periods: the bitmap that the programs mark, the change map, and how what is in the one comes into the other.
//!
//! A device keeps this behind its lock. Programs mark the open bitmap at any time and take no lock; a thread drains
//! the ring; others close periods, take, and ask. What must hold in any order of their steps: a block whose write
//! has been sent on to the driver is in the open bitmap, or was handed on by the close that ended its period, to the
//! map and to every watch there was. The tests in `orders` draw such orders.
//!
//! # Locking
//! Nothing is copied whole while the lock is held. A bitmap is read through a window of 8 KiB; a closed one is final,
//! so who wants its blocks gets the bitmap itself, as a [`Closed`], and copies them without the lock. What is read of
//! the open one ([`Periods::refresh_window`]) needs the lock for one window at a time.

use std::fmt::Debug;
use std::sync::{Arc, Weak};

use blksnap_common::track::Record;

use super::bitmap::DirtyBlocks;
use super::record;
use super::watch::{Collected, Watchers};
use crate::cbt::{CbtMap, MARK_WORDS};
use crate::sync::atomic::{AtomicU64, Ordering};

/// Words of a bitmap, read at once.
pub(super) type Window = [u64; MARK_WORDS];

/// A bitmap of a period.
pub(super) trait Marked: Debug + Send + Sync {
    /// Number of words.
    fn words(&self) -> usize;
    /// Puts the words from `first` on into `window`, as many as there are and as fit. Gives their number.
    fn read(&self, first: usize, window: &mut [u64]) -> usize;
    /// Whether no bit is set.
    fn is_clear(&self) -> bool;
}

/// Number of windows of a bitmap.
fn windows(bitmap: &(impl Marked + ?Sized)) -> usize {
    bitmap.words().div_ceil(MARK_WORDS)
}

/// A bitmap that no program writes to any more, as shared by who has use for its blocks.
#[derive(Debug)]
pub(super) struct Closed {
    bitmap: Arc<dyn Marked>,
    /// The number of blocks, if all of them changed.
    all: Option<u64>,
}

impl Closed {
    /// Whether no block changed.
    pub(super) fn is_clear(&self) -> bool {
        self.all.is_none() && self.bitmap.is_clear()
    }

    /// A copy of the blocks.
    pub(super) fn blocks(&self) -> DirtyBlocks {
        match self.all {
            Some(blocks) => DirtyBlocks::all(blocks),
            None => {
                let mut words = vec![0; self.bitmap.words()];
                self.bitmap.read(0, &mut words);
                DirtyBlocks::new(words)
            }
        }
    }
}

/// A closed period that was handed on. The device's lock is to be given up first, and then it is to be settled.
#[derive(Debug)]
#[must_use]
pub(super) struct Handed {
    closed: Arc<Closed>,
    watches: Vec<Arc<Collected>>,
}

impl Handed {
    /// Lets the watches copy the blocks: they keep no bitmaps of the kernel.
    pub(super) fn settle(self) -> Arc<Closed> {
        for watch in &self.watches {
            drop(watch.settle());
        }
        self.closed
    }
}

/// The open bitmap of a device and its change map.
#[derive(Debug)]
pub(super) struct Periods<B> {
    pub(super) map: CbtMap,
    bitmap: Arc<B>,
    number: u64,
    watchers: Watchers,
}

impl<B: Marked + 'static> Periods<B> {
    /// Of a map, and the bitmap of period `number` that the programs mark.
    pub(super) fn new(map: CbtMap, bitmap: B, number: u64) -> Self {
        Self {
            map,
            bitmap: Arc::new(bitmap),
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
    pub(super) fn switched(&mut self, next: B) -> Arc<B> {
        self.number += 1;
        std::mem::replace(&mut self.bitmap, Arc::new(next))
    }

    /// Marks the blocks of a closed period in the map, all blocks of the map if it says `all`, and gives them to
    /// every watch. `also` gets the words as well, with the number of the first.
    pub(super) fn hand_on(
        &mut self,
        bitmap: Arc<B>,
        all: bool,
        mut also: impl FnMut(usize, &[u64]),
    ) -> Handed {
        let blocks = self.map.block_count();
        if let (true, Some(last)) = (all, blocks.checked_sub(1)) {
            self.map.mark_blocks(0, last);
        }
        let mut window: Window = [0; MARK_WORDS];
        for number in 0..windows(&*bitmap) {
            let first = number * MARK_WORDS;
            let count = bitmap.read(first, &mut window);
            let words = &window[..count];
            also(first, words);
            self.map.mark_bits_at(number, words);
        }
        let closed = Arc::new(Closed {
            bitmap,
            all: all.then_some(blocks),
        });
        let watches = self.watchers.tell(&closed);
        Handed { closed, watches }
    }

    /// Gives a watch the blocks of every period closed from now on.
    pub(super) fn add_watcher(&mut self, watcher: Weak<Collected>) {
        self.watchers.add(watcher);
    }

    /// Whether nothing was marked in the open period yet.
    pub(super) fn is_clean(&self) -> bool {
        self.bitmap.is_clear()
    }

    /// Brings the map up to what is marked in window `number` of the open period. `false` if there is none, or if
    /// another period is open than `period`: then all of that one is in the map.
    pub(super) fn refresh_window(&mut self, period: u64, number: usize) -> bool {
        if period != self.number || number >= windows(&*self.bitmap) {
            return false;
        }
        let mut window: Window = [0; MARK_WORDS];
        let count = self.bitmap.read(number * MARK_WORDS, &mut window);
        self.map.mark_bits_at(number, &window[..count]);
        true
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

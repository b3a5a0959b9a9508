//! Orders of steps: programs that mark, a thread that drains the ring, others that close periods, take and watch, in
//! orders that shuttle draws. What the kernel does is played: switching bitmaps waits for programs that run.

#![expect(
    clippy::unwrap_used,
    reason = "what a test shares fails as tests do, by a panic"
)]

use std::sync::Arc;

use blksnap_common::track::Record;
use shuttle::rand::Rng as _;
use shuttle::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use shuttle::sync::{Mutex, RwLock};
use shuttle::thread;
use uuid::Uuid;

use super::super::TrackerError;
use super::super::watch::{Watch, Watched};
use super::*;
use crate::cbt::Base;
use crate::units::{BlockSize, Generation, Sectors};

/// How many orders are drawn.
const ORDERS: usize = 3000;
const BLOCKS: u64 = 8;

/// A bitmap in memory.
#[derive(Clone, Debug, Default)]
struct Memory(Arc<AtomicU64>);

impl Marked for Memory {
    fn words(&self) -> usize {
        1
    }

    fn read(&self, _first: usize, window: &mut [u64]) -> usize {
        window[0] = self.0.load(Ordering::SeqCst);
        1
    }

    fn is_clear(&self) -> bool {
        self.0.load(Ordering::SeqCst) == 0
    }
}

/// The kernel: the bitmap that programs mark, with its period, and a ring of two records.
struct Kernel {
    /// Read by a program while it runs; writing waits for those.
    open: RwLock<(u64, Memory)>,
    ring: Mutex<Vec<Record>>,
    ring_full: AtomicU64,
}

struct Device {
    kernel: Kernel,
    state: Mutex<Periods<Memory>>,
    ring_full: RingFull,
    ledger: AtomicUsize,
}

impl Device {
    fn new() -> Arc<Self> {
        let size = BlockSize::from_shift(12).unwrap();
        let map = CbtMap::new(generation(), size, Sectors::new(BLOCKS * 8)).unwrap();
        let open = Memory::default();
        Arc::new(Self {
            kernel: Kernel {
                open: RwLock::new((1, open.clone())),
                ring: Mutex::new(Vec::new()),
                ring_full: AtomicU64::new(0),
            },
            state: Mutex::new(Periods::new(map, open, 1)),
            ring_full: RingFull::new(0),
            ledger: AtomicUsize::new(0),
        })
    }

    /// What a program does for a write.
    fn write(&self, block: u64) {
        let open = self.kernel.open.read().unwrap();
        let before = open.1.0.fetch_or(1 << block, Ordering::SeqCst);
        if before >> block & 1 == 1 {
            return;
        }
        let mut ring = self.kernel.ring.lock().unwrap();
        if ring.len() == 2 {
            self.kernel.ring_full.fetch_add(1, Ordering::SeqCst);
        } else {
            ring.push(Record {
                period: open.0,
                first_block: block,
                last_block: block,
                ..Record::default()
            });
        }
    }

    /// A round of the thread that drains the ring.
    fn drain(&self) {
        let records = std::mem::take(&mut *self.kernel.ring.lock().unwrap());
        for record in records {
            self.state.lock().unwrap().apply(&record);
        }
        if self
            .ring_full
            .is_news(self.kernel.ring_full.load(Ordering::SeqCst))
        {
            let period = self.state.lock().unwrap().number();
            assert!(!self.state.lock().unwrap().refresh_window(period, 1));
            self.state.lock().unwrap().refresh_window(period, 0);
        }
    }

    fn close(&self) -> DirtyBlocks {
        let mut state = self.state.lock().unwrap();
        let next = Memory::default();
        *self.kernel.open.write().unwrap() = (state.number() + 1, next.clone());
        let closed = state.switched(next);
        let handed = state.hand_on(closed, false, |_, _| {});
        drop(state);
        handed.settle().blocks()
    }

    /// Closes the period and takes the map: its number.
    fn take(&self) -> u8 {
        self.close();
        let mut state = self.state.lock().unwrap();
        let capacity = state.map.capacity();
        state.map.take(generation(), capacity).unwrap().number
    }

    /// The blocks changed after take `number`, as of now.
    fn changed_since(&self, number: u8) -> Vec<u64> {
        self.close();
        let live = self.state.lock().unwrap().map.live_map().unwrap();
        let base = Base {
            generation: generation(),
            number,
        };
        live.changed_since(&base)
            .unwrap()
            .flat_map(|extent| extent.offset / 4096..extent.end() / 4096)
            .collect()
    }
}

impl Watched for Device {
    fn start_ledger(&self) -> Result<(), TrackerError> {
        self.ledger.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn stop_ledger(&self) -> Result<(), TrackerError> {
        self.ledger.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }

    fn add_watcher(&self, watcher: Weak<Collected>) {
        self.state.lock().unwrap().add_watcher(watcher);
    }

    fn close(&self) -> Result<(), TrackerError> {
        drop(Self::close(self));
        Ok(())
    }

    fn is_clean(&self) -> bool {
        self.state.lock().unwrap().is_clean()
    }

    fn name(&self) -> String {
        "a device of a test".to_owned()
    }
}

fn generation() -> Generation {
    Generation::new(Uuid::nil())
}

fn any_block() -> u64 {
    shuttle::rand::thread_rng().gen_range(0..BLOCKS)
}

fn contains(dirty: &DirtyBlocks, block: u64) -> bool {
    dirty.words().first().is_some_and(|word| word >> block & 1 == 1)
}

#[test]
fn a_write_after_a_take_is_changed_since_it() {
    shuttle::check_random(
        || {
            let device = Device::new();
            let drainer = thread::spawn({
                let device = Arc::clone(&device);
                move || (0..3).for_each(|_| device.drain())
            });
            let closer = thread::spawn({
                let device = Arc::clone(&device);
                move || (0..2).for_each(|_| drop(device.close()))
            });
            let before = any_block();
            let writer = thread::spawn({
                let device = Arc::clone(&device);
                move || device.write(before)
            });
            let number = device.take();
            let after = any_block();
            device.write(after);
            for thread in [drainer, closer, writer] {
                thread.join().unwrap();
            }
            device.drain();
            let changed = device.changed_since(number);
            assert!(changed.contains(&after), "{changed:?} lacks {after}");
            assert!(device.changed_since(0).contains(&before));
            assert!(
                changed.iter().all(|block| [before, after].contains(block)),
                "{changed:?}"
            );
        },
        ORDERS,
    );
}

#[test]
fn a_watch_gets_every_write_whoever_closes_periods() {
    shuttle::check_random(
        || {
            let device = Device::new();
            let copies: Vec<_> = (0..2)
                .map(|_| {
                    let device = Arc::clone(&device);
                    thread::spawn(move || {
                        let watch = Watch::start(Arc::clone(&device)).unwrap();
                        let block = any_block();
                        device.write(block);
                        let mut got = watch.close_period().unwrap();
                        let late = any_block();
                        device.write(late);
                        got.union(&watch.close_period().unwrap());
                        assert!(contains(&got, block) && contains(&got, late));
                        drop(watch);
                    })
                })
                .collect();
            let other = thread::spawn({
                let device = Arc::clone(&device);
                move || drop(device.close())
            });
            for thread in copies {
                thread.join().unwrap();
            }
            other.join().unwrap();
            assert_eq!(device.ledger.load(Ordering::SeqCst), 0);
        },
        ORDERS,
    );
}

#[test]
fn a_watch_is_clean_only_when_it_has_everything() {
    shuttle::check_random(
        || {
            let device = Device::new();
            let watch = Watch::start(Arc::clone(&device)).unwrap();
            let block = any_block();
            let writer = thread::spawn({
                let device = Arc::clone(&device);
                move || device.write(block)
            });
            let closer = thread::spawn({
                let device = Arc::clone(&device);
                move || drop(device.close())
            });
            writer.join().unwrap();
            // The write was made: until it is collected, the watch is not clean, whatever the other one does.
            assert!(!watch.is_clean());
            let got = watch.close_period().unwrap();
            assert!(contains(&got, block));
            assert!(watch.is_clean());
            closer.join().unwrap();
        },
        ORDERS,
    );
}

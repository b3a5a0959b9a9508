//! World: disks, writers, and the books of a tracker.

use crate::cbt::{CbtMap, Taken};
use crate::tracker::{DirtyBlocks, LedgerStatus};
use crate::units::{BlockSize, Sectors};

/// Bytes of a sector.
pub(super) const SECTOR: usize = 512;

/// Sectors of a block.
const BLOCK_SECTORS: usize = 8;

/// Tracking block size: 4 KiB.
pub(super) fn block() -> BlockSize {
    BlockSize::from_shift(12).unwrap()
}

/// Bytes of a disk.
pub(super) type Content = Vec<u8>;

/// Random numbers: xorshift, so that a seed is a whole run.
#[derive(Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `limit`.
    pub(super) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from((self.0 >> 20) % limit as u64).unwrap()
    }

    /// True once in `times`.
    pub(super) fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }
}

/// How a disk is used.
#[derive(Clone, Copy, Debug)]
pub(super) struct Habit {
    /// It has a file system, which can be frozen.
    pub(super) file_system: bool,
    /// A write is queued once in so many steps; 0 for never.
    pub(super) write_every: usize,
    /// A raw writer pauses once in so many writes; 0 for never.
    pub(super) pause_every: usize,
}

/// A write on its way.
#[derive(Debug)]
struct Flight {
    first: usize,
    /// What each sector will be, `None` once it has landed.
    data: Vec<Option<u8>>,
    in_ledger: bool,
    /// Takes its time.
    slow: bool,
    /// When the driver gets it: nothing of it lands before.
    dispatch: u64,
}

#[derive(Debug)]
struct Disk {
    habit: Habit,
    content: Content,
    flights: Vec<Flight>,
    /// Written to the file system, not to the disk.
    cache: Vec<(usize, usize, u8)>,
    period: DirtyBlocks,
    map: CbtMap,
    /// Holders of the ledger.
    ledger: u32,
    unknown: u64,
    lost: u64,
    watches: Vec<Option<DirtyBlocks>>,
    /// Steps that a raw writer still pauses.
    pause: usize,
    frozen: bool,
}

/// What goes wrong, and when.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Faults {
    /// The n-th freeze fails.
    pub(super) freeze: Option<u32>,
    /// The watchdog thaws so many steps after the freeze.
    pub(super) watchdog: Option<u64>,
    /// The ledger is full once in so many writes.
    pub(super) ledger_full: Option<usize>,
    /// Nobody else closes periods or takes snapshots.
    pub(super) alone: bool,
}

/// All disks.
#[derive(Debug)]
pub(super) struct World {
    disks: Vec<Disk>,
    random: Random,
    faults: Faults,
    version: u8,
    now: u64,
    freezes: u32,
    frozen_at: Option<u64>,
}

impl World {
    pub(super) fn new(seed: u64, blocks: usize, habits: &[Habit], faults: Faults) -> Self {
        let disk = |habit: &Habit| Disk {
            habit: *habit,
            content: vec![0; blocks * BLOCK_SECTORS * SECTOR],
            flights: Vec::new(),
            cache: Vec::new(),
            period: DirtyBlocks::default(),
            map: CbtMap::new(
                super::generation(),
                block(),
                Sectors::new((blocks * BLOCK_SECTORS) as u64),
            )
            .unwrap(),
            ledger: 0,
            unknown: 0,
            lost: 0,
            watches: Vec::new(),
            pause: 0,
            frozen: false,
        };
        Self {
            disks: habits.iter().map(disk).collect(),
            random: Random::new(seed),
            faults,
            version: 0,
            now: 0,
            freezes: 0,
            frozen_at: None,
        }
    }

    pub(super) fn capacity(&self, disk: usize) -> Sectors {
        Sectors::new((self.disks[disk].content.len() / SECTOR) as u64)
    }

    pub(super) fn map(&mut self, disk: usize) -> &mut CbtMap {
        &mut self.disks[disk].map
    }

    /// Writes that the driver holds.
    pub(super) fn in_driver(&self, disk: usize) -> u64 {
        let flights = self.disks[disk].flights.iter();
        flights.filter(|flight| flight.dispatch <= self.now).count() as u64
    }

    /// Whether a write from before the ledger waits for its driver: when that lands, nobody hears of it.
    pub(super) fn has_hidden(&self, disk: usize) -> bool {
        self.disks[disk].flights.iter().any(|flight| !flight.in_ledger)
    }

    /// Before the map is taken somebody writes, and somebody else closes the period.
    pub(super) fn interfere(&mut self, disk: usize) {
        if !self.faults.alone && self.random.once_in(2) {
            self.write(disk);
            self.close(disk);
        }
    }

    pub(super) fn has_file_system(&self, disk: usize) -> bool {
        self.disks[disk].habit.file_system
    }

    pub(super) fn is_frozen(&self) -> bool {
        self.disks.iter().any(|disk| disk.frozen)
    }

    pub(super) fn contents(&self) -> Vec<Content> {
        self.disks.iter().map(|disk| disk.content.clone()).collect()
    }

    pub(super) fn sector(&self, disk: usize, sector: usize) -> [u8; SECTOR] {
        self.disks[disk].content[sector * SECTOR..][..SECTOR]
            .try_into()
            .unwrap()
    }

    /// Time passes: up to `2 * count` random events.
    pub(super) fn steps(&mut self, count: usize) {
        for _ in 0..self.random.below(2 * count + 1) {
            let disk = self.random.below(self.disks.len());
            self.step(disk);
        }
    }

    fn step(&mut self, disk: usize) {
        self.now += 1;
        if let (Some(limit), Some(at)) = (self.faults.watchdog, self.frozen_at)
            && self.now > at + limit
        {
            self.disks.iter_mut().for_each(|disk| disk.frozen = false);
        }
        let every = self.disks[disk].habit.write_every;
        if every > 0 && self.random.once_in(every) {
            self.write(disk);
        }
        self.disks[disk].pause = self.disks[disk].pause.saturating_sub(1);
        // Landing is more frequent than writing, so that flights come to an end.
        for _ in 0..3 {
            self.land(disk);
        }
        match self.random.below(400) {
            0 if !self.faults.alone => self.close(disk),
            1 if !self.faults.alone => drop(self.take(disk)),
            2..20 => self.write_back(disk),
            _ => {}
        }
    }

    /// A writer writes, if it may.
    fn write(&mut self, disk: usize) {
        let sectors = self.disks[disk].content.len() / SECTOR;
        let count = 1 + self.random.below(20);
        let first = self.random.below(sectors - count);
        self.version = self.version.wrapping_add(1);
        let state = &mut self.disks[disk];
        if state.habit.file_system {
            if state.frozen {
                return;
            }
            if self.random.once_in(2) {
                state.cache.push((first, count, self.version));
                return;
            }
        } else if state.pause > 0 {
            return;
        } else if state.habit.pause_every > 0 && self.random.once_in(state.habit.pause_every) {
            state.pause = 400 + self.random.below(2000);
        }
        self.queue(disk, first, count, self.version);
    }

    /// The event of a write: its bio is queued.
    fn queue(&mut self, disk: usize, first: usize, count: usize, value: u8) {
        let full = self
            .faults
            .ledger_full
            .is_some_and(|times| self.random.once_in(times));
        let slow = self.random.once_in(8);
        let delay = match self.random.below(40) {
            // Throttled, or out of tags.
            0 => self.random.below(6000),
            1..10 => self.random.below(20),
            _ => 0,
        };
        let dispatch = self.now + delay as u64;
        let state = &mut self.disks[disk];
        state.mark(first, count);
        let in_ledger = state.ledger > 0 && !full;
        if state.ledger > 0 && full {
            state.lost += 1;
        }
        state.flights.push(Flight {
            first,
            data: vec![Some(value); count],
            in_ledger,
            slow,
            dispatch,
        });
    }

    /// Some sectors of a random flight reach the disk; when all have, it completes, sooner or later.
    fn land(&mut self, disk: usize) {
        let state = &mut self.disks[disk];
        if state.flights.is_empty() {
            return;
        }
        let index = self.random.below(state.flights.len());
        let flight = &mut state.flights[index];
        if flight.dispatch > self.now || (flight.slow && !self.random.once_in(30)) {
            return;
        }
        if flight.data.iter().any(Option::is_some) {
            for (sector, data) in flight.data.iter_mut().enumerate() {
                if self.random.once_in(3)
                    && let Some(value) = data.take()
                {
                    let at = (flight.first + sector) * SECTOR;
                    state.content[at..at + SECTOR].fill(value);
                }
            }
        } else if self.random.once_in(2) {
            self.complete(disk, index);
        }
    }

    /// The event of a completion.
    fn complete(&mut self, disk: usize, index: usize) {
        let state = &mut self.disks[disk];
        let flight = state.flights.swap_remove(index);
        if flight.in_ledger {
            state.mark(flight.first, flight.data.len());
        } else if state.ledger > 0 {
            state.unknown += 1;
        }
    }

    /// The file system writes some of its cache.
    fn write_back(&mut self, disk: usize) {
        if let Some((first, count, value)) = self.disks[disk].cache.pop() {
            self.queue(disk, first, count, value);
        }
    }

    /// All caches are written, and all writes of file systems are complete.
    pub(super) fn sync(&mut self) {
        for disk in 0..self.disks.len() {
            while self.disks[disk].habit.file_system && !self.disks[disk].cache.is_empty() {
                self.write_back(disk);
                self.steps(1);
            }
        }
    }

    /// False if it fails.
    pub(super) fn freeze(&mut self) -> bool {
        self.freezes += 1;
        if self.faults.freeze == Some(self.freezes) {
            return false;
        }
        for disk in 0..self.disks.len() {
            if !self.disks[disk].habit.file_system {
                continue;
            }
            self.steps(5);
            self.disks[disk].frozen = true;
            while !self.disks[disk].cache.is_empty() || !self.disks[disk].flights.is_empty() {
                self.write_back(disk);
                self.land(disk);
                self.now += 1;
                self.steps(1);
            }
        }
        self.frozen_at = Some(self.now);
        true
    }

    /// False if a file system was thawed before.
    pub(super) fn thaw(&mut self) -> bool {
        self.frozen_at = None;
        let mut all = true;
        for disk in self.disks.iter_mut().filter(|disk| disk.habit.file_system) {
            all &= std::mem::take(&mut disk.frozen);
        }
        all
    }

    pub(super) fn start_watch(&mut self, disk: usize) -> usize {
        let state = &mut self.disks[disk];
        state.ledger += 1;
        state.watches.push(Some(DirtyBlocks::default()));
        state.watches.len() - 1
    }

    pub(super) fn stop_watch(&mut self, disk: usize, number: usize) {
        let state = &mut self.disks[disk];
        state.watches[number] = None;
        state.ledger -= 1;
        if state.ledger == 0 {
            // As the tracker does: what is in the ledger may land after an instant that was taken.
            let flights = std::mem::take(&mut state.flights);
            for flight in flights.iter().filter(|flight| flight.in_ledger) {
                state.mark_map(flight.first, flight.data.len());
            }
            state.flights = flights;
        }
    }

    pub(super) fn is_clean(&self, disk: usize, number: usize) -> bool {
        let state = &self.disks[disk];
        state.period.is_empty() && state.watches[number].as_ref().is_some_and(DirtyBlocks::is_empty)
    }

    pub(super) fn drain(&mut self, disk: usize, number: usize) -> DirtyBlocks {
        let watch = self.disks[disk].watches[number].as_mut();
        std::mem::take(watch.expect("a watch is drained while it is there"))
    }

    pub(super) fn status(&self, disk: usize) -> LedgerStatus {
        let state = &self.disks[disk];
        let pending = state.flights.iter().filter(|flight| flight.in_ledger).count();
        LedgerStatus {
            pending: pending as u64,
            lost: state.lost,
            unknown: state.unknown,
        }
    }

    /// Closes the period of the bitmap.
    pub(super) fn close(&mut self, disk: usize) {
        let state = &mut self.disks[disk];
        let closed = std::mem::take(&mut state.period);
        state.map.mark_bits(closed.words());
        state
            .watches
            .iter_mut()
            .flatten()
            .for_each(|watch| watch.union(&closed));
    }

    /// Ends the period of the change map.
    pub(super) fn take(&mut self, disk: usize) -> Taken {
        let capacity = self.capacity(disk);
        self.disks[disk].map.take(super::generation(), capacity).unwrap()
    }

    /// Nobody writes any more, and everything has landed.
    pub(super) fn come_to_rest(&mut self) {
        for disk in 0..self.disks.len() {
            self.disks[disk].habit.write_every = 0;
            while !self.disks[disk].cache.is_empty() || !self.disks[disk].flights.is_empty() {
                self.write_back(disk);
                self.land(disk);
                self.now += 1;
            }
        }
    }
}

impl Disk {
    /// Sets bits in the bitmap; the ring tells the map at once, as it may.
    fn mark(&mut self, first: usize, count: usize) {
        let blocks = [first, first + count - 1].map(|sector| (sector / BLOCK_SECTORS) as u64);
        self.period.insert(blocks[0], blocks[1]);
        self.mark_map(first, count);
    }

    fn mark_map(&mut self, first: usize, count: usize) {
        let blocks = [first, first + count - 1].map(|sector| (sector / BLOCK_SECTORS) as u64);
        self.map.mark_blocks(blocks[0], blocks[1]);
    }
}

//! Model: origin, images, storage and memory as arrays of sectors, and an engine that does everything in the smallest
//! steps, in any order. The oracle is a copy of the origin made at each take.
//!
//! What comes next is chosen by [`Choices`]: by a seed in the test, by the bytes of the fuzzer in its target.

mod task;
mod write;

use std::collections::{BTreeMap, HashMap, HashSet};

use self::task::{Task, WriteStep, allow};
use super::{
    BufferId, ChunkLayout, ChunkRange, Hold, Place, Region, RegionId, Slot, SnapshotKey, Space, Taken,
};
use crate::choices::Choices;

const SECTOR: u64 = 512;
const NO_SPACE: i32 = 28;
const IO: i32 = 5;
/// Why a conversion can't fail.
const SMALL: &str = "a model is smaller than memory";

/// What a sector holds: the number of the write that wrote it.
type Token = u64;

struct Snapshot {
    /// What the image must read as.
    image: Vec<Token>,
    space: Space,
    storage: HashMap<(RegionId, u64), Token>,
}

/// An origin with its snapshots, and what goes on.
pub struct World<C> {
    choices: C,
    hold: Hold,
    origin: Vec<Token>,
    snapshots: BTreeMap<SnapshotKey, Snapshot>,
    buffers: HashMap<BufferId, HashMap<u64, Token>>,
    tasks: Vec<Task>,
    /// Writes are kept back until a snapshot can be armed.
    taking: bool,
    next: u64,
    seen: Seen,
}

/// What a run must have come across, lest it shows nothing.
#[derive(Debug, Default)]
pub struct Seen {
    pub(super) copies: u64,
    pub(super) waits: u64,
    pub(super) rechecked: u64,
    pub(super) from_memory: u64,
    pub(super) overflows: u64,
    /// Chunks that got another place because the region of the first was full.
    pub(super) moved: u64,
    pub(super) shared: u64,
    pub(super) images_compared: u64,
}

impl Seen {
    /// Adds what another run came across.
    pub fn add(&mut self, other: &Self) {
        self.copies += other.copies;
        self.waits += other.waits;
        self.rechecked += other.rechecked;
        self.from_memory += other.from_memory;
        self.overflows += other.overflows;
        self.moved += other.moved;
        self.shared += other.shared;
        self.images_compared += other.images_compared;
    }

    /// The least of them.
    #[must_use]
    pub fn least(&self) -> u64 {
        [
            self.copies,
            self.waits,
            self.rechecked,
            self.from_memory,
            self.overflows,
            self.moved,
            self.shared,
            self.images_compared,
        ]
        .into_iter()
        .min()
        .unwrap_or(0)
    }
}

impl<C: Choices> World<C> {
    /// A world in which nothing has happened.
    #[must_use]
    pub fn new(mut choices: C) -> Self {
        let sectors = choices.of(100..2000);
        let shift = 15 + [0, 1, 2][choices.index(3)];
        let layout = ChunkLayout::new(sectors * SECTOR, shift, 9);
        Self {
            choices,
            hold: Hold::new(layout),
            origin: vec![0; usize::try_from(sectors).expect(SMALL)],
            snapshots: BTreeMap::new(),
            buffers: HashMap::new(),
            tasks: Vec::new(),
            taking: false,
            next: 1,
            seen: Seen::default(),
        }
    }

    /// What it came across.
    #[must_use]
    pub const fn seen(&self) -> &Seen {
        &self.seen
    }

    /// Whether there is nothing more to choose by.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.choices.is_over()
    }

    fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn range(&mut self) -> (u64, u64) {
        let sectors = self.origin.len() as u64;
        let start = self.choices.of(0..sectors);
        let most = if self.choices.once_in(5) { 300 } else { 20 };
        let count = self.choices.of(1..(sectors - start).min(most) + 1);
        (start * SECTOR, count * SECTOR)
    }

    fn some_snapshot(&mut self) -> Option<SnapshotKey> {
        let keys: Vec<_> = self.snapshots.keys().copied().collect();
        (!keys.is_empty()).then(|| keys[self.choices.index(keys.len())])
    }

    /// Does one step of something.
    ///
    /// # Panics
    /// An image is wrong.
    pub fn step(&mut self) {
        if self.taking {
            self.try_take();
        }
        let choice = self.choices.of(0..100);
        if self.tasks.len() < 6 && choice < 25 {
            self.begin_something();
        } else if choice < 27 {
            self.take_or_destroy();
        } else if !self.tasks.is_empty() {
            let at = self.choices.index(self.tasks.len());
            let task = self.tasks.swap_remove(at);
            if let Some(task) = self.advance(task) {
                self.tasks.push(task);
            }
        }
    }

    fn begin_something(&mut self) {
        let (offset, length) = self.range();
        let parts = self.hold.layout().split(offset, length).collect();
        let token = self.fresh();
        let snapshot = self.some_snapshot();
        let task = match (self.choices.of(0..10), snapshot) {
            (0..=2, Some(snapshot)) => {
                let Ok(pieces) = self.hold.resolve(snapshot, offset, length) else {
                    return;
                };
                let image = &self.snapshots[&snapshot].image;
                let allowed = sectors(offset, length)
                    .map(|at| HashSet::from([image[at]]))
                    .collect();
                let mut task = Task::Read {
                    snapshot,
                    offset,
                    pieces,
                    next: 0,
                    looked_again: false,
                    got: vec![0; sectors(offset, length).len()],
                    allowed,
                };
                self.allow_writes_under_way(&mut task);
                task
            }
            (3..=4, Some(snapshot)) => {
                let task = Task::ImageWrite {
                    snapshot,
                    parts,
                    token,
                    step: WriteStep::Ask,
                };
                for read in &mut self.tasks {
                    allow(read, &task);
                }
                task
            }
            _ => Task::Write {
                parts,
                token,
                step: WriteStep::Ask,
            },
        };
        self.tasks.push(task);
    }

    /// A read may see, sector by sector, what image writes that are under way write.
    fn allow_writes_under_way(&self, read: &mut Task) {
        for write in &self.tasks {
            allow(read, write);
        }
    }

    fn take_or_destroy(&mut self) {
        match self.choices.of(0..5) {
            4 if self.choices.once_in(4) => self.append(),
            0 | 1 if self.snapshots.len() < 4 => self.taking = true,
            2 => {
                if let Some(key) = self.some_snapshot()
                    && (self.hold.table(key).is_err() || self.choices.once_in(5))
                {
                    self.compare(key);
                    self.hold.release(key).expect("it was armed");
                    self.snapshots.remove(&key);
                }
            }
            3 if self.choices.once_in(50) => {
                if let Some(key) = self.some_snapshot() {
                    self.hold.fail(key, IO);
                }
            }
            _ => {}
        }
    }

    fn try_take(&mut self) {
        let key = SnapshotKey(self.fresh());
        if self.hold.arm(key).is_err() {
            return;
        }
        self.taking = false;
        let (mut space, _) = Space::new(0);
        for _ in 0..self.choices.of(1..3) {
            space.append(self.region());
        }
        self.snapshots.insert(
            key,
            Snapshot {
                image: self.origin.clone(),
                space,
                storage: HashMap::new(),
            },
        );
    }

    fn region(&mut self) -> Region {
        let bytes = self.choices.of(200..6000) * SECTOR;
        match self.choices.once_in(2) {
            true => Region::sparse(64 * bytes, bytes),
            false => Region::dense(self.choices.below(9) * SECTOR, bytes),
        }
    }

    /// Gives a snapshot that is held more storage.
    fn append(&mut self) {
        let region = self.region();
        let key = self.some_snapshot();
        if let Some(snapshot) = key.and_then(|key| self.snapshots.get_mut(&key))
            && snapshot.space.bytes() < 12_000 * SECTOR
        {
            snapshot.space.append(region);
        }
    }

    /// Does the next step of a task; `None` when it is done.
    fn advance(&mut self, task: Task) -> Option<Task> {
        match task {
            Task::Write { parts, token, step } => self.advance_write(parts, token, step),
            Task::ImageWrite {
                snapshot,
                parts,
                token,
                step,
            } => self.advance_image_write(snapshot, parts, token, step),
            Task::Store {
                snapshot,
                chunk,
                buffer,
                job,
            } => self.advance_store(snapshot, chunk, buffer, job),
            read => self.advance_read(read),
        }
    }

    /// Compares a whole image, while nothing writes to it.
    fn compare(&mut self, key: SnapshotKey) {
        let written = |task: &Task| matches!(task, Task::ImageWrite { snapshot, .. } if *snapshot == key);
        if self.tasks.iter().any(written) {
            return;
        }
        let Ok(pieces) = self.hold.resolve(key, 0, self.hold.layout().size()) else {
            return;
        };
        self.seen.images_compared += 1;
        let snapshot = &self.snapshots[&key];
        self.open_again(key, &snapshot.space);
        let mut at = 0;
        for piece in pieces {
            assert_eq!(piece.range.offset, at);
            at = piece.range.end();
            for (n, sector) in sectors(piece.range.offset, piece.range.length).enumerate() {
                let value = match piece.place {
                    Place::Origin => self.origin[sector],
                    Place::Memory { buffer, .. } => self.buffers[&buffer][&(sector as u64)],
                    Place::Storage { region, offset } => {
                        snapshot.storage[&(region, offset / SECTOR + n as u64)]
                    }
                };
                assert_eq!(value, snapshot.image[sector], "sector {sector} of {key:?}");
            }
        }
        assert_eq!(at, self.hold.layout().size());
    }

    /// What the table says is stored is storage that was given out.
    fn open_again(&self, key: SnapshotKey, space: &Space) {
        let Ok(table) = self.hold.table(key) else { return };
        let layout = table.layout();
        let mut again = Space::new(0).0;
        for region in space.regions() {
            again.append(space.region(region));
        }
        let taken = table.stored().map(|(chunk, slot, units)| Taken {
            slot,
            chunk: layout.chunk_bytes(),
            stored: layout.bytes_of(chunk, units),
        });
        again.restore(taken).expect("slots are apart");
        assert!(again.used() <= space.used(), "more is stored than was asked for");
    }

    /// Ends what goes on, and compares all images.
    ///
    /// # Panics
    /// An image is wrong.
    pub fn finish(&mut self) {
        self.taking = false;
        while let Some(task) = self.tasks.pop() {
            if let Some(task) = self.advance(task) {
                self.tasks.insert(0, task);
            }
        }
        for key in self.snapshots.keys().copied().collect::<Vec<_>>() {
            self.compare(key);
        }
    }
}

fn sectors(offset: u64, length: u64) -> std::ops::Range<usize> {
    let at = |bytes: u64| usize::try_from(bytes / SECTOR).expect(SMALL);
    at(offset)..at(offset + length)
}

fn places(part: &ChunkRange) -> Vec<u64> {
    sectors(part.offset, part.length).map(|at| at as u64).collect()
}

fn place(layout: &ChunkLayout, chunk: u64, slot: Slot, sector: u64) -> (RegionId, u64) {
    let within = sector - layout.start_of(chunk) / SECTOR;
    (slot.region, slot.offset / SECTOR + within)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use proptest::prelude::any;
    use proptest::test_runner::{Config, TestRunner};

    use super::*;
    use crate::choices::Seeded;

    /// 10^6 steps over many worlds.
    #[test]
    fn images_are_right_or_broken_whatever_the_order() {
        const STEPS: u32 = 1_000_000;
        const WORLDS: u32 = 200;
        let all = RefCell::new(Seen::default());
        let mut runner = TestRunner::new(Config::with_cases(WORLDS));
        runner
            .run(&any::<u64>(), |seed| {
                let mut world = World::new(Seeded::new(seed));
                for _ in 0..STEPS / WORLDS {
                    world.step();
                }
                world.finish();
                all.borrow_mut().add(world.seen());
                Ok(())
            })
            .unwrap_or_else(|error| panic!("{error}"));
        let all = all.into_inner();
        println!("{all:?}");
        assert!(all.least() > 3, "{all:?}");
    }
}

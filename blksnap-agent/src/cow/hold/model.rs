//! Model: origin, images, storage and memory as arrays of sectors, and an engine that does everything in the smallest
//! steps, in any order. The oracle is a copy of the origin made at each take.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};

use proptest::prelude::any;
use proptest::test_runner::{Config, TestRunner};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::*;
use crate::cow::{ChunkState, Region, RegionId, Slot, Space};

const SECTOR: u64 = 512;
const NO_SPACE: i32 = 28;
const IO: i32 = 5;

/// What a sector holds: the number of the write that wrote it.
type Token = u64;

/// A task in steps.
enum Task {
    Write {
        parts: Vec<ChunkRange>,
        token: Token,
        step: WriteStep,
    },
    Read {
        snapshot: SnapshotKey,
        offset: u64,
        pieces: Vec<Piece>,
        next: usize,
        looked_again: bool,
        got: Vec<Token>,
        allowed: Vec<HashSet<Token>>,
    },
    ImageWrite {
        snapshot: SnapshotKey,
        parts: Vec<ChunkRange>,
        token: Token,
        step: WriteStep,
    },
    Store {
        snapshot: SnapshotKey,
        chunk: u64,
        buffer: BufferId,
        job: Option<Job>,
    },
}

enum WriteStep {
    Ask,
    /// Old data was not read yet.
    Read(Job),
    /// It was, and goes to its places.
    Keep(Job, HashMap<u64, Token>),
    /// Sectors that are still to be written.
    Land(Option<Job>, Vec<u64>),
}

struct Snapshot {
    /// What the image must read as.
    image: Vec<Token>,
    space: Space,
    storage: HashMap<(RegionId, u64), Token>,
}

struct World {
    rng: StdRng,
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
struct Seen {
    copies: u64,
    waits: u64,
    rechecked: u64,
    from_memory: u64,
    overflows: u64,
    shared: u64,
    images_compared: u64,
}

impl Seen {
    fn add(&mut self, other: &Self) {
        self.copies += other.copies;
        self.waits += other.waits;
        self.rechecked += other.rechecked;
        self.from_memory += other.from_memory;
        self.overflows += other.overflows;
        self.shared += other.shared;
        self.images_compared += other.images_compared;
    }

    fn least(&self) -> u64 {
        [
            self.copies,
            self.waits,
            self.rechecked,
            self.from_memory,
            self.overflows,
            self.shared,
            self.images_compared,
        ]
        .into_iter()
        .min()
        .unwrap_or(0)
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let sectors = rng.random_range(100..2000_u64);
        let layout = ChunkLayout::new(sectors * SECTOR, rng.random_range(15..18), 9);
        Self {
            rng,
            hold: Hold::new(layout),
            origin: vec![0; usize::try_from(sectors).unwrap()],
            snapshots: BTreeMap::new(),
            buffers: HashMap::new(),
            tasks: Vec::new(),
            taking: false,
            next: 1,
            seen: Seen::default(),
        }
    }

    fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn range(&mut self) -> (u64, u64) {
        let sectors = self.origin.len() as u64;
        let start = self.rng.random_range(0..sectors);
        let most = if self.rng.random_bool(0.2) { 300 } else { 20 };
        let count = self.rng.random_range(1..=(sectors - start).min(most));
        (start * SECTOR, count * SECTOR)
    }

    fn some_snapshot(&mut self) -> Option<SnapshotKey> {
        let keys: Vec<_> = self.snapshots.keys().copied().collect();
        (!keys.is_empty()).then(|| keys[self.rng.random_range(0..keys.len())])
    }

    fn step(&mut self) {
        if self.taking {
            self.try_take();
        }
        let choice = self.rng.random_range(0..100);
        if self.tasks.len() < 6 && choice < 25 {
            self.begin_something();
        } else if choice < 27 {
            self.take_or_destroy();
        } else if !self.tasks.is_empty() {
            let at = self.rng.random_range(0..self.tasks.len());
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
        let task = match (self.rng.random_range(0..10), snapshot) {
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
        match self.rng.random_range(0..4) {
            0 | 1 if self.snapshots.len() < 4 => self.taking = true,
            2 => {
                if let Some(key) = self.some_snapshot()
                    && (self.hold.table(key).is_err() || self.rng.random_bool(0.2))
                {
                    self.compare(key);
                    self.hold.release(key).unwrap();
                    self.snapshots.remove(&key);
                }
            }
            3 if self.rng.random_bool(0.02) => {
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
        for _ in 0..self.rng.random_range(1..3) {
            let bytes = self.rng.random_range(200..6000) * SECTOR;
            space.append(match self.rng.random_bool(0.5) {
                true => Region::sparse(64 * bytes, bytes),
                false => Region::dense(0, bytes),
            });
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

    fn advance_write(&mut self, mut parts: Vec<ChunkRange>, token: Token, step: WriteStep) -> Option<Task> {
        let part = *parts.first()?;
        let step = match step {
            WriteStep::Ask if self.taking => WriteStep::Ask,
            WriteStep::Ask => match self.hold.begin(&part) {
                Decision::Go => WriteStep::Land(None, places(&part)),
                Decision::Copy(job) => {
                    self.seen.copies += 1;
                    self.seen.shared += u64::from(job.needs.len() > 1);
                    WriteStep::Read(job)
                }
                Decision::Wait(_) => {
                    self.seen.waits += 1;
                    WriteStep::Ask
                }
            },
            WriteStep::Read(job) => {
                let old = self.read_origin(&job);
                WriteStep::Keep(job, old)
            }
            WriteStep::Keep(job, old) => {
                self.keep(&job, &old);
                WriteStep::Ask
            }
            WriteStep::Land(_, mut rest) => {
                if let Some(at) = rest.pop() {
                    self.origin[usize::try_from(at).unwrap()] = token;
                }
                if rest.is_empty() {
                    self.hold.end();
                    parts.remove(0);
                    WriteStep::Ask
                } else {
                    WriteStep::Land(None, rest)
                }
            }
        };
        (!parts.is_empty()).then_some(Task::Write { parts, token, step })
    }

    fn read_origin(&self, job: &Job) -> HashMap<u64, Token> {
        self.hold
            .layout()
            .ranges(job.chunk, job.units)
            .flat_map(|range| sectors(range.offset, range.length))
            .map(|at| (at as u64, self.origin[at]))
            .collect()
    }

    /// Meets the needs of a job, in memory or in storage, or fails.
    fn keep(&mut self, job: &Job, old: &HashMap<u64, Token>) {
        let mut outcomes = Vec::new();
        for need in &job.needs {
            outcomes.push(if self.rng.random_bool(0.001) {
                Err(IO)
            } else if self.rng.random_bool(0.3) {
                let buffer = BufferId(self.fresh());
                self.buffers.insert(buffer, old.clone());
                self.tasks.push(Task::Store {
                    snapshot: need.snapshot,
                    chunk: job.chunk,
                    buffer,
                    job: None,
                });
                Ok(Some(buffer))
            } else {
                self.put(need.snapshot, job.chunk, need.units, old).map(|()| None)
            });
        }
        self.hold.settle(job, &outcomes);
    }

    /// Writes sectors of a chunk to its slot, which it gets where it has none.
    fn put(
        &mut self,
        key: SnapshotKey,
        chunk: u64,
        units: UnitSet,
        from: &HashMap<u64, Token>,
    ) -> Result<(), i32> {
        let Some(snapshot) = self.snapshots.get_mut(&key) else {
            return Ok(());
        };
        let layout = *self.hold.layout();
        let bytes = layout.bytes_of(chunk, units);
        let Ok(table) = self.hold.table_mut(key) else {
            return Ok(());
        };
        let slot = match table.slot(chunk) {
            Some(slot) => snapshot.space.extend(slot, bytes).map(|()| slot),
            None => snapshot.space.slot(layout.chunk_bytes(), bytes),
        };
        let Ok(slot) = slot else {
            self.seen.overflows += 1;
            return Err(NO_SPACE);
        };
        table.place(chunk, slot);
        for range in layout.ranges(chunk, units) {
            for at in sectors(range.offset, range.length) {
                let at = at as u64;
                if let Some(token) = from.get(&at) {
                    snapshot.storage.insert(place(&layout, chunk, slot, at), *token);
                }
            }
        }
        Ok(())
    }

    fn advance_image_write(
        &mut self,
        snapshot: SnapshotKey,
        mut parts: Vec<ChunkRange>,
        token: Token,
        step: WriteStep,
    ) -> Option<Task> {
        let part = *parts.first()?;
        let step = match step {
            WriteStep::Ask => match self.hold.begin_image(snapshot, &part) {
                Err(_) => return None,
                Ok(Decision::Wait(_)) => WriteStep::Ask,
                Ok(Decision::Copy(job)) if !job.needs.is_empty() => WriteStep::Read(job),
                Ok(Decision::Copy(job)) => WriteStep::Land(Some(job), Vec::new()),
                Ok(Decision::Go) => unreachable!("an image write is a job"),
            },
            WriteStep::Read(job) => {
                let old = self.read_origin(&job);
                WriteStep::Keep(job, old)
            }
            WriteStep::Keep(job, old) => {
                self.keep(&job, &old);
                WriteStep::Ask
            }
            WriteStep::Land(job, _) => {
                let job = job.expect("an image write lands in a job");
                self.land_image(snapshot, &job, &part, token);
                parts.remove(0);
                WriteStep::Ask
            }
        };
        (!parts.is_empty()).then_some(Task::ImageWrite {
            snapshot,
            parts,
            token,
            step,
        })
    }

    /// The new sectors, and around them in the same units what is in memory.
    fn land_image(&mut self, key: SnapshotKey, job: &Job, part: &ChunkRange, token: Token) {
        let layout = *self.hold.layout();
        let mut data = HashMap::new();
        for range in layout.ranges(job.chunk, job.units) {
            for piece in self
                .hold
                .resolve(key, range.offset, range.length)
                .unwrap_or_default()
            {
                if let Place::Memory { buffer, .. } = piece.place {
                    for at in sectors(piece.range.offset, piece.range.length) {
                        data.insert(at as u64, self.buffers[&buffer][&(at as u64)]);
                    }
                }
            }
        }
        for at in sectors(part.offset, part.length) {
            data.insert(at as u64, token);
        }
        let fresh = match self.hold.table(key) {
            Ok(table) => {
                let stored = table
                    .stored()
                    .find(|(chunk, ..)| *chunk == job.chunk)
                    .map_or(UnitSet::EMPTY, |(_, _, units)| units);
                job.units.without(stored)
            }
            Err(_) => UnitSet::EMPTY,
        };
        let written = self.room(key, job.chunk, fresh);
        if let Some(slot) = written
            && let Some(snapshot) = self.snapshots.get_mut(&key)
        {
            for (at, token) in &data {
                snapshot
                    .storage
                    .insert(place(&layout, job.chunk, slot, *at), *token);
            }
            for at in sectors(part.offset, part.length) {
                snapshot.image[at] = token;
            }
        }
        self.hold.settle_image(key, job, written.is_some());
    }

    /// The chunk's slot, with room for more units; a write to an image that finds none fails, and breaks nothing.
    fn room(&mut self, key: SnapshotKey, chunk: u64, units: UnitSet) -> Option<Slot> {
        let snapshot = self.snapshots.get_mut(&key)?;
        let layout = *self.hold.layout();
        let table = self.hold.table_mut(key).ok()?;
        let bytes = layout.bytes_of(chunk, units);
        let slot = match table.slot(chunk) {
            Some(slot) => snapshot.space.extend(slot, bytes).ok().map(|()| slot)?,
            None => snapshot.space.slot(layout.chunk_bytes(), bytes).ok()?,
        };
        table.place(chunk, slot);
        Some(slot)
    }

    fn advance_store(
        &mut self,
        snapshot: SnapshotKey,
        chunk: u64,
        buffer: BufferId,
        job: Option<Job>,
    ) -> Option<Task> {
        let job = match job {
            None => match self.hold.begin_store(snapshot, chunk, buffer) {
                Err(_) | Ok(None) => return None,
                Ok(Some(Decision::Copy(job))) => {
                    assert_eq!(
                        self.hold.table(snapshot).unwrap().state(chunk),
                        ChunkState::InMemory
                    );
                    Some(job)
                }
                Ok(Some(_)) => None,
            },
            Some(job) => {
                let data = self.buffers[&buffer].clone();
                let outcome = self.put(snapshot, chunk, job.units, &data).map(|()| None);
                self.hold.settle(&job, &[outcome]);
                return None;
            }
        };
        Some(Task::Store {
            snapshot,
            chunk,
            buffer,
            job,
        })
    }

    fn advance_read(&mut self, task: Task) -> Option<Task> {
        let Task::Read {
            snapshot,
            offset,
            mut pieces,
            next,
            looked_again,
            mut got,
            allowed,
        } = task
        else {
            unreachable!("the other tasks have their own steps");
        };
        if let Some(piece) = pieces.get(next).copied() {
            let known = self.snapshots.get(&snapshot);
            for (n, at) in sectors(piece.range.offset, piece.range.length).enumerate() {
                let n = n as u64;
                let value = match piece.place {
                    Place::Origin => self.origin[at],
                    Place::Memory { buffer, .. } => {
                        self.seen.from_memory += 1;
                        self.buffers[&buffer][&(at as u64)]
                    }
                    // A snapshot that was destroyed meanwhile: the read fails below.
                    Place::Storage { region, offset } => known
                        .and_then(|known| known.storage.get(&(region, offset / SECTOR + n)))
                        .copied()
                        .unwrap_or(Token::MAX),
                };
                got[at - usize::try_from(offset / SECTOR).unwrap()] = value;
            }
            return Some(Task::Read {
                snapshot,
                offset,
                pieces,
                next: next + 1,
                looked_again,
                got,
                allowed,
            });
        }
        // Destroyed or broken: the read is an error.
        let moved = self.hold.recheck(snapshot, &pieces).ok()?;
        if !looked_again && !moved.is_empty() {
            self.seen.rechecked += 1;
            pieces = moved;
            return Some(Task::Read {
                snapshot,
                offset,
                pieces,
                next: 0,
                looked_again: true,
                got,
                allowed,
            });
        }
        for (n, (value, allowed)) in got.iter().zip(&allowed).enumerate() {
            assert!(
                allowed.contains(value),
                "sector {} of the image of {snapshot:?}: {value}, not one of {allowed:?}",
                offset / SECTOR + n as u64
            );
        }
        None
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

    fn finish(&mut self) {
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

/// Lets `task`, if it is a read, see what `other` writes, if it writes to the same image.
fn allow(task: &mut Task, other: &Task) {
    let Task::Read {
        snapshot,
        offset,
        allowed,
        ..
    } = task
    else {
        return;
    };
    if let Task::ImageWrite {
        snapshot: written,
        parts,
        token,
        ..
    } = other
        && written == snapshot
    {
        let first = usize::try_from(*offset / SECTOR).unwrap();
        for at in parts.iter().flat_map(|part| sectors(part.offset, part.length)) {
            if let Some(allowed) = at.checked_sub(first).and_then(|n| allowed.get_mut(n)) {
                allowed.insert(*token);
            }
        }
    }
}

fn sectors(offset: u64, length: u64) -> std::ops::Range<usize> {
    let at = |bytes: u64| usize::try_from(bytes / SECTOR).unwrap();
    at(offset)..at(offset + length)
}

fn places(part: &ChunkRange) -> Vec<u64> {
    sectors(part.offset, part.length).map(|at| at as u64).collect()
}

fn place(layout: &ChunkLayout, chunk: u64, slot: Slot, sector: u64) -> (RegionId, u64) {
    let within = sector - layout.start_of(chunk) / SECTOR;
    (slot.region, slot.offset / SECTOR + within)
}

/// 10^6 steps over many worlds.
#[test]
fn images_are_right_or_broken_whatever_the_order() {
    const STEPS: u32 = 1_000_000;
    const WORLDS: u32 = 200;
    let all = RefCell::new(Seen::default());
    let mut runner = TestRunner::new(Config::with_cases(WORLDS));
    runner
        .run(&any::<u64>(), |seed| {
            let mut world = World::new(seed);
            for _ in 0..STEPS / WORLDS {
                world.step();
            }
            world.finish();
            all.borrow_mut().add(&world.seen);
            Ok(())
        })
        .unwrap_or_else(|error| panic!("{error}"));
    let all = all.into_inner();
    println!("{all:?}");
    assert!(all.least() > 20, "{all:?}");
}

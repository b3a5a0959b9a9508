//! Mover: old data of long writes, several pieces at once, with io_uring.
//!
//! A write of a few KiB moves one piece: a read and a write, done at once by the thread that waits for them. A longer
//! one moves many, and most of the time is spent waiting for the origin. A mover keeps up to [`SLOTS`] pieces in flight
//! for such a write, each in a registered buffer: first its read, then its writes. It has at most [`RINGS`] rings, made
//! when they are needed; who finds none free moves piece after piece, and so does everybody where io_uring is not
//! permitted, or a disk has no file.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::disk::{Disk, Zero};
use crate::sys::uring::{InFlight, Ring};

/// Pieces in flight on one ring.
const SLOTS: u32 = 8;

/// Rings at most: their memory is `RINGS * SLOTS * PIECE`.
const RINGS: usize = 4;

/// Most bytes of a piece.
pub(super) const PIECE: u64 = 256 << 10;

/// Bytes that go from the origin to some places.
#[derive(Debug)]
pub(super) struct Move {
    /// First byte in the origin.
    pub(super) offset: u64,
    /// At most [`PIECE`].
    pub(super) length: usize,
    /// Where to.
    pub(super) targets: Vec<Target>,
}

/// A place for a part of the bytes of a move.
#[derive(Debug)]
pub(super) struct Target {
    /// Who wants it: an index of the caller's.
    pub(super) need: usize,
    /// The disk.
    pub(super) disk: Arc<dyn Disk>,
    /// First byte there.
    pub(super) offset: u64,
    /// Which bytes of the move.
    pub(super) from: usize,
    pub(super) length: usize,
}

/// What became of the moves.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// The first failure of a read, and where.
    pub(super) read: Option<(u64, io::Error)>,
    /// The first failure of each need's writes, and the disk's name.
    pub(super) written: Vec<(usize, String, io::Error)>,
}

impl Outcome {
    fn failed(&mut self, target: &Target, error: io::Error) {
        if self.has_failed(target.need) {
            return;
        }
        self.written
            .push((target.need, target.disk.name().to_owned(), error));
    }

    fn has_failed(&self, need: usize) -> bool {
        self.written.iter().any(|(failed, ..)| *failed == need)
    }
}

/// Rings that are free.
#[derive(Debug, Default)]
pub(super) struct Mover {
    rings: Mutex<Rings>,
}

#[derive(Debug, Default)]
struct Rings {
    free: Vec<Ring>,
    made: usize,
    /// io_uring is not permitted.
    none: bool,
}

impl Mover {
    /// Carries out moves, in any order. After a failure the rest of what depends on it is left out.
    pub(super) fn run(&self, origin: &dyn Disk, moves: &[Move]) -> Outcome {
        let several = moves.len() > 1;
        let files = moves.iter().flat_map(|each| &each.targets);
        if several
            && let Some(file) = origin.file()
            && files.map(|target| target.disk.file()).all(|file| file.is_some())
            && let Some(ring) = self.take()
        {
            let mut batch = Batch::new(ring, file, moves);
            match batch.run() {
                Ok(()) => {
                    let Batch { table, outcome, .. } = batch;
                    self.give_back(table.into_ring().ok());
                    return outcome;
                }
                Err(error) => {
                    tracing::warn!(%error, "io_uring fails; old data is moved piece after piece");
                    drop(batch);
                    self.give_back(None);
                }
            }
        }
        one_by_one(origin, moves)
    }

    fn take(&self) -> Option<Ring> {
        let mut rings = self.lock();
        if let Some(ring) = rings.free.pop() {
            return Some(ring);
        }
        if rings.none || rings.made == RINGS {
            return None;
        }
        match Ring::new(SLOTS, usize::try_from(PIECE).unwrap_or(1 << 18)) {
            Ok(ring) => {
                rings.made += 1;
                Some(ring)
            }
            Err(error) => {
                tracing::info!(%error, "io_uring is not available, old data is moved piece after piece");
                rings.none = true;
                None
            }
        }
    }

    fn give_back(&self, ring: Option<Ring>) {
        let mut rings = self.lock();
        match ring {
            Some(ring) => rings.free.push(ring),
            None => rings.made -= 1,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Rings> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Carries out moves by plain calls.
fn one_by_one(origin: &dyn Disk, moves: &[Move]) -> Outcome {
    let mut outcome = Outcome::default();
    let mut buffer = Vec::new();
    for each in moves {
        buffer.resize(each.length, 0);
        if let Err(error) = origin.read_at(&mut buffer, each.offset) {
            outcome.read = Some((each.offset, error));
            return outcome;
        }
        for target in &each.targets {
            if !outcome.has_failed(target.need)
                && let Err(error) = put(target, &buffer)
            {
                outcome.failed(target, error);
            }
        }
    }
    outcome
}

fn put(target: &Target, data: &[u8]) -> io::Result<()> {
    let data = &data[target.from..target.from + target.length];
    if is_zero(data) {
        let length = data.len() as u64;
        target
            .disk
            .zero_at(target.offset, length, Zero::Deallocate, false)
    } else {
        target.disk.write_at(data, target.offset)
    }
}

/// Whether all bytes are zero.
fn is_zero(data: &[u8]) -> bool {
    // The first differs in most data.
    data.first().is_none_or(|first| *first == 0) && data.iter().all(|byte| *byte == 0)
}

/// What a slot is doing.
#[derive(Clone, Copy, Debug)]
enum Slot {
    Idle,
    /// Reads this move.
    Reading(usize),
    /// Writes this target of this move.
    Writing(usize, usize),
}

/// Moves on one ring.
struct Batch<'f> {
    table: InFlight<'f>,
    slots: Vec<Slot>,
    origin: BorrowedFd<'f>,
    moves: &'f [Move],
    /// The next move.
    next: usize,
    outcome: Outcome,
}

impl<'f> Batch<'f> {
    fn new(ring: Ring, origin: BorrowedFd<'f>, moves: &'f [Move]) -> Self {
        Self {
            slots: vec![Slot::Idle; ring.slots()],
            table: ring.into(),
            origin,
            moves,
            next: 0,
            outcome: Outcome::default(),
        }
    }

    /// Everything, until nothing is in flight. An error is one of the ring; then nothing is known of the moves.
    fn run(&mut self) -> io::Result<()> {
        let mut ended = Vec::new();
        loop {
            for slot in 0..self.slots.len() {
                if matches!(self.slots[slot], Slot::Idle) {
                    self.begin(slot)?;
                }
            }
            if self.table.count() == 0 {
                return Ok(());
            }
            self.table.wait(&mut ended)?;
            for (slot, result) in ended.drain(..) {
                self.step(slot, result)?;
            }
        }
    }

    fn begin(&mut self, slot: usize) -> io::Result<()> {
        if self.outcome.read.is_some() {
            return Ok(());
        }
        let Some(each) = self.moves.get(self.next) else {
            return Ok(());
        };
        self.table.read(slot, self.origin, each.offset, each.length)?;
        self.slots[slot] = Slot::Reading(self.next);
        self.next += 1;
        Ok(())
    }

    fn step(&mut self, slot: usize, result: io::Result<()>) -> io::Result<()> {
        match std::mem::replace(&mut self.slots[slot], Slot::Idle) {
            Slot::Idle => Ok(()),
            Slot::Reading(number) => match result {
                Ok(()) => self.write(slot, number, 0),
                Err(error) => {
                    let offset = self.moves[number].offset;
                    self.outcome.read.get_or_insert((offset, error));
                    Ok(())
                }
            },
            Slot::Writing(number, at) => {
                if let Err(error) = result {
                    self.outcome.failed(&self.moves[number].targets[at], error);
                }
                self.write(slot, number, at + 1)
            }
        }
    }

    /// Writes the targets of a move from `at` on: zeroes at once, the first other one in flight.
    fn write(&mut self, slot: usize, number: usize, at: usize) -> io::Result<()> {
        let each = &self.moves[number];
        for (at, target) in each.targets.iter().enumerate().skip(at) {
            if self.outcome.has_failed(target.need) {
                continue;
            }
            let range = target.from..target.from + target.length;
            let data = &self.table.buffer(slot)[range.clone()];
            match target.disk.file() {
                Some(file) if !is_zero(data) => {
                    self.table.write(slot, file, target.offset, range)?;
                    self.slots[slot] = Slot::Writing(number, at);
                    return Ok(());
                }
                _ => {
                    if let Err(error) = put(target, self.table.buffer(slot)) {
                        self.outcome.failed(target, error);
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rand::rngs::StdRng;
    use rand::{Rng as _, RngCore as _, SeedableRng as _};

    use super::*;
    use crate::disk::FileDisk;

    fn disk(name: &str, size: u64) -> Arc<FileDisk> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        Arc::new(FileDisk::new(name, Arc::new(file), size))
    }

    fn target(need: usize, disk: &Arc<FileDisk>, offset: u64, from: usize, length: usize) -> Target {
        Target {
            need,
            disk: Arc::clone(disk) as _,
            offset,
            from,
            length,
        }
    }

    /// Both ways of moving have the same outcome.
    #[test]
    fn pieces_arrive_whole_and_zeroes_stay_holes() {
        let seed: u64 = rand::rng().random();
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let size = 4 << 20;
        let origin = disk("origin", size);
        let mut content = vec![0; usize::try_from(size).unwrap()];
        rng.fill_bytes(&mut content[..3 << 20]);
        origin.write_at(&content, 0).unwrap();
        let mover = Mover::default();
        for by_ring in [true, false] {
            let places = [disk("first", size), disk("second", size)];
            let mut expected = [vec![0; content.len()], vec![0; content.len()]];
            let moves: Vec<Move> = (0..100)
                .map(|_| {
                    let length = rng.random_range(1..=512_usize) * 512;
                    let offset = rng.random_range(0..=(size - length as u64) / 512) * 512;
                    let at = usize::try_from(offset).unwrap();
                    let half = length / 1024 * 512;
                    expected[0][at..at + length].copy_from_slice(&content[at..at + length]);
                    expected[1][at + half..at + length].copy_from_slice(&content[at + half..at + length]);
                    Move {
                        offset,
                        length,
                        targets: vec![
                            target(0, &places[0], offset, 0, length),
                            target(1, &places[1], offset + half as u64, half, length - half),
                        ],
                    }
                })
                .collect();
            let outcome = if by_ring {
                mover.run(&*origin, &moves)
            } else {
                one_by_one(&*origin, &moves)
            };
            assert!(
                outcome.read.is_none() && outcome.written.is_empty(),
                "{outcome:?}"
            );
            for (place, expected) in places.iter().zip(&expected) {
                let mut found = vec![1; content.len()];
                place.read_at(&mut found, 0).unwrap();
                assert!(found == *expected, "{}", place.name());
                // A piece that begins before the zeroes is written as a whole.
                let known = place.allocation((3 << 20) + PIECE, (1 << 20) - PIECE, 1).unwrap();
                assert!(known[0].hole && known[0].length == (1 << 20) - PIECE, "{known:?}");
            }
        }
        let rings = mover.lock();
        assert_eq!((rings.free.len(), rings.made), (1, 1), "the ring is back");
    }

    /// A failure of one need leaves the others alone, and one of the origin ends all.
    #[test]
    fn failures_are_of_whom_they_hit() {
        let size = 4 << 20;
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        // Shorter than it should be.
        let origin = Arc::new(FileDisk::new("origin", Arc::new(file), 2 * size));
        origin
            .write_at(&vec![7; usize::try_from(size).unwrap()], 0)
            .unwrap();
        let sound = disk("sound", size);
        let only_read = Arc::new(FileDisk::new(
            "only read",
            Arc::new(File::open("/proc/self/exe").unwrap()),
            size,
        ));
        let moves = |from: u64| -> Vec<Move> {
            (0..8)
                .map(|n| Move {
                    offset: from + n * 4096,
                    length: 4096,
                    targets: vec![
                        target(0, &only_read, n * 4096, 0, 4096),
                        target(1, &sound, n * 4096, 0, 4096),
                    ],
                })
                .collect()
        };
        let mover = Mover::default();
        for by_ring in [true, false] {
            let run = |moves: &[Move]| match by_ring {
                true => mover.run(&*origin, moves),
                false => one_by_one(&*origin, moves),
            };
            let outcome = run(&moves(0));
            assert!(outcome.read.is_none());
            let [(0, name, error)] = outcome.written.as_slice() else {
                panic!("{outcome:?}");
            };
            assert_eq!(
                (name.as_str(), error.raw_os_error()),
                ("only read", Some(libc::EBADF))
            );
            let mut found = vec![0; 8 * 4096];
            sound.read_at(&mut found, 0).unwrap();
            assert!(found.iter().all(|byte| *byte == 7));
            // Behind the end of the origin.
            let outcome = run(&moves(size));
            let (_, error) = outcome.read.unwrap();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}

//! Cuts: the agent or the power ends at any input or output. Whoever comes next finds the image exact in what the
//! journal and the storage hold.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use rand::rngs::StdRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};

use super::super::*;
use super::journal::{Journal, JournalError, Subject};
use super::{Plain, image_content, layout, range, store};
use crate::cow::ChunkLayout;
use crate::disk::testing::CrashDisk;
use crate::disk::{Allocation, Disk, Zero};

/// Operations that are left, of all disks together.
#[derive(Debug)]
struct Life(AtomicU64);

/// What becomes of an operation.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    Alive,
    /// It is cut off.
    Last,
    Dead,
}

impl Life {
    fn turn(&self) -> Turn {
        let taken = self
            .0
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        match taken {
            Ok(1) => Turn::Last,
            Ok(_) => Turn::Alive,
            Err(_) => Turn::Dead,
        }
    }

    fn is_over(&self) -> bool {
        self.0.load(Ordering::SeqCst) == 0
    }

    fn spend(&self) -> io::Result<()> {
        match self.turn() {
            Turn::Alive => Ok(()),
            Turn::Last | Turn::Dead => Err(Errno::EIO.into()),
        }
    }
}

/// A disk that does nothing any more from some operation on. The last write is done in part.
#[derive(Debug)]
struct Dying {
    inner: Arc<CrashDisk>,
    life: Arc<Life>,
    /// Sectors of the last write that are done, if it has more.
    part: usize,
}

impl Disk for Dying {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn logical_block(&self) -> u32 {
        512
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.life.spend()?;
        self.inner.read_at(buffer, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let done = match self.life.turn() {
            Turn::Alive => return self.inner.write_at(data, offset),
            Turn::Last => (self.part * 512).min(data.len() / 512 * 512),
            Turn::Dead => 0,
        };
        if done > 0 {
            self.inner.write_at(&data[..done], offset)?;
        }
        Err(Errno::EIO.into())
    }

    fn zero_at(&self, offset: u64, length: u64, zero: Zero, fast: bool) -> io::Result<()> {
        self.life.spend()?;
        self.inner.zero_at(offset, length, zero, fast)
    }

    fn discard_at(&self, offset: u64, length: u64) -> io::Result<()> {
        self.life.spend()?;
        self.inner.discard_at(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        self.life.spend()?;
        self.inner.flush()
    }

    fn allocation(&self, offset: u64, length: u64, most: usize) -> io::Result<Vec<Allocation>> {
        self.inner.allocation(offset, length, most)
    }
}

/// How it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The agent is killed: the page cache stays.
    Kill,
    /// The power goes: what was not flushed may be there or not.
    Cut,
}

struct Run {
    layout: ChunkLayout,
    /// Origin, storage, journal.
    disks: [Arc<CrashDisk>; 3],
    /// The two values that a byte of the image may have.
    expected: Vec<(u8, u8)>,
    preserved: u64,
}

fn subject(layout: ChunkLayout) -> Subject {
    Subject {
        snapshot: uuid::Uuid::from_u128(7),
        member: 1,
        layout,
    }
}

/// Plays until `operations` are used up, or the script ends, which is told.
fn play(seed: u64, promise: Promise, operations: u64) -> (Run, bool) {
    let mut rng = StdRng::seed_from_u64(seed);
    let layout = layout();
    let size = usize::try_from(layout.size()).unwrap();
    let mut first = vec![0; size];
    rng.fill_bytes(&mut first);
    let journal_bytes = usize::try_from(Journal::most_bytes(&layout)).unwrap();
    let disks = [
        Arc::new(CrashDisk::new("origin", first.clone())),
        Arc::new(CrashDisk::zeroed("storage", 1 << 20)),
        Arc::new(CrashDisk::zeroed("journal", journal_bytes.next_multiple_of(512))),
    ];
    let life = Arc::new(Life(AtomicU64::new(u64::MAX)));
    let part = rng.random_range(0..8);
    let dying = disks.clone().map(|inner| -> Arc<dyn Disk> {
        Arc::new(Dying {
            inner,
            life: Arc::clone(&life),
            part,
        })
    });
    let [origin_disk, storage_disk, journal_disk] = dying;
    let journal = Journal::create(journal_disk, &subject(layout), promise).unwrap();
    let origin = Arc::new(Origin::new(origin_disk, layout));
    let (kept, _) = store(1, &Plain::new(&[(storage_disk, true)]), promise, Some(journal));
    let image = origin.pause().arm(Arc::clone(&kept)).unwrap();
    let mut run = Run {
        layout,
        disks,
        expected: first.iter().map(|byte| (*byte, *byte)).collect(),
        preserved: 0,
    };
    life.0.store(operations, Ordering::SeqCst);
    for _ in 0..30 {
        let (offset, length) = range(&mut rng, layout.size());
        let mut data = vec![0; length];
        rng.fill_bytes(&mut data);
        match rng.random_range(0..10) {
            0..=6 => {
                let _admitted = origin.admit(offset, length as u64);
                let _ = origin.disk().write_at(&data, offset);
            }
            7 => {
                let _ = origin.disk().flush();
            }
            _ => {
                let range = usize::try_from(offset).unwrap()..usize::try_from(offset).unwrap() + length;
                for (expected, byte) in run.expected[range.clone()].iter_mut().zip(&data) {
                    expected.1 = *byte;
                }
                if image.write_at(&data, offset).and_then(|()| image.flush()).is_ok() {
                    run.expected[range]
                        .iter_mut()
                        .for_each(|expected| expected.0 = expected.1);
                }
            }
        }
        if life.is_over() {
            break;
        }
    }
    run.preserved = kept.preserved();
    (run, life.is_over())
}

/// What the next agent finds.
fn come_back(run: &Run, end: End, seed: u64) -> Result<Vec<u8>, JournalError> {
    let [origin, storage, journal] = run.disks.each_ref().map(|disk| -> Arc<dyn Disk> {
        Arc::new(match end {
            End::Kill => CrashDisk::new(disk.name(), disk.content()),
            End::Cut => disk.cut(seed),
        })
    });
    let (journal, table) = Journal::open(journal, &subject(run.layout))?;
    let storage = Plain::new(&[(storage, true)]);
    let origin = Arc::new(Origin::new(origin, run.layout));
    let (store, _) = store(1, &storage, Promise::AgentCrash, Some(journal));
    let image = origin.pause().resume(store, table).unwrap();
    Ok(image_content(&image).unwrap())
}

fn check(run: &Run, end: End, seed: u64, operations: u64) {
    let found = come_back(run, end, seed)
        .unwrap_or_else(|error| panic!("seed {seed}, {end:?} after {operations} operations: {error}"));
    let wrong = found
        .iter()
        .zip(&run.expected)
        .position(|(found, allowed)| *found != allowed.0 && *found != allowed.1);
    assert_eq!(
        wrong, None,
        "seed {seed}, {end:?} after {operations} operations: this byte of the image is wrong"
    );
}

fn cut_everywhere(promise: Promise, end: End) {
    let seed = rand::rng().random();
    let mut cuts = 0;
    for operations in 1.. {
        let (run, over) = play(seed, promise, operations);
        check(&run, end, seed ^ operations, operations);
        if !over {
            assert!(
                run.preserved > 10 * 4096,
                "seed {seed}: {} bytes preserved",
                run.preserved
            );
            break;
        }
        cuts += 1;
    }
    println!("seed {seed}: {cuts} times {end:?} with {promise:?}");
    assert!(cuts > 40, "seed {seed}");
}

#[test]
fn an_image_outlives_a_killed_agent() {
    (0..2).for_each(|_| cut_everywhere(Promise::AgentCrash, End::Kill));
    cut_everywhere(Promise::PowerCut, End::Kill);
}

#[test]
fn an_image_outlives_a_power_cut_where_that_is_promised() {
    (0..2).for_each(|_| cut_everywhere(Promise::PowerCut, End::Cut));
}

/// The tests above see an image that is not safe: without the promise some cut must show.
#[test]
fn a_power_cut_shows_where_nothing_was_promised() {
    let seed = rand::rng().random();
    let wrong = (1..).map_while(|operations| {
        let (run, over) = play(seed, Promise::AgentCrash, operations);
        let found = come_back(&run, End::Cut, seed ^ operations).ok();
        let right = found.is_some_and(|found| {
            found
                .iter()
                .zip(&run.expected)
                .all(|(found, allowed)| *found == allowed.0 || *found == allowed.1)
        });
        over.then_some(!right)
    });
    assert!(wrong.filter(|wrong| *wrong).count() > 0, "seed {seed}");
}

#[test]
fn a_journal_that_is_not_one_is_refused() {
    let layout = layout();
    let (run, _) = play(3, Promise::AgentCrash, u64::MAX);
    let sound = run.disks[2].content();
    let open = |bytes: Vec<u8>, subject: &Subject| {
        Journal::open(Arc::new(CrashDisk::new("journal", bytes)), subject).map(|_| ())
    };
    open(sound.clone(), &subject(layout)).unwrap();
    // A bit in the header, the end mark, and each of the first entries.
    for at in [0, 9, 40, 511, 512, 1000, 4096, 4096 + 31, 4096 + 32 * 3 + 17] {
        for bit in [0, 7] {
            let mut bytes = sound.clone();
            bytes[at] ^= 1 << bit;
            let error = open(bytes, &subject(layout)).unwrap_err();
            assert!(matches!(error, JournalError::Damaged { .. }), "{at}: {error}");
        }
    }
    let other = Subject {
        member: 2,
        ..subject(layout)
    };
    assert!(matches!(open(sound, &other), Err(JournalError::Other { .. })));
}

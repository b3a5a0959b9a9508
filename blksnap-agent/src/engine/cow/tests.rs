//! Tests of copy on write over real threads, with faults at every step, and with cuts at every step.

mod cuts;
mod faults;
mod fences;
mod threads;

use std::io;
use std::sync::{Arc, Mutex};

use rand::Rng as _;
use rand::rngs::StdRng;

use super::*;
use crate::cow::{ChunkLayout, Overflow, Region, RegionId, Slot, SnapshotKey, Space};
use crate::disk::Disk;

/// A disk, and whether it is sparse.
type Given = (Arc<dyn Disk>, bool);

/// Difference storage over given disks.
#[derive(Debug)]
pub(super) struct Plain {
    space: Mutex<Space>,
    disks: Vec<Arc<dyn Disk>>,
}

impl Plain {
    fn new(disks: &[Given]) -> Arc<Self> {
        let all: Vec<_> = disks
            .iter()
            .map(|(disk, sparse)| ((Arc::clone(disk), *sparse), disk.size()))
            .collect();
        Self::with_room(&all)
    }

    /// Disks, whether they are sparse, and bytes that may be used in them.
    fn with_room(disks: &[(Given, u64)]) -> Arc<Self> {
        let (mut space, _) = Space::new(0);
        for ((disk, sparse), bytes) in disks {
            space.append(if *sparse {
                Region::sparse(disk.size(), *bytes)
            } else {
                Region::dense(0, *bytes)
            });
        }
        Arc::new(Self {
            space: Mutex::new(space),
            disks: disks.iter().map(|((disk, _), _)| Arc::clone(disk)).collect(),
        })
    }
}

impl DiffStorage for Plain {
    fn slot(&self, chunk: u64, first: u64) -> Result<Slot, Overflow> {
        self.space.lock().unwrap().slot(chunk, first)
    }

    fn extend(&self, slot: Slot, bytes: u64) -> Result<(), Overflow> {
        self.space.lock().unwrap().extend(slot, bytes)
    }

    fn retract(&self, slot: Slot, bytes: u64) {
        self.space.lock().unwrap().retract(slot, bytes);
    }

    fn disk(&self, region: RegionId) -> Arc<dyn Disk> {
        Arc::clone(&self.disks[region.index()])
    }

    fn flush(&self) -> io::Result<()> {
        self.disks.iter().try_for_each(|disk| disk.flush())
    }
}

/// Remembers what it was told.
#[derive(Debug, Default)]
pub(super) struct Told(Mutex<Vec<(i32, String)>>);

impl Told {
    fn errors(&self) -> Vec<(i32, String)> {
        self.0.lock().unwrap().clone()
    }
}

impl Broken for Told {
    fn broken(&self, errno: i32, what: &str) {
        self.0.lock().unwrap().push((errno, what.to_owned()));
    }
}

fn store(
    key: u64,
    storage: &Arc<Plain>,
    promise: Promise,
    journal: Option<journal::Journal>,
) -> (Arc<Store>, Arc<Told>) {
    let told = Arc::new(Told::default());
    let options = StoreOptions {
        promise,
        queue: 4,
        buffers: 2,
        journal,
        excluded: Vec::new(),
        free: None,
        broken: Arc::clone(&told) as _,
    };
    let store = Store::new(SnapshotKey(key), Arc::clone(storage) as _, options);
    (Arc::new(store), told)
}

/// 32 KiB chunks of 8 units, the last one short.
fn layout() -> ChunkLayout {
    ChunkLayout::new(4 * 32768 + 5 * 4096 + 1536, 15, 9)
}

/// Sectors somewhere on the device, mostly few.
fn range(rng: &mut StdRng, size: u64) -> (u64, usize) {
    let sectors = size / 512;
    let first = rng.random_range(0..sectors);
    let most = if rng.random_bool(0.1) { 200 } else { 12 };
    let count = rng.random_range(1..=(sectors - first).min(most));
    (first * 512, usize::try_from(count * 512).unwrap())
}

fn content(disk: &dyn Disk) -> Vec<u8> {
    let mut all = vec![0; usize::try_from(disk.size()).unwrap()];
    disk.read_at(&mut all, 0).unwrap();
    all
}

fn image_content(image: &Image) -> Result<Vec<u8>, ImageError> {
    let mut all = vec![0; usize::try_from(image.size()).unwrap()];
    image.read_at(&mut all, 0)?;
    Ok(all)
}

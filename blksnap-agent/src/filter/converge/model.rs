//! Model: disks in memory with writers whose data lands later than it is seen, and byte-exact checks.
//!
//! The [`World`] moves on by random steps whenever converge does anything with it, even between two sectors of a
//! read: writes are queued, land sector by sector in any order, and complete; somebody else closes periods and
//! takes snapshots. It keeps the books of the real tracker (bitmap, ledger, counters, change map, watches), and
//! knows the true content of every disk.

mod runs;
mod world;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::hook::{FreezeHook, HookError, Stage};
use super::tracked::{Quiesce, Tracked, Watch};
use crate::cbt::{Base, FullNeeded, ReadMap, ResetReason, Taken};
use crate::disk::{BlockDevice, DiskError, FreezeError};
use crate::engine::{Sink, Source};
use crate::sys::AlignedBuffer;
use crate::tracker::{DirtyBlocks, LedgerStatus, TrackerError};
use crate::units::{BlockSize, DeviceId, Extent, Generation, Sectors};
use world::{Content, SECTOR, World};

/// A world shared by all its users.
#[derive(Clone)]
struct Shared(Arc<Mutex<World>>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap()
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("World")
    }
}

/// One of its disks, tracked.
#[derive(Debug)]
struct Disk {
    world: Shared,
    index: usize,
    device: BlockDevice,
}

impl Disk {
    fn new(world: &Shared, index: usize) -> Arc<Self> {
        let id = DeviceId {
            major: 1,
            minor: u32::try_from(index).unwrap(),
        };
        let name = format!("model{index}");
        let path = PathBuf::from(format!("/dev/{name}"));
        let capacity = world.lock().capacity(index);
        Arc::new(Self {
            world: world.clone(),
            index,
            device: BlockDevice {
                path: path.clone(),
                name: name.clone(),
                id,
                disk_id: id,
                disk_name: name,
                disk_path: path,
                first_sector: Sectors::new(0),
                capacity,
                logical_block: 512,
                physical_block: 512,
                minimum_io: 512,
                diskseq: None,
                read_only: false,
            },
        })
    }
}

impl Tracked for Disk {
    fn device(&self) -> &BlockDevice {
        &self.device
    }

    fn block_size(&self) -> BlockSize {
        world::block()
    }

    fn watch(self: Arc<Self>) -> Result<Box<dyn Watch>, TrackerError> {
        let mut world = self.world.lock();
        world.steps(3);
        let number = world.start_watch(self.index);
        drop(world);
        Ok(Box::new(DiskWatch { disk: self, number }))
    }

    fn source(&self) -> Result<Box<dyn Source>, DiskError> {
        Ok(Box::new(DiskSource {
            world: self.world.clone(),
            index: self.index,
            name: self.device.name.clone(),
        }))
    }

    fn changed_since(&self, base: &Base) -> Result<Vec<Extent>, FullNeeded> {
        let mut world = self.world.lock();
        world.steps(3);
        Ok(world.map(self.index).live_map()?.changed_since(base)?.collect())
    }

    fn doubt(&self) -> Option<ResetReason> {
        let mut world = self.world.lock();
        world.steps(1);
        world.map(self.index).corrupted()
    }

    fn take(&self) -> Result<(Taken, Option<Arc<ReadMap>>), TrackerError> {
        let mut world = self.world.lock();
        world.steps(2);
        world.interfere(self.index);
        let taken = world.take(self.index);
        let read_map = world.map(self.index).read_map();
        world.steps(2);
        Ok((taken, read_map))
    }

    fn keep(&self) -> Result<(), TrackerError> {
        Ok(())
    }

    fn mark(&self, dirty: &DirtyBlocks) {
        let mut world = self.world.lock();
        world.steps(2);
        world.map(self.index).mark_bits(dirty.words());
    }

    fn driver_writes(&self) -> Result<u64, DiskError> {
        let mut world = self.world.lock();
        // Asked again and again, with a pause between.
        world.steps(30);
        Ok(world.in_driver(self.index))
    }

    fn sync_node(&self) -> Result<(), FreezeError> {
        self.world.lock().steps(4);
        Ok(())
    }
}

#[derive(Debug)]
struct DiskWatch {
    disk: Arc<Disk>,
    number: usize,
}

impl Watch for DiskWatch {
    fn close_period(&self) -> Result<DirtyBlocks, TrackerError> {
        let mut world = self.disk.world.lock();
        world.steps(3);
        world.close(self.disk.index);
        // Between the end of the period and what the caller learns of it.
        world.steps(3);
        Ok(world.drain(self.disk.index, self.number))
    }

    fn is_clean(&self) -> bool {
        let mut world = self.disk.world.lock();
        world.steps(2);
        let clean = world.is_clean(self.disk.index, self.number);
        world.steps(2);
        clean
    }

    fn drain(&self) -> DirtyBlocks {
        let mut world = self.disk.world.lock();
        world.steps(1);
        world.drain(self.disk.index, self.number)
    }

    fn status(&self) -> Result<LedgerStatus, TrackerError> {
        let mut world = self.disk.world.lock();
        world.steps(10);
        Ok(world.status(self.disk.index))
    }
}

impl Drop for DiskWatch {
    fn drop(&mut self) {
        let mut world = self.disk.world.lock();
        world.steps(2);
        world.stop_watch(self.disk.index, self.number);
    }
}

#[derive(Debug)]
struct DiskSource {
    world: Shared,
    index: usize,
    name: String,
}

impl Source for DiskSource {
    fn name(&self) -> &str {
        &self.name
    }

    fn aligned(&self, extent: Extent) -> Extent {
        extent
    }

    fn read(&self, buffer: &mut AlignedBuffer, offset: u64, length: usize) -> io::Result<()> {
        let first = usize::try_from(offset).unwrap() / SECTOR;
        let sectors = buffer.as_mut_slice()[..length].chunks_mut(SECTOR).enumerate();
        for (index, bytes) in sectors {
            let mut world = self.world.lock();
            // The disk goes on while it is read.
            world.steps(1);
            bytes.copy_from_slice(&world.sector(self.index, first + index));
        }
        Ok(())
    }

    fn raw(&self, _offset: u64) -> Option<(BorrowedFd<'_>, u64)> {
        None
    }
}

/// A sink in memory, full after a number of bytes.
#[derive(Clone, Debug)]
struct Memory {
    bytes: Arc<Mutex<Content>>,
    left: Arc<Mutex<u64>>,
}

impl Memory {
    fn new(length: usize, space: u64) -> Self {
        Self {
            bytes: Arc::new(Mutex::new(vec![0xee; length])),
            left: Arc::new(Mutex::new(space)),
        }
    }

    fn put(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut left = self.left.lock().unwrap();
        *left = left
            .checked_sub(data.len() as u64)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))?;
        let offset = usize::try_from(offset).unwrap();
        self.bytes.lock().unwrap()[offset..offset + data.len()].copy_from_slice(data);
        Ok(())
    }
}

impl Sink for Memory {
    fn name(&self) -> String {
        "memory".to_owned()
    }

    fn length(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.put(offset, data)
    }

    fn zero_at(&self, offset: u64, length: u64) -> io::Result<()> {
        self.put(offset, &vec![0; usize::try_from(length).unwrap()])
    }
}

/// Freezes the disks that have a file system.
#[derive(Debug)]
struct ModelFreezer {
    world: Shared,
    frozen: bool,
}

impl ModelFreezer {
    fn new(world: &Shared) -> Self {
        Self {
            world: world.clone(),
            frozen: false,
        }
    }
}

impl Quiesce for ModelFreezer {
    fn hold(&self, _file: &File) -> Result<Option<PathBuf>, DiskError> {
        Ok(None)
    }

    fn arm(&mut self) -> Result<(), FreezeError> {
        Ok(())
    }

    fn sync(&self) -> Result<(), FreezeError> {
        self.world.lock().sync();
        Ok(())
    }

    fn freeze(&mut self, _limit: Duration) -> Result<(), FreezeError> {
        let mut world = self.world.lock();
        if world.freeze() {
            self.frozen = true;
            return Ok(());
        }
        Err(FreezeError::Freeze {
            mountpoint: "/model".into(),
            source: io::Error::from_raw_os_error(libc::EIO),
        })
    }

    fn thaw(&mut self) -> Result<Duration, FreezeError> {
        if !std::mem::take(&mut self.frozen) || self.world.lock().thaw() {
            return Ok(Duration::from_millis(1));
        }
        Err(FreezeError::ThawedEarly {
            mountpoint: "/model".into(),
        })
    }

    fn froze(&self, device: DeviceId) -> bool {
        self.world.lock().has_file_system(device.minor as usize)
    }
}

impl Drop for ModelFreezer {
    fn drop(&mut self) {
        let _ = self.thaw();
    }
}

/// Keeps the content of all disks at the instant.
#[derive(Debug)]
struct Witness {
    world: Shared,
    seen: Mutex<Vec<Content>>,
    /// There were writes that not even the ledger knew.
    hidden: Mutex<bool>,
    fails: Option<Stage>,
}

impl Witness {
    fn new(world: &Shared) -> Self {
        Self {
            world: world.clone(),
            seen: Mutex::default(),
            hidden: Mutex::default(),
            fails: None,
        }
    }
}

impl FreezeHook for Witness {
    fn run(&self, stage: Stage, _devices: &[PathBuf], _deadline: Instant) -> Result<(), HookError> {
        let mut world = self.world.lock();
        world.steps(3);
        if stage == Stage::Frozen {
            *self.seen.lock().unwrap() = world.contents();
            *self.hidden.lock().unwrap() = (0..world.contents().len()).any(|disk| world.has_hidden(disk));
        }
        world.steps(3);
        if self.fails == Some(stage) {
            return Err(HookError::Late {
                program: "model".into(),
                stage: stage.argument(),
            });
        }
        Ok(())
    }
}

fn generation() -> Generation {
    Generation::new(uuid::Uuid::new_v4())
}

//! World: everything that outlives an agent, and what happens to it.

use rand::Rng as _;
use rand::rngs::StdRng;
use uuid::Uuid;

use crate::cbt::ResetReason;
use crate::disk::{DeviceIdentity, DiskError};
use crate::seal::counters::{Unprovable, WriteCounters};
use crate::seal::decide::Evidence;
use crate::seal::fingerprint::{Content, ContentDiffers, Fingerprint};
use crate::seal::record::{Record, SavedGranularity};
use crate::sys::AlignedBuffer;
use crate::units::{Generation, Sectors};

/// Sectors of a tracking block.
pub(super) const BLOCK: usize = 8;

/// Sectors that no fingerprint looks at.
pub(super) const BLIND: usize = 64;

/// The tracking block of a sector.
pub(super) const fn block_of(sector: usize) -> usize {
    sector / BLOCK
}

/// The tracking blocks of a range.
pub(super) const fn blocks_of(start: usize, count: usize) -> std::ops::RangeInclusive<usize> {
    block_of(start)..=block_of(start + count - 1)
}

/// A bit per block.
pub(super) type Bits = Vec<u64>;

pub(super) fn bits(sectors: usize) -> Bits {
    vec![0; sectors.div_ceil(BLOCK).div_ceil(64)]
}

pub(super) fn merge(into: &mut Bits, from: &Bits) {
    into.resize(into.len().max(from.len()), 0);
    for (into, from) in into.iter_mut().zip(from) {
        *into |= from;
    }
}

/// What the kernel keeps of a tracked device.
#[derive(Clone, Debug)]
pub(super) struct Tracked {
    /// Sectors that the bitmaps cover.
    pub(super) capacity: usize,
    pub(super) open: Bits,
    /// Closed, and not among the pending ones yet.
    pub(super) closed: Vec<Bits>,
    /// Blocks that no document may have.
    pub(super) pending: Vec<Bits>,
    /// Runs that the hook missed.
    pub(super) missed: u64,
}

/// What happens between two boots, or before the agent starts, that should be noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Offline {
    Nothing,
    /// Another system wrote to the device.
    Foreign,
    /// A boot without agent, in which it was written to.
    Skipped,
    /// A boot in which the agent ended as it started, and the device was written where no fingerprint looks.
    Failed,
    /// Another disk is there.
    Replaced,
    /// The disk shows an earlier state of itself.
    Reverted,
    Resized,
    /// The seal lost its end.
    Cut,
    /// A bit of the seal is wrong.
    Flipped,
    /// The seal is of another version.
    Version,
}

impl Offline {
    pub(super) fn any(random: &mut StdRng) -> Self {
        [
            Self::Foreign,
            Self::Skipped,
            Self::Failed,
            Self::Replaced,
            Self::Reverted,
            Self::Resized,
            Self::Cut,
            Self::Flipped,
            Self::Version,
        ][random.random_range(0..9)]
    }

    /// The reason that the next generation should have, if something more precise can be told than that there is no
    /// proof.
    pub(super) const fn reason(self) -> Option<ResetReason> {
        match self {
            Self::Nothing | Self::Foreign | Self::Skipped | Self::Failed | Self::Reverted => None,
            Self::Replaced => Some(ResetReason::DeviceReplaced),
            Self::Resized => Some(ResetReason::Resized),
            Self::Cut | Self::Flipped => Some(ResetReason::StateDamaged),
            Self::Version => Some(ResetReason::StateVersion),
        }
    }
}

/// Bytes, counters, bitmaps and files.
pub(super) struct World {
    /// What each sector has: a number of its own for each write.
    sectors: Vec<u64>,
    /// An earlier state, for a disk that goes back to one.
    earlier: Vec<u64>,
    counter: u64,
    boot: u64,
    serial: u64,
    stat: WriteCounters,
    /// Boots in which an agent started: the last one, and the one before.
    entered: (u64, u64),
    generations: u128,
    /// What is in the kernel of a device that is tracked.
    pub(super) tracked: Option<Tracked>,
    /// The document for the next agent, gone with a reboot.
    pub(super) document: Option<Vec<u8>>,
    /// The state directory.
    pub(super) record: Option<Record>,
    pub(super) seal: Option<Vec<u8>>,
    /// After how many steps the agent is killed.
    pub(super) kill_after: Option<u32>,
}

impl World {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            sectors: vec![0; capacity],
            earlier: vec![0; capacity],
            counter: 0,
            boot: 1,
            serial: 1,
            stat: WriteCounters::default(),
            entered: (0, 0),
            generations: 0,
            tracked: None,
            document: None,
            record: None,
            seal: None,
            kill_after: None,
        }
    }

    pub(super) fn capacity(&self) -> usize {
        self.sectors.len()
    }

    pub(super) fn sectors(&self) -> &[u64] {
        &self.sectors
    }

    pub(super) fn boot_name(&self) -> String {
        self.boot.to_string()
    }

    /// A number that was never used before.
    pub(super) fn next(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    pub(super) fn fresh(&mut self) -> Generation {
        self.generations += 1;
        Generation::new(Uuid::from_u128(self.generations))
    }

    /// Whether the agent lives to do its next step.
    pub(super) fn lives(&mut self) -> bool {
        match &mut self.kill_after {
            None => true,
            Some(0) => {
                self.kill_after = None;
                false
            }
            Some(steps) => {
                *steps -= 1;
                true
            }
        }
    }

    fn change(&mut self, start: usize, count: usize) {
        for at in start..start + count {
            self.sectors[at] = self.next();
        }
    }

    /// A write through this system: it is counted, and the hook sees it if there is one.
    pub(super) fn write(&mut self, start: usize, count: usize) {
        self.change(start, count);
        self.stat.writes += 1;
        self.stat.sectors += count as u64;
        if let Some(tracked) = &mut self.tracked {
            for block in blocks_of(start, count) {
                // Past the end of the bitmap there is nothing to set: the capacity gives it away.
                if block * BLOCK < tracked.capacity {
                    tracked.open[block / 64] |= 1 << (block % 64);
                }
            }
        }
    }

    /// A write that the hook missed, and counted as missed.
    pub(super) fn miss(&mut self, start: usize) {
        self.change(start, 1);
        self.stat.writes += 1;
        if let Some(tracked) = &mut self.tracked {
            tracked.missed += 1;
        }
    }

    /// For the oracle, blocks that a client asks for differ from what they were.
    pub(super) fn asked_for(&mut self, start: usize, count: usize) {
        let end = self.capacity();
        for block in blocks_of(start, count) {
            let first = block * BLOCK;
            self.change(first, BLOCK.min(end - first));
        }
    }

    pub(super) fn resize(&mut self, capacity: usize) {
        self.sectors.resize(capacity, 0);
    }

    /// The system ends and another one begins.
    pub(super) fn reboot(&mut self, offline: Offline, random: &mut StdRng) {
        self.tracked = None;
        self.document = None;
        self.kill_after = None;
        self.boot += 1;
        self.stat = WriteCounters::default();
        let spoil = |seal: &mut Option<Vec<u8>>, act: fn(&mut Vec<u8>, usize), at: usize| {
            if let Some(seal) = seal {
                let at = at % seal.len();
                act(seal, at);
            }
        };
        match offline {
            Offline::Nothing => {}
            Offline::Foreign => self.change(random.random_range(BLIND..self.sectors.len()), 1),
            Offline::Skipped => {
                self.change(random.random_range(BLIND..self.sectors.len()), 1);
                self.boot += 1;
            }
            Offline::Failed => {
                self.enter();
                self.change(random.random_range(0..self.sectors.len()), 1);
                self.boot += 1;
            }
            Offline::Replaced => {
                self.serial += 1;
                self.change(0, self.sectors.len());
            }
            Offline::Reverted => {
                let length = self.sectors.len();
                self.sectors.clone_from(&self.earlier);
                self.sectors.resize(length, 0);
                // Where that is the state it has, something else differs.
                self.change(BLIND + length / 2, 1);
            }
            Offline::Resized => {
                let other = self.sectors.len() + random.random_range(1..50_usize);
                self.resize(other);
            }
            Offline::Cut => spoil(&mut self.seal, Vec::truncate, random.random_range(0..1 << 20)),
            Offline::Flipped => spoil(
                &mut self.seal,
                |seal, at| seal[at] ^= 0x10,
                random.random_range(0..1 << 20),
            ),
            // The version of the format, and the checksum over it.
            Offline::Version => spoil(
                &mut self.seal,
                |seal, _| {
                    seal[12] ^= 0x40;
                    let sum = crc32c::crc32c(&seal[..60]);
                    seal[60..64].copy_from_slice(&sum.to_le_bytes());
                },
                0,
            ),
        }
        if random.random_bool(0.3) {
            self.earlier.clone_from(&self.sectors);
        }
    }

    /// An agent starts.
    pub(super) fn enter(&mut self) {
        if self.entered.0 != self.boot {
            self.entered = (self.boot, self.entered.0);
        }
    }

    /// The record that the device would have.
    pub(super) fn new_record(&self) -> Record {
        Record {
            name: Uuid::from_u128(1),
            path: "/dev/sda".into(),
            identity: self.identity_now(),
            granularity: SavedGranularity::Fixed(4096),
        }
    }

    pub(super) fn identity_now(&self) -> DeviceIdentity {
        DeviceIdentity {
            wwid: None,
            serial: Some(self.serial.to_string()),
            model: None,
            dm_uuid: None,
            md_uuid: None,
            backing_file: None,
            partition: None,
            capacity: Sectors::new(self.capacity() as u64),
            logical_block: 512,
        }
    }
}

impl Evidence for World {
    fn boot(&self) -> Option<String> {
        Some(self.boot_name())
    }

    fn boot_before(&self) -> Option<String> {
        Some(self.entered.1.to_string())
    }

    fn identity(&self) -> Result<DeviceIdentity, DiskError> {
        Ok(self.identity_now())
    }

    fn written(&self) -> Result<Vec<(String, WriteCounters)>, Unprovable> {
        Ok(vec![("sda".to_owned(), self.stat)])
    }

    fn content(&self, fingerprint: &Fingerprint) -> Result<(), ContentDiffers> {
        fingerprint.check(self)
    }
}

impl Content for World {
    fn length(&self) -> u64 {
        self.capacity() as u64 * 512
    }

    fn read(&self, buffer: &mut AlignedBuffer, offset: u64, length: usize) -> std::io::Result<()> {
        let first = usize::try_from(offset / 512).unwrap();
        let (sectors, _) = buffer.as_mut_slice()[..length].as_chunks_mut::<512>();
        for (at, bytes) in (first..).zip(sectors.iter_mut()) {
            let sector = if at < BLIND { 0 } else { self.sectors[at] };
            bytes[..8].copy_from_slice(&sector.to_le_bytes());
        }
        Ok(())
    }
}

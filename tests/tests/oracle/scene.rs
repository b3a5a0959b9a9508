//! Scene: a loop device, the tracked parts of it, and the comparison of its file with what they report.
//!
//! # When a round ends
//! All that was written must have landed, and nothing may be written while the file is read. File systems are
//! frozen, raw nodes were synced by their writers; then the periods are closed, the disk is seen without a write in
//! flight, the file is read, and the periods are closed once more. Only if nothing was written between the two
//! closes is the file what the map speaks of; otherwise that is done again.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use blksnap_agent::cbt::{Base, CbtMap, ReadMap, ResetReason};
use blksnap_agent::disk::{BlockDevice, FileSystems, Freezer, WatchdogCommand};
use blksnap_agent::tracker::{DirtyBlocks, Granularity, TrackedDevice, Tracker, TrackerConfig};
use blksnap_agent::units::{BlockSize, Extent};
use blksnap_tests::{LoopDevice, LoopOptions, agent_binary, lab};

/// The unit of the comparison.
const SECTOR: usize = 512;
/// What is read at a time.
const CHUNK: usize = 1 << 20;
/// Bound against hanging for ever, not a measurement.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often a round may find that something was written while it compared.
const ATTEMPTS: u32 = 100;

/// What goes on beside the writers of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum During {
    /// Nothing.
    Nothing,
    /// Periods are closed all the time.
    Close,
    /// The thread that drains the ring is held up.
    KeepRingFull,
}

/// A tracked part of the disk.
struct Slot {
    device: Arc<TrackedDevice>,
    /// The take that the next round is compared with.
    base: Base,
    /// Blocks of all periods closed since.
    closed: DirtyBlocks,
}

/// What the map of a slot reports for a round.
struct Reported {
    /// First byte of the slot on the disk.
    start: u64,
    block_size: u64,
    /// By block.
    blocks: Vec<bool>,
}

impl Reported {
    /// Whether the byte of the disk is in a reported block; `None` if it is not in this slot.
    fn covers(&self, byte: u64, end: u64) -> Option<bool> {
        let within = byte.checked_sub(self.start)?;
        if byte >= end {
            return None;
        }
        let block = usize::try_from(within / self.block_size).ok()?;
        self.blocks.get(block).copied()
    }
}

/// Where the file is not as it was.
#[derive(Default)]
struct Differences {
    /// First byte of each sector that differs.
    sectors: Vec<u64>,
    /// What is to be remembered: first byte and content.
    chunks: Vec<(usize, Vec<u8>)>,
}

/// Sums over all rounds.
#[derive(Default)]
struct Totals {
    rounds: u64,
    changed_sectors: u64,
    reported_bytes: u64,
    /// Maps that began anew in place of a report, as the kernel had skipped programs.
    missed: u64,
}

/// The disk and what is tracked of it.
pub(crate) struct Scene {
    tracker: Arc<Tracker>,
    slots: Vec<Slot>,
    disk: LoopDevice,
    image: File,
    /// The content at the end of the last round.
    before: Vec<u8>,
    totals: Totals,
}

impl Scene {
    /// A loop device of `bytes` bytes, and a tracker with a ring of `ring_bytes`.
    pub(crate) fn new(bytes: u64, options: &LoopOptions, ring_bytes: u32) -> Result<Self> {
        let tracker = Tracker::load(&TrackerConfig {
            ring_bytes,
            ..TrackerConfig::default()
        })?;
        let disk = LoopDevice::with_options(bytes, options)?;
        Ok(Self {
            tracker,
            slots: Vec::new(),
            image: File::open(disk.image())?,
            disk,
            before: vec![0; usize::try_from(bytes)?],
            totals: Totals::default(),
        })
    }

    /// The loop device.
    pub(crate) fn disk(&self) -> &LoopDevice {
        &self.disk
    }

    /// Tracks `path` in blocks of `block_size` bytes.
    pub(crate) fn attach(&mut self, path: &Path, block_size: u64) -> Result<()> {
        let granularity = Granularity::Fixed(BlockSize::from_bytes(block_size)?);
        let device = self.tracker.attach(BlockDevice::open(path)?, granularity)?;
        let base = Base {
            generation: device.with_map(CbtMap::generation),
            number: 0,
        };
        self.slots.push(Slot {
            device,
            base,
            closed: DirtyBlocks::default(),
        });
        Ok(())
    }

    /// Takes all slots and the content as they are: the state before the first round.
    pub(crate) fn begin(&mut self) -> Result<()> {
        let mut before = std::mem::take(&mut self.before);
        self.image.read_exact_at(&mut before, 0)?;
        self.before = before;
        self.close_all()?;
        self.take_all().map(drop)
    }

    /// Mounts partition `number`.
    pub(crate) fn mount(&mut self, number: u32) -> Result<PathBuf> {
        self.disk.mount_partition(number)
    }

    /// Unmounts everything.
    pub(crate) fn unmount(&mut self) -> Result<()> {
        self.disk.unmount()
    }

    /// Operations by kind that slot `index` has seen.
    pub(crate) fn operations(&self, index: usize) -> Result<[u64; 6]> {
        Ok(self.slots[index].device.counters()?.ops)
    }

    /// Lets `write` write, and compares.
    pub(crate) fn round(&mut self, during: During, write: impl FnOnce() -> Result<()>) -> Result<()> {
        self.round_with(during, |_| write())
    }

    /// Lets `write` write, with the disk in its hands, and compares.
    pub(crate) fn round_with(
        &mut self,
        during: During,
        write: impl FnOnce(&mut LoopDevice) -> Result<()>,
    ) -> Result<()> {
        self.totals.rounds += 1;
        let round = self.totals.rounds;
        self.beside(during, write)
            .with_context(|| format!("round {round}: the writers failed"))?;
        self.compare()
            .with_context(|| format!("round {round}, {during:?}"))
    }

    /// Runs `write`, and what goes on beside it.
    fn beside(&mut self, during: During, write: impl FnOnce(&mut LoopDevice) -> Result<()>) -> Result<()> {
        let disk = &mut self.disk;
        let slots = &mut self.slots;
        match during {
            During::Nothing => write(disk),
            During::Close => {
                let over = AtomicBool::new(false);
                thread::scope(|scope| {
                    let closing = scope.spawn(|| -> Result<()> {
                        while !over.load(Ordering::Relaxed) {
                            for slot in &mut *slots {
                                slot.closed.union(&slot.device.close_period()?);
                            }
                            thread::sleep(Duration::from_millis(1));
                        }
                        Ok(())
                    });
                    let written = write(disk);
                    over.store(true, Ordering::Relaxed);
                    closing.join().expect("the closing thread panicked")?;
                    written
                })
            }
            During::KeepRingFull => {
                // Who holds the map of the first slot holds up the thread that drains the ring for all of them.
                let full_before = ring_full(slots)?;
                let holder = Arc::clone(&slots[0].device);
                let (held, is_held) = mpsc::channel::<()>();
                let (release, is_released) = mpsc::channel::<()>();
                let written = thread::scope(|scope| {
                    scope.spawn(move || {
                        holder.with_map(|_| {
                            drop(held);
                            // Ends when the sender is dropped, also by a panic.
                            let _ = is_released.recv();
                        });
                    });
                    let _ = is_held.recv();
                    let written = write(disk);
                    drop(release);
                    written
                });
                written?;
                ensure!(ring_full(slots)? > full_before, "the ring was not full");
                Ok(())
            }
        }
    }

    /// Ends a round, see the module's page.
    fn compare(&mut self) -> Result<()> {
        let devices: Vec<BlockDevice> = self.slots.iter().map(|s| s.device.device().clone()).collect();
        let file_systems = FileSystems::on(&devices.iter().collect::<Vec<_>>())?;
        let mut freezer = Freezer::new(
            file_systems,
            WatchdogCommand {
                program: agent_binary()?,
                arguments: vec!["thaw-watchdog".into()],
            },
        );
        freezer.freeze(PATIENCE)?;
        let mut attempts = 0;
        let differences = loop {
            attempts += 1;
            ensure!(attempts <= ATTEMPTS, "something writes to the disk all the time");
            self.close_all()?;
            self.wait_until_idle()?;
            let differences = self.differences()?;
            if self.close_all()? {
                break differences;
            }
        };
        let reported = self.take_all()?;
        freezer.thaw()?;
        for (start, new) in differences.chunks {
            self.before[start..start + new.len()].copy_from_slice(&new);
        }
        self.totals.changed_sectors += differences.sectors.len() as u64;
        self.totals.missed += reported.iter().filter(|reported| reported.is_none()).count() as u64;
        self.totals.reported_bytes += reported
            .iter()
            .flatten()
            .map(|slot| slot.blocks.iter().filter(|dirty| **dirty).count() as u64 * slot.block_size)
            .sum::<u64>();
        for sector in differences.sectors {
            for (slot, reported) in self.slots.iter().zip(&reported) {
                let Some(reported) = reported else { continue };
                let end = reported.start + slot.device.device().capacity.bytes();
                ensure!(
                    reported.covers(sector, end) != Some(false),
                    "byte {sector} of the disk changed, and {} does not report it",
                    slot.device.path().display()
                );
            }
        }
        Ok(())
    }

    /// Closes the period of every slot; `true` if none had a write.
    fn close_all(&mut self) -> Result<bool> {
        let mut quiet = true;
        for slot in &mut self.slots {
            let dirty = slot.device.close_period()?;
            quiet &= dirty.is_empty();
            slot.closed.union(&dirty);
        }
        Ok(quiet)
    }

    /// Waits until no write is in flight: the second number of the disk's `inflight` in sysfs.
    fn wait_until_idle(&self) -> Result<()> {
        let path = format!("/sys/block/{}/inflight", self.disk.name());
        for _ in 0..PATIENCE.as_millis() {
            let text = fs::read_to_string(&path)?;
            if text.split_whitespace().nth(1) == Some("0") {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(1));
        }
        bail!("writes to {} do not end", self.disk.name())
    }

    /// Compares the file with what it was.
    fn differences(&self) -> Result<Differences> {
        let mut found = Differences::default();
        let mut chunk = vec![0; CHUNK];
        for (index, old) in self.before.chunks(CHUNK).enumerate() {
            let start = index * CHUNK;
            let new = &mut chunk[..old.len()];
            self.image.read_exact_at(new, start as u64)?;
            if new == old {
                continue;
            }
            let sectors = new.chunks(SECTOR).zip(old.chunks(SECTOR)).enumerate();
            let differing = sectors.filter(|(_, (new, old))| new != old);
            found
                .sectors
                .extend(differing.map(|(number, _)| (start + number * SECTOR) as u64));
            found.chunks.push((start, new.to_vec()));
        }
        Ok(found)
    }

    /// Takes every slot, its period closed, and gives what it reports since its base.
    fn take_all(&mut self) -> Result<Vec<Option<Reported>>> {
        self.slots.iter_mut().map(Slot::take).collect()
    }

    /// Prints the sums, and makes sure that the comparison had something to find.
    pub(crate) fn report(&self, name: &str) -> Result<()> {
        let Totals {
            rounds,
            changed_sectors,
            reported_bytes,
            missed,
        } = self.totals;
        for slot in &self.slots {
            println!(
                "{name}: {}: {:?}",
                slot.device.path().display(),
                slot.device.counters()?
            );
        }
        println!(
            "{name}: {rounds} rounds, {changed_sectors} sectors changed, {} MiB reported, {missed} maps began anew",
            reported_bytes >> 20
        );
        let maps = rounds * self.slots.len() as u64;
        if missed == maps {
            return lab::absent("it skipped programs in every round (`run_missed`), and every map said so");
        }
        let all = (maps - missed) * self.before.len() as u64;
        ensure!(changed_sectors > 0, "nothing changed");
        ensure!(
            reported_bytes < all / 2,
            "so much was reported that nothing could be missed"
        );
        Ok(())
    }
}

/// How often a record of any slot found the ring full.
fn ring_full(slots: &[Slot]) -> Result<u64> {
    slots
        .iter()
        .map(|slot| Ok(slot.device.counters()?.ring_full))
        .sum()
}

impl Slot {
    /// Takes the map; the extents must be those of the closed periods, and no others. A guest's kernel may skip programs
    /// where it preempts others: a map that says so reports nothing, and begins anew.
    fn take(&mut self) -> Result<Option<Reported>> {
        let name = self.device.path().display().to_string();
        let (taken, read_map) = self.device.take()?;
        if taken.reset == Some(ResetReason::RunMissed) && lab::inside().is_ok() {
            self.closed = DirtyBlocks::default();
            self.base = Base {
                generation: taken.generation,
                number: taken.number,
            };
            return Ok(None);
        }
        ensure!(taken.reset.is_none(), "{name}: the map started over: {taken:?}");
        let read_map: Arc<ReadMap> = read_map.with_context(|| format!("{name} has no read map"))?;
        let since: Vec<Extent> = read_map.changed_since(&self.base)?.collect();
        let last: Vec<Extent> = read_map.changed_in_last()?.collect();
        ensure!(
            since == last,
            "{name}: since the last take is not in the last period"
        );
        let block_size = self.device.block_size();
        let device = self.device.device();
        let closed: Vec<Extent> = std::mem::take(&mut self.closed)
            .extents(block_size, device.capacity)
            .collect();
        if let Some((map, period)) = since.iter().zip(&closed).find(|(map, period)| map != period) {
            bail!("{name}: the map reports {map:?}, the closed periods had {period:?}");
        }
        ensure!(
            since.len() == closed.len(),
            "{name}: the map reports {} extents, the closed periods had {}",
            since.len(),
            closed.len()
        );
        self.base = read_map.base();
        let mut blocks = vec![false; usize::try_from(block_size.blocks_in(device.capacity))?];
        for extent in since {
            let first = usize::try_from(extent.offset >> block_size.shift())?;
            let end = usize::try_from(extent.end().div_ceil(block_size.bytes()))?;
            blocks[first..end].fill(true);
        }
        Ok(Some(Reported {
            start: device.first_sector.bytes(),
            block_size: block_size.bytes(),
            blocks,
        }))
    }
}

//! Scene: a disk with known bytes, a gate before it, and writers.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use blksnap_agent::cow::{ChunkParams, RegionId, Slot, SnapshotKey};
use blksnap_agent::disk::{BlockDevice, Disk};
use blksnap_agent::engine::cow::{Broken, DiffStorage, Image, Promise, Store, StoreOptions};
use blksnap_agent::filter::gate::park::{self, ParkerCommand};
use blksnap_agent::filter::gate::{Availability, Gate, GateOptions, Gates, Member, Preemption, Wish};
use blksnap_agent::storage::{Pool, PoolOptions, StorageSpec};
use blksnap_agent::sys::AlignedBuffer;
use blksnap_tests::{agent_binary, fill_device, lab, seed};
use rand::rngs::StdRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};

pub(crate) const MIB: u64 = 1 << 20;
const PIECE: usize = 1 << 20;

/// A partition of `length` bytes on the guest's first disk.
pub(crate) fn partition(length: u64) -> Result<PathBuf> {
    lab::partition(&lab::virtio(0)?, 1, MIB, length)
}

/// Makes sure that writers can wait here; a kernel that can change how it is preempted is told to, unless they sleep.
fn need_gate(options: &GateOptions) -> Result<()> {
    let park = match options.technique {
        Wish::Spin => None,
        Wish::Auto | Wish::Park => Some(Availability::check_park(options)),
    };
    match park {
        Some(Ok(())) => return Ok(()),
        Some(Err(error)) if options.technique == Wish::Park => return lab::absent(error),
        Some(Err(_)) | None => {}
    }
    if !Preemption::now().can_spin() {
        // A kernel that can't says so below.
        let _ = std::fs::write("/sys/kernel/debug/sched/preempt", "full");
    }
    match Availability::find(options).lacks() {
        None => Ok(()),
        Some(what) if what.contains("preempt") => lab::absent(what),
        Some(what) => bail!("{what}"),
    }
}

/// Counts what it is told.
#[derive(Debug, Default)]
struct Told(Arc<AtomicU64>);

impl Broken for Told {
    fn broken(&self, errno: i32, what: &str) {
        println!("lost: {errno}: {what}");
        self.0.fetch_add(1, Ordering::AcqRel);
    }
}

/// Storage that takes its time.
#[derive(Debug)]
struct Slow {
    pool: Pool,
    pause: Duration,
}

impl DiffStorage for Slow {
    fn slot(&self, chunk: u64, first: u64) -> Result<Slot, blksnap_agent::cow::Overflow> {
        std::thread::sleep(self.pause);
        self.pool.slot(chunk, first)
    }

    fn extend(&self, slot: Slot, bytes: u64) -> Result<(), blksnap_agent::cow::Overflow> {
        self.pool.extend(slot, bytes)
    }

    fn retract(&self, slot: Slot, bytes: u64) {
        self.pool.retract(slot, bytes);
    }

    fn disk(&self, region: RegionId) -> Arc<dyn Disk> {
        self.pool.disk(region)
    }

    fn flush(&self) -> std::io::Result<()> {
        self.pool.flush()
    }
}

pub(crate) struct Scene {
    gate: Arc<Gate>,
    node: PathBuf,
    content: Vec<u8>,
    seed: u64,
    told: Arc<AtomicU64>,
}

/// With the agent as the parker: this program is none.
fn with_parker(options: GateOptions) -> Result<GateOptions> {
    Ok(GateOptions {
        parker: ParkerCommand {
            program: agent_binary()?,
            arguments: vec![park::SUBCOMMAND.into()],
        },
        ..options
    })
}

static KEYS: AtomicU64 = AtomicU64::new(1);

impl Scene {
    pub(crate) fn new(node: &Path, options: GateOptions) -> Result<Self> {
        lab::inside()?;
        let options = with_parker(options)?;
        need_gate(&options)?;
        Self::made(node, options)
    }

    /// As [`Scene::new`], on a kernel on which writers may wait in vain.
    pub(crate) fn without_preemption(node: &Path, options: GateOptions) -> Result<Self> {
        Self::made(node, with_parker(options)?)
    }

    fn made(node: &Path, options: GateOptions) -> Result<Self> {
        let seed = seed("gate");
        let device = BlockDevice::open(node)?;
        // Of a large disk the beginning is enough.
        let content = fill_device(node, device.capacity.bytes().min(64 * MIB), seed)?;
        let started = Instant::now();
        let gate = Gates::new(options).gate(&device, &ChunkParams::default())?;
        println!("gate after {:?}: {:?}", started.elapsed(), gate.reading());
        Ok(Self {
            gate,
            node: node.to_owned(),
            content,
            seed,
            told: Arc::default(),
        })
    }

    pub(crate) fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    pub(crate) fn told(&self) -> &AtomicU64 {
        &self.told
    }

    /// Takes the device, with storage in memory.
    pub(crate) fn take(&self) -> Result<Image> {
        self.take_slowly(Duration::ZERO)
    }

    pub(crate) fn take_slowly(&self, pause: Duration) -> Result<Image> {
        let pool = Pool::new(PoolOptions::default(), Arc::new(|_| {}));
        pool.append(&StorageSpec::Memory { limit: 512 * MIB })?;
        let key = SnapshotKey(KEYS.fetch_add(1, Ordering::AcqRel));
        let options = StoreOptions {
            promise: Promise::AgentCrash,
            queue: 16,
            buffers: 128,
            journal: None,
            excluded: Vec::new(),
            free: None,
            broken: Arc::new(Told(Arc::clone(&self.told))),
        };
        let store = Store::new(key, Arc::new(Slow { pool, pause }), options);
        let member = Member {
            gate: Arc::clone(self.gate()),
            store: Arc::new(store),
        };
        let started = Instant::now();
        let mut images = Gates::take(&[member], || Ok(()))?;
        println!("taken in {:?}", started.elapsed());
        images.pop().context("no image")
    }

    pub(crate) fn release(&self, image: &Image) {
        self.gate().release(image.key());
    }

    /// Compares an image with what was on the device at first.
    pub(crate) fn compare(&self, image: &Image) -> Result<()> {
        self.compare_to(image, &self.content)
    }

    pub(crate) fn compare_to(&self, image: &Image, content: &[u8]) -> Result<()> {
        ensure!(image.size() >= content.len() as u64);
        let mut buffer = vec![0; PIECE];
        for (number, expected) in content.chunks(PIECE).enumerate() {
            let offset = (number * PIECE) as u64;
            let found = &mut buffer[..expected.len()];
            image.read_at(found, offset)?;
            if found != expected {
                let at = found.iter().zip(expected).position(|(a, b)| a != b);
                bail!(
                    "wrong byte at {} (seed {})",
                    offset + at.unwrap_or(0) as u64,
                    self.seed
                );
            }
        }
        Ok(())
    }

    /// What the device has now.
    pub(crate) fn read_device(&self) -> Result<Vec<u8>> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(&self.node)?;
        let mut buffer = AlignedBuffer::zeroed(PIECE);
        let mut content = Vec::with_capacity(self.content.len());
        for number in 0..self.content.len().div_ceil(PIECE) {
            let length = PIECE.min(self.content.len() - number * PIECE);
            file.read_exact_at(&mut buffer.as_mut_slice()[..length], (number * PIECE) as u64)?;
            content.extend_from_slice(&buffer.as_slice()[..length]);
        }
        Ok(content)
    }
}

/// Writers past the page cache.
pub(crate) struct Load {
    node: PathBuf,
    blocks: u64,
    seed: u64,
}

impl Load {
    pub(crate) fn new(scene: &Scene) -> Self {
        Self::on(&scene.node, scene.content.len() as u64, scene.seed)
    }

    /// On the first `length` bytes of a device.
    pub(crate) fn on(node: &Path, length: u64, seed: u64) -> Self {
        Self {
            node: node.to_owned(),
            blocks: length / 4096,
            seed,
        }
    }

    fn open(&self) -> Result<File> {
        Ok(OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(&self.node)?)
    }

    /// Writes other bytes than those at first.
    pub(crate) fn write(&self, offset: u64, length: usize) -> Result<()> {
        let mut buffer = AlignedBuffer::zeroed(length);
        buffer.as_mut_slice()[..length].fill(0xa5);
        self.open()?.write_all_at(&buffer.as_slice()[..length], offset)?;
        Ok(())
    }

    /// Random writes of 4 to 64 KiB by so many threads; gives how many there were.
    pub(crate) fn run(&self, threads: usize, time: Duration) -> Result<u64> {
        self.run_after(threads, time, || Ok(()))
    }

    /// The same; when all of them are about to write, `ready` is called first.
    pub(crate) fn run_after(
        &self,
        threads: usize,
        time: Duration,
        ready: impl FnOnce() -> Result<()>,
    ) -> Result<u64> {
        let (prepared, go) = (Barrier::new(threads + 1), Barrier::new(threads + 1));
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..threads as u64)
                .map(|number| {
                    let (prepared, go) = (&prepared, &go);
                    scope.spawn(move || {
                        let writer = self.writer(number);
                        prepared.wait();
                        go.wait();
                        writer?(Instant::now() + time)
                    })
                })
                .collect();
            prepared.wait();
            let ready = ready();
            go.wait();
            let mut sum = 0;
            for writer in writers {
                sum += writer.join().expect("a writer does not panic")?;
            }
            ready?;
            Ok(sum)
        })
    }

    /// Writes until the time that it is given.
    fn writer(&self, number: u64) -> Result<impl FnOnce(Instant) -> Result<u64> + use<>> {
        let mut random = StdRng::seed_from_u64(self.seed ^ number.wrapping_mul(0x9e37_79b9));
        let file = self.open()?;
        let mut buffer = AlignedBuffer::zeroed(64 << 10);
        random.fill_bytes(buffer.as_mut_slice());
        let all = self.blocks;
        Ok(move |until| {
            let mut written = 0;
            while Instant::now() < until {
                let blocks = if random.random_ratio(1, 8) {
                    random.random_range(1..=16)
                } else {
                    1
                };
                let first = random.random_range(0..=all - blocks);
                let length = usize::try_from(blocks * 4096)?;
                file.write_all_at(&buffer.as_slice()[..length], first * 4096)?;
                written += 1;
            }
            Ok(written)
        })
    }
}

//! Origin: a device of a kind, what was on it at the instant, and the gate before it.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, bail, ensure};
use blksnap_agent::cow::{ChunkParams, SnapshotKey};
use blksnap_agent::disk::BlockDevice;
use blksnap_agent::engine::cow::{Broken, Image, Promise, Store, StoreOptions};
use blksnap_agent::filter::gate::{Availability, Gate, GateOptions, Gates, Member, Preemption, Wish};
use blksnap_agent::storage::{Pool, PoolOptions, StorageSpec};
use blksnap_agent::sys::ioctl;
use blksnap_tests::{LoopDevice, fill_device, lab, read_device, run, unmount};
use tempfile::TempDir;

use super::MIB;

const PIECE: usize = 1 << 20;

/// What is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A partition of the first disk, raw.
    Partition,
    /// The second disk, raw. Its first 64 MiB are compared.
    Disk,
    /// A partition of the first disk with a mounted file system.
    FileSystem(&'static str),
}

/// The programs, loaded once for all cases of this process: a guest takes long for that.
static LOADED: Mutex<Option<(Arc<Gates>, Arc<Gate>)>> = Mutex::new(None);

static KEYS: AtomicU64 = AtomicU64::new(1);

/// All gates, and what was told of snapshots that are lost.
pub(crate) struct Held {
    gates: Arc<Gates>,
    told: Arc<AtomicU64>,
}

impl Held {
    pub(crate) fn new(options: GateOptions) -> Result<Self> {
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if loaded.is_none() {
            if options.technique == Wish::Spin && !Preemption::now().can_spin() {
                // A kernel that can't be changed says so below.
                let _ = std::fs::write("/sys/kernel/debug/sched/preempt", "full");
            }
            match Availability::find(&options).lacks() {
                None => {}
                Some(what) if what.contains("preempt") => return lab::absent(what),
                Some(what) => bail!("{what}"),
            }
            // What keeps the programs attached between the cases.
            let node = lab::partition(&lab::virtio(0)?, 9, 1000 * MIB, 8 * MIB)?;
            let gates = Arc::new(Gates::new(options));
            let anchor = gates.gate(&BlockDevice::open(&node)?, &ChunkParams::default())?;
            *loaded = Some((gates, anchor));
        }
        let (gates, _) = loaded.as_ref().context("loaded just now")?;
        Ok(Self {
            gates: Arc::clone(gates),
            told: Arc::default(),
        })
    }

    /// How often a snapshot was said to be lost.
    pub(crate) fn told(&self) -> u64 {
        self.told.load(Ordering::Acquire)
    }

    fn take(&self, gate: &Arc<Gate>, storage: &StorageSpec) -> Result<Image> {
        let pool = Pool::new(PoolOptions::default(), Arc::new(|_| {}));
        pool.append(storage)?;
        let options = StoreOptions {
            promise: Promise::AgentCrash,
            queue: 16,
            buffers: 128,
            journal: None,
            excluded: Vec::new(),
            free: None,
            broken: Arc::new(Told(Arc::clone(&self.told))),
        };
        let key = SnapshotKey(KEYS.fetch_add(1, Ordering::AcqRel));
        let member = Member {
            gate: Arc::clone(gate),
            store: Arc::new(Store::new(key, Arc::new(pool), options)),
        };
        let mut images = Gates::take(&[member], || Ok(()))?;
        images.pop().context("no image")
    }
}

#[derive(Debug)]
struct Told(Arc<AtomicU64>);

impl Broken for Told {
    fn broken(&self, errno: i32, what: &str) {
        println!("lost: {errno}: {what}");
        self.0.fetch_add(1, Ordering::AcqRel);
    }
}

/// A device that is held.
pub(crate) struct Origin {
    pub(crate) node: PathBuf,
    kind: Kind,
    mount: Option<TempDir>,
    /// What was on it at the instant, its beginning at least.
    content: Vec<u8>,
    gate: Option<Arc<Gate>>,
}

impl Origin {
    pub(crate) fn new(kind: Kind, size: u64, seed: u64) -> Result<Self> {
        let node = match kind {
            Kind::Disk => lab::virtio(1)?,
            Kind::Partition | Kind::FileSystem(_) => lab::partition(&lab::virtio(0)?, 1, MIB, size)?,
        };
        let mut origin = Self {
            node,
            kind,
            mount: None,
            content: Vec::new(),
            gate: None,
        };
        if let Kind::FileSystem(name) = kind {
            lab::load(name, &[]);
            LoopDevice::mkfs_on(&origin.node, name)?;
            let directory = tempfile::Builder::new().prefix("blksnap-held-").tempdir()?;
            run("mount", [origin.node.as_os_str(), directory.path().as_os_str()])?;
            origin.mount = Some(directory);
        } else {
            origin.content = fill_device(&origin.node, size, seed)?;
        }
        Ok(origin)
    }

    pub(crate) const fn is_file_system(&self) -> bool {
        matches!(self.kind, Kind::FileSystem(_))
    }

    /// Where its files are.
    pub(crate) fn directory(&self) -> Result<&Path> {
        Ok(self.mount.as_ref().context("no file system")?.path())
    }

    pub(crate) fn gate(&self) -> Result<Arc<Gate>> {
        self.gate.clone().context("it is not held")
    }

    /// Takes it. A file system is frozen, and its device copied meanwhile.
    pub(crate) fn take(&mut self, held: &Held, storage: StorageSpec) -> Result<Image> {
        let device = BlockDevice::open(&self.node)?;
        let gate = held.gates.gate(&device, &ChunkParams::default())?;
        self.gate = Some(Arc::clone(&gate));
        let frozen = match &self.mount {
            Some(directory) => Some(Frozen::new(directory.path())?),
            None => None,
        };
        if frozen.is_some() {
            self.content = read_device(&self.node)?;
        }
        let image = held.take(&gate, &storage)?;
        drop(frozen);
        Ok(image)
    }

    /// Compares the image with what was there at the instant.
    pub(crate) fn compare(&self, image: &Image) -> Result<()> {
        ensure!(!self.content.is_empty() && image.size() >= self.content.len() as u64);
        let mut buffer = vec![0; PIECE];
        for (number, expected) in self.content.chunks(PIECE).enumerate() {
            let offset = (number * PIECE) as u64;
            let found = &mut buffer[..expected.len()];
            image.read_at(found, offset)?;
            if found != expected {
                let at = found.iter().zip(expected).position(|(a, b)| a != b);
                bail!("wrong byte at {}", offset + at.unwrap_or(0) as u64);
            }
        }
        Ok(())
    }

    /// Takes the gate away, and looks whether the file system suffered.
    pub(crate) fn check(mut self) -> Result<()> {
        self.gate = None;
        let Some(directory) = self.mount.take() else {
            return Ok(());
        };
        unmount(directory.path())?;
        let node = self.node.as_os_str();
        match self.kind {
            Kind::FileSystem("xfs") => run("xfs_repair", [OsStr::new("-n"), node]),
            Kind::FileSystem("btrfs") => run("btrfs", [OsStr::new("check"), node]),
            _ => run("fsck.ext4", [OsStr::new("-fn"), node]),
        }
        .map(drop)
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        if let Some(directory) = &self.mount {
            // A load of a case that failed may still use it.
            let _ = unmount(directory.path());
        }
    }
}

/// A file system that takes no writes. Thawed when dropped.
struct Frozen(File);

impl Frozen {
    fn new(directory: &Path) -> Result<Self> {
        let file = File::open(directory)?;
        ioctl::fifreeze(&file)?;
        Ok(Self(file))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Err(errno) = ioctl::fithaw(&self.0) {
            println!("thaw: {errno}");
        }
    }
}

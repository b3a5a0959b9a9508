//! Tracker: the eBPF programs and what they record.
//!
//! Programs on the tracepoints of the block layer set one bit per tracking block and period in a bitmap that
//! this process maps; a record goes through a ring buffer when a block becomes dirty. The bitmap is the truth,
//! the ring only makes the change map current between takes: a full ring loses nothing, since the bitmap is read
//! again then. A thread drains the ring by a timer; no event wakes anybody up, which would cost several times
//! the rest of the event.
//!
//! [`Tracker`] owns programs and slots; a [`TrackedDevice`] is one attached device. Used by the filters, the
//! snapshots and the daemon.
//!
//! # What ends a generation
//! A program run that the kernel skipped, a map look-up that failed, a capacity that changed, a device that was
//! replaced, a hook that does not fire: [`TrackedDevice::check_doubt`]. The map then answers "full needed" with
//! the reason, rather than a list that may lack a block.

mod adopt;
mod bitmap;
mod btf;
mod device;
mod document;
mod empty;
mod error;
mod follow;
mod guards;
mod keep;
mod layout;
mod object;
mod periods;
mod pins;
mod probe;
pub mod record;
mod refusal;
pub mod selftest;
#[cfg(test)]
mod testing;
mod watch;

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::thread;
use std::time::{Duration, Instant};

use aya::maps::{MapData, RingBuf};
use blksnap_common::track::{MAX_SLOTS, RECORD_BYTES, RING_BYTES, SlotState};

pub use bitmap::DirtyBlocks;
pub(crate) use bitmap::new_words;
pub use btf::{BtfError, KernelBtf};
pub use device::{DeviceCounters, LedgerStatus, Lost, MarkError, TrackedDevice};
pub use empty::EmptyProgram;
pub use error::TrackerError;
pub use follow::Follow;
pub use layout::Layout;
pub use pins::{BPFFS, PinError, purge};
pub(crate) use probe::disk_kind;
pub(crate) use refusal::{one_line, verdict};
pub use watch::{DeviceWatch, Watch, Watched};

use crate::cbt::{CbtMap, ResetReason, TrackingParams};
use crate::disk::{BlockDevice, DiskError};
use crate::sys::mman::{self, SharedWords};
use crate::units::{BlockSize, DeviceId, Generation};
use object::{Loaded, Object};
use pins::Pins;

/// How often the ring is drained while events come.
const DRAIN_BUSY: Duration = Duration::from_millis(10);
/// How often it is looked at while none do.
const DRAIN_IDLE: Duration = Duration::from_millis(100);
/// How often doubt is looked for, where nothing else is said.
const DOUBT_INTERVAL: Duration = Duration::from_secs(1);

/// How the tracker is set up.
#[derive(Clone, Debug)]
pub struct TrackerConfig {
    /// Size of the event ring in bytes: a power of two, at least 4096.
    pub ring_bytes: u32,
    /// The kernel's type information.
    pub btf: PathBuf,
    /// Where tracking goes on without this process; `None` if it ends with it.
    pub keep: Option<KeepConfig>,
    /// How often doubt is looked for; it is at each take and before each answer anyway.
    pub doubt_interval: Duration,
    /// How often a device is read to see that the hook fires, where nothing else has shown it.
    pub self_test_interval: Duration,
}

/// Where tracking goes on while no agent runs.
#[derive(Clone, Debug)]
pub struct KeepConfig {
    /// Mount point of a BPF file system; one is mounted there where it is missing.
    pub bpffs: PathBuf,
    /// Directory of the devices' documents, made where it is missing. It must be on no device that is tracked: a
    /// take waits for its files while nothing else is frozen any more, but a file system out of space fails it.
    pub documents: PathBuf,
}

impl Default for TrackerConfig {
    fn default() -> Self {
        Self {
            ring_bytes: RING_BYTES,
            btf: PathBuf::from(KernelBtf::PATH),
            keep: None,
            doubt_interval: DOUBT_INTERVAL,
            self_test_interval: selftest::INTERVAL,
        }
    }
}

/// Size of the tracking blocks of a device.
#[derive(Clone, Copy, Debug)]
pub enum Granularity {
    /// By the capacity, as the parameters say.
    Adaptive(TrackingParams),
    /// This size.
    Fixed(BlockSize),
}

/// Words of a [`SlotState`].
const STATE_WORDS: usize = size_of::<SlotState>() / size_of::<u64>();

impl Granularity {
    /// The size for a device.
    #[must_use]
    pub fn block_size(&self, device: &BlockDevice) -> BlockSize {
        match self {
            Self::Adaptive(params) => params.block_size(device.capacity),
            Self::Fixed(size) => *size,
        }
    }
}

/// What devices and the drain thread share.
struct Shared {
    object: Mutex<Object>,
    /// `STATE`: a [`SlotState`] per slot, as words.
    state: SharedWords,
    /// Directory of the documents, where things are kept.
    documents: Option<PathBuf>,
    /// The kernel's number of map `BITMAPS`.
    instance: u32,
    /// The kernel's number of this agent's first steady program.
    programs: u32,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl Shared {
    fn object(&self) -> MutexGuard<'_, Object> {
        self.object.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot_state(&self, slot: u32) -> SlotState {
        let start = slot as usize * STATE_WORDS;
        let word = |i: usize| self.state.words()[start + i].load(std::sync::atomic::Ordering::Acquire);
        SlotState {
            ring_full: word(0),
            whole_device: word(1),
            errors: word(2),
            ledger_lost: word(3),
            unknown_completions: word(4),
            passthrough: word(5),
            period: word(6),
        }
    }

    /// Says which period of the slot is open.
    fn set_period(&self, slot: u32, period: u64) {
        let at = slot as usize * STATE_WORDS + offset_of!(SlotState, period) / size_of::<u64>();
        self.state.words()[at].store(period, std::sync::atomic::Ordering::Release);
    }
}

/// The loaded programs and all tracked devices.
#[derive(Debug)]
pub struct Tracker {
    shared: Arc<Shared>,
    devices: RwLock<Vec<Arc<TrackedDevice>>>,
    /// What an agent before tracked, and this one can't go on with.
    lost: Vec<Lost>,
    /// An agent of another version tracked devices until now.
    superseded: bool,
    /// One attach or detach at a time.
    changing: Mutex<()>,
    drain: Mutex<Option<thread::JoinHandle<()>>>,
}

impl Tracker {
    /// Loads the programs into the kernel and starts the thread that drains the ring. Devices that an agent before
    /// tracked are gone on with, where things are kept.
    ///
    /// # Errors
    /// No type information, no privilege, a kernel that refuses the programs, pins that another agent uses.
    pub fn load(config: &TrackerConfig) -> Result<Arc<Self>, TrackerError> {
        Self::load_adjusted(config, |_| {})
    }

    fn load_adjusted(
        config: &TrackerConfig,
        adjust: impl FnOnce(&mut Layout),
    ) -> Result<Arc<Self>, TrackerError> {
        let Loaded {
            object,
            ring,
            state,
            logger,
        } = Object::load(config, adjust)?;
        // The types of the kernel are not needed any more.
        mman::give_back();
        if let Some(keep) = &config.keep {
            prepare_documents(&keep.documents)?;
        }
        let shared = Arc::new(Shared {
            instance: object.instance(),
            programs: object.id(),
            object: Mutex::new(object),
            state,
            documents: config.keep.as_ref().map(|keep| keep.documents.clone()),
        });
        let superseded = shared.object().pins().is_some_and(Pins::superseded);
        let (devices, lost) = adopt::adopt(&shared)?;
        let tracker = Arc::new(Self {
            shared,
            devices: RwLock::new(devices),
            lost,
            superseded,
            changing: Mutex::new(()),
            drain: Mutex::new(None),
        });
        let start = |name: &str, body: Box<dyn FnOnce() + Send>| {
            let started = thread::Builder::new().name(name.to_owned()).spawn(body);
            started.map_err(|source| TrackerError::Io {
                action: format!("start the thread {name}"),
                source,
            })
        };
        let (weak, doubt) = (Arc::downgrade(&tracker), config.doubt_interval);
        let thread = start(
            "blksnap-drain",
            Box::new(move || drain(&weak, ring, logger, doubt)),
        )?;
        let (weak, interval) = (Arc::downgrade(&tracker), config.self_test_interval);
        // Nobody waits for it: a device that does not answer may hold it up.
        start("blksnap-test", Box::new(move || selftest::run(&weak, interval)))?;
        *tracker.drain.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(tracker)
    }

    /// Starts to track a device, and proves by a read that the hook sees it.
    ///
    /// # Errors
    /// Tracked already, too many devices or blocks, or the hook does not fire for it. Nothing is left then.
    pub fn attach(
        &self,
        device: BlockDevice,
        granularity: Granularity,
    ) -> Result<Arc<TrackedDevice>, TrackerError> {
        self.attach_anew(device, granularity, ResetReason::NewAttach)
    }

    /// As [`Tracker::attach`], with the reason why the generation begins, unless there is a better one: that it could
    /// not be gone on with.
    ///
    /// # Errors
    /// As [`Tracker::attach`].
    pub fn attach_anew(
        &self,
        device: BlockDevice,
        granularity: Granularity,
        began: ResetReason,
    ) -> Result<Arc<TrackedDevice>, TrackerError> {
        let _changing = self.changing();
        let mut instead = None;
        for tracked in self.devices() {
            if tracked.device().id != device.id && tracked.path() != &device.path {
                continue;
            }
            tracked.check_doubt();
            let Some(reason) = tracked.lost() else {
                return Err(TrackerError::Already(device.path.display().to_string()));
            };
            // This one has its number or its name by now.
            self.remove(&tracked)?;
            instead = Some(reason);
        }
        if let Some(reason) = instead {
            return self.attach_as(device, granularity, reason);
        }
        let began = self.began(&device, began);
        self.attach_as(device, granularity, began)
    }

    /// As [`Tracker::attach`], going on with a map of the device that has every change until now.
    ///
    /// # Errors
    /// As [`Tracker::attach`], or the map is of another capacity.
    pub fn attach_with(&self, device: BlockDevice, map: CbtMap) -> Result<Arc<TrackedDevice>, TrackerError> {
        let _changing = self.changing();
        if self.device(device.id).is_some() {
            return Err(TrackerError::Already(device.path.display().to_string()));
        }
        if map.capacity() != device.capacity {
            return Err(DiskError::Replaced { path: device.path }.into());
        }
        self.attach_map(device, map, BTreeMap::new())
    }

    /// Why a device begins anew: the reason why it can't be gone on with, if it was tracked until now, or `reason`.
    fn began(&self, device: &BlockDevice, reason: ResetReason) -> ResetReason {
        let place = (device.disk_id.kernel_dev(), device.first_sector.count());
        let lost = self.lost.iter().find(|lost| match &lost.path {
            Some(path) => *path == device.path,
            // Nothing is known of it but where it was.
            None => lost.place == place,
        });
        match lost {
            Some(lost) => lost.reason,
            // Which devices those were is not read. One that there is a record of was among them.
            None if self.superseded && reason != ResetReason::NewAttach => ResetReason::StateVersion,
            None => reason,
        }
    }

    fn attach_as(
        &self,
        device: BlockDevice,
        granularity: Granularity,
        began: ResetReason,
    ) -> Result<Arc<TrackedDevice>, TrackerError> {
        let block_size = granularity.block_size(&device);
        let generation = Generation::new(uuid::Uuid::new_v4());
        let map = CbtMap::begin(generation, began, block_size, device.capacity).map_err(|_| {
            TrackerError::TooManyBlocks {
                device: device.path.display().to_string(),
                block_size: block_size.bytes(),
                blocks: block_size.blocks_in(device.capacity),
            }
        })?;
        self.attach_map(device, map, BTreeMap::from([(began, 1)]))
    }

    fn attach_map(
        &self,
        device: BlockDevice,
        map: CbtMap,
        resets: BTreeMap<ResetReason, u64>,
    ) -> Result<Arc<TrackedDevice>, TrackerError> {
        let tracked = Arc::new(TrackedDevice::attach(&self.shared, device, map, resets)?);
        self.write_devices(|devices| devices.push(Arc::clone(&tracked)));
        Ok(tracked)
    }

    /// Stops tracking a device. Its map is gone.
    ///
    /// # Errors
    /// It is not attached, or the kernel refuses.
    pub fn detach(&self, id: DeviceId) -> Result<(), TrackerError> {
        let _changing = self.changing();
        let tracked = self.device(id).ok_or(TrackerError::NotAttached(id))?;
        self.remove(&tracked)
    }

    fn remove(&self, tracked: &TrackedDevice) -> Result<(), TrackerError> {
        tracked.detach()?;
        self.write_devices(|devices| devices.retain(|device| device.device().id != tracked.device().id));
        Ok(())
    }

    /// The device as a snapshot is about to be taken of it: one that changed its capacity is attached anew,
    /// with a new generation.
    ///
    /// # Errors
    /// It is not attached, gone, or can't be attached anew.
    pub fn device_for_take(&self, id: DeviceId) -> Result<Arc<TrackedDevice>, TrackerError> {
        let tracked = self.device(id).ok_or(TrackerError::NotAttached(id))?;
        tracked.check_doubt();
        if let Some(reason) = tracked.lost() {
            return Err(TrackerError::Lost {
                device: tracked.device().path.display().to_string(),
                reason,
            });
        }
        if tracked.capacity_now()? == tracked.device().capacity {
            return Ok(tracked);
        }
        let _changing = self.changing();
        let device = BlockDevice::open(&tracked.device().path)?;
        self.remove(&tracked)?;
        self.attach_as(
            device,
            Granularity::Fixed(tracked.block_size()),
            ResetReason::Resized,
        )
    }

    /// Memory in the kernel that the bitmaps of a device of `blocks` blocks take, in bytes: of the open period and
    /// of the next one while it is opened; where things are kept, as much for the blocks that are not saved yet.
    #[must_use]
    pub fn bitmap_bytes(&self, blocks: u64) -> u64 {
        let bitmaps = if self.shared.documents.is_some() { 4 } else { 2 };
        blocks.div_ceil(64).saturating_mul(8 * bitmaps)
    }

    /// The tracked device with this number.
    #[must_use]
    pub fn device(&self, id: DeviceId) -> Option<Arc<TrackedDevice>> {
        self.devices().into_iter().find(|device| device.device().id == id)
    }

    /// All tracked devices, in the order of their attach.
    #[must_use]
    pub fn devices(&self) -> Vec<Arc<TrackedDevice>> {
        self.devices
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// What an agent before tracked, and this one can't go on with: nothing of it is tracked any more.
    #[must_use]
    pub fn lost(&self) -> &[Lost] {
        &self.lost
    }

    fn write_devices(&self, change: impl FnOnce(&mut Vec<Arc<TrackedDevice>>)) {
        change(&mut self.devices.write().unwrap_or_else(PoisonError::into_inner));
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        let thread = self.drain.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.thread().id() != thread::current().id()
        {
            thread.thread().unpark();
            // A drain thread that panicked has said so.
            let _ = thread.join();
        }
        if let Some(documents) = &self.shared.documents {
            // It stays where devices stay tracked.
            let _ = std::fs::remove_dir(documents);
        }
    }
}

fn prepare_documents(path: &Path) -> Result<(), TrackerError> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| TrackerError::Io {
            action: format!("make the directory {}", path.display()),
            source,
        })
}

/// Body of the drain thread: until the tracker is gone.
fn drain(
    tracker: &Weak<Tracker>,
    mut ring: RingBuf<MapData>,
    mut logger: Option<aya_log::EbpfLogger<&'static dyn log::Log>>,
    doubt_interval: Duration,
) {
    let mut interval = DRAIN_BUSY;
    let mut next_doubt = Instant::now() + doubt_interval;
    let mut by_slot: Vec<Option<Arc<TrackedDevice>>> = Vec::new();
    while let Some(tracker) = tracker.upgrade() {
        by_slot.clear();
        by_slot.resize(MAX_SLOTS as usize, None);
        let devices = tracker.devices();
        for device in &devices {
            by_slot[device.slot_id() as usize] = Some(Arc::clone(device));
        }
        let mut records = 0_u32;
        // A writer may be as fast as this loop: the other duties get their turn all the same.
        while records < RING_BYTES / RECORD_BYTES
            && let Some(item) = ring.next()
        {
            records += 1;
            hand_out(&item, &by_slot);
        }
        for device in &devices {
            device.catch_up();
        }
        if let Some(logger) = &mut logger {
            logger.flush();
        }
        if Instant::now() >= next_doubt {
            next_doubt = Instant::now() + doubt_interval;
            for device in &devices {
                device.refresh_guards();
                device.check_doubt();
                device.save_if_needed();
            }
        }
        by_slot.clear();
        drop(devices);
        drop(tracker);
        interval = if records > 0 {
            DRAIN_BUSY
        } else {
            (interval * 2).min(DRAIN_IDLE)
        };
        thread::park_timeout(interval);
    }
}

/// Gives a record from the ring to its device. Anything that no program of ours writes is a reason to doubt what
/// else is in that memory: of one device if it names one, of all otherwise.
fn hand_out(bytes: &[u8], by_slot: &[Option<Arc<TrackedDevice>>]) {
    let record = record::decode(bytes);
    match record.map(|record| (by_slot.get(record.slot as usize), record)) {
        Some((Some(Some(device)), record)) if record::is_sound(&record) => device.apply(&record),
        Some((Some(Some(device)), _)) => device.corrupt(ResetReason::RingError),
        // Of a device that was detached meanwhile.
        Some((Some(None), _)) => {}
        Some((None, _)) | None => {
            for device in by_slot.iter().flatten() {
                device.corrupt(ResetReason::RingError);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tracker::testing::TestLoop;

    #[test]
    fn what_is_no_record_is_a_reason_to_doubt() {
        let record = |slot: u32, kind: u32, first: u64, last: u64, period: u64| -> Vec<u8> {
            [period, first, last]
                .iter()
                .flat_map(|long| long.to_ne_bytes())
                .chain([slot, kind].iter().flat_map(|short| short.to_ne_bytes()))
                .collect()
        };
        // What it does to the device that it names, and to another one.
        let given = |bytes: &dyn Fn(u32, u64) -> Vec<u8>| {
            let tracker = Tracker::load(&TrackerConfig::default()).unwrap();
            let disks = [TestLoop::new(1 << 20), TestLoop::new(1 << 20)];
            let granularity = Granularity::Fixed(BlockSize::from_bytes(4096).unwrap());
            let devices = disks
                .each_ref()
                .map(|disk| tracker.attach(disk.device(), granularity).unwrap());
            let mut by_slot = vec![None; MAX_SLOTS as usize];
            for device in &devices {
                by_slot[device.slot_id() as usize] = Some(Arc::clone(device));
            }
            let slot = devices[0].slot_id();
            let period = tracker.shared.slot_state(slot).period;
            hand_out(&bytes(slot, period), &by_slot);
            devices.map(|device| device.check_doubt())
        };
        let error = Some(ResetReason::RingError);
        assert_eq!(given(&|slot, period| record(slot, 0, 3, 4, period)), [None, None]);
        // Of a closed period, or of a slot that nobody has any more.
        assert_eq!(
            given(&|slot, period| record(slot, 0, 3, 4, period + 9)),
            [None, None]
        );
        assert_eq!(given(&|_, period| record(200, 0, 3, 4, period)), [None, None]);
        assert_eq!(
            given(&|slot, period| record(slot, 6, 3, 4, period)),
            [error, None]
        );
        assert_eq!(
            given(&|slot, period| record(slot, 0, 4, 3, period)),
            [error, None]
        );
        assert_eq!(
            given(&|slot, period| record(slot, 0, 255, 256, period)),
            [Some(ResetReason::OutOfRange), None]
        );
        // Whose it is can't be told.
        assert_eq!(given(&|_, period| record(256, 0, 3, 4, period)), [error, error]);
        assert_eq!(given(&|_, _| vec![0; 31]), [error, error]);
        assert_eq!(given(&|_, _| Vec::new()), [error, error]);
    }

    #[test]
    fn the_kernel_refuses_programs_with_wrong_offsets() {
        // Each of these points into the middle of a field, or past the struct.
        for (global, wrong) in [
            ("BIO_BDEV", 12),
            ("BIO_SECTOR", 100_000),
            ("BIO_OPF", 18),
            ("BDEV_DISK", 4),
            ("DISK_PART0", 70),
        ] {
            let loaded =
                Tracker::load_adjusted(&TrackerConfig::default(), |layout| layout.set(global, wrong));
            assert!(
                matches!(loaded, Err(TrackerError::Load(_))),
                "{global} at {wrong} was accepted"
            );
        }
    }
}

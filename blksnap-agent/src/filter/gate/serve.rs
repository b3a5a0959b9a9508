//! Serve: threads that preserve what writers wait for, and one that watches the gates.
//!
//! One thread gives signs of life to the programs, and looks whether a gate is broken. It never reads or writes a disk.
//! Another takes requests out of the ring, and serves those that are short in batches ([`super::batch`]); the others
//! serve the long ones. All have the units admitted, which preserves them, and set their bits while they are: who arms a
//! snapshot waits for that, and clears the bits then, so no bit of before is left.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use aya::maps::{MapData, RingBuf};
use blksnap_common::blockrange::{BlockRange, word_mask};
use blksnap_common::gate::{GateState, MAX_GATES, REQUEST_BYTES, Request, armed, broken};
use blksnap_common::track::Slot;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use super::batch::Batch;
use super::object::{Loaded, Object, States, Word};
use super::park::{self, Place};
use super::preempt::Switched;
use super::source::Source;
use super::technique::{Chosen, Technique};
use super::{GateError, GateOptions, own};
use crate::cow::{ChunkLayout, ChunkParams};
use crate::disk::{BlockDevice, Disk as _};
use crate::engine::cow::Origin;
use crate::sys::mman::{self, Locked, SharedWords};
use crate::sys::sched;
use crate::tracker::{disk_kind, new_words};
use crate::units::SECTOR_BYTES;

/// Milliseconds between signs of life.
const BEAT: u16 = 20;

/// How long nobody looks for requests where the kernel can't tell of them.
const PAUSE: Duration = Duration::from_micros(200);

/// A gate, as the threads know it.
#[derive(Debug)]
pub(super) struct Gated {
    pub(super) slot: Slot,
    disk: u32,
    pub(super) origin: Arc<Origin>,
    pub(super) source: Arc<Source>,
    layout: ChunkLayout,
    /// Units that are kept.
    kept: SharedWords,
    _bitmap: MapData,
    /// The brokenness was told to the snapshots.
    told: AtomicBool,
}

impl Gated {
    /// Sets the bits of units.
    fn keep(&self, range: BlockRange) {
        let words = self.kept.words();
        for word in range.first / 64..=range.last / 64 {
            if let Some(bits) = usize::try_from(word).ok().and_then(|word| words.get(word)) {
                bits.fetch_or(word_mask(range, word), Ordering::Release);
            }
        }
    }

    pub(super) fn are_kept(&self, range: BlockRange) -> bool {
        let words = self.kept.words();
        (range.first / 64..=range.last / 64).all(|word| {
            let mask = word_mask(range, word);
            usize::try_from(word)
                .ok()
                .and_then(|word| words.get(word))
                .is_some_and(|bits| bits.load(Ordering::Acquire) & mask == mask)
        })
    }

    /// First byte and length of units, as far as the device has them; `None` if it has none of them.
    pub(super) fn bytes_of(&self, range: BlockRange) -> Option<(u64, u64)> {
        let unit = self.layout.unit_bytes();
        let offset = range.first.checked_mul(unit)?;
        let end = (range.last.checked_add(1)?)
            .checked_mul(unit)?
            .min(self.layout.size());
        (offset < end).then(|| (offset, end - offset))
    }

    /// Preserves the units, a word of the bitmap at a time, so that who waits for the first goes on.
    pub(super) fn preserve(&self, range: BlockRange) {
        let unit = self.layout.unit_bytes();
        let last_unit = (self.layout.size() - 1) / unit;
        let mut first = range.first;
        while first <= range.last.min(last_unit) {
            let last = (first | 63).min(range.last).min(last_unit);
            let part = BlockRange { first, last };
            if !self.are_kept(part) {
                let offset = first * unit;
                let end = ((last + 1) * unit).min(self.layout.size());
                let admitted = self.origin.admit(offset, end - offset);
                self.keep(part);
                drop(admitted);
            }
            first = last + 1;
        }
    }
}

/// What the threads share.
#[derive(Debug)]
struct Shared {
    options: GateOptions,
    states: Arc<States>,
    gates: Mutex<BTreeMap<u32, Arc<Gated>>>,
    waiting: Mutex<VecDeque<Request>>,
    wake: Condvar,
    stop: AtomicBool,
    /// Where writes sleep, if they do.
    place: Mutex<Option<Arc<Place>>>,
}

impl Shared {
    fn gates(&self) -> MutexGuard<'_, BTreeMap<u32, Arc<Gated>>> {
        self.gates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<Request>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next request; `None` at the end.
    fn next(&self) -> Option<Request> {
        let mut waiting = self.waiting();
        loop {
            if let Some(request) = waiting.pop_front() {
                return Some(request);
            }
            if self.stop.load(Ordering::Acquire) {
                return None;
            }
            waiting = self.wake.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn preserve(&self) {
        while let Some(request) = self.next() {
            self.keep(&request);
        }
    }

    /// Keeps what a request names.
    fn keep(&self, request: &Request) {
        let gated = self.gates().get(&request.gate).cloned();
        if let Some(gated) = gated {
            gated.preserve(BlockRange {
                first: request.first,
                last: request.last,
            });
        }
    }

    fn place(&self) -> MutexGuard<'_, Option<Arc<Place>>> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes those who sleep at a gate that is broken, or for too long.
    fn look_at_place(&self, now: u64) {
        let Some(place) = self.place().clone() else {
            return;
        };
        place.beat();
        if place.has_just_gone() {
            for gated in self.gates().values() {
                let word = self.states.word(gated.slot.id, Word::Broken);
                word.fetch_or(broken::PLACE, Ordering::AcqRel);
            }
        }
        let deadline = u64::try_from(self.options.deadline.as_nanos()).unwrap_or(u64::MAX);
        place.look(now, deadline, |gate| {
            gate < MAX_GATES && self.states.word(gate, Word::Broken).load(Ordering::Acquire) != 0
        });
    }

    /// Signs of life, and broken gates.
    fn look(&self) {
        let now = sched::monotonic();
        self.look_at_place(now);
        let gates: Vec<_> = self.gates().values().cloned().collect();
        for gated in gates {
            let word = |word| self.states.word(gated.slot.id, word);
            word(Word::Beat).store(now, Ordering::Release);
            let reasons = word(Word::Broken).load(Ordering::Acquire);
            if reasons != 0 && !gated.told.swap(true, Ordering::AcqRel) {
                gated
                    .origin
                    .break_all(Errno::EIO as i32, &no_longer_held(reasons));
            }
        }
    }
}

/// What is told of a broken gate.
fn no_longer_held(reasons: u64) -> String {
    format!("writes are no longer held: {}", reasons_of(reasons))
}

/// Why a gate is broken, in words.
pub(super) fn reasons_of(reasons: u64) -> String {
    let known = [
        (
            broken::BYPASSED,
            "a write reached the disk before its old data was kept",
        ),
        (broken::DEADLINE, "a write waited as long as it may"),
        (broken::AGENT, "the agent gave no sign of life"),
        (broken::WHOLE_DISK, "an operation changes the whole disk"),
        (broken::MAP, "the kernel's map is incomplete"),
        (broken::GIVEN_UP, "the agent gave up"),
        (broken::PLACE, "a write that should have slept had no place to"),
    ];
    let said: Vec<&str> = known
        .iter()
        .filter(|(bit, _)| reasons & bit != 0)
        .map(|(_, text)| *text)
        .collect();
    said.join(", and ")
}

/// The gates that stand, and who serves them.
#[derive(Debug)]
pub(super) struct Server {
    shared: Arc<Shared>,
    object: Mutex<Object>,
    epoch: Arc<SharedWords>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    park: park::Maps,
    chosen: Chosen,
    /// Memory that has to be fetched again may be on the very device whose writers wait.
    locked: Option<Locked>,
    /// As before when everything else is gone.
    _switched: Option<Switched>,
}

impl Server {
    /// Starts the threads.
    pub(super) fn start(
        loaded: Loaded,
        chosen: Chosen,
        switched: Option<Switched>,
        options: &GateOptions,
    ) -> Result<Arc<Self>, GateError> {
        let Loaded {
            object,
            requests,
            states,
            epoch,
            park,
            hits: _,
            place,
        } = loaded;
        let shared = Arc::new(Shared {
            options: options.clone(),
            states: Arc::new(states),
            gates: Mutex::default(),
            waiting: Mutex::default(),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
            place: Mutex::default(),
        });
        let server = Arc::new(Self {
            shared: Arc::clone(&shared),
            object: Mutex::new(object),
            epoch: Arc::new(epoch),
            threads: Mutex::default(),
            park,
            chosen,
            locked: Some(Locked::touched()),
            _switched: switched,
        });
        let beating = Arc::clone(&shared);
        server.spawn("blksnap-beat", move || beat(&beating))?;
        let watched = Arc::clone(&shared);
        let batches = options.batches && server.chosen.technique == Technique::Spin;
        server.spawn("blksnap-gate", move || watch(&watched, requests, batches))?;
        for _ in 0..options.threads.max(1) {
            let shared = Arc::clone(&shared);
            server.spawn("blksnap-keep", move || shared.preserve())?;
        }
        if let Some(place) = place {
            server.use_place(&mut server.shared.place(), place)?;
        }
        Ok(server)
    }

    /// Makes sure that there is a place to sleep, if writes do. No gate is armed, or those that are are broken.
    pub(super) fn ready(&self) -> Result<(), GateError> {
        if self.chosen.technique != Technique::Park {
            return Ok(());
        }
        let mut current = self.shared.place();
        if current.as_ref().is_some_and(|place| !place.is_gone()) {
            return Ok(());
        }
        drop(current.take());
        let place = Place::open(&self.shared.options, self.park.clone())?;
        self.use_place(&mut current, place)
    }

    /// Starts the workers of a place.
    fn use_place(&self, current: &mut Option<Arc<Place>>, place: Arc<Place>) -> Result<(), GateError> {
        for _ in 0..self.shared.options.threads.max(1) {
            let shared = Arc::clone(&self.shared);
            let served = Arc::clone(&place);
            let started = self.spawn("blksnap-park", move || {
                while let Some(sleeper) = served.next() {
                    shared.keep(&sleeper.request);
                    served.done(&sleeper);
                }
            });
            if let Err(error) = started {
                place.end();
                return Err(error);
            }
        }
        *current = Some(place);
        Ok(())
    }

    /// How writes wait, and why so.
    pub(super) const fn chosen(&self) -> &Chosen {
        &self.chosen
    }

    fn spawn(&self, name: &'static str, work: impl FnOnce() + Send + 'static) -> Result<(), GateError> {
        let (priority, technique) = (self.shared.options.priority, self.chosen.technique);
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                // What it has to wait for must not wait for it.
                sched::flush_for_others();
                let ready = priority.preserve(technique);
                let failed = ready.is_err();
                let _ = tell.send(ready);
                if !failed {
                    work();
                }
            })
            .map_err(|error| GateError::Thread("start a thread that preserves", error))?;
        self.threads
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(thread);
        match told.recv() {
            Ok(Err(errno)) => Err(GateError::Thread(
                "give a thread that preserves its priority",
                errno.into(),
            )),
            Ok(Ok(())) | Err(_) => Ok(()),
        }
    }

    pub(super) fn options(&self) -> &GateOptions {
        &self.shared.options
    }

    fn object(&self) -> MutexGuard<'_, Object> {
        self.object.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A gate before a device, open.
    pub(super) fn open(&self, device: &BlockDevice, params: &ChunkParams) -> Result<Arc<Gated>, GateError> {
        let disk = device.disk_id.kernel_dev();
        let mut object = self.object();
        let gate = object.reserve(disk, &device.path)?;
        let made = self.make(&mut object, gate, device, params);
        match &made {
            Ok(gated) => {
                self.shared.gates().insert(gate, Arc::clone(gated));
            }
            Err(_) => object.give_back(gate),
        }
        made
    }

    fn make(
        &self,
        object: &mut Object,
        gate: u32,
        device: &BlockDevice,
        params: &ChunkParams,
    ) -> Result<Arc<Gated>, GateError> {
        let states = &self.shared.states;
        states.clear(gate);
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let options = &self.shared.options;
        let set = |word, value| states.word(gate, word).store(value, Ordering::Release);
        set(Word::Deadline, nanoseconds(options.deadline));
        set(Word::Silence, nanoseconds(options.silence));
        set(Word::Beat, sched::monotonic());
        let source = Arc::new(Source::open(
            device,
            gate,
            Arc::clone(states),
            Arc::clone(&self.epoch),
        )?);
        let layout = params.layout(device.capacity, device.logical_block, source.minimum_io());
        let units = layout.size().div_ceil(layout.unit_bytes());
        let too_large = |_| GateError::Map {
            action: "make a bitmap for",
            gate,
            reason: format!("{units} units are too many"),
        };
        let words = u32::try_from(units.div_ceil(64)).map_err(too_large)?;
        let (bitmap, kept) = new_words("blksnap_kept", words).map_err(|reason| GateError::Map {
            action: "make a bitmap for",
            gate,
            reason,
        })?;
        object.set_kept(gate, &bitmap)?;
        let disk = device.disk_id.kernel_dev();
        let slot = Slot {
            first_sector: device.first_sector.count(),
            end_sector: device.first_sector.count() + device.capacity.count(),
            id: gate,
            block_shift: (layout.unit_bytes() / SECTOR_BYTES).trailing_zeros(),
            flags: 0,
            reserved: 0,
        };
        let (priority, technique) = (options.priority, self.chosen.technique);
        let gated = Arc::new(Gated {
            slot,
            disk,
            origin: Arc::new(
                Origin::new(Arc::clone(&source) as Arc<dyn crate::disk::Disk>, layout).with_workers_that(
                    move || {
                        sched::flush_for_others();
                        priority.store(technique);
                    },
                ),
            ),
            source,
            layout,
            kept,
            _bitmap: bitmap,
            told: AtomicBool::new(false),
        });
        object.insert(disk, disk_kind(device).zone_sectors, slot)?;
        Ok(gated)
    }

    /// Makes every write wait until its units are kept. The origin is paused: nothing is kept before that ends.
    ///
    /// The epoch comes first, so that no copy of the program takes what it let pass before for kept; then the bits, and
    /// then the gate, if it was open.
    pub(super) fn arm(&self, gated: &Gated) {
        self.epoch.words()[0].fetch_add(1, Ordering::SeqCst);
        // Of difference storage on the device itself no bit is ever clear: its writes never wait.
        let excluded = own::words(&gated.layout, &gated.origin.excluded());
        for (word, index) in gated.kept.words().iter().zip(0_u64..) {
            let bits = excluded.get(&index).copied().unwrap_or(0);
            word.store(bits, Ordering::SeqCst);
        }
        let word = |word| self.shared.states.word(gated.slot.id, word);
        let reasons = word(Word::Broken).load(Ordering::SeqCst);
        if reasons != 0 {
            // Those that lost what they needed say so before the gate is whole again.
            gated
                .origin
                .break_all(Errno::EIO as i32, &no_longer_held(reasons));
            gated.told.store(false, Ordering::SeqCst);
            word(Word::Broken).store(0, Ordering::SeqCst);
            word(Word::Armed).store(armed::HOLDS, Ordering::SeqCst);
        }
        word(Word::Beat).store(sched::monotonic(), Ordering::SeqCst);
        // With a snapshot held already, what comes by may be what that one needs.
        let armed = match word(Word::Armed).load(Ordering::SeqCst) {
            armed::OPEN => armed::HOLDS,
            now => now,
        };
        word(Word::Armed).store(armed, Ordering::SeqCst);
    }

    /// From here on a write that comes by breaks the gate: those of before have passed.
    pub(super) fn begin_audit(&self, gated: &Gated) {
        // Data that was read while writes of before were on their way is not the instant's.
        self.epoch.words()[0].fetch_add(1, Ordering::SeqCst);
        let word = self.shared.states.word(gated.slot.id, Word::Armed);
        word.store(armed::AUDITED, Ordering::SeqCst);
    }

    /// Lets writes pass if no snapshot needs the gate.
    pub(super) fn open_if_unused(&self, gated: &Gated) {
        let _paused = gated.origin.pause();
        if gated.origin.counters().snapshots == 0 {
            self.shared
                .states
                .word(gated.slot.id, Word::Armed)
                .store(armed::OPEN, Ordering::SeqCst);
        }
    }

    /// Takes the gate away.
    pub(super) fn close(&self, gated: &Gated) {
        self.shared
            .states
            .word(gated.slot.id, Word::Armed)
            .store(armed::OPEN, Ordering::SeqCst);
        gated
            .origin
            .break_all(Errno::ENODEV as i32, "its gate was taken away");
        gated.source.close();
        let mut object = self.object();
        if let Err(error) = object.remove(gated.disk, gated.slot.id) {
            tracing::warn!(%error, "a gate that is open stays in the table");
            return;
        }
        self.shared.gates().remove(&gated.slot.id);
        object.give_back(gated.slot.id);
    }

    pub(super) fn state(&self, slot: &Slot) -> GateState {
        self.shared.states.read(slot.id)
    }

    pub(super) fn passed(&self, gate: u32) -> Result<u64, GateError> {
        self.object().passed(gate)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        drop(self.shared.waiting());
        self.shared.wake.notify_all();
        // The place ends its threads before they are waited for.
        let place = self.shared.place().take();
        if let Some(place) = &place {
            place.end();
        }
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a thread of the gate ended by a defect");
            }
        }
        // Old data was in memory, and what is locked can't be given back.
        drop(self.locked.take());
        mman::give_back();
    }
}

/// Gives signs of life, and looks at the gates, until the end.
fn beat(shared: &Shared) {
    while !shared.stop.load(Ordering::Acquire) {
        shared.look();
        std::thread::sleep(Duration::from_millis(BEAT.into()));
    }
}

/// Takes requests out of the ring until the end, and preserves what can be read at once.
fn watch(shared: &Shared, mut ring: RingBuf<MapData>, batches: bool) {
    let batch = || ring.as_fd().try_clone_to_owned().and_then(Batch::new);
    let mut batch = match batches.then(batch).transpose() {
        Ok(batch) => batch,
        Err(error) => {
            tracing::info!(%error, "io_uring is not available, old data is read request after request");
            None
        }
    };
    let edges = Edges::of(&ring);
    while !shared.stop.load(Ordering::Acquire) {
        // Who takes requests lives, though the thread that says so may be kept from the processor.
        shared.look();
        let mut left = 0;
        while let Some(item) = ring.next() {
            let Some(request) = request(&item) else { continue };
            drop(item);
            let taken = batch.as_mut().is_some_and(|batch| {
                let gated = shared.gates().get(&request.gate).cloned();
                // While a take is made who admits units of the device waits for its end: not this thread.
                let armed = shared
                    .states
                    .word(request.gate, Word::Armed)
                    .load(Ordering::Acquire);
                gated.is_none_or(|gated| armed != armed::HOLDS && batch.take(&gated, &request))
            });
            if !taken {
                shared.waiting().push_back(request);
                left += 1;
            }
        }
        (0..left).for_each(|_| shared.wake.notify_one());
        match &mut batch {
            Some(some) => {
                if let Err(error) = some.wait() {
                    tracing::warn!(%error, "io_uring fails; old data is read request after request");
                    batch.take().into_iter().for_each(Batch::preserve_rest);
                }
            }
            None if left == 0 => edges.wait(),
            None => {}
        }
    }
}

/// Tells of what comes into the ring, and of nothing twice.
///
/// A ring is readable as soon as a record is reserved in it, and who reserved it may have been preempted before the record
/// was complete. Whoever polls then is told at once, again and again. With a priority above that writer's he keeps it from
/// the processor, which a tracing program can't change (`migrate_disable` in `__bpf_prog_enter_recur`), until the kernel
/// throttles him, 950 ms of a second later (`sched_rt_runtime_us`). An edge comes when the record is complete, since each
/// is submitted with `BPF_RB_FORCE_WAKEUP`.
struct Edges(Option<Epoll>);

impl Edges {
    fn of(ring: &RingBuf<MapData>) -> Self {
        let made = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).and_then(|epoll| {
            let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
            epoll.add(ring.as_fd(), EpollEvent::new(flags, 0)).map(|()| epoll)
        });
        if let Err(errno) = made {
            tracing::warn!(%errno, "can't wait for requests, they are looked for every {PAUSE:?}");
        }
        Self(made.ok())
    }

    /// Until something is complete, at most as long as a sign of life may take.
    fn wait(&self) {
        let Some(epoll) = &self.0 else {
            return std::thread::sleep(PAUSE);
        };
        if let Err(errno) = epoll.wait(&mut [EpollEvent::empty()], BEAT)
            && errno != Errno::EINTR
        {
            tracing::warn!(%errno, "can't wait for requests");
            std::thread::sleep(PAUSE);
        }
    }
}

fn request(bytes: &[u8]) -> Option<Request> {
    if bytes.len() < REQUEST_BYTES {
        return None;
    }
    let word = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let gate = u32::from_ne_bytes(bytes[16..20].try_into().expect("four bytes"));
    Some(Request {
        first: word(0),
        last: word(8),
        gate,
        reserved: 0,
    })
}

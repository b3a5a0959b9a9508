//! Take: several origins, one instant; and the release of a snapshot.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::error::DmError;
use super::journal::{Entry, Journal, OriginEntry, boot_id};
use super::mapper::Mapper;
use super::plan::{self, Step, View, Wanted};
use super::storage::{Place, Storage, beneath_device};
use super::table::{Node, Table};
use super::verdict::Verdicts;
use crate::disk::watchdog::Watchdog;
use crate::disk::{BlockDevice, WatchdogCommand};
use crate::sys::dm::Which;
use crate::sys::mman::Locked;
use crate::units::{DeviceId, SnapshotId};

/// Major number of devices in `/proc/devices` that this filter is for.
const DRIVER: &str = "device-mapper";

/// Told of a step.
pub type Observer = Arc<dyn Fn(&Step) + Send + Sync>;

/// How the filter works.
#[derive(Clone)]
pub struct DmOptions {
    /// Directory of the journal. Nothing is written there while something is suspended.
    pub journal: PathBuf,
    /// The watchdog.
    pub watchdog: WatchdogCommand,
    /// Longest time for which origins may be suspended.
    pub limit: Duration,
    /// Told of every step, before it is done.
    pub observer: Option<Observer>,
}

impl fmt::Debug for DmOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmOptions")
            .field("journal", &self.journal)
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

impl DmOptions {
    /// A journal in `directory`, the program's own watchdog, and two seconds.
    #[must_use]
    pub fn new(journal: PathBuf) -> Self {
        Self {
            journal,
            watchdog: WatchdogCommand::own(),
            limit: Duration::from_secs(2),
            observer: None,
        }
    }
}

/// An origin that is to be taken.
#[derive(Clone, Debug)]
pub struct Origin {
    /// The device.
    pub device: BlockDevice,
    /// Where its old data is to be kept.
    pub place: Place,
    /// Bytes of storage to begin with, where the place has no length of its own.
    pub bytes: u64,
}

/// What is done around the instant. Nothing in it may write to an origin, or wait for somebody who does.
pub trait Instants {
    /// All is prepared, nothing is suspended: file systems are frozen here, so nothing may be written from here on.
    ///
    /// # Errors
    /// Nothing is taken.
    fn before(&mut self) -> Result<(), DmError>;

    /// Nothing passes.
    ///
    /// # Errors
    /// Nothing is taken.
    fn at(&mut self) -> Result<(), DmError>;

    /// All goes on, or the take has failed: file systems are thawed here. Called whenever `before` was.
    ///
    /// # Errors
    /// Nothing is taken.
    fn after(&mut self) -> Result<(), DmError>;
}

/// An image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmImage {
    /// The origin.
    pub origin: DeviceId,
    /// The snapshot device.
    pub device: DeviceId,
    /// Length in sectors.
    pub sectors: u64,
}

impl DmImage {
    /// Its node.
    #[must_use]
    pub fn node(&self) -> PathBuf {
        PathBuf::from(format!("/dev/dm-{}", self.device.minor))
    }
}

/// What a take made.
#[derive(Clone, Debug)]
pub struct Taken {
    /// In the order of the origins.
    pub images: Vec<DmImage>,
    /// How long the first origin that was suspended was.
    pub suspended: Duration,
}

/// A snapshot that is held.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) storage: BTreeMap<DeviceId, Storage>,
    pub(super) beneath: BTreeSet<DeviceId>,
}

/// What takes and releases share.
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) mapper: Mapper,
    pub(super) held: BTreeMap<SnapshotId, Held>,
}

/// The filter.
#[derive(Debug)]
pub struct Dm {
    pub(super) options: DmOptions,
    pub(super) journal: Journal,
    pub(super) inner: Mutex<Inner>,
    /// For questions that must not wait for a take.
    pub(super) asker: Mapper,
    verdicts: Mutex<Verdicts>,
}

/// Whether the filter can hold `device`, and if not why.
///
/// # Errors
/// It can't; one line says why, and what to do.
pub fn availability(device: &BlockDevice) -> Result<(), DmError> {
    let mut mapper = Mapper::open()?;
    check(&mut mapper, device).map(drop)
}

/// All devices of device-mapper that are not ours, by name, each with what keeps the filter from holding it.
///
/// # Errors
/// There is no device-mapper.
pub fn mapped_devices() -> Result<Vec<(String, Option<String>)>, DmError> {
    let mut mapper = Mapper::open()?;
    let listed = mapper.control().list().map_err(|source| DmError::Step {
        action: "list the devices of",
        device: "device-mapper".to_owned(),
        source,
    })?;
    let mut found = Vec::new();
    for (number, name) in listed {
        let uuid = mapper.control().names(Which::Device(number));
        if uuid.is_ok_and(|(_, uuid)| Node::of_uuid(&uuid).is_some()) {
            continue;
        }
        let node = PathBuf::from(format!("/dev/dm-{}", number.minor));
        let why = match BlockDevice::open(&node) {
            Ok(device) => match check(&mut mapper, &device) {
                Ok(_) => None,
                Err(DmError::Refused { why, .. }) => Some(why),
                Err(error) => Some(error.to_string()),
            },
            Err(error) => Some(error.to_string()),
        };
        found.push((name, why));
    }
    Ok(found)
}

/// The snapshots that have an image of `origin`, for messages.
fn named(view: &View, origin: DeviceId) -> String {
    let of_origin = view.keys().filter(|node| node.origin() == origin);
    let snapshots: BTreeSet<SnapshotId> = of_origin.filter_map(|node| node.snapshot()).collect();
    let names: Vec<String> = snapshots
        .iter()
        .map(|snapshot| format!("snapshot {snapshot}"))
        .collect();
    match names.as_slice() {
        [] => "the snapshot that it belongs to".to_owned(),
        names => names.join(" and "),
    }
}

fn is_mapped(device: &BlockDevice) -> bool {
    let devices = std::fs::read_to_string("/proc/devices").unwrap_or_default();
    devices
        .lines()
        .filter_map(|line| line.trim().split_once(' '))
        .any(|(major, driver)| driver == DRIVER && major.parse() == Ok(device.id.major))
}

/// Whether LVM has its label in one of the first four sectors.
fn is_physical_volume(device: &BlockDevice) -> bool {
    use std::io::Read as _;
    let mut head = [0; 2048];
    let read = std::fs::File::open(&device.path).and_then(|mut file| file.read_exact(&mut head));
    read.is_ok() && head.chunks(512).any(|sector| sector.starts_with(b"LABELONE"))
}

/// Refuses what can't be an origin, and gives its old table and all devices of ours.
fn check(mapper: &mut Mapper, device: &BlockDevice) -> Result<(Table, View), DmError> {
    let name = || device.path.display().to_string();
    let refused = |why: String| Err(DmError::refused(name(), why));
    if !is_mapped(device) {
        return refused("it is no device of device-mapper; use another filter".to_owned());
    }
    if device.read_only {
        return refused("it is read-only, so that nothing changes it".to_owned());
    }
    let view = mapper.view(&[device.id])?;
    let Some(origin) = view.get(&Node::Origin(device.id)) else {
        return refused("it is gone".to_owned());
    };
    if view
        .iter()
        .any(|(node, seen)| !matches!(node, Node::Origin(_)) && seen.number == Some(device.id))
    {
        return refused("it belongs to a snapshot".to_owned());
    }
    let real = view.get(&Node::Real(device.id));
    let held = plan::is_held(&view, device.id);
    if origin.inactive.sectors() > 0 || origin.suspended {
        return refused("somebody is changing its table; try again".to_owned());
    }
    if let (Some(real), true) = (real, held) {
        return Ok((real.active.clone(), view));
    }
    if real.is_some() {
        return refused(format!(
            "its table was changed, or it is another device with that number, while a snapshot was held; destroy {}",
            named(&view, device.id)
        ));
    }
    if let Some(kind) = origin.active.not_shareable() {
        return refused(format!(
            "its target {kind:?} keeps a state of its own, which two devices can't share; use another filter"
        ));
    }
    if origin.active.has_key_in_keyring() {
        return refused(
            "its key is in the kernel's keyring, from where nobody gets it; open it with `cryptsetup open --disable-keyring`, take what it stands on, or use another filter"
                .to_owned(),
        );
    }
    if is_physical_volume(device) {
        return refused(
            "it is a physical volume of LVM, which must not see it twice; take the volumes on it".to_owned(),
        );
    }
    Ok((origin.active.clone(), view))
}

/// Sectors that the kernel keeps at once: what is kept costs the kernel some bytes of memory each.
const fn chunk_of(sectors: u64) -> u32 {
    const GIB: u64 = 1 << 21;
    match sectors {
        0..=0x1000_0000 => 8,
        _ if sectors <= 2048 * GIB => 16,
        _ if sectors <= 16384 * GIB => 64,
        _ => 128,
    }
}

impl Dm {
    /// The filter, with what an agent before left untouched until [`Dm::recover`].
    ///
    /// # Errors
    /// There is no device-mapper, or no directory for the journal.
    pub fn open(options: DmOptions) -> Result<Self, DmError> {
        let inner = Inner {
            mapper: Mapper::open()?,
            held: BTreeMap::new(),
        };
        Ok(Self {
            journal: Journal::open(&options.journal)?,
            asker: Mapper::open()?,
            verdicts: Mutex::new(Verdicts::new()),
            inner: Mutex::new(inner),
            options,
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn verdicts(&self) -> MutexGuard<'_, Verdicts> {
        self.verdicts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn run(&self, mapper: &mut Mapper, steps: &[Step]) -> Result<(), DmError> {
        steps.iter().try_for_each(|step| {
            if let Some(observer) = &self.options.observer {
                observer(step);
            }
            mapper.apply(step)
        })
    }

    /// Undoes everything but the snapshots that are held.
    pub(super) fn settle(&self, inner: &mut Inner, more: &[DeviceId]) -> Result<(), DmError> {
        let keep: BTreeSet<SnapshotId> = inner.held.keys().copied().collect();
        let view = inner.mapper.view(more)?;
        let steps = plan::settle(&view, &keep);
        // A step that the kernel refuses keeps nobody else's from being done.
        let mut failure = None;
        for step in &steps {
            if let Err(error) = self.run(&mut inner.mapper, std::slice::from_ref(step)) {
                failure.get_or_insert(error);
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// Takes all origins at one instant.
    ///
    /// # Errors
    /// One of them can't be taken, or something failed: all is as it was.
    pub fn take(
        &self,
        snapshot: SnapshotId,
        origins: &[Origin],
        instants: &mut dyn Instants,
    ) -> Result<Taken, DmError> {
        let mut prepared = self.prepare(snapshot, origins)?;
        let armed = instants.before().and_then(|()| prepared.arm(|| instants.at()));
        // Whatever happened: first of all the file systems go on.
        let after = instants.after();
        armed?;
        after?;
        prepared.finish()
    }

    /// Makes everything that a take needs, while nobody notices: from here on nothing is written to a file system until
    /// [`Prepared::finish`].
    ///
    /// # Errors
    /// One of the origins can't be taken, or something failed: all is as it was.
    pub fn prepare(&self, snapshot: SnapshotId, origins: &[Origin]) -> Result<Prepared<'_>, DmError> {
        let mut inner = self.lock();
        let mut entry = Entry {
            snapshot,
            boot: boot_id().map_err(|source| DmError::Io {
                action: "read the boot id of",
                path: "/proc".into(),
                source,
            })?,
            taken: false,
            origins: Vec::new(),
        };
        let mut wanted = Vec::with_capacity(origins.len());
        let mut beneath = BTreeSet::new();
        for origin in origins {
            self.remove_unused(&mut inner, origin.device.id)?;
            let (table, view) = check(&mut inner.mapper, &origin.device)?;
            beneath.extend(Self::check_place(&inner, &view, origin, origins)?);
            let id = origin.device.id;
            let files = match &origin.place {
                Place::Directory(directory) => vec![directory.join(file_name(snapshot, id))],
                Place::Ranges(_) => Vec::new(),
            };
            let names = inner.mapper.control().names(Which::Device(id));
            let (name, uuid) = names.unwrap_or_default();
            entry.origins.push(OriginEntry {
                device: id,
                name,
                uuid,
                files,
            });
            wanted.push(Wanted {
                origin: id,
                chunk: chunk_of(table.sectors()),
                table,
                storage: Vec::new(),
            });
        }
        self.journal.write(&entry)?;
        let mut prepared = Prepared {
            dm: self,
            inner,
            entry,
            sectors: wanted.iter().map(|one| one.table.sectors()).collect(),
            wanted,
            held: Held {
                storage: BTreeMap::new(),
                beneath,
            },
            watchdog: None,
            locked: None,
            suspended: None,
            ended: false,
        };
        // Dropped, it is undone.
        prepared.make(origins)?;
        Ok(prepared)
    }

    /// Removes the real device of an origin that is gone, whose number another one has now: nothing stands on it.
    fn remove_unused(&self, inner: &mut Inner, origin: DeviceId) -> Result<(), DmError> {
        let view = inner.mapper.view(&[origin])?;
        let of_origin = view.keys().filter(|node| node.origin() == origin);
        let is_used = of_origin.clone().any(|node| node.snapshot().is_some()) || plan::is_held(&view, origin);
        let real = Node::Real(origin);
        let loaded = view
            .get(&Node::Origin(origin))
            .is_some_and(|seen| seen.inactive.sectors() > 0);
        if view.contains_key(&real) && !is_used && !loaded {
            self.run(&mut inner.mapper, &[Step::Remove(real)])?;
        }
        Ok(())
    }

    /// Where old data must not be: on an origin of this snapshot, where it would wait for itself, and on one of another,
    /// whose old data could be here.
    fn check_place(
        inner: &Inner,
        view: &View,
        origin: &Origin,
        origins: &[Origin],
    ) -> Result<BTreeSet<DeviceId>, DmError> {
        let beneath = origin.place.beneath()?;
        let place = origin.place.shown();
        if let Some(one) = origins.iter().find(|one| beneath.contains(&one.device.id)) {
            return Err(DmError::storage(
                place,
                format_args!(
                    "it is on {}, which is to be taken; give another place",
                    one.device.path.display()
                ),
            ));
        }
        let held = view
            .keys()
            .find(|node| matches!(node, Node::Real(of) if beneath.contains(of)));
        if let Some(node) = held {
            return Err(DmError::storage(
                place,
                format_args!(
                    "it is on {}, of which a snapshot is held; give another place",
                    node.origin()
                ),
            ));
        }
        let of_others = inner.held.iter();
        let of_others = of_others
            .filter(|(_, held)| held.beneath.contains(&origin.device.id))
            .map(|(snapshot, _)| *snapshot)
            .next();
        let stands = |node: &Node, number: Option<DeviceId>| {
            matches!(node, Node::Storage(..))
                && number.is_some_and(|number| beneath_device(number).contains(&origin.device.id))
        };
        let of_others = of_others.or_else(|| {
            let mut nodes = view.iter();
            nodes
                .find(|(node, seen)| stands(node, seen.number))
                .and_then(|(node, _)| node.snapshot())
        });
        if let Some(snapshot) = of_others {
            return Err(DmError::refused(
                origin.device.path.display(),
                format!("it has the difference storage of snapshot {snapshot}; destroy that first"),
            ));
        }
        Ok(beneath)
    }

    /// Ends a snapshot. Who has an image open gets errors. An origin of which no other snapshot is held has its old table
    /// afterwards.
    ///
    /// # Errors
    /// The kernel refused something; what could be done is done, and another try does the rest.
    pub fn release(&self, snapshot: SnapshotId) -> Result<(), DmError> {
        let mut inner = self.lock();
        let (entries, _) = self.journal.read()?;
        let mut entry = entries.into_iter().find(|entry| entry.snapshot == snapshot);
        if let Some(entry) = &mut entry {
            // From here on it is undone, by whoever comes next if not by this one.
            entry.taken = false;
            self.journal.write(entry)?;
        }
        let held = inner.held.remove(&snapshot);
        self.verdicts().forget(snapshot);
        let settled = self.settle_guarded(&mut inner, entry.as_ref());
        let removed = held.map_or(Ok(()), |held| {
            held.storage.into_values().try_for_each(Storage::remove)
        });
        settled?;
        removed?;
        if let Some(entry) = entry {
            self.forget_files(&entry)?;
        }
        Ok(())
    }

    /// As [`Dm::settle`], with a watchdog beside it, since origins are suspended for a moment.
    pub(super) fn settle_guarded(&self, inner: &mut Inner, entry: Option<&Entry>) -> Result<(), DmError> {
        let view = inner.mapper.view(&[])?;
        let mut order: BTreeSet<DeviceId> = view.keys().map(|node| node.origin()).collect();
        order.extend(
            entry
                .iter()
                .flat_map(|entry| entry.origins.iter().map(|one| one.device)),
        );
        let order: Vec<DeviceId> = order.into_iter().collect();
        let mut watchdog = Watchdog::start_with(&self.options.watchdog, &[], &order)?;
        let _locked = Locked::all();
        watchdog.go(self.options.limit)?;
        let settled = self.settle(inner, &order);
        watchdog.disarm()?;
        settled
    }

    /// Removes what a take that failed has left.
    fn forget(&self, inner: &mut Inner, entry: &Entry) {
        let origins: Vec<DeviceId> = entry.origins.iter().map(|one| one.device).collect();
        let done = self
            .settle(inner, &origins)
            .and_then(|()| self.forget_files(entry));
        if let Err(error) = done {
            tracing::warn!(snapshot = %entry.snapshot, %error, "a part of a snapshot that was not taken stays until the next start");
        }
    }

    pub(super) fn forget_files(&self, entry: &Entry) -> Result<(), DmError> {
        let mut files = entry.origins.iter().flat_map(|origin| &origin.files);
        files.try_for_each(|file| super::storage::remove_file(file))?;
        Ok(self.journal.remove(entry.snapshot)?)
    }
}

fn file_name(snapshot: SnapshotId, origin: DeviceId) -> String {
    format!("{}.diff", Node::Image(snapshot, origin).name())
}

/// A take that is prepared. Dropped before it is finished, it is undone.
#[derive(Debug)]
pub struct Prepared<'a> {
    dm: &'a Dm,
    inner: MutexGuard<'a, Inner>,
    entry: Entry,
    /// Lengths of the origins, in the order in which they were given.
    sectors: Vec<u64>,
    /// In the order in which they are suspended.
    wanted: Vec<Wanted>,
    held: Held,
    watchdog: Option<Watchdog>,
    /// Had before file systems are frozen: what can't be locked is logged, which writes.
    locked: Option<Locked>,
    suspended: Option<Duration>,
    ended: bool,
}

impl Prepared<'_> {
    fn make(&mut self, origins: &[Origin]) -> Result<(), DmError> {
        let snapshot = self.entry.snapshot;
        for (origin, wanted) in origins.iter().zip(&mut self.wanted) {
            let name = file_name(snapshot, origin.device.id);
            let storage = Storage::make(&origin.place, &name, origin.bytes)?;
            wanted.storage = storage.extents();
            self.held.storage.insert(origin.device.id, storage);
        }
        // Those that stand on others come first: what they have under way ends below them.
        self.wanted
            .sort_by_key(|one| std::cmp::Reverse(beneath_device(one.origin).len()));
        let order = self.order();
        let view = self.inner.mapper.view(&order)?;
        let steps = plan::prepare(&view, snapshot, &self.wanted);
        self.dm.run(&mut self.inner.mapper, &steps)?;
        for one in &self.wanted {
            if self.inner.mapper.table(Node::Real(one.origin))? != one.table {
                return Err(DmError::refused(
                    one.origin,
                    "the kernel does not give its table back as it was; use another filter",
                ));
            }
        }
        self.watchdog = Some(Watchdog::start_with(&self.dm.options.watchdog, &[], &order)?);
        self.locked = Some(Locked::all());
        Ok(())
    }

    /// The origins as they go on: those below first.
    fn order(&self) -> Vec<DeviceId> {
        self.wanted.iter().rev().map(|one| one.origin).collect()
    }

    /// Suspends all origins, calls `at`, and lets them go on with their images. File systems may be frozen meanwhile:
    /// nothing is written.
    ///
    /// # Errors
    /// The kernel refuses, `at` fails, or it takes too long. The origins go on all the same.
    pub fn arm<E: From<DmError>>(&mut self, at: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let (stop, go_on) = (
            plan::stop(&self.wanted),
            plan::go_on(self.entry.snapshot, &self.wanted),
        );
        let order = self.order();
        let Some(mut watchdog) = self.watchdog.take() else {
            return Err(DmError::Instant("it was taken already".to_owned()).into());
        };
        let locked = self.locked.take();
        let limit = self.dm.options.limit;
        watchdog.go(limit).map_err(DmError::from)?;
        let begun = Instant::now();
        let inner = &mut *self.inner;
        let mut run = |steps: &[Step]| self.dm.run(&mut inner.mapper, steps);
        let stopped = run(&stop)
            .map_err(E::from)
            .and_then(|()| at())
            .and_then(|()| Ok(run(&go_on)?));
        let suspended = begun.elapsed();
        if stopped.is_err() {
            // Nobody waits for what was begun; what is wrong with this shows when it is undone once more.
            let _ = self.dm.settle(&mut self.inner, &order);
        }
        let late = watchdog.disarm();
        drop(locked);
        stopped?;
        // It resumed one before the last one was suspended: there was no instant.
        if late.map_err(DmError::from)? || suspended >= limit {
            return Err(DmError::Late {
                device: order.first().map(ToString::to_string).unwrap_or_default(),
            }
            .into());
        }
        self.suspended = Some(suspended);
        Ok(())
    }

    /// Writes down that it was taken. File systems go on.
    ///
    /// # Errors
    /// It was not, or can't be written down: it is undone.
    pub fn finish(mut self) -> Result<Taken, DmError> {
        let snapshot = self.entry.snapshot;
        let Some(suspended) = self.suspended else {
            return Err(DmError::Instant("it was not taken".to_owned()));
        };
        let origins = self.entry.origins.iter().zip(&self.sectors);
        let images = origins.map(|(origin, sectors)| {
            let node = Node::Image(snapshot, origin.device);
            let device = self.inner.mapper.number(node).ok_or_else(|| DmError::Gone {
                action: "find",
                device: node.to_string(),
            })?;
            Ok(DmImage {
                origin: origin.device,
                device,
                sectors: *sectors,
            })
        });
        let images = images.collect::<Result<_, DmError>>()?;
        self.entry.taken = true;
        self.dm.journal.write(&self.entry)?;
        let held = Held {
            storage: std::mem::take(&mut self.held.storage),
            beneath: std::mem::take(&mut self.held.beneath),
        };
        self.inner.held.insert(snapshot, held);
        self.ended = true;
        Ok(Taken { images, suspended })
    }
}

impl Drop for Prepared<'_> {
    fn drop(&mut self) {
        if !self.ended {
            // The loop devices go with the last who has them open.
            self.held.storage.clear();
            self.dm.forget(&mut self.inner, &self.entry);
        }
    }
}

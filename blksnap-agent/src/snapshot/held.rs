//! Held: a snapshot of served devices, whose writes wait until old data is kept.
//!
//! # Order of a take
//! Journals are made before the instant, the document is written after it. An agent that is killed in between leaves a
//! directory without a document: the next one removes it, and the snapshot, which nobody was told of, never was.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::document::{Document, MemberDocument, journal_path};
use super::files::{FileInUse, NewFile};
use super::gated_own::OwnStorage;
use super::own::Guard;
use super::owner::{Content, Hold, Image, Owner};
use super::stores::{Parts, new_store, pool_events, pool_options};
use super::{FilterKind, FilterWish, Member, SnapshotError, own, places};
use crate::cbt::Taken;
use crate::cow::Taken as TakenSlot;
use crate::disk::FileDisk;
use crate::engine::cow::Promise;
use crate::engine::cow::journal::{Journal, JournalError, Subject};
use crate::filter::converge::Consistency;
use crate::filter::gate::Gate;
use crate::filter::held::HeldImage;
use crate::filter::served::{self, Served, ServedImage};
use crate::statefile;
use crate::storage::{Pool, PoolOptions, StorageSpec};
use crate::units::SnapshotId;

/// Parameters of held snapshots.
#[derive(Clone, Debug)]
pub struct HoldOptions {
    /// What a snapshot survives.
    pub promise: Promise,
    /// `diff_storage_minimum`, in bytes.
    pub minimum: u64,
    /// Whether storage grows by itself.
    pub autogrow: bool,
    /// `chunk_maximum_in_queue`.
    pub queue: usize,
    /// `free_diff_buffer_pool_size`.
    pub buffers: usize,
    /// Which filter devices get that are not served.
    pub filter: FilterWish,
    /// Why it was chosen, if nobody named it.
    pub chosen: Option<String>,
}

impl Default for HoldOptions {
    /// The original's parameters; survives the agent.
    fn default() -> Self {
        Self {
            promise: Promise::default(),
            minimum: PoolOptions::default().minimum,
            autogrow: true,
            queue: 16,
            buffers: 128,
            filter: FilterWish::default(),
            chosen: None,
        }
    }
}

/// Where held snapshots are written down, and in which boot.
#[derive(Clone, Debug)]
pub struct HoldPlace {
    /// Directory with one for each snapshot; none: they end with the agent.
    pub directory: Option<PathBuf>,
    /// The boot that this is; empty if the kernel does not say.
    pub boot: String,
}

/// A held snapshot.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) directory: Option<PathBuf>,
    pub(super) document: Document,
    pub(super) pool: Arc<Pool>,
    pub(super) images: Vec<HeldImage>,
    pub(super) guards: Vec<Guard>,
    /// Storage on devices that have gates: let go before these.
    pub(super) own: Option<Box<OwnStorage>>,
    /// Of devices that have one, in the order of the images.
    pub(super) gates: Vec<Arc<Gate>>,
}

/// What goes on.
pub(super) struct Resumed {
    pub(super) held: Held,
    pub(super) images: Vec<Image>,
    pub(super) files: Vec<Arc<FileInUse>>,
}

impl Held {
    /// Takes the devices.
    pub(super) fn take(hold: &Hold) -> Result<(Self, Vec<Image>), SnapshotError> {
        let Hold {
            id,
            devices,
            pool,
            options,
            place,
            events,
            files,
            free,
            ..
        } = hold;
        let id = *id;
        let directory = match (&place.directory, options.promise) {
            (Some(directory), Promise::AgentCrash | Promise::PowerCut) => {
                Some(directory.join(id.to_string()))
            }
            _ => None,
        };
        let began = Began {
            directory: directory.clone(),
            devices: devices.clone(),
            durable: options.promise == Promise::PowerCut,
            done: false,
        };
        if let Some(directory) = &directory {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(directory)
                .map_err(|source| SnapshotError::state("make", directory, source))?;
            if began.durable {
                statefile::sync_directory_of(directory)?;
            }
        }
        if began.durable {
            for device in devices {
                device
                    .survive_power_cuts(true)
                    .map_err(|source| SnapshotError::state("renew the lease of", device.path(), source))?;
            }
        }
        let mut members = Vec::new();
        for (number, served) in devices.iter().enumerate() {
            let subject = subject(id, number, served);
            let journal = directory
                .as_ref()
                .map(|directory| begin_journal(&journal_path(directory, number), &subject, options.promise))
                .transpose()?;
            let specs = pool.specs();
            let parts = Parts {
                pool,
                journal,
                excluded: own::ranges_of(&specs, served),
                free: free.get(number).copied().flatten(),
            };
            members.push(served::Member {
                served: Arc::clone(served),
                store: Arc::new(new_store(id, served.path(), parts, options, events)),
            });
        }
        let guards = own::guards(&pool.specs(), devices);
        let taken = served::take(&members)?;
        for (guard, member) in guards
            .iter()
            .flat_map(|guard| taken.iter().map(move |member| (guard, member)))
        {
            guard.used_by(member.image.image());
        }
        for (file, member) in files
            .iter()
            .flat_map(|file| taken.iter().map(move |member| (file, member)))
        {
            file.used_by(member.image.image());
        }
        let now = SystemTime::now();
        let document = Document {
            id,
            created: seconds(hold.created),
            taken: seconds(now),
            boot: place.boot.clone(),
            stopped: false,
            filter: FilterKind::Served,
            promise: options.promise,
            minimum: options.minimum,
            autogrow: options.autogrow,
            storage: pool.specs(),
            members: taken
                .iter()
                .map(|member| document_of(&member.image, &member.taken))
                .collect(),
        };
        let held = Self {
            directory,
            document,
            pool: Arc::clone(pool),
            images: taken
                .iter()
                .map(|member| HeldImage::Served(member.image.clone()))
                .collect(),
            guards,
            own: None,
            gates: Vec::new(),
        };
        // Written after the instant: until it is there, the snapshot ends with the agent.
        if let Err(error) = held.write() {
            held.release();
            return Err(error);
        }
        let images = taken
            .iter()
            .map(|member| {
                let read_map = member.image.served().changes().frozen().ok();
                image(&member.image, member.taken, read_map)
            })
            .collect();
        began.keep();
        Ok((held, images))
    }

    /// Goes on with what an agent before has left in `directory`.
    pub(super) fn resume(
        directory: &Path,
        document: Document,
        devices: &[Arc<Served>],
        place: &HoldPlace,
        options: &HoldOptions,
        owner: &Owner,
    ) -> Result<Resumed, Unfinished> {
        let events = &owner.events;
        let survived = document.stopped
            || (document.boot == place.boot && !place.boot.is_empty())
            || document.promise == Promise::PowerCut;
        if !survived {
            return Err(Unfinished::Boot);
        }
        let mut tables = Vec::new();
        for (number, (member, served)) in document.members.iter().zip(devices).enumerate() {
            if let Some(why) = served.unproven() {
                return Err(Unfinished::Device {
                    device: member.path.clone(),
                    why: why.to_string(),
                });
            }
            if !member.was_held(served.session_before()) {
                return Err(Unfinished::Device {
                    device: member.path.clone(),
                    why: "it was served without the snapshot since".to_owned(),
                });
            }
            let layout = served.origin().layout();
            if (member.size, member.chunk) != (layout.size(), layout.chunk_bytes()) {
                return Err(Unfinished::Device {
                    device: member.path.clone(),
                    why: "its size or that of its chunks is another one".to_owned(),
                });
            }
            let path = journal_path(directory, number);
            let disk = FileDisk::open(&path, true).map_err(|error| Unfinished::Storage(error.to_string()))?;
            tables.push(Journal::open(
                Arc::new(disk),
                &subject(document.id, number, served),
            )?);
        }
        let taken: Vec<TakenSlot> = tables
            .iter()
            .flat_map(|(_, table)| {
                let layout = *table.layout();
                table.stored().map(move |(chunk, slot, units)| TakenSlot {
                    slot,
                    chunk: layout.chunk_bytes(),
                    stored: layout.bytes_of(chunk, units),
                })
            })
            .collect();
        let storage = document.storage.clone();
        let files = own::files_again(
            &storage,
            devices,
            owner.files.as_ref().map(|files| &files.devices),
        );
        let pool = Pool::reopen(
            pool_options(document.minimum, document.autogrow, logical_block(devices)),
            pool_events(events, &owner.queue),
            &document.storage,
            &|own| {
                let of_it = |(known, _): &&(_, _)| *known == own;
                files.iter().find(of_it).map(|(_, file)| file.place())
            },
            taken,
        )
        .map_err(|error| Unfinished::Storage(error.to_string()))?;
        let pool = Arc::new(pool);
        let mut held = Self {
            directory: Some(directory.to_owned()),
            document,
            pool,
            images: Vec::new(),
            guards: own::guards(&storage, devices),
            own: None,
            gates: Vec::new(),
        };
        let options = HoldOptions {
            promise: held.document.promise,
            ..options.clone()
        };
        let mut images: Vec<ServedImage> = Vec::new();
        for ((journal, table), served) in tables.into_iter().zip(devices) {
            let parts = Parts {
                pool: &held.pool,
                journal: Some(journal),
                excluded: own::ranges_of(&held.document.storage, served),
                free: None,
            };
            let store = new_store(held.document.id, served.path(), parts, &options, events);
            let resumed = served.resume(Arc::new(store), table);
            let durable = options.promise == Promise::PowerCut;
            match resumed.map_err(|error| error.to_string()).and_then(|image| {
                let lease = served.survive_power_cuts(durable || served.origin().counters().snapshots > 1);
                lease.map_err(|error| error.to_string()).map(|()| image)
            }) {
                Ok(image) => images.push(image),
                Err(error) => {
                    held.images = images.into_iter().map(HeldImage::Served).collect();
                    held.release();
                    return Err(Unfinished::Storage(error));
                }
            }
        }
        held.images = images.iter().cloned().map(HeldImage::Served).collect();
        for (image, member) in images.iter().zip(&held.document.members) {
            let origin = image.served().origin();
            origin.set_free(image.image().key(), member.free.clone());
            files.iter().for_each(|(_, file)| file.used_by(image.image()));
            held.guards.iter().for_each(|guard| guard.used_by(image.image()));
        }
        let files: Vec<_> = files.into_iter().map(|(_, file)| file).collect();
        for (member, served) in held.document.members.iter_mut().zip(devices) {
            member.session = served.session();
            member.session_before = served.session_before();
        }
        held.document.boot.clone_from(&place.boot);
        held.document.stopped = false;
        if let Err(error) = held.write() {
            held.release();
            return Err(Unfinished::Storage(error.to_string()));
        }
        let images =
            images
                .iter()
                .zip(&held.document.members)
                .map(|(image_of, member)| {
                    let taken = Taken {
                        number: member.number,
                        generation: member.generation,
                        reset: None,
                    };
                    // The map of an older take is not kept: its contexts are refused rather than wrong.
                    let read_map =
                        image_of.served().changes().frozen().ok().filter(|map| {
                            (map.generation(), map.number()) == (taken.generation, taken.number)
                        });
                    image(image_of, taken, read_map)
                })
                .collect();
        Ok(Resumed { held, images, files })
    }

    /// The parameters it was created with, others as given.
    pub(super) fn options(&self, others: &HoldOptions) -> HoldOptions {
        HoldOptions {
            promise: self.document.promise,
            minimum: self.document.minimum,
            autogrow: self.document.autogrow,
            ..others.clone()
        }
    }

    /// Its storage.
    pub(super) const fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Adds storage, and says so to the next agent. What is on a member itself belongs to its image no more before it is
    /// used.
    pub(super) fn append(&mut self, spec: &StorageSpec) -> Result<(), SnapshotError> {
        super::gated::check_storage(&self.gates, std::slice::from_ref(spec))?;
        let devices: Vec<_> = self
            .images
            .iter()
            .filter_map(|image| image.served().cloned())
            .collect();
        let own = |image: &HeldImage| {
            image.served().map_or_else(Vec::new, |served| {
                own::ranges_of(std::slice::from_ref(spec), served)
            })
        };
        for image in &self.images {
            image.origin().exclude(image.image().key(), &own(image));
        }
        let guards = own::guards(std::slice::from_ref(spec), &devices);
        for guard in &guards {
            self.images.iter().for_each(|image| guard.used_by(image.image()));
        }
        if let Err(error) = self.pool.append(spec) {
            for image in &self.images {
                image.origin().include(image.image().key(), &own(image));
            }
            return Err(error.into());
        }
        self.guards.extend(guards);
        self.document.storage = self.pool.specs();
        self.write()
    }

    /// Adds a file on a device. The next agent is told before it is used.
    pub(super) fn append_file(&mut self, made: &NewFile) -> Result<(), SnapshotError> {
        self.images
            .iter()
            .for_each(|image| made.in_use.used_by(image.image()));
        let before = self.document.storage.clone();
        self.document.storage.push(StorageSpec::Own(made.spec.clone()));
        let added = self.write().and_then(|()| {
            let added = self.pool.append_own(made.spec.clone(), made.in_use.place());
            added.map_err(Into::into)
        });
        if added.is_err() {
            self.document.storage = before;
            // A place that is written down and not used harms nobody.
            let _ = self.write();
        }
        added
    }

    /// Ends it.
    pub(super) fn destroy(self) {
        self.release();
        if let Some(directory) = &self.directory {
            remove(directory);
        }
        let root = self.directory.as_deref().and_then(Path::parent);
        match (self.pool.remove_kept(), root) {
            (Ok(()), Some(root)) => places::forget(root, self.document.id),
            (Ok(()), None) => {}
            (Err(error), _) => tracing::warn!(%error, "a file of a destroyed snapshot stays"),
        }
    }

    /// Leaves it for the next agent, where it is written down. The devices take no writes any more.
    pub(super) fn leave(mut self) {
        if self.directory.is_none() {
            return self.destroy();
        }
        let flushed: io::Result<()> = self
            .images
            .iter()
            .filter(|image| matches!(image.image().state(), Ok(None)))
            .try_for_each(|image| {
                image
                    .image()
                    .flush()
                    .map_err(|error| io::Error::from_raw_os_error(error.errno()))
            });
        match flushed {
            Ok(()) => {
                self.document.stopped = true;
                if let Err(error) = self.write() {
                    tracing::warn!(%error, "a snapshot does not survive this boot");
                }
            }
            Err(error) => tracing::warn!(%error, "a snapshot does not survive this boot"),
        }
        self.release();
    }

    pub(super) fn release(&self) {
        for (gate, image) in self.gates.iter().zip(&self.images) {
            gate.release(image.image().key());
        }
        for image in &self.images {
            let Some(served) = image.served() else { continue };
            let origin = served.origin();
            origin.release(image.image().key());
            if self.document.promise == Promise::PowerCut && origin.counters().snapshots == 0 {
                // A lease that stays durable costs a little, and harms nobody.
                let _ = served.survive_power_cuts(false);
            }
        }
    }

    pub(super) fn write(&self) -> Result<(), SnapshotError> {
        match &self.directory {
            Some(directory) => Ok(self.document.write(directory)?),
            None => Ok(()),
        }
    }
}

/// Why a snapshot can't go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unfinished {
    #[error("the system went down while it was held, which it did not promise to survive")]
    Boot,
    #[error("{} is not as the agent left it: {why}", device.display())]
    Device { device: PathBuf, why: String },
    #[error("{0}")]
    Storage(String),
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// What a take has begun and takes back unless it is kept.
struct Began {
    directory: Option<PathBuf>,
    devices: Vec<Arc<Served>>,
    durable: bool,
    done: bool,
}

impl Began {
    fn keep(mut self) {
        self.done = true;
    }
}

impl Drop for Began {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        if let Some(directory) = &self.directory {
            remove(directory);
        }
        for device in self.devices.iter().filter(|_| self.durable) {
            if device.origin().counters().snapshots == 0 {
                let _ = device.survive_power_cuts(false);
            }
        }
    }
}

/// Removes the directory of a snapshot: the document first, so that it is never found without its journals.
pub(super) fn remove(directory: &Path) {
    let document = directory.join("snapshot");
    let removed = match fs::remove_file(&document) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => fs::remove_dir_all(directory),
    };
    if let Err(error) = removed {
        tracing::warn!(directory = %directory.display(), %error, "the state of a snapshot stays");
    }
}

fn subject(id: SnapshotId, number: usize, served: &Served) -> Subject {
    Subject {
        snapshot: id.uuid(),
        member: u32::try_from(number).unwrap_or(u32::MAX),
        layout: *served.origin().layout(),
    }
}

fn begin_journal(path: &Path, subject: &Subject, promise: Promise) -> Result<Journal, SnapshotError> {
    let made = || -> io::Result<File> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        file.set_len(Journal::most_bytes(&subject.layout))?;
        Ok(file)
    };
    let file = made().map_err(|source| SnapshotError::state("make", path, source))?;
    let disk = FileDisk::new(
        path.display().to_string(),
        Arc::new(file),
        Journal::most_bytes(&subject.layout),
    );
    Ok(Journal::create(Arc::new(disk), subject, promise)?)
}

/// Most ranges of what was free that are written down: the others can't become storage after a restart.
const MOST_FREE: usize = 4096;

fn document_of(image: &ServedImage, taken: &Taken) -> MemberDocument {
    let served = image.served();
    let mut free = served.origin().free_of(image.image().key());
    if free.len() > MOST_FREE {
        free.sort_unstable_by_key(|range| std::cmp::Reverse(range.length));
        free.truncate(MOST_FREE);
        free.sort_unstable();
    }
    let layout = served.origin().layout();
    MemberDocument {
        name: served.name().to_owned(),
        path: served.path().to_owned(),
        size: layout.size(),
        chunk: layout.chunk_bytes(),
        generation: taken.generation,
        number: taken.number,
        session: served.session(),
        session_before: None,
        free,
    }
}

fn image(image: &ServedImage, taken: Taken, read_map: Option<Arc<crate::cbt::ReadMap>>) -> Image {
    Image {
        size: image.image().size(),
        member: Member::Served(Arc::clone(image.served())),
        content: Content::Held(HeldImage::Served(image.clone())),
        taken,
        read_map,
        consistency: Consistency::Crash,
        frozen: Duration::ZERO,
        copied_bytes: 0,
        rounds: 0,
    }
}

/// Smallest logical block of the devices.
pub(super) fn logical_block(devices: &[Arc<Served>]) -> u32 {
    let blocks = devices
        .iter()
        .map(|served| served.origin().disk().logical_block());
    blocks.min().unwrap_or(512)
}

pub(super) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

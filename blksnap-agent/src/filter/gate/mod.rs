//! Gate: holds the writes of any disk or partition in use, from eBPF.
//!
//! A program on entry of `submit_bio_noacct` makes the first write to a unit wait until its old data is kept, in a loop
//! (*spin*); where the kernel has function error injection it is one on entry of `should_fail_bio`, and the write sleeps
//! (*park*). A second one behind it, at `block_bio_queue`, checks that no write goes to the driver before that. Nothing is inserted into
//! the device's stack, no module is loaded, and nothing is attached while no snapshot is held.
//!
//! # Why an image is right
//! Let `u` be a unit of the origin, and `T` the instant: the moment when the gate was armed.
//!
//! 1. A write that passes the auditor after `T` finds the bit of `u` set, or breaks the gate before it goes to the
//!    driver. The auditor is behind the last place where a write could wait, and sees every write of the disk.
//! 2. The bit is set while the write of the unit counts as admitted ([`crate::engine::cow::Origin::admit`]): its old
//!    data is in the table of every snapshot that lacked it. Nobody arms meanwhile.
//! 3. A read of the origin for an image or for preserving looks at the gate *after* the data came
//!    (`Source`): if it is broken, the read fails, and the snapshot with it. By (1) data that was
//!    overwritten before it was kept comes with a broken gate.
//! 4. So what a read of the origin gives, in an unbroken gate, was there at `T`, if no write that passed the auditor
//!    before `T` was still under way. A file system that is frozen has none. Of a device without one, the taker waits
//!    until the driver has none; one that lies between the auditor and the driver then (in a plug list, for
//!    microseconds, or held by a throttle) is the limit of this filter for raw devices.
//!
//! Units that are difference storage on the device itself (`own`) belong to no image: their bits are set from the arming
//! on, without anything being kept.
//!
//! Copies of the program that run out, a writer that no program sees, a stalled disk, an agent that died: each ends in
//! (1) or in the deadline, that is in a snapshot that says it is lost, and an origin that goes on.
//!
//! # Who reads and who waits
//! Threads that preserve read the origin past its own page cache (`source` says how), since a direct read first
//! writes back the cached pages of the node that it goes through, and that write could wait here for the read.

mod batch;
mod error;
mod image;
mod object;
mod own;
pub mod park;
mod preempt;
mod priority;
mod serve;
mod source;
mod technique;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use blksnap_common::gate::{COPIES, GateState};
use blksnap_common::track::Slot;

use crate::cow::{ChunkParams, SnapshotKey};
use crate::disk::{BlockDevice, Disk};
use crate::engine::cow::{Image, Origin, Store};
use crate::tracker::KernelBtf;
use crate::units::DeviceId;

pub use error::GateError;
pub use image::GateImage;
pub use preempt::Switch;
pub use priority::Priority;
pub use source::{Reading, Source, remove_left_aliases};
pub use technique::{Availability, Preemption, Technique, Wish};

use park::ParkerCommand;
use serve::{Gated, Server};

/// Least time that writes of before a take have to end in.
const SETTLE: Duration = Duration::from_millis(50);

/// How gates work.
#[derive(Clone, Debug)]
pub struct GateOptions {
    /// Longest wait of a write: past that the snapshot is broken.
    pub deadline: Duration,
    /// Longest silence of the agent that a waiting write bears.
    pub silence: Duration,
    /// Threads that preserve.
    pub threads: usize,
    /// Their priority.
    pub priority: Priority,
    /// Copies of the waiting program, 1 to [`COPIES`]: writers that can wait on one CPU.
    pub copies: usize,
    /// Whether one thread reads for all short requests at once, with io_uring, where writers turn in a loop; else each is
    /// read for by a thread of its own.
    pub batches: bool,
    /// Makes the kernel preempt as it must while there are gates; none: it is as it is.
    pub preempt: Option<Switch>,
    /// How writes are to wait.
    pub technique: Wish,
    /// The process in whose memory they sleep.
    pub parker: ParkerCommand,
    /// The kernel's type information.
    pub btf: PathBuf,
}

impl Default for GateOptions {
    fn default() -> Self {
        Self {
            deadline: Duration::from_millis(500),
            silence: Duration::from_millis(400),
            threads: 4,
            priority: Priority::Auto,
            copies: COPIES,
            batches: true,
            preempt: None,
            technique: Wish::Auto,
            parker: ParkerCommand::default(),
            btf: PathBuf::from(KernelBtf::PATH),
        }
    }
}

impl GateOptions {
    /// The defaults, with this deadline, and a silence that ends before it.
    #[must_use]
    pub fn with_deadline(deadline: Duration) -> Self {
        Self {
            deadline,
            silence: deadline * 4 / 5,
            ..Self::default()
        }
    }
}

/// All gates of the agent. Programs are attached while there is one.
#[derive(Debug)]
pub struct Gates {
    options: GateOptions,
    table: Arc<Table>,
}

/// The gates that stand, one before a device.
#[derive(Debug, Default)]
struct Table {
    standing: Mutex<Standing>,
    /// A gate was taken away.
    gone: Condvar,
}

#[derive(Debug, Default)]
struct Standing {
    server: Weak<Server>,
    gates: BTreeMap<DeviceId, Weak<Gate>>,
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A member of a take.
#[derive(Debug)]
pub struct Member {
    /// The device.
    pub gate: Arc<Gate>,
    /// Where its old data is kept.
    pub store: Arc<Store>,
}

impl Gates {
    /// No gate; nothing is loaded yet.
    #[must_use]
    pub fn new(options: GateOptions) -> Self {
        Self {
            options,
            table: Arc::default(),
        }
    }

    /// How they work.
    #[must_use]
    pub const fn options(&self) -> &GateOptions {
        &self.options
    }

    /// The gates that stand.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Gate>> {
        self.table
            .lock()
            .gates
            .values()
            .filter_map(Weak::upgrade)
            .collect()
    }

    /// The gate before `device`, open until a snapshot is taken. Those who ask for the same device share one.
    ///
    /// # Errors
    /// The kernel refuses the programs, there are too many gates, or the device can't be read past its page cache.
    pub fn gate(&self, device: &BlockDevice, params: &ChunkParams) -> Result<Arc<Gate>, GateError> {
        let mut standing = self.table.lock();
        while let Some(known) = standing.gates.get(&device.id) {
            if let Some(gate) = known.upgrade() {
                return Ok(gate);
            }
            // Its last user has let it go, and it is being taken away.
            standing = self
                .table
                .gone
                .wait(standing)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let running = match standing.server.upgrade() {
            Some(running) => running,
            None => {
                let (loaded, chosen, switched) = technique::load(&self.options, &device.path)?;
                tracing::info!(technique = %chosen.technique, why = chosen.why, "writes can be held");
                let started = Server::start(loaded, chosen, switched, &self.options)?;
                standing.server = Arc::downgrade(&started);
                started
            }
        };
        let gated = running.open(device, params)?;
        let gate = Arc::new(Gate {
            device: device.clone(),
            gated,
            server: Some(running),
            table: Arc::clone(&self.table),
        });
        standing.gates.insert(device.id, Arc::downgrade(&gate));
        Ok(gate)
    }

    /// Takes all devices at one instant, and gives their images in the same order. The caller has frozen their file
    /// systems, if they have any; `close` is called at the instant, when no write to a unit goes on that is not
    /// kept yet.
    ///
    /// # Errors
    /// One of them can't be armed, or `close` fails: then none is taken.
    pub fn take(
        members: &[Member],
        close: impl FnOnce() -> Result<(), GateError>,
    ) -> Result<Vec<Image>, GateError> {
        // One order everywhere: two takes of the same devices wait for each other, not both forever.
        let mut order: Vec<&Member> = members.iter().collect();
        order.sort_by_key(|member| member.gate.gated.slot.id);
        let mut taken: Vec<(u32, Image)> = Vec::new();
        let mut failure = None;
        for member in &order {
            member.gate.server().ready()?;
        }
        {
            let paused: Vec<_> = order.iter().map(|member| member.gate.origin().pause()).collect();
            for member in &order {
                member.gate.server().arm(&member.gate.gated);
            }
            for member in &order {
                if let Err(error) = member.gate.settle() {
                    failure = Some(error);
                    break;
                }
            }
            for member in order.iter().filter(|_| failure.is_none()) {
                member.gate.server().begin_audit(&member.gate.gated);
            }
            if failure.is_none() {
                failure = close().err();
            }
            for (member, paused) in order.iter().zip(&paused) {
                if failure.is_some() {
                    break;
                }
                match paused.arm(Arc::clone(&member.store)) {
                    Ok(image) => taken.push((member.gate.gated.slot.id, image)),
                    Err(source) => {
                        failure = Some(GateError::Arm {
                            device: member.gate.device.path.clone(),
                            source,
                        });
                    }
                }
            }
        }
        // A write that no program saw came between: nobody has been told of the snapshot yet.
        let broken = order.iter().find(|member| member.gate.state().broken != 0);
        if let (None, Some(member)) = (&failure, broken) {
            failure = Some(GateError::Broken {
                device: member.gate.device.path.clone(),
                reason: serve::reasons_of(member.gate.state().broken),
            });
        }
        if let Some(error) = failure {
            for (member, (_, image)) in order.iter().zip(&taken) {
                member.gate.origin().release(image.key());
            }
            order
                .iter()
                .for_each(|member| member.gate.server().open_if_unused(&member.gate.gated));
            return Err(error);
        }
        let image_of = |member: &Member| {
            let id = member.gate.gated.slot.id;
            taken
                .iter()
                .find(|(of, _)| *of == id)
                .map(|(_, image)| image.clone())
        };
        Ok(members.iter().filter_map(image_of).collect())
    }
}

/// A gate before a device. Dropping it opens it; with the last one everything is detached.
#[derive(Debug)]
pub struct Gate {
    device: BlockDevice,
    gated: Arc<Gated>,
    /// There until it is dropped.
    server: Option<Arc<Server>>,
    table: Arc<Table>,
}

impl Gate {
    fn server(&self) -> &Server {
        self.server.as_deref().expect("a gate has it until it is dropped")
    }

    /// The device.
    #[must_use]
    pub const fn device(&self) -> &BlockDevice {
        &self.device
    }

    /// The device under copy on write.
    #[must_use]
    pub fn origin(&self) -> &Arc<Origin> {
        &self.gated.origin
    }

    /// How writes wait.
    #[must_use]
    pub fn technique(&self) -> Technique {
        self.server().chosen().technique
    }

    /// Why they wait so.
    #[must_use]
    pub fn technique_reason(&self) -> &str {
        &self.server().chosen().why
    }

    /// How old data is read.
    #[must_use]
    pub fn reading(&self) -> &Reading {
        self.gated.source.reading()
    }

    /// The device as difference storage, by the way that old data is read, until the gate is gone. What is written here
    /// must be excluded from the images ([`Origin::claim`]) before the take.
    ///
    /// # Errors
    /// It can't be written that way.
    pub fn storage(&self) -> Result<Arc<dyn Disk>, GateError> {
        own::OwnDisk::open(&self.gated.source).map_err(|error| GateError::Device {
            action: "store on",
            device: self.device.path.clone(),
            reason: error.to_string(),
        })
    }

    /// What was counted since it was made, and whether it is broken.
    #[must_use]
    pub fn state(&self) -> GateState {
        self.server().state(&self.gated.slot)
    }

    /// Writes that found everything kept.
    ///
    /// # Errors
    /// The counters can't be read.
    pub fn passed(&self) -> Result<u64, GateError> {
        self.server().passed(self.gated.slot.id)
    }

    /// Which sectors of the disk it stands before.
    #[must_use]
    pub fn slot(&self) -> Slot {
        self.gated.slot
    }

    /// Ends a snapshot. With the last one of the device writes pass at once.
    pub fn release(&self, snapshot: SnapshotKey) {
        self.gated.origin.release(snapshot);
        self.server().open_if_unused(&self.gated);
    }

    /// Waits until the driver has no write that passed before the gate was armed, and nothing is being preserved.
    fn settle(&self) -> Result<(), GateError> {
        let most = (self.server().options().deadline / 2).max(SETTLE);
        let until = std::time::Instant::now() + most;
        let mut idle = 0;
        loop {
            let writes = self
                .device
                .writes_in_driver()
                .map_err(|source| GateError::Device {
                    action: "ask how many writes are under way on",
                    device: self.device.path.clone(),
                    reason: source.to_string(),
                })?;
            idle = if writes == 0 { idle + 1 } else { 0 };
            if idle == 2 {
                return Ok(());
            }
            if std::time::Instant::now() > until {
                return Err(GateError::Busy {
                    device: self.device.path.clone(),
                });
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        let server = self.server.take();
        let mut standing = self.table.lock();
        if let Some(server) = server {
            server.close(&self.gated);
            // The last one detaches everything, before anybody attaches anew.
            drop(server);
        }
        standing.gates.remove(&self.device.id);
        drop(standing);
        self.table.gone.notify_all();
    }
}

//! Device: a served disk as a block device.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{Builder, JoinHandle};

use libublk::ctrl::UblkCtrl;
use libublk::io::{UblkDev, UblkIOCtx};

use super::control::{self, Control};
use super::geometry::Geometry;
use super::pool::Pool;
use super::queue::{self, Answers, End, QUEUE};
use super::request::{Action, Request};
use super::{Left, UblkError, users};
use crate::disk::Zero;
use crate::filter::served::Served;
use crate::sys::AlignedBuffer;

/// Threads for reads.
const READERS: usize = 8;
/// Threads for all others: each may wait for old data to be kept.
const CHANGERS: usize = 16;

/// A served disk as a block device. Dropped without [`Device::remove`], it stays for the next agent.
#[derive(Debug)]
pub struct Device {
    node: PathBuf,
    control: Control,
    running: Mutex<Option<Running>>,
}

/// What carries out requests.
struct Running {
    device: Arc<UblkDev>,
    pools: Arc<Pools>,
    answers: Arc<Answers>,
    thread: JoinHandle<End>,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Running").finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Pools {
    readers: Pool<Request>,
    changers: Pool<Request>,
}

impl Pools {
    fn carry_out(&self, request: Request) {
        let pool = if request.may_wait() {
            &self.changers
        } else {
            &self.readers
        };
        pool.give(request);
    }

    fn stop(&self) {
        self.changers.stop();
        self.readers.stop();
    }
}

impl Device {
    /// Finds the device that is written down, or makes one. `note` is called with what is to be written down of a new
    /// one, before anybody can see it.
    ///
    /// # Errors
    /// Neither can be; a device that was found still waits.
    pub fn open<E: From<UblkError>>(
        served: Arc<Served>,
        left: &Left,
        note: impl FnOnce(&Left) -> Result<(), E>,
    ) -> Result<Self, E> {
        control::available()?;
        let geometry = Geometry::of(&served)?;
        if let Some(number) = left.number
            && let Some(known) = control::look(number)?
            && known.token == left.token
        {
            if !known.dead {
                let control = Control::recover(number)?;
                return Ok(Self::start(control, served, &geometry)?);
            }
            // The agent before ended between making and starting it.
            control::discard(number)?;
        }
        let control = Control::add(left.number, left.token)?;
        let number = control.number();
        let made = note(&Left {
            number: Some(number),
            token: left.token,
        })
        .and_then(|()| Ok(Self::start(control, served, &geometry)?));
        if made.is_err()
            && let Err(error) = control::discard(number)
        {
            tracing::warn!(%error, "a ublk device that was made in vain stays");
        }
        made
    }

    /// Ends a device that is written down and that no agent serves. What waits for it gets errors.
    ///
    /// # Errors
    /// The driver refuses: it stays.
    pub fn give_up(left: &Left) -> Result<(), UblkError> {
        match control::available() {
            Err(UblkError::NoDriver) => return Ok(()),
            available => available?,
        }
        match left.number {
            Some(number) if control::look(number)?.is_some_and(|known| known.token == left.token) => {
                control::give_up(number)
            }
            _ => Ok(()),
        }
    }

    /// Takes requests of a device that is new, or that waits.
    fn start(control: Control, served: Arc<Served>, geometry: &Geometry) -> Result<Self, UblkError> {
        let name = served.name().to_owned();
        let device = Arc::new(control.open(geometry)?);
        let made = Running::begin(&control, &device, served);
        let running = made.map_err(|source| UblkError::Io {
            action: "start the threads of a ublk device",
            source,
        })?;
        drop(device);
        if let Err(error) = control.start(&running.device) {
            // Its queue ends with the device, or with this process.
            running.pools.stop();
            return Err(error);
        }
        match control.size() {
            Ok(size) if size != geometry.size => {
                tracing::warn!(
                    name,
                    size,
                    disk = geometry.size,
                    "a ublk device has another size than its disk"
                );
            }
            _ => {}
        }
        let node = PathBuf::from(format!("/dev/ublkb{}", control.number()));
        tracing::info!(name, node = %node.display(), "served as a block device");
        Ok(Self {
            node,
            control,
            running: Mutex::new(Some(running)),
        })
    }

    /// Its block device.
    #[must_use]
    pub fn node(&self) -> PathBuf {
        self.node.clone()
    }

    /// Whether nobody has it open.
    ///
    /// # Errors
    /// Somebody has.
    pub fn check_unused(&self) -> Result<(), UblkError> {
        match users::user(&self.node) {
            None => Ok(()),
            Some(user) => Err(UblkError::Busy {
                node: self.node.clone(),
                user: user.to_string(),
            }),
        }
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends it, after what was written to it has reached the disk. Whoever has it open gets errors from then on.
    ///
    /// # Errors
    /// The driver refuses: it stays.
    pub fn remove(&self) -> Result<(), UblkError> {
        let mut running = self.running();
        if running.is_none() {
            return Ok(());
        }
        self.control.stop()?;
        if let Some(running) = running.take() {
            running.join();
        }
        self.control.delete()?;
        tracing::info!(node = %self.node.display(), "no longer a block device");
        Ok(())
    }

    /// Leaves it for the next agent; returns when nothing goes to the disk any more. Its requests wait.
    pub fn leave(&self) {
        if let Some(running) = self.running().take() {
            // Nothing is given to the disk after this.
            running.pools.stop();
            // The queue ends by itself; that takes the driver some time, which nobody has to wait for.
            running.answers.leave();
            tracing::info!(node = %self.node.display(), "requests wait until the daemon starts again");
        }
    }
}

impl Running {
    fn begin(control: &Control, device: &Arc<UblkDev>, served: Arc<Served>) -> io::Result<Self> {
        let answers = Arc::new(Answers::new()?);
        let bytes = crate::sys::ublk::character_device(device)?;
        let shared = Arc::new(Shared {
            served,
            bytes,
            answers: Arc::clone(&answers),
        });
        let longest = control.longest();
        let pool = |name, count| Pool::start(name, count, || worker(Arc::clone(&shared), longest));
        let pools = Arc::new(Pools {
            readers: pool("blksnap-ublk-r", READERS)?,
            changers: pool("blksnap-ublk-w", CHANGERS)?,
        });
        let (ready, begun) = mpsc::channel();
        let thread = {
            let (device, pools, answers) = (Arc::clone(device), Arc::clone(&pools), Arc::clone(&answers));
            Builder::new().name("blksnap-ublk".to_owned()).spawn(move || {
                let carry_out = |request| pools.carry_out(request);
                queue::run(&device, &answers, &ready, &carry_out)
            })?
        };
        let running = Self {
            device: Arc::clone(device),
            pools,
            answers,
            thread,
        };
        match begun.recv() {
            Ok(Ok(())) => Ok(running),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::other("the thread of its queue ended")),
        }
    }

    /// Waits for the end of the queue, then lets go of the character device.
    fn join(self) {
        match self.thread.join() {
            Ok(end) => tracing::debug!(?end, "the queue of a ublk device ended"),
            Err(_) => tracing::error!("the queue of a ublk device failed"),
        }
        self.pools.stop();
        drop(self.device);
    }
}

/// What every worker of a device has.
struct Shared {
    served: Arc<Served>,
    /// The character device: bytes of requests.
    bytes: File,
    answers: Arc<Answers>,
}

/// A worker with a buffer of its own.
fn worker(shared: Arc<Shared>, longest: usize) -> impl FnMut(Request) + Send + 'static {
    let mut buffer = AlignedBuffer::zeroed(longest.max(1));
    let mut began = false;
    move |request| {
        if !began {
            // Memory that this thread needs must not wait for the device itself.
            UblkCtrl::init_queue_thread();
            began = true;
        }
        let done = catch_unwind(AssertUnwindSafe(|| shared.carry_out(&request, &mut buffer)));
        let result = match done {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(error)) => -error
                .raw_os_error()
                .filter(|errno| *errno > 0)
                .unwrap_or(libc::EIO),
            Err(_) => {
                tracing::error!(
                    ?request,
                    "a thread that carried out a request of a ublk device failed"
                );
                -libc::EIO
            }
        };
        shared.answers.give(request.tag, result);
    }
}

impl Shared {
    /// Carries out a request; gives the bytes that were moved.
    fn carry_out(&self, request: &Request, buffer: &mut AlignedBuffer) -> io::Result<i32> {
        let Request { offset, length, .. } = *request;
        let served = &self.served;
        let moved = i32::try_from(length).unwrap_or(i32::MAX);
        match request.action {
            Action::Read => {
                let part = part(buffer, length)?;
                served.read_at(part, offset)?;
                self.bytes.write_all_at(part, place(request.tag))?;
                return Ok(moved);
            }
            Action::Write { fua } => {
                let part = part(buffer, length)?;
                self.bytes.read_exact_at(part, place(request.tag))?;
                served.write_at(part, offset, fua)?;
                return Ok(moved);
            }
            Action::Flush => served.flush()?,
            Action::Discard { fua } => served.discard_at(offset, length, fua)?,
            Action::Zero { keep, fua } => {
                let zero = if keep { Zero::Keep } else { Zero::Deallocate };
                served.zero_at(offset, length, zero, false, fua)?;
            }
            Action::Unknown => return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
        }
        Ok(0)
    }
}

/// As much of a buffer as a request has bytes.
fn part(buffer: &mut AlignedBuffer, length: u64) -> io::Result<&mut [u8]> {
    usize::try_from(length)
        .ok()
        .and_then(|length| buffer.as_mut_slice().get_mut(..length))
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// Where the bytes of a request are on the character device.
fn place(tag: u16) -> u64 {
    UblkIOCtx::ublk_user_copy_pos(QUEUE, tag, 0)
}

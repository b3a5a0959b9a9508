//! Place: the agent's side of where writes sleep.
//!
//! A file of one page for each CPU and copy of the program, served by FUSE and mounted nowhere; the parker has it mapped.
//! A read of a page is the request of the write that sleeps there; which units it needs stands in the map `PARKED`. The
//! answer is always an error, so that the kernel keeps no page, and only says: look again.
//!
//! # Who reads the requests
//! Workers: each reads a request, keeps its units, answers, and reads the next. If all of them are busy nobody reads, and
//! then who watches the gates does, at every sign of life, on a descriptor that never waits: so every request is
//! answered soon after its deadline, and soon after its gate broke, however slow a disk is.
//!
//! # Ends
//! `abort` of the connection ends every sleep and every worker. It also comes from the parker when the agent was silent.
//! The place is gone then, and so it is when the parker is; a gate that needs it is broken, and the next take makes
//! another one.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blksnap_common::gate::{PARKED_WORDS, Request};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::ParkerCommand;
use super::parker::{PARK, PARK_BYTES, READY, READY_BYTES};
use super::wire::{BUFFER, Message, refusal};
use crate::filter::gate::{GateError, GateOptions};
use crate::sys::mman::SharedWords;
use crate::sys::{fdpass, fuse};

/// How long the parker may take to start; a machine in need of memory is slow to lock it.
const START_LIMIT: Duration = Duration::from_secs(20);

/// Milliseconds between looks for the end of the start.
const LOOK: u16 = 10;

/// What the programs read and write of it.
#[derive(Clone, Debug)]
pub(in crate::filter::gate) struct Maps {
    /// `PARKED`.
    pub(in crate::filter::gate) parked: Arc<SharedWords>,
    /// `PARKER`.
    pub(in crate::filter::gate) parker: Arc<SharedWords>,
}

impl Maps {
    fn places(&self) -> u64 {
        (self.parked.words().len() / PARKED_WORDS) as u64
    }

    /// Where a write sleeps: what it needs, and since when.
    fn read(&self, place: u64) -> Option<(Request, u64)> {
        let first = usize::try_from(place).ok()?.checked_mul(PARKED_WORDS)?;
        let words = self.parked.words().get(first..first + PARKED_WORDS)?;
        let at = |n: usize| words[n].load(Ordering::Acquire);
        let [a, b, c, d, ..] = at(3).to_ne_bytes();
        let request = Request {
            first: at(0),
            last: at(1),
            gate: u32::from_ne_bytes([a, b, c, d]),
            reserved: 0,
        };
        Some((request, at(2)))
    }

    /// Tells the programs where to sleep. The page comes last, and goes first: 0 is no place.
    fn tell(&self, base: u64, page: u64, pid: u32) {
        let words = self.parker.words();
        words[0].store(base, Ordering::SeqCst);
        words[2].store(pid.into(), Ordering::SeqCst);
        words[1].store(page, Ordering::SeqCst);
    }

    fn take_away(&self) {
        self.parker.words()[1].store(0, Ordering::SeqCst);
    }
}

/// A write that sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::filter::gate) struct Sleeper {
    unique: u64,
    pub(in crate::filter::gate) request: Request,
    since: u64,
    /// It was read by who watches.
    spare: bool,
    answered: bool,
}

/// Who is at work on what.
#[derive(Debug, Default)]
struct Work {
    /// Workers that do not wait for a request.
    busy: usize,
    /// Requests that have no answer, or whose worker is still at work.
    open: BTreeMap<u64, Sleeper>,
    /// Those of them that no worker has.
    left: VecDeque<u64>,
}

/// The place.
#[derive(Debug)]
pub(in crate::filter::gate) struct Place {
    maps: Maps,
    device: File,
    /// Another way to its requests.
    spare: File,
    abort: File,
    lifeline: UnixStream,
    parker: Mutex<Child>,
    page: u64,
    workers: usize,
    work: Mutex<Work>,
    gone: AtomicBool,
    told: AtomicBool,
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> GateError {
    move |source| GateError::Place { action, source }
}

impl Place {
    /// Makes the file and starts the parker. As many workers as there are to be have to call [`Place::next`] from then on.
    pub(in crate::filter::gate) fn open(options: &GateOptions, maps: Maps) -> Result<Arc<Self>, GateError> {
        let (command, silence) = (&options.parker, options.silence);
        let workers = options.threads.max(1);
        let device = fuse::open_device().map_err(failed("open /dev/fuse"))?;
        let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
            .ok()
            .flatten()
            .and_then(|bytes| u64::try_from(bytes).ok())
            .unwrap_or(4096);
        let length = maps.places() * page;
        let ready = AtomicBool::new(false);
        let started = std::thread::scope(|scope| {
            let server = scope.spawn(|| serve_until(&device, length, &ready));
            let started = start(command, &device, length, silence);
            ready.store(true, Ordering::Release);
            let _ = server.join();
            started
        })?;
        let Started {
            child,
            lifeline,
            abort,
            base,
        } = started;
        let pid = child.id();
        let place = Self {
            spare: fuse::clone_device(&device).map_err(failed("read requests beside others"))?,
            device,
            abort,
            lifeline,
            parker: Mutex::new(child),
            page,
            workers,
            work: Mutex::new(Work {
                busy: workers,
                ..Work::default()
            }),
            gone: AtomicBool::new(false),
            told: AtomicBool::new(false),
            maps,
        };
        place
            .lifeline
            .set_nonblocking(true)
            .map_err(failed("talk to the parker"))?;
        place.maps.tell(base, page, pid);
        Ok(Arc::new(place))
    }

    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nobody can sleep here any more.
    pub(in crate::filter::gate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// The same, once.
    pub(in crate::filter::gate) fn has_just_gone(&self) -> bool {
        self.is_gone() && !self.told.swap(true, Ordering::AcqRel)
    }

    fn go(&self) {
        self.maps.take_away();
        self.gone.store(true, Ordering::Release);
    }

    /// For a worker: the next write that sleeps; `None` at the end.
    pub(in crate::filter::gate) fn next(&self) -> Option<Sleeper> {
        let mut buffer = [0; BUFFER];
        loop {
            {
                let mut work = self.work();
                if let Some(unique) = work.left.pop_front() {
                    if let Some(sleeper) = work.open.get(&unique) {
                        return Some(*sleeper);
                    }
                    continue;
                }
                work.busy -= 1;
            }
            let read = (&self.device).read(&mut buffer);
            let mut work = self.work();
            work.busy += 1;
            match read {
                Ok(count) => {
                    if let Some(sleeper) = self.asked(&buffer[..count], false) {
                        work.open.insert(sleeper.unique, sleeper);
                        return Some(sleeper);
                    }
                }
                Err(error) if is_passing(&error) => {}
                Err(_) => {
                    drop(work);
                    self.go();
                    return None;
                }
            }
        }
    }

    /// For a worker: the units are kept, or will not be.
    pub(in crate::filter::gate) fn done(&self, sleeper: &Sleeper) {
        let open = self.work().open.remove(&sleeper.unique);
        if open.is_some_and(|open| !open.answered) {
            self.answer(sleeper);
        }
    }

    /// Wakes a write. One that is awake already, because it was killed, is no error.
    fn answer(&self, sleeper: &Sleeper) {
        self.write(sleeper.spare, &refusal(sleeper.unique, libc::EAGAIN));
    }

    fn write(&self, spare: bool, answer: &[u8]) {
        let mut to = if spare { &self.spare } else { &self.device };
        if let Err(error) = to.write_all(answer) {
            tracing::trace!(%error, "a request of the parking place is not there any more");
        }
    }

    /// What a request is; answers it if it is no sleeper.
    fn asked(&self, bytes: &[u8], spare: bool) -> Option<Sleeper> {
        let length = self.maps.places() * self.page;
        match Message::of(bytes, length) {
            Message::Read { unique, offset } => match self.maps.read(offset / self.page) {
                Some((request, since)) => Some(Sleeper {
                    unique,
                    request,
                    since,
                    spare,
                    answered: false,
                }),
                None => {
                    self.write(spare, &refusal(unique, libc::EIO));
                    None
                }
            },
            Message::Answered(answer) => {
                self.write(spare, &answer);
                None
            }
            Message::Told => None,
            Message::Damaged => {
                tracing::warn!(bytes = bytes.len(), "no request of FUSE");
                None
            }
        }
    }

    /// A sign of life to the parker, and whether it lives.
    pub(in crate::filter::gate) fn beat(&self) {
        let told = (&self.lifeline).write(b".");
        let mut byte = [0];
        let heard = (&self.lifeline).read(&mut byte);
        let full = |error: &io::Error| error.kind() == io::ErrorKind::WouldBlock;
        let alive = told.is_ok() || told.is_err_and(|error| full(&error));
        let silent = heard.is_err_and(|error| full(&error) || error.kind() == io::ErrorKind::Interrupted);
        if !(self.is_gone() || alive && silent) {
            self.end_waits();
            self.go();
        }
    }

    /// Wakes whoever sleeps longer than `deadline` nanoseconds at the time `now`, or at a gate that `is_over`; it looks
    /// itself why.
    pub(in crate::filter::gate) fn look(&self, now: u64, deadline: u64, is_over: impl Fn(u32) -> bool) {
        let mut work = self.work();
        if work.busy == self.workers {
            let mut buffer = [0; BUFFER];
            while let Ok(count) = (&self.spare).read(&mut buffer) {
                if let Some(sleeper) = self.asked(&buffer[..count], true) {
                    work.open.insert(sleeper.unique, sleeper);
                    work.left.push_back(sleeper.unique);
                }
            }
        }
        let mut ended = Vec::new();
        for sleeper in work.open.values_mut().filter(|sleeper| !sleeper.answered) {
            if now.saturating_sub(sleeper.since) > deadline || is_over(sleeper.request.gate) {
                self.answer(sleeper);
                sleeper.answered = true;
                ended.push(sleeper.unique);
            }
        }
        let Work { open, left, .. } = &mut *work;
        left.retain(|unique| {
            let ended = ended.contains(unique);
            if ended {
                open.remove(unique);
            }
            !ended
        });
    }

    /// Ends all sleeps, and the workers.
    fn end_waits(&self) {
        if let Err(error) = (&self.abort).write_all(b"1") {
            tracing::error!(%error, "the parking place of writes can't be ended");
        }
    }

    /// Ends everything.
    pub(in crate::filter::gate) fn end(&self) {
        self.go();
        self.end_waits();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.end();
        let parker = self.parker.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = parker.kill();
        if let Err(error) = parker.wait() {
            tracing::warn!(%error, "the parker does not end");
        }
    }
}

/// Errors of reading a request after which there are others.
fn is_passing(error: &io::Error) -> bool {
    // The request was taken back before it was read.
    matches!(
        error.raw_os_error(),
        Some(libc::ENOENT | libc::EINTR | libc::EAGAIN)
    )
}

/// A parker that is ready.
struct Started {
    child: Child,
    lifeline: UnixStream,
    abort: File,
    base: u64,
}

/// Everything that needs somebody to answer requests meanwhile.
fn start(
    command: &ParkerCommand,
    device: &File,
    length: u64,
    silence: Duration,
) -> Result<Started, GateError> {
    let mount = fuse::file(device).map_err(failed("make a file system"))?;
    let file = File::open(format!("/proc/self/fd/{}", mount.as_raw_fd()))
        .map_err(failed("open the file of a file system"))?;
    let metadata = file
        .metadata()
        .map_err(failed("look at the file of a file system"))?;
    if metadata.len() != length {
        let error = io::Error::other(format!("it has {} bytes, not {length}", metadata.len()));
        return Err(failed("make a file")(error));
    }
    let control = fuse::control().map_err(failed("look at connections of FUSE"))?;
    // The name of a connection is the number of its file system.
    let folder = format!(
        "/proc/self/fd/{}/{}",
        control.as_raw_fd(),
        nix::sys::stat::minor(metadata.dev())
    );
    let open = |name: &str, write: bool| {
        fs::OpenOptions::new()
            .read(!write)
            .write(write)
            .open(format!("{folder}/{name}"))
            .map_err(failed("look at a connection of FUSE"))
    };
    let (abort, waiting) = (open("abort", true)?, open("waiting", false)?);
    let (mut lifeline, theirs) = UnixStream::pair().map_err(failed("make a socket"))?;
    let child = Command::new(&command.program)
        .args(&command.arguments)
        .stdin(std::os::fd::OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .current_dir("/")
        .spawn()
        .map_err(failed("start the parker"))?;
    let mut child = Ending(Some(child));
    let mut message = [PARK; PARK_BYTES];
    let milliseconds = u64::try_from(silence.as_millis()).unwrap_or(u64::MAX);
    message[1..9].copy_from_slice(&length.to_le_bytes());
    message[9..].copy_from_slice(&milliseconds.to_le_bytes());
    let mut answer = [0; READY_BYTES];
    lifeline
        .set_read_timeout(Some(START_LIMIT))
        .and_then(|()| {
            let files = [file.as_fd(), abort.as_fd(), waiting.as_fd()];
            fdpass::send(&lifeline, &message, &files).map_err(io::Error::from)
        })
        .and_then(|()| lifeline.read_exact(&mut answer))
        .map_err(failed("start the parker"))?;
    if answer[0] != READY {
        let error = io::Error::other(format!("answer {:#04x}", answer[0]));
        return Err(failed("start the parker")(error));
    }
    let base = u64::from_le_bytes(answer[1..].try_into().expect("eight bytes"));
    Ok(Started {
        child: child.0.take().expect("it was just started"),
        lifeline,
        abort,
        base,
    })
}

/// A child that ends if nobody takes it.
struct Ending(Option<Child>);

impl Drop for Ending {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Answers what is asked while the file is opened and mapped.
fn serve_until(device: &File, length: u64, ready: &AtomicBool) {
    let mut buffer = [0; BUFFER];
    while !ready.load(Ordering::Acquire) {
        let mut polled = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut polled, PollTimeout::from(LOOK)), Ok(1..)) {
            continue;
        }
        let mut reader = device;
        let answer = match reader.read(&mut buffer) {
            Ok(count) => match Message::of(&buffer[..count], length) {
                Message::Read { unique, .. } => refusal(unique, libc::EAGAIN).to_vec(),
                Message::Answered(answer) => answer,
                Message::Told | Message::Damaged => continue,
            },
            Err(error) if is_passing(&error) => continue,
            // There is no file system yet.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                std::thread::sleep(Duration::from_millis(LOOK.into()));
                continue;
            }
            Err(_) => return,
        };
        let _ = reader.write_all(&answer);
    }
}

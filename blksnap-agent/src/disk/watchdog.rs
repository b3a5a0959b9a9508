//! Watchdog: a process that thaws file systems, and resumes device-mapper devices, when the agent can't.
//!
//! The agent starts it before it freezes anything and hands it the open mount points. From then on the frozen
//! state never outlives the agent: the process reads one end of a socket pair, and whatever ends the agent, a
//! `SIGKILL` included, closes the other end. It also thaws when the agent takes longer than the deadline, and
//! from then on again and again until it is told to stop, because a freeze that was still under way at the
//! deadline can only be ended once it is complete.
//!
//! End of file is never early: the kernel closes the descriptors of a killed process when its last thread is
//! gone, and a thread inside `FIFREEZE` can't go before that is done. So nothing is frozen after the last thaw.
//!
//! The process has its own session, ignores the signals that end a service, tells the out-of-memory killer to
//! look elsewhere, keeps its memory locked (it must not wait for a page that lies behind a frozen file system),
//! and writes nowhere. A service manager must not kill it together with the agent: `KillMode=process`.
//!
//! Devices are resumed before file systems are thawed, since a thaw writes. A device that is not suspended is left alone.
//!
//! # Protocol
//! One byte messages on a stream socket, standard input of the process:
//!
//! | from | message | meaning |
//! |---|---|---|
//! | agent | `F`, with descriptors | mount points, in the order of thawing; may come several times |
//! | agent | `M`, then 8 bytes | number of a device-mapper device, major and minor, little endian, in the order of resuming |
//! | agent | `A` | all sent: prepare |
//! | process | `R` | ready; only now may anything be frozen |
//! | agent | `G`, then 8 bytes | freezing begins; the deadline in milliseconds from now, little endian |
//! | agent | `D` | everything is thawed and resumed: stop |
//! | process | `D` or `T` | the answer: nothing done, or thawed at the deadline |

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::signal::{SigSet, Signal};

use crate::sys::dm::{Control, Flags, Which};
use crate::sys::{fdpass, ioctl};
use crate::units::DeviceId;

/// Name of the hidden subcommand whose body is [`main`].
pub const SUBCOMMAND: &str = "thaw-watchdog";

const DESCRIPTORS: u8 = b'F';
const MAPPED: u8 = b'M';
const ARM: u8 = b'A';
const READY: u8 = b'R';
const GO: u8 = b'G';
const DISARM: u8 = b'D';
const FIRED: u8 = b'T';

/// How long the process may take to start; a machine in need of memory is slow to lock it.
const START_LIMIT: Duration = Duration::from_secs(20);

/// Pause between attempts to thaw after the deadline.
const RETRY: Duration = Duration::from_millis(20);

/// How often a thaw is tried after the end of the agent, if the file system answers with an error.
const ATTEMPTS_AT_END: u32 = 500;

/// The program to run as the watchdog.
#[derive(Clone, Debug)]
pub struct WatchdogCommand {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
}

impl WatchdogCommand {
    /// The running program itself, with [`SUBCOMMAND`].
    #[must_use]
    pub fn own() -> Self {
        // Not `current_exe`: this path works also after the file was replaced by an upgrade.
        Self {
            program: "/proc/self/exe".into(),
            arguments: vec![SUBCOMMAND.into()],
        }
    }
}

/// The watchdog could not be used.
#[derive(Debug, thiserror::Error)]
pub enum WatchdogError {
    /// The process does not start.
    #[error("can't start the thaw watchdog {program}: {source}; nothing was frozen")]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The process is gone or does not answer.
    #[error("the thaw watchdog does not answer: {0}")]
    Silent(io::Error),
}

/// A running watchdog process, seen from the agent. Dropped, it thaws what it was given, if that is frozen.
#[derive(Debug)]
pub struct Watchdog {
    socket: UnixStream,
    child: Child,
}

impl Watchdog {
    /// Starts the process for the given mount points, in the order of thawing, and waits until it is ready.
    ///
    /// # Errors
    /// The process does not start or does not get ready.
    pub fn start(command: &WatchdogCommand, mountpoints: &[BorrowedFd<'_>]) -> Result<Self, WatchdogError> {
        Self::start_with(command, mountpoints, &[])
    }

    /// As [`Watchdog::start`], also for device-mapper devices, in the order of resuming.
    ///
    /// # Errors
    /// As [`Watchdog::start`].
    pub fn start_with(
        command: &WatchdogCommand,
        mountpoints: &[BorrowedFd<'_>],
        mapped: &[DeviceId],
    ) -> Result<Self, WatchdogError> {
        let failed = |source: io::Error| WatchdogError::Start {
            program: command.program.clone(),
            source,
        };
        let (socket, theirs) = UnixStream::pair().map_err(failed)?;
        let child = Command::new(&command.program)
            .args(&command.arguments)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .current_dir("/")
            .spawn()
            .map_err(failed)?;
        let mut watchdog = Self { socket, child };
        watchdog.prepare(mountpoints, mapped).map_err(failed)?;
        Ok(watchdog)
    }

    fn prepare(&mut self, mountpoints: &[BorrowedFd<'_>], mapped: &[DeviceId]) -> io::Result<()> {
        self.socket.set_read_timeout(Some(START_LIMIT))?;
        for part in mountpoints.chunks(fdpass::MAX_DESCRIPTORS) {
            fdpass::send(&self.socket, &[DESCRIPTORS], part)?;
        }
        for device in mapped {
            let mut message = vec![MAPPED];
            message.extend(device.major.to_le_bytes());
            message.extend(device.minor.to_le_bytes());
            self.socket.write_all(&message)?;
        }
        self.socket.write_all(&[ARM])?;
        match self.answer()? {
            READY => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Says that freezing begins now and ends before `limit` has passed.
    ///
    /// # Errors
    /// The process is gone: nothing must be frozen.
    pub fn go(&mut self, limit: Duration) -> Result<(), WatchdogError> {
        let milliseconds = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let mut message = vec![GO];
        message.extend(milliseconds.to_le_bytes());
        self.socket.write_all(&message).map_err(WatchdogError::Silent)
    }

    /// Says that everything is thawed, and ends the process. True if it had to thaw something at the deadline.
    ///
    /// # Errors
    /// The process did not answer; what was frozen is thawed all the same.
    pub fn disarm(mut self) -> Result<bool, WatchdogError> {
        let answer = self.socket.write_all(&[DISARM]).and_then(|()| self.answer());
        match answer {
            Ok(DISARM) => Ok(false),
            Ok(FIRED) => Ok(true),
            Ok(other) => Err(WatchdogError::Silent(unexpected(other))),
            Err(source) => Err(WatchdogError::Silent(source)),
        }
    }

    fn answer(&mut self) -> io::Result<u8> {
        let mut byte = [0];
        self.socket.read_exact(&mut byte)?;
        Ok(byte[0])
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        // The end of the stream ends the process; it is waited for so that it leaves no zombie.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        let _ = self.child.wait();
    }
}

fn unexpected(byte: u8) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("answer {byte:#04x}"))
}

/// Body of the watchdog process: serves standard input until its end.
///
/// # Errors
/// Standard input is no socket of an agent.
pub fn main() -> io::Result<()> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    separate_from_agent();
    serve(&socket)
}

/// Nothing here is essential: where it is not permitted, the watchdog still works in all but rare cases.
fn separate_from_agent() {
    let mut signals = SigSet::empty();
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGQUIT,
        Signal::SIGPIPE,
    ] {
        signals.add(signal);
    }
    let _ = signals.thread_block();
    let _ = nix::unistd::setsid();
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
}

fn serve(socket: &UnixStream) -> io::Result<()> {
    let mut held = Held::default();
    let mut deadline: Option<Instant> = None;
    let mut fired = false;
    loop {
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            fired |= held.release().thawed;
            deadline = Some(Instant::now() + RETRY);
        }
        if !wait_readable(socket, deadline)? {
            continue;
        }
        let mut byte = [0];
        let (count, descriptors) = match fdpass::receive(socket, &mut byte) {
            Ok(received) => received,
            Err(Errno::EINTR) => continue,
            // A socket in error is one whose other end is gone.
            Err(_) => (0, Vec::new()),
        };
        if count == 0 {
            return held.release_at_end();
        }
        match byte[0] {
            DESCRIPTORS => held.mountpoints.extend(descriptors),
            MAPPED => {
                let mut number = [0; 8];
                (&mut &*socket).read_exact(&mut number)?;
                held.add(u64::from_le_bytes(number))?;
            }
            ARM => {
                let _ = mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE);
                let _ = (&mut &*socket).write_all(&[READY]);
            }
            GO => {
                let mut milliseconds = [0; 8];
                if (&mut &*socket).read_exact(&mut milliseconds).is_err() {
                    return held.release_at_end();
                }
                let limit = Duration::from_millis(u64::from_le_bytes(milliseconds));
                deadline = Instant::now().checked_add(limit);
            }
            DISARM => {
                let _ = (&mut &*socket).write_all(&[if fired { FIRED } else { DISARM }]);
                return Ok(());
            }
            other => {
                held.release_at_end()?;
                return Err(unexpected(other));
            }
        }
    }
}

/// Waits until there is something to read, or until the deadline (false).
fn wait_readable(socket: &UnixStream, deadline: Option<Instant>) -> io::Result<bool> {
    let timeout = match deadline {
        None => PollTimeout::NONE,
        Some(deadline) => {
            let left = deadline.saturating_duration_since(Instant::now());
            // Rounded up, so that the loop does not spin in the last millisecond.
            PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        }
    };
    let mut watched = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    match poll(&mut watched, timeout) {
        Ok(count) => Ok(count > 0),
        Err(Errno::EINTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

struct Thawed {
    /// At least one was frozen, and is not any more.
    thawed: bool,
    /// At least one answered with an error other than "not frozen".
    failed: Option<Errno>,
}

/// What is frozen and suspended, maybe.
#[derive(Default)]
struct Held {
    mountpoints: Vec<OwnedFd>,
    mapped: Vec<DeviceId>,
    control: Option<Control>,
}

impl Held {
    /// A device by its number: the lower half is the major.
    fn add(&mut self, number: u64) -> io::Result<()> {
        if self.control.is_none() {
            self.control = Some(Control::open()?);
        }
        let part = |bits: u64| u32::try_from(bits & u64::from(u32::MAX)).unwrap_or_default();
        self.mapped.push(DeviceId {
            major: part(number),
            minor: part(number >> 32),
        });
        Ok(())
    }

    fn release(&self) -> Thawed {
        let mut result = Thawed {
            thawed: false,
            failed: None,
        };
        for device in &self.mapped {
            let Some(control) = &self.control else { continue };
            let which = Which::Device(*device);
            let suspended = |flags: Flags| flags.contains(Flags::SUSPEND);
            match control.info(which) {
                Ok(info) if !suspended(info.flags) => continue,
                Ok(_) => {}
                // It is gone.
                Err(Errno::ENXIO) => continue,
                Err(errno) => result.failed = Some(errno),
            }
            match control.resume(which, 0) {
                Ok(()) => result.thawed = true,
                Err(errno) => result.failed = Some(errno),
            }
        }
        for mountpoint in &self.mountpoints {
            match ioctl::fithaw(mountpoint) {
                Ok(()) => result.thawed = true,
                Err(Errno::EINVAL | Errno::EOPNOTSUPP) => {}
                Err(errno) => result.failed = Some(errno),
            }
        }
        result
    }

    fn release_at_end(&self) -> io::Result<()> {
        for _ in 0..ATTEMPTS_AT_END {
            match self.release().failed {
                None => return Ok(()),
                Some(_) => std::thread::sleep(RETRY),
            }
        }
        Err(io::Error::other(
            "a file system can't be thawed, or a device not be resumed",
        ))
    }
}

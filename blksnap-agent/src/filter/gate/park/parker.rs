//! Parker: the process in whose memory writes sleep.
//!
//! A write that has to wait reads a byte of this process' memory, from a page of the agent's file, and sleeps in that
//! page fault. The fault holds the lock of the memory: so after the start nothing here maps, allocates or frees, and it is
//! a process of its own.
//!
//! It holds nothing but a socket to the agent and two files of the FUSE connection. When the agent dies the kernel ends the
//! connection, and with it every sleep; the process then ends. When the agent is there, and says nothing for longer than a
//! write may bear, while somebody sleeps, the process ends the connection.
//!
//! # Protocol
//! On standard input, a stream socket: the agent sends `P`, the length of the file in bytes and the silence in
//! milliseconds (8 bytes each, little endian), with descriptors of the file, of `abort` and of `waiting`; the answer is `R`
//! and the address (8 bytes, little endian). From then on each byte from the agent is a sign of life.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::num::NonZeroUsize;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};

use crate::sys::fdpass;
use crate::sys::mman::Pages;

/// Name of the hidden subcommand whose body is [`main`].
pub const SUBCOMMAND: &str = "gate-parker";

/// First byte of what the agent sends, and its length.
pub(super) const PARK: u8 = b'P';
pub(super) const PARK_BYTES: usize = 17;

/// First byte of the answer, and its length.
pub(super) const READY: u8 = b'R';
pub(super) const READY_BYTES: usize = 9;

/// Body of the process: serves standard input until its end.
///
/// # Errors
/// Standard input is no socket of an agent, or the file can't be mapped.
pub fn main() -> io::Result<()> {
    let mut socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    separate_from_agent();
    let mut message = [0; PARK_BYTES];
    let (count, files) = fdpass::receive(&socket, &mut message)?;
    let [file, abort, waiting] = <[_; 3]>::try_from(files)
        .map_err(|files| damaged(&format!("{count} bytes and {} descriptors", files.len())))?
        .map(File::from);
    if count != PARK_BYTES || message[0] != PARK {
        return Err(damaged(&format!("{count} bytes")));
    }
    let number = |at: usize| u64::from_le_bytes(message[at..at + 8].try_into().expect("eight bytes"));
    let length = usize::try_from(number(1)).ok().and_then(NonZeroUsize::new);
    let length = length.ok_or_else(|| damaged("no length"))?;
    let silence = Duration::from_millis(number(9));
    // Before there are pages that nobody may touch here.
    let _ = mlockall(MlockAllFlags::MCL_CURRENT);
    let pages = Pages::map(&file, length)?;
    drop(file);
    let mut answer = [READY; READY_BYTES];
    answer[1..].copy_from_slice(&pages.address().to_le_bytes());
    socket.write_all(&answer)?;
    watch(&socket, &abort, &waiting, silence)
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the agent sent {what}"))
}

/// None of it is essential.
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
    // What joins small pages takes the lock of the memory for itself.
    let _ = prctl::set_thp_disable(true);
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
}

/// Until the agent is gone.
fn watch(socket: &UnixStream, abort: &File, waiting: &File, silence: Duration) -> io::Result<()> {
    let look = PollTimeout::try_from(silence / 4).unwrap_or(PollTimeout::MAX);
    let mut heard = Instant::now();
    loop {
        let mut polled = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut polled, look) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => {
                let mut signs = [0; 64];
                match nix::sys::socket::recv(
                    std::os::fd::AsRawFd::as_raw_fd(socket),
                    &mut signs,
                    nix::sys::socket::MsgFlags::empty(),
                ) {
                    Ok(1..) => heard = Instant::now(),
                    Err(Errno::EINTR | Errno::EAGAIN) => {}
                    // A socket in error is one whose other end is gone.
                    Ok(_) | Err(_) => return Ok(()),
                }
            }
            Err(errno) => return Err(errno.into()),
        }
        if heard.elapsed() >= silence && somebody_sleeps(waiting) {
            let _ = (&mut &*abort).write_all(b"1");
        }
    }
}

/// Whether the connection has requests without an answer; if it does not say so, there are some.
fn somebody_sleeps(waiting: &File) -> bool {
    let mut digits = [0; 24];
    match waiting.read_at(&mut digits, 0) {
        Ok(count) => is_some(&digits[..count]),
        Err(_) => true,
    }
}

/// Whether this is a number above 0.
fn is_some(digits: &[u8]) -> bool {
    digits.iter().any(|digit| (b'1'..=b'9').contains(digit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_of_sleepers_is_read() {
        assert!(!is_some(b"0\n"));
        assert!(!is_some(b""));
        assert!(is_some(b"1\n"));
        assert!(is_some(b"10\n"));
    }

    /// The process maps what it is given, says where, and ends when its agent does.
    #[test]
    fn it_ends_with_the_agent_and_ends_the_waits_of_a_silent_one() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let open = |name: &str| {
            File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path(name))
                .unwrap()
        };
        let (abort, waiting) = (open("abort"), open("waiting"));
        fs::write(path("waiting"), "0\n").unwrap();
        let silence = Duration::from_millis(40);
        let watcher = std::thread::spawn(move || watch(&theirs, &abort, &waiting, silence));
        let said = || fs::read(path("abort")).unwrap();
        std::thread::sleep(silence * 4);
        assert!(said().is_empty(), "nobody sleeps");
        fs::write(path("waiting"), "3\n").unwrap();
        let started = Instant::now();
        while said().is_empty() {
            assert!(started.elapsed() < Duration::from_secs(60), "no end of the waits");
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(ours);
        watcher.join().unwrap().unwrap();
    }
}

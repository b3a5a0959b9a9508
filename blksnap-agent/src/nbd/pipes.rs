//! Pipes: pages of a file on their way to the client, or of the client to a file, without a copy through the process.
//!
//! Pages that wait in a pipe or a socket are those of the file: a client may see a write of another client that was
//! acknowledged after its read began and before it got the data. The specification leaves the order of requests in
//! flight open, so both are right.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;

/// Most pipes kept for later.
const KEPT: usize = 64;

/// Bytes that a pipe should hold; the limit for processes without privileges (`fs.pipe-max-size`).
pub(super) const CAPACITY: usize = 1 << 20;

/// Empty pipes, to be used again.
#[derive(Clone, Debug, Default)]
pub(super) struct Pipes(Arc<Mutex<Vec<Pipe>>>);

impl Pipes {
    /// An empty pipe.
    ///
    /// # Errors
    /// No descriptor is left.
    pub(super) fn take(&self) -> io::Result<Pipe> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        kept.map_or_else(Pipe::new, Ok)
    }

    /// Keeps an empty pipe for later.
    pub(super) fn keep(&self, pipe: Pipe) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT {
            kept.push(pipe);
        }
    }
}

/// A pipe of our own.
#[derive(Debug)]
pub(super) struct Pipe {
    reader: OwnedFd,
    writer: OwnedFd,
}

impl Pipe {
    /// # Errors
    /// No descriptor is left.
    pub(super) fn new() -> io::Result<Self> {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        // A user with many pipes gets small ones (pipe-user-pages-soft), which costs speed only.
        let _ = fcntl(
            &writer,
            FcntlArg::F_SETPIPE_SZ(i32::try_from(CAPACITY).unwrap_or(i32::MAX)),
        );
        Ok(Self { reader, writer })
    }

    pub(super) fn reader(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }

    pub(super) fn writer(&self) -> BorrowedFd<'_> {
        self.writer.as_fd()
    }

    /// Takes pages of `file` until `length` bytes are in the empty pipe or it is full; 0 is the end of the file.
    ///
    /// # Errors
    /// The file can't be read. Nothing is left in the pipe that was empty, unless something was read before.
    pub(super) fn fill(&self, file: &File, offset: u64, length: usize) -> io::Result<usize> {
        let mut position = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        let mut filled = 0;
        while filled < length {
            match splice(
                file,
                Some(&mut position),
                &self.writer,
                None,
                length - filled,
                SpliceFFlags::SPLICE_F_NONBLOCK,
            ) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(Errno::EINTR) => {}
                // Full.
                Err(Errno::EAGAIN) if filled > 0 => break,
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(filled)
    }

    /// Writes the `length` bytes in the pipe to `file` at `offset`.
    ///
    /// # Errors
    /// The file can't be written. The pipe must not be used again then.
    pub(super) fn drain(&self, file: &File, offset: u64, length: usize) -> io::Result<()> {
        let mut position = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        let mut left = length;
        while left > 0 {
            match splice(
                &self.reader,
                None,
                file,
                Some(&mut position),
                left,
                SpliceFFlags::SPLICE_F_MOVE,
            ) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => left -= count,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn bytes_go_from_file_to_file() {
        let from = tempfile::tempfile().unwrap();
        let to = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..300_000_u32).map(|index| index.to_le_bytes()[1]).collect();
        from.write_all_at(&bytes, 5).unwrap();
        let pipe = Pipe::new().unwrap();
        let mut done = 0;
        while done < bytes.len() {
            let count = pipe.fill(&from, 5 + done as u64, bytes.len() - done).unwrap();
            assert!(count > 0);
            pipe.drain(&to, 77 + done as u64, count).unwrap();
            done += count;
        }
        let mut copy = vec![0; bytes.len()];
        to.read_exact_at(&mut copy, 77).unwrap();
        assert_eq!(copy, bytes);
        assert_eq!(pipe.fill(&from, 300_005, 1).unwrap(), 0, "the end of the file");
    }

    #[test]
    fn what_cannot_be_done_is_an_error() {
        let path = tempfile::NamedTempFile::new().unwrap();
        path.as_file().write_all_at(b"abc", 0).unwrap();
        let read_only = File::open(path.path()).unwrap();
        let pipe = Pipe::new().unwrap();
        assert!(pipe.fill(&read_only, u64::MAX, 3).is_err());
        assert_eq!(pipe.fill(&read_only, 0, 3).unwrap(), 3);
        assert!(pipe.drain(&read_only, 0, 3).is_err());
    }
}

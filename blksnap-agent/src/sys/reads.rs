//! Reads: short reads of files, many at once, and word of a descriptor that became readable, on one io_uring.
//!
//! Each slot has a buffer that was made before, registered with the kernel where that is permitted, and owned by the
//! kernel while its read is in flight. One wait tells of both, so that a thread that serves requests which come by a
//! descriptor needs no second one for the reads.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::AlignedBuffer;

/// What tells the descriptor's completions from those of slots.
const READABLE: u64 = u64::MAX;

/// How long the end waits for each completion, and how often.
const LAST: (Duration, u32) = (Duration::from_millis(100), 100);

/// A read in flight: the file stays open until it has ended.
#[derive(Debug)]
struct Flight {
    _file: Arc<File>,
    length: usize,
}

#[derive(Debug)]
struct Slot {
    buffer: AlignedBuffer,
    flight: Option<Flight>,
}

/// A ring for reads, used by the thread that made it.
pub struct Reads {
    ring: IoUring,
    slots: Vec<Slot>,
    registered: bool,
    readable: OwnedFd,
    /// The kernel looks at `readable`.
    watched: bool,
}

impl std::fmt::Debug for Reads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reads")
            .field("slots", &self.slots)
            .field("registered", &self.registered)
            .field("watched", &self.watched)
            .finish_non_exhaustive()
    }
}

impl Reads {
    /// `slots` slots with buffers of `length` bytes; a wait ends when `readable` can be read, too.
    ///
    /// # Errors
    /// io_uring is not there or not permitted (`ENOSYS`, `EPERM`), or there is no memory.
    pub fn new(slots: u32, length: usize, readable: OwnedFd) -> io::Result<Self> {
        // Completions when they are waited for, and not by interrupting the thread (6.1 and later).
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(2 * slots.next_power_of_two())
            .or_else(|_| IoUring::builder().build(2 * slots.next_power_of_two()))?;
        let slots: Vec<Slot> = (0..slots)
            .map(|_| Slot {
                buffer: AlignedBuffer::zeroed(length),
                flight: None,
            })
            .collect();
        let vectors: Vec<libc::iovec> = slots
            .iter()
            .map(|slot| libc::iovec {
                iov_base: slot.buffer.address().cast(),
                iov_len: slot.buffer.len(),
            })
            .collect();
        // SAFETY: the buffers are freed after the ring, which is the first field, or leaked.
        let registered = unsafe { ring.submitter().register_buffers(&vectors) }.is_ok();
        Ok(Self {
            ring,
            slots,
            registered,
            readable,
            watched: false,
        })
    }

    /// A slot that is free.
    #[must_use]
    pub fn free(&self) -> Option<usize> {
        self.slots.iter().position(|slot| slot.flight.is_none())
    }

    /// Reads in flight.
    #[must_use]
    pub fn count(&self) -> usize {
        self.slots.iter().filter(|slot| slot.flight.is_some()).count()
    }

    /// The buffer of a free slot.
    ///
    /// # Panics
    /// The slot is in flight.
    #[must_use]
    pub fn buffer(&self, slot: usize) -> &[u8] {
        let slot = &self.slots[slot];
        assert!(
            slot.flight.is_none(),
            "the kernel owns the buffer of a slot in flight"
        );
        slot.buffer.as_slice()
    }

    /// Reads `length` bytes from `offset` of `file` into the beginning of the slot's buffer, with the next wait.
    ///
    /// # Errors
    /// The ring does not take it; the slot is free then.
    ///
    /// # Panics
    /// The slot is in flight, or `length` is 0 or more than its buffer.
    pub fn read(&mut self, slot: usize, file: &Arc<File>, offset: u64, length: usize) -> io::Result<()> {
        let entry = &mut self.slots[slot];
        assert!(entry.flight.is_none(), "a slot has one read at a time");
        assert!(
            0 < length && length <= entry.buffer.len(),
            "a read is within its buffer"
        );
        let (descriptor, address) = (types::Fd(file.as_raw_fd()), entry.buffer.address());
        let short = u32::try_from(length).map_err(io::Error::other)?;
        let operation = match u16::try_from(slot).ok().filter(|_| self.registered) {
            Some(index) => opcode::ReadFixed::new(descriptor, address, short, index)
                .offset(offset)
                .build(),
            None => opcode::Read::new(descriptor, address, short)
                .offset(offset)
                .build(),
        };
        entry.flight = Some(Flight {
            _file: Arc::clone(file),
            length,
        });
        let pushed = self.push(&operation.user_data(slot as u64));
        if pushed.is_err() {
            self.slots[slot].flight = None;
        }
        pushed
    }

    fn push(&mut self, operation: &squeue::Entry) -> io::Result<()> {
        // SAFETY: the buffer is the slot's own, as long as the read (asserted in `read`), and neither reachable nor freed
        // while the flight is there, which keeps the file open, too. `readable` is open as long as the ring.
        if unsafe { self.ring.submission().push(operation) }.is_ok() {
            return Ok(());
        }
        self.ring.submit()?;
        // SAFETY: as above.
        unsafe { self.ring.submission().push(operation) }.map_err(|_| io::ErrorKind::ResourceBusy.into())
    }

    /// Submits what is queued, waits until something ends, the descriptor can be read, or the time is over, and adds the
    /// reads that ended. One that ended short is an error.
    ///
    /// # Errors
    /// The ring itself fails; reads may still be in flight.
    pub fn wait(&mut self, longest: Duration, ended: &mut Vec<(usize, io::Result<()>)>) -> io::Result<()> {
        if !self.watched {
            let poll = opcode::PollAdd::new(types::Fd(self.readable.as_raw_fd()), libc::POLLIN as u32)
                .multi(true)
                .build();
            self.push(&poll.user_data(READABLE))?;
            self.watched = true;
        }
        self.enter(longest, ended)
    }

    fn enter(&mut self, longest: Duration, ended: &mut Vec<(usize, io::Result<()>)>) -> io::Result<()> {
        let time = types::Timespec::from(longest);
        let arguments = types::SubmitArgs::new().timespec(&time);
        if let Err(error) = self.ring.submitter().submit_with_args(1, &arguments) {
            let is_usual = matches!(
                error.raw_os_error(),
                Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY)
            );
            if !is_usual {
                return Err(error);
            }
        }
        for completion in self.ring.completion() {
            if completion.user_data() == READABLE {
                self.watched = cqueue::more(completion.flags());
                continue;
            }
            let slot = usize::try_from(completion.user_data()).expect("a slot number was given");
            let flight = self.slots[slot].flight.take();
            let wanted = flight.map_or(0, |flight| flight.length);
            let result = match usize::try_from(completion.result()) {
                Ok(count) if count == wanted => Ok(()),
                Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
                Err(_) => Err(io::Error::from_raw_os_error(-completion.result())),
            };
            ended.push((slot, result));
        }
        Ok(())
    }
}

impl Drop for Reads {
    fn drop(&mut self) {
        let mut ended = Vec::new();
        for _ in 0..LAST.1 {
            if self.count() == 0 {
                return;
            }
            if self.enter(LAST.0, &mut ended).is_err() {
                break;
            }
        }
        if self.count() > 0 {
            // The kernel may still write to them.
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn reads_end_once_and_the_descriptor_wakes() {
        let file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..4 * 4096_u32).map(|n| (n / 7 % 251) as u8).collect();
        file.write_all_at(&content, 0).unwrap();
        let file = Arc::new(file);
        let (receiver, mut sender) = io::pipe().unwrap();
        let mut reads = Reads::new(2, 4096, receiver.into()).unwrap();
        let mut ended = Vec::new();
        // Nothing comes, and the time is over.
        reads.wait(Duration::from_millis(1), &mut ended).unwrap();
        assert!(ended.is_empty());
        for (slot, offset) in [(0, 4096), (1, 3 * 4096)] {
            reads.read(slot, &file, offset, 4096).unwrap();
        }
        assert_eq!(reads.free(), None);
        while reads.count() > 0 {
            reads.wait(Duration::from_secs(20), &mut ended).unwrap();
        }
        assert_eq!(ended.len(), 2);
        assert!(ended.iter().all(|(_, result)| result.is_ok()));
        assert!(reads.buffer(0) == &content[4096..2 * 4096] && reads.buffer(1) == &content[3 * 4096..]);
        // Past the end.
        ended.clear();
        reads.read(0, &file, content.len() as u64 - 100, 4096).unwrap();
        while reads.count() > 0 {
            reads.wait(Duration::from_secs(20), &mut ended).unwrap();
        }
        let error = ended.pop().unwrap().1.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        let started = std::time::Instant::now();
        sender.write_all(b"x").unwrap();
        reads.wait(Duration::from_secs(60), &mut ended).unwrap();
        assert!(started.elapsed() < Duration::from_secs(50) && ended.is_empty());
    }
}

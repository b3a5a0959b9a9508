//! In-flight table: reads and writes given to io_uring, and the buffers that they own meanwhile.
//!
//! A table has a fixed number of slots, each with one buffer and at most one operation in flight. The buffer of a
//! slot in flight can't be reached, and is not freed before the kernel is done with it: dropping the table waits
//! for every completion, and if even that fails, it leaks the buffers. Short transfers are continued and
//! interrupted ones repeated here, so that an operation ends exactly once: complete or failed.
//!
//! A [`Ring`] is a table with nothing in flight, to be kept for the next time. Its buffers are registered with the
//! kernel where that is permitted (`RLIMIT_MEMLOCK`), which saves mapping them for each operation.

use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use io_uring::{IoUring, opcode, squeue, types};

use super::AlignedBuffer;

/// An operation in flight.
#[derive(Clone, Debug)]
struct Operation {
    write: bool,
    descriptor: RawFd,
    /// Position in the file of the first byte of `range`.
    offset: u64,
    /// What of the buffer is not transferred yet.
    range: Range<usize>,
}

#[derive(Debug)]
struct Slot {
    buffer: AlignedBuffer,
    operation: Option<Operation>,
}

/// Slots with a buffer each, and nothing in flight.
pub struct Ring {
    ring: IoUring,
    slots: Vec<Slot>,
    /// The kernel knows the buffers by the numbers of their slots.
    registered: bool,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("slots", &self.slots)
            .field("registered", &self.registered)
            .finish_non_exhaustive()
    }
}

impl Ring {
    /// `slots` slots with buffers of `length` bytes.
    ///
    /// # Errors
    /// io_uring is not there or not permitted (`ENOSYS`, `EPERM`), or there is no memory.
    pub fn new(slots: u32, length: usize) -> io::Result<Self> {
        let ring = IoUring::builder().build(slots.next_power_of_two())?;
        let slots: Vec<Slot> = (0..slots)
            .map(|_| Slot {
                buffer: AlignedBuffer::zeroed(length),
                operation: None,
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
        })
    }

    /// Number of slots.
    #[must_use]
    pub const fn slots(&self) -> usize {
        self.slots.len()
    }

    /// Whether the buffers are registered.
    #[must_use]
    pub const fn is_registered(&self) -> bool {
        self.registered
    }
}

/// A ring for operations on files that live as long as `'f`.
pub struct InFlight<'f> {
    /// Only gone while this is taken apart.
    inner: Option<Ring>,
    files: PhantomData<BorrowedFd<'f>>,
}

impl std::fmt::Debug for InFlight<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InFlight").field("ring", &self.inner).finish()
    }
}

impl From<Ring> for InFlight<'_> {
    fn from(ring: Ring) -> Self {
        Self {
            inner: Some(ring),
            files: PhantomData,
        }
    }
}

impl<'f> InFlight<'f> {
    /// A table of `slots` slots with buffers of `length` bytes.
    ///
    /// # Errors
    /// As [`Ring::new`].
    pub fn new(slots: u32, length: usize) -> io::Result<Self> {
        Ring::new(slots, length).map(Self::from)
    }

    /// Waits for everything in flight, whatever becomes of it, and gives the ring back.
    ///
    /// # Errors
    /// The ring itself fails; it is gone then.
    pub fn into_ring(mut self) -> io::Result<Ring> {
        let mut ended = Vec::new();
        while self.count() > 0 {
            self.wait(&mut ended)?;
            ended.clear();
        }
        self.inner.take().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn ring(&self) -> &Ring {
        self.inner
            .as_ref()
            .expect("a table has its ring until it is taken apart")
    }

    fn ring_mut(&mut self) -> &mut Ring {
        self.inner
            .as_mut()
            .expect("a table has its ring until it is taken apart")
    }

    /// Number of operations in flight.
    #[must_use]
    pub fn count(&self) -> usize {
        let slots = self.inner.iter().flat_map(|ring| &ring.slots);
        slots.filter(|slot| slot.operation.is_some()).count()
    }

    /// The buffer of a slot that is not in flight.
    ///
    /// # Panics
    /// The slot is in flight.
    #[must_use]
    pub fn buffer(&self, slot: usize) -> &[u8] {
        let slot = &self.ring().slots[slot];
        assert!(
            slot.operation.is_none(),
            "the kernel owns the buffer of a slot in flight"
        );
        slot.buffer.as_slice()
    }

    /// Reads `length` bytes from `offset` of `file` into the beginning of the slot's buffer.
    ///
    /// # Errors
    /// The ring does not take the operation; the slot is free then.
    ///
    /// # Panics
    /// The slot is in flight, or `length` is more than its buffer.
    pub fn read(&mut self, slot: usize, file: BorrowedFd<'f>, offset: u64, length: usize) -> io::Result<()> {
        self.start(
            slot,
            Operation {
                write: false,
                descriptor: file.as_raw_fd(),
                offset,
                range: 0..length,
            },
        )
    }

    /// Writes `range` of the slot's buffer to `offset` of `file`.
    ///
    /// # Errors
    /// The ring does not take the operation; the slot is free then.
    ///
    /// # Panics
    /// The slot is in flight, or `range` is not within its buffer.
    pub fn write(
        &mut self,
        slot: usize,
        file: BorrowedFd<'f>,
        offset: u64,
        range: Range<usize>,
    ) -> io::Result<()> {
        self.start(
            slot,
            Operation {
                write: true,
                descriptor: file.as_raw_fd(),
                offset,
                range,
            },
        )
    }

    fn start(&mut self, slot: usize, operation: Operation) -> io::Result<()> {
        let entry = &mut self.ring_mut().slots[slot];
        assert!(entry.operation.is_none(), "a slot has one operation at a time");
        assert!(
            operation.range.start < operation.range.end && operation.range.end <= entry.buffer.len(),
            "an operation is within its buffer"
        );
        entry.operation = Some(operation);
        let pushed = self.push(slot);
        if pushed.is_err() {
            self.ring_mut().slots[slot].operation = None;
        }
        pushed
    }

    /// Queues what is left of the slot's operation.
    fn push(&mut self, slot: usize) -> io::Result<()> {
        let entry = self.entry(slot);
        let ring = &mut self.ring_mut().ring;
        // SAFETY: the buffer belongs to the slot, is at least as long as the operation's range (asserted in
        // `start`, which only shrinks), and is neither reachable nor freed while the operation is there. The
        // descriptor is open: it was borrowed for `'f`, which outlives `self`.
        if unsafe { ring.submission().push(&entry) }.is_ok() {
            return Ok(());
        }
        ring.submit()?;
        // SAFETY: as above.
        unsafe { ring.submission().push(&entry) }.map_err(|_| io::ErrorKind::ResourceBusy.into())
    }

    fn entry(&self, slot: usize) -> squeue::Entry {
        let Ring {
            slots, registered, ..
        } = self.ring();
        let Slot { buffer, operation } = &slots[slot];
        let operation = operation.as_ref().expect("caller has set the operation");
        let descriptor = types::Fd(operation.descriptor);
        // The kernel takes at most 2 GiB less a page at a time; more is continued as a short transfer.
        let length = u32::try_from(operation.range.len()).unwrap_or(1 << 30);
        let address = buffer.address().wrapping_add(operation.range.start);
        let index = u16::try_from(slot).ok().filter(|_| *registered);
        let entry = match (operation.write, index) {
            (true, Some(index)) => opcode::WriteFixed::new(descriptor, address, length, index)
                .offset(operation.offset)
                .build(),
            (true, None) => opcode::Write::new(descriptor, address, length)
                .offset(operation.offset)
                .build(),
            (false, Some(index)) => opcode::ReadFixed::new(descriptor, address, length, index)
                .offset(operation.offset)
                .build(),
            (false, None) => opcode::Read::new(descriptor, address, length)
                .offset(operation.offset)
                .build(),
        };
        entry.user_data(slot as u64)
    }

    /// Submits what is queued, waits until at least one operation has ended, and gives all that have.
    ///
    /// # Errors
    /// The ring itself fails; operations may still be in flight.
    pub fn wait(&mut self, ended: &mut Vec<(usize, io::Result<()>)>) -> io::Result<()> {
        while ended.is_empty() && self.count() > 0 {
            match self.ring_mut().ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if is_transient(&error) => {}
                Err(error) => return Err(error),
            }
            let completions: Vec<(u64, i32)> = self
                .ring_mut()
                .ring
                .completion()
                .map(|completion| (completion.user_data(), completion.result()))
                .collect();
            for (slot, result) in completions {
                let slot = usize::try_from(slot).expect("a slot number was given");
                match self.complete(slot, result) {
                    Some(result) => ended.push((slot, result)),
                    None => self.push(slot)?,
                }
            }
        }
        Ok(())
    }

    /// The end of a slot's operation; `None` if it has to go on.
    fn complete(&mut self, slot: usize, result: i32) -> Option<io::Result<()>> {
        let operation = self.ring_mut().slots[slot]
            .operation
            .as_mut()
            .expect("a completion belongs to an operation");
        let outcome = match usize::try_from(result) {
            Ok(0) if operation.write => Err(io::ErrorKind::WriteZero.into()),
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                operation.range.start += count;
                operation.offset += count as u64;
                if !operation.range.is_empty() {
                    return None;
                }
                Ok(())
            }
            Err(_) => {
                let error = io::Error::from_raw_os_error(-result);
                if is_transient(&error) {
                    return None;
                }
                Err(error)
            }
        };
        self.ring_mut().slots[slot].operation = None;
        Some(outcome)
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
    ) || error.raw_os_error() == Some(libc::EBUSY)
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        let mut ended = Vec::new();
        while self.count() > 0 {
            if self.wait(&mut ended).is_err() {
                // The kernel may still write to them.
                std::mem::forget(self.inner.take());
                return;
            }
            ended.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn operations_end_once_and_move_the_bytes() {
        let source = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..3 * 4096_u32).map(|n| (n / 7 % 251) as u8).collect();
        source.write_all_at(&content, 0).unwrap();
        let target = tempfile::tempfile().unwrap();
        let mut table = InFlight::new(3, 4096).unwrap();
        for slot in 0..3 {
            table
                .read(slot, source.as_fd(), slot as u64 * 4096, 4096)
                .unwrap();
        }
        let mut reads = 0;
        let mut ended = Vec::new();
        while table.count() > 0 {
            table.wait(&mut ended).unwrap();
            for (slot, result) in ended.drain(..) {
                result.unwrap();
                if reads < 3 {
                    reads += 1;
                    assert_eq!(table.buffer(slot), &content[slot * 4096..][..4096]);
                    table
                        .write(slot, target.as_fd(), slot as u64 * 4096, 0..4096)
                        .unwrap();
                }
            }
        }
        let mut copy = vec![0; content.len()];
        target.read_exact_at(&mut copy, 0).unwrap();
        assert!(copy == content);
    }

    #[test]
    fn failures_are_completions() {
        let read_only = File::open("/proc/self/exe").unwrap();
        let mut table = InFlight::new(2, 4096).unwrap();
        let end = read_only.metadata().unwrap().len();
        table.read(0, read_only.as_fd(), end - 10, 4096).unwrap();
        table.write(1, read_only.as_fd(), 0, 0..4096).unwrap();
        let mut results = [None, None];
        let mut ended = Vec::new();
        while table.count() > 0 {
            table.wait(&mut ended).unwrap();
            for (slot, result) in ended.drain(..) {
                results[slot] = Some(result.unwrap_err());
            }
        }
        assert_eq!(results[0].as_ref().unwrap().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(results[1].as_ref().unwrap().raw_os_error(), Some(libc::EBADF));
    }

    #[test]
    fn a_ring_is_used_again() {
        let ring = Ring::new(2, 4096).unwrap();
        println!("registered buffers: {}", ring.is_registered());
        let zero = File::open("/dev/zero").unwrap();
        let mut table = InFlight::from(ring);
        table.read(0, zero.as_fd(), 0, 4096).unwrap();
        let ring = table.into_ring().unwrap();
        assert_eq!(ring.slots(), 2);
        let other = tempfile::tempfile().unwrap();
        let mut table = InFlight::from(ring);
        table.write(0, other.as_fd(), 8192, 0..512).unwrap();
        drop(table.into_ring().unwrap());
        assert_eq!(other.metadata().unwrap().len(), 8192 + 512);
    }

    #[test]
    fn a_dropped_table_waits() {
        let source = File::open("/dev/zero").unwrap();
        let mut table = InFlight::new(8, 1 << 20).unwrap();
        for slot in 0..8 {
            table.read(slot, source.as_fd(), 0, 1 << 20).unwrap();
        }
        drop(table);
    }
}

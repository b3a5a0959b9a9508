//! Fault disk: fails the operation that it is told to fail, with the error it is told.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use crate::disk::{Allocation, Disk, Zero};

/// A kind of operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Operation {
    /// [`Disk::read_at`].
    Read,
    /// [`Disk::write_at`].
    Write,
    /// [`Disk::zero_at`].
    Zero,
    /// [`Disk::discard_at`].
    Discard,
    /// [`Disk::flush`].
    Flush,
    /// [`Disk::allocation`].
    Allocation,
}

impl Operation {
    /// All kinds.
    pub const ALL: [Self; 6] = [
        Self::Read,
        Self::Write,
        Self::Zero,
        Self::Discard,
        Self::Flush,
        Self::Allocation,
    ];
}

/// A disk around another one. It has no [`Disk::file`], so that nothing goes past it.
///
/// A write that fails has written its first half, and a flush that failed fails for good, as the contract allows and
/// demands.
#[derive(Debug)]
pub struct FaultDisk {
    inner: Arc<dyn Disk>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    counts: HashMap<Operation, u64>,
    /// By kind and number of the operation.
    faults: HashMap<(Operation, u64), Errno>,
    /// The error of every operation of a kind from now on.
    broken: HashMap<Operation, Errno>,
}

impl FaultDisk {
    /// A disk that does what `inner` does.
    #[must_use]
    pub fn new(inner: Arc<dyn Disk>) -> Self {
        Self {
            inner,
            state: Mutex::default(),
        }
    }

    /// Lets the `nth` operation of a kind from now on fail, 0 being the next one.
    pub fn fail(&self, operation: Operation, nth: u64, errno: Errno) {
        let mut state = self.state();
        let at = state.count(operation) + nth;
        state.faults.insert((operation, at), errno);
    }

    /// Lets every operation of a kind fail from now on.
    pub fn break_all(&self, operation: Operation, errno: Errno) {
        self.state().broken.insert(operation, errno);
    }

    /// Operations of a kind so far, those that failed included.
    #[must_use]
    pub fn count(&self, operation: Operation) -> u64 {
        self.state().count(operation)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn counted(&self, operation: Operation) -> io::Result<()> {
        let mut state = self.state();
        let at = state.count(operation);
        *state.counts.entry(operation).or_default() += 1;
        let fault = state.faults.remove(&(operation, at));
        if let (Operation::Flush, Some(errno)) = (operation, fault) {
            state.broken.insert(operation, errno);
        }
        match fault.or_else(|| state.broken.get(&operation).copied()) {
            Some(errno) => Err(errno.into()),
            None => Ok(()),
        }
    }
}

impl State {
    fn count(&self, operation: Operation) -> u64 {
        self.counts.get(&operation).copied().unwrap_or(0)
    }
}

impl Disk for FaultDisk {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn logical_block(&self) -> u32 {
        self.inner.logical_block()
    }

    fn minimum_io(&self) -> u32 {
        self.inner.minimum_io()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.counted(Operation::Read)?;
        self.inner.read_at(buffer, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        match self.counted(Operation::Write) {
            Ok(()) => self.inner.write_at(data, offset),
            Err(error) => {
                self.inner.write_at(&data[..data.len() / 2], offset)?;
                Err(error)
            }
        }
    }

    fn zero_at(&self, offset: u64, length: u64, zero: Zero, fast: bool) -> io::Result<()> {
        self.counted(Operation::Zero)?;
        self.inner.zero_at(offset, length, zero, fast)
    }

    fn discard_at(&self, offset: u64, length: u64) -> io::Result<()> {
        self.counted(Operation::Discard)?;
        self.inner.discard_at(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        self.counted(Operation::Flush)?;
        self.inner.flush()
    }

    fn allocation(&self, offset: u64, length: u64, most: usize) -> io::Result<Vec<Allocation>> {
        self.counted(Operation::Allocation)?;
        self.inner.allocation(offset, length, most)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::disk::MemoryDisk;
    use crate::disk::testing::conforms;

    fn disk() -> FaultDisk {
        FaultDisk::new(Arc::new(MemoryDisk::new("m", 1 << 18, 1 << 20)))
    }

    fn run(disk: &FaultDisk, operation: Operation) -> io::Result<()> {
        match operation {
            Operation::Read => disk.read_at(&mut [0; 512], 0),
            Operation::Write => disk.write_at(&[1; 512], 0),
            Operation::Zero => disk.zero_at(0, 512, Zero::Keep, false),
            Operation::Discard => disk.discard_at(0, 512),
            Operation::Flush => disk.flush(),
            Operation::Allocation => disk.allocation(0, 512, 1).map(drop),
        }
    }

    #[test]
    fn without_faults_it_is_the_disk() {
        conforms(&disk(), rand::random(), 300);
    }

    proptest! {
        /// The model: a list of what is to fail.
        #[test]
        fn just_the_operation_that_was_named_fails(
            operations in prop::collection::vec(0..6_usize, 1..60),
            faults in prop::collection::vec((0..5_usize, 0..20_u64), 0..10),
        ) {
            let disk = disk();
            for (kind, nth) in &faults {
                // All but flushes, which never get well again.
                let kind = Operation::ALL.into_iter().filter(|kind| *kind != Operation::Flush).nth(*kind).unwrap();
                disk.fail(kind, *nth, Errno::EREMOTEIO);
            }
            let mut counts = HashMap::new();
            for index in operations {
                let operation = Operation::ALL[index];
                let count = counts.entry(operation).or_insert(0);
                let expected = faults.iter().any(|(kind, nth)| {
                    Operation::ALL.into_iter().filter(|kind| *kind != Operation::Flush).nth(*kind) == Some(operation)
                        && nth == count
                });
                let result = run(&disk, operation);
                let errno = result.as_ref().err().and_then(io::Error::raw_os_error);
                prop_assert_eq!(errno, expected.then_some(libc::EREMOTEIO), "{:?}", operation);
                *count += 1;
                prop_assert_eq!(disk.count(operation), *count);
            }
        }
    }

    #[test]
    fn a_flush_that_failed_fails_for_good_and_a_write_that_fails_is_half_done() {
        let disk = disk();
        disk.fail(Operation::Flush, 1, Errno::EIO);
        assert!(disk.flush().is_ok());
        assert!(disk.flush().is_err());
        assert!(disk.flush().is_err());
        disk.fail(Operation::Write, 0, Errno::ENOSPC);
        disk.write_at(&[1; 1024], 0).unwrap_err();
        let mut found = [9; 1024];
        disk.read_at(&mut found, 0).unwrap();
        assert_eq!((&found[..512], &found[512..]), (&[1; 512][..], &[0; 512][..]));
        disk.break_all(Operation::Read, Errno::EIO);
        assert!(disk.read_at(&mut found, 0).is_err());
    }
}

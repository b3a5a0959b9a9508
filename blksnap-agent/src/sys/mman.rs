//! Memory: what is locked while nothing may wait for it, what is given back, and what is shared: BPF maps with `BPF_F_MMAPABLE` as slices of atomic words.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::mman::{
    MapFlags, MlockAllFlags, MmapAdvise, ProtFlags, madvise, mlockall, mmap, munlockall, munmap,
};

/// All memory of the process, in place until this is dropped: no page has to come from a file system or a swap device.
#[derive(Debug)]
pub struct Locked(());

impl Locked {
    /// Locks it, and what is had later. Where that is not permitted nothing is locked.
    #[must_use]
    pub fn all() -> Self {
        Self::with(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE)
    }

    /// The same, but what was never touched is not had for that: for a long time, as it may be.
    #[must_use]
    pub fn touched() -> Self {
        let on_fault = MlockAllFlags::from_bits_retain(libc::MCL_ONFAULT);
        Self::with(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE | on_fault)
    }

    fn with(flags: MlockAllFlags) -> Self {
        *locks() += 1;
        if let Err(errno) = mlockall(flags) {
            tracing::warn!(%errno, "the memory of the agent can't be locked (CAP_IPC_LOCK)");
        }
        Self(())
    }
}

/// How many hold the lock: the last one ends it for all.
fn locks() -> MutexGuard<'static, u32> {
    static LOCKS: Mutex<u32> = Mutex::new(0);
    LOCKS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Locked {
    fn drop(&mut self) {
        let mut locks = locks();
        *locks -= 1;
        if *locks == 0 {
            let _ = munlockall();
        }
    }
}

/// Gives memory that is free, and that the allocator keeps for the thread that had it, back to the kernel: for who had tens
/// of MiB for a moment. Whichever thread is next would have as much again.
pub fn give_back() {
    // SAFETY: `malloc_trim(3)` is safe in threads; what is in use stays where it is.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Pages of a file that others touch, never this process; mapped until it ends.
#[derive(Debug)]
pub struct Pages {
    address: NonNull<std::ffi::c_void>,
}

impl Pages {
    /// Maps the first `length` bytes of `file` for reading. What is not there is had page by page.
    ///
    /// # Errors
    /// What `mmap(2)` and `madvise(2)` say.
    pub fn map(file: impl AsFd, length: NonZeroUsize) -> io::Result<Self> {
        // SAFETY: a new shared mapping at an address that the kernel chooses; nothing else uses it, and nothing is read
        // through it here.
        let address = unsafe { mmap(None, length, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, file, 0)? };
        for advice in [
            MmapAdvise::MADV_RANDOM,
            MmapAdvise::MADV_DONTFORK,
            MmapAdvise::MADV_DONTDUMP,
        ] {
            // SAFETY: the mapping just made, which nothing refers to.
            unsafe { madvise(address, length.get(), advice)? };
        }
        Ok(Self { address })
    }

    /// Where they are.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address.as_ptr() as u64
    }
}

/// The values of an array map of 64-bit words, shared with the kernel.
#[derive(Debug)]
pub struct SharedWords {
    address: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the memory is reached only through atomic operations, and it is unmapped by the last owner only.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Maps the first `words` words of the array map `fd` for reading and writing.
    ///
    /// # Errors
    /// What `mmap(2)` says: the map lacks `BPF_F_MMAPABLE`, or is smaller.
    pub fn map(fd: impl AsFd, words: usize) -> io::Result<Self> {
        let length = NonZeroUsize::new(words * size_of::<u64>())
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: a new shared mapping at an address that the kernel chooses; nothing else uses it.
        let address = unsafe {
            mmap(
                None,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                fd,
                0,
            )?
        };
        Ok(Self {
            address: address.cast(),
            words,
        })
    }

    /// The words.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: `map` mapped `words` aligned words at `address`, and they live as long as `self`.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.words) }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: the mapping of `map`, of the same length, which nobody borrows any more.
        let unmapped = unsafe { munmap(self.address.cast(), self.words * size_of::<u64>()) };
        debug_assert!(unmapped.is_ok(), "munmap: {unmapped:?}");
    }
}

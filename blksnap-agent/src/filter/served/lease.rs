//! Lease: until when the agent may have written to a served file.
//!
//! A small file says a time that is never behind the agent's last write. When the agent was killed, whoever comes next
//! compares it with the time at which the served file was last modified: a later one is of a write by somebody else.
//! What another program writes in the rest of the lease, less than a second, would not be seen; the lock on the file
//! keeps programs out that look at locks while an agent lives.
//!
//! While a snapshot promises to survive a power cut, the lease is made durable before the writes that it covers.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::continuity::Leased;

/// How long a lease is.
const TERM: Duration = Duration::from_millis(1000);
/// How long before its end it is renewed by the next write.
const MARGIN: Duration = Duration::from_millis(300);

/// The time of the wall clock in nanoseconds.
#[must_use]
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The lease on one served file.
#[derive(Debug)]
pub struct Lease {
    until: AtomicU64,
    durable: AtomicBool,
    file: Mutex<File>,
}

impl Lease {
    /// A lease in the file at `path`, which stays as it is until the lease begins.
    ///
    /// # Errors
    /// The file can't be opened.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        Ok(Self {
            until: AtomicU64::new(0),
            durable: AtomicBool::new(false),
            file: Mutex::new(file),
        })
    }

    /// Begins the lease.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn begin(&self) -> io::Result<()> {
        self.renew(now())
    }

    /// The lease in the file at `path`; `None` if there is none that can be believed.
    #[must_use]
    pub fn read(path: &Path) -> Option<Leased> {
        let bytes = std::fs::read(path).ok()?;
        let (content, sum) = bytes.split_first_chunk::<9>()?;
        let (until, durable) = content.split_first_chunk::<8>()?;
        (sum == crc32c::crc32c(content).to_le_bytes()).then(|| Leased {
            until: u64::from_le_bytes(*until),
            durable: durable == [1],
        })
    }

    /// From now on, or from its begin on, the lease is durable before the writes that it covers, or not any more.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn make_durable(&self, durable: bool) -> io::Result<()> {
        self.durable.store(durable, Ordering::Release);
        if self.until.load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        self.renew(now())
    }

    /// Makes sure that the lease covers a write that begins now.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn cover(&self) -> io::Result<()> {
        let now = now();
        if now.saturating_add(nanoseconds(MARGIN)) < self.until.load(Ordering::Acquire) {
            return Ok(());
        }
        self.renew(now)
    }

    fn renew(&self, now: u64) -> io::Result<()> {
        let file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let until = now
            .saturating_add(nanoseconds(TERM))
            .max(self.until.load(Ordering::Acquire));
        let durable = self.durable.load(Ordering::Acquire);
        let mut bytes = [0; 13];
        bytes[..8].copy_from_slice(&until.to_le_bytes());
        bytes[8] = u8::from(durable);
        let sum = crc32c::crc32c(&bytes[..9]);
        bytes[9..].copy_from_slice(&sum.to_le_bytes());
        file.write_all_at(&bytes, 0)?;
        if durable {
            file.sync_data()?;
        }
        self.until.store(until, Ordering::Release);
        Ok(())
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_never_behind_a_write() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lease");
        assert_eq!(Lease::read(&path), None);
        let lease = Lease::open(&path).unwrap();
        lease.make_durable(false).unwrap();
        assert_eq!(Lease::read(&path), None);
        lease.begin().unwrap();
        let end = std::time::Instant::now() + 2 * TERM;
        while std::time::Instant::now() < end {
            lease.cover().unwrap();
            assert!(Lease::read(&path).unwrap().until > now());
            std::thread::sleep(Duration::from_millis(50));
        }
        assert!(!Lease::read(&path).unwrap().durable);
        lease.make_durable(true).unwrap();
        assert!(Lease::read(&path).unwrap().durable);
        std::fs::write(&path, b"too short").unwrap();
        assert_eq!(Lease::read(&path), None);
    }
}

//! Verdict: why the kernel gave an image up.
//!
//! The status of an image says that it was given up, not why; the kernel's log says why, not of which image
//! (`__invalidate_snapshot` in `dm-snap.c`, the same words from Linux 6.1 to 7.2). It is written before the status changes.
//! So what the log has since the image was seen whole has its reason; where that is one kind only, it is the reason.
//! With a store that is not persistent no space is the only thing that keeps an exception from being allocated, but for a
//! kernel that has no memory at all.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::time::Instant;

use nix::errno::Errno;

use super::watch::Condition;
use crate::units::{DeviceId, SnapshotId};

/// The kernel's log, a record for each read.
const LOG: &str = "/dev/kmsg";
/// Longest record, in bytes (`PRINTK_MESSAGE_MAX`).
const RECORD: usize = 8192;
/// Words of the kernel: no space, and an error of the storage or of the origin.
const FULL: &str = "Invalidating snapshot: Unable to allocate exception";
const FAILED: &str = "Invalidating snapshot: Error reading/writing";
/// What is remembered of the log: the newest.
const MOST: usize = 256;

/// An image: its snapshot and its origin.
type Key = (SnapshotId, DeviceId);

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    Full,
    Failed,
    /// Records were lost.
    Unknown,
}

impl Word {
    fn of(record: &str) -> Option<Self> {
        if record.contains(FULL) {
            Some(Self::Full)
        } else if record.contains(FAILED) {
            Some(Self::Failed)
        } else {
            None
        }
    }
}

/// When images were seen whole, and what the kernel has said.
#[derive(Debug)]
pub(super) struct Verdicts {
    log: Option<File>,
    words: VecDeque<(Instant, Word)>,
    whole: BTreeMap<Key, Instant>,
    given_up: BTreeMap<Key, Condition>,
}

impl Verdicts {
    /// From now on.
    pub(super) fn new() -> Self {
        let log = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(LOG)
            .and_then(|mut file| file.seek(SeekFrom::End(0)).map(|_| file));
        let log = log.inspect_err(
            |error| tracing::debug!(%error, "the kernel's log can't be read: full storage is told as failed"),
        );
        Self {
            log: log.ok(),
            words: VecDeque::new(),
            whole: BTreeMap::new(),
            given_up: BTreeMap::new(),
        }
    }

    /// Reads what is new in the log.
    fn read(&mut self) {
        let Some(log) = &mut self.log else { return };
        let mut record = [0; RECORD];
        let now = Instant::now();
        loop {
            let word = match log.read(&mut record) {
                Ok(0) => return,
                Ok(length) => Word::of(&String::from_utf8_lossy(&record[..length])),
                // Overwritten before it was read.
                Err(error) if error.raw_os_error() == Some(Errno::EPIPE as i32) => Some(Word::Unknown),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => None,
                Err(_) => return,
            };
            if let Some(word) = word {
                if self.words.len() == MOST {
                    self.words.pop_front();
                }
                self.words.push_back((now, word));
            }
        }
    }

    /// Before an image is looked at that may be whole: what was said up to now is not about it.
    pub(super) fn begin_look(&mut self) -> Instant {
        self.read();
        Instant::now()
    }

    /// It was whole at `when`, or later.
    pub(super) fn seen_whole(&mut self, snapshot: SnapshotId, origin: DeviceId, when: Instant) {
        self.whole.insert((snapshot, origin), when);
    }

    /// Why it was given up; the same for ever.
    pub(super) fn given_up(&mut self, snapshot: SnapshotId, origin: DeviceId) -> Condition {
        let key = (snapshot, origin);
        if let Some(condition) = self.given_up.get(&key) {
            return *condition;
        }
        self.read();
        let since = self.whole.get(&key).copied();
        let condition = judge(&self.words, since);
        self.given_up.insert(key, condition);
        condition
    }

    /// Nobody asks for it any more.
    pub(super) fn forget(&mut self, snapshot: SnapshotId) {
        self.whole.retain(|key, _| key.0 != snapshot);
        self.given_up.retain(|key, _| key.0 != snapshot);
    }
}

/// It was full if that is all that was said since.
fn judge(words: &VecDeque<(Instant, Word)>, since: Option<Instant>) -> Condition {
    let said = words
        .iter()
        .filter(|(when, _)| since.is_none_or(|since| *when >= since));
    let mut said = said.map(|(_, word)| *word).peekable();
    let any = said.peek().is_some();
    if any && said.all(|word| word == Word::Full) {
        Condition::Full
    } else {
        Condition::Failed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn it_was_full_only_if_nothing_else_was_said_since() {
        let begun = Instant::now();
        let at = |milliseconds| begun + Duration::from_millis(milliseconds);
        let words = |said: &[(u64, Word)]| said.iter().map(|(ms, word)| (at(*ms), *word)).collect();
        for (said, since, condition) in [
            (&[][..], None, Condition::Failed),
            (&[(1, Word::Full)], None, Condition::Full),
            (&[(1, Word::Full)], Some(2), Condition::Failed),
            (&[(1, Word::Failed), (3, Word::Full)], Some(2), Condition::Full),
            (&[(3, Word::Failed), (3, Word::Full)], Some(2), Condition::Failed),
            (&[(3, Word::Unknown), (3, Word::Full)], Some(2), Condition::Failed),
        ] {
            let words: VecDeque<_> = words(said);
            assert_eq!(
                judge(&words, since.map(at)),
                condition,
                "{said:?} since {since:?}"
            );
        }
    }

    #[test]
    fn records_of_the_kernel() {
        let full =
            "3,812,4711,-;device-mapper: snapshots: Invalidating snapshot: Unable to allocate exception.";
        let failed = "3,813,4712,-;device-mapper: snapshots: Invalidating snapshot: Error reading/writing.";
        assert_eq!(Word::of(full), Some(Word::Full));
        assert_eq!(Word::of(failed), Some(Word::Failed));
        assert_eq!(Word::of("6,1,2,-;loop0: detected capacity change"), None);
    }
}

//! Crash disk: what a power cut may leave of a disk.
//!
//! What is written is seen at once, and durable after a flush. A cut leaves of each sector what the last flush made
//! durable, or what any write since then wrote to it, whatever the other sectors have: a disk with a cache
//! stores sectors in any order, and each as a whole.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use crate::choices::{Choices as _, Seeded};
use crate::disk::{Allocation, Disk, Zero};

/// Bytes that are stored as a whole.
const SECTOR: usize = 512;

/// What a discarded byte reads as: the contract says anything.
const DISCARDED: u8 = 0xd5;

/// A disk in memory that knows what is durable.
#[derive(Debug)]
pub struct CrashDisk {
    name: String,
    size: u64,
    state: Mutex<State>,
}

#[derive(Clone, Debug, Default)]
struct State {
    /// What reads see.
    volatile: Vec<u8>,
    /// What the last flush left.
    durable: Vec<u8>,
    /// Every content that a sector had since.
    since: BTreeMap<usize, Vec<[u8; SECTOR]>>,
    flushes: u64,
}

impl CrashDisk {
    /// A disk with this content, all of it durable; the length is cut to whole sectors.
    #[must_use]
    pub fn new(name: impl Into<String>, mut content: Vec<u8>) -> Self {
        content.truncate(content.len() / SECTOR * SECTOR);
        Self {
            name: name.into(),
            size: content.len() as u64,
            state: Mutex::new(State {
                volatile: content.clone(),
                durable: content,
                ..State::default()
            }),
        }
    }

    /// A disk of zeroes.
    #[must_use]
    pub fn zeroed(name: impl Into<String>, size: usize) -> Self {
        Self::new(name, vec![0; size])
    }

    /// What is left if the power is cut now; which sectors were stored follows from `seed`. The disk itself goes on.
    #[must_use]
    pub fn cut(&self, seed: u64) -> Self {
        let state = self.state();
        let mut dice = Seeded::new(seed);
        let mut left = state.durable.clone();
        // Sometimes all or nothing: the extremes are found by no other way when many sectors are unsure.
        let mood = dice.below(4);
        for (sector, versions) in &state.since {
            let chosen = match mood {
                0 => None,
                1 => versions.last(),
                _ => match dice.index(versions.len() + 1) {
                    0 => None,
                    version => versions.get(version - 1),
                },
            };
            if let Some(bytes) = chosen {
                left[sector * SECTOR..(sector + 1) * SECTOR].copy_from_slice(bytes);
            }
        }
        Self::new(self.name.clone(), left)
    }

    /// What reads see now.
    #[must_use]
    pub fn content(&self) -> Vec<u8> {
        self.state().volatile.clone()
    }

    /// What is durable for sure.
    #[must_use]
    pub fn durable(&self) -> Vec<u8> {
        self.state().durable.clone()
    }

    /// Flushes so far.
    #[must_use]
    pub fn flushes(&self) -> u64 {
        self.state().flushes
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn range(&self, offset: u64, length: usize) -> io::Result<std::ops::Range<usize>> {
        let within = offset
            .checked_add(length as u64)
            .is_some_and(|end| end <= self.size);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        within
            .then(|| start..start + length)
            .ok_or_else(|| Errno::EINVAL.into())
    }

    fn change(&self, offset: u64, length: usize, change: impl FnOnce(&mut [u8])) -> io::Result<()> {
        let range = self.range(offset, length)?;
        if range.is_empty() {
            return Ok(());
        }
        let mut state = self.state();
        let State { volatile, since, .. } = &mut *state;
        change(&mut volatile[range.clone()]);
        let sectors = range.start / SECTOR..range.end.div_ceil(SECTOR);
        for (sector, bytes) in sectors
            .clone()
            .zip(volatile.as_chunks::<SECTOR>().0[sectors].iter())
        {
            since.entry(sector).or_default().push(*bytes);
        }
        Ok(())
    }
}

fn memory(length: u64) -> usize {
    usize::try_from(length).unwrap_or(usize::MAX)
}

impl Disk for CrashDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn logical_block(&self) -> u32 {
        512
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let range = self.range(offset, buffer.len())?;
        buffer.copy_from_slice(&self.state().volatile[range]);
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.change(offset, data.len(), |bytes| bytes.copy_from_slice(data))
    }

    fn zero_at(&self, offset: u64, length: u64, _zero: Zero, fast: bool) -> io::Result<()> {
        if fast {
            return Err(Errno::EOPNOTSUPP.into());
        }
        self.change(offset, memory(length), |bytes| bytes.fill(0))
    }

    fn discard_at(&self, offset: u64, length: u64) -> io::Result<()> {
        self.change(offset, memory(length), |bytes| bytes.fill(DISCARDED))
    }

    fn flush(&self) -> io::Result<()> {
        let mut state = self.state();
        let since = std::mem::take(&mut state.since);
        let State {
            volatile, durable, ..
        } = &mut *state;
        for sector in since.into_keys() {
            let range = sector * SECTOR..(sector + 1) * SECTOR;
            durable[range.clone()].copy_from_slice(&volatile[range]);
        }
        state.flushes += 1;
        Ok(())
    }

    fn allocation(&self, offset: u64, length: u64, _most: usize) -> io::Result<Vec<Allocation>> {
        self.range(offset, memory(length))?;
        Ok(vec![Allocation { length, hole: false }])
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;
    use crate::disk::testing::conforms;

    const SECTORS: usize = 16;

    #[test]
    fn it_is_a_disk() {
        for _ in 0..20 {
            conforms(&CrashDisk::zeroed("c", 1 << 18), rand::random(), 200);
        }
    }

    proptest! {
        /// The plain model: arrays of each sector's contents since the last flush. Writes are not aligned.
        #[test]
        fn a_cut_leaves_what_was_flushed_and_of_the_rest_any_version(
            steps in prop::collection::vec((0..SECTORS * SECTOR, 0..4 * SECTOR, any::<u8>(), 0..8_u8), 0..30),
            seeds in prop::collection::vec(any::<u64>(), 8),
        ) {
            let disk = CrashDisk::zeroed("c", SECTORS * SECTOR);
            let mut now = vec![0_u8; SECTORS * SECTOR];
            let sectors = |bytes: &[u8]| bytes.chunks(SECTOR).map(<[u8]>::to_vec).collect::<Vec<_>>();
            let mut allowed: Vec<HashSet<Vec<u8>>> = sectors(&now).into_iter().map(|s| HashSet::from([s])).collect();
            for (offset, length, value, kind) in steps {
                let end = (offset + length).min(now.len());
                if kind == 0 {
                    disk.flush().unwrap();
                    allowed = sectors(&now).into_iter().map(|s| HashSet::from([s])).collect();
                } else {
                    disk.write_at(&vec![value; end - offset], offset as u64).unwrap();
                    now[offset..end].fill(value);
                    for (allowed, sector) in allowed.iter_mut().zip(sectors(&now)) {
                        allowed.insert(sector);
                    }
                }
                prop_assert_eq!(&disk.content(), &now);
            }
            for seed in seeds {
                let left = disk.cut(seed);
                prop_assert_eq!(left.content(), left.durable());
                for (allowed, sector) in allowed.iter().zip(sectors(&left.content())) {
                    prop_assert!(allowed.contains(&sector));
                }
            }
        }
    }

    #[test]
    fn every_order_is_left_by_some_cut() {
        let disk = CrashDisk::zeroed("c", 2 * SECTOR);
        disk.write_at(&[1; 2 * SECTOR], 0).unwrap();
        disk.write_at(&[2; SECTOR], 0).unwrap();
        let found: HashSet<(u8, u8)> = (0..500)
            .map(|seed| {
                let left = disk.cut(seed).content();
                (left[0], left[SECTOR])
            })
            .collect();
        let all: HashSet<_> = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)].into();
        assert_eq!(found, all);
    }
}

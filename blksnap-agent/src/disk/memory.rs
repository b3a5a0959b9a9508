//! Memory disk: a sparse disk in memory, of a bounded amount of it.
//!
//! Memory is taken by the page, where something was written. A page is as small as the smallest unit of preserving,
//! so that difference storage in memory takes what was preserved and not more.

use std::collections::BTreeMap;
use std::io;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use nix::errno::Errno;

use super::{Allocation, Disk, Zero};

/// Bytes of a page.
const PAGE: usize = 4096;

type Pages = BTreeMap<u64, Box<[u8; PAGE]>>;

/// A disk in memory.
#[derive(Debug)]
pub struct MemoryDisk {
    name: String,
    size: u64,
    limit: u64,
    pages: RwLock<Pages>,
}

/// The part of a range that is in one page.
struct Part {
    page: u64,
    /// First byte in the page.
    start: usize,
    /// First byte in the range.
    at: usize,
    length: usize,
}

impl MemoryDisk {
    /// A disk of `size` bytes that takes at most `limit` bytes of memory, rounded down to pages of 4 KiB.
    #[must_use]
    pub fn new(name: impl Into<String>, size: u64, limit: u64) -> Self {
        Self {
            name: name.into(),
            size,
            limit,
            pages: RwLock::default(),
        }
    }

    /// Bytes of memory in use.
    #[must_use]
    pub fn used(&self) -> u64 {
        bytes_of(&self.reading())
    }

    // A thread that panicked left whole pages.
    fn reading(&self) -> RwLockReadGuard<'_, Pages> {
        self.pages.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn writing(&self) -> RwLockWriteGuard<'_, Pages> {
        self.pages.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn parts(&self, offset: u64, length: u64) -> io::Result<impl Iterator<Item = Part>> {
        let within = offset.checked_add(length).is_some_and(|end| end <= self.size);
        let (true, Ok(length)) = (within, usize::try_from(length)) else {
            return Err(Errno::EINVAL.into());
        };
        let mut at = 0;
        Ok(std::iter::from_fn(move || {
            if at == length {
                return None;
            }
            let position = offset + at as u64;
            let start = usize::try_from(position % PAGE as u64).ok()?;
            let part = Part {
                page: position / PAGE as u64,
                start,
                at,
                length: (PAGE - start).min(length - at),
            };
            at += part.length;
            Some(part)
        }))
    }

    /// Changes every part, whose pages are there afterwards.
    fn change(&self, offset: u64, length: u64, mut change: impl FnMut(&Part, &mut [u8])) -> io::Result<()> {
        let mut pages = self.writing();
        let new = self
            .parts(offset, length)?
            .filter(|part| !pages.contains_key(&part.page))
            .count();
        if bytes_of(&pages) + (new * PAGE) as u64 > self.limit {
            return Err(Errno::ENOSPC.into());
        }
        for part in self.parts(offset, length)? {
            let page = pages.entry(part.page).or_insert_with(|| Box::new([0; PAGE]));
            change(&part, &mut page[part.start..part.start + part.length]);
        }
        Ok(())
    }

    /// Makes a range zero; pages that it covers are given back.
    fn drop_range(&self, offset: u64, length: u64) -> io::Result<()> {
        // Only pages that are there are visited: a range may be as long as the disk.
        let mut pages = self.writing();
        let end = offset
            .checked_add(length)
            .filter(|end| *end <= self.size)
            .ok_or(Errno::EINVAL)?;
        let size = PAGE as u64;
        let within = |number: u64| number * size >= offset && (number + 1) * size <= end;
        let touched: Vec<u64> = pages
            .range(offset / size..end.div_ceil(size))
            .map(|(number, _)| *number)
            .collect();
        for number in touched {
            if within(number) {
                pages.remove(&number);
            } else if let Some(page) = pages.get_mut(&number) {
                let position =
                    |byte: u64| usize::try_from(byte.saturating_sub(number * size)).unwrap_or(PAGE);
                page[position(offset)..position(end).min(PAGE)].fill(0);
            }
        }
        Ok(())
    }
}

fn bytes_of(pages: &Pages) -> u64 {
    (pages.len() * PAGE) as u64
}

impl Disk for MemoryDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn logical_block(&self) -> u32 {
        512
    }

    fn minimum_io(&self) -> u32 {
        4096
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let pages = self.reading();
        for part in self.parts(offset, buffer.len() as u64)? {
            let into = &mut buffer[part.at..part.at + part.length];
            match pages.get(&part.page) {
                Some(page) => into.copy_from_slice(&page[part.start..part.start + part.length]),
                None => into.fill(0),
            }
        }
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.change(offset, data.len() as u64, |part, bytes| {
            bytes.copy_from_slice(&data[part.at..part.at + part.length]);
        })
    }

    fn zero_at(&self, offset: u64, length: u64, zero: Zero, fast: bool) -> io::Result<()> {
        match (zero, fast) {
            (Zero::Deallocate, _) => self.drop_range(offset, length),
            // It is a write.
            (Zero::Keep, true) => Err(Errno::EOPNOTSUPP.into()),
            (Zero::Keep, false) => self.change(offset, length, |_, bytes| bytes.fill(0)),
        }
    }

    fn discard_at(&self, offset: u64, length: u64) -> io::Result<()> {
        self.drop_range(offset, length)
    }

    /// There is nothing more durable here.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn allocation(&self, offset: u64, length: u64, most: usize) -> io::Result<Vec<Allocation>> {
        let pages = self.reading();
        let end = offset
            .checked_add(length)
            .filter(|end| *end <= self.size)
            .ok_or(Errno::EINVAL)?;
        let size = PAGE as u64;
        let mut pieces: Vec<Allocation> = Vec::new();
        let mut next = offset;
        let mut push = |until: u64, hole: bool, next: &mut u64| {
            if until > *next {
                match pieces.last_mut() {
                    Some(last) if last.hole == hole => last.length += until - *next,
                    _ => pieces.push(Allocation {
                        length: until - *next,
                        hole,
                    }),
                }
                *next = until;
            }
            pieces.len()
        };
        for number in pages
            .range(offset / size..end.div_ceil(size))
            .map(|(number, _)| *number)
        {
            push(number * size, true, &mut next);
            if push(((number + 1) * size).min(end), false, &mut next) > most {
                break;
            }
        }
        push(end, true, &mut next);
        pieces.truncate(most.max(1));
        Ok(pieces)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::testing::conforms;

    #[test]
    fn it_is_a_disk() {
        for _ in 0..20 {
            conforms(&MemoryDisk::new("m", 1 << 20, 1 << 20), rand::random(), 200);
            conforms(&MemoryDisk::new("m", 99_840, 1 << 20), rand::random(), 200);
        }
    }

    #[test]
    fn only_what_is_written_takes_memory_and_no_more_than_the_limit() {
        let disk = MemoryDisk::new("m", 1 << 50, 3 * 4096 + 100);
        disk.write_at(&[7; 4096], 1 << 40).unwrap();
        disk.write_at(&[8; 2], (1 << 20) - 1).unwrap();
        assert_eq!(disk.used(), 3 * 4096);
        // All or nothing.
        let error = disk.write_at(&[9; 4096], (1 << 40) + 512).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        let mut found = [0; 4096];
        disk.read_at(&mut found, 1 << 40).unwrap();
        assert_eq!(found, [7; 4096]);
        disk.discard_at(0, 1 << 50).unwrap();
        assert_eq!(disk.used(), 0);
        disk.read_at(&mut found, 1 << 40).unwrap();
        assert_eq!(found, [0; 4096]);
    }
}

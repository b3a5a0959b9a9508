//! Journal: which units of an origin a snapshot has preserved and where, so that another agent can go on with it.
//!
//! ```text
//!      0 ┌──────────────────────────────────────────────┐
//!        │ header: 512 bytes                            │
//!    512 ├──────────────────────────────────────────────┤
//!        │ end mark: 512 bytes, zeroes while all is well│
//!   4096 ├──────────────────────────────────────────────┤
//!        │ entries: 32 bytes each, zeroes where none is │
//!        └──────────────────────────────────────────────┘
//! ```
//! docs/format.md has every byte. Numbers are little-endian, checksums CRC-32C.
//!
//! An entry is written after the units it names are in their slot, and before the write that destroys them in the origin
//! is let go. Writers take places in any order, so there may be holes: a place of zeroes belongs to a write that was
//! never let go. An entry is within one sector: it is there as a whole or not at all. One that is there and wrong makes
//! the journal [`JournalError::Damaged`], and the snapshot useless.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use uuid::Uuid;

use super::store::Promise;
use crate::cow::{ChunkLayout, RegionId, Slot, Table, UnitSet};
use crate::disk::Disk;

const MAGIC: [u8; 8] = *b"BLKSNAPJ";
const VERSION: u32 = 1;
const END_MAGIC: [u8; 8] = *b"BLKSNAPX";
const SECTOR: usize = 512;
const END_AT: u64 = 512;
const ENTRIES_AT: u64 = 4096;
const ENTRY: usize = 32;
/// Read at a time.
const PIECE: usize = 1 << 20;

/// A journal can't be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// It can't be read or written.
    #[error("can't {action} the journal {name}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The journal.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// It is not what was written.
    #[error("the journal {name} is damaged: {why}")]
    Damaged {
        /// The journal.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// It is of another snapshot or device.
    #[error("the journal {name} is of another snapshot or device")]
    Other {
        /// The journal.
        name: String,
    },
    /// The snapshot was broken when it ended.
    #[error("the snapshot was broken by error {0} before the agent ended")]
    Broken(i32),
}

/// What a journal is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject {
    /// The snapshot.
    pub snapshot: Uuid,
    /// Number of the device in the snapshot.
    pub member: u32,
    /// Chunks and units.
    pub layout: ChunkLayout,
}

/// Units that are in the storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The chunk.
    pub chunk: u64,
    /// Its units.
    pub units: UnitSet,
    /// The chunk's place.
    pub slot: Slot,
}

/// The journal of one origin in one snapshot.
#[derive(Debug)]
pub struct Journal {
    disk: Arc<dyn Disk>,
    /// Place of the next entry.
    next: AtomicU64,
}

impl Journal {
    /// Bytes that a journal may come to have: an entry for each unit. Where nothing was written it takes no room.
    #[must_use]
    pub fn most_bytes(layout: &ChunkLayout) -> u64 {
        ENTRIES_AT + layout.size().div_ceil(layout.unit_bytes()) * ENTRY as u64
    }

    /// A new journal on `disk`, which must read as zeroes. It is durable where the snapshot is to survive a power cut;
    /// else it is in the page cache, as its entries will be.
    ///
    /// # Errors
    /// The disk fails.
    pub fn create(disk: Arc<dyn Disk>, subject: &Subject, promise: Promise) -> Result<Self, JournalError> {
        disk.write_at(&header(subject), 0)
            .and_then(|()| match promise {
                Promise::PowerCut => disk.flush(),
                Promise::AgentCrash | Promise::Nothing => Ok(()),
            })
            .map_err(|source| failed("begin", &*disk, source))?;
        Ok(Self {
            disk,
            next: AtomicU64::new(0),
        })
    }

    /// The journal that was left on `disk`, and the table that it describes.
    ///
    /// # Errors
    /// It can't be read, is damaged, of something else, or says that the snapshot is broken.
    pub fn open(disk: Arc<dyn Disk>, subject: &Subject) -> Result<(Self, Table), JournalError> {
        let damaged = |why: String| JournalError::Damaged {
            name: disk.name().to_owned(),
            why,
        };
        let mut head = [0; 2 * SECTOR];
        disk.read_at(&mut head, 0)
            .map_err(|source| failed("read", &*disk, source))?;
        let (found, mark) = head.split_at(SECTOR);
        if found != header(subject) {
            return Err(if found[..8] == MAGIC && checksum_is_right(found) {
                JournalError::Other {
                    name: disk.name().to_owned(),
                }
            } else {
                damaged("its header is not one".to_owned())
            });
        }
        if mark.iter().any(|byte| *byte != 0) {
            if mark[..8] != END_MAGIC || !checksum_is_right(mark) {
                return Err(damaged("its end mark is not one".to_owned()));
            }
            return Err(JournalError::Broken(number(mark, 8).cast_signed()));
        }
        let mut table = Table::new(subject.layout);
        let mut next = 0;
        entries(&*disk, |index, bytes| {
            next = index + 1;
            let entry = Entry::decode(bytes).ok_or_else(|| damaged(format!("entry {index} is not one")))?;
            entry
                .apply(&mut table)
                .map_err(|why| damaged(format!("entry {index}: {why}")))
        })?;
        let journal = Self {
            disk,
            next: AtomicU64::new(next),
        };
        Ok((journal, table))
    }

    /// Adds an entry.
    ///
    /// # Errors
    /// The disk fails; whether the entry is there is not known.
    pub(super) fn append(&self, entry: &Entry) -> io::Result<()> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        self.disk
            .write_at(&entry.encode(), ENTRIES_AT + index * ENTRY as u64)
    }

    /// Makes all entries durable.
    ///
    /// # Errors
    /// They are not.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.disk.flush()
    }

    /// Marks the snapshot as broken. Takes no new room.
    ///
    /// # Errors
    /// The disk fails.
    pub(super) fn break_off(&self, errno: i32) -> io::Result<()> {
        let mut mark = [0; SECTOR];
        mark[..8].copy_from_slice(&END_MAGIC);
        mark[8..12].copy_from_slice(&errno.to_le_bytes());
        seal(&mut mark);
        self.disk.write_at(&mark, END_AT)?;
        self.disk.flush()
    }
}

fn failed(action: &'static str, disk: &dyn Disk, source: io::Error) -> JournalError {
    JournalError::Io {
        action,
        name: disk.name().to_owned(),
        source,
    }
}

/// Calls `each` for every place that is not empty, in order.
fn entries(
    disk: &dyn Disk,
    mut each: impl FnMut(u64, &[u8]) -> Result<(), JournalError>,
) -> Result<(), JournalError> {
    let read = |source| failed("read", disk, source);
    let mut buffer = vec![0; PIECE];
    let mut at = ENTRIES_AT;
    while at < disk.size() {
        let known = disk.allocation(at, disk.size() - at, 1).map_err(read)?;
        let Some(piece) = known.first() else { break };
        // A hole may begin or end anywhere; entries don't cross a block.
        let length = piece.length.max(ENTRY as u64).next_multiple_of(ENTRY as u64);
        if piece.hole && piece.length >= ENTRY as u64 {
            at += piece.length / ENTRY as u64 * ENTRY as u64;
            continue;
        }
        let length = length.min(PIECE as u64).min(disk.size() - at);
        let part = &mut buffer[..usize::try_from(length).expect("at most a piece")];
        disk.read_at(part, at).map_err(read)?;
        for (n, bytes) in part.chunks_exact(ENTRY).enumerate() {
            if bytes.iter().any(|byte| *byte != 0) {
                each((at - ENTRIES_AT) / ENTRY as u64 + n as u64, bytes)?;
            }
        }
        at += length;
    }
    Ok(())
}

impl Entry {
    fn encode(&self) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        bytes[..8].copy_from_slice(&self.chunk.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.units.bits().to_le_bytes());
        bytes[16..24].copy_from_slice(&self.slot.offset.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.slot.region.number().to_le_bytes());
        seal(&mut bytes);
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != ENTRY || !checksum_is_right(bytes) {
            return None;
        }
        Some(Self {
            chunk: long(bytes, 0),
            units: UnitSet::from_bits(long(bytes, 8)),
            slot: Slot {
                region: RegionId::new(number(bytes, 24)),
                offset: long(bytes, 16),
            },
        })
    }

    /// Adds it to a table.
    fn apply(&self, table: &mut Table) -> Result<(), &'static str> {
        let layout = *table.layout();
        if self.chunk >= layout.chunks() {
            return Err("its chunk is behind the end of the device");
        }
        if self.units.is_empty() || !self.units.without(layout.all(self.chunk)).is_empty() {
            return Err("it has units that the chunk lacks");
        }
        if table
            .stored_in(self.chunk, self.units)
            .any(|(slot, _)| slot != self.slot)
        {
            return Err("its units have another place already");
        }
        table.store(self.chunk, self.slot, self.units);
        Ok(())
    }
}

fn header(subject: &Subject) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&subject.member.to_le_bytes());
    bytes[16..32].copy_from_slice(subject.snapshot.as_bytes());
    bytes[32..40].copy_from_slice(&subject.layout.size().to_le_bytes());
    bytes[40..48].copy_from_slice(&subject.layout.chunk_bytes().to_le_bytes());
    bytes[48..56].copy_from_slice(&subject.layout.unit_bytes().to_le_bytes());
    seal(&mut bytes);
    bytes
}

/// Puts the checksum of all before it into the last four bytes.
fn seal(bytes: &mut [u8]) {
    if let Some((content, sum)) = bytes.split_last_chunk_mut::<4>() {
        *sum = crc32c::crc32c(content).to_le_bytes();
    }
}

fn checksum_is_right(bytes: &[u8]) -> bool {
    bytes
        .split_last_chunk::<4>()
        .is_some_and(|(content, sum)| crc32c::crc32c(content).to_le_bytes() == *sum)
}

fn long(bytes: &[u8], at: usize) -> u64 {
    bytes[at..]
        .first_chunk()
        .map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

fn number(bytes: &[u8], at: usize) -> u32 {
    bytes[at..]
        .first_chunk()
        .map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

//! Ring record: what the programs say of a write that made a block dirty, as bytes of the ring and as a mark in the
//! change map.
//!
//! The bytes come from a program of ours, but through memory that others could have damaged: anything that is not
//! a record is `None`, and a record that names blocks past the end corrupts the map rather than being cut to size.

use blksnap_common::track::{OP_KINDS, Record};

use crate::cbt::CbtMap;

/// A record from the ring's bytes, which are in the byte order of the machine; `None` for anything of another
/// length than a record.
#[must_use]
pub fn decode(bytes: &[u8]) -> Option<Record> {
    let bytes: &[u8; size_of::<Record>()] = bytes.try_into().ok()?;
    let long = |at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        u64::from_ne_bytes(word)
    };
    let short = |at: usize| {
        let mut word = [0; 4];
        word.copy_from_slice(&bytes[at..at + 4]);
        u32::from_ne_bytes(word)
    };
    Some(Record {
        period: long(0),
        first_block: long(8),
        last_block: long(16),
        slot: short(24),
        kind: short(28),
    })
}

/// Whether the programs write such a record: a kind that there is, and blocks in order. Blocks past the end of the
/// map are found when they are marked.
#[must_use]
pub fn is_sound(record: &Record) -> bool {
    (record.kind as usize) < OP_KINDS && record.first_block <= record.last_block
}

/// Marks the blocks of a record in the map of its slot, whose open bitmap has number `period`. A record of another
/// period is left out: the bitmap of a closed period had its blocks, and that went into the map as a whole.
pub fn apply(record: &Record, period: u64, map: &mut CbtMap) {
    if record.period == period {
        map.mark_blocks(record.first_block, record.last_block);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_survive_the_ring() {
        let record = Record {
            period: 1 << 40,
            first_block: 3,
            last_block: u64::MAX,
            slot: 255,
            kind: 5,
        };
        let mut bytes = Vec::new();
        for word in [record.period, record.first_block, record.last_block] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(&record.slot.to_ne_bytes());
        bytes.extend_from_slice(&record.kind.to_ne_bytes());
        assert_eq!(decode(&bytes), Some(record));
        assert_eq!(decode(&bytes[1..]), None);
        assert_eq!(decode(&[]), None);
    }
}

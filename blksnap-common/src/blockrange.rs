//! Block range: from a bio's sectors to the blocks and bitmap words of a slot. Pure, and small enough for the
//! verifier.

use crate::track::{OpKind, Slot};

/// `REQ_OP_MASK` of `include/linux/blk_types.h`.
pub const REQ_OP_MASK: u32 = 0xff;

/// Operation codes of `enum req_op` in `include/linux/blk_types.h`, stable from 5.10 on unless noted.
pub mod op {
    /// `REQ_OP_READ`.
    pub const READ: u32 = 0;
    /// `REQ_OP_WRITE`.
    pub const WRITE: u32 = 1;
    /// `REQ_OP_FLUSH`.
    pub const FLUSH: u32 = 2;
    /// `REQ_OP_DISCARD`.
    pub const DISCARD: u32 = 3;
    /// `REQ_OP_SECURE_ERASE`.
    pub const SECURE_ERASE: u32 = 5;
    /// `REQ_OP_ZONE_APPEND`.
    pub const ZONE_APPEND: u32 = 7;
    /// `REQ_OP_WRITE_ZEROES`.
    pub const WRITE_ZEROES: u32 = 9;
    /// First code of the zone operations: open, close, finish, reset, reset all. Their numbers moved (6.1: even
    /// and odd ones from 10 to 17; 6.18: odd ones from 11 to 19), the range did not.
    pub const ZONE_FIRST: u32 = 10;
    /// Last code before the driver's private operations (`REQ_OP_DRV_IN` is 34).
    pub const ZONE_LAST: u32 = 33;
}

/// What an operation does, or `None` for one that changes nothing (a read).
#[inline(always)]
#[must_use]
pub const fn classify(opf: u32) -> Option<OpKind> {
    match opf & REQ_OP_MASK {
        op::READ => None,
        op::WRITE => Some(OpKind::Write),
        op::DISCARD => Some(OpKind::Discard),
        op::SECURE_ERASE => Some(OpKind::SecureErase),
        op::WRITE_ZEROES => Some(OpKind::WriteZeroes),
        op::ZONE_APPEND | op::ZONE_FIRST..=op::ZONE_LAST => Some(OpKind::Zone),
        _ => Some(OpKind::Other),
    }
}

/// [`kind_table`]'s entry of an operation that changes nothing.
pub const NO_KIND: u8 = u8::MAX;

/// [`classify`] of every operation code as a table: one load and no branches, each of which would be one more
/// path for the verifier to follow to the end.
#[must_use]
pub const fn kind_table() -> [u8; 256] {
    let mut table = [NO_KIND; 256];
    let mut code: u8 = 0;
    loop {
        if let Some(kind) = classify(code as u32) {
            table[code as usize] = kind.code();
        }
        if code == u8::MAX {
            return table;
        }
        code += 1;
    }
}

/// The sectors, from a first one on, that an operation of kind `kind` (an [`OpKind`] as a number) changes; `None`
/// if that is the whole device. `sector` and `sectors` are the bio's, `zone_sectors` the disk's zone size or 0.
///
/// Zone append, reset, finish, open and close name a zone by its first sector, with or without a length, and count
/// as the whole zone: where an append lands is known only afterwards. "Reset all" names sector 0 without a length.
/// On a disk that is not zoned, or whose zones have another size than the kernel allows, nothing better is known
/// than the whole device.
#[inline(always)]
#[must_use]
pub const fn changed_sectors(kind: u8, zone_sectors: u32, sector: u64, sectors: u64) -> Option<(u64, u64)> {
    if kind != OpKind::Zone.code() {
        return Some((sector, sectors));
    }
    let zone = zone_sectors as u64;
    if zone == 0 || zone & (zone - 1) != 0 || (sector == 0 && sectors == 0) {
        return None;
    }
    Some((sector & !(zone - 1), zone))
}

/// First and last block of a slot, both inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRange {
    /// First block.
    pub first: u64,
    /// Last block.
    pub last: u64,
}

/// The blocks of `slot` that the sectors `[sector, sector + sectors)` of the disk touch, or `None` where they do
/// not meet.
#[inline(always)]
#[must_use]
pub const fn blocks_of(slot: &Slot, sector: u64, sectors: u64) -> Option<BlockRange> {
    let end = sector.saturating_add(sectors);
    if sectors == 0 || sector >= slot.end_sector || end <= slot.first_sector {
        return None;
    }
    let start = sector.saturating_sub(slot.first_sector);
    let stop = if end < slot.end_sector {
        end
    } else {
        slot.end_sector
    } - slot.first_sector;
    let shift = slot.block_shift & 63;
    Some(BlockRange {
        first: start >> shift,
        last: (stop - 1) >> shift,
    })
}

/// The bits of word `word` (of the bits, without the header) that `range` covers; 0 for none.
#[inline(always)]
#[must_use]
pub const fn word_mask(range: BlockRange, word: u64) -> u64 {
    let low = word << 6;
    let high = low | 63;
    if range.last < low || range.first > high {
        return 0;
    }
    let from = if range.first > low { range.first & 63 } else { 0 };
    let to = if range.last < high { range.last & 63 } else { 63 };
    (u64::MAX << from) & (u64::MAX >> (63 - to))
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    const SLOT: Slot = Slot {
        first_sector: 2048,
        end_sector: 2048 + 1000,
        id: 0,
        block_shift: 3,
        flags: 0,
        reserved: 0,
    };

    /// Every sector by itself is the oracle.
    fn by_sector(slot: &Slot, sector: u64, sectors: u64) -> Vec<u64> {
        let mut blocks: Vec<u64> = (sector..sector + sectors)
            .filter(|s| (slot.first_sector..slot.end_sector).contains(s))
            .map(|s| (s - slot.first_sector) >> slot.block_shift)
            .collect();
        blocks.dedup();
        blocks
    }

    #[test]
    fn blocks_match_the_sectors_one_by_one() {
        for sector in (2000..2100).chain(3000..3100) {
            for sectors in [0, 1, 2, 7, 8, 9, 63, 64, 65, 1100] {
                let want = by_sector(&SLOT, sector, sectors);
                let got: Vec<u64> = blocks_of(&SLOT, sector, sectors)
                    .map(|r| (r.first..=r.last).collect())
                    .unwrap_or_default();
                assert_eq!(got, want, "sector {sector} count {sectors}");
            }
        }
    }

    #[test]
    fn masks_cover_the_range_and_nothing_else() {
        for first in 0..200_u64 {
            for last in first..200 {
                let range = BlockRange { first, last };
                for block in 0..256_u64 {
                    let bit = word_mask(range, block / 64) >> (block % 64) & 1 == 1;
                    assert_eq!(bit, (first..=last).contains(&block), "{range:?} block {block}");
                }
            }
        }
    }

    #[test]
    fn zone_operations_change_their_whole_zone() {
        let zone = |size, sector, sectors| changed_sectors(OpKind::Zone.code(), size, sector, sectors);
        const ZONE: u32 = 524_288;
        // An append of 8 sectors to the zone at three times the size, and a reset of it.
        assert_eq!(zone(ZONE, 3 * 524_288, 8), Some((3 * 524_288, 524_288)));
        assert_eq!(zone(ZONE, 3 * 524_288, 0), Some((3 * 524_288, 524_288)));
        // Emulated appends name the write pointer: the zone is the same.
        assert_eq!(zone(ZONE, 3 * 524_288 + 1000, 8), Some((3 * 524_288, 524_288)));
        // An append to the first zone, which "reset all" is told from by its length.
        assert_eq!(zone(ZONE, 0, 8), Some((0, 524_288)));
        assert_eq!(zone(ZONE, 0, 0), None);
        // Nothing is known of the zones.
        assert_eq!(zone(0, 2048, 8), None);
        assert_eq!(zone(3, 2048, 8), None);
        // Others change what they name, on zoned disks too.
        for kind in OpKind::ALL.into_iter().filter(|kind| *kind != OpKind::Zone) {
            assert_eq!(changed_sectors(kind.code(), ZONE, 7, 9), Some((7, 9)));
        }
    }

    #[test]
    fn blocks_of_a_zone_are_those_of_its_slots() {
        // A zone of 256 sectors, and a slot that begins in its middle.
        let slot = Slot {
            first_sector: 2048 + 128,
            end_sector: 1 << 20,
            ..SLOT
        };
        let (sector, sectors) = changed_sectors(OpKind::Zone.code(), 256, 2048 + 200, 8).unwrap();
        assert_eq!(
            blocks_of(&slot, sector, sectors),
            Some(BlockRange { first: 0, last: 15 })
        );
    }

    #[test]
    fn every_operation_but_a_read_counts() {
        assert_eq!(classify(0x0008_0000), None);
        assert_eq!(classify(0x0008_0001), Some(OpKind::Write));
        assert_eq!(classify(op::ZONE_APPEND), Some(OpKind::Zone));
        assert_eq!(classify(op::WRITE_ZEROES), Some(OpKind::WriteZeroes));
        for zone in 10..34 {
            assert_eq!(classify(zone), Some(OpKind::Zone));
        }
        assert_eq!(classify(34), Some(OpKind::Other));
        let table = kind_table();
        assert_eq!(table[0], NO_KIND);
        for code in 1..=255_u8 {
            let kind = classify(code.into()).unwrap();
            assert_eq!(OpKind::ALL[usize::from(table[usize::from(code)])], kind);
        }
    }
}

//! Ring records: whatever bytes the ring holds, and a model of the map that they go into.
//!
//! An input is a device (shift of the block size, sectors) and a sequence of items: a record of the ring of any
//! length, the end of the bitmap's period, or a take. The oracle puts the numbers of a record together byte by byte,
//! and keeps a map as plain numbers; blocks, count of dirty blocks and corruption must agree after every item.

use arbitrary::{Arbitrary, Unstructured};
use blksnap_agent::cbt::{CbtMap, ResetReason};
use blksnap_agent::tracker::record;
use blksnap_agent::units::{BlockSize, Generation, Sectors};
use blksnap_common::track::Record;
use uuid::Uuid;

/// One thing that happens.
#[derive(Arbitrary, Debug)]
enum Item<'a> {
    /// Bytes of the ring, as they are.
    Raw(&'a [u8]),
    /// A record near the map, of this period or one beside.
    Near {
        first: u16,
        length: u16,
        period: u8,
        rest: u64,
    },
    /// The bitmap's period ends.
    Close,
    /// The snapshot period ends.
    Take,
}

/// What the map should be.
struct Model {
    bytes: Vec<u8>,
    active: u8,
    corrupted: bool,
}

impl Model {
    fn mark(&mut self, first: u64, last: u64) {
        if first > last {
            return;
        }
        self.corrupted |= last >= self.bytes.len() as u64;
        for (block, byte) in (0_u64..).zip(&mut self.bytes) {
            if (first..=last).contains(&block) {
                *byte = self.active;
            }
        }
    }

    fn take(&mut self) {
        if self.corrupted || self.active == u8::MAX {
            self.bytes.fill(0);
            self.corrupted = false;
            self.active = 1;
        }
        self.active += 1;
    }

    fn check(&self, map: &CbtMap) {
        let dirty = self.bytes.iter().filter(|byte| **byte == self.active).count();
        assert_eq!(map.dirty_blocks(), dirty as u64);
        assert_eq!(map.active(), self.active);
        assert_eq!(map.corrupted(), self.corrupted.then_some(ResetReason::OutOfRange));
        match map.live_map() {
            Ok(live) => assert!(*live.blocks() == self.bytes[..]),
            Err(_) => assert!(self.corrupted),
        }
    }
}

/// The oracle's decoder: a record is 32 bytes, numbers of the machine's order one after the other.
fn decode(bytes: &[u8]) -> Option<Record> {
    let number = |bytes: &[u8]| {
        let fold = |number: u64, byte: &u8| number << 8 | u64::from(*byte);
        if cfg!(target_endian = "little") {
            bytes.iter().rev().fold(0, fold)
        } else {
            bytes.iter().fold(0, fold)
        }
    };
    let short = |bytes: &[u8]| u32::try_from(number(bytes)).ok();
    if bytes.len() != 32 {
        return None;
    }
    Some(Record {
        period: number(&bytes[..8]),
        first_block: number(&bytes[8..16]),
        last_block: number(&bytes[16..24]),
        slot: short(&bytes[24..28])?,
        kind: short(&bytes[28..])?,
    })
}

fn encode(record: &Record) -> Vec<u8> {
    let long = [record.period, record.first_block, record.last_block].map(u64::to_ne_bytes);
    let short = [record.slot, record.kind].map(u32::to_ne_bytes);
    [long.concat(), short.concat()].concat()
}

/// Runs one input.
///
/// # Panics
/// When the decoder or the map differs from the oracle.
pub fn run(data: &[u8]) {
    // An input that is too short is no device.
    let _ = device_and_items(&mut Unstructured::new(data));
}

fn device_and_items(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let block_size = BlockSize::from_shift(input.int_in_range(12..=26)?).expect("shifts in range");
    let capacity = Sectors::new(u64::from(u16::arbitrary(input)?));
    let generation = |number: u128| Generation::new(Uuid::from_u128(number));
    let mut map = CbtMap::new(generation(0), block_size, capacity).expect("at most 65536 blocks");
    let mut model = Model {
        bytes: vec![0; usize::try_from(block_size.blocks_in(capacity)).expect("16 bits")],
        active: 1,
        corrupted: false,
    };
    let mut period = 1_u64;
    let mut takes = 0;
    while !input.is_empty() {
        let raw = match Item::arbitrary(input)? {
            Item::Raw(bytes) => bytes.to_vec(),
            Item::Near {
                first,
                length,
                period: beside,
                rest,
            } => encode(&Record {
                period: period.wrapping_add(u64::from(beside % 4)).wrapping_sub(1),
                first_block: first.into(),
                last_block: (u64::from(first) + u64::from(length) * (1 + (rest & 1)))
                    .wrapping_sub(rest >> 63),
                slot: 0,
                kind: 0,
            }),
            Item::Close => {
                period += 1;
                continue;
            }
            Item::Take => {
                takes += 1;
                map.take(generation(takes), capacity)
                    .expect("the size did not change");
                model.take();
                model.check(&map);
                continue;
            }
        };
        let record = record::decode(&raw);
        assert_eq!(record, decode(&raw));
        if let Some(record) = record {
            record::apply(&record, period, &mut map);
            if record.period == period {
                model.mark(record.first_block, record.last_block);
            }
            model.check(&map);
        }
    }
    Ok(())
}

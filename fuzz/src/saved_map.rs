//! Saved maps: any bytes are refused or are a frame, and a frame is refused or holds a map.
//!
//! The first byte of an input chooses one of three. Bytes as they are: what is accepted has to be what an own
//! reader of frames finds in them. A frame put together by an own writer, right in every checksum but with header,
//! lengths and blocks as the input wants them: code and own reader must agree on it, and on whether it is a map. A
//! frame as the agent writes it: it must come back, and with one byte changed, cut or added it must not.

use arbitrary::{Arbitrary, Unstructured};
use blksnap_agent::cbt::{Blocks, CbtMap, ResetReason, SavedHeader};
use blksnap_agent::statefile::Format;
use blksnap_agent::statefile::frame::{self, FrameError};
use blksnap_agent::units::{Generation, Sectors};
use uuid::Uuid;

use crate::frame_oracle::{self, Block, Parts};

/// The format that is read.
pub const FORMAT: Format = Format {
    name: "fuzz-map",
    version: 2,
};

/// Header and sections, as both readers give them.
type Read = (SavedHeader, Vec<Vec<u8>>);

/// Runs one input.
///
/// # Panics
/// When the reader of frames or of maps differs from the oracle.
pub fn run(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else {
        return;
    };
    // An input that ends too early is nothing to try.
    let _ = match kind % 3 {
        0 => {
            frame(rest);
            Ok(())
        }
        1 => put_together(&mut Unstructured::new(rest)),
        _ => written(&mut Unstructured::new(rest)),
    };
}

/// Reads a frame in both ways.
fn frame(bytes: &[u8]) -> Option<Read> {
    let read = frame::decode::<SavedHeader>(bytes, bytes.len() as u64, FORMAT);
    let expected = frame_oracle::read(bytes);
    match read {
        Ok(read) => {
            let (header, sections) = expected.expect("accepted, but it is no frame");
            let header: SavedHeader =
                serde_json::from_slice(&header).expect("accepted, but its header is none");
            assert_eq!(read, (header, sections));
            Some(read)
        }
        Err(error) => {
            assert!(!matches!(error, FrameError::Io(_)), "{error}");
            let is_one =
                expected.is_some_and(|(header, _)| serde_json::from_slice::<SavedHeader>(&header).is_ok());
            assert!(!is_one, "refused: {error}");
            None
        }
    }
}

/// Makes a map of what was read, and checks that it is saved as it was.
fn map((header, sections): Read) {
    let expected = is_map(&header, &sections);
    match CbtMap::restore_sections(&header, sections.clone()) {
        Ok(mut map) => {
            assert!(expected, "accepted: {header:?}");
            let saved = map.save();
            assert_eq!(saved.header, header);
            let again: Vec<Vec<u8>> = saved.sections().iter().map(Blocks::to_vec).collect();
            assert_eq!(again, sections);
            assert_eq!(map.corrupted(), header.corrupted);
            let dirty = sections[0].iter().filter(|byte| **byte == header.active).count();
            assert_eq!(map.dirty_blocks(), dirty as u64);
            // It goes on as any other.
            map.mark_blocks(0, u64::MAX);
            let taken = map.take(Generation::new(Uuid::from_u128(1)), header.capacity);
            assert!(taken.expect("the size did not change").reset.is_some());
        }
        Err(error) => assert!(!expected, "refused: {error}: {header:?}"),
    }
}

/// Whether some history of writes, marks and takes leads to this map.
fn is_map(header: &SavedHeader, sections: &[Vec<u8>]) -> bool {
    let size = u128::from(header.block_size);
    let blocks = (u128::from(header.capacity.count()) * 512).div_ceil(size.max(1));
    let taken = header.active > 1;
    let (Some(live), count) = (sections.first(), 1 + usize::from(taken)) else {
        return false;
    };
    let right_size = size.is_power_of_two() && (4096..=64 << 20).contains(&size) && blocks <= 1 << 30;
    let right_sections = sections.len() == count
        && sections.iter().all(|section| section.len() as u128 == blocks)
        && header.read == taken.then(|| header.active.wrapping_sub(1));
    right_size
        && right_sections
        && header.active != 0
        && (0..live.len()).all(|block| match sections.get(1) {
            None => live[block] <= header.active,
            Some(read) => read[block] < header.active && [read[block], header.active].contains(&live[block]),
        })
}

/// What the input says of a header: mostly near something right.
#[derive(Arbitrary, Debug)]
struct Wish {
    shift: u8,
    sectors: u16,
    odd_sectors: Option<u64>,
    odd_block_size: Option<u64>,
    active: u8,
    read: Option<Option<u8>>,
    corrupted: Option<u8>,
    odd_json: bool,
}

impl Wish {
    fn header(&self) -> SavedHeader {
        let reason = |number: u8| ResetReason::ALL[usize::from(number) % ResetReason::ALL.len()];
        SavedHeader {
            generation: Generation::new(Uuid::from_u128(7)),
            began: reason(self.active),
            block_size: self.odd_block_size.unwrap_or(1 << (12 + self.shift % 15)),
            capacity: Sectors::new(self.odd_sectors.unwrap_or(self.sectors.into())),
            active: self.active,
            corrupted: self.corrupted.map(reason),
            read: self
                .read
                .unwrap_or(self.active.checked_sub(1).filter(|read| *read > 0)),
        }
    }

    /// How many bytes a section should have, if that is few enough to be made.
    fn blocks(&self) -> usize {
        let header = self.header();
        let blocks = (u128::from(header.capacity.count()) * 512).div_ceil(header.block_size.max(1).into());
        usize::try_from(blocks).unwrap_or(usize::MAX).min(1 << 14)
    }
}

/// A section: as it should be with some bytes of the input, or anything.
fn section(input: &mut Unstructured<'_>, length: usize, fill: u8) -> arbitrary::Result<Vec<u8>> {
    let mut section = vec![fill; length];
    let given = <&[u8]>::arbitrary(input)?;
    if bool::arbitrary(input)? {
        return Ok(given.to_vec());
    }
    for (byte, given) in section.iter_mut().zip(given) {
        *byte = *given;
    }
    Ok(section)
}

fn put_together(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let wish = Wish::arbitrary(input)?;
    let header = if wish.odd_json {
        <&[u8]>::arbitrary(input)?.to_vec()
    } else {
        serde_json::to_vec(&wish.header()).expect("a header is JSON")
    };
    let mut sections = Vec::new();
    for _ in 0..input.int_in_range(0..=3)? {
        let plain = section(input, wish.blocks(), wish.active.saturating_sub(1))?;
        let block = match input.int_in_range(0..=3)? {
            0 => Block::Packed(<&[u8]>::arbitrary(input)?.to_vec()),
            1 => Block::Literal,
            _ => Block::AsItIs,
        };
        sections.push((plain, block));
    }
    let parts = Parts {
        name: if u8::arbitrary(input)? == 1 {
            "else"
        } else {
            FORMAT.name
        },
        version: if u8::arbitrary(input)? == 1 {
            3
        } else {
            FORMAT.version
        },
        container: if u8::arbitrary(input)? == 1 { 2 } else { 1 },
        header,
        sections,
        length_of_first: Option::arbitrary(input)?,
        count: Option::arbitrary(input)?,
    };
    if let Some(read) = frame(&parts.write()) {
        map(read);
    }
    Ok(())
}

fn written(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let wish = Wish::arbitrary(input)?;
    let (header, mut sections) = (wish.header(), Vec::new());
    for _ in 0..input.int_in_range(0..=2)? {
        sections.push(section(input, wish.blocks(), wish.active)?);
    }
    let borrowed: Vec<&[u8]> = sections.iter().map(Vec::as_slice).collect();
    let mut bytes = Vec::new();
    frame::encode(&mut bytes, FORMAT, &header, &borrowed).expect("a frame holds it");
    let read = frame(&bytes).expect("what was written is read");
    assert_eq!(read, (header, sections));
    map(read);

    let at = input.int_in_range(0..=bytes.len() - 1)?;
    let change = input.int_in_range(1..=255_u8)?;
    bytes[at] ^= change;
    assert_eq!(frame(&bytes), None, "byte {at} changed by {change:#x}");
    bytes[at] ^= change;
    assert_eq!(frame(&bytes[..at]), None, "cut at {at}");
    bytes.push(change);
    assert_eq!(frame(&bytes), None, "one byte too many");
    Ok(())
}

//! Frame oracle: the container of saved maps written and read from its description, slowly and without the crates
//! that the agent uses for it.

use crate::checksum::crc32c;

/// First bytes of a frame.
const MAGIC: &[u8] = b"\x89blksn\x1a\n";

/// Plain bytes in a block.
const BLOCK: usize = 1 << 20;

/// How the blocks of a section are stored.
#[derive(Debug)]
pub(crate) enum Block {
    /// Not packed.
    AsItIs,
    /// Packed as one sequence of literals, which makes them longer.
    Literal,
    /// These bytes, whatever they unpack to.
    Packed(Vec<u8>),
}

/// What a frame is put together from.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) name: &'static str,
    pub(crate) version: u32,
    pub(crate) container: u32,
    pub(crate) header: Vec<u8>,
    pub(crate) sections: Vec<(Vec<u8>, Block)>,
    /// A length to be said of the first section instead of its own.
    pub(crate) length_of_first: Option<u64>,
    /// A number of sections to be said instead of the right one.
    pub(crate) count: Option<u32>,
}

impl Parts {
    /// The frame, with right checksums over whatever it says.
    pub(crate) fn write(&self) -> Vec<u8> {
        let mut name = self.name.as_bytes().to_vec();
        name.resize(32, 0);
        let count = self.count.unwrap_or(narrow(self.sections.len()));
        let words = [self.container, self.version].map(u32::to_le_bytes).concat();
        let sizes = [narrow(self.header.len()), count, 0]
            .map(u32::to_le_bytes)
            .concat();
        let mut frame = checked([MAGIC, &words, &name, &sizes].concat());
        let mut lengths: Vec<u64> = self
            .sections
            .iter()
            .map(|(plain, _)| plain.len() as u64)
            .collect();
        if let (Some(first), Some(said)) = (lengths.first_mut(), self.length_of_first) {
            *first = said;
        }
        frame.extend(checked(lengths.into_iter().flat_map(u64::to_le_bytes).collect()));
        frame.extend(checked(self.header.clone()));
        for (plain, block) in &self.sections {
            for part in plain.chunks(BLOCK) {
                let (packed, mark) = match block {
                    Block::AsItIs => (part.to_vec(), 1 << 31),
                    Block::Literal => (literals(part), 0),
                    Block::Packed(bytes) => (bytes.clone(), 0),
                };
                frame.extend((narrow(packed.len()) | mark).to_le_bytes());
                frame.extend(packed);
            }
            frame.extend(crc32c(plain).to_le_bytes());
        }
        checked(frame)
    }
}

/// Parts of an input are short.
fn narrow(length: usize) -> u32 {
    u32::try_from(length).expect("inputs are shorter than 4 GiB")
}

/// Bytes and their checksum.
fn checked(bytes: Vec<u8>) -> Vec<u8> {
    let sum = crc32c(&bytes).to_le_bytes();
    [bytes, sum.to_vec()].concat()
}

/// One LZ4 sequence without a match.
fn literals(plain: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    if plain.len() < 15 {
        packed.push(u8::try_from(plain.len()).expect("below 15") << 4);
    } else {
        packed.push(0xf0);
        let rest = plain.len() - 15;
        packed.extend(std::iter::repeat_n(255, rest / 255));
        packed.push(u8::try_from(rest % 255).expect("below 255"));
    }
    packed.extend(plain);
    packed
}

/// The header and the sections of a frame of the format that is fuzzed.
pub(crate) fn read(frame: &[u8]) -> Option<(Vec<u8>, Vec<Vec<u8>>)> {
    let body = unchecked(frame)?;
    let (head, rest) = body.split_at_checked(64)?;
    let head = unchecked(head)?;
    let word = |at: usize| Some(u32::from_le_bytes(head.get(at..at + 4)?.try_into().ok()?));
    let mut name = crate::saved_map::FORMAT.name.as_bytes().to_vec();
    name.resize(32, 0);
    let right = head.starts_with(MAGIC)
        && word(8)? == 1
        && word(12)? == crate::saved_map::FORMAT.version
        && head[16..48] == name
        && word(56)? == 0;
    let (header_length, count) = (word(48)? as usize, word(52)? as usize);
    if !right || header_length > 1 << 20 || count > 16 {
        return None;
    }
    let (lengths, rest) = rest.split_at_checked(8 * count + 4)?;
    let (lengths, _) = unchecked(lengths)?.as_chunks::<8>();
    let (header, mut rest) = rest.split_at_checked(header_length + 4)?;
    let header = unchecked(header)?.to_vec();
    let mut sections = Vec::new();
    for length in lengths.iter().map(|length| u64::from_le_bytes(*length)) {
        // A block of n bytes unpacks to less than 256 n.
        if length > 256 * frame.len() as u64 {
            return None;
        }
        let length = usize::try_from(length).ok()?;
        let mut section = Vec::new();
        while section.len() < length {
            let wanted = (length - section.len()).min(BLOCK);
            let (size, after) = rest.split_at_checked(4)?;
            let size = u32::from_le_bytes(size.try_into().ok()?);
            let (stored, after) = after.split_at_checked((size & !(1 << 31)) as usize)?;
            let plain = if size >> 31 == 1 {
                stored.to_vec()
            } else {
                unpack(stored).filter(|_| stored.len() < wanted)?
            };
            if plain.len() != wanted {
                return None;
            }
            section.extend(plain);
            rest = after;
        }
        let (sum, after) = rest.split_at_checked(4)?;
        if sum != crc32c(&section).to_le_bytes() {
            return None;
        }
        rest = after;
        sections.push(section);
    }
    rest.is_empty().then_some((header, sections))
}

/// Bytes without the checksum after them, if it is right.
fn unchecked(bytes: &[u8]) -> Option<&[u8]> {
    let (bytes, sum) = bytes.split_at_checked(bytes.len().checked_sub(4)?)?;
    (sum == crc32c(bytes).to_le_bytes()).then_some(bytes)
}

/// An LZ4 block: sequences of literals and a match, of which the last one has no match.
fn unpack(mut packed: &[u8]) -> Option<Vec<u8>> {
    let mut plain = Vec::new();
    loop {
        let (token, rest) = packed.split_first()?;
        packed = rest;
        let literals = length(token >> 4, &mut packed)?;
        let (bytes, rest) = packed.split_at_checked(literals)?;
        plain.extend(bytes);
        packed = rest;
        if packed.is_empty() {
            return Some(plain);
        }
        let (back, rest) = packed.split_at_checked(2)?;
        packed = rest;
        let back = usize::from(u16::from_le_bytes(back.try_into().ok()?));
        let count = length(token & 15, &mut packed)?.checked_add(4)?;
        let from = plain.len().checked_sub(back).filter(|_| back > 0)?;
        if count > BLOCK {
            return None;
        }
        for at in from..from + count {
            plain.push(plain[at]);
        }
    }
}

/// A length of an LZ4 sequence: 15 in the token goes on in bytes of 255.
fn length(token: u8, packed: &mut &[u8]) -> Option<usize> {
    let mut length = usize::from(token);
    if token == 15 {
        loop {
            let (more, rest) = packed.split_first()?;
            *packed = rest;
            length += usize::from(*more);
            if *more != 255 {
                break;
            }
        }
    }
    Some(length)
}

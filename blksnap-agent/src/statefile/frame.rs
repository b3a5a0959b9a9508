//! Frame: a binary container of a JSON header and a few large sections.
//!
//! Form, in little endian; `docs/format.md` has the boxes:
//!
//! ```text
//! head      magic, name and version of the format, length of the header, number of sections, CRC
//! lengths   u64 for each section, CRC
//! header    JSON, CRC
//! sections  blocks of 1 MiB, each as it is or compressed with LZ4; CRC of the plain bytes
//! end       CRC of everything before
//! ```
//!
//! # Damage
//! A length is used only after the checksum over it was found right, and no allocation is larger than what the
//! file's own length can unpack to: LZ4 makes at most 255 bytes of one. Bytes past the end are damage, too.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Format;
use crate::cbt::Blocks;

/// First bytes of every frame. The first one is no ASCII and the last one ends text, so that nobody takes it for
/// text.
const MAGIC: [u8; 8] = *b"\x89blksn\x1a\n";

/// Version of the container. What is before [`HEAD`] ends keeps its form in every version.
const CONTAINER: u32 = 1;

/// Bytes of the head with its checksum.
const HEAD: usize = 64;

/// Longest name of a format, in bytes.
const NAME: usize = 32;

/// Most sections in a frame.
pub const MAX_SECTIONS: usize = 16;

/// Longest section, in bytes.
pub const MAX_SECTION: u64 = 1 << 30;

/// Longest header, in bytes of JSON.
pub const MAX_HEADER: usize = 1 << 20;

/// Plain bytes of a section that are compressed at a time.
const BLOCK: usize = 1 << 20;

/// In the length of a block: it is stored as it is.
const AS_IT_IS: u32 = 1 << 31;

/// Most bytes that LZ4 makes of one.
const LZ4_RATIO: u64 = 255;

/// A frame can't be read.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Reading failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It is not what was written.
    #[error("{0}")]
    Damaged(String),
    /// It is of another format or version: what it says it is.
    #[error("it is {0}")]
    Version(String),
}

/// A writer or reader that keeps the checksum of what went through it.
struct Summed<T> {
    inner: T,
    sum: u32,
}

impl<W: Write> Summed<W> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.sum = crc32c::crc32c_append(self.sum, bytes);
        self.inner.write_all(bytes)
    }

    /// Writes `bytes` and their checksum.
    fn put_checked(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.put(bytes)?;
        self.put(&crc32c::crc32c(bytes).to_le_bytes())
    }
}

impl<R: Read> Summed<R> {
    fn get(&mut self, bytes: &mut [u8]) -> Result<(), FrameError> {
        self.inner.read_exact(bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => damaged("it ends too early"),
            _ => error.into(),
        })?;
        self.sum = crc32c::crc32c_append(self.sum, bytes);
        Ok(())
    }

    fn word(&mut self) -> Result<u32, FrameError> {
        let mut word = [0; 4];
        self.get(&mut word)?;
        Ok(u32::from_le_bytes(word))
    }

    /// Reads bytes with the checksum after them.
    fn get_checked(&mut self, bytes: &mut [u8], what: &str) -> Result<(), FrameError> {
        self.get(bytes)?;
        self.check(bytes, what)
    }

    /// Reads a checksum, which has to be the one of `bytes`.
    fn check(&mut self, bytes: &[u8], what: &str) -> Result<(), FrameError> {
        let sum = crc32c::crc32c(bytes);
        let said = self.word()?;
        if sum == said {
            Ok(())
        } else {
            Err(damaged(format!(
                "the checksum of the {what} is {sum:08x}, not {said:08x}"
            )))
        }
    }
}

fn damaged(why: impl Into<String>) -> FrameError {
    FrameError::Damaged(why.into())
}

/// The bytes of a section, in order and in as many parts as they are kept in.
pub trait Section {
    /// How many bytes.
    fn length(&self) -> u64;
    /// The bytes.
    fn parts(&self) -> impl Iterator<Item = &[u8]>;
}

impl Section for &[u8] {
    fn length(&self) -> u64 {
        self.len() as u64
    }

    fn parts(&self) -> impl Iterator<Item = &[u8]> {
        std::iter::once(*self)
    }
}

impl Section for Blocks {
    fn length(&self) -> u64 {
        self.len() as u64
    }

    fn parts(&self) -> impl Iterator<Item = &[u8]> {
        self.pieces()
    }
}

/// Writes a frame.
///
/// # Errors
/// `out` fails, or something is longer than a frame can hold.
pub fn encode<H: Serialize, S: Section>(
    out: impl Write,
    format: Format,
    header: &H,
    sections: &[S],
) -> io::Result<()> {
    let too_long =
        |what: &str| io::Error::new(io::ErrorKind::InvalidInput, format!("the {what} is too long"));
    let header = serde_json::to_vec(header)?;
    let header_length = u32::try_from(header.len())
        .ok()
        .filter(|_| header.len() <= MAX_HEADER)
        .ok_or_else(|| too_long("header"))?;
    let count = u32::try_from(sections.len())
        .ok()
        .filter(|_| sections.len() <= MAX_SECTIONS)
        .ok_or_else(|| too_long("list of sections"))?;
    if sections.iter().any(|section| section.length() > MAX_SECTION) {
        return Err(too_long("section"));
    }
    let mut name = [0; NAME];
    name.get_mut(..format.name.len())
        .ok_or_else(|| too_long("name of the format"))?
        .copy_from_slice(format.name.as_bytes());

    let mut out = Summed { inner: out, sum: 0 };
    let mut head = Vec::with_capacity(HEAD);
    head.extend_from_slice(&MAGIC);
    head.extend_from_slice(&CONTAINER.to_le_bytes());
    head.extend_from_slice(&format.version.to_le_bytes());
    head.extend_from_slice(&name);
    head.extend_from_slice(&header_length.to_le_bytes());
    head.extend_from_slice(&count.to_le_bytes());
    head.extend_from_slice(&[0; 4]);
    out.put_checked(&head)?;
    let lengths: Vec<u8> = sections
        .iter()
        .flat_map(|section| section.length().to_le_bytes())
        .collect();
    out.put_checked(&lengths)?;
    out.put_checked(&header)?;
    let mut packed = vec![0; lz4_flex::block::get_maximum_output_size(BLOCK)];
    let mut block = Vec::with_capacity(BLOCK);
    for section in sections {
        let mut sum = 0;
        block.clear();
        for mut part in section.parts() {
            sum = crc32c::crc32c_append(sum, part);
            while !part.is_empty() {
                let (now, rest) = part.split_at(part.len().min(BLOCK - block.len()));
                block.extend_from_slice(now);
                part = rest;
                if block.len() == BLOCK {
                    put_block(&mut out, &block, &mut packed)?;
                    block.clear();
                }
            }
        }
        if !block.is_empty() {
            put_block(&mut out, &block, &mut packed)?;
        }
        out.put(&sum.to_le_bytes())?;
    }
    let sum = out.sum;
    out.put(&sum.to_le_bytes())
}

#[expect(clippy::cast_possible_truncation, reason = "a block has at most 1 MiB")]
fn put_block<W: Write>(out: &mut Summed<W>, block: &[u8], packed: &mut [u8]) -> io::Result<()> {
    match lz4_flex::block::compress_into(block, packed) {
        Ok(length) if length < block.len() => {
            out.put(&(length as u32).to_le_bytes())?;
            out.put(&packed[..length])
        }
        _ => {
            out.put(&(block.len() as u32 | AS_IT_IS).to_le_bytes())?;
            out.put(block)
        }
    }
}

/// Reads a frame that is `length` bytes long.
///
/// # Errors
/// `input` fails, is damaged, or of another format or version.
pub fn decode<H: DeserializeOwned>(
    input: impl Read,
    length: u64,
    format: Format,
) -> Result<(H, Vec<Vec<u8>>), FrameError> {
    let mut input = Summed { inner: input, sum: 0 };
    let mut head = [0; HEAD - 4];
    input.get(&mut head)?;
    if head[..8] != MAGIC {
        return Err(damaged("it does not begin as a state file of this kind"));
    }
    input.check(&head, "head")?;
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let name = unpadded(&head[16..16 + NAME]);
    if word(8) != CONTAINER {
        return Err(FrameError::Version(format!("in container version {}", word(8))));
    }
    if name != format.name.as_bytes() || word(12) != format.version {
        let name = String::from_utf8_lossy(name);
        return Err(FrameError::Version(format!("{name:?} version {}", word(12))));
    }
    let (header_length, count) = (word(48) as usize, word(52) as usize);
    if header_length > MAX_HEADER || count > MAX_SECTIONS || word(56) != 0 {
        return Err(damaged("its head says more than can be"));
    }

    let mut lengths = vec![0; count * 8];
    input.get_checked(&mut lengths, "lengths")?;
    let (lengths, _) = lengths.as_chunks::<8>();
    let lengths: Vec<u64> = lengths.iter().map(|length| u64::from_le_bytes(*length)).collect();
    let total = lengths.iter().try_fold(0_u64, |sum, length| {
        sum.checked_add(*length).filter(|_| *length <= MAX_SECTION)
    });
    if total.is_none_or(|total| total > length.saturating_mul(LZ4_RATIO)) {
        return Err(damaged("its sections are longer than it can hold"));
    }
    let mut header = vec![0; header_length];
    input.get_checked(&mut header, "header")?;
    let header = serde_json::from_slice(&header).map_err(|error| damaged(error.to_string()))?;

    let mut packed = Vec::new();
    let mut sections = Vec::with_capacity(count);
    for (number, length) in lengths.into_iter().enumerate() {
        let length = usize::try_from(length).map_err(|_| damaged("a section is too long"))?;
        let mut section = vec![0; length];
        for block in section.chunks_mut(BLOCK) {
            get_block(&mut input, block, &mut packed)?;
        }
        input.check(&section, &format!("section {number}"))?;
        sections.push(section);
    }
    let sum = input.sum;
    if input.word()? != sum {
        return Err(damaged("its last checksum is wrong"));
    }
    if input.inner.take(1).read_to_end(&mut packed)? != 0 {
        return Err(damaged("it goes on after its end"));
    }
    Ok((header, sections))
}

fn get_block<R: Read>(
    input: &mut Summed<R>,
    block: &mut [u8],
    packed: &mut Vec<u8>,
) -> Result<(), FrameError> {
    let stored = input.word()?;
    let length = (stored & !AS_IT_IS) as usize;
    if stored & AS_IT_IS != 0 {
        if length != block.len() {
            return Err(damaged("a block has a wrong length"));
        }
        return input.get(block);
    }
    // One that is not shorter than the plain one is never written.
    if length >= block.len() {
        return Err(damaged("a block has a wrong length"));
    }
    packed.resize(length, 0);
    input.get(packed)?;
    match lz4_flex::block::decompress_into(packed, block) {
        Ok(plain) if plain == block.len() => Ok(()),
        Ok(_) => Err(damaged("a block unpacks to a wrong length")),
        Err(error) => Err(damaged(format!("a block can't be unpacked: {error}"))),
    }
}

/// A name without its padding.
fn unpadded(name: &[u8]) -> &[u8] {
    let end = name
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |last| last + 1);
    &name[..end]
}

#[cfg(test)]
mod tests;

//! Reply: answers to requests, in the form that was negotiated.
//!
//! A read's answer is one chunk, marked as the last, because its data is complete before the first byte goes out:
//! the specification forbids that mark while an error is still possible. [`read_prefix`] gives the bytes in front
//! of the data, so that the data can be read in its final place.
//!
//! With structured replies, errors carry a sentence for people, and answers without data are `NBD_REPLY_TYPE_NONE`.

use zerocopy::IntoBytes;

use super::limits::{MAX_EXTENTS, MAX_STRING};
use super::transmission::Framing;
use super::wire::{
    BlockDescriptor, BlockStatusHead, ChunkHeader, ChunkType, ErrorChunk, ErrorCode, OffsetData, ReplyFlags,
    SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, SimpleReply,
};

/// An extent of a metadata context; extents follow each other without gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// Length in bytes, not 0.
    pub length: u64,
    /// Flags whose meaning is the context's.
    pub flags: u32,
}

/// Longest form of what precedes the data of a read, in bytes.
pub const MAX_READ_PREFIX: usize = size_of::<ChunkHeader>() + size_of::<OffsetData>();

fn simple(cookie: u64, error: u32) -> SimpleReply {
    SimpleReply {
        magic: SIMPLE_REPLY_MAGIC.into(),
        error: error.into(),
        cookie: cookie.into(),
    }
}

/// Header of a chunk whose payload is `length` bytes, which is below 2^32 for every payload built here.
fn chunk(cookie: u64, kind: ChunkType, last: bool, length: usize) -> ChunkHeader {
    let flags = if last {
        ReplyFlags::DONE
    } else {
        ReplyFlags::empty()
    };
    ChunkHeader {
        magic: STRUCTURED_REPLY_MAGIC.into(),
        flags: flags.bits().into(),
        kind: kind.number().into(),
        cookie: cookie.into(),
        length: u32::try_from(length)
            .expect("payloads are bounded by MAX_PAYLOAD")
            .into(),
    }
}

/// Appends what precedes the `length` bytes of data that answer a read at `offset`. Together they are the whole
/// reply.
pub fn read_prefix(out: &mut Vec<u8>, framing: Framing, cookie: u64, offset: u64, length: u32) {
    match framing {
        Framing::Simple => out.extend_from_slice(simple(cookie, 0).as_bytes()),
        // A content chunk describes at least one byte.
        Framing::Structured if length == 0 => done(out, framing, cookie),
        Framing::Structured => {
            let payload = size_of::<OffsetData>() + length as usize;
            out.extend_from_slice(chunk(cookie, ChunkType::OffsetData, true, payload).as_bytes());
            out.extend_from_slice(
                OffsetData {
                    offset: offset.into(),
                }
                .as_bytes(),
            );
        }
    }
}

/// Appends the success of a request that has no data.
pub fn done(out: &mut Vec<u8>, framing: Framing, cookie: u64) {
    match framing {
        Framing::Simple => out.extend_from_slice(simple(cookie, 0).as_bytes()),
        Framing::Structured => out.extend_from_slice(chunk(cookie, ChunkType::None, true, 0).as_bytes()),
    }
}

/// Appends the failure of a request. `message` is cut to the longest string the protocol allows.
pub fn error(out: &mut Vec<u8>, framing: Framing, cookie: u64, error: ErrorCode, message: &str) {
    match framing {
        Framing::Simple => out.extend_from_slice(simple(cookie, error.number()).as_bytes()),
        Framing::Structured => {
            let message = &message[..message.floor_char_boundary(MAX_STRING)];
            let payload = size_of::<ErrorChunk>() + message.len();
            out.extend_from_slice(chunk(cookie, ChunkType::Error, true, payload).as_bytes());
            let head = ErrorChunk {
                error: error.number().into(),
                message_length: u16::try_from(message.len()).unwrap_or(0).into(),
            };
            out.extend_from_slice(head.as_bytes());
            out.extend_from_slice(message.as_bytes());
        }
    }
}

/// Descriptors for a status request of `length` bytes: neighbours with equal flags become one, nothing reaches
/// beyond the request, `one` keeps the first only. Empty if `extents` tells nothing about the first byte.
#[must_use]
pub fn descriptors(extents: &[StatusExtent], length: u64, one: bool) -> Vec<BlockDescriptor> {
    let mut merged: Vec<StatusExtent> = Vec::new();
    let mut left = length;
    let most = if one { 1 } else { MAX_EXTENTS };
    for extent in extents {
        let taken = extent.length.min(left);
        if taken == 0 {
            continue;
        }
        let full = merged.len() == most;
        match merged.last_mut() {
            Some(last) if last.flags == extent.flags => last.length += taken,
            _ if full => break,
            _ => merged.push(StatusExtent {
                length: taken,
                flags: extent.flags,
            }),
        }
        left -= taken;
    }
    // A request of compact headers is shorter than 2^32 bytes, so every part of it fits a descriptor.
    merged
        .into_iter()
        .map(|extent| BlockDescriptor {
            length: u32::try_from(extent.length).unwrap_or(u32::MAX).into(),
            status: extent.flags.into(),
        })
        .collect()
}

/// Appends the answer to a status request: a chunk for each context. Only sent with structured replies.
pub fn block_status(out: &mut Vec<u8>, cookie: u64, contexts: &[(u32, Vec<BlockDescriptor>)]) {
    for (index, (id, descriptors)) in contexts.iter().enumerate() {
        let last = index + 1 == contexts.len();
        let payload = size_of::<BlockStatusHead>() + size_of_val(descriptors.as_slice());
        out.extend_from_slice(chunk(cookie, ChunkType::BlockStatus, last, payload).as_bytes());
        out.extend_from_slice(
            BlockStatusHead {
                context: (*id).into(),
            }
            .as_bytes(),
        );
        out.extend_from_slice(descriptors.as_slice().as_bytes());
    }
}

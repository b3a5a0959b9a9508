//! Reply: answers to requests, in the form that was negotiated.
//!
//! A read's answer is one chunk, marked as the last, because its data is complete before the first byte goes out:
//! the specification forbids that mark while an error is still possible. [`read_prefix`] gives the bytes in front
//! of the data, so that the data can be read in its final place.
//!
//! With structured replies, errors carry a sentence for people, and answers without data are `NBD_REPLY_TYPE_NONE`.

use zerocopy::IntoBytes;

use super::limits::MAX_MESSAGE;
use super::transmission::Framing;
use super::wire::{
    BlockDescriptor, BlockStatusHead, ChunkHeader, ChunkType, EXTENDED_REPLY_MAGIC, ErrorChunk, ErrorCode,
    ExtendedBlockDescriptor, ExtendedBlockStatusHead, ExtendedChunkHeader, OffsetData, ReplyFlags,
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

/// What a reply repeats of its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// Form of the replies.
    pub framing: Framing,
    /// The client's, opaque.
    pub cookie: u64,
    /// The header's, for extended replies.
    pub offset: u64,
}

/// Longest form of what precedes the data of a read, in bytes.
pub const MAX_READ_PREFIX: usize = size_of::<ExtendedChunkHeader>() + size_of::<OffsetData>();

fn simple(ticket: Ticket, error: u32) -> SimpleReply {
    SimpleReply {
        magic: SIMPLE_REPLY_MAGIC.into(),
        error: error.into(),
        cookie: ticket.cookie.into(),
    }
}

/// Appends the header of a chunk whose payload is `length` bytes, which is below 2^32 for every payload built here.
fn chunk(out: &mut Vec<u8>, ticket: Ticket, kind: ChunkType, last: bool, length: usize) {
    let length = u32::try_from(length).expect("payloads are bounded by MAX_PAYLOAD");
    let flags = if last {
        ReplyFlags::DONE
    } else {
        ReplyFlags::empty()
    };
    if ticket.framing == Framing::Extended {
        let header = ExtendedChunkHeader {
            magic: EXTENDED_REPLY_MAGIC.into(),
            flags: flags.bits().into(),
            kind: kind.number().into(),
            cookie: ticket.cookie.into(),
            offset: ticket.offset.into(),
            length: u64::from(length).into(),
        };
        out.extend_from_slice(header.as_bytes());
    } else {
        let header = ChunkHeader {
            magic: STRUCTURED_REPLY_MAGIC.into(),
            flags: flags.bits().into(),
            kind: kind.number().into(),
            cookie: ticket.cookie.into(),
            length: length.into(),
        };
        out.extend_from_slice(header.as_bytes());
    }
}

/// Appends what precedes the `length` bytes of data that answer a read at `offset`. Together they are the whole
/// reply.
pub fn read_prefix(out: &mut Vec<u8>, ticket: Ticket, offset: u64, length: u32) {
    // A content chunk describes at least one byte.
    if length == 0 || !ticket.framing.has_chunks() {
        return done(out, ticket);
    }
    let payload = size_of::<OffsetData>() + length as usize;
    chunk(out, ticket, ChunkType::OffsetData, true, payload);
    let head = OffsetData {
        offset: offset.into(),
    };
    out.extend_from_slice(head.as_bytes());
}

/// Appends the success of a request that has no data.
pub fn done(out: &mut Vec<u8>, ticket: Ticket) {
    if ticket.framing.has_chunks() {
        chunk(out, ticket, ChunkType::None, true, 0);
    } else {
        out.extend_from_slice(simple(ticket, 0).as_bytes());
    }
}

/// Appends the failure of a request. `message` is cut to [`MAX_MESSAGE`].
pub fn error(out: &mut Vec<u8>, ticket: Ticket, error: ErrorCode, message: &str) {
    if !ticket.framing.has_chunks() {
        out.extend_from_slice(simple(ticket, error.number()).as_bytes());
        return;
    }
    let message = &message[..message.floor_char_boundary(MAX_MESSAGE)];
    chunk(
        out,
        ticket,
        ChunkType::Error,
        true,
        size_of::<ErrorChunk>() + message.len(),
    );
    let head = ErrorChunk {
        error: error.number().into(),
        message_length: u16::try_from(message.len()).unwrap_or(0).into(),
    };
    out.extend_from_slice(head.as_bytes());
    out.extend_from_slice(message.as_bytes());
}

/// Extents as they answer a status request of `length` bytes: neighbours with equal flags become one, nothing reaches
/// beyond the request, at most `most` are kept. Empty if `extents` tells nothing about the first byte.
#[must_use]
pub fn merged(extents: &[StatusExtent], length: u64, most: usize) -> Vec<StatusExtent> {
    let mut merged: Vec<StatusExtent> = Vec::new();
    let mut left = length;
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
    merged
}

/// Appends the answer to a status request: a chunk for each context, with extents as [`merged`] makes them, or
/// nothing but success where the client asked for no context. Only sent where replies are chunks.
pub fn block_status(out: &mut Vec<u8>, ticket: Ticket, contexts: &[(u32, Vec<StatusExtent>)]) {
    if contexts.is_empty() {
        done(out, ticket);
    }
    for (index, (id, extents)) in contexts.iter().enumerate() {
        let last = index + 1 == contexts.len();
        if ticket.framing == Framing::Extended {
            extended_status(out, ticket, *id, extents, last);
        } else {
            compact_status(out, ticket, *id, extents, last);
        }
    }
}

fn compact_status(out: &mut Vec<u8>, ticket: Ticket, id: u32, extents: &[StatusExtent], last: bool) {
    let payload = size_of::<BlockStatusHead>() + extents.len() * size_of::<BlockDescriptor>();
    chunk(out, ticket, ChunkType::BlockStatus, last, payload);
    out.extend_from_slice(BlockStatusHead { context: id.into() }.as_bytes());
    for extent in extents {
        // A request of compact headers is shorter than 2^32 bytes, so every part of it fits a descriptor.
        let descriptor = BlockDescriptor {
            length: u32::try_from(extent.length).unwrap_or(u32::MAX).into(),
            status: extent.flags.into(),
        };
        out.extend_from_slice(descriptor.as_bytes());
    }
}

fn extended_status(out: &mut Vec<u8>, ticket: Ticket, id: u32, extents: &[StatusExtent], last: bool) {
    let payload = size_of::<ExtendedBlockStatusHead>() + extents.len() * size_of::<ExtendedBlockDescriptor>();
    chunk(out, ticket, ChunkType::BlockStatusExtended, last, payload);
    let head = ExtendedBlockStatusHead {
        context: id.into(),
        count: u32::try_from(extents.len()).unwrap_or(u32::MAX).into(),
    };
    out.extend_from_slice(head.as_bytes());
    for extent in extents {
        let descriptor = ExtendedBlockDescriptor {
            length: extent.length.into(),
            status: u64::from(extent.flags).into(),
        };
        out.extend_from_slice(descriptor.as_bytes());
    }
}

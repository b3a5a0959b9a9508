//! Wire: the bytes of the NBD protocol as structs and constants; its numbers and flags are those of [`super::numbers`].
//!
//! Source: the NBD specification, `doc/proto.md` of the project NetworkBlockDevice/nbd (extended headers: its branch
//! `extension-ext-header`); the section is named at each item, the specification's name is its `doc(alias)`. All numbers are big-endian; no struct has padding, so
//! that a struct is its bytes. Nothing here decides anything.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub use super::numbers::*;

/// First magic of the greeting ("Newstyle negotiation").
#[doc(alias = "INIT_PASSWD")]
#[doc(alias = "NBDMAGIC")]
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second magic of the greeting, and the magic of every option ("Newstyle negotiation").
#[doc(alias = "IHAVEOPT")]
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Magic of an option reply ("Fixed newstyle negotiation").
#[doc(alias = "NBD_REP_MAGIC")]
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Magic of a request ("Request message").
#[doc(alias = "NBD_REQUEST_MAGIC")]
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Magic of a simple reply ("Simple reply message").
#[doc(alias = "NBD_SIMPLE_REPLY_MAGIC")]
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Magic of a structured reply chunk ("Structured reply chunk message").
#[doc(alias = "NBD_STRUCTURED_REPLY_MAGIC")]
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Magic of an extended request ("Request message", branch `extension-ext-header`).
#[doc(alias = "NBD_EXTENDED_REQUEST_MAGIC")]
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Magic of an extended reply chunk ("Extended reply chunk message", branch `extension-ext-header`).
#[doc(alias = "NBD_EXTENDED_REPLY_MAGIC")]
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Server's greeting ("Newstyle negotiation").
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Greeting {
    /// [`GREETING_MAGIC`].
    pub magic: U64,
    /// [`OPTION_MAGIC`].
    pub option_magic: U64,
    /// [`HandshakeFlags`].
    pub flags: U16,
}

/// Header of an option ("Newstyle negotiation").
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct OptionHeader {
    /// [`OPTION_MAGIC`].
    pub magic: U64,
    /// [`OptionType`].
    pub option: U32,
    /// Bytes of data that follow.
    pub length: U32,
}

/// Header of an option reply ("Fixed newstyle negotiation").
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct OptionReplyHeader {
    /// [`OPTION_REPLY_MAGIC`].
    pub magic: U64,
    /// The option replied to.
    pub option: U32,
    /// [`OptionReplyType`].
    pub reply: U32,
    /// Bytes of data that follow.
    pub length: U32,
}

/// Answer to `NBD_OPT_EXPORT_NAME`, before the optional zeroes ("Newstyle negotiation").
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ExportNameReply {
    /// Size of the export in bytes.
    pub size: U64,
    /// [`TransmissionFlags`].
    pub flags: U16,
}

/// Zero bytes after [`ExportNameReply`] unless the client declined them.
pub const EXPORT_NAME_ZEROES: usize = 124;

/// Payload of `NBD_INFO_EXPORT`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct InfoExport {
    /// [`InfoType::Export`].
    pub kind: U16,
    /// Size of the export in bytes.
    pub size: U64,
    /// [`TransmissionFlags`].
    pub flags: U16,
}

/// Payload of `NBD_INFO_BLOCK_SIZE`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct InfoBlockSize {
    /// [`InfoType::BlockSize`].
    pub kind: U16,
    /// Smallest block in bytes.
    pub minimum: U32,
    /// Preferred block in bytes.
    pub preferred: U32,
    /// Largest payload in bytes.
    pub maximum: U32,
}

/// Header of a request ("Request message").
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RequestHeader {
    /// [`REQUEST_MAGIC`].
    pub magic: U32,
    /// [`CommandFlags`].
    pub flags: U16,
    /// [`CommandType`].
    pub command: U16,
    /// Returned in the reply, opaque.
    pub cookie: U64,
    /// First byte.
    pub offset: U64,
    /// Length in bytes.
    pub length: U32,
}

/// Header of an extended request ("Request message", branch `extension-ext-header`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ExtendedRequestHeader {
    /// [`EXTENDED_REQUEST_MAGIC`].
    pub magic: U32,
    /// [`CommandFlags`].
    pub flags: U16,
    /// [`CommandType`].
    pub command: U16,
    /// Returned in the reply, opaque.
    pub cookie: U64,
    /// First byte; returned in the reply.
    pub offset: U64,
    /// Length in bytes: of the payload with [`CommandFlags::PAYLOAD_LEN`], else of the range.
    pub length: U64,
}

/// Simple reply; data of a read follows ("Simple reply message").
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct SimpleReply {
    /// [`SIMPLE_REPLY_MAGIC`].
    pub magic: U32,
    /// [`ErrorCode`], or 0.
    pub error: U32,
    /// The request's.
    pub cookie: U64,
}

/// Header of a structured reply chunk ("Structured reply chunk message").
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ChunkHeader {
    /// [`STRUCTURED_REPLY_MAGIC`].
    pub magic: U32,
    /// [`ReplyFlags`].
    pub flags: U16,
    /// [`ChunkType`].
    pub kind: U16,
    /// The request's.
    pub cookie: U64,
    /// Bytes of payload that follow.
    pub length: U32,
}

/// Header of an extended reply chunk ("Extended reply chunk message", branch `extension-ext-header`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ExtendedChunkHeader {
    /// [`EXTENDED_REPLY_MAGIC`].
    pub magic: U32,
    /// [`ReplyFlags`].
    pub flags: U16,
    /// [`ChunkType`].
    pub kind: U16,
    /// The request's.
    pub cookie: U64,
    /// The request's.
    pub offset: U64,
    /// Bytes of payload that follow.
    pub length: U64,
}

/// Start of the payload of `NBD_REPLY_TYPE_OFFSET_DATA`; the data follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct OffsetData {
    /// First byte.
    pub offset: U64,
}

/// Start of the payload of `NBD_REPLY_TYPE_ERROR`; the message follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ErrorChunk {
    /// [`ErrorCode`].
    pub error: U32,
    /// Bytes of message.
    pub message_length: U16,
}

/// Start of the payload of `NBD_REPLY_TYPE_BLOCK_STATUS`; [`BlockDescriptor`]s follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct BlockStatusHead {
    /// Identifier given when the context was selected.
    pub context: U32,
}

/// One extent of `NBD_REPLY_TYPE_BLOCK_STATUS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct BlockDescriptor {
    /// Length in bytes, not 0.
    pub length: U32,
    /// Flags whose meaning is the context's.
    pub status: U32,
}

/// Start of the payload of `NBD_REPLY_TYPE_BLOCK_STATUS_EXT`; [`ExtendedBlockDescriptor`]s follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ExtendedBlockStatusHead {
    /// Identifier given when the context was selected.
    pub context: U32,
    /// Number of descriptors, not 0.
    pub count: U32,
}

/// One extent of `NBD_REPLY_TYPE_BLOCK_STATUS_EXT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ExtendedBlockDescriptor {
    /// Length in bytes, not 0.
    pub length: U64,
    /// Flags whose meaning is the context's.
    pub status: U64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structs_have_the_sizes_of_the_specification() {
        assert_eq!(size_of::<Greeting>(), 18);
        assert_eq!(size_of::<OptionHeader>(), 16);
        assert_eq!(size_of::<OptionReplyHeader>(), 20);
        assert_eq!(size_of::<ExportNameReply>(), 10);
        assert_eq!(size_of::<InfoExport>(), 12);
        assert_eq!(size_of::<InfoBlockSize>(), 14);
        assert_eq!(size_of::<RequestHeader>(), 28);
        assert_eq!(size_of::<SimpleReply>(), 16);
        assert_eq!(size_of::<ChunkHeader>(), 20);
        assert_eq!(size_of::<ErrorChunk>(), 6);
        assert_eq!(size_of::<BlockDescriptor>(), 8);
        assert_eq!(size_of::<ExtendedRequestHeader>(), 32);
        assert_eq!(size_of::<ExtendedChunkHeader>(), 32);
        assert_eq!(size_of::<ExtendedBlockStatusHead>(), 8);
        assert_eq!(size_of::<ExtendedBlockDescriptor>(), 16);
    }
}

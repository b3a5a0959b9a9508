//! Wire: the bytes of the NBD protocol as structs and constants.
//!
//! Source: the NBD specification, `doc/proto.md` of the project NetworkBlockDevice/nbd; the section is named at
//! each item, the specification's name is its `doc(alias)`. All numbers are big-endian; no struct has padding, so
//! that a struct is its bytes. Nothing here decides anything.

use bitflags::bitflags;
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

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

bitflags! {
    /// Server's flags in the greeting ("Handshake flags").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct HandshakeFlags: u16 {
        /// The server speaks fixed newstyle.
        #[doc(alias = "NBD_FLAG_FIXED_NEWSTYLE")]
        const FIXED_NEWSTYLE = 1 << 0;
        /// The server can leave out the 124 zero bytes after EXPORT_NAME.
        #[doc(alias = "NBD_FLAG_NO_ZEROES")]
        const NO_ZEROES = 1 << 1;
    }

    /// Client's answer to the greeting ("Client flags").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ClientFlags: u32 {
        /// The client speaks fixed newstyle.
        #[doc(alias = "NBD_FLAG_C_FIXED_NEWSTYLE")]
        const FIXED_NEWSTYLE = 1 << 0;
        /// The client wants no zero bytes after EXPORT_NAME.
        #[doc(alias = "NBD_FLAG_C_NO_ZEROES")]
        const NO_ZEROES = 1 << 1;
    }

    /// What the export can do ("Transmission flags").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct TransmissionFlags: u16 {
        /// Always set.
        #[doc(alias = "NBD_FLAG_HAS_FLAGS")]
        const HAS_FLAGS = 1 << 0;
        /// Writes are refused.
        #[doc(alias = "NBD_FLAG_READ_ONLY")]
        const READ_ONLY = 1 << 1;
        /// FLUSH is understood.
        #[doc(alias = "NBD_FLAG_SEND_FLUSH")]
        const SEND_FLUSH = 1 << 2;
        /// The FUA flag is understood.
        #[doc(alias = "NBD_FLAG_SEND_FUA")]
        const SEND_FUA = 1 << 3;
        /// The medium rotates.
        #[doc(alias = "NBD_FLAG_ROTATIONAL")]
        const ROTATIONAL = 1 << 4;
        /// TRIM is understood.
        #[doc(alias = "NBD_FLAG_SEND_TRIM")]
        const SEND_TRIM = 1 << 5;
        /// WRITE_ZEROES is understood.
        #[doc(alias = "NBD_FLAG_SEND_WRITE_ZEROES")]
        const SEND_WRITE_ZEROES = 1 << 6;
        /// The flag DF is understood; only with structured replies.
        #[doc(alias = "NBD_FLAG_SEND_DF")]
        const SEND_DF = 1 << 7;
        /// Several connections see one state.
        #[doc(alias = "NBD_FLAG_CAN_MULTI_CONN")]
        const CAN_MULTI_CONN = 1 << 8;
        /// RESIZE is understood (experimental).
        #[doc(alias = "NBD_FLAG_SEND_RESIZE")]
        const SEND_RESIZE = 1 << 9;
        /// CACHE is understood.
        #[doc(alias = "NBD_FLAG_SEND_CACHE")]
        const SEND_CACHE = 1 << 10;
        /// The flag FAST_ZERO is understood.
        #[doc(alias = "NBD_FLAG_SEND_FAST_ZERO")]
        const SEND_FAST_ZERO = 1 << 11;
        /// BLOCK_STATUS with a payload is understood (extended headers).
        #[doc(alias = "NBD_FLAG_BLOCK_STATUS_PAYLOAD")]
        const BLOCK_STATUS_PAYLOAD = 1 << 12;
    }

    /// Flags of a request ("Command flags").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct CommandFlags: u16 {
        /// Written data is durable before the reply.
        #[doc(alias = "NBD_CMD_FLAG_FUA")]
        const FUA = 1 << 0;
        /// Zeroes must be allocated.
        #[doc(alias = "NBD_CMD_FLAG_NO_HOLE")]
        const NO_HOLE = 1 << 1;
        /// At most one content chunk.
        #[doc(alias = "NBD_CMD_FLAG_DF")]
        const DONT_FRAGMENT = 1 << 2;
        /// One extent per context.
        #[doc(alias = "NBD_CMD_FLAG_REQ_ONE")]
        const REQ_ONE = 1 << 3;
        /// Fail unless zeroing is fast.
        #[doc(alias = "NBD_CMD_FLAG_FAST_ZERO")]
        const FAST_ZERO = 1 << 4;
        /// The length is that of a payload (extended headers).
        #[doc(alias = "NBD_CMD_FLAG_PAYLOAD_LEN")]
        const PAYLOAD_LEN = 1 << 5;
        /// Keeps unknown bits visible.
        const _ = !0;
    }

    /// Flags of a structured reply chunk ("Structured reply flags").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ReplyFlags: u16 {
        /// Last chunk of the reply.
        #[doc(alias = "NBD_REPLY_FLAG_DONE")]
        const DONE = 1 << 0;
    }

    /// Status of an extent in the context `base:allocation` ("`base:allocation` metadata context").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct AllocationState: u32 {
        /// Not allocated.
        #[doc(alias = "NBD_STATE_HOLE")]
        const HOLE = 1 << 0;
        /// Reads as zeroes.
        #[doc(alias = "NBD_STATE_ZERO")]
        const ZERO = 1 << 1;
    }

    /// Status of an extent in a context `qemu:dirty-bitmap:…` (qemu's `docs/interop/nbd.txt`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct BitmapState: u32 {
        /// The extent is dirty.
        #[doc(alias = "NBD_STATE_DIRTY")]
        const DIRTY = 1 << 0;
    }
}

/// Declares an enum of wire numbers with its conversions.
macro_rules! wire_enum {
    ($(#[$outer:meta])* $name:ident: $repr:ty { $($(#[$inner:meta])* $variant:ident = $value:expr,)* }) => {
        $(#[$outer])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr($repr)]
        pub enum $name { $($(#[$inner])* $variant = $value,)* }

        impl $name {
            /// Every value, ascending.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The number on the wire.
            #[must_use]
            pub const fn number(self) -> $repr {
                self as $repr
            }

            /// The value with this number, if there is one.
            #[must_use]
            pub fn from_number(number: $repr) -> Option<Self> {
                Self::ALL.iter().copied().find(|value| value.number() == number)
            }
        }
    };
}

wire_enum! {
    /// Options of the handshake ("Option types").
    OptionType: u32 {
        /// Choose an export, without a way to answer with an error.
        #[doc(alias = "NBD_OPT_EXPORT_NAME")]
        ExportName = 1,
        /// End the session.
        #[doc(alias = "NBD_OPT_ABORT")]
        Abort = 2,
        /// List the exports.
        #[doc(alias = "NBD_OPT_LIST")]
        List = 3,
        /// Upgrade to TLS.
        #[doc(alias = "NBD_OPT_STARTTLS")]
        StartTls = 5,
        /// Describe an export.
        #[doc(alias = "NBD_OPT_INFO")]
        Info = 6,
        /// Describe an export and enter transmission.
        #[doc(alias = "NBD_OPT_GO")]
        Go = 7,
        /// Use structured replies.
        #[doc(alias = "NBD_OPT_STRUCTURED_REPLY")]
        StructuredReply = 8,
        /// List metadata contexts.
        #[doc(alias = "NBD_OPT_LIST_META_CONTEXT")]
        ListMetaContext = 9,
        /// Select metadata contexts.
        #[doc(alias = "NBD_OPT_SET_META_CONTEXT")]
        SetMetaContext = 10,
        /// Use extended headers (experimental).
        #[doc(alias = "NBD_OPT_EXTENDED_HEADERS")]
        ExtendedHeaders = 11,
    }
}

wire_enum! {
    /// Replies to options ("Option reply types").
    OptionReplyType: u32 {
        /// Done.
        #[doc(alias = "NBD_REP_ACK")]
        Ack = 1,
        /// An export.
        #[doc(alias = "NBD_REP_SERVER")]
        Server = 2,
        /// A piece of information about an export.
        #[doc(alias = "NBD_REP_INFO")]
        Info = 3,
        /// A metadata context.
        #[doc(alias = "NBD_REP_META_CONTEXT")]
        MetaContext = 4,
        /// Unknown option.
        #[doc(alias = "NBD_REP_ERR_UNSUP")]
        ErrUnsupported = (1 << 31) + 1,
        /// Forbidden by policy.
        #[doc(alias = "NBD_REP_ERR_POLICY")]
        ErrPolicy = (1 << 31) + 2,
        /// Invalid data.
        #[doc(alias = "NBD_REP_ERR_INVALID")]
        ErrInvalid = (1 << 31) + 3,
        /// Not on this platform.
        #[doc(alias = "NBD_REP_ERR_PLATFORM")]
        ErrPlatform = (1 << 31) + 4,
        /// TLS first.
        #[doc(alias = "NBD_REP_ERR_TLS_REQD")]
        ErrTlsRequired = (1 << 31) + 5,
        /// No such export.
        #[doc(alias = "NBD_REP_ERR_UNKNOWN")]
        ErrUnknown = (1 << 31) + 6,
        /// The server is ending.
        #[doc(alias = "NBD_REP_ERR_SHUTDOWN")]
        ErrShutdown = (1 << 31) + 7,
        /// Ask for block sizes first.
        #[doc(alias = "NBD_REP_ERR_BLOCK_SIZE_REQD")]
        ErrBlockSizeRequired = (1 << 31) + 8,
        /// Too large to process.
        #[doc(alias = "NBD_REP_ERR_TOO_BIG")]
        ErrTooBig = (1 << 31) + 9,
        /// Extended headers first.
        #[doc(alias = "NBD_REP_ERR_EXT_HEADER_REQD")]
        ErrExtendedHeadersRequired = (1 << 31) + 10,
    }
}

wire_enum! {
    /// Kinds of information about an export (`NBD_REP_INFO`).
    InfoType: u16 {
        /// Size and transmission flags.
        #[doc(alias = "NBD_INFO_EXPORT")]
        Export = 0,
        /// Canonical name.
        #[doc(alias = "NBD_INFO_NAME")]
        Name = 1,
        /// Description for people.
        #[doc(alias = "NBD_INFO_DESCRIPTION")]
        Description = 2,
        /// Block sizes.
        #[doc(alias = "NBD_INFO_BLOCK_SIZE")]
        BlockSize = 3,
    }
}

wire_enum! {
    /// Commands of the transmission ("Request types").
    CommandType: u16 {
        /// Read.
        #[doc(alias = "NBD_CMD_READ")]
        Read = 0,
        /// Write.
        #[doc(alias = "NBD_CMD_WRITE")]
        Write = 1,
        /// Disconnect.
        #[doc(alias = "NBD_CMD_DISC")]
        Disconnect = 2,
        /// Make durable.
        #[doc(alias = "NBD_CMD_FLUSH")]
        Flush = 3,
        /// Discard.
        #[doc(alias = "NBD_CMD_TRIM")]
        Trim = 4,
        /// Read ahead.
        #[doc(alias = "NBD_CMD_CACHE")]
        Cache = 5,
        /// Write zeroes.
        #[doc(alias = "NBD_CMD_WRITE_ZEROES")]
        WriteZeroes = 6,
        /// Query metadata contexts.
        #[doc(alias = "NBD_CMD_BLOCK_STATUS")]
        BlockStatus = 7,
        /// Change the size (experimental).
        #[doc(alias = "NBD_CMD_RESIZE")]
        Resize = 8,
    }
}

wire_enum! {
    /// Types of structured reply chunks ("Structured reply types").
    ChunkType: u16 {
        /// Nothing more.
        #[doc(alias = "NBD_REPLY_TYPE_NONE")]
        None = 0,
        /// Data at an offset.
        #[doc(alias = "NBD_REPLY_TYPE_OFFSET_DATA")]
        OffsetData = 1,
        /// Zeroes at an offset.
        #[doc(alias = "NBD_REPLY_TYPE_OFFSET_HOLE")]
        OffsetHole = 2,
        /// Extents of a context.
        #[doc(alias = "NBD_REPLY_TYPE_BLOCK_STATUS")]
        BlockStatus = 5,
        /// Extents of a context (extended headers).
        #[doc(alias = "NBD_REPLY_TYPE_BLOCK_STATUS_EXT")]
        BlockStatusExtended = 6,
        /// Error.
        #[doc(alias = "NBD_REPLY_TYPE_ERROR")]
        Error = (1 << 15) + 1,
        /// Error at an offset.
        #[doc(alias = "NBD_REPLY_TYPE_ERROR_OFFSET")]
        ErrorOffset = (1 << 15) + 2,
    }
}

wire_enum! {
    /// Errors of the transmission ("Error values").
    ErrorCode: u32 {
        /// Not permitted.
        #[doc(alias = "NBD_EPERM")]
        NotPermitted = 1,
        /// Input/output error.
        #[doc(alias = "NBD_EIO")]
        Io = 5,
        /// Out of memory.
        #[doc(alias = "NBD_ENOMEM")]
        NoMemory = 12,
        /// Invalid request.
        #[doc(alias = "NBD_EINVAL")]
        Invalid = 22,
        /// No space.
        #[doc(alias = "NBD_ENOSPC")]
        NoSpace = 28,
        /// Too large.
        #[doc(alias = "NBD_EOVERFLOW")]
        Overflow = 75,
        /// Not supported.
        #[doc(alias = "NBD_ENOTSUP")]
        NotSupported = 95,
        /// The server is ending.
        #[doc(alias = "NBD_ESHUTDOWN")]
        Shutdown = 108,
    }
}

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

    #[test]
    fn numbers_convert_both_ways() {
        for option in OptionType::ALL {
            assert_eq!(OptionType::from_number(option.number()), Some(*option));
        }
        assert_eq!(OptionType::from_number(4), None, "PEEK_EXPORT was withdrawn");
        assert_eq!(OptionReplyType::ErrTooBig.number(), 0x8000_0009);
        assert_eq!(ChunkType::ErrorOffset.number(), 0x8002);
        assert_eq!(CommandType::from_number(9), None);
    }
}

//! Numbers: flags and enumerations of the NBD protocol, with the section of the specification that defines each.

use bitflags::bitflags;

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

#[cfg(test)]
mod tests {
    use super::*;

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

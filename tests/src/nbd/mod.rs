//! NBD: the client's side of the protocol, written from the specification alone.
//!
//! But for [`oracle`], nothing here shares code with the server, not even its numbers: what both sides agree on is the specification
//! (`doc/proto.md` of NetworkBlockDevice/nbd, and its branch `extension-ext-header`). Tests and fuzz targets use it
//! as their oracle.
//!
//! | module | role |
//! |---|---|
//! | [`build`] | options and requests as bytes, right ones and wrong ones |
//! | [`parse`] | replies from bytes, with every rule for their form |
//! | [`model`] | what a server has to do with a stream of requests |
//! | [`oracle`] | the server's core beside model and parser |
//! | [`client`] | a client on a socket |
//! | [`served`] | a server in a process of its own |
//! | [`siege`] | such a server under attack |

pub mod build;
pub mod client;
pub mod model;
pub mod oracle;
pub mod parse;
pub mod served;
pub mod siege;

pub use build::{Framing, Request};
pub use client::{Client, Haggling};
pub use model::{Agreed, Verdict};
pub use parse::{Answer, Ledger, OptionReply};
pub use served::Served;

/// Numbers of options.
pub mod opt {
    /// Choose an export.
    pub const EXPORT_NAME: u32 = 1;
    /// End.
    pub const ABORT: u32 = 2;
    /// List exports.
    pub const LIST: u32 = 3;
    /// Start TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and enter transmission.
    pub const GO: u32 = 7;
    /// Structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// List contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Select contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Extended headers.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Numbers of replies to options.
pub mod rep {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export.
    pub const SERVER: u32 = 2;
    /// Information about an export.
    pub const INFO: u32 = 3;
    /// A context.
    pub const META_CONTEXT: u32 = 4;
    /// Bit of every error.
    pub const ERROR: u32 = 1 << 31;
    /// Unknown option.
    pub const ERR_UNSUP: u32 = ERROR + 1;
    /// Invalid option.
    pub const ERR_INVALID: u32 = ERROR + 3;
    /// TLS first.
    pub const ERR_TLS_REQD: u32 = ERROR + 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR + 6;
    /// Ending.
    pub const ERR_SHUTDOWN: u32 = ERROR + 7;
    /// Too large.
    pub const ERR_TOO_BIG: u32 = ERROR + 9;
    /// Extended headers first, or instead.
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR + 10;
}

/// Numbers of commands.
pub mod cmd {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// Disconnect.
    pub const DISC: u16 = 2;
    /// Flush.
    pub const FLUSH: u16 = 3;
    /// Trim.
    pub const TRIM: u16 = 4;
    /// Cache.
    pub const CACHE: u16 = 5;
    /// Write zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Block status.
    pub const BLOCK_STATUS: u16 = 7;
    /// Resize.
    pub const RESIZE: u16 = 8;
}

/// Flags of commands.
pub mod flag {
    /// Durable before the reply.
    pub const FUA: u16 = 1;
    /// Keep allocated.
    pub const NO_HOLE: u16 = 2;
    /// Do not fragment.
    pub const DF: u16 = 4;
    /// One extent.
    pub const REQ_ONE: u16 = 8;
    /// Fail unless fast.
    pub const FAST_ZERO: u16 = 16;
    /// The length is that of the payload.
    pub const PAYLOAD_LEN: u16 = 32;
}

/// Transmission flags.
pub mod trans {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    /// No writes.
    pub const READ_ONLY: u16 = 2;
    /// Flush.
    pub const SEND_FLUSH: u16 = 4;
    /// The flag FUA.
    pub const SEND_FUA: u16 = 8;
    /// Rotates.
    pub const ROTATIONAL: u16 = 16;
    /// Trim.
    pub const SEND_TRIM: u16 = 32;
    /// Write zeroes.
    pub const SEND_WRITE_ZEROES: u16 = 64;
    /// The flag DF.
    pub const SEND_DF: u16 = 128;
    /// Several connections.
    pub const CAN_MULTI_CONN: u16 = 256;
    /// Resize.
    pub const SEND_RESIZE: u16 = 512;
    /// Cache.
    pub const SEND_CACHE: u16 = 1024;
    /// The flag FAST_ZERO.
    pub const SEND_FAST_ZERO: u16 = 2048;
    /// Block status with a payload.
    pub const BLOCK_STATUS_PAYLOAD: u16 = 4096;
}

/// Errors of the transmission.
pub mod err {
    /// Not permitted.
    pub const EPERM: u32 = 1;
    /// Input or output failed.
    pub const EIO: u32 = 5;
    /// No memory.
    pub const ENOMEM: u32 = 12;
    /// Invalid.
    pub const EINVAL: u32 = 22;
    /// No space.
    pub const ENOSPC: u32 = 28;
    /// Too large.
    pub const EOVERFLOW: u32 = 75;
    /// Not supported.
    pub const ENOTSUP: u32 = 95;
    /// Ending.
    pub const ESHUTDOWN: u32 = 108;
    /// All of them.
    pub const ALL: [u32; 8] = [EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN];
}

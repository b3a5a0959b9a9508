//! Request: what a client asks for, and its header in one form for compact and extended framing.

use super::context::ContextSet;
use super::reply::Ticket;
use super::session::Framing;
use super::wire::{CommandFlags, CommandType, ErrorCode, ExtendedRequestHeader, RequestHeader};

/// A command to carry out. Offsets and lengths are in bytes and lie inside the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read; the length is at most the largest payload.
    Read {
        /// First byte.
        offset: u64,
        /// Length, may be 0.
        length: u32,
        /// At most one content chunk may be sent.
        dont_fragment: bool,
    },
    /// Write; the length is at most the largest payload, and as many bytes follow the request.
    Write {
        /// First byte.
        offset: u64,
        /// Length, may be 0.
        length: u32,
        /// Durable before the reply.
        fua: bool,
    },
    /// Make acknowledged writes durable.
    Flush,
    /// Discard, if that is possible.
    Trim {
        /// First byte.
        offset: u64,
        /// Length, may be 0.
        length: u64,
        /// Durable before the reply.
        fua: bool,
    },
    /// Read ahead.
    Cache {
        /// First byte.
        offset: u64,
        /// Length, may be 0.
        length: u64,
    },
    /// Make the range read as zeroes.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Length, may be 0.
        length: u64,
        /// Durable before the reply.
        fua: bool,
        /// Keep the range allocated.
        no_hole: bool,
        /// Fail with `NBD_ENOTSUP` unless this is faster than a write.
        fast: bool,
    },
    /// Query contexts.
    BlockStatus {
        /// First byte.
        offset: u64,
        /// Length, not 0.
        length: u64,
        /// One extent per context, not longer than the request.
        one: bool,
        /// Which of the session's contexts.
        contexts: ContextSet,
    },
}

impl Command {
    /// Its number on the wire.
    #[must_use]
    pub const fn kind(&self) -> CommandType {
        match self {
            Self::Read { .. } => CommandType::Read,
            Self::Write { .. } => CommandType::Write,
            Self::Flush => CommandType::Flush,
            Self::Trim { .. } => CommandType::Trim,
            Self::Cache { .. } => CommandType::Cache,
            Self::WriteZeroes { .. } => CommandType::WriteZeroes,
            Self::BlockStatus { .. } => CommandType::BlockStatus,
        }
    }

    /// Bytes of data that follow the request for the caller to collect.
    #[must_use]
    pub const fn payload(&self) -> u32 {
        match self {
            Self::Write { length, .. } => *length,
            _ => 0,
        }
    }
}

/// A request that may be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Returned in the reply.
    pub ticket: Ticket,
    /// What to do.
    pub command: Command,
}

/// A request to answer with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Returned in the reply.
    pub ticket: Ticket,
    /// The command, if it is known.
    pub kind: Option<CommandType>,
    /// Error to answer.
    pub error: ErrorCode,
    /// What is wrong, for display.
    pub message: &'static str,
}

/// What a request asks the caller to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Carry it out and reply. Its payload, if it has one, is collected first.
    Do(Request),
    /// Reply with an error.
    Refuse(Refused),
    /// Finish what is in flight, then close; there is no reply.
    Disconnect,
}

/// A request's header in one form for both framings.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    pub(super) ticket: Ticket,
    pub(super) flags: CommandFlags,
    pub(super) kind: Option<CommandType>,
    pub(super) offset: u64,
    /// Of the range; 0 where the header tells a payload instead.
    pub(super) length: u64,
    /// Bytes that follow the header.
    pub(super) payload: u64,
}

impl Header {
    /// From a compact header; `framing` is that of the replies.
    pub(super) fn compact(framing: Framing, header: RequestHeader) -> Self {
        let kind = CommandType::from_number(header.command.get());
        let (offset, length) = (header.offset.get(), u64::from(header.length.get()));
        Self {
            ticket: Ticket {
                framing,
                cookie: header.cookie.get(),
                offset,
            },
            flags: CommandFlags::from_bits_retain(header.flags.get()),
            kind,
            offset,
            length,
            payload: if kind == Some(CommandType::Write) {
                length
            } else {
                0
            },
        }
    }

    /// From an extended header. The length is that of a payload if the flag says so, and with a write in any case:
    /// qemu up to 10 at least sends the data without the flag, which no client can mean otherwise.
    pub(super) fn extended(header: ExtendedRequestHeader) -> Self {
        let kind = CommandType::from_number(header.command.get());
        let flags = CommandFlags::from_bits_retain(header.flags.get());
        let (offset, told) = (header.offset.get(), header.length.get());
        let (length, payload) = if kind == Some(CommandType::Write) {
            (told, told)
        } else if flags.contains(CommandFlags::PAYLOAD_LEN) {
            // The range stands inside the payload, if anywhere.
            (0, told)
        } else {
            (told, 0)
        };
        Self {
            ticket: Ticket {
                framing: Framing::Extended,
                cookie: header.cookie.get(),
                offset,
            },
            flags,
            kind,
            offset,
            length,
            payload,
        }
    }

    /// The answer to this request is this error.
    pub(super) const fn refused(&self, (error, message): Refusal) -> Refused {
        Refused {
            ticket: self.ticket,
            kind: self.kind,
            error,
            message,
        }
    }
}

/// Why a request is answered with an error.
pub(super) type Refusal = (ErrorCode, &'static str);

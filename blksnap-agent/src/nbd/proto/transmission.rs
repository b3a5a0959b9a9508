//! Transmission: requests, checked against the export before anybody acts on them ("Transmission").
//!
//! [`Requests::receive`] takes at most one request off the input. A request that comes out as [`Event::Do`] lies
//! inside the export, keeps its block sizes and limits and carries only flags that were offered; everything else
//! comes out as [`Event::Refuse`] with the error to answer. The payload of a write is skipped without being kept, so
//! that the next request is found behind it; nothing but a wrong magic number ends the session.
//!
//! What is kept of the input is one header of 28 bytes.
//!
//! # Requests the specification leaves open
//! A read or cache request of no bytes succeeds; a status request of no bytes is invalid, because its reply must
//! hold an extent.

use super::catalog::BlockSizes;
use super::context::SelectedContext;
use super::wire::{CommandFlags, CommandType, ErrorCode, REQUEST_MAGIC, RequestHeader};

/// Form of the replies, as negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// Simple replies.
    Simple,
    /// Structured replies (`NBD_OPT_STRUCTURED_REPLY`).
    Structured,
}

/// What was agreed in the handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// Form of the replies.
    pub framing: Framing,
    /// Size of the export in bytes.
    pub size: u64,
    /// Block sizes of the export.
    pub block_sizes: BlockSizes,
    /// Whether the export refuses writes.
    pub read_only: bool,
    /// Selected metadata contexts.
    pub contexts: Vec<SelectedContext>,
}

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
    /// Make acknowledged writes durable.
    Flush,
    /// Read ahead.
    Cache {
        /// First byte.
        offset: u64,
        /// Length, may be 0.
        length: u64,
    },
    /// Query the selected contexts.
    BlockStatus {
        /// First byte.
        offset: u64,
        /// Length, not 0.
        length: u64,
        /// One extent per context, not longer than the request.
        one: bool,
    },
}

impl Command {
    /// Its number on the wire.
    #[must_use]
    pub const fn kind(&self) -> CommandType {
        match self {
            Self::Read { .. } => CommandType::Read,
            Self::Flush => CommandType::Flush,
            Self::Cache { .. } => CommandType::Cache,
            Self::BlockStatus { .. } => CommandType::BlockStatus,
        }
    }
}

/// A request that may be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Returned in the reply.
    pub cookie: u64,
    /// What to do.
    pub command: Command,
}

/// A request to answer with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Returned in the reply.
    pub cookie: u64,
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
    /// Carry it out and reply.
    Do(Request),
    /// Reply with an error.
    Refuse(Refused),
    /// Finish what is in flight, then close; there is no reply.
    Disconnect,
}

/// Why the session ends without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransmissionError {
    /// No request starts here.
    #[error("a request starts with {0:#x} in place of the magic number")]
    Magic(u32),
}

const HEADER: usize = size_of::<RequestHeader>();

/// Turns input into requests.
#[derive(Debug)]
pub struct Requests {
    session: Session,
    header: [u8; HEADER],
    have: usize,
    /// Bytes of a refused payload that are still to come.
    skip: u32,
    /// Reported once `skip` is 0.
    refused: Option<Refused>,
}

impl Requests {
    /// Requests of this session.
    #[must_use]
    pub const fn new(session: Session) -> Self {
        Self {
            session,
            header: [0; HEADER],
            have: 0,
            skip: 0,
            refused: None,
        }
    }

    /// What was agreed in the handshake.
    #[must_use]
    pub const fn session(&self) -> &Session {
        &self.session
    }

    /// Takes at most one request off the front of `input`; `None` when more input is needed.
    ///
    /// # Errors
    /// The session must end without an answer.
    pub fn receive(&mut self, input: &mut &[u8]) -> Result<Option<Event>, TransmissionError> {
        if self.refused.is_none() {
            let (taken, rest) = input.split_at(input.len().min(HEADER - self.have));
            self.header[self.have..self.have + taken.len()].copy_from_slice(taken);
            self.have += taken.len();
            *input = rest;
            if self.have < HEADER {
                return Ok(None);
            }
            self.have = 0;
            let header: RequestHeader = zerocopy::transmute!(self.header);
            if header.magic.get() != REQUEST_MAGIC {
                return Err(TransmissionError::Magic(header.magic.get()));
            }
            let kind = CommandType::from_number(header.command.get());
            match (kind, self.check(&header, kind)) {
                (Some(CommandType::Disconnect), _) => return Ok(Some(Event::Disconnect)),
                (_, Ok(command)) => {
                    let cookie = header.cookie.get();
                    return Ok(Some(Event::Do(Request { cookie, command })));
                }
                (kind, Err((error, message))) => {
                    if kind == Some(CommandType::Write) {
                        self.skip = header.length.get();
                    }
                    self.refused = Some(Refused {
                        cookie: header.cookie.get(),
                        kind,
                        error,
                        message,
                    });
                }
            }
        }
        let skipped = u32::try_from(input.len()).unwrap_or(u32::MAX).min(self.skip);
        *input = &input[skipped as usize..];
        self.skip -= skipped;
        if self.skip > 0 {
            return Ok(None);
        }
        Ok(self.refused.take().map(Event::Refuse))
    }

    /// The command of a request, or the error to answer.
    fn check(
        &self,
        header: &RequestHeader,
        kind: Option<CommandType>,
    ) -> Result<Command, (ErrorCode, &'static str)> {
        let flags = CommandFlags::from_bits_retain(header.flags.get());
        let offset = header.offset.get();
        let length = header.length.get();
        let allow = |allowed: CommandFlags| {
            if allowed.contains(flags) {
                Ok(())
            } else {
                Err((
                    ErrorCode::Invalid,
                    "the request carries a flag that was not offered for it",
                ))
            }
        };
        let kind = kind.ok_or((ErrorCode::Invalid, "the command is unknown"))?;
        match kind {
            CommandType::Read => {
                let structured = self.session.framing == Framing::Structured;
                allow(if structured {
                    CommandFlags::DONT_FRAGMENT
                } else {
                    CommandFlags::empty()
                })?;
                self.in_range(offset, length)?;
                if length > self.session.block_sizes.maximum() {
                    let error = if structured {
                        ErrorCode::Overflow
                    } else {
                        ErrorCode::Invalid
                    };
                    return Err((error, "the request is longer than the largest payload"));
                }
                Ok(Command::Read {
                    offset,
                    length,
                    dont_fragment: flags.contains(CommandFlags::DONT_FRAGMENT),
                })
            }
            CommandType::Flush => {
                allow(CommandFlags::empty())?;
                if offset != 0 || length != 0 {
                    return Err((ErrorCode::Invalid, "a flush has no offset and no length"));
                }
                Ok(Command::Flush)
            }
            CommandType::Cache => {
                allow(CommandFlags::empty())?;
                self.in_range(offset, length)?;
                Ok(Command::Cache {
                    offset,
                    length: length.into(),
                })
            }
            CommandType::BlockStatus => {
                if self.session.contexts.is_empty() {
                    return Err((ErrorCode::Invalid, "no metadata context was selected"));
                }
                allow(CommandFlags::REQ_ONE)?;
                self.in_range(offset, length)?;
                if length == 0 {
                    return Err((ErrorCode::Invalid, "a status request of no bytes has no answer"));
                }
                Ok(Command::BlockStatus {
                    offset,
                    length: length.into(),
                    one: flags.contains(CommandFlags::REQ_ONE),
                })
            }
            CommandType::Write | CommandType::Trim | CommandType::WriteZeroes => {
                if self.session.read_only {
                    Err((ErrorCode::NotPermitted, "the export is read-only"))
                } else {
                    Err((ErrorCode::NotPermitted, "this server does not write"))
                }
            }
            CommandType::Resize => Err((ErrorCode::Invalid, "the size can't be changed")),
            CommandType::Disconnect => Err((ErrorCode::Invalid, "a disconnect request has no reply")),
        }
    }

    /// Checks that a request keeps the smallest block and lies inside the export.
    fn in_range(&self, offset: u64, length: u32) -> Result<(), (ErrorCode, &'static str)> {
        let minimum = u64::from(self.session.block_sizes.minimum());
        if !offset.is_multiple_of(minimum) || !u64::from(length).is_multiple_of(minimum) {
            return Err((
                ErrorCode::Invalid,
                "the request is not aligned to the smallest block",
            ));
        }
        match offset.checked_add(length.into()) {
            Some(end) if end <= self.session.size => Ok(()),
            _ => Err((
                ErrorCode::Invalid,
                "the request reaches beyond the end of the export",
            )),
        }
    }
}

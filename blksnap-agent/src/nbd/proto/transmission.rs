//! Transmission: requests, checked against the export before anybody acts on them ("Transmission").
//!
//! [`Requests::receive`] takes at most one request off the input. A request that comes out as [`Event::Do`] lies
//! inside the export, keeps its block sizes and limits and carries only flags that were offered; everything else
//! comes out as [`Event::Refuse`] with the error to answer. Only a wrong magic number and a payload beyond the
//! limits end the session.
//!
//! # Payloads
//! The data of a write that may be carried out is the caller's to collect, in a buffer of its own: after such an
//! event [`Requests::payload_left`] tells how much follows. The caller moves it with [`Requests::take_payload`], or
//! reads it from the client straight into its place and says so with [`Requests::payload_received`], or gives it up
//! with [`Requests::skip_payload`]. Other payloads are skipped without being kept, so that the next request is found
//! behind them.
//!
//! What is kept of the input is one header of 32 bytes and one list of contexts of at most [`MAX_FILTER`] bytes.
//!
//! # Requests the specification leaves open
//! A request of no bytes succeeds, except for a status request, whose reply must hold an extent.

use super::catalog::BlockSizes;
use super::context::{ContextSet, SelectedContext};
use super::limits::{MAX_CONTEXTS, MAX_PAYLOAD};
use super::reply::Ticket;
use super::wire::{
    CommandFlags, CommandType, EXTENDED_REQUEST_MAGIC, ErrorCode, ExtendedRequestHeader, REQUEST_MAGIC,
    RequestHeader, TransmissionFlags,
};

/// Form of requests and replies, as negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// Simple replies.
    Simple,
    /// Structured replies (`NBD_OPT_STRUCTURED_REPLY`).
    Structured,
    /// Extended requests and replies (`NBD_OPT_EXTENDED_HEADERS`).
    Extended,
}

impl Framing {
    /// Whether replies are chunks.
    #[must_use]
    pub const fn has_chunks(self) -> bool {
        matches!(self, Self::Structured | Self::Extended)
    }
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
    /// Flags that were shown to the client: what it may use.
    pub flags: TransmissionFlags,
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

/// Why the session ends without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransmissionError {
    /// No request starts here.
    #[error("a request starts with {0:#x} in place of the magic number")]
    Magic(u32),
    /// A payload beyond what anybody may send.
    #[error("a request announces {0} bytes of payload, more than the largest payload")]
    Payload(u64),
}

/// Longest list of contexts in a status request, in bytes: the length of the range, and each context once.
pub const MAX_FILTER: usize = size_of::<u64>() + MAX_CONTEXTS * size_of::<u32>();

const COMPACT: usize = size_of::<RequestHeader>();
const EXTENDED: usize = size_of::<ExtendedRequestHeader>();

/// A request's header in one form for both framings.
#[derive(Clone, Copy, Debug)]
struct Header {
    ticket: Ticket,
    flags: CommandFlags,
    kind: Option<CommandType>,
    offset: u64,
    /// Of the range; 0 where the header tells a payload instead.
    length: u64,
    /// Bytes that follow the header.
    payload: u64,
}

/// What the input is at.
#[derive(Clone, Copy, Debug)]
enum State {
    /// Inside a header.
    Header,
    /// Inside the payload of a write that is carried out: the caller's.
    Payload { left: u32 },
    /// Inside the list of contexts of a status request.
    Filter { header: Header, length: usize },
    /// Inside a payload that nobody wants; then the error is answered, if there is one.
    Skip { left: u32, refused: Option<Refused> },
}

type Refusal = (ErrorCode, &'static str);

/// Turns input into requests.
#[derive(Debug)]
pub struct Requests {
    session: Session,
    buffer: [u8; MAX_FILTER],
    have: usize,
    state: State,
}

impl Requests {
    /// Requests of this session.
    #[must_use]
    pub const fn new(session: Session) -> Self {
        Self {
            session,
            buffer: [0; MAX_FILTER],
            have: 0,
            state: State::Header,
        }
    }

    /// What was agreed in the handshake.
    #[must_use]
    pub const fn session(&self) -> &Session {
        &self.session
    }

    /// Bytes of a write's payload that are still to be collected.
    #[must_use]
    pub const fn payload_left(&self) -> usize {
        match self.state {
            State::Payload { left } => left as usize,
            _ => 0,
        }
    }

    /// Moves what `input` has of the payload to the end of `into`; true once nothing is left.
    pub fn take_payload(&mut self, input: &mut &[u8], into: &mut impl bytes::BufMut) -> bool {
        let (taken, rest) = input.split_at(input.len().min(self.payload_left()));
        into.put_slice(taken);
        *input = rest;
        self.payload_received(taken.len());
        self.payload_left() == 0
    }

    /// Says that `count` bytes of the payload were read from the client without passing here.
    ///
    /// # Panics
    /// As many were not left.
    pub fn payload_received(&mut self, count: usize) {
        let left = self.payload_left();
        assert!(count <= left, "a payload has {left} bytes left, not {count}");
        if let (State::Payload { left }, Ok(count)) = (&mut self.state, u32::try_from(count)) {
            *left -= count;
            if *left == 0 {
                self.state = State::Header;
            }
        }
    }

    /// Gives up the rest of the payload: it is dropped as it comes.
    pub fn skip_payload(&mut self) {
        if let State::Payload { left } = self.state {
            self.state = State::Skip { left, refused: None };
        }
    }

    /// Takes at most one request off the front of `input`; `None` when more input is needed.
    ///
    /// # Errors
    /// The session must end without an answer.
    ///
    /// # Panics
    /// The payload of the request before was not collected.
    pub fn receive(&mut self, input: &mut &[u8]) -> Result<Option<Event>, TransmissionError> {
        loop {
            match self.state {
                State::Header => {
                    let Some(header) = self.header(input)? else {
                        return Ok(None);
                    };
                    if let Some(event) = self.begin(&header)? {
                        return Ok(Some(event));
                    }
                }
                State::Payload { left } => panic!("{left} bytes of a payload were not collected"),
                State::Filter { header, length } => {
                    if !self.fill(input, length) {
                        return Ok(None);
                    }
                    self.have = 0;
                    self.state = State::Header;
                    return Ok(Some(self.filtered(&header, length)));
                }
                State::Skip { left, refused } => {
                    let skipped = u32::try_from(input.len()).unwrap_or(u32::MAX).min(left);
                    *input = &input[skipped as usize..];
                    if skipped < left {
                        let left = left - skipped;
                        self.state = State::Skip { left, refused };
                        return Ok(None);
                    }
                    self.state = State::Header;
                    if let Some(refused) = refused {
                        return Ok(Some(Event::Refuse(refused)));
                    }
                }
            }
        }
    }

    /// Moves input to the buffer until it holds `length` bytes; false if the input ended first.
    fn fill(&mut self, input: &mut &[u8], length: usize) -> bool {
        let (taken, rest) = input.split_at(input.len().min(length - self.have));
        self.buffer[self.have..self.have + taken.len()].copy_from_slice(taken);
        self.have += taken.len();
        *input = rest;
        self.have == length
    }

    /// The next header. The magic number is checked as soon as it is there: noise must not look like a request that
    /// is slow to come.
    fn header(&mut self, input: &mut &[u8]) -> Result<Option<Header>, TransmissionError> {
        let extended = self.session.framing == Framing::Extended;
        let (magic, length) = if extended {
            (EXTENDED_REQUEST_MAGIC, EXTENDED)
        } else {
            (REQUEST_MAGIC, COMPACT)
        };
        let whole = self.fill(input, length);
        if let (true, Some(told)) = (self.have >= 4, self.buffer.first_chunk::<4>()) {
            let told = u32::from_be_bytes(*told);
            if told != magic {
                return Err(TransmissionError::Magic(told));
            }
        }
        if !whole {
            return Ok(None);
        }
        self.have = 0;
        Ok(if extended {
            self.buffer
                .first_chunk::<EXTENDED>()
                .map(|bytes| self.extended_header(zerocopy::transmute!(*bytes)))
        } else {
            self.buffer
                .first_chunk::<COMPACT>()
                .map(|bytes| self.compact_header(zerocopy::transmute!(*bytes)))
        })
    }

    fn compact_header(&self, header: RequestHeader) -> Header {
        let kind = CommandType::from_number(header.command.get());
        let length = u64::from(header.length.get());
        Header {
            ticket: Ticket {
                framing: self.session.framing,
                cookie: header.cookie.get(),
                offset: header.offset.get(),
            },
            flags: CommandFlags::from_bits_retain(header.flags.get()),
            kind,
            offset: header.offset.get(),
            length,
            payload: if kind == Some(CommandType::Write) {
                length
            } else {
                0
            },
        }
    }

    fn extended_header(&self, header: ExtendedRequestHeader) -> Header {
        let kind = CommandType::from_number(header.command.get());
        let flags = CommandFlags::from_bits_retain(header.flags.get());
        let length = header.length.get();
        let payload = if flags.contains(CommandFlags::PAYLOAD_LEN) {
            length
        } else {
            0
        };
        Header {
            ticket: Ticket {
                framing: self.session.framing,
                cookie: header.cookie.get(),
                offset: header.offset.get(),
            },
            flags,
            kind,
            offset: header.offset.get(),
            // The range of a write is as long as its payload; that of others then stands inside the payload.
            length: if payload > 0 && kind != Some(CommandType::Write) {
                0
            } else {
                length
            },
            payload,
        }
    }

    /// Largest payload before the session ends. With compact headers nothing up to the specification's default is
    /// held against a client; with extended ones the limit is what was advertised.
    fn payload_limit(&self) -> u64 {
        if self.session.framing == Framing::Extended {
            self.session.block_sizes.maximum().into()
        } else {
            MAX_PAYLOAD.into()
        }
    }

    /// Decides from a header what comes next; `None` if input must be taken first.
    fn begin(&mut self, header: &Header) -> Result<Option<Event>, TransmissionError> {
        if header.kind == Some(CommandType::Disconnect) {
            return Ok(Some(Event::Disconnect));
        }
        if header.payload > self.payload_limit() {
            return Err(TransmissionError::Payload(header.payload));
        }
        let payload = u32::try_from(header.payload).unwrap_or(u32::MAX);
        if let Some(length) = self.filter_length(header) {
            self.state = State::Filter {
                header: *header,
                length,
            };
            return Ok(None);
        }
        match self.check(header) {
            Ok(command) => {
                if payload > 0 {
                    self.state = State::Payload { left: payload };
                }
                Ok(Some(Event::Do(Request {
                    ticket: header.ticket,
                    command,
                })))
            }
            Err(refusal) => {
                let refused = refused(header, refusal);
                if payload == 0 {
                    return Ok(Some(Event::Refuse(refused)));
                }
                self.state = State::Skip {
                    left: payload,
                    refused: Some(refused),
                };
                Ok(None)
            }
        }
    }

    /// Length of the list of contexts that follows, if this is a status request with one that can be valid.
    fn filter_length(&self, header: &Header) -> Option<usize> {
        let length = usize::try_from(header.payload).ok()?;
        let fits =
            (size_of::<u64>()..=MAX_FILTER).contains(&length) && length.is_multiple_of(size_of::<u32>());
        let offered = self
            .session
            .flags
            .contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD);
        (offered && fits && header.kind == Some(CommandType::BlockStatus)).then_some(length)
    }

    /// The event of a status request whose list of contexts is in the buffer.
    fn filtered(&self, header: &Header, length: usize) -> Event {
        let answer = self.buffer[..length]
            .split_first_chunk::<8>()
            .ok_or((ErrorCode::Invalid, "the list of contexts is too short"))
            .and_then(|(range, ids)| {
                let mut chosen = ContextSet::EMPTY;
                for id in ids.chunks_exact(4) {
                    let found = self
                        .session
                        .contexts
                        .iter()
                        .position(|context| context.id.to_be_bytes() == *id)
                        .ok_or((ErrorCode::Invalid, "a context of the list was not selected"))?;
                    if !chosen.insert(found) {
                        return Err((ErrorCode::Invalid, "a context is twice in the list"));
                    }
                }
                self.status(header, u64::from_be_bytes(*range), chosen)
            });
        match answer {
            Ok(command) => Event::Do(Request {
                ticket: header.ticket,
                command,
            }),
            Err(refusal) => Event::Refuse(refused(header, refusal)),
        }
    }

    /// The command of a request, or the error to answer.
    fn check(&self, header: &Header) -> Result<Command, Refusal> {
        let Header {
            flags,
            offset,
            length,
            ..
        } = *header;
        let kind = header
            .kind
            .ok_or((ErrorCode::Invalid, "the command is unknown"))?;
        let fua = flags.contains(CommandFlags::FUA);
        match kind {
            CommandType::Read => {
                self.allow(header, CommandFlags::DONT_FRAGMENT)?;
                self.in_range(offset, length, ErrorCode::Invalid)?;
                Ok(Command::Read {
                    offset,
                    length: self.transferred(length).ok_or((
                        if self.session.framing.has_chunks() {
                            ErrorCode::Overflow
                        } else {
                            ErrorCode::Invalid
                        },
                        "the request is longer than the largest payload",
                    ))?,
                    dont_fragment: flags.contains(CommandFlags::DONT_FRAGMENT),
                })
            }
            CommandType::Write => {
                self.writable()?;
                self.allow(header, CommandFlags::PAYLOAD_LEN)?;
                if header.payload != length {
                    return Err((ErrorCode::Invalid, "a write carries its data as payload"));
                }
                self.in_range(offset, length, ErrorCode::NoSpace)?;
                Ok(Command::Write {
                    offset,
                    length: self.transferred(length).ok_or((
                        ErrorCode::Invalid,
                        "the request is longer than the largest payload",
                    ))?,
                    fua,
                })
            }
            CommandType::Flush => {
                self.allow(header, CommandFlags::empty())?;
                if offset != 0 || length != 0 {
                    return Err((ErrorCode::Invalid, "a flush has no offset and no length"));
                }
                Ok(Command::Flush)
            }
            CommandType::Trim => {
                self.writable()?;
                self.allow(header, CommandFlags::empty())?;
                self.in_range(offset, length, ErrorCode::Invalid)?;
                Ok(Command::Trim { offset, length, fua })
            }
            CommandType::Cache => {
                self.allow(header, CommandFlags::empty())?;
                self.in_range(offset, length, ErrorCode::Invalid)?;
                Ok(Command::Cache { offset, length })
            }
            CommandType::WriteZeroes => {
                self.writable()?;
                self.allow(header, CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO)?;
                self.in_range(offset, length, ErrorCode::NoSpace)?;
                Ok(Command::WriteZeroes {
                    offset,
                    length,
                    fua,
                    no_hole: flags.contains(CommandFlags::NO_HOLE),
                    fast: flags.contains(CommandFlags::FAST_ZERO),
                })
            }
            CommandType::BlockStatus => {
                if header.payload > 0 {
                    return Err((ErrorCode::Invalid, "the list of contexts has no valid length"));
                }
                self.status(header, length, ContextSet::first(self.session.contexts.len()))
            }
            CommandType::Resize => Err((ErrorCode::Invalid, "the size can't be changed")),
            CommandType::Disconnect => Err((ErrorCode::Invalid, "a disconnect request has no reply")),
        }
    }

    fn status(&self, header: &Header, length: u64, contexts: ContextSet) -> Result<Command, Refusal> {
        if self.session.contexts.is_empty() {
            return Err((ErrorCode::Invalid, "no metadata context was selected"));
        }
        self.allow(header, CommandFlags::REQ_ONE | CommandFlags::PAYLOAD_LEN)?;
        self.in_range(header.offset, length, ErrorCode::Invalid)?;
        if length == 0 {
            return Err((ErrorCode::Invalid, "a status request of no bytes has no answer"));
        }
        Ok(Command::BlockStatus {
            offset: header.offset,
            length,
            one: header.flags.contains(CommandFlags::REQ_ONE),
            contexts,
        })
    }

    /// A length that can be transferred at once.
    fn transferred(&self, length: u64) -> Option<u32> {
        u32::try_from(length)
            .ok()
            .filter(|length| *length <= self.session.block_sizes.maximum())
    }

    fn writable(&self) -> Result<(), Refusal> {
        if self.session.flags.contains(TransmissionFlags::READ_ONLY) {
            Err((ErrorCode::NotPermitted, "the export is read-only"))
        } else {
            Ok(())
        }
    }

    /// Checks that a request has no other flags than those of its command, as far as they were offered. FUA may come
    /// with every command once it was offered ("Command flags").
    fn allow(&self, header: &Header, of_command: CommandFlags) -> Result<(), Refusal> {
        let offered = self.session.flags;
        let mut allowed = of_command;
        allowed.set(CommandFlags::FUA, offered.contains(TransmissionFlags::SEND_FUA));
        if !offered.contains(TransmissionFlags::SEND_DF) {
            allowed.remove(CommandFlags::DONT_FRAGMENT);
        }
        if !offered.contains(TransmissionFlags::SEND_FAST_ZERO) {
            allowed.remove(CommandFlags::FAST_ZERO);
        }
        if self.session.framing != Framing::Extended {
            allowed.remove(CommandFlags::PAYLOAD_LEN);
        }
        if allowed.contains(header.flags) {
            Ok(())
        } else {
            Err((
                ErrorCode::Invalid,
                "the request carries a flag that was not offered for it",
            ))
        }
    }

    /// Checks that a request keeps the smallest block and lies inside the export.
    fn in_range(&self, offset: u64, length: u64, beyond: ErrorCode) -> Result<(), Refusal> {
        let minimum = u64::from(self.session.block_sizes.minimum());
        if !offset.is_multiple_of(minimum) || !length.is_multiple_of(minimum) {
            return Err((
                ErrorCode::Invalid,
                "the request is not aligned to the smallest block",
            ));
        }
        match offset.checked_add(length) {
            Some(end) if end <= self.session.size => Ok(()),
            _ => Err((beyond, "the request reaches beyond the end of the export")),
        }
    }
}

fn refused(header: &Header, (error, message): Refusal) -> Refused {
    Refused {
        ticket: header.ticket,
        kind: header.kind,
        error,
        message,
    }
}

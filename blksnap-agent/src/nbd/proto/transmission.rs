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

use super::context::ContextSet;
use super::limits::{MAX_CONTEXTS, MAX_PAYLOAD};
use super::request::Header;
pub use super::request::{Command, Event, Refused, Request};
pub use super::session::{Framing, Session};
use super::wire::{
    CommandType, EXTENDED_REQUEST_MAGIC, ErrorCode, ExtendedRequestHeader, REQUEST_MAGIC, RequestHeader,
    TransmissionFlags,
};

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

    /// Whether the input is between two requests.
    #[must_use]
    pub const fn is_at_rest(&self) -> bool {
        self.have == 0 && matches!(self.state, State::Header)
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
                .map(|bytes| Header::extended(zerocopy::transmute!(*bytes)))
        } else {
            self.buffer
                .first_chunk::<COMPACT>()
                .map(|bytes| Header::compact(self.session.framing, zerocopy::transmute!(*bytes)))
        })
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
        match self.session.check(header) {
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
                let refused = header.refused(refusal);
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
                self.session.status(header, u64::from_be_bytes(*range), chosen)
            });
        match answer {
            Ok(command) => Event::Do(Request {
                ticket: header.ticket,
                command,
            }),
            Err(refusal) => Event::Refuse(header.refused(refusal)),
        }
    }
}

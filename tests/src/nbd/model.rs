//! Model: what a server has to do with a stream of requests, as the specification has it.
//!
//! The whole stream is there at once, and where several errors are right all are told: the model says what must not
//! be got wrong, not how the server is to go about it.

use super::build::{Framing, Request};
use super::{cmd, err, flag, trans};

/// What was agreed in the handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Form of requests and replies.
    pub framing: Framing,
    /// Size of the export.
    pub size: u64,
    /// Smallest block.
    pub minimum: u32,
    /// Largest payload.
    pub maximum: u32,
    /// Transmission flags.
    pub flags: u16,
    /// Identifiers of the selected contexts.
    pub contexts: Vec<u32>,
}

/// What has to be done with a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Carry it out.
    Carry,
    /// Answer with one of these errors.
    Refuse(Vec<u32>),
    /// Finish and close.
    Disconnect,
}

/// How a stream ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// More may come.
    Open,
    /// The client disconnected.
    Disconnected,
    /// A wrong magic number or a payload beyond all limits.
    Dropped,
}

/// Largest payload that a server should bear with compact headers, whatever it advertised.
const DEFAULT_PAYLOAD: u64 = 1 << 25;

impl Agreed {
    fn shows(&self, flags: u16) -> bool {
        self.flags & flags == flags
    }

    /// The requests of `stream` that are complete, each with what has to be done, and how the stream ends.
    #[must_use]
    pub fn judge(&self, stream: &[u8]) -> (Vec<(Request, Verdict)>, End) {
        let mut judged = Vec::new();
        let mut rest = stream;
        loop {
            match self.next(&mut rest) {
                Ok(None) => return (judged, End::Open),
                Err(()) => return (judged, End::Dropped),
                Ok(Some(request)) if request.command == cmd::DISC => {
                    judged.push((request, Verdict::Disconnect));
                    return (judged, End::Disconnected);
                }
                Ok(Some(request)) => {
                    let errors = self.errors(&request);
                    let verdict = if errors.is_empty() {
                        Verdict::Carry
                    } else {
                        Verdict::Refuse(errors)
                    };
                    judged.push((request, verdict));
                }
            }
        }
    }

    fn next(&self, rest: &mut &[u8]) -> Result<Option<Request>, ()> {
        let extended = self.framing == Framing::Extended;
        let magic: u32 = if extended { 0x21e4_1c71 } else { 0x2560_9513 };
        let Some(told) = rest.first_chunk::<4>() else {
            return Ok(None);
        };
        if u32::from_be_bytes(*told) != magic {
            return Err(());
        }
        let size = if extended { 32 } else { 28 };
        let Some((header, behind)) = rest.split_at_checked(size) else {
            return Ok(None);
        };
        let number = |at: usize, length: usize| {
            header[at..at + length]
                .iter()
                .fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
        };
        let short = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        let mut request = Request {
            flags: short(4),
            command: short(6),
            cookie: number(8, 8),
            offset: number(16, 8),
            length: number(24, size - 24),
            payload: Vec::new(),
        };
        let payload = if request.command == cmd::DISC {
            0
        } else if request.command == cmd::WRITE || (extended && request.flags & flag::PAYLOAD_LEN != 0) {
            request.length
        } else {
            0
        };
        let limit = if extended {
            u64::from(self.maximum)
        } else {
            DEFAULT_PAYLOAD
        };
        if payload > limit {
            return Err(());
        }
        let payload = usize::try_from(payload).map_err(drop)?;
        let Some((payload, behind)) = behind.split_at_checked(payload) else {
            return Ok(None);
        };
        request.payload = payload.to_vec();
        *rest = behind;
        Ok(Some(request))
    }

    /// Every error that is right for a request; none if it must be carried out.
    fn errors(&self, request: &Request) -> Vec<u32> {
        let mut errors = Vec::new();
        let chunks = self.framing.has_chunks();
        let changes = [cmd::WRITE, cmd::TRIM, cmd::WRITE_ZEROES].contains(&request.command);
        if changes && self.shows(trans::READ_ONLY) {
            return vec![err::EPERM];
        }
        if request.command > cmd::BLOCK_STATUS {
            return vec![err::EINVAL];
        }
        if request.flags & !self.allowed(request.command) != 0 {
            errors.push(err::EINVAL);
        }
        let length = match self.range(request) {
            Some(length) => length,
            None => return vec![err::EINVAL],
        };
        if request.command == cmd::FLUSH {
            if request.offset != 0 || length != 0 {
                errors.push(err::EINVAL);
            }
            return errors;
        }
        let block = u64::from(self.minimum);
        if !request.offset.is_multiple_of(block) || !length.is_multiple_of(block) {
            errors.push(err::EINVAL);
        }
        if u128::from(request.offset) + u128::from(length) > u128::from(self.size) {
            let space = [cmd::WRITE, cmd::WRITE_ZEROES].contains(&request.command);
            errors.push(if space { err::ENOSPC } else { err::EINVAL });
        }
        if length > u64::from(self.maximum) {
            match request.command {
                cmd::READ if chunks => errors.push(err::EOVERFLOW),
                cmd::READ | cmd::WRITE => errors.push(err::EINVAL),
                _ => {}
            }
        }
        if request.command == cmd::BLOCK_STATUS && (self.contexts.is_empty() || length == 0) {
            errors.push(err::EINVAL);
        }
        errors
    }

    /// Flags that a command may have.
    fn allowed(&self, command: u16) -> u16 {
        let mut allowed = match command {
            cmd::READ if self.shows(trans::SEND_DF) => flag::DF,
            cmd::WRITE if self.framing == Framing::Extended => flag::PAYLOAD_LEN,
            cmd::WRITE_ZEROES if self.shows(trans::SEND_FAST_ZERO) => flag::NO_HOLE | flag::FAST_ZERO,
            cmd::WRITE_ZEROES => flag::NO_HOLE,
            cmd::BLOCK_STATUS if self.shows(trans::BLOCK_STATUS_PAYLOAD) => flag::REQ_ONE | flag::PAYLOAD_LEN,
            cmd::BLOCK_STATUS => flag::REQ_ONE,
            _ => 0,
        };
        if self.shows(trans::SEND_FUA) {
            allowed |= flag::FUA;
        }
        allowed
    }

    /// Length of the range that a request is about; `None` if its payload makes no sense.
    fn range(&self, request: &Request) -> Option<u64> {
        if request.command == cmd::WRITE
            || request.flags & flag::PAYLOAD_LEN == 0
            || request.payload.is_empty()
        {
            return Some(request.length);
        }
        if request.command != cmd::BLOCK_STATUS || !self.shows(trans::BLOCK_STATUS_PAYLOAD) {
            return None;
        }
        let (length, ids) = request.payload.split_first_chunk::<8>()?;
        let (ids, rest) = ids.as_chunks::<4>();
        let mut seen = Vec::new();
        for id in ids {
            let id = u32::from_be_bytes(*id);
            if !self.contexts.contains(&id) || seen.contains(&id) {
                return None;
            }
            seen.push(id);
        }
        rest.is_empty().then_some(u64::from_be_bytes(*length))
    }
}

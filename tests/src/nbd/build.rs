//! Build: options and requests as bytes.

use super::{cmd, flag};

/// Form of requests and replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// Compact requests, simple replies.
    Simple,
    /// Compact requests, structured replies.
    Structured,
    /// Extended requests and replies.
    Extended,
}

impl Framing {
    /// Each.
    pub const ALL: [Self; 3] = [Self::Simple, Self::Structured, Self::Extended];

    /// Whether replies are chunks.
    #[must_use]
    pub const fn has_chunks(self) -> bool {
        !matches!(self, Self::Simple)
    }
}

/// An option with its data.
#[must_use]
pub fn option(number: u32, data: &[u8]) -> Vec<u8> {
    option_claiming(number, u32::try_from(data.len()).unwrap_or(u32::MAX), data)
}

/// An option that says another length than its data has.
#[must_use]
pub fn option_claiming(number: u32, length: u32, data: &[u8]) -> Vec<u8> {
    let parts: [&[u8]; 4] = [b"IHAVEOPT", &number.to_be_bytes(), &length.to_be_bytes(), data];
    parts.concat()
}

/// A string behind its length.
#[must_use]
pub fn counted(bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes();
    [length.as_slice(), bytes].concat()
}

/// Data of INFO and GO.
#[must_use]
pub fn info(name: &str, kinds: &[u16]) -> Vec<u8> {
    let count = u16::try_from(kinds.len()).unwrap_or(u16::MAX).to_be_bytes();
    let kinds: Vec<u8> = kinds.iter().flat_map(|kind| kind.to_be_bytes()).collect();
    [counted(name.as_bytes()), count.to_vec(), kinds].concat()
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
#[must_use]
pub fn contexts(name: &str, queries: &[&str]) -> Vec<u8> {
    let count = u32::try_from(queries.len()).unwrap_or(u32::MAX).to_be_bytes();
    let queries: Vec<u8> = queries
        .iter()
        .flat_map(|query| counted(query.as_bytes()))
        .collect();
    [counted(name.as_bytes()), count.to_vec(), queries].concat()
}

/// A request, right or wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Flags.
    pub flags: u16,
    /// Command.
    pub command: u16,
    /// Cookie.
    pub cookie: u64,
    /// Offset.
    pub offset: u64,
    /// Length in the header.
    pub length: u64,
    /// What follows the header.
    pub payload: Vec<u8>,
}

impl Request {
    /// A request without a payload.
    #[must_use]
    pub const fn new(command: u16, offset: u64, length: u64) -> Self {
        Self {
            flags: 0,
            command,
            cookie: 0,
            offset,
            length,
            payload: Vec::new(),
        }
    }

    /// A write; [`Request::encode`] adds the flag that extended headers need.
    #[must_use]
    pub fn write(offset: u64, data: Vec<u8>) -> Self {
        Self {
            length: data.len() as u64,
            payload: data,
            ..Self::new(cmd::WRITE, offset, 0)
        }
    }

    /// A status request that names contexts; extended headers only.
    #[must_use]
    pub fn status_of(offset: u64, length: u64, ids: &[u32]) -> Self {
        let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_be_bytes()).collect();
        let payload = [length.to_be_bytes().to_vec(), ids].concat();
        Self {
            flags: flag::PAYLOAD_LEN,
            length: payload.len() as u64,
            payload,
            ..Self::new(cmd::BLOCK_STATUS, offset, 0)
        }
    }

    /// With these flags, too.
    #[must_use]
    pub const fn with(mut self, flags: u16) -> Self {
        self.flags |= flags;
        self
    }

    /// The header and the payload.
    #[must_use]
    pub fn encode(&self, framing: Framing) -> Vec<u8> {
        let (magic, mut flags) = match framing {
            Framing::Extended => (0x21e4_1c71_u32, self.flags),
            _ => (0x2560_9513, self.flags),
        };
        if framing == Framing::Extended && self.command == cmd::WRITE {
            flags |= flag::PAYLOAD_LEN;
        }
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&self.command.to_be_bytes());
        bytes.extend_from_slice(&self.cookie.to_be_bytes());
        bytes.extend_from_slice(&self.offset.to_be_bytes());
        if framing == Framing::Extended {
            bytes.extend_from_slice(&self.length.to_be_bytes());
        } else {
            // A longer one can't be said with a compact header.
            let length = u32::try_from(self.length).unwrap_or(u32::MAX);
            bytes.extend_from_slice(&length.to_be_bytes());
        }
        bytes.extend_from_slice(&self.payload);
        bytes
    }
}

//! Parse: replies from bytes, and the specification's rules for their form.
//!
//! A [`Ledger`] knows the requests that wait for an answer. It takes the server's bytes in any pieces, gives the answers
//! that are complete, and an error as soon as a byte breaks a rule.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context as _, Result, bail, ensure};

use super::build::{Framing, Request};
use super::{cmd, err, flag, rep};

const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_MAGIC: u32 = 0x6e8a_278c;

/// Longest string.
const MAX_STRING: usize = 4096;
/// Most extents that a server should send in a chunk.
const MAX_EXTENTS: u64 = 1 << 20;

/// Takes numbers and bytes off the front; nothing is taken unless all is there.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.bytes(2)?.try_into().ok()?))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.bytes(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_be_bytes(self.bytes(8)?.try_into().ok()?))
    }
}

/// A reply to an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionReply {
    /// The option.
    pub option: u32,
    /// Type.
    pub kind: u32,
    /// Data.
    pub data: Vec<u8>,
}

impl OptionReply {
    /// Whether nothing more follows for this option.
    #[must_use]
    pub const fn is_final(&self) -> bool {
        self.kind == rep::ACK || self.kind & rep::ERROR != 0
    }

    /// Takes a reply off the front of `bytes`; `None` if it is not complete.
    ///
    /// # Errors
    /// The bytes are none.
    pub fn take(bytes: &mut &[u8]) -> Result<Option<Self>> {
        let mut cursor = Cursor(bytes);
        let Some(magic) = cursor.u64() else {
            return Ok(None);
        };
        ensure!(
            magic == OPTION_REPLY_MAGIC,
            "an option reply starts with {magic:#x}"
        );
        let (Some(option), Some(kind), Some(length)) = (cursor.u32(), cursor.u32(), cursor.u32()) else {
            return Ok(None);
        };
        // The longest is a name and a description.
        ensure!(
            length as usize <= 4 + 2 * MAX_STRING,
            "an option reply of {length} bytes"
        );
        let Some(data) = cursor.bytes(length as usize) else {
            return Ok(None);
        };
        let reply = Self {
            option,
            kind,
            data: data.to_vec(),
        };
        reply.check()?;
        *bytes = cursor.0;
        Ok(Some(reply))
    }

    fn check(&self) -> Result<()> {
        let text = |bytes: &[u8]| -> Result<()> {
            ensure!(bytes.len() <= MAX_STRING, "a string of {} bytes", bytes.len());
            let text = std::str::from_utf8(bytes)?;
            ensure!(!text.contains('\0'), "a string with NUL");
            Ok(())
        };
        let mut data = Cursor(&self.data);
        match self.kind {
            rep::ACK => ensure!(self.data.is_empty(), "an acknowledgement with data"),
            rep::SERVER => {
                let length = data.u32().context("an export without a name")?;
                text(data.bytes(length as usize).context("a name beyond its reply")?)?;
                text(data.0)?;
            }
            rep::INFO => match data.u16().context("information without its type")? {
                0 => ensure!(self.data.len() == 12, "NBD_INFO_EXPORT of another length"),
                3 => {
                    ensure!(self.data.len() == 14, "NBD_INFO_BLOCK_SIZE of another length");
                    let (minimum, preferred, maximum) = (
                        data.u32().unwrap_or(0),
                        data.u32().unwrap_or(0),
                        data.u32().unwrap_or(0),
                    );
                    ensure!(
                        minimum.is_power_of_two()
                            && minimum <= 65536
                            && preferred.is_power_of_two()
                            && preferred >= minimum.max(512)
                            && maximum >= preferred,
                        "block sizes {minimum}, {preferred}, {maximum}"
                    );
                }
                1 | 2 => text(data.0)?,
                other => bail!("information of type {other}, which nobody defined"),
            },
            rep::META_CONTEXT => {
                data.u32().context("a context without its identifier")?;
                text(data.0)?;
                let name = String::from_utf8_lossy(data.0).into_owned();
                let (space, _) = name.split_once(':').context("a context without a namespace")?;
                ensure!(!space.is_empty(), "a context with an empty namespace");
            }
            kind if kind & rep::ERROR != 0 => {
                ensure!(
                    (1..=10).contains(&(kind - rep::ERROR)),
                    "an error reply of type {kind:#x}"
                );
                text(&self.data)?;
            }
            other => bail!("an option reply of type {other:#x}"),
        }
        Ok(())
    }
}

/// A complete answer to a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// The request.
    pub request: Request,
    /// First error, 0 for success.
    pub error: u32,
    /// Its message.
    pub message: String,
    /// Data of a read, if it succeeded.
    pub data: Vec<u8>,
    /// Extents of each context: length and flags.
    pub status: BTreeMap<u32, Vec<(u64, u64)>>,
}

/// What has come of an answer.
#[derive(Debug, Default)]
struct Partial {
    answer: Answer,
    /// Which bytes of a read were told.
    told: Vec<(u64, u64)>,
}

/// Requests that wait for an answer, and the bytes that have come.
#[derive(Debug)]
pub struct Ledger {
    framing: Framing,
    /// Largest payload.
    maximum: u32,
    /// Identifiers of the selected contexts.
    contexts: Vec<u32>,
    waiting: HashMap<u64, Partial>,
    bytes: Vec<u8>,
}

impl Ledger {
    /// Nothing waits.
    #[must_use]
    pub fn new(framing: Framing, maximum: u32, contexts: Vec<u32>) -> Self {
        Self {
            framing,
            maximum,
            contexts,
            waiting: HashMap::new(),
            bytes: Vec::new(),
        }
    }

    /// A request was sent.
    ///
    /// # Panics
    /// Its cookie waits already.
    pub fn sent(&mut self, request: Request) {
        let partial = Partial {
            answer: Answer {
                request: request.clone(),
                ..Answer::default()
            },
            told: Vec::new(),
        };
        let before = self.waiting.insert(request.cookie, partial);
        assert!(before.is_none(), "cookie {} is in use", request.cookie);
    }

    /// Number of requests that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Bytes of a message that is not complete.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.bytes.len()
    }

    /// Takes bytes of the server and gives the answers that they complete.
    ///
    /// # Errors
    /// They break a rule.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<Vec<Answer>> {
        self.bytes.extend_from_slice(bytes);
        let bytes = std::mem::take(&mut self.bytes);
        let mut rest = bytes.as_slice();
        let mut answers = Vec::new();
        loop {
            let mut cursor = Cursor(rest);
            match self.message(&mut cursor)? {
                None => break,
                Some(answer) => answers.extend(answer),
            }
            rest = cursor.0;
        }
        self.bytes = rest.to_vec();
        Ok(answers)
    }

    /// Takes one message; the outer `None` means that it is not complete.
    fn message(&mut self, cursor: &mut Cursor<'_>) -> Result<Option<Option<Answer>>> {
        let Some(magic) = cursor.u32() else {
            return Ok(None);
        };
        match (magic, self.framing) {
            (SIMPLE_MAGIC, Framing::Simple | Framing::Structured) => self.simple(cursor),
            (STRUCTURED_MAGIC, Framing::Structured) | (EXTENDED_MAGIC, Framing::Extended) => {
                self.chunk(cursor)
            }
            _ => bail!("a reply starts with {magic:#x} in {:?} framing", self.framing),
        }
    }

    fn simple(&mut self, cursor: &mut Cursor<'_>) -> Result<Option<Option<Answer>>> {
        let (Some(error), Some(cookie)) = (cursor.u32(), cursor.u64()) else {
            return Ok(None);
        };
        ensure!(
            error == 0 || err::ALL.contains(&error),
            "error {error} is not one of the protocol"
        );
        let partial = self.waiting.get(&cookie);
        let request = &partial
            .with_context(|| format!("a reply for {cookie:#x}"))?
            .answer
            .request;
        let mut data = Vec::new();
        if request.command == cmd::READ {
            ensure!(
                self.framing == Framing::Simple,
                "a read is answered with a simple reply"
            );
            if error == 0 {
                let Some(bytes) = cursor.bytes(usize::try_from(request.length)?) else {
                    return Ok(None);
                };
                data = bytes.to_vec();
            }
        }
        ensure!(
            request.command != cmd::BLOCK_STATUS || error != 0,
            "a status request succeeds without a status"
        );
        let mut answer = self.waiting.remove(&cookie).unwrap_or_default().answer;
        (answer.error, answer.data) = (error, data);
        Ok(Some(Some(answer)))
    }

    fn chunk(&mut self, cursor: &mut Cursor<'_>) -> Result<Option<Option<Answer>>> {
        let extended = self.framing == Framing::Extended;
        let (Some(flags), Some(kind), Some(cookie)) = (cursor.u16(), cursor.u16(), cursor.u64()) else {
            return Ok(None);
        };
        let offset = if extended { cursor.u64() } else { Some(0) };
        let length = if extended {
            cursor.u64()
        } else {
            cursor.u32().map(u64::from)
        };
        let (Some(offset), Some(length)) = (offset, length) else {
            return Ok(None);
        };
        ensure!(flags & !1 == 0, "reply flags {flags:#x}");
        ensure!(
            length <= self.longest(kind),
            "a chunk of type {kind:#x} with {length} bytes"
        );
        let Some(payload) = cursor.bytes(usize::try_from(length)?) else {
            return Ok(None);
        };
        let (contexts, waiting) = (self.contexts.clone(), &mut self.waiting);
        let partial = waiting
            .get_mut(&cookie)
            .with_context(|| format!("a reply for {cookie:#x}, which nobody waits for"))?;
        if extended {
            let asked = partial.answer.request.offset;
            ensure!(offset == asked, "a reply for offset {offset}, asked was {asked}");
        }
        partial
            .take(kind, payload, extended, &contexts)
            .with_context(|| format!("the answer to {:?}", partial.answer.request))?;
        if flags & 1 == 0 {
            ensure!(kind != 0, "a chunk of no type that is not the last");
            return Ok(Some(None));
        }
        let partial = self.waiting.remove(&cookie).unwrap_or_default();
        partial.finish(&contexts).map(|answer| Some(Some(answer)))
    }

    /// Longest payload of a chunk: the variable part is at most the largest payload.
    fn longest(&self, kind: u16) -> u64 {
        match kind {
            0 => 0,
            1 => u64::from(self.maximum) + 8,
            2 => 12,
            5 => (4 + 8 * MAX_EXTENTS).min(u64::from(self.maximum) + 4),
            6 => (8 + 16 * MAX_EXTENTS).min(u64::from(self.maximum) + 8),
            _ => 6 + 8 + MAX_STRING as u64,
        }
    }
}

impl Partial {
    fn take(&mut self, kind: u16, payload: &[u8], extended: bool, contexts: &[u32]) -> Result<()> {
        let mut payload = Cursor(payload);
        let command = self.answer.request.command;
        match kind {
            0 => {}
            1 | 2 => {
                ensure!(command == cmd::READ, "content for command {command}");
                let offset = payload.u64().context("content without an offset")?;
                let data = if kind == 1 {
                    payload.0.to_vec()
                } else {
                    let size = payload.u32().context("a hole without a size")?;
                    ensure!(payload.0.is_empty(), "a hole with more than a size");
                    vec![0; size as usize]
                };
                self.content(offset, &data)?;
            }
            5 | 6 => {
                ensure!(command == cmd::BLOCK_STATUS, "a status for command {command}");
                ensure!(extended == (kind == 6), "status type {kind} in this framing");
                self.status(&mut payload, extended, contexts)?;
            }
            0x8001 | 0x8002 => {
                let error = payload.u32().context("an error without its number")?;
                ensure!(
                    err::ALL.contains(&error),
                    "error {error} is not one of the protocol"
                );
                let length = payload.u16().context("an error without a message length")?;
                let message = payload
                    .bytes(length.into())
                    .context("a message beyond its chunk")?;
                ensure!(message.len() <= MAX_STRING, "a message of {length} bytes");
                if kind == 0x8002 {
                    let offset = payload.u64().context("an error without its offset")?;
                    let request = &self.answer.request;
                    let inside = offset.checked_sub(request.offset);
                    ensure!(
                        inside.is_some_and(|from| from < request.length),
                        "an error at {offset}, outside"
                    );
                } else {
                    ensure!(self.answer.error == 0, "a second error");
                }
                ensure!(payload.0.is_empty(), "an error with more behind");
                if self.answer.error == 0 {
                    self.answer.error = error;
                    self.answer.message = String::from_utf8(message.to_vec())?;
                }
            }
            _ => bail!("a chunk of type {kind:#x}"),
        }
        Ok(())
    }

    fn content(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let request = &self.answer.request;
        ensure!(!data.is_empty(), "content of no bytes");
        let from = offset
            .checked_sub(request.offset)
            .context("content before the range")?;
        let end = from + data.len() as u64;
        ensure!(end <= request.length, "content behind the range");
        ensure!(
            self.told
                .iter()
                .all(|&(first, behind)| end <= first || from >= behind),
            "content that overlaps"
        );
        ensure!(
            request.flags & flag::DF == 0 || self.told.is_empty(),
            "a second content chunk in spite of DF"
        );
        self.told.push((from, end));
        self.answer.data.resize(usize::try_from(request.length)?, 0);
        self.answer.data[usize::try_from(from)?..usize::try_from(end)?].copy_from_slice(data);
        Ok(())
    }

    fn status(&mut self, payload: &mut Cursor<'_>, extended: bool, contexts: &[u32]) -> Result<()> {
        let id = payload.u32().context("a status without its context")?;
        ensure!(contexts.contains(&id), "a status for context {id}, not selected");
        let mut extents = Vec::new();
        if extended {
            let count = payload.u32().context("a status without its count")?;
            while let Some(length) = payload.u64() {
                extents.push((length, payload.u64().context("half a descriptor")?));
            }
            ensure!(extents.len() == count as usize, "{count} descriptors announced");
        } else {
            while let Some(length) = payload.u32() {
                let flags = payload.u32().context("half a descriptor")?;
                extents.push((length.into(), flags.into()));
            }
        }
        ensure!(payload.0.is_empty(), "a status with more behind");
        ensure!(!extents.is_empty(), "a status without extents");
        ensure!(
            extents.iter().all(|(length, _)| *length > 0),
            "an extent of no bytes"
        );
        ensure!(
            extents.iter().all(|(_, flags)| flags >> 32 == 0),
            "a status of more than 32 bits"
        );
        let request = &self.answer.request;
        let asked = asked_length(request).context("a status for a broken list of contexts")?;
        let (last, before) = extents.split_last().context("no extents")?;
        let sum: u64 = before.iter().map(|(length, _)| length).sum();
        if request.flags & flag::REQ_ONE != 0 {
            ensure!(
                before.is_empty() && last.0 <= asked,
                "more than one extent was asked for"
            );
        } else {
            ensure!(before.is_empty() || sum < asked, "extents beyond the range");
        }
        ensure!(
            self.answer.status.insert(id, extents).is_none(),
            "a second status for context {id}"
        );
        Ok(())
    }

    fn finish(self, contexts: &[u32]) -> Result<Answer> {
        let answer = self.answer;
        let request = &answer.request;
        if answer.error != 0 {
            return Ok(answer);
        }
        match request.command {
            cmd::READ => {
                let told: u64 = self.told.iter().map(|(from, end)| end - from).sum();
                ensure!(told == request.length, "{told} of {} bytes", request.length);
            }
            cmd::BLOCK_STATUS => {
                let mut wanted = chosen(request).unwrap_or_else(|| contexts.to_vec());
                wanted.sort_unstable();
                let told: Vec<u32> = answer.status.keys().copied().collect();
                ensure!(told == wanted, "a status for {told:?}, asked was {wanted:?}");
            }
            _ => {}
        }
        Ok(answer)
    }
}

/// Length of the range of a status request.
fn asked_length(request: &Request) -> Option<u64> {
    if request.flags & flag::PAYLOAD_LEN == 0 {
        return Some(request.length);
    }
    Cursor(&request.payload).u64()
}

/// Contexts that a status request names, if it does.
fn chosen(request: &Request) -> Option<Vec<u32>> {
    if request.flags & flag::PAYLOAD_LEN == 0 {
        return None;
    }
    let mut payload = Cursor(&request.payload);
    payload.u64()?;
    let mut ids = Vec::new();
    while let Some(id) = payload.u32() {
        ids.push(id);
    }
    Some(ids)
}

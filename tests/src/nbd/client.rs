//! Client: a blocking client on a unix socket, which checks the form of all it gets.
//!
//! No wait is for ever: a server that does not answer within [`PATIENCE`] is an error.

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use super::build::{Framing, Request, contexts, info, option};
use super::model::Agreed;
use super::parse::{Answer, Ledger, OptionReply};
use super::{cmd, opt, rep};

/// Bound of every wait; only a server that hangs gets there.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A client that negotiates.
#[derive(Debug)]
pub struct Haggling {
    stream: UnixStream,
    framing: Framing,
    contexts: Vec<(u32, String)>,
}

impl Haggling {
    /// Connects, checks the greeting and sends the client flags.
    ///
    /// # Errors
    /// There is no server, or its greeting is wrong.
    pub fn open(path: &Path, flags: u32) -> Result<Self> {
        let mut stream =
            UnixStream::connect(path).with_context(|| format!("connect to {}", path.display()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).context("read the greeting")?;
        ensure!(greeting == *b"NBDMAGICIHAVEOPT\0\x03", "greeting {greeting:x?}");
        stream.write_all(&flags.to_be_bytes())?;
        Ok(Self {
            stream,
            framing: Framing::Simple,
            contexts: Vec::new(),
        })
    }

    /// The socket.
    #[must_use]
    pub const fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// The server is gone.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.stream.write_all(bytes)?)
    }

    /// Sends an option and reads its replies up to the last.
    ///
    /// # Errors
    /// The server is gone, or a reply breaks a rule.
    pub fn option(&mut self, number: u32, data: &[u8]) -> Result<Vec<OptionReply>> {
        self.send(&option(number, data))?;
        self.replies(number)
    }

    /// Reads the replies to an option that was sent.
    ///
    /// # Errors
    /// As [`Haggling::option`].
    pub fn replies(&mut self, number: u32) -> Result<Vec<OptionReply>> {
        let mut replies = Vec::new();
        loop {
            let reply = self.reply()?;
            ensure!(
                reply.option == number,
                "a reply to option {}, sent was {number}",
                reply.option
            );
            let last = reply.is_final();
            replies.push(reply);
            if last {
                return Ok(replies);
            }
        }
    }

    fn reply(&mut self) -> Result<OptionReply> {
        let mut bytes = vec![0; 20];
        self.stream
            .read_exact(&mut bytes)
            .context("read an option reply")?;
        let length = u32::from_be_bytes([bytes[16], bytes[17], bytes[18], bytes[19]]) as usize;
        ensure!(length <= 1 << 20, "an option reply of {length} bytes");
        bytes.resize(20 + length, 0);
        self.stream
            .read_exact(&mut bytes[20..])
            .context("read an option reply")?;
        OptionReply::take(&mut bytes.as_slice())?.context("an option reply in whole")
    }

    /// The type of the last reply to an option.
    ///
    /// # Errors
    /// As [`Haggling::option`].
    pub fn outcome(&mut self, number: u32, data: &[u8]) -> Result<u32> {
        let replies = self.option(number, data)?;
        Ok(replies.last().context("a reply")?.kind)
    }

    /// Negotiates the form of replies.
    ///
    /// # Errors
    /// The server refuses.
    pub fn frame(&mut self, framing: Framing) -> Result<()> {
        let number = match framing {
            Framing::Simple => return Ok(()),
            Framing::Structured => opt::STRUCTURED_REPLY,
            Framing::Extended => opt::EXTENDED_HEADERS,
        };
        let outcome = self.outcome(number, b"")?;
        ensure!(
            outcome == rep::ACK,
            "option {number} is answered with {outcome:#x}"
        );
        self.framing = framing;
        Ok(())
    }

    /// Selects contexts and gives their names and identifiers.
    ///
    /// # Errors
    /// The server refuses.
    pub fn select(&mut self, export: &str, queries: &[&str]) -> Result<Vec<(u32, String)>> {
        let mut replies = self.option(opt::SET_META_CONTEXT, &contexts(export, queries))?;
        let last = replies.pop().context("a reply")?;
        ensure!(
            last.kind == rep::ACK,
            "{:#x}: {}",
            last.kind,
            String::from_utf8_lossy(&last.data)
        );
        self.contexts = named(&replies)?;
        Ok(self.contexts.clone())
    }

    /// Names of the contexts that a query lists.
    ///
    /// # Errors
    /// The server refuses.
    pub fn list(&mut self, export: &str, queries: &[&str]) -> Result<Vec<String>> {
        let mut replies = self.option(opt::LIST_META_CONTEXT, &contexts(export, queries))?;
        let last = replies.pop().context("a reply")?;
        ensure!(last.kind == rep::ACK, "{:#x}", last.kind);
        Ok(named(&replies)?.into_iter().map(|(_, name)| name).collect())
    }

    /// Enters transmission with GO.
    ///
    /// # Errors
    /// The server refuses.
    pub fn go(mut self, export: &str) -> Result<Client> {
        let replies = self.option(opt::GO, &info(export, &[3]))?;
        let last = replies.last().context("a reply")?;
        ensure!(
            last.kind == rep::ACK,
            "GO is answered with {:#x}: {}",
            last.kind,
            String::from_utf8_lossy(&last.data)
        );
        let mut agreed = Agreed {
            framing: self.framing,
            size: 0,
            minimum: 1,
            maximum: 1 << 25,
            flags: 0,
            contexts: self.contexts.iter().map(|(id, _)| *id).collect(),
        };
        for reply in &replies {
            let number = |at: usize| -> u32 {
                reply.data[at..at + 4]
                    .iter()
                    .fold(0, |number, byte| number << 8 | u32::from(*byte))
            };
            match (reply.kind, reply.data.as_slice()) {
                (rep::INFO, [0, 0, ..]) => {
                    agreed.size = u64::from(number(2)) << 32 | u64::from(number(6));
                    agreed.flags = u16::from_be_bytes([reply.data[10], reply.data[11]]);
                }
                (rep::INFO, [0, 3, ..]) => (agreed.minimum, agreed.maximum) = (number(2), number(10)),
                _ => {}
            }
        }
        ensure!(agreed.flags & 1 == 1, "GO without NBD_INFO_EXPORT");
        Ok(Client::new(self.stream, agreed))
    }
}

fn named(replies: &[OptionReply]) -> Result<Vec<(u32, String)>> {
    replies
        .iter()
        .map(|reply| {
            ensure!(reply.kind == rep::META_CONTEXT, "{reply:?}");
            let (id, name) = reply.data.split_first_chunk::<4>().context("an identifier")?;
            Ok((u32::from_be_bytes(*id), String::from_utf8(name.to_vec())?))
        })
        .collect()
}

/// A client in transmission.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    agreed: Agreed,
    ledger: Ledger,
    cookie: u64,
    ready: Vec<Answer>,
}

impl Client {
    fn new(stream: UnixStream, agreed: Agreed) -> Self {
        let ledger = Ledger::new(agreed.framing, agreed.maximum, agreed.contexts.clone());
        Self {
            stream,
            agreed,
            ledger,
            cookie: 0,
            ready: Vec::new(),
        }
    }

    /// Connects to `export` and enters transmission, with these contexts selected where the framing allows it.
    ///
    /// # Errors
    /// The server refuses.
    pub fn connect(path: &Path, export: &str, framing: Framing, queries: &[&str]) -> Result<Self> {
        let mut haggling = Haggling::open(path, 3)?;
        haggling.frame(framing)?;
        if framing.has_chunks() && !queries.is_empty() {
            haggling.select(export, queries)?;
        }
        haggling.go(export)
    }

    /// What was agreed.
    #[must_use]
    pub const fn agreed(&self) -> &Agreed {
        &self.agreed
    }

    /// The socket.
    #[must_use]
    pub const fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// The server is gone.
    pub fn raw(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.stream.write_all(bytes)?)
    }

    /// Sends a request and gives its cookie.
    ///
    /// # Errors
    /// The server is gone.
    pub fn send(&mut self, mut request: Request) -> Result<u64> {
        self.cookie += 1;
        request.cookie = self.cookie;
        let bytes = request.encode(self.agreed.framing);
        if request.command != cmd::DISC {
            self.ledger.sent(request);
        }
        self.raw(&bytes)?;
        Ok(self.cookie)
    }

    /// The next complete answer, whichever it is.
    ///
    /// # Errors
    /// The server closed, is silent, or breaks a rule.
    pub fn answer(&mut self) -> Result<Answer> {
        let mut buffer = vec![0; 64 << 10];
        while self.ready.is_empty() {
            let read = match self.stream.read(&mut buffer) {
                Ok(0) => bail!("the server closed the connection"),
                Ok(read) => read,
                Err(error) if error.kind() == ErrorKind::WouldBlock => bail!("the server does not answer"),
                Err(error) => return Err(error).context("read an answer"),
            };
            self.ready = self.ledger.receive(&buffer[..read])?;
            self.ready.reverse();
        }
        self.ready.pop().context("an answer")
    }

    /// Sends a request and waits for its answer; nothing else may be in flight.
    ///
    /// # Errors
    /// As [`Client::answer`].
    pub fn ask(&mut self, request: Request) -> Result<Answer> {
        let cookie = self.send(request)?;
        let answer = self.answer()?;
        ensure!(
            answer.request.cookie == cookie,
            "an answer to {:?}, asked was {cookie}",
            answer.request
        );
        Ok(answer)
    }

    /// Reads; an error is an error.
    ///
    /// # Errors
    /// As [`Client::answer`], or the answer is an error.
    pub fn read(&mut self, offset: u64, length: u64) -> Result<Vec<u8>> {
        let answer = self.ask(Request::new(cmd::READ, offset, length))?;
        ensure!(answer.error == 0, "read: {}: {}", answer.error, answer.message);
        Ok(answer.data)
    }

    /// Waits until the server closes, without another message before that.
    ///
    /// # Errors
    /// It sends something, or does not close.
    pub fn closed(mut self) -> Result<()> {
        ensure!(
            self.ready.is_empty() && self.ledger.pending() == 0,
            "an answer is left"
        );
        closed(&mut self.stream)
    }

    /// Disconnects in good order.
    ///
    /// # Errors
    /// The server does not close, or sends something.
    pub fn disconnect(mut self) -> Result<()> {
        self.send(Request::new(cmd::DISC, 0, 0))?;
        self.closed()
    }
}

/// Waits until the server closes, without another byte.
///
/// # Errors
/// It sends something, or does not close.
pub fn closed(stream: &mut UnixStream) -> Result<()> {
    let mut buffer = [0; 4096];
    match stream.read(&mut buffer) {
        Ok(0) => Ok(()),
        Ok(read) => bail!("{read} more bytes: {:x?}", &buffer[..read.min(64)]),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
        Err(error) => Err(error).context("wait for the end"),
    }
}

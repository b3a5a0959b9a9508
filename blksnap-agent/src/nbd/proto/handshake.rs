//! Handshake: from the greeting to the transmission ("Fixed newstyle negotiation").
//!
//! The server speaks first: [`Handshake::start`] gives the greeting. Then the caller passes what it received to
//! [`Handshake::receive`], which handles at most one message a call and never takes bytes beyond it: what follows
//! `NBD_OPT_GO` belongs to the transmission. One message a call also bounds the answers: the caller sends them
//! before it asks for more.
//!
//! What is kept of the input is one option, at most [`MAX_OPTION_DATA`] bytes and its header; longer data is
//! skipped and answered with an error. No input can make the server do more than look up names.
//!
//! # TLS
//! The caller says in which of the specification's modes ([`Tls`]) the session is. After [`Step::StartTls`] it sends the
//! output, carries the TLS handshake out, and calls [`Handshake::tls_started`]; what it received before belongs to
//! nobody: bytes behind `NBD_OPT_STARTTLS` end the session, and nothing that was negotiated in the clear counts
//! afterwards, so that nobody in between can prepare a session.

use zerocopy::IntoBytes;

use super::catalog::Catalog;
use super::context::SelectedContext;
use super::limits::{MAX_OPTION_DATA, MAX_OPTIONS, MAX_STRING};
use super::option::Refusal;
use super::session::{Framing, Session};
use super::wire::{
    ClientFlags, GREETING_MAGIC, Greeting, HandshakeFlags, OPTION_MAGIC, OptionHeader, OptionReplyType,
    OptionType,
};

/// How the session stands to TLS ("Server-side requirements").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tls {
    /// Not available (NOTLS).
    #[default]
    Unavailable,
    /// Available, and no export requires it (SELECTIVETLS without a TLS-only export).
    Offered,
    /// Nothing but `NBD_OPT_STARTTLS` and `NBD_OPT_ABORT` is answered without it (FORCEDTLS).
    Required,
    /// In use.
    Active,
}

/// Outcome of a handshake.
#[derive(Clone, Debug)]
pub struct Established<E> {
    /// The caller's handle of the export.
    pub export: E,
    /// Canonical name of the export.
    pub name: String,
    /// What the transmission must know.
    pub session: Session,
}

/// What the caller does next.
#[derive(Debug)]
pub enum Step<E> {
    /// Read more from the client.
    NeedMore,
    /// Send the output, then call again: input may be left.
    Replied,
    /// Send the output, start TLS on the connection, say so with [`Handshake::tls_started`], then call again. The
    /// input is empty.
    StartTls,
    /// Send the output; what is left of the input and all that follows is transmission.
    Enter(Box<Established<E>>),
    /// Send the output, then close.
    End,
}

/// Why the session ends without an answer: the specification allows none here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// Client flags that the server did not offer.
    #[error("client flags {0:#x} are unknown")]
    ClientFlags(u32),
    /// No option starts here.
    #[error("an option starts with {0:#x} in place of the magic number")]
    Magic(u64),
    /// A client without fixed newstyle can only choose an export.
    #[error("option {0} needs fixed newstyle, which the client did not ask for")]
    NotFixed(u32),
    /// The chosen export does not exist, and the option has no error reply.
    #[error("NBD_OPT_EXPORT_NAME names no export")]
    ExportName,
    /// The client keeps sending options.
    #[error("more than {MAX_OPTIONS} options")]
    TooManyOptions,
    /// The client went on in the clear where TLS begins.
    #[error("data in the clear follows NBD_OPT_STARTTLS")]
    Plaintext,
    /// Input after the handshake ended, or while TLS is being started.
    #[error("the handshake is over")]
    Over,
}

/// How an option is answered once its data was skipped.
#[derive(Clone, Copy, Debug)]
pub(super) enum Answer {
    /// Acknowledge and end.
    Abort,
    /// List the exports.
    List,
    /// Use this form of requests and replies.
    Framing(OptionType, Framing),
    /// Acknowledge and start TLS.
    StartTls,
    /// Refuse.
    Refuse(Refusal),
}

/// What an option's header decides.
#[derive(Clone, Copy, Debug)]
enum Plan {
    /// Drop the data and answer so.
    Answer(Answer),
    /// Keep the data, the answer depends on it.
    Collect(OptionType),
}

#[derive(Clone, Copy, Debug)]
pub(super) enum State {
    /// Waiting for the client flags.
    ClientFlags,
    /// Waiting for the header of an option.
    Header,
    /// Collecting the data of an option that carries some.
    Data { option: OptionType, length: usize },
    /// Dropping the data of an option.
    Skip { option: u32, left: u32, answer: Answer },
    /// The caller starts TLS.
    Upgrade,
    /// Ended or in transmission.
    Over,
}

/// Contexts of one export.
#[derive(Debug)]
pub(super) struct Selection {
    pub(super) export: String,
    pub(super) contexts: Vec<SelectedContext>,
}

/// The server's side of one handshake.
#[derive(Debug)]
pub struct Handshake {
    pub(super) state: State,
    tls: Tls,
    /// What has arrived of the message that `state` waits for.
    buffer: Vec<u8>,
    fixed: bool,
    pub(super) no_zeroes: bool,
    pub(super) framing: Framing,
    pub(super) selection: Option<Selection>,
    options: u32,
    ending: bool,
}

impl Handshake {
    /// Starts a handshake and appends the greeting to `out`.
    #[must_use]
    pub fn start(tls: Tls, out: &mut Vec<u8>) -> Self {
        let flags = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
        let greeting = Greeting {
            magic: GREETING_MAGIC.into(),
            option_magic: OPTION_MAGIC.into(),
            flags: flags.bits().into(),
        };
        out.extend_from_slice(greeting.as_bytes());
        Self {
            state: State::ClientFlags,
            tls,
            buffer: Vec::new(),
            fixed: false,
            no_zeroes: false,
            framing: Framing::Simple,
            selection: None,
            options: 0,
            ending: false,
        }
    }

    /// TLS is in use from now on. Everything that was negotiated before is forgotten.
    pub fn tls_started(&mut self) {
        self.tls = Tls::Active;
        self.framing = Framing::Simple;
        self.selection = None;
        if let State::Upgrade = self.state {
            self.state = State::Header;
        }
    }

    /// From now on every option but `NBD_OPT_ABORT` is answered with `NBD_REP_ERR_SHUTDOWN`.
    pub fn shut_down(&mut self) {
        self.ending = true;
    }

    /// Bytes of input kept, at most [`MAX_OPTION_DATA`].
    #[must_use]
    pub fn buffered(&self) -> usize {
        self.buffer.len()
    }

    /// Takes at most one message off the front of `input` and appends the answer to `out`.
    ///
    /// # Errors
    /// The session must end without an answer.
    pub fn receive<C: Catalog>(
        &mut self,
        input: &mut &[u8],
        catalog: &C,
        out: &mut Vec<u8>,
    ) -> Result<Step<C::Export>, HandshakeError> {
        loop {
            match self.state {
                State::ClientFlags => {
                    let Some(flags) = self.take::<4>(input) else {
                        return Ok(Step::NeedMore);
                    };
                    self.client_flags(u32::from_be_bytes(flags))?;
                }
                State::Header => {
                    let Some(header) = self.take::<{ size_of::<OptionHeader>() }>(input) else {
                        return Ok(Step::NeedMore);
                    };
                    self.state = self.plan(header)?;
                }
                State::Data { option, length } => {
                    if !self.fill(input, length) {
                        return Ok(Step::NeedMore);
                    }
                    let data = std::mem::take(&mut self.buffer);
                    self.state = State::Header;
                    return self.answer_data(option, &data, catalog, out);
                }
                State::Skip { option, left, answer } => {
                    let skipped = input.len().min(left as usize);
                    *input = &input[skipped..];
                    let left = left - u32::try_from(skipped).unwrap_or(left);
                    if left > 0 {
                        self.state = State::Skip { option, left, answer };
                        return Ok(Step::NeedMore);
                    }
                    self.state = State::Header;
                    if let (Answer::StartTls, false) = (answer, input.is_empty()) {
                        return Err(HandshakeError::Plaintext);
                    }
                    return Ok(self.answer(option, answer, catalog, out));
                }
                State::Upgrade | State::Over => return Err(HandshakeError::Over),
            }
        }
    }

    /// Moves input to the buffer until it holds `length` bytes; false if the input ended first.
    fn fill(&mut self, input: &mut &[u8], length: usize) -> bool {
        let (taken, rest) = input.split_at(input.len().min(length - self.buffer.len()));
        self.buffer.extend_from_slice(taken);
        *input = rest;
        self.buffer.len() == length
    }

    /// Takes exactly `N` bytes, or keeps what there is for the next call.
    fn take<const N: usize>(&mut self, input: &mut &[u8]) -> Option<[u8; N]> {
        if !self.fill(input, N) {
            return None;
        }
        let bytes = self.buffer.first_chunk::<N>().copied();
        self.buffer.clear();
        bytes
    }

    fn client_flags(&mut self, number: u32) -> Result<(), HandshakeError> {
        let flags = ClientFlags::from_bits(number).ok_or(HandshakeError::ClientFlags(number))?;
        self.fixed = flags.contains(ClientFlags::FIXED_NEWSTYLE);
        self.no_zeroes = flags.contains(ClientFlags::NO_ZEROES);
        self.state = State::Header;
        Ok(())
    }

    /// Decides from an option's header what to do with its data.
    fn plan(&mut self, header: [u8; size_of::<OptionHeader>()]) -> Result<State, HandshakeError> {
        let header: OptionHeader = zerocopy::transmute!(header);
        if header.magic.get() != OPTION_MAGIC {
            return Err(HandshakeError::Magic(header.magic.get()));
        }
        if self.options == MAX_OPTIONS {
            return Err(HandshakeError::TooManyOptions);
        }
        self.options += 1;
        let (number, length) = (header.option.get(), header.length.get());
        let option = OptionType::from_number(number);
        if !self.fixed && option != Some(OptionType::ExportName) {
            return Err(HandshakeError::NotFixed(number));
        }
        if option == Some(OptionType::ExportName)
            && (self.ending
                || length as usize > MAX_STRING
                || self.tls == Tls::Required
                // These need `NBD_OPT_GO`.
                || self.framing == Framing::Extended)
        {
            return Err(HandshakeError::ExportName);
        }
        if option == Some(OptionType::SetMetaContext) {
            // A failing one replaces the selection too.
            self.selection = None;
        }
        let answer = match self.consider(option, length) {
            Plan::Answer(answer) => answer,
            Plan::Collect(option) if length <= MAX_OPTION_DATA => {
                let length = length as usize;
                return Ok(State::Data { option, length });
            }
            Plan::Collect(_) => Answer::Refuse(Refusal::too_big("this option's data is too long")),
        };
        Ok(State::Skip {
            option: number,
            left: length,
            answer,
        })
    }

    /// What to do with an option, from its header.
    fn consider(&self, option: Option<OptionType>, length: u32) -> Plan {
        let refuse = |reply, message| Plan::Answer(Answer::Refuse(Refusal { reply, message }));
        match option {
            Some(OptionType::Abort) => Plan::Answer(Answer::Abort),
            _ if self.tls == Tls::Required && option != Some(OptionType::StartTls) => refuse(
                OptionReplyType::ErrTlsRequired,
                "this server speaks with TLS only: start it first",
            ),
            _ if self.ending => refuse(OptionReplyType::ErrShutdown, "the server is shutting down"),
            Some(
                OptionType::List
                | OptionType::StructuredReply
                | OptionType::ExtendedHeaders
                | OptionType::StartTls,
            ) if length > 0 => refuse(OptionReplyType::ErrInvalid, "this option carries no data"),
            Some(OptionType::List) => Plan::Answer(Answer::List),
            Some(OptionType::StructuredReply) if self.framing == Framing::Extended => refuse(
                OptionReplyType::ErrExtendedHeadersRequired,
                "extended headers were negotiated, which include structured replies",
            ),
            Some(option @ OptionType::StructuredReply) => {
                Plan::Answer(Answer::Framing(option, Framing::Structured))
            }
            Some(option @ OptionType::ExtendedHeaders) => {
                Plan::Answer(Answer::Framing(option, Framing::Extended))
            }
            Some(OptionType::StartTls) => match self.tls {
                Tls::Unavailable => refuse(OptionReplyType::ErrUnsupported, "this server does not offer TLS"),
                Tls::Active => refuse(OptionReplyType::ErrInvalid, "TLS is in use already"),
                Tls::Offered | Tls::Required => Plan::Answer(Answer::StartTls),
            },
            Some(
                option @ (OptionType::ExportName
                | OptionType::Info
                | OptionType::Go
                | OptionType::ListMetaContext
                | OptionType::SetMetaContext),
            ) => Plan::Collect(option),
            None => refuse(OptionReplyType::ErrUnsupported, "this option is unknown"),
        }
    }
}

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
//! The server is in the specification's NOTLS mode: `NBD_OPT_STARTTLS` is answered with `NBD_REP_ERR_UNSUP`.

use zerocopy::IntoBytes;

use super::catalog::{BlockSizes, Catalog, ExportFacts, Found};
use super::context::{ContextName, SelectedContext};
use super::limits::{MAX_CONTEXTS, MAX_OPTION_DATA, MAX_OPTIONS, MAX_STRING};
use super::option::{ContextRequest, InfoRequest, Refusal, string, write_ack, write_refusal, write_reply};
use super::transmission::{Framing, Session};
use super::wire::{
    ClientFlags, EXPORT_NAME_ZEROES, ExportNameReply, GREETING_MAGIC, Greeting, HandshakeFlags,
    InfoBlockSize, InfoExport, InfoType, OPTION_MAGIC, OptionHeader, OptionReplyType, OptionType,
    TransmissionFlags,
};

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
    /// Input after the handshake ended.
    #[error("the handshake is over")]
    Over,
}

/// How an option is answered once its data was skipped.
#[derive(Clone, Copy, Debug)]
enum Answer {
    /// Acknowledge and end.
    Abort,
    /// List the exports.
    List,
    /// Use this form of requests and replies.
    Framing(OptionType, Framing),
    /// Refuse.
    Refuse(Refusal),
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// Waiting for the client flags.
    ClientFlags,
    /// Waiting for the header of an option.
    Header,
    /// Collecting the data of an option that carries some.
    Data { option: OptionType, length: usize },
    /// Dropping the data of an option.
    Skip { option: u32, left: u32, answer: Answer },
    /// Ended or in transmission.
    Over,
}

/// Contexts of one export.
#[derive(Debug)]
struct Selection {
    export: String,
    contexts: Vec<SelectedContext>,
}

/// The server's side of one handshake.
#[derive(Debug)]
pub struct Handshake {
    state: State,
    /// What has arrived of the message that `state` waits for.
    buffer: Vec<u8>,
    fixed: bool,
    no_zeroes: bool,
    framing: Framing,
    selection: Option<Selection>,
    options: u32,
    ending: bool,
}

impl Handshake {
    /// Starts a handshake and appends the greeting to `out`.
    #[must_use]
    pub fn start(out: &mut Vec<u8>) -> Self {
        let flags = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
        let greeting = Greeting {
            magic: GREETING_MAGIC.into(),
            option_magic: OPTION_MAGIC.into(),
            flags: flags.bits().into(),
        };
        out.extend_from_slice(greeting.as_bytes());
        Self {
            state: State::ClientFlags,
            buffer: Vec::new(),
            fixed: false,
            no_zeroes: false,
            framing: Framing::Simple,
            selection: None,
            options: 0,
            ending: false,
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
                    return Ok(self.answer(option, answer, catalog, out));
                }
                State::Over => return Err(HandshakeError::Over),
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
        let answer = match option {
            // Extended headers need `NBD_OPT_GO`.
            Some(OptionType::ExportName)
                if self.ending || length as usize > MAX_STRING || self.framing == Framing::Extended =>
            {
                return Err(HandshakeError::ExportName);
            }
            Some(OptionType::Abort) => Answer::Abort,
            _ if self.ending => Answer::Refuse(Refusal {
                reply: OptionReplyType::ErrShutdown,
                message: "the server is shutting down",
            }),
            Some(
                option @ (OptionType::ExportName
                | OptionType::Info
                | OptionType::Go
                | OptionType::ListMetaContext
                | OptionType::SetMetaContext),
            ) => {
                if option == OptionType::SetMetaContext {
                    // A failing one replaces the selection too.
                    self.selection = None;
                }
                if length <= MAX_OPTION_DATA {
                    let length = length as usize;
                    return Ok(State::Data { option, length });
                }
                Answer::Refuse(Refusal::too_big("this option's data is too long"))
            }
            Some(
                OptionType::List
                | OptionType::StructuredReply
                | OptionType::ExtendedHeaders
                | OptionType::StartTls,
            ) if length > 0 => Answer::Refuse(Refusal::invalid("this option carries no data")),
            Some(OptionType::List) => Answer::List,
            Some(OptionType::StructuredReply) if self.framing == Framing::Extended => {
                Answer::Refuse(Refusal {
                    reply: OptionReplyType::ErrExtendedHeadersRequired,
                    message: "extended headers were negotiated, which include structured replies",
                })
            }
            Some(option @ OptionType::StructuredReply) => Answer::Framing(option, Framing::Structured),
            Some(option @ OptionType::ExtendedHeaders) => Answer::Framing(option, Framing::Extended),
            Some(OptionType::StartTls) => {
                Answer::Refuse(Refusal::unsupported("this server does not offer TLS"))
            }
            None => Answer::Refuse(Refusal::unsupported("this option is unknown")),
        };
        Ok(State::Skip {
            option: number,
            left: length,
            answer,
        })
    }

    /// Answers an option that needs no data.
    fn answer<C: Catalog>(
        &mut self,
        number: u32,
        answer: Answer,
        catalog: &C,
        out: &mut Vec<u8>,
    ) -> Step<C::Export> {
        match answer {
            Answer::Abort => {
                write_ack(out, OptionType::Abort);
                self.state = State::Over;
                return Step::End;
            }
            Answer::List => {
                for export in catalog.list() {
                    let name = export.name.as_bytes();
                    let length = u32::try_from(name.len()).unwrap_or(u32::MAX).to_be_bytes();
                    let parts: [&[u8]; 3] = [&length, name, export.description.as_bytes()];
                    write_reply(out, number, OptionReplyType::Server, &parts);
                }
                write_ack(out, OptionType::List);
            }
            Answer::Framing(option, framing) => {
                self.framing = framing;
                write_ack(out, option);
            }
            Answer::Refuse(refusal) => write_refusal(out, number, refusal),
        }
        Step::Replied
    }

    /// Answers an option from its data.
    fn answer_data<C: Catalog>(
        &mut self,
        option: OptionType,
        data: &[u8],
        catalog: &C,
        out: &mut Vec<u8>,
    ) -> Result<Step<C::Export>, HandshakeError> {
        let answered = match option {
            OptionType::ExportName => {
                let name = string(data).map_err(|_| HandshakeError::ExportName)?;
                let found = catalog.find(name).ok_or(HandshakeError::ExportName)?;
                self.write_export_name(&found.facts, out);
                return Ok(self.enter(found));
            }
            OptionType::Info | OptionType::Go => match self.info(option, data, catalog, out) {
                Ok(found) if option == OptionType::Go => return Ok(self.enter(found)),
                other => other.map(drop),
            },
            OptionType::ListMetaContext => self.list_contexts(data, catalog, out),
            OptionType::SetMetaContext => self.set_contexts(data, catalog, out),
            _ => Err(Refusal::unsupported("this option is unknown")),
        };
        if let Err(refusal) = answered {
            write_refusal(out, option.number(), refusal);
        }
        Ok(Step::Replied)
    }

    /// Transmission flags that this client gets for an export.
    fn flags(&self, facts: &ExportFacts) -> TransmissionFlags {
        let mut flags =
            TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH | TransmissionFlags::SEND_CACHE;
        flags.set(TransmissionFlags::ROTATIONAL, facts.rotational);
        flags.set(TransmissionFlags::CAN_MULTI_CONN, facts.multi_conn);
        flags.set(TransmissionFlags::SEND_DF, self.framing.has_chunks());
        flags.set(
            TransmissionFlags::BLOCK_STATUS_PAYLOAD,
            self.framing == Framing::Extended && !self.selected(facts).is_empty(),
        );
        if facts.read_only {
            flags |= TransmissionFlags::READ_ONLY;
        } else {
            flags |= TransmissionFlags::SEND_FUA
                | TransmissionFlags::SEND_TRIM
                | TransmissionFlags::SEND_WRITE_ZEROES
                | TransmissionFlags::SEND_FAST_ZERO;
        }
        flags
    }

    fn write_export_name(&self, facts: &ExportFacts, out: &mut Vec<u8>) {
        let reply = ExportNameReply {
            size: facts.size.into(),
            flags: self.flags(facts).bits().into(),
        };
        out.extend_from_slice(reply.as_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; EXPORT_NAME_ZEROES]);
        }
    }

    /// `NBD_OPT_INFO` and `NBD_OPT_GO`: the same answers.
    fn info<C: Catalog>(
        &self,
        option: OptionType,
        data: &[u8],
        catalog: &C,
        out: &mut Vec<u8>,
    ) -> Result<Found<C::Export>, Refusal> {
        let request = InfoRequest::parse(data)?;
        let found = catalog.find(request.name).ok_or(Refusal::unknown_export())?;
        let facts = &found.facts;
        let mut reply = |parts: &[&[u8]]| write_reply(out, option.number(), OptionReplyType::Info, parts);
        reply(&[InfoExport {
            kind: InfoType::Export.number().into(),
            size: facts.size.into(),
            flags: self.flags(facts).bits().into(),
        }
        .as_bytes()]);
        if request.wants_name || request.name != facts.name {
            reply(&[&InfoType::Name.number().to_be_bytes(), facts.name.as_bytes()]);
        }
        if request.wants_description && !facts.description.is_empty() {
            let kind = InfoType::Description.number().to_be_bytes();
            reply(&[&kind, facts.description.as_bytes()]);
        }
        if request.wants_block_size || facts.block_sizes != BlockSizes::DEFAULT {
            reply(&[InfoBlockSize {
                kind: InfoType::BlockSize.number().into(),
                minimum: facts.block_sizes.minimum().into(),
                preferred: facts.block_sizes.preferred().into(),
                maximum: facts.block_sizes.maximum().into(),
            }
            .as_bytes()]);
        }
        write_ack(out, option);
        Ok(found)
    }

    fn contexts_of<'a, C: Catalog>(
        &self,
        data: &'a [u8],
        catalog: &C,
    ) -> Result<(ContextRequest<'a>, ExportFacts), Refusal> {
        if !self.framing.has_chunks() {
            return Err(Refusal::invalid(
                "metadata contexts need structured replies: negotiate them first",
            ));
        }
        let request = ContextRequest::parse(data)?;
        let found = catalog.find(request.name).ok_or(Refusal::unknown_export())?;
        Ok((request, found.facts))
    }

    fn list_contexts<C: Catalog>(&self, data: &[u8], catalog: &C, out: &mut Vec<u8>) -> Result<(), Refusal> {
        let (request, facts) = self.contexts_of(data, catalog)?;
        for name in &facts.contexts {
            if request.queries.is_empty() || request.queries.iter().any(|query| name.is_listed_by(query)) {
                write_context(out, OptionType::ListMetaContext, 0, name);
            }
        }
        write_ack(out, OptionType::ListMetaContext);
        Ok(())
    }

    fn set_contexts<C: Catalog>(
        &mut self,
        data: &[u8],
        catalog: &C,
        out: &mut Vec<u8>,
    ) -> Result<(), Refusal> {
        let (request, facts) = self.contexts_of(data, catalog)?;
        let contexts: Vec<SelectedContext> = (1..)
            .zip(&facts.contexts)
            .filter(|(_, name)| request.queries.iter().any(|query| name.is_selected_by(query)))
            .map(|(id, name)| SelectedContext {
                id,
                name: name.clone(),
            })
            .collect();
        if contexts.len() > MAX_CONTEXTS {
            return Err(Refusal::too_big("at most 16 metadata contexts can be selected"));
        }
        for context in &contexts {
            write_context(out, OptionType::SetMetaContext, context.id, &context.name);
        }
        write_ack(out, OptionType::SetMetaContext);
        self.selection = Some(Selection {
            export: facts.name,
            contexts,
        });
        Ok(())
    }

    /// Contexts that were selected for this export: they count only for the export they were selected on, and only if
    /// it still has all of them (another export may have taken the name meanwhile).
    fn selected(&self, facts: &ExportFacts) -> &[SelectedContext] {
        self.selection
            .as_ref()
            .filter(|selection| {
                selection.export == facts.name
                    && selection
                        .contexts
                        .iter()
                        .all(|context| facts.contexts.contains(&context.name))
            })
            .map(|selection| selection.contexts.as_slice())
            .unwrap_or_default()
    }

    /// Ends the handshake with this export.
    fn enter<E>(&mut self, found: Found<E>) -> Step<E> {
        self.state = State::Over;
        let facts = found.facts;
        let session = Session {
            framing: self.framing,
            size: facts.size,
            block_sizes: facts.block_sizes,
            flags: self.flags(&facts),
            contexts: self.selected(&facts).to_vec(),
        };
        Step::Enter(Box::new(Established {
            export: found.export,
            name: facts.name,
            session,
        }))
    }
}

/// Appends `NBD_REP_META_CONTEXT`.
fn write_context(out: &mut Vec<u8>, option: OptionType, id: u32, name: &ContextName) {
    let parts: [&[u8]; 2] = [&id.to_be_bytes(), name.as_str().as_bytes()];
    write_reply(out, option.number(), OptionReplyType::MetaContext, &parts);
}

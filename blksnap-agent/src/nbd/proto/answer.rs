//! Answer: what the options of the handshake are answered with ("Option types").

use zerocopy::IntoBytes;

use super::catalog::{BlockSizes, Catalog, ExportFacts, Found};
use super::context::{ContextName, SelectedContext};
use super::handshake::{Answer, Established, Handshake, HandshakeError, Selection, State, Step};
use super::limits::{MAX_CONTEXTS, MAX_MESSAGE};
use super::option::{ContextRequest, InfoRequest, Refusal, string, write_ack, write_refusal, write_reply};
use super::session::{Framing, Session};
use super::wire::{
    EXPORT_NAME_ZEROES, ExportNameReply, InfoBlockSize, InfoExport, InfoType, OptionReplyType, OptionType,
    TransmissionFlags,
};

impl Handshake {
    /// Answers an option that needs no data.
    pub(super) fn answer<C: Catalog>(
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
            Answer::StartTls => {
                write_ack(out, OptionType::StartTls);
                self.state = State::Upgrade;
                return Step::StartTls;
            }
            Answer::Refuse(refusal) => write_refusal(out, number, refusal),
        }
        Step::Replied
    }

    /// Answers an option from its data.
    pub(super) fn answer_data<C: Catalog>(
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
    ) -> Result<(ContextRequest<'a>, Found<C::Export>), Refusal> {
        if !self.framing.has_chunks() {
            return Err(Refusal::invalid(
                "metadata contexts need structured replies: negotiate them first",
            ));
        }
        let request = ContextRequest::parse(data)?;
        let found = catalog.find(request.name).ok_or(Refusal::unknown_export())?;
        Ok((request, found))
    }

    fn list_contexts<C: Catalog>(&self, data: &[u8], catalog: &C, out: &mut Vec<u8>) -> Result<(), Refusal> {
        let (request, found) = self.contexts_of(data, catalog)?;
        for name in &found.facts.contexts {
            if request.queries.is_empty()
                || request
                    .queries
                    .iter()
                    .any(|query| name.is_listed_by(query.as_bytes()))
            {
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
        let (request, Found { facts, export }) = self.contexts_of(data, catalog)?;
        let missing = |query: &&&str| {
            !facts
                .contexts
                .iter()
                .any(|name| name.is_selected_by(query.as_bytes()))
        };
        let refused = request.queries.iter().filter(missing);
        if let Some(reason) = refused
            .filter_map(|query| catalog.refuse_context(&export, query))
            .next()
        {
            let reason = &reason[..reason.floor_char_boundary(MAX_MESSAGE)];
            let (option, invalid) = (OptionType::SetMetaContext, OptionReplyType::ErrInvalid);
            write_reply(out, option.number(), invalid, &[reason.as_bytes()]);
            return Ok(());
        }
        let contexts: Vec<SelectedContext> = (1..)
            .zip(&facts.contexts)
            .filter(|(_, name)| {
                request
                    .queries
                    .iter()
                    .any(|query| name.is_selected_by(query.as_bytes()))
            })
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

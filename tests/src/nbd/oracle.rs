//! Oracle: the server's protocol core beside the model and the parser, on any input in any pieces.
//!
//! The functions panic when the core is wrong. Property tests give them what clients say, fuzz targets give them
//! anything.

use std::collections::BTreeSet;

use blksnap_agent::nbd::proto::wire::{CommandType, TransmissionFlags};
use blksnap_agent::nbd::proto::{
    self, BlockSizes, Catalog, Command, ContextName, Event, ExportFacts, Found, Handshake, Listed, Requests,
    SelectedContext, Session, StatusExtent, Step, Tls, reply,
};

use super::build::{Framing, Request};
use super::model::{Agreed, End, Verdict};
use super::parse::{Ledger, OptionReply};
use super::{flag, opt, rep, trans};

/// How the input is cut: after each of these many bytes, again and again; whole without any.
pub type Cuts<'a> = &'a [u8];

/// The pieces of `input`.
fn pieces<'a>(mut input: &'a [u8], cuts: Cuts<'_>) -> Vec<&'a [u8]> {
    let mut pieces = Vec::new();
    let mut cuts = cuts.iter().cycle();
    while !input.is_empty() {
        let length = cuts.next().map_or(input.len(), |cut| usize::from(*cut));
        let (piece, rest) = input.split_at(length.min(input.len()));
        pieces.push(piece);
        // A round of cuts of no bytes would not end.
        if piece.is_empty() && cuts.clone().take(256).all(|cut| *cut == 0) {
            pieces.push(rest);
            break;
        }
        input = rest;
    }
    pieces
}

/// Byte by byte, where that takes no long time.
const fn smallest(input: &[u8]) -> Cuts<'static> {
    if input.len() > 1 << 12 { &[251] } else { &[1] }
}

/// Exports of the handshake: one with all contexts, one with large blocks, and one that takes writes.
struct Shelf;

impl Shelf {
    const SIZE: u64 = 1 << 20;

    fn contexts() -> Vec<ContextName> {
        [
            "base:allocation",
            "qemu:dirty-bitmap:last",
            "qemu:dirty-bitmap:since-x-1",
        ]
        .iter()
        .map(|name| ContextName::new(name).expect("a name"))
        .collect()
    }
}

impl Catalog for Shelf {
    type Export = String;

    fn list(&self) -> Vec<Listed> {
        ["disk", "coarse"]
            .iter()
            .map(|name| Listed {
                name: (*name).to_owned(),
                description: format!("an export {name}"),
            })
            .collect()
    }

    fn find(&self, name: &str) -> Option<Found<String>> {
        let name = if name.is_empty() { "disk" } else { name };
        let block_sizes = match name {
            "disk" | "scratch" => BlockSizes::DEFAULT,
            "coarse" => BlockSizes::new(4096, 4096, 1 << 16).expect("block sizes"),
            _ => return None,
        };
        let facts = ExportFacts {
            name: name.to_owned(),
            description: "an export".to_owned(),
            size: Self::SIZE,
            block_sizes,
            read_only: name != "scratch",
            rotational: name == "coarse",
            multi_conn: true,
            contexts: Self::contexts(),
        };
        Some(Found {
            facts,
            export: name.to_owned(),
        })
    }

    fn refuse_context(&self, _: &String, query: &str) -> Option<String> {
        query.contains("since").then(|| format!("{query} is too old"))
    }
}

/// How a handshake went: output, how it ended, bytes that were not taken.
#[derive(Debug, PartialEq, Eq)]
struct Handshaken {
    output: Vec<u8>,
    end: String,
    left: Vec<u8>,
    /// Length of the output when TLS began.
    tls_at: Option<usize>,
    /// What the transmission begins with.
    session: Option<Session>,
}

fn shake_hands(tls: Tls, pieces: &[&[u8]]) -> Handshaken {
    let mut output = Vec::new();
    let mut handshake = Handshake::start(tls, &mut output);
    let (mut end, mut tls_at, mut session) = ("open".to_owned(), None, None);
    let mut left = Vec::new();
    let mut over = false;
    for piece in pieces {
        let mut input = *piece;
        while !over {
            let before = output.len();
            let step = handshake.receive(&mut input, &Shelf, &mut output);
            assert!(
                handshake.buffered() <= 64 << 10,
                "{} bytes are kept",
                handshake.buffered()
            );
            assert!(
                output.len() - before <= 64 << 10,
                "one message is answered with much"
            );
            match step {
                Ok(Step::NeedMore) => {
                    assert!(input.is_empty(), "input is left though more is wanted");
                    break;
                }
                Ok(Step::Replied) => continue,
                Ok(Step::StartTls) => {
                    assert!(input.is_empty(), "TLS begins behind data in the clear");
                    tls_at = Some(output.len());
                    handshake.tls_started();
                    continue;
                }
                Ok(Step::Enter(established)) => {
                    end = format!("entered {}", established.export);
                    session = Some(established.session);
                }
                Ok(Step::End) => end = "ended".to_owned(),
                Err(error) => end = error.to_string(),
            }
            over = true;
        }
        left.extend_from_slice(input);
    }
    Handshaken {
        output,
        end,
        left,
        tls_at,
        session,
    }
}

/// Checks a handshake: `input` is what the client sends after the greeting.
///
/// # Panics
/// The core is wrong.
pub fn check_handshake(tls: Tls, input: &[u8], cuts: Cuts<'_>) {
    let whole = shake_hands(tls, &[input]);
    for cuts in [cuts, smallest(input)] {
        let told = shake_hands(tls, &pieces(input, cuts));
        // Whether TLS begins depends on what comes in one piece with STARTTLS; elsewhere the cuts change nothing.
        if told.tls_at.is_some() || whole.end.contains("in the clear") {
            check_replies(tls, input, &told);
        } else {
            assert_eq!(told, whole, "cut as {cuts:?}");
        }
    }
    check_replies(tls, input, &whole);
}

/// An option of the client, with the length that it claims and the data that is there.
struct Sent<'a> {
    number: u32,
    length: u32,
    data: &'a [u8],
}

fn options(mut input: &[u8]) -> Vec<Sent<'_>> {
    let mut options = Vec::new();
    while let Some((header, rest)) = input.split_at_checked(16) {
        let number = |at: usize| {
            header[at..at + 4]
                .iter()
                .fold(0_u32, |number, byte| number << 8 | u32::from(*byte))
        };
        if &header[..8] != b"IHAVEOPT" {
            break;
        }
        let (data, rest) = rest.split_at(rest.len().min(number(12) as usize));
        options.push(Sent {
            number: number(8),
            length: number(12),
            data,
        });
        input = rest;
    }
    options
}

/// What a session should have negotiated, from its options and their replies.
#[derive(Debug, Default)]
struct Negotiated {
    framing: u32,
    /// Export and identifiers.
    selected: (String, Vec<u32>),
}

impl Negotiated {
    /// The export that an option names; an empty name is the default export.
    fn export(data: &[u8]) -> String {
        let length = data
            .first_chunk::<4>()
            .map_or(0, |length| u32::from_be_bytes(*length));
        let name = data.get(4..4 + length as usize).unwrap_or_default();
        match String::from_utf8_lossy(name).into_owned() {
            name if name.is_empty() => "disk".to_owned(),
            name => name,
        }
    }

    fn follow(&mut self, sent: &Sent<'_>, kind: u32, ids: Vec<u32>) {
        match sent.number {
            opt::STRUCTURED_REPLY | opt::EXTENDED_HEADERS if kind == rep::ACK => {
                self.framing = self.framing.max(sent.number);
            }
            opt::SET_META_CONTEXT if kind == rep::ACK => {
                let distinct: BTreeSet<u32> = ids.iter().copied().collect();
                assert_eq!(distinct.len(), ids.len(), "identifiers are unique");
                self.selected = (Self::export(sent.data), ids);
            }
            // A selection that fails replaces the one before, too.
            opt::SET_META_CONTEXT => self.selected = Default::default(),
            _ => {}
        }
    }

    fn check(&self, export: &str, session: &Session) {
        let framing = match session.framing {
            proto::Framing::Simple => 0,
            proto::Framing::Structured => opt::STRUCTURED_REPLY,
            proto::Framing::Extended => opt::EXTENDED_HEADERS,
        };
        assert_eq!(framing, self.framing);
        let ids: Vec<u32> = session.contexts.iter().map(|context| context.id).collect();
        let (of, selected) = &self.selected;
        let wanted = if of == export { selected.as_slice() } else { &[] };
        assert_eq!(
            ids, wanted,
            "contexts of {export}, selected were {:?}",
            self.selected
        );
    }
}

/// Checks that the replies answer the options, one after the other.
fn check_replies(tls: Tls, input: &[u8], told: &Handshaken) {
    let mut output = told.output.as_slice();
    assert_eq!(output.get(..18), Some(b"NBDMAGICIHAVEOPT\0\x03".as_slice()));
    output = &output[18..];
    let options = options(input.get(4..).unwrap_or_default());
    let (mut secure, mut negotiated) = (false, Negotiated::default());
    let mut options = options.iter();
    let (mut infos, mut ids) = (0, Vec::new());
    while !output.is_empty() {
        if told.tls_at == Some(told.output.len() - output.len()) {
            (secure, negotiated) = (true, Negotiated::default());
        }
        let reply = match OptionReply::take(&mut output) {
            Ok(Some(reply)) => reply,
            other => {
                // EXPORT_NAME is answered without a header, at the very end.
                assert!([10, 134].contains(&output.len()), "{other:?}");
                let sent = options.next().expect("an option");
                assert_eq!(sent.number, opt::EXPORT_NAME, "{other:?}");
                return;
            }
        };
        infos += usize::from(reply.kind == rep::INFO && reply.data.starts_with(&[0, 0]));
        if !reply.is_final() {
            let wanted = match reply.kind {
                rep::SERVER => [opt::LIST, opt::LIST],
                rep::INFO => [opt::INFO, opt::GO],
                _ => [opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT],
            };
            assert!(wanted.contains(&reply.option), "{reply:?}");
            if reply.kind == rep::META_CONTEXT {
                ids.extend(reply.data.first_chunk::<4>().map(|id| u32::from_be_bytes(*id)));
            }
            continue;
        }
        let sent = options.next().expect("a reply to an option that was not sent");
        assert_eq!(reply.option, sent.number);
        if [opt::INFO, opt::GO].contains(&sent.number) && reply.kind == rep::ACK {
            assert_eq!(infos, 1, "NBD_INFO_EXPORT once before the acknowledgement");
        }
        infos = 0;
        check_outcome(tls, secure, sent, reply.kind);
        negotiated.follow(sent, reply.kind, std::mem::take(&mut ids));
        if sent.number == opt::GO && reply.kind == rep::ACK {
            let session = told.session.as_ref().expect("a session after GO");
            negotiated.check(&Negotiated::export(sent.data), session);
        }
    }
}

/// Checks the type of a final reply.
fn check_outcome(tls: Tls, secure: bool, sent: &Sent<'_>, kind: u32) {
    let (number, length) = (sent.number, sent.length);
    if number == opt::ABORT {
        assert_eq!(kind, rep::ACK);
        return;
    }
    if tls == Tls::Required && !secure && number != opt::STARTTLS {
        assert_eq!(kind, rep::ERR_TLS_REQD, "option {number} before TLS");
        return;
    }
    assert_ne!(kind, rep::ERR_TLS_REQD, "option {number}");
    let bare = [
        opt::LIST,
        opt::STARTTLS,
        opt::STRUCTURED_REPLY,
        opt::EXTENDED_HEADERS,
    ];
    let data = [opt::INFO, opt::GO, opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT];
    if bare.contains(&number) && length > 0 {
        assert_eq!(kind, rep::ERR_INVALID, "option {number} with data");
    } else if data.contains(&number) {
        let known = [rep::ACK, rep::ERR_INVALID, rep::ERR_UNKNOWN, rep::ERR_TOO_BIG];
        assert!(known.contains(&kind), "option {number}: {kind:#x}");
        if length > 64 << 10 {
            assert_eq!(kind, rep::ERR_TOO_BIG);
        }
    } else if !bare.contains(&number) {
        assert_eq!(kind, rep::ERR_UNSUP, "unknown option {number}");
    }
}

/// What the core made of a stream of requests.
#[derive(Debug, PartialEq, Eq)]
struct Heard {
    events: Vec<(Event, Vec<u8>)>,
    end: End,
}

fn hear(session: &Session, pieces: &[&[u8]]) -> Heard {
    let mut requests = Requests::new(session.clone());
    let mut events = Vec::new();
    let mut collecting: Option<(Event, Vec<u8>)> = None;
    for piece in pieces {
        let mut input = *piece;
        loop {
            if let Some((event, mut payload)) = collecting.take() {
                if !requests.take_payload(&mut input, &mut payload) {
                    collecting = Some((event, payload));
                    break;
                }
                events.push((event, payload));
            }
            match requests.receive(&mut input) {
                Ok(Some(Event::Disconnect)) => {
                    events.push((Event::Disconnect, vec![]));
                    return Heard {
                        events,
                        end: End::Disconnected,
                    };
                }
                Ok(Some(event)) => collecting = Some((event, vec![])),
                Ok(None) => break,
                Err(_) => {
                    return Heard {
                        events,
                        end: End::Dropped,
                    };
                }
            }
        }
        assert!(input.is_empty(), "input is left though more is wanted");
    }
    // A request without a payload is complete.
    if let Some((event, payload)) = collecting
        && requests.payload_left() == 0
    {
        events.push((event, payload));
    }
    Heard {
        events,
        end: End::Open,
    }
}

/// The session of the core for what was agreed.
fn session(agreed: &Agreed) -> Session {
    let framing = match agreed.framing {
        Framing::Simple => proto::Framing::Simple,
        Framing::Structured => proto::Framing::Structured,
        Framing::Extended => proto::Framing::Extended,
    };
    Session {
        framing,
        size: agreed.size,
        block_sizes: BlockSizes::new(agreed.minimum, agreed.minimum.max(512), agreed.maximum)
            .expect("block sizes of a model"),
        flags: TransmissionFlags::from_bits_retain(agreed.flags),
        contexts: agreed
            .contexts
            .iter()
            .map(|id| SelectedContext {
                id: *id,
                name: ContextName::new(&format!("x-test:{id}")).expect("a name"),
            })
            .collect(),
    }
}

/// Flags that a server shows for an export.
#[must_use]
pub const fn shown(framing: Framing, read_only: bool, contexts: bool) -> u16 {
    let mut flags = trans::HAS_FLAGS | trans::SEND_FLUSH | trans::SEND_CACHE | trans::CAN_MULTI_CONN;
    flags |= if read_only {
        trans::READ_ONLY
    } else {
        trans::SEND_FUA | trans::SEND_TRIM | trans::SEND_WRITE_ZEROES | trans::SEND_FAST_ZERO
    };
    if framing.has_chunks() {
        flags |= trans::SEND_DF;
    }
    if matches!(framing, Framing::Extended) && contexts {
        flags |= trans::BLOCK_STATUS_PAYLOAD;
    }
    flags
}

/// Checks a transmission: `stream` is what the client sends.
///
/// # Panics
/// The core is wrong.
pub fn check_transmission(agreed: &Agreed, stream: &[u8], cuts: Cuts<'_>) {
    let session = session(agreed);
    let heard = hear(&session, &[stream]);
    for cuts in [cuts, smallest(stream)] {
        assert_eq!(hear(&session, &pieces(stream, cuts)), heard, "cut as {cuts:?}");
    }
    let (judged, end) = agreed.judge(stream);
    assert_eq!(heard.end, end);
    assert_eq!(heard.events.len(), judged.len(), "{heard:?} {judged:?}");
    for ((event, payload), (request, verdict)) in heard.events.iter().zip(&judged) {
        check_event(event, payload, request, verdict);
        check_answer(agreed, &session, event, request, cuts);
    }
}

fn check_event(event: &Event, payload: &[u8], request: &Request, verdict: &Verdict) {
    match (event, verdict) {
        (Event::Disconnect, Verdict::Disconnect) => {}
        (Event::Refuse(refused), Verdict::Refuse(errors)) => {
            assert!(
                errors.contains(&refused.error.number()),
                "{request:?} is refused with {:?}, right are {errors:?}",
                refused.error
            );
            assert_eq!(refused.ticket.cookie, request.cookie);
            assert_eq!(refused.ticket.offset, request.offset);
            assert_eq!(
                refused.kind.map(CommandType::number),
                (request.command <= 8).then_some(request.command)
            );
        }
        (Event::Do(done), Verdict::Carry) => {
            assert_eq!(done.ticket.cookie, request.cookie);
            assert_eq!(done.ticket.offset, request.offset);
            assert_eq!(done.command.kind().number(), request.command);
            check_command(&done.command, payload, request);
        }
        _ => panic!("{request:?} became {event:?}, wanted is {verdict:?}"),
    }
}

fn check_command(command: &Command, payload: &[u8], request: &Request) {
    let has = |flag: u16| request.flags & flag != 0;
    let range = (request.offset, request.length);
    match *command {
        Command::Read {
            offset,
            length,
            dont_fragment,
        } => {
            assert_eq!((offset, u64::from(length)), range);
            assert_eq!(dont_fragment, has(flag::DF));
        }
        Command::Write { offset, length, fua } => {
            assert_eq!((offset, u64::from(length)), range);
            assert_eq!(fua, has(flag::FUA));
            assert_eq!(payload, request.payload);
        }
        Command::Flush => {}
        Command::Trim { offset, length, fua } => {
            assert_eq!((offset, length), range);
            assert_eq!(fua, has(flag::FUA));
        }
        Command::Cache { offset, length } => assert_eq!((offset, length), range),
        Command::WriteZeroes {
            offset,
            length,
            fua,
            no_hole,
            fast,
        } => {
            assert_eq!((offset, length), range);
            assert_eq!(
                (fua, no_hole, fast),
                (has(flag::FUA), has(flag::NO_HOLE), has(flag::FAST_ZERO))
            );
        }
        Command::BlockStatus { offset, one, .. } => {
            assert_eq!(offset, request.offset);
            assert_eq!(one, has(flag::REQ_ONE));
        }
    }
}

/// Builds the answer as the server does, and reads it as a client does.
fn check_answer(agreed: &Agreed, session: &Session, event: &Event, request: &Request, cuts: Cuts<'_>) {
    let mut bytes = Vec::new();
    let mut error = 0;
    match event {
        Event::Disconnect => return,
        Event::Refuse(refused) => {
            error = refused.error.number();
            reply::error(&mut bytes, refused.ticket, refused.error, refused.message);
        }
        Event::Do(done) => match done.command {
            Command::Read { offset, length, .. } => {
                reply::read_prefix(&mut bytes, done.ticket, offset, length);
                bytes.extend((0..length).map(|at| at.to_be_bytes()[3]));
            }
            Command::BlockStatus {
                length,
                one,
                contexts,
                ..
            } => {
                // Extents of growing length, with flags that take turns.
                let extents: Vec<StatusExtent> = (1..200_u32)
                    .map(|index| StatusExtent {
                        length: u64::from(index) * 512,
                        flags: index % 3,
                    })
                    .collect();
                let most = if one { 1 } else { session.most_extents() };
                let told: Vec<_> = session
                    .contexts
                    .iter()
                    .enumerate()
                    .filter(|(place, _)| contexts.contains(*place))
                    .map(|(_, context)| (context.id, reply::merged(&extents, length, most)))
                    .collect();
                reply::block_status(&mut bytes, done.ticket, &told);
            }
            _ => reply::done(&mut bytes, done.ticket),
        },
    }
    let mut ledger = Ledger::new(agreed.framing, agreed.maximum, agreed.contexts.clone());
    ledger.sent(request.clone());
    let mut answers = Vec::new();
    // Small pieces of much data only take time.
    let cuts = if bytes.len() > 4096 { &[] } else { cuts };
    for piece in pieces(&bytes, cuts) {
        match ledger.receive(piece) {
            Ok(more) => answers.extend(more),
            Err(error) => panic!("the answer to {request:?} is {bytes:x?}: {error:#}"),
        }
    }
    assert_eq!(
        (answers.len(), ledger.waiting(), ledger.pending()),
        (1, 0, 0),
        "{request:?}"
    );
    assert_eq!(answers[0].error, error);
}

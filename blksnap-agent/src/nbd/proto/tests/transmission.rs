//! Transmission: a test for each command, each error and each form of reply.

use super::super::catalog::BlockSizes;
use super::super::context::{ContextName, ContextSet, SelectedContext};
use super::super::limits::MAX_PAYLOAD;
use super::super::transmission::{Command, Event, Framing, Request, Requests, Session, TransmissionError};
use super::super::wire::{CommandType, ErrorCode, TransmissionFlags};
use super::SIZE;

pub(super) const COOKIE: u64 = 0x1122_3344_5566_7788;
const FUA: u16 = 1;
const NO_HOLE: u16 = 2;
const DF: u16 = 4;
const REQ_ONE: u16 = 8;
const FAST_ZERO: u16 = 16;
const PAYLOAD_LEN: u16 = 32;
/// What payloads of these tests consist of.
const PAYLOAD: u8 = 0xaa;

/// Flags that the handshake shows.
pub(super) fn shown(framing: Framing, read_only: bool) -> TransmissionFlags {
    let mut flags = TransmissionFlags::HAS_FLAGS
        | TransmissionFlags::SEND_FLUSH
        | TransmissionFlags::SEND_CACHE
        | TransmissionFlags::CAN_MULTI_CONN;
    flags.set(TransmissionFlags::READ_ONLY, read_only);
    flags.set(TransmissionFlags::SEND_DF, framing.has_chunks());
    flags.set(
        TransmissionFlags::BLOCK_STATUS_PAYLOAD,
        framing == Framing::Extended,
    );
    if !read_only {
        flags |= TransmissionFlags::SEND_FUA
            | TransmissionFlags::SEND_TRIM
            | TransmissionFlags::SEND_WRITE_ZEROES
            | TransmissionFlags::SEND_FAST_ZERO;
    }
    flags
}

/// The session of an export that takes writes.
fn scratch(framing: Framing) -> Session {
    Session {
        flags: shown(framing, false),
        ..session(framing, true)
    }
}

pub(super) fn session(framing: Framing, with_contexts: bool) -> Session {
    let contexts = vec![SelectedContext {
        id: 1,
        name: ContextName::base_allocation(),
    }];
    Session {
        framing,
        size: SIZE,
        block_sizes: BlockSizes::DEFAULT,
        flags: shown(framing, true),
        contexts: if with_contexts { contexts } else { vec![] },
    }
}

/// An extended request.
pub(super) fn wide(flags: u16, command: u16, offset: u64, length: u64) -> Vec<u8> {
    let mut bytes = 0x21e4_1c71_u32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(&COOKIE.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes
}

pub(super) fn request(flags: u16, command: u16, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(&COOKIE.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes
}

/// What one request becomes in a session; a second request behind it must be understood too.
fn event_in(session: Session, bytes: &[u8]) -> Event {
    let behind = if session.framing == Framing::Extended {
        wide(0, 0, 0, 512)
    } else {
        request(0, 0, 0, 512)
    };
    let input = [bytes, &behind].concat();
    let mut requests = Requests::new(session);
    let mut rest: &[u8] = &input;
    let event = requests.receive(&mut rest).unwrap().unwrap();
    if let Event::Do(request) = event {
        assert_eq!(requests.payload_left(), request.command.payload() as usize);
        let mut payload = Vec::new();
        assert!(requests.take_payload(&mut rest, &mut payload));
        assert!(payload.iter().all(|byte| *byte == PAYLOAD));
    }
    let next = requests.receive(&mut rest).unwrap().unwrap();
    assert!(
        matches!(next, Event::Do(_)),
        "the request behind is found: {next:?}"
    );
    assert!(rest.is_empty());
    event
}

fn event(flags: u16, command: u16, offset: u64, length: u32) -> Event {
    event_in(
        session(Framing::Structured, true),
        &request(flags, command, offset, length),
    )
}

fn command(event: Event) -> Command {
    match event {
        Event::Do(Request { ticket, command }) => {
            assert_eq!(ticket.cookie, COOKIE);
            command
        }
        other => panic!("{other:?}"),
    }
}

fn error(event: Event) -> ErrorCode {
    match event {
        Event::Refuse(refused) => {
            assert_eq!(refused.ticket.cookie, COOKIE);
            assert!(!refused.message.is_empty());
            refused.error
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn read_is_checked_against_the_export() {
    let read = |flags, offset, length| event(flags, 0, offset, length);
    assert_eq!(
        command(read(0, 1, 3)),
        Command::Read {
            offset: 1,
            length: 3,
            dont_fragment: false
        }
    );
    assert_eq!(
        command(read(DF, 0, 1 << 20)),
        Command::Read {
            offset: 0,
            length: 1 << 20,
            dont_fragment: true
        }
    );
    assert!(matches!(
        command(read(0, SIZE, 0)),
        Command::Read { length: 0, .. }
    ));
    assert_eq!(error(read(0, SIZE, 1)), ErrorCode::Invalid);
    assert_eq!(error(read(0, SIZE - 1, 2)), ErrorCode::Invalid);
    assert_eq!(error(read(0, u64::MAX, 1)), ErrorCode::Invalid);
    assert_eq!(error(read(0, u64::MAX, u32::MAX)), ErrorCode::Invalid);
    assert_eq!(error(read(0, SIZE + 1, 0)), ErrorCode::Invalid);
    for flags in [FUA, NO_HOLE, REQ_ONE, FAST_ZERO, 32, 1 << 15, DF | FUA] {
        assert_eq!(error(read(flags, 0, 512)), ErrorCode::Invalid, "{flags:#x}");
    }
}

#[test]
fn dont_fragment_needs_structured_replies() {
    let event = event_in(session(Framing::Simple, false), &request(DF, 0, 0, 512));
    assert_eq!(error(event), ErrorCode::Invalid);
}

#[test]
fn a_read_beyond_the_largest_payload_is_refused() {
    for (framing, code) in [
        (Framing::Structured, ErrorCode::Overflow),
        (Framing::Simple, ErrorCode::Invalid),
    ] {
        let large = Session {
            size: 1 << 40,
            ..session(framing, false)
        };
        let event = event_in(large.clone(), &request(0, 0, 0, MAX_PAYLOAD + 1));
        assert_eq!(error(event), code);
        let event = event_in(large, &request(0, 0, 0, MAX_PAYLOAD));
        assert!(matches!(command(event), Command::Read { .. }));
    }
}

#[test]
fn requests_keep_the_smallest_block() {
    let aligned = Session {
        block_sizes: BlockSizes::new(512, 4096, 1 << 20).unwrap(),
        ..session(Framing::Structured, true)
    };
    for kind in [0, 5, 7] {
        let check = |offset, length| event_in(aligned.clone(), &request(0, kind, offset, length));
        assert!(matches!(check(512, 1024), Event::Do(_)));
        assert_eq!(error(check(1, 512)), ErrorCode::Invalid);
        assert_eq!(error(check(512, 513)), ErrorCode::Invalid);
    }
}

#[test]
fn writes_of_every_kind_to_a_read_only_export_are_not_permitted() {
    let payload = |length: u32| [request(0, 1, 0, length), vec![PAYLOAD; length as usize]].concat();
    for framing in [Framing::Simple, Framing::Structured] {
        let refused = |bytes: &[u8]| error(event_in(session(framing, false), bytes));
        for length in [0, 1, 512, 100_000] {
            assert_eq!(refused(&payload(length)), ErrorCode::NotPermitted);
        }
        for bytes in [
            [request(FUA, 1, 0, 2), vec![1, 2]].concat(),
            [request(0, 1, u64::MAX, 2), vec![1, 2]].concat(),
            request(0, 4, 0, u32::MAX),
            request(0, 6, 0, 512),
            request(NO_HOLE | FAST_ZERO | FUA, 6, 0, 512),
            request(0, 6, 0, 0),
        ] {
            assert_eq!(refused(&bytes), ErrorCode::NotPermitted);
        }
    }
}

#[test]
fn a_payload_that_looks_like_a_request_is_skipped() {
    let inner = request(0, 2, 0, 0);
    let write = [request(0, 1, 0, u32::try_from(inner.len()).unwrap()), inner].concat();
    assert_eq!(error(event(0, 4, 0, 1)), ErrorCode::NotPermitted);
    let event = event_in(session(Framing::Simple, false), &write);
    assert_eq!(error(event), ErrorCode::NotPermitted);
}

#[test]
fn flush_has_no_range() {
    assert_eq!(command(event(0, 3, 0, 0)), Command::Flush);
    assert_eq!(error(event(0, 3, 512, 0)), ErrorCode::Invalid);
    assert_eq!(error(event(0, 3, 0, 512)), ErrorCode::Invalid);
    assert_eq!(error(event(FUA, 3, 0, 0)), ErrorCode::Invalid);
}

#[test]
fn cache_may_be_longer_than_a_payload() {
    let large = Session {
        size: 1 << 40,
        ..session(Framing::Simple, false)
    };
    let event_of = |bytes: &[u8]| event_in(large.clone(), bytes);
    assert_eq!(
        command(event_of(&request(0, 5, 512, u32::MAX))),
        Command::Cache {
            offset: 512,
            length: u32::MAX.into()
        }
    );
    assert!(matches!(
        command(event(0, 5, 0, 0)),
        Command::Cache { length: 0, .. }
    ));
    assert_eq!(error(event(0, 5, SIZE, 512)), ErrorCode::Invalid);
    assert_eq!(error(event(FUA, 5, 0, 512)), ErrorCode::Invalid);
}

#[test]
fn block_status_needs_a_context_and_a_length() {
    assert_eq!(
        command(event(0, 7, 512, 1024)),
        Command::BlockStatus {
            offset: 512,
            length: 1024,
            one: false,
            contexts: ContextSet::first(1),
        }
    );
    assert!(matches!(
        command(event(REQ_ONE, 7, 0, 1)),
        Command::BlockStatus { one: true, .. }
    ));
    assert_eq!(error(event(0, 7, 0, 0)), ErrorCode::Invalid);
    assert_eq!(error(event(0, 7, SIZE - 1, 2)), ErrorCode::Invalid);
    assert_eq!(error(event(DF, 7, 0, 512)), ErrorCode::Invalid);
    for framing in [Framing::Simple, Framing::Structured] {
        let event = event_in(session(framing, false), &request(0, 7, 0, 512));
        assert_eq!(error(event), ErrorCode::Invalid);
    }
}

#[test]
fn disconnect_is_seen_whatever_it_carries() {
    for bytes in [request(0, 2, 0, 0), request(FUA, 2, 7, 9)] {
        let mut requests = Requests::new(session(Framing::Simple, false));
        let event = requests.receive(&mut bytes.as_slice()).unwrap();
        assert_eq!(event, Some(Event::Disconnect));
    }
}

#[test]
fn resize_and_unknown_commands_are_invalid() {
    assert_eq!(error(event(0, 8, 0, 4096)), ErrorCode::Invalid);
    for number in [9, 10, 0x7fff, 0xffff] {
        let Event::Refuse(refused) = event(0, number, 0, 512) else {
            panic!("{number}")
        };
        assert_eq!((refused.error, refused.kind), (ErrorCode::Invalid, None));
    }
    let known: Vec<u16> = CommandType::ALL.iter().map(|kind| kind.number()).collect();
    assert_eq!(
        known,
        (0..=8).collect::<Vec<u16>>(),
        "each command has a test in this file"
    );
}

#[test]
fn a_wrong_magic_number_ends_the_session() {
    let mut bytes = request(0, 0, 0, 512);
    bytes[0] ^= 0x80;
    let mut requests = Requests::new(session(Framing::Simple, false));
    let result = requests.receive(&mut bytes.as_slice());
    assert_eq!(result, Err(TransmissionError::Magic(0xa560_9513)));
}

#[test]
fn writes_are_checked_against_the_export() {
    let write = |flags, offset, length: u32| {
        let bytes = [request(flags, 1, offset, length), vec![PAYLOAD; length as usize]].concat();
        event_in(scratch(Framing::Structured), &bytes)
    };
    for (flags, fua) in [(0, false), (FUA, true)] {
        assert_eq!(
            command(write(flags, 7, 5)),
            Command::Write {
                offset: 7,
                length: 5,
                fua
            }
        );
    }
    assert_eq!(command(write(0, 0, 0)).payload(), 0);
    assert_eq!(error(write(0, SIZE - 1, 2)), ErrorCode::NoSpace);
    assert_eq!(error(write(0, u64::MAX, 2)), ErrorCode::NoSpace);
    for flags in [NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN, 1 << 15] {
        assert_eq!(error(write(flags, 0, 512)), ErrorCode::Invalid, "{flags:#x}");
    }
}

#[test]
fn trims_and_zeroes_are_checked_against_the_export() {
    let large = Session {
        size: 1 << 40,
        ..scratch(Framing::Simple)
    };
    let event_of =
        |flags, kind, offset, length| event_in(large.clone(), &request(flags, kind, offset, length));
    assert_eq!(
        command(event_of(FUA, 4, 512, u32::MAX)),
        Command::Trim {
            offset: 512,
            length: u32::MAX.into(),
            fua: true
        }
    );
    assert_eq!(error(event_of(0, 4, 1 << 40, 1)), ErrorCode::Invalid);
    assert_eq!(error(event_of(NO_HOLE, 4, 0, 1)), ErrorCode::Invalid);
    for (flags, fua, no_hole, fast) in [
        (0, false, false, false),
        (FUA, true, false, false),
        (NO_HOLE | FAST_ZERO, false, true, true),
    ] {
        assert_eq!(
            command(event_of(flags, 6, 1, u32::MAX)),
            Command::WriteZeroes {
                offset: 1,
                length: u32::MAX.into(),
                fua,
                no_hole,
                fast
            }
        );
    }
    assert_eq!(error(event_of(0, 6, 1 << 40, 1)), ErrorCode::NoSpace);
    assert_eq!(error(event_of(DF, 6, 0, 1)), ErrorCode::Invalid);
}

#[test]
fn fua_may_come_with_every_command_once_it_was_offered() {
    for (kind, offset) in [(0, 512), (3, 0), (4, 512), (5, 512), (6, 512), (7, 512)] {
        let event = event_in(
            scratch(Framing::Structured),
            &request(FUA, kind, offset, u32::from(kind != 3) * 512),
        );
        assert!(matches!(event, Event::Do(_)), "command {kind}: {event:?}");
    }
}

#[test]
fn extended_requests_have_wide_lengths_and_payloads() {
    let large = Session {
        size: 1 << 50,
        ..scratch(Framing::Extended)
    };
    let event_of = |bytes: &[u8]| event_in(large.clone(), bytes);
    let length = 7_u64 << 40;
    for kind in [4, 5, 6, 7] {
        let (Command::Trim { length: told, .. }
        | Command::Cache { length: told, .. }
        | Command::WriteZeroes { length: told, .. }
        | Command::BlockStatus { length: told, .. }) = command(event_of(&wide(0, kind, 512, length)))
        else {
            panic!("command {kind}")
        };
        assert_eq!(told, length);
    }
    assert_eq!(error(event_of(&wide(0, 0, 0, 1 << 33))), ErrorCode::Overflow);
    assert_eq!(error(event_of(&wide(0, 4, 512, u64::MAX))), ErrorCode::Invalid);

    let data = |length: usize| vec![PAYLOAD; length];
    let write = [wide(PAYLOAD_LEN | FUA, 1, 512, 700), data(700)].concat();
    assert_eq!(
        command(event_of(&write)),
        Command::Write {
            offset: 512,
            length: 700,
            fua: true
        }
    );
    let without_the_flag = [wide(0, 1, 512, 700), data(700)].concat();
    assert_eq!(
        command(event_of(&without_the_flag)).payload(),
        700,
        "as qemu writes"
    );
    for kind in [0, 3, 4, 5, 6, 8, 99] {
        let bytes = [wide(PAYLOAD_LEN, kind, 0, 700), data(700)].concat();
        assert_eq!(error(event_of(&bytes)), ErrorCode::Invalid, "command {kind}");
    }
}

#[test]
fn a_status_request_can_choose_contexts() {
    let mut session = scratch(Framing::Extended);
    session.contexts = (0..3)
        .map(|index| SelectedContext {
            id: 10 + index,
            name: ContextName::new(&format!("x-test:{index}")).unwrap(),
        })
        .collect();
    let ask = |session: &Session, length: u64, ids: &[u32]| {
        let mut payload = length.to_be_bytes().to_vec();
        payload.extend(ids.iter().flat_map(|id| id.to_be_bytes()));
        let header = wide(PAYLOAD_LEN | REQ_ONE, 7, 512, payload.len() as u64);
        event_in(session.clone(), &[header, payload].concat())
    };
    for (ids, places) in [(&[12, 10][..], &[0, 2][..]), (&[11], &[1]), (&[], &[])] {
        let Command::BlockStatus {
            offset,
            length,
            one,
            contexts,
        } = command(ask(&session, 1024, ids))
        else {
            panic!("{ids:?}")
        };
        assert_eq!((offset, length, one), (512, 1024, true));
        let chosen: Vec<usize> = (0..3).filter(|place| contexts.contains(*place)).collect();
        assert_eq!(chosen, places);
    }
    assert_eq!(error(ask(&session, 1024, &[10, 10])), ErrorCode::Invalid, "twice");
    assert_eq!(
        error(ask(&session, 1024, &[9])),
        ErrorCode::Invalid,
        "not selected"
    );
    assert_eq!(
        error(ask(&session, SIZE, &[10])),
        ErrorCode::Invalid,
        "beyond the end"
    );
    assert_eq!(error(ask(&session, 0, &[10])), ErrorCode::Invalid);
    assert_eq!(
        error(ask(&session, 512, &[10; 1000])),
        ErrorCode::Invalid,
        "too many"
    );
    for length in [1, 7, 9, 11, 13] {
        let bytes = [
            wide(PAYLOAD_LEN, 7, 0, length),
            vec![0; usize::try_from(length).unwrap()],
        ]
        .concat();
        assert_eq!(
            error(event_in(session.clone(), &bytes)),
            ErrorCode::Invalid,
            "{length}"
        );
    }
    session.flags.remove(TransmissionFlags::BLOCK_STATUS_PAYLOAD);
    assert_eq!(
        error(ask(&session, 1024, &[10])),
        ErrorCode::Invalid,
        "not offered"
    );
}

#[test]
fn payloads_beyond_the_limit_end_the_session() {
    let length = MAX_PAYLOAD + 1;
    let small = Session {
        size: 1 << 30,
        block_sizes: BlockSizes::new(1, 4096, 1 << 20).unwrap(),
        ..scratch(Framing::Simple)
    };
    let mut requests = Requests::new(small.clone());
    let result = requests.receive(&mut request(0, 1, 0, length).as_slice());
    assert_eq!(result, Err(TransmissionError::Payload(length.into())));
    // Up to the default it is skipped.
    let bytes = [request(0, 1, 0, 2 << 20), vec![0; 2 << 20]].concat();
    assert_eq!(error(event_in(small, &bytes)), ErrorCode::Invalid);

    for (kind, length) in [(1, (1 << 20) + 1), (1, u64::MAX), (0, 1 << 21), (99, u64::MAX)] {
        let small = Session {
            block_sizes: BlockSizes::new(1, 4096, 1 << 20).unwrap(),
            ..scratch(Framing::Extended)
        };
        let mut requests = Requests::new(small);
        let result = requests.receive(&mut wide(PAYLOAD_LEN, kind, 0, length).as_slice());
        assert_eq!(result, Err(TransmissionError::Payload(length)));
    }
}

#[test]
fn a_payload_can_be_taken_in_pieces_read_past_or_given_up() {
    let write = request(0, 1, 0, 10);
    let next = request(0, 3, 0, 0);
    let mut requests = Requests::new(scratch(Framing::Simple));
    assert!(matches!(
        requests.receive(&mut write.as_slice()),
        Ok(Some(Event::Do(_)))
    ));
    let mut payload = Vec::new();
    assert!(!requests.take_payload(&mut b"abc".as_slice(), &mut payload));
    requests.payload_received(2);
    assert_eq!(requests.payload_left(), 5);
    let mut rest = b"fghijrest".as_slice();
    assert!(requests.take_payload(&mut rest, &mut payload));
    assert_eq!(
        (payload.as_slice(), rest),
        (b"abcfghij".as_slice(), b"rest".as_slice())
    );

    assert!(matches!(
        requests.receive(&mut write.as_slice()),
        Ok(Some(Event::Do(_)))
    ));
    requests.payload_received(4);
    requests.skip_payload();
    let mut rest: &[u8] = &[b"456789".as_slice(), &next].concat();
    let event = requests.receive(&mut rest).unwrap().unwrap();
    assert_eq!(command(event), Command::Flush);
    assert!(rest.is_empty());
}

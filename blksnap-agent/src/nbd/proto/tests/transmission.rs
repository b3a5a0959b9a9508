//! Transmission: a test for each command, each error and each form of reply.

use super::super::catalog::BlockSizes;
use super::super::context::{ContextName, SelectedContext};
use super::super::limits::{MAX_EXTENTS, MAX_PAYLOAD, MAX_STRING};
use super::super::reply::{self, StatusExtent};
use super::super::transmission::{Command, Event, Framing, Request, Requests, Session, TransmissionError};
use super::super::wire::{CommandType, ErrorCode};
use super::SIZE;

const COOKIE: u64 = 0x1122_3344_5566_7788;
const FUA: u16 = 1;
const NO_HOLE: u16 = 2;
const DF: u16 = 4;
const REQ_ONE: u16 = 8;
const FAST_ZERO: u16 = 16;

pub(super) fn session(framing: Framing, with_contexts: bool) -> Session {
    let contexts = vec![SelectedContext {
        id: 1,
        name: ContextName::base_allocation(),
    }];
    Session {
        framing,
        size: SIZE,
        block_sizes: BlockSizes::DEFAULT,
        read_only: true,
        contexts: if with_contexts { contexts } else { vec![] },
    }
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
    let input = [bytes, &request(0, 0, 0, 512)].concat();
    let mut requests = Requests::new(session);
    let mut rest: &[u8] = &input;
    let event = requests.receive(&mut rest).unwrap().unwrap();
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
        Event::Do(Request { cookie, command }) => {
            assert_eq!(cookie, COOKIE);
            command
        }
        other => panic!("{other:?}"),
    }
}

fn error(event: Event) -> ErrorCode {
    match event {
        Event::Refuse(refused) => {
            assert_eq!(refused.cookie, COOKIE);
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
fn writes_of_every_kind_are_not_permitted() {
    let payload = |length: u32| [request(0, 1, 0, length), vec![0xaa; length as usize]].concat();
    for framing in [Framing::Simple, Framing::Structured] {
        for read_only in [true, false] {
            let session = Session {
                read_only,
                ..session(framing, false)
            };
            let refused = |bytes: &[u8]| error(event_in(session.clone(), bytes));
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
            one: false
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
fn simple_replies_are_sixteen_bytes() {
    let mut out = Vec::new();
    reply::read_prefix(&mut out, Framing::Simple, COOKIE, 512, 1024);
    let success = [
        vec![0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0],
        COOKIE.to_be_bytes().to_vec(),
    ]
    .concat();
    assert_eq!(out, success);
    out.clear();
    reply::done(&mut out, Framing::Simple, COOKIE);
    assert_eq!(out, success);
    out.clear();
    reply::error(&mut out, Framing::Simple, COOKIE, ErrorCode::Shutdown, "not sent");
    assert_eq!(out[4..8], 108_u32.to_be_bytes());
    assert_eq!(out.len(), 16);
}

/// A chunk, taken apart: flags, type, payload; the rest.
fn chunk(bytes: &[u8]) -> (u16, u16, &[u8], &[u8]) {
    assert_eq!(bytes[..4], [0x66, 0x8e, 0x33, 0xef]);
    assert_eq!(bytes[8..16], COOKIE.to_be_bytes());
    let length = u32::from_be_bytes(bytes[16..20].try_into().unwrap()) as usize;
    let number = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    (
        number(4),
        number(6),
        &bytes[20..],
        &bytes[(20 + length).min(bytes.len())..],
    )
}

#[test]
fn structured_replies_are_chunks() {
    let mut out = Vec::new();
    reply::read_prefix(&mut out, Framing::Structured, COOKIE, 512, 3);
    out.extend_from_slice(b"abc");
    let (flags, kind, payload, rest) = chunk(&out);
    assert_eq!((flags, kind), (1, 1));
    assert_eq!(payload, [512_u64.to_be_bytes().as_slice(), b"abc"].concat());
    assert!(rest.is_empty());

    for zero_length_read in [true, false] {
        out.clear();
        if zero_length_read {
            reply::read_prefix(&mut out, Framing::Structured, COOKIE, 512, 0);
        } else {
            reply::done(&mut out, Framing::Structured, COOKIE);
        }
        let (flags, kind, payload, _) = chunk(&out);
        assert_eq!((flags, kind, payload), (1, 0, [].as_slice()));
    }
}

#[test]
fn structured_errors_carry_a_message_that_fits() {
    let mut out = Vec::new();
    reply::error(&mut out, Framing::Structured, COOKIE, ErrorCode::Io, "why");
    let (flags, kind, payload, rest) = chunk(&out);
    assert_eq!((flags, kind), (1, 0x8001));
    assert_eq!(
        payload,
        [5_u32.to_be_bytes().as_slice(), &[0, 3], b"why"].concat()
    );
    assert!(rest.is_empty());

    out.clear();
    let long = "\u{20ac}".repeat(MAX_STRING);
    reply::error(&mut out, Framing::Structured, COOKIE, ErrorCode::Io, &long);
    let (_, _, payload, rest) = chunk(&out);
    let length = usize::from(u16::from_be_bytes([payload[4], payload[5]]));
    assert!(length <= MAX_STRING && length + 6 == payload.len() && rest.is_empty());
    assert!(std::str::from_utf8(&payload[6..]).is_ok());
}

fn extents(list: &[(u64, u32)]) -> Vec<StatusExtent> {
    list.iter()
        .map(|&(length, flags)| StatusExtent { length, flags })
        .collect()
}

fn described(list: &[(u64, u32)], length: u64, one: bool) -> Vec<(u32, u32)> {
    reply::descriptors(&extents(list), length, one)
        .iter()
        .map(|descriptor| (descriptor.length.get(), descriptor.status.get()))
        .collect()
}

#[test]
fn descriptors_merge_clip_and_stay_in_the_request() {
    assert_eq!(
        described(&[(10, 0), (10, 0), (5, 3), (7, 0)], 100, false),
        [(20, 0), (5, 3), (7, 0)]
    );
    assert_eq!(described(&[(10, 0), (10, 3)], 15, false), [(10, 0), (5, 3)]);
    assert_eq!(
        described(&[(u64::MAX, 1)], u32::MAX.into(), false),
        [(u32::MAX, 1)]
    );
    assert_eq!(described(&[(10, 0), (10, 0), (5, 3)], 100, true), [(20, 0)]);
    assert_eq!(described(&[(200, 0)], 100, true), [(100, 0)]);
    assert_eq!(described(&[(0, 3), (10, 0)], 100, false), [(10, 0)]);
    assert_eq!(described(&[], 100, false), []);
}

#[test]
fn descriptors_are_bounded() {
    let many: Vec<(u64, u32)> = (0..MAX_EXTENTS as u64 * 2)
        .map(|n| (1, u32::from(n % 2 == 0)))
        .collect();
    assert_eq!(described(&many, u64::from(u32::MAX), false).len(), MAX_EXTENTS);
}

#[test]
fn block_status_has_a_chunk_for_each_context() {
    let contexts = [
        (
            1,
            reply::descriptors(&extents(&[(512, 3), (512, 0)]), 1024, false),
        ),
        (7, reply::descriptors(&extents(&[(1024, 1)]), 1024, false)),
    ];
    let mut out = Vec::new();
    reply::block_status(&mut out, COOKIE, &contexts);
    let (flags, kind, payload, rest) = chunk(&out);
    assert_eq!((flags, kind), (0, 5));
    let numbers = |list: &[u32]| {
        list.iter()
            .flat_map(|number| number.to_be_bytes())
            .collect::<Vec<u8>>()
    };
    assert_eq!(payload[..20], numbers(&[1, 512, 3, 512, 0]));
    let (flags, kind, payload, rest) = chunk(rest);
    assert_eq!((flags, kind), (1, 5), "the last chunk ends the reply");
    assert_eq!(payload, numbers(&[7, 1024, 1]));
    assert!(rest.is_empty());
}

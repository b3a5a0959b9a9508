//! Reply: a test for each form of answer.

use super::super::limits::{MAX_EXTENTS, MAX_MESSAGE, MAX_STRING};
use super::super::reply::{self, StatusExtent, Ticket};
use super::super::transmission::Framing;
use super::super::wire::ErrorCode;
use super::transmission::COOKIE;

/// Offset in the header of the request that is answered.
const OFFSET: u64 = 0x0102_0304_0506_0700;

const fn ticket(framing: Framing) -> Ticket {
    Ticket {
        framing,
        cookie: COOKIE,
        offset: OFFSET,
    }
}

#[test]
fn simple_replies_are_sixteen_bytes() {
    let mut out = Vec::new();
    reply::read_prefix(&mut out, ticket(Framing::Simple), 512, 1024);
    let success = [
        vec![0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0],
        COOKIE.to_be_bytes().to_vec(),
    ]
    .concat();
    assert_eq!(out, success);
    out.clear();
    reply::done(&mut out, ticket(Framing::Simple));
    assert_eq!(out, success);
    out.clear();
    reply::error(&mut out, ticket(Framing::Simple), ErrorCode::Shutdown, "not sent");
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
    reply::read_prefix(&mut out, ticket(Framing::Structured), 512, 3);
    out.extend_from_slice(b"abc");
    let (flags, kind, payload, rest) = chunk(&out);
    assert_eq!((flags, kind), (1, 1));
    assert_eq!(payload, [512_u64.to_be_bytes().as_slice(), b"abc"].concat());
    assert!(rest.is_empty());

    for zero_length_read in [true, false] {
        out.clear();
        if zero_length_read {
            reply::read_prefix(&mut out, ticket(Framing::Structured), 512, 0);
        } else {
            reply::done(&mut out, ticket(Framing::Structured));
        }
        let (flags, kind, payload, _) = chunk(&out);
        assert_eq!((flags, kind, payload), (1, 0, [].as_slice()));
    }
}

#[test]
fn structured_errors_carry_a_message_that_fits() {
    let mut out = Vec::new();
    reply::error(&mut out, ticket(Framing::Structured), ErrorCode::Io, "why");
    let (flags, kind, payload, rest) = chunk(&out);
    assert_eq!((flags, kind), (1, 0x8001));
    assert_eq!(
        payload,
        [5_u32.to_be_bytes().as_slice(), &[0, 3], b"why"].concat()
    );
    assert!(rest.is_empty());

    out.clear();
    let long = "\u{20ac}".repeat(MAX_STRING);
    reply::error(&mut out, ticket(Framing::Structured), ErrorCode::Io, &long);
    let (_, _, payload, rest) = chunk(&out);
    let length = usize::from(u16::from_be_bytes([payload[4], payload[5]]));
    assert!(length <= MAX_MESSAGE && length + 6 == payload.len() && rest.is_empty());
    assert!(std::str::from_utf8(&payload[6..]).is_ok());
}

fn extents(list: &[(u64, u32)]) -> Vec<StatusExtent> {
    list.iter()
        .map(|&(length, flags)| StatusExtent { length, flags })
        .collect()
}

fn described(list: &[(u64, u32)], length: u64, one: bool) -> Vec<(u64, u32)> {
    reply::merged(&extents(list), length, if one { 1 } else { MAX_EXTENTS })
        .iter()
        .map(|extent| (extent.length, extent.flags))
        .collect()
}

#[test]
fn merged_extents_are_clipped_and_stay_in_the_request() {
    assert_eq!(
        described(&[(10, 0), (10, 0), (5, 3), (7, 0)], 100, false),
        [(20, 0), (5, 3), (7, 0)]
    );
    assert_eq!(described(&[(10, 0), (10, 3)], 15, false), [(10, 0), (5, 3)]);
    assert_eq!(
        described(&[(u64::MAX, 1)], u32::MAX.into(), false),
        [(u32::MAX.into(), 1)]
    );
    assert_eq!(described(&[(10, 0), (10, 0), (5, 3)], 100, true), [(20, 0)]);
    assert_eq!(described(&[(200, 0)], 100, true), [(100, 0)]);
    assert_eq!(described(&[(0, 3), (10, 0)], 100, false), [(10, 0)]);
    assert_eq!(described(&[], 100, false), []);
}

#[test]
fn merged_extents_are_bounded() {
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
            reply::merged(&extents(&[(512, 3), (512, 0)]), 1024, MAX_EXTENTS),
        ),
        (7, reply::merged(&extents(&[(1024, 1)]), 1024, MAX_EXTENTS)),
    ];
    let mut out = Vec::new();
    reply::block_status(&mut out, ticket(Framing::Structured), &contexts);
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

/// An extended chunk, taken apart: flags, type, payload; the rest.
fn extended(bytes: &[u8]) -> (u16, u16, &[u8], &[u8]) {
    assert_eq!(bytes[..4], [0x6e, 0x8a, 0x27, 0x8c]);
    assert_eq!(bytes[8..16], COOKIE.to_be_bytes());
    assert_eq!(bytes[16..24], OFFSET.to_be_bytes(), "the request's offset");
    let length = u64::from_be_bytes(bytes[24..32].try_into().unwrap());
    let number = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let (payload, rest) = bytes[32..].split_at(usize::try_from(length).unwrap());
    (number(4), number(6), payload, rest)
}

#[test]
fn extended_replies_have_one_header_for_all() {
    let ticket = ticket(Framing::Extended);
    let mut out = Vec::new();
    reply::read_prefix(&mut out, ticket, 512, 3);
    out.extend_from_slice(b"abc");
    let (flags, kind, payload, rest) = extended(&out);
    assert_eq!((flags, kind), (1, 1));
    assert_eq!(payload, [512_u64.to_be_bytes().as_slice(), b"abc"].concat());
    assert!(rest.is_empty());

    out.clear();
    reply::done(&mut out, ticket);
    assert_eq!(extended(&out), (1, 0, [].as_slice(), [].as_slice()));

    out.clear();
    reply::error(&mut out, ticket, ErrorCode::NoSpace, "full");
    let payload = [28_u32.to_be_bytes().as_slice(), &[0, 4], b"full"].concat();
    assert_eq!(extended(&out), (1, 0x8001, payload.as_slice(), [].as_slice()));
}

#[test]
fn extended_status_has_wide_descriptors_and_their_count() {
    let long = 5_u64 << 32;
    let contexts = [
        (
            1,
            reply::merged(&extents(&[(long, 3), (512, 0)]), long + 512, MAX_EXTENTS),
        ),
        (7, reply::merged(&extents(&[(1024, 1)]), 1024, MAX_EXTENTS)),
    ];
    let mut out = Vec::new();
    reply::block_status(&mut out, ticket(Framing::Extended), &contexts);
    let (flags, kind, payload, rest) = extended(&out);
    assert_eq!((flags, kind), (0, 6));
    let wide = |list: &[u64]| {
        list.iter()
            .flat_map(|number| number.to_be_bytes())
            .collect::<Vec<u8>>()
    };
    assert_eq!(
        payload,
        [[0, 0, 0, 1, 0, 0, 0, 2].to_vec(), wide(&[long, 3, 512, 0])].concat()
    );
    let (flags, kind, payload, rest) = extended(rest);
    assert_eq!((flags, kind), (1, 6), "the last chunk ends the reply");
    assert_eq!(
        payload,
        [[0, 0, 0, 7, 0, 0, 0, 1].to_vec(), wide(&[1024, 1])].concat()
    );
    assert!(rest.is_empty());
}

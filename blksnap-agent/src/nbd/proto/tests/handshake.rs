//! Handshake: a test for each option and each error.

use super::super::limits::{MAX_OPTION_DATA, MAX_OPTIONS, MAX_QUERIES, MAX_STRING};
use super::super::transmission::Framing;
use super::super::wire::{InfoType, OptionReplyType, OptionType, TransmissionFlags};
use super::*;

/// Magic of an option, as the specification writes it.
const IHAVEOPT: u64 = 0x4948_4156_454F_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

pub(super) fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = IHAVEOPT.to_be_bytes().to_vec();
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes.extend_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

pub(super) fn counted(bytes: &[u8]) -> Vec<u8> {
    let mut counted = u32::try_from(bytes.len()).unwrap().to_be_bytes().to_vec();
    counted.extend_from_slice(bytes);
    counted
}

/// Data of INFO and GO.
pub(super) fn info(name: &str, kinds: &[u16]) -> Vec<u8> {
    let mut data = counted(name.as_bytes());
    data.extend_from_slice(&u16::try_from(kinds.len()).unwrap().to_be_bytes());
    data.extend(kinds.iter().flat_map(|kind| kind.to_be_bytes()));
    data
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub(super) fn contexts(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = counted(name.as_bytes());
    data.extend_from_slice(&u32::try_from(queries.len()).unwrap().to_be_bytes());
    data.extend(queries.iter().flat_map(|query| counted(query.as_bytes())));
    data
}

/// Client flags of a client that speaks fixed newstyle and wants no zeroes.
const FLAGS: [u8; 4] = [0, 0, 0, 3];

pub(super) type Reply = (u32, OptionReplyType, Vec<u8>);

/// Sends these options after the flags and gives the replies.
fn talk(options: &[Vec<u8>]) -> (Vec<Reply>, Outcome) {
    let input = [FLAGS.to_vec(), options.concat()].concat();
    let (out, outcome, _) = feed([input.as_slice()]);
    (replies(&out[18..]), outcome)
}

pub(super) fn replies(mut bytes: &[u8]) -> Vec<Reply> {
    let mut replies = Vec::new();
    while !bytes.is_empty() {
        assert_eq!(bytes[..8], REPLY_MAGIC.to_be_bytes());
        let number = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
        let length = number(16) as usize;
        let kind = OptionReplyType::from_number(number(12)).unwrap();
        replies.push((number(8), kind, bytes[20..20 + length].to_vec()));
        bytes = &bytes[20 + length..];
    }
    replies
}

/// The reply types only.
pub(super) fn kinds(replies: &[Reply]) -> Vec<OptionReplyType> {
    replies.iter().map(|(_, kind, _)| *kind).collect()
}

/// The one reply to one option, which must leave the session open: the option after it is answered.
fn refusal(data: Vec<u8>) -> OptionReplyType {
    let (replies, outcome) = talk(&[option(8, b""), data, option(3, b"")]);
    assert!(matches!(outcome, Outcome::More), "{outcome:?}");
    assert_eq!(replies[0].1, OptionReplyType::Ack);
    assert_eq!(replies.last().unwrap().1, OptionReplyType::Ack);
    assert_eq!(replies.len(), 1 + 1 + 3, "one reply, then the list");
    assert!(!replies[1].2.is_empty(), "errors carry a message");
    replies[1].1
}

#[test]
fn greeting_offers_fixed_newstyle_without_zeroes() {
    let (out, outcome, _) = feed([]);
    assert!(matches!(outcome, Outcome::More));
    assert_eq!(out, [b"NBDMAGICIHAVEOPT".as_slice(), &[0, 3]].concat());
}

#[test]
fn unknown_client_flags_end_the_session() {
    for flags in [4_u32, 7, 1 << 31, u32::MAX] {
        let (_, outcome, _) = feed([flags.to_be_bytes().as_slice()]);
        assert!(matches!(outcome, Outcome::Error(HandshakeError::ClientFlags(told)) if told == flags));
    }
}

#[test]
fn wrong_option_magic_ends_the_session() {
    let mut bad = option(3, b"");
    bad[0] ^= 1;
    assert!(matches!(talk(&[bad]).1, Outcome::Error(HandshakeError::Magic(_))));
}

#[test]
fn without_fixed_newstyle_only_an_export_can_be_chosen() {
    for number in [2, 3, 5, 6, 7, 8, 99] {
        let input = [vec![0; 4], option(number, b"")].concat();
        let (_, outcome, _) = feed([input.as_slice()]);
        assert!(matches!(outcome, Outcome::Error(HandshakeError::NotFixed(told)) if told == number));
    }
    let input = [vec![0; 4], option(1, b"disk")].concat();
    assert!(matches!(feed([input.as_slice()]).1, Outcome::Entered(_)));
}

#[test]
fn export_name_is_answered_with_and_without_zeroes() {
    for (flags, length) in [(3, 10), (1, 134), (0, 134), (2, 10)] {
        let input = [vec![0, 0, 0, flags], option(1, b"disk"), b"rest".to_vec()].concat();
        let (out, outcome, left) = feed([input.as_slice()]);
        let Outcome::Entered(established) = outcome else {
            panic!("{outcome:?}")
        };
        assert_eq!(established.export, "handle of disk");
        assert_eq!(established.session.framing, Framing::Simple);
        assert_eq!(left, b"rest", "what follows is transmission");
        let reply = &out[18..];
        assert_eq!(reply.len(), length);
        assert_eq!(reply[..8], SIZE.to_be_bytes());
        let flags = TransmissionFlags::from_bits_retain(u16::from_be_bytes([reply[8], reply[9]]));
        assert_eq!(
            flags,
            TransmissionFlags::HAS_FLAGS
                | TransmissionFlags::READ_ONLY
                | TransmissionFlags::SEND_FLUSH
                | TransmissionFlags::CAN_MULTI_CONN
                | TransmissionFlags::SEND_CACHE
        );
        assert!(reply[10..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn export_name_without_an_export_ends_the_session() {
    for name in [
        b"none".to_vec(),
        vec![b'a'; MAX_STRING],
        vec![0xff],
        b"disk\0".to_vec(),
    ] {
        let (replies, outcome) = talk(&[option(1, &name)]);
        assert!(matches!(outcome, Outcome::Error(HandshakeError::ExportName)));
        assert_eq!(replies, []);
    }
    let mut header = option(1, b"");
    header[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    assert!(matches!(
        talk(&[header]).1,
        Outcome::Error(HandshakeError::ExportName)
    ));
}

#[test]
fn abort_is_acknowledged_and_ends() {
    for data in [b"".as_slice(), b"ignored"] {
        let (replies, outcome) = talk(&[option(2, data), option(3, b"")]);
        assert_eq!(replies, [(2, OptionReplyType::Ack, vec![])]);
        assert!(matches!(outcome, Outcome::Ended));
    }
}

#[test]
fn list_names_every_export() {
    let (replies, _) = talk(&[option(3, b"")]);
    assert_eq!(
        replies,
        [
            (
                3,
                OptionReplyType::Server,
                [counted(b"disk"), b"A disk".to_vec()].concat()
            ),
            (3, OptionReplyType::Server, counted(b"other")),
            (3, OptionReplyType::Ack, vec![]),
        ]
    );
    assert_eq!(refusal(option(3, b"x")), OptionReplyType::ErrInvalid);
}

#[test]
fn tls_is_unsupported() {
    assert_eq!(refusal(option(5, b"")), OptionReplyType::ErrUnsupported);
    assert_eq!(refusal(option(5, b"x")), OptionReplyType::ErrInvalid);
}

#[test]
fn extended_headers_are_negotiated_and_take_precedence() {
    let select = option(10, &contexts("disk", &[ALLOCATION]));
    let go = option(7, &info("disk", &[]));
    let (replies, outcome) = talk(&[option(11, b""), option(8, b""), select, go.clone()]);
    assert_eq!(replies[0], (11, OptionReplyType::Ack, vec![]));
    assert_eq!(
        replies[1].1,
        OptionReplyType::ErrExtendedHeadersRequired,
        "no way back to structured replies"
    );
    let Outcome::Entered(established) = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(established.session.framing, Framing::Extended);
    assert!(
        established
            .session
            .flags
            .contains(TransmissionFlags::SEND_DF | TransmissionFlags::BLOCK_STATUS_PAYLOAD)
    );
    assert_eq!(refusal(option(11, b"x")), OptionReplyType::ErrInvalid);

    let (_, outcome) = talk(&[option(8, b""), option(11, b""), go]);
    let Outcome::Entered(established) = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(
        established.session.framing,
        Framing::Extended,
        "after structured replies, too"
    );
    assert!(
        !established
            .session
            .flags
            .contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD),
        "there is no context to choose"
    );
}

#[test]
fn export_name_after_extended_headers_ends_the_session() {
    let (_, outcome) = talk(&[option(11, b""), option(1, b"disk")]);
    assert!(matches!(outcome, Outcome::Error(HandshakeError::ExportName)));
}

#[test]
fn a_writable_export_shows_what_it_takes() {
    let (replies, outcome) = talk(&[option(7, &info("scratch", &[]))]);
    let told = u16::from_be_bytes(replies[0].2[10..12].try_into().unwrap());
    let flags = TransmissionFlags::from_bits_retain(told);
    assert_eq!(
        flags,
        TransmissionFlags::HAS_FLAGS
            | TransmissionFlags::SEND_FLUSH
            | TransmissionFlags::SEND_FUA
            | TransmissionFlags::ROTATIONAL
            | TransmissionFlags::SEND_TRIM
            | TransmissionFlags::SEND_WRITE_ZEROES
            | TransmissionFlags::SEND_CACHE
            | TransmissionFlags::SEND_FAST_ZERO
    );
    let Outcome::Entered(established) = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(established.session.flags, flags, "what was shown is what counts");
}

#[test]
fn unknown_options_are_unsupported_whatever_their_length() {
    for number in [0, 4, 12, 0x7777_7777, u32::MAX] {
        assert_eq!(refusal(option(number, b"")), OptionReplyType::ErrUnsupported);
        assert_eq!(
            refusal(option(number, &[0; 300])),
            OptionReplyType::ErrUnsupported
        );
    }
    let long = vec![0; MAX_OPTION_DATA as usize * 3];
    assert_eq!(refusal(option(4, &long)), OptionReplyType::ErrUnsupported);
}

#[test]
fn info_tells_what_was_asked_and_stays() {
    let (replies, outcome) = talk(&[option(6, &info("disk", &[])), option(3, b"")]);
    assert!(matches!(outcome, Outcome::More));
    let export = [vec![0, 0], SIZE.to_be_bytes().to_vec(), vec![0x05, 0x07]].concat();
    assert_eq!(replies[0], (6, OptionReplyType::Info, export));
    assert_eq!(replies[1], (6, OptionReplyType::Ack, vec![]));

    let (replies, _) = talk(&[option(6, &info("", &[0, 1, 2, 3, 99]))]);
    let told: Vec<u16> = replies
        .iter()
        .filter(|reply| reply.1 == OptionReplyType::Info)
        .map(|reply| u16::from_be_bytes([reply.2[0], reply.2[1]]))
        .collect();
    assert_eq!(
        told,
        [
            InfoType::Export,
            InfoType::Name,
            InfoType::Description,
            InfoType::BlockSize
        ]
        .map(InfoType::number)
    );
    assert_eq!(
        replies[1].2[2..],
        *b"disk",
        "the canonical name of the default export"
    );
    assert_eq!(replies[2].2[2..], *b"A disk");
    let sizes = [1_u32, 4096, 32 << 20].map(u32::to_be_bytes).concat();
    assert_eq!(replies[3].2[2..], sizes);
}

#[test]
fn sizes_other_than_the_defaults_are_told_unasked() {
    let (replies, _) = talk(&[option(6, &info("other", &[]))]);
    assert_eq!(
        kinds(&replies),
        [OptionReplyType::Info, OptionReplyType::Info, OptionReplyType::Ack]
    );
    let sizes = [512_u32, 4096, 1 << 20].map(u32::to_be_bytes).concat();
    assert_eq!(replies[1].2, [vec![0, 3], sizes].concat());
}

#[test]
fn go_enters_transmission_without_zeroes() {
    for flags in [1, 3] {
        let input = [
            vec![0, 0, 0, flags],
            option(7, &info("disk", &[])),
            b"rest".to_vec(),
        ]
        .concat();
        let (out, outcome, left) = feed([input.as_slice()]);
        let Outcome::Entered(established) = outcome else {
            panic!("{outcome:?}")
        };
        assert_eq!(
            (established.export, established.name.as_str()),
            ("handle of disk", "disk")
        );
        assert_eq!(established.session.size, SIZE);
        assert!(established.session.flags.contains(TransmissionFlags::READ_ONLY));
        assert_eq!(left, b"rest");
        assert_eq!(
            kinds(&replies(&out[18..])),
            [OptionReplyType::Info, OptionReplyType::Ack]
        );
    }
}

#[test]
fn info_and_go_tell_the_same() {
    let request = info("disk", &[1, 2, 3]);
    let (replies, _) = talk(&[option(8, b""), option(6, &request), option(7, &request)]);
    let of = |number: u32| -> Vec<_> {
        replies
            .iter()
            .filter(|reply| reply.0 == number)
            .map(|reply| (reply.1, reply.2.clone()))
            .collect()
    };
    assert_eq!(of(6), of(7));
    assert_eq!(of(6).len(), 5);
}

#[test]
fn info_and_go_of_an_unknown_export_are_refused() {
    for number in [6, 7] {
        assert_eq!(
            refusal(option(number, &info("none", &[3]))),
            OptionReplyType::ErrUnknown
        );
    }
}

#[test]
fn info_and_go_with_wrong_lengths_are_invalid() {
    for number in [6, 7] {
        assert_eq!(refusal(option(number, b"")), OptionReplyType::ErrInvalid);
        let mut longer = info("disk", &[]);
        longer[3] = 5;
        assert_eq!(refusal(option(number, &longer)), OptionReplyType::ErrInvalid);
        let trailing = [info("disk", &[]), vec![0]].concat();
        assert_eq!(refusal(option(number, &trailing)), OptionReplyType::ErrInvalid);
        assert_eq!(
            refusal(option(number, &info("a\0", &[]))),
            OptionReplyType::ErrInvalid
        );
    }
}

#[test]
fn too_long_names_and_data_are_too_big() {
    let long = "a".repeat(MAX_STRING + 1);
    for number in [6, 7] {
        assert_eq!(
            refusal(option(number, &info(&long, &[]))),
            OptionReplyType::ErrTooBig
        );
    }
    let huge = vec![0; MAX_OPTION_DATA as usize + 1];
    for number in [6, 7, 9, 10] {
        assert_eq!(refusal(option(number, &huge)), OptionReplyType::ErrTooBig);
    }
}

#[test]
fn structured_replies_are_negotiated_with_their_flag() {
    let (replies, outcome) = talk(&[option(8, b""), option(8, b""), option(7, &info("disk", &[]))]);
    assert_eq!(replies[0], (8, OptionReplyType::Ack, vec![]));
    assert_eq!(replies[1].1, OptionReplyType::Ack);
    let flags = u16::from_be_bytes(replies[2].2[10..12].try_into().unwrap());
    assert!(TransmissionFlags::from_bits_retain(flags).contains(TransmissionFlags::SEND_DF));
    let Outcome::Entered(established) = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(established.session.framing, Framing::Structured);
    assert_eq!(refusal(option(8, b"x")), OptionReplyType::ErrInvalid);
}

#[test]
fn contexts_need_structured_replies() {
    for number in [9, 10] {
        let (replies, outcome) = talk(&[option(number, &contexts("disk", &["base:allocation"]))]);
        assert_eq!(kinds(&replies), [OptionReplyType::ErrInvalid]);
        assert!(matches!(outcome, Outcome::More));
    }
}

/// Names told by an option about contexts, with their identifiers.
fn told(number: u32, name: &str, queries: &[&str]) -> Vec<(u32, String)> {
    let (replies, _) = talk(&[option(8, b""), option(number, &contexts(name, queries))]);
    let (last, contexts) = replies[1..].split_last().unwrap();
    assert_eq!(*last, (number, OptionReplyType::Ack, vec![]));
    contexts
        .iter()
        .map(|(_, kind, data)| {
            assert_eq!(*kind, OptionReplyType::MetaContext);
            let id = u32::from_be_bytes(data[..4].try_into().unwrap());
            (id, String::from_utf8(data[4..].to_vec()).unwrap())
        })
        .collect()
}

const ALLOCATION: &str = "base:allocation";
const LAST: &str = "qemu:dirty-bitmap:last";

#[test]
fn contexts_are_listed_by_name_and_wildcard() {
    let names = |queries: &[&str]| -> Vec<String> {
        let told = told(9, "disk", queries);
        assert!(
            told.iter().all(|(id, _)| *id == 0),
            "identifiers are reserved here"
        );
        told.into_iter().map(|(_, name)| name).collect()
    };
    assert_eq!(names(&[]), [ALLOCATION, LAST]);
    assert_eq!(names(&["base:"]), [ALLOCATION]);
    assert_eq!(names(&["qemu:"]), [LAST]);
    assert_eq!(names(&["qemu:dirty-bitmap:"]), [LAST]);
    assert_eq!(names(&[LAST, "base:"]), [ALLOCATION, LAST]);
    assert_eq!(names(&[ALLOCATION, ALLOCATION]), [ALLOCATION]);
    assert!(names(&["x-unknown:", "base:none", "nocolon", ""]).is_empty());
}

#[test]
fn contexts_are_selected_by_whole_name_only() {
    let selected = told(10, "disk", &[LAST, ALLOCATION, LAST]);
    assert_eq!(selected.len(), 2);
    assert_ne!(selected[0].0, selected[1].0, "identifiers are unique");
    assert_eq!(told(10, "disk", &[LAST])[0].1, LAST);
    assert!(
        told(
            10,
            "disk",
            &["base:", "qemu:", "qemu:dirty-bitmap:", "base:none", "x:y"]
        )
        .is_empty()
    );
    assert!(told(10, "disk", &[]).is_empty());
}

#[test]
fn a_context_that_cant_be_told_fails_the_selection_with_the_reason() {
    let since = "qemu:dirty-bitmap:since-x-1";
    let (replies, outcome) = talk(&[
        option(8, b""),
        option(10, &contexts("disk", &[ALLOCATION])),
        option(10, &contexts("disk", &[ALLOCATION, since])),
        option(9, &contexts("disk", &[since])),
        option(7, &info("disk", &[])),
    ]);
    let refused = &replies[3];
    assert_eq!((refused.0, refused.1), (10, OptionReplyType::ErrInvalid));
    assert_eq!(refused.2, b"full copy needed: x-1 is too old");
    assert_eq!(
        (replies[4].0, replies[4].1),
        (9, OptionReplyType::Ack),
        "listing finds nothing"
    );
    let Outcome::Entered(established) = outcome else {
        panic!("{outcome:?}")
    };
    assert!(
        established.session.contexts.is_empty(),
        "a failed selection replaces too"
    );
}

#[test]
fn context_options_with_errors() {
    for number in [9, 10] {
        assert_eq!(
            refusal(option(number, &contexts("none", &["base:"]))),
            OptionReplyType::ErrUnknown
        );
        assert_eq!(refusal(option(number, b"")), OptionReplyType::ErrInvalid);
        let mut beyond = contexts("disk", &["base:"]);
        beyond[15] = 200;
        assert_eq!(refusal(option(number, &beyond)), OptionReplyType::ErrInvalid);
        let trailing = [contexts("disk", &[]), vec![0]].concat();
        assert_eq!(refusal(option(number, &trailing)), OptionReplyType::ErrInvalid);
        let many = vec![""; MAX_QUERIES as usize + 1];
        assert_eq!(
            refusal(option(number, &contexts("disk", &many))),
            OptionReplyType::ErrTooBig
        );
        let long = "q".repeat(MAX_STRING + 1);
        assert_eq!(
            refusal(option(number, &contexts("disk", &[&long]))),
            OptionReplyType::ErrTooBig
        );
    }
}

/// Contexts in force after these options and GO.
fn in_force(options: &[Vec<u8>], name: &str) -> Vec<String> {
    let options = [
        vec![option(8, b"")],
        options.to_vec(),
        vec![option(7, &info(name, &[]))],
    ]
    .concat();
    let (_, outcome) = talk(&options);
    let Outcome::Entered(established) = outcome else {
        panic!("{outcome:?}")
    };
    let contexts = established.session.contexts;
    contexts
        .iter()
        .map(|context| context.name.as_str().to_owned())
        .collect()
}

#[test]
fn the_last_selection_for_the_chosen_export_counts() {
    let both = option(10, &contexts("disk", &[ALLOCATION, LAST]));
    assert_eq!(in_force(std::slice::from_ref(&both), "disk"), [ALLOCATION, LAST]);
    assert_eq!(
        in_force(std::slice::from_ref(&both), ""),
        [ALLOCATION, LAST],
        "the same export by default"
    );
    assert!(in_force(std::slice::from_ref(&both), "other").is_empty());
    let last = option(10, &contexts("disk", &[LAST]));
    assert_eq!(in_force(&[both.clone(), last], "disk"), [LAST]);
    for replaced in [
        option(10, &contexts("disk", &[])),
        option(10, &contexts("none", &[ALLOCATION])),
        option(10, b"broken"),
        option(10, &vec![0; MAX_OPTION_DATA as usize + 1]),
    ] {
        assert!(
            in_force(&[both.clone(), replaced], "disk").is_empty(),
            "a failed selection replaces too"
        );
    }
    let listing = option(9, &contexts("other", &["base:"]));
    assert_eq!(in_force(&[both, listing], "disk"), [ALLOCATION, LAST]);
}

#[test]
fn options_are_bounded() {
    let flood = vec![option(99, b""); MAX_OPTIONS as usize + 1];
    let (replies, outcome) = talk(&flood);
    assert!(matches!(outcome, Outcome::Error(HandshakeError::TooManyOptions)));
    assert_eq!(replies.len(), MAX_OPTIONS as usize);
}

#[test]
fn a_server_that_ends_refuses_all_but_abort() {
    let mut out = Vec::new();
    let mut handshake = Handshake::start(Tls::Unavailable, &mut out);
    let mut answer = |input: &[u8]| {
        let mut out = Vec::new();
        let step = handshake.receive(&mut &*input, &Shelf, &mut out);
        (step, out)
    };
    assert!(matches!(answer(&FLAGS).0, Ok(Step::NeedMore)));
    assert!(matches!(answer(&option(3, b"")).0, Ok(Step::Replied)));
    handshake.shut_down();
    for (number, data) in [(3, vec![]), (7, info("disk", &[])), (8, vec![]), (99, vec![1, 2])] {
        let mut out = Vec::new();
        let step = handshake.receive(&mut &*option(number, &data), &Shelf, &mut out);
        assert!(matches!(step, Ok(Step::Replied)));
        assert_eq!(kinds(&replies(&out)), [OptionReplyType::ErrShutdown]);
    }
    let mut out = Vec::new();
    let step = handshake.receive(&mut &*option(2, b""), &Shelf, &mut out);
    assert!(matches!(step, Ok(Step::End)));
    assert_eq!(kinds(&replies(&out)), [OptionReplyType::Ack]);
}

#[test]
fn nothing_is_taken_after_the_end() {
    let mut out = Vec::new();
    let mut handshake = Handshake::start(Tls::Unavailable, &mut out);
    let input = [FLAGS.to_vec(), option(2, b"")].concat();
    assert!(matches!(
        handshake.receive(&mut &*input, &Shelf, &mut out),
        Ok(Step::End)
    ));
    let result = handshake.receive(&mut &*input, &Shelf, &mut out);
    assert!(matches!(result, Err(HandshakeError::Over)));
}

#[test]
fn every_option_type_is_tested_above() {
    let tested = [1, 2, 3, 5, 6, 7, 8, 9, 10, 11];
    let known: Vec<u32> = OptionType::ALL.iter().map(|option| option.number()).collect();
    assert_eq!(known, tested);
}

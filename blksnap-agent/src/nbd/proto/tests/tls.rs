//! TLS: what is answered before and after the upgrade, in each mode.

use super::super::limits::MAX_OPTION_DATA;
use super::super::session::Framing;
use super::super::wire::OptionReplyType;
use super::handshake::{Reply, contexts, info, kinds, option, replies};
use super::*;

const STARTTLS: u32 = 5;

/// Sends these options one after the other, each in a piece of its own, and gives the replies.
fn talk(tls: Tls, options: &[Vec<u8>]) -> (Vec<Reply>, Outcome) {
    let flags = [0, 0, 0, 3];
    let pieces = std::iter::once(flags.as_slice()).chain(options.iter().map(Vec::as_slice));
    let (out, outcome, _) = feed_with(tls, pieces);
    (replies(&out[18..]), outcome)
}

/// Options of every kind that can be answered without ending the session.
fn all() -> Vec<Vec<u8>> {
    vec![
        option(3, b""),
        option(3, b"x"),
        option(4, b""),
        option(6, &info("disk", &[3])),
        option(6, &info("none", &[])),
        option(7, &info("none", &[])),
        option(7, b"broken"),
        option(8, b""),
        option(9, &contexts("disk", &[])),
        option(10, &contexts("disk", &["base:allocation"])),
        option(11, b""),
        option(99, &[0; 300]),
        option(6, &vec![0; MAX_OPTION_DATA as usize + 1]),
    ]
}

#[test]
fn without_tls_it_is_never_required() {
    let options = [all(), vec![option(STARTTLS, b"")]].concat();
    let (replies, outcome) = talk(Tls::Unavailable, &options);
    assert!(matches!(outcome, Outcome::More));
    assert_eq!(replies.last().unwrap().1, OptionReplyType::ErrUnsupported);
    assert!(!kinds(&replies).contains(&OptionReplyType::ErrTlsRequired));
}

#[test]
fn every_option_but_two_requires_tls_where_it_is_required() {
    let go = option(7, &info("disk", &[]));
    let (replies, outcome) = talk(Tls::Required, &[all(), vec![go]].concat());
    assert!(matches!(outcome, Outcome::More), "{outcome:?}");
    assert_eq!(replies.len(), all().len() + 1);
    for (number, kind, _) in replies {
        assert_eq!(kind, OptionReplyType::ErrTlsRequired, "option {number}");
    }
    let (replies, outcome) = talk(Tls::Required, &[option(2, b"")]);
    assert_eq!(kinds(&replies), [OptionReplyType::Ack]);
    assert!(matches!(outcome, Outcome::Ended));
}

#[test]
fn export_name_without_required_tls_ends_the_session() {
    let (replies, outcome) = talk(Tls::Required, &[option(1, b"disk")]);
    assert!(matches!(outcome, Outcome::Error(HandshakeError::ExportName)));
    assert!(replies.is_empty());
    // A client without fixed newstyle can't start TLS.
    let (out, outcome, _) = feed_with(Tls::Required, [[0; 4].as_slice(), &option(1, b"disk")]);
    assert!(matches!(outcome, Outcome::Error(HandshakeError::ExportName)));
    assert_eq!(out.len(), 18);
}

#[test]
fn starttls_is_acknowledged_once() {
    for tls in [Tls::Offered, Tls::Required] {
        let options = [
            option(STARTTLS, b"x"),
            option(STARTTLS, b""),
            option(STARTTLS, b""),
            option(3, b""),
        ];
        let (replies, outcome) = talk(tls, &options);
        assert!(matches!(outcome, Outcome::More));
        assert_eq!(
            kinds(&replies),
            [
                OptionReplyType::ErrInvalid,
                OptionReplyType::Ack,
                OptionReplyType::ErrInvalid,
                OptionReplyType::Server,
                OptionReplyType::Server,
                OptionReplyType::Ack,
            ]
        );
        assert!(replies[1].2.is_empty());
    }
}

#[test]
fn nothing_requires_tls_once_it_is_in_use() {
    for tls in [Tls::Offered, Tls::Required] {
        let (replies, _) = talk(tls, &[vec![option(STARTTLS, b"")], all()].concat());
        assert!(!kinds(&replies).contains(&OptionReplyType::ErrTlsRequired));
        let (_, outcome) = talk(tls, &[option(STARTTLS, b""), option(7, &info("disk", &[]))]);
        assert!(matches!(outcome, Outcome::Entered(_)));
    }
}

#[test]
fn where_tls_is_offered_nothing_requires_it() {
    let (replies, _) = talk(Tls::Offered, &all());
    assert!(!kinds(&replies).contains(&OptionReplyType::ErrTlsRequired));
    let (_, outcome) = talk(Tls::Offered, &[option(7, &info("disk", &[]))]);
    assert!(matches!(outcome, Outcome::Entered(_)));
}

#[test]
fn tls_forgets_what_was_negotiated_in_the_clear() {
    let select = option(10, &contexts("disk", &["base:allocation"]));
    let go = option(7, &info("disk", &[]));
    for framing in [8, 11] {
        let options = [
            option(framing, b""),
            select.clone(),
            option(STARTTLS, b""),
            go.clone(),
        ];
        let (_, outcome) = talk(Tls::Offered, &options);
        let Outcome::Entered(established) = outcome else {
            panic!("{outcome:?}")
        };
        assert_eq!(established.session.framing, Framing::Simple);
        assert!(established.session.contexts.is_empty());
        // The contexts don't come back with the framing.
        let options = [
            option(framing, b""),
            select.clone(),
            option(STARTTLS, b""),
            option(framing, b""),
            go.clone(),
        ];
        let (_, outcome) = talk(Tls::Offered, &options);
        let Outcome::Entered(established) = outcome else {
            panic!("{outcome:?}")
        };
        assert!(established.session.framing.has_chunks());
        assert!(established.session.contexts.is_empty());
    }
}

#[test]
fn data_in_the_clear_behind_starttls_ends_the_session() {
    for behind in [b"\x16\x03\x01".to_vec(), option(7, &info("disk", &[])), vec![0]] {
        let (replies, outcome) = talk(Tls::Required, &[[option(STARTTLS, b""), behind].concat()]);
        assert!(matches!(outcome, Outcome::Error(HandshakeError::Plaintext)));
        assert!(replies.is_empty(), "not even acknowledged");
    }
}

#[test]
fn nothing_is_taken_while_tls_starts() {
    let mut out = Vec::new();
    let mut handshake = Handshake::start(Tls::Required, &mut out);
    let input = [vec![0, 0, 0, 3], option(STARTTLS, b"")].concat();
    let step = handshake.receive(&mut input.as_slice(), &Shelf, &mut out);
    assert!(matches!(step, Ok(Step::StartTls)));
    let step = handshake.receive(&mut option(3, b"").as_slice(), &Shelf, &mut out);
    assert!(matches!(step, Err(HandshakeError::Over)));
}

#[test]
fn a_server_that_ends_does_not_start_tls() {
    let mut out = Vec::new();
    let mut handshake = Handshake::start(Tls::Required, &mut out);
    handshake.shut_down();
    out.clear();
    let input = [vec![0, 0, 0, 3], option(STARTTLS, b"")].concat();
    let step = handshake.receive(&mut input.as_slice(), &Shelf, &mut out);
    assert!(matches!(step, Ok(Step::Replied)));
    assert_eq!(kinds(&replies(&out)), [OptionReplyType::ErrShutdown]);
}

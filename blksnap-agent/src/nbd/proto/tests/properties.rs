//! Properties: no input makes the core panic or keep much, and the splits of the input change nothing.

use proptest::prelude::*;
use proptest::sample::Index;

use super::super::limits::MAX_OPTION_DATA;
use super::super::reply::{self, StatusExtent};
use super::super::transmission::{Event, Framing, Requests, TransmissionError};
use super::handshake::{contexts, info, option};
use super::transmission::{request, session};
use super::*;

/// Cuts `input` at these places.
fn split<'a>(input: &'a [u8], cuts: &[Index]) -> Vec<&'a [u8]> {
    let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(input.len() + 1)).collect();
    places.push(input.len());
    places.sort_unstable();
    let mut from = 0;
    places
        .into_iter()
        .map(|to| {
            let piece = &input[from..to];
            from = to;
            piece
        })
        .collect()
}

/// Names that sometimes exist.
fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("disk".into()),
        Just("other".into()),
        Just(String::new()),
        ".{0,8}"
    ]
}

fn query() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("base:".into()),
        Just("base:allocation".into()),
        Just("qemu:".into()),
        Just("qemu:dirty-bitmap:last".into()),
        ".{0,12}",
    ]
}

/// An option: well formed, broken in a byte, or noise.
fn any_option() -> impl Strategy<Value = Vec<u8>> {
    let well_formed = prop_oneof![
        name().prop_map(|name| option(1, name.as_bytes())),
        Just(option(2, b"")),
        Just(option(3, b"")),
        Just(option(8, b"")),
        Just(option(11, b"")),
        (6_u32..8, name(), prop::collection::vec(0_u16..5, 0..4))
            .prop_map(|(number, name, kinds)| option(number, &info(&name, &kinds))),
        (9_u32..11, name(), prop::collection::vec(query(), 0..4)).prop_map(|(number, name, queries)| {
            let queries: Vec<&str> = queries.iter().map(String::as_str).collect();
            option(number, &contexts(&name, &queries))
        }),
        (any::<u32>(), prop::collection::vec(any::<u8>(), 0..64))
            .prop_map(|(number, data)| option(number, &data)),
        (1_u32..12, prop::collection::vec(any::<u8>(), 0..64))
            .prop_map(|(number, data)| option(number, &data)),
    ];
    (
        well_formed,
        prop::option::weighted(0.2, (any::<Index>(), any::<u8>())),
    )
        .prop_map(|(mut bytes, broken)| {
            if let Some((place, value)) = broken {
                let place = place.index(bytes.len());
                bytes[place] = value;
            }
            bytes
        })
}

fn handshake_input() -> impl Strategy<Value = Vec<u8>> {
    let spoken = (0_u8..4, prop::collection::vec(any_option(), 0..12))
        .prop_map(|(flags, options)| [vec![0, 0, 0, flags], options.concat()].concat());
    prop_oneof![
        8 => spoken,
        1 => prop::collection::vec(any::<u8>(), 0..200),
    ]
}

/// A handshake's end in a form that can be compared.
fn told(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Entered(established) => format!("{} {:?}", established.export, established.session),
        other => format!("{other:?}"),
    }
}

/// Events of these pieces, the error that ended them and what was not taken.
fn events(framing: Framing, pieces: &[&[u8]]) -> (Vec<Event>, Option<TransmissionError>) {
    let mut requests = Requests::new(session(framing, true));
    let mut events = Vec::new();
    for piece in pieces {
        let mut input = *piece;
        loop {
            match requests.receive(&mut input) {
                Ok(Some(event)) => events.push(event),
                Ok(None) => break,
                Err(error) => return (events, Some(error)),
            }
        }
        assert!(input.is_empty(), "input is left though more is wanted");
    }
    (events, None)
}

fn any_request() -> impl Strategy<Value = Vec<u8>> {
    let header = (
        prop_oneof![3 => Just(0_u16), 1 => 0_u16..64, 1 => any::<u16>()],
        prop_oneof![8 => 0_u16..9, 1 => any::<u16>()],
        prop_oneof![4 => 0..SIZE * 2, 1 => any::<u64>()],
        prop_oneof![4 => 0_u32..3000, 1 => any::<u32>()],
    );
    (header, any::<u8>()).prop_map(|((flags, command, offset, length), fill)| {
        let mut bytes = request(flags, command, offset, length);
        if command == 1 && length < 3000 {
            bytes.resize(bytes.len() + length as usize, fill);
        }
        bytes
    })
}

fn transmission_input() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        8 => prop::collection::vec(any_request(), 0..12).prop_map(|requests| requests.concat()),
        1 => prop::collection::vec(any::<u8>(), 0..300),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_handshake_does_not_depend_on_splits(
        input in handshake_input(),
        cuts in prop::collection::vec(any::<Index>(), 0..20),
    ) {
        let whole = feed([input.as_slice()]);
        let pieces = feed(split(&input, &cuts));
        let single = feed(input.chunks(1));
        for (out, outcome, left) in [&pieces, &single] {
            prop_assert_eq!(out, &whole.0);
            prop_assert_eq!(told(outcome), told(&whole.1));
            prop_assert_eq!(left, &whole.2);
        }
        // Answers are bounded by what was asked: at most the list of exports or contexts for each 16 bytes.
        prop_assert!(whole.0.len() <= 18 + 134 + (input.len() / 16 + 1) * 300);
    }

    #[test]
    fn long_options_are_skipped_in_bounded_memory(
        number in 0_u32..13,
        length in 0_u32..MAX_OPTION_DATA * 4,
        piece in 1_usize..100_000,
    ) {
        let option = option(number, &vec![0; length as usize]);
        let input = [vec![0, 0, 0, 3], option].concat();
        // `feed` checks what is kept after each step.
        let (out, _, _) = feed(input.chunks(piece));
        prop_assert!(out.len() < 1000);
    }

    #[test]
    fn requests_do_not_depend_on_splits(
        input in transmission_input(),
        cuts in prop::collection::vec(any::<Index>(), 0..20),
        structured in any::<bool>(),
    ) {
        let framing = if structured { Framing::Structured } else { Framing::Simple };
        let whole = events(framing, &[&input]);
        prop_assert_eq!(&events(framing, &split(&input, &cuts)), &whole);
        prop_assert_eq!(&events(framing, &input.chunks(1).collect::<Vec<_>>()), &whole);
    }

    #[test]
    fn requests_to_do_lie_inside_the_export(input in transmission_input()) {
        for event in events(Framing::Structured, &[&input]).0 {
            if let Event::Do(request) = event {
                use super::super::transmission::Command;
                let (offset, length) = match request.command {
                    Command::Read { offset, length, .. } => (offset, u64::from(length)),
                    Command::Write { offset, length, .. } => (offset, u64::from(length)),
                    Command::Cache { offset, length }
                    | Command::Trim { offset, length, .. }
                    | Command::WriteZeroes { offset, length, .. }
                    | Command::BlockStatus { offset, length, .. } => (offset, length),
                    Command::Flush => (0, 0),
                };
                prop_assert!(offset.checked_add(length).is_some_and(|end| end <= SIZE));
            }
        }
    }

    /// Oracle: the flags of each byte.
    #[test]
    fn merged_extents_tell_each_byte_rightly(
        list in prop::collection::vec((0_u64..20, 0_u32..3), 0..20),
        length in 1_u64..150,
        one in any::<bool>(),
    ) {
        let extents: Vec<StatusExtent> =
            list.iter().map(|&(length, flags)| StatusExtent { length, flags }).collect();
        let bytes: Vec<u32> =
            list.iter().flat_map(|&(length, flags)| (0..length).map(move |_| flags)).collect();
        let merged = reply::merged(&extents, length, if one { 1 } else { 100 });
        let told: Vec<u32> = merged
            .iter()
            .flat_map(|one| (0..one.length).map(|_| one.flags))
            .collect();
        prop_assert!(told.len() as u64 <= length);
        prop_assert!(bytes.starts_with(&told));
        prop_assert!(merged.iter().all(|one| one.length > 0));
        prop_assert!(merged.windows(2).all(|pair| pair[0].flags != pair[1].flags));
        if one {
            prop_assert!(merged.len() <= 1);
        } else {
            prop_assert_eq!(told.len() as u64, length.min(bytes.len() as u64));
        }
    }
}

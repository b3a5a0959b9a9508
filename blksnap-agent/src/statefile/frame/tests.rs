//! Frames that come back, and frames that must not.

use proptest::prelude::*;
use serde::Deserialize;

use super::*;

const FORMAT: Format = Format {
    name: "frame-test",
    version: 3,
};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Header {
    name: String,
    number: u64,
}

fn header() -> Header {
    Header {
        name: "\u{e9}\"\\".to_owned(),
        number: u64::MAX,
    }
}

fn encoded(sections: &[&[u8]]) -> Vec<u8> {
    let mut out = Vec::new();
    encode(&mut out, FORMAT, &header(), sections).unwrap();
    out
}

fn decoded(bytes: &[u8]) -> Result<(Header, Vec<Vec<u8>>), FrameError> {
    decode(bytes, bytes.len() as u64, FORMAT)
}

/// Bytes that no compression makes shorter.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    })
    .take(length)
    .collect()
}

#[test]
fn large_sections_come_back_and_zeros_cost_little() {
    for length in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK] {
        let (zeros, noise) = (vec![0; length], noise(length));
        let bytes = encoded(&[&zeros, &noise]);
        assert!(
            bytes.len() < length + length / 200 + 300,
            "{length}: {}",
            bytes.len()
        );
        assert_eq!(decoded(&bytes).unwrap(), (header(), vec![zeros, noise]));
    }
    let bytes = encoded(&[]);
    assert_eq!(decoded(&bytes).unwrap(), (header(), Vec::new()));
}

#[test]
fn what_is_too_long_is_not_written() {
    let section: &[u8] = &[];
    for (format, count) in [
        (FORMAT, MAX_SECTIONS + 1),
        (
            Format {
                name: "a-name-that-is-longer-than-32-bytes",
                ..FORMAT
            },
            1,
        ),
    ] {
        let sections = vec![section; count];
        assert!(encode(io::sink(), format, &header(), &sections).is_err());
    }
    let long = Header {
        name: "x".repeat(MAX_HEADER),
        number: 0,
    };
    assert!(encode(io::sink(), FORMAT, &long, &[] as &[&[u8]]).is_err());
}

#[test]
fn every_flipped_bit_every_cut_and_every_addition_is_refused() {
    let mut map = vec![0_u8; 300];
    map[17..40].fill(3);
    let bytes = encoded(&[&map, &noise(50), &[]]);
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut wrong = bytes.clone();
            wrong[at] ^= 1 << bit;
            let error = decoded(&wrong).unwrap_err();
            assert!(
                matches!(error, FrameError::Damaged(_)),
                "bit {bit} of {at}: {error}"
            );
        }
        assert!(decoded(&bytes[..at]).is_err(), "cut at {at}");
    }
    for more in [&b"\0"[..], b"more"] {
        let error = decoded(&[&bytes, more].concat()).unwrap_err();
        assert!(error.to_string().contains("after its end"), "{error}");
    }
    // Two states of one file, mixed at any place.
    map[5] = 4;
    let other = encoded(&[&map, &noise(50), &[]]);
    for at in 0..bytes.len().min(other.len()) {
        let mixed = [&bytes[..at], &other[at..]].concat();
        assert!(
            mixed == bytes || mixed == other || decoded(&mixed).is_err(),
            "mixed at {at}"
        );
    }
}

#[test]
fn other_kinds_and_versions_are_told_apart_from_damage() {
    let name = Format {
        name: "frame",
        ..FORMAT
    };
    for other in [name, Format { version: 4, ..FORMAT }] {
        let mut bytes = Vec::new();
        encode(&mut bytes, other, &header(), &[] as &[&[u8]]).unwrap();
        let error = decoded(&bytes).unwrap_err();
        let want = format!("it is {:?} version {}", other.name, other.version);
        assert!(matches!(error, FrameError::Version(_)), "{error}");
        assert_eq!(error.to_string(), want);
    }
    let mut bytes = encoded(&[]);
    bytes[8] = 2;
    let sum = crc32c::crc32c(&bytes[..HEAD - 4]);
    bytes[HEAD - 4..HEAD].copy_from_slice(&sum.to_le_bytes());
    assert!(matches!(decoded(&bytes), Err(FrameError::Version(_))));
}

/// A frame with these words in its head and lengths, the checksums right.
fn forged(header_length: u32, count: u32, lengths: &[u64]) -> Vec<u8> {
    let mut bytes = encoded(&[]);
    bytes[48..52].copy_from_slice(&header_length.to_le_bytes());
    bytes[52..56].copy_from_slice(&count.to_le_bytes());
    let sum = crc32c::crc32c(&bytes[..HEAD - 4]);
    bytes[HEAD - 4..HEAD].copy_from_slice(&sum.to_le_bytes());
    bytes.truncate(HEAD);
    let lengths: Vec<u8> = lengths.iter().flat_map(|l| l.to_le_bytes()).collect();
    bytes.extend_from_slice(&lengths);
    bytes.extend_from_slice(&crc32c::crc32c(&lengths).to_le_bytes());
    bytes
}

#[test]
fn no_length_is_believed_beyond_what_the_file_can_hold() {
    for bytes in [
        forged(u32::MAX, 0, &[]),
        forged(2, u32::MAX, &[]),
        forged(2, 1, &[u64::MAX]),
        forged(2, 1, &[MAX_SECTION + 1]),
        forged(2, 2, &[MAX_SECTION, MAX_SECTION]),
        forged(2, 1, &[100_000]),
    ] {
        let error = decoded(&bytes).unwrap_err().to_string();
        assert!(
            error.contains("more than can be") || error.contains("longer than it can hold"),
            "{error}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_sections_come_back(
        sections in prop::collection::vec(
            prop::collection::vec((any::<u8>(), 1..5000_usize), 0..20)
                .prop_map(|runs| runs.iter().flat_map(|(byte, n)| std::iter::repeat_n(*byte, *n)).collect::<Vec<u8>>()),
            0..4,
        ),
    ) {
        let parts: Vec<&[u8]> = sections.iter().map(Vec::as_slice).collect();
        prop_assert_eq!(decoded(&encoded(&parts)).unwrap(), (header(), sections));
    }

    #[test]
    fn any_bytes_are_refused_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(decoded(&bytes).is_err());
        // The same behind a right head.
        let bytes = [&encoded(&[])[..HEAD], &bytes].concat();
        prop_assert!(decoded(&bytes).is_err());
    }
}

//! NBD handshake: whatever a client sends before the transmission.
//!
//! An input is the mode of TLS, the places of cuts, and items: options that are nearly right, or bytes as they are. The
//! oracle reads the client's options and the server's replies in its own way, keeps what was negotiated, and compares
//! one piece with many.

use arbitrary::{Arbitrary, Unstructured};
use blksnap_agent::nbd::proto::Tls;
use blksnap_tests::nbd::build::{contexts, info, option, option_claiming};
use blksnap_tests::nbd::opt;
use blksnap_tests::nbd::oracle::check_handshake;

/// Names of exports, the first three exist.
const NAMES: [&str; 5] = ["disk", "coarse", "scratch", "", "none"];

/// Queries for contexts, the first three exist.
const QUERIES: [&str; 8] = [
    "base:allocation",
    "qemu:dirty-bitmap:last",
    "qemu:dirty-bitmap:since-x-1",
    "qemu:dirty-bitmap:since-y-1",
    "base:",
    "qemu:dirty-bitmap:",
    "x-other:",
    "nocolon",
];

/// One thing that a client sends.
#[derive(Arbitrary, Debug)]
enum Item<'a> {
    /// Bytes as they are.
    Raw(&'a [u8]),
    /// An option with any data.
    Option(u8, &'a [u8]),
    /// An option that says another length.
    Claiming(u8, u32, &'a [u8]),
    /// An option without data.
    Bare(u8),
    /// INFO or GO.
    Info { go: bool, name: u8, kinds: [u8; 2] },
    /// Contexts, listed or selected; a bit for each query.
    Contexts { set: bool, name: u8, queries: u8 },
    /// Bytes of no meaning: an option with a long name or much data.
    Long(u8, u16),
}

fn pick<'t>(from: &[&'t str], index: u8) -> &'t str {
    from[usize::from(index) % from.len()]
}

fn encode(item: &Item<'_>) -> Vec<u8> {
    match *item {
        Item::Raw(bytes) => bytes.to_vec(),
        Item::Option(number, data) => option(u32::from(number % 16), data),
        Item::Claiming(number, length, data) => option_claiming(u32::from(number % 16), length, data),
        Item::Bare(number) => option(u32::from(number % 16), b""),
        Item::Info { go, name, kinds } => {
            let number = if go { opt::GO } else { opt::INFO };
            option(number, &info(pick(&NAMES, name), &kinds.map(u16::from)))
        }
        Item::Contexts { set, name, queries } => {
            let number = if set {
                opt::SET_META_CONTEXT
            } else {
                opt::LIST_META_CONTEXT
            };
            let queries: Vec<&str> = QUERIES
                .into_iter()
                .enumerate()
                .filter(|(bit, _)| queries & (1 << bit) != 0)
                .map(|(_, query)| query)
                .collect();
            option(number, &contexts(pick(&NAMES, name), &queries))
        }
        Item::Long(number, length) => option(u32::from(number % 16), &vec![b'a'; usize::from(length) * 2]),
    }
}

/// Runs one input.
///
/// # Panics
/// When the core differs from the oracle.
pub fn run(data: &[u8]) {
    // An input that is too short is no session.
    let _ = session(&mut Unstructured::new(data));
}

fn session(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let tls = *input.choose(&[Tls::Unavailable, Tls::Offered, Tls::Required])?;
    let flags = *input.choose(&[3_u32, 3, 3, 1, 0, 2, 4, u32::MAX])?;
    let cuts = <[u8; 3]>::arbitrary(input)?;
    let mut bytes = flags.to_be_bytes().to_vec();
    while !input.is_empty() && bytes.len() < 1 << 18 {
        bytes.extend(encode(&Item::arbitrary(input)?));
    }
    check_handshake(tls, &bytes, &cuts);
    Ok(())
}

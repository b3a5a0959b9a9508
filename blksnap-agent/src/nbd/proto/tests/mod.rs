//! Tests of the protocol core, by role. The client's side is written here byte by byte, from the specification.

mod handshake;
mod properties;
mod reply;
mod tls;
mod transmission;

use super::catalog::{BlockSizes, Catalog, ExportFacts, Found, Listed};
use super::context::ContextName;
use super::handshake::{Established, Handshake, HandshakeError, Step, Tls};

/// Size of the test export in bytes.
const SIZE: u64 = 1 << 20;

/// A catalog of one export, `disk`, which is also the default one, one that is listed without a description, and one,
/// `scratch`, that is not listed, takes writes, rotates and is for one connection.
struct Shelf;

impl Catalog for Shelf {
    type Export = &'static str;

    fn list(&self) -> Vec<Listed> {
        vec![
            Listed {
                name: "disk".into(),
                description: "A disk".into(),
            },
            Listed {
                name: "other".into(),
                description: String::new(),
            },
        ]
    }

    fn find(&self, name: &str) -> Option<Found<&'static str>> {
        let (name, export, block_sizes) = match name {
            "" | "disk" => ("disk", "handle of disk", BlockSizes::DEFAULT),
            "other" => (
                "other",
                "handle of other",
                BlockSizes::new(512, 4096, 1 << 20).ok()?,
            ),
            "scratch" => ("scratch", "handle of scratch", BlockSizes::DEFAULT),
            _ => return None,
        };
        Some(Found {
            facts: ExportFacts {
                name: name.into(),
                description: if name == "disk" {
                    "A disk".into()
                } else {
                    String::new()
                },
                size: SIZE,
                block_sizes,
                read_only: name != "scratch",
                rotational: name == "scratch",
                multi_conn: name != "scratch",
                contexts: vec![ContextName::base_allocation(), ContextName::dirty_bitmap_last()],
            },
            export,
        })
    }

    fn refuse_context(&self, _: &&'static str, query: &str) -> Option<String> {
        query
            .strip_prefix("qemu:dirty-bitmap:since-")
            .map(|base| format!("full copy needed: {base} is too old"))
    }
}

/// How a handshake ended.
#[derive(Debug)]
enum Outcome {
    More,
    Entered(Box<Established<&'static str>>),
    Ended,
    Error(HandshakeError),
}

/// Feeds `input` in the given pieces and gives the output, the outcome and the bytes left over.
fn feed<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<u8>, Outcome, Vec<u8>) {
    feed_with(Tls::Unavailable, pieces)
}

/// The same in this mode. TLS starts as if it had no bytes of its own, at the end of a piece.
fn feed_with<'a>(tls: Tls, pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<u8>, Outcome, Vec<u8>) {
    let mut out = Vec::new();
    let mut handshake = Handshake::start(tls, &mut out);
    let mut pieces = pieces.into_iter();
    let mut outcome = Outcome::More;
    let mut left = Vec::new();
    'pieces: for piece in pieces.by_ref() {
        let mut input = piece;
        loop {
            let step = handshake.receive(&mut input, &Shelf, &mut out);
            assert!(handshake.buffered() <= super::limits::MAX_OPTION_DATA as usize);
            match step {
                Ok(Step::NeedMore) => {
                    assert!(input.is_empty(), "input is left though more is wanted");
                    break;
                }
                Ok(Step::Replied) => continue,
                Ok(Step::StartTls) => {
                    assert!(input.is_empty(), "TLS starts after data in the clear");
                    handshake.tls_started();
                    break;
                }
                Ok(Step::Enter(established)) => outcome = Outcome::Entered(established),
                Ok(Step::End) => outcome = Outcome::Ended,
                Err(error) => outcome = Outcome::Error(error),
            }
            left.extend_from_slice(input);
            break 'pieces;
        }
    }
    for piece in pieces {
        left.extend_from_slice(piece);
    }
    (out, outcome, left)
}

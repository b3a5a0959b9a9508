//! NBD transmission: whatever a client sends once it has chosen an export.
//!
//! An input is what was agreed, the places of cuts, and items: requests that are nearly right, or bytes as they are. The
//! oracle judges the whole stream by the specification, reads the answers as a client does, and compares one piece
//! with many.

use arbitrary::{Arbitrary, Unstructured};
use blksnap_tests::nbd::oracle::{check_transmission, shown};
use blksnap_tests::nbd::{Agreed, Framing, Request, cmd};

/// Most bytes of a stream: the answers are built, too.
const MOST: usize = 1 << 18;

/// One thing that a client sends.
#[derive(Arbitrary, Debug)]
enum Item<'a> {
    /// Bytes as they are.
    Raw(&'a [u8]),
    /// A request near the export; the range is in blocks.
    Near {
        command: u8,
        flags: u8,
        cookie: u8,
        offset: u16,
        length: u16,
        data: u8,
    },
    /// A request anywhere.
    Far {
        command: u16,
        flags: u16,
        cookie: u64,
        offset: u64,
        length: u64,
    },
    /// A status request that names contexts, at most four.
    Status {
        flags: u8,
        length: u16,
        ids: [u8; 4],
        count: u8,
    },
}

fn encode(item: &Item<'_>, agreed: &Agreed) -> Vec<u8> {
    let block = u64::from(agreed.minimum);
    let request = match *item {
        Item::Raw(bytes) => return bytes.to_vec(),
        Item::Near {
            command,
            flags,
            cookie,
            offset,
            length,
            data,
        } => {
            let command = u16::from(command % 10);
            let (offset, length) = (u64::from(offset) * block, u64::from(length) * block);
            let mut request = Request::new(command, offset, length);
            if command == cmd::WRITE {
                let length = usize::try_from(length % 8192).unwrap_or(0);
                request = Request::write(offset, vec![data; length]);
            } else if command == cmd::FLUSH && data < 200 {
                request = Request::new(command, 0, 0);
            }
            request.cookie = cookie.into();
            request.with(u16::from(flags & 31))
        }
        Item::Far {
            command,
            flags,
            cookie,
            offset,
            length,
        } => Request {
            flags,
            cookie,
            ..Request::new(command, offset, length)
        },
        Item::Status {
            flags,
            length,
            ids,
            count,
        } => {
            let ids: Vec<u32> = ids.into_iter().map(|id| u32::from(id % 6)).collect();
            Request::status_of(0, u64::from(length) * block, &ids[..usize::from(count % 5)])
                .with(u16::from(flags & 8))
        }
    };
    request.encode(agreed.framing)
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
    let framing = *input.choose(&Framing::ALL)?;
    let (minimum, maximum) = *input.choose(&[(1, 1 << 25), (512, 1 << 16), (4096, 4096)])?;
    let read_only = bool::arbitrary(input)?;
    let contexts = if framing.has_chunks() {
        input.int_in_range(0..=4_u32)?
    } else {
        0
    };
    let agreed = Agreed {
        framing,
        // A read is answered in memory, for each fuzzed input anew.
        size: input.int_in_range(0..=1_u64 << 17)?,
        minimum,
        maximum,
        flags: shown(framing, read_only, contexts > 0),
        contexts: (1..=contexts).collect(),
    };
    let cuts = <[u8; 3]>::arbitrary(input)?;
    let mut stream = Vec::new();
    while !input.is_empty() && stream.len() < MOST {
        stream.extend(encode(&Item::arbitrary(input)?, &agreed));
    }
    check_transmission(&agreed, &stream, &cuts);
    Ok(())
}

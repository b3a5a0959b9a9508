//! Load: an NBD client that writes each of some blocks once, with a fixed number of requests in flight.

use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use blksnap_agent::nbd::address::Address;
use blksnap_agent::nbd::client::Connection;

use crate::nbd::load::{REPLY, REQUEST_MAGIC, check};

/// Bytes of a write.
pub(crate) const BLOCK: u32 = 4096;
/// Requests in flight.
pub(crate) const DEPTH: usize = 32;

const PATIENCE: Duration = Duration::from_secs(20);
const HEAD: usize = 28;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;

fn head(command: u16, offset: u64, length: u32) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    head[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    head[6..8].copy_from_slice(&command.to_be_bytes());
    head[8..16].copy_from_slice(&offset.to_be_bytes());
    head[16..24].copy_from_slice(&offset.to_be_bytes());
    head[24..28].copy_from_slice(&length.to_be_bytes());
    head
}

/// Writes the blocks with these numbers, and gives the seconds from the first request to the last answer.
pub(crate) fn write(socket: &Path, export: &str, blocks: &[u64], fill: u8) -> Result<f64> {
    let connection = Connection::open(&Address::Unix(socket.to_owned()), export, PATIENCE)?;
    let mut stream = UnixStream::from(OwnedFd::from(connection));
    let data = [fill; BLOCK as usize];
    let mut replies = [0; REPLY * DEPTH];
    let mut request = Vec::with_capacity(DEPTH * (HEAD + data.len()));
    let mut next = blocks.iter();
    let (mut room, mut answered, mut have) = (DEPTH, 0, 0);
    let started = Instant::now();
    while answered < blocks.len() {
        // As many requests at once as there were answers: both servers get them as they ask for them.
        for block in next.by_ref().take(room) {
            request.extend_from_slice(&head(WRITE, block * u64::from(BLOCK), BLOCK));
            request.extend_from_slice(&data);
        }
        if !request.is_empty() {
            stream.write_all(&request).context("send writes")?;
            request.clear();
        }
        have += stream.read(&mut replies[have..]).context("receive answers")?;
        anyhow::ensure!(have > 0, "the server closed the connection");
        let (whole, _) = replies[..have].as_chunks::<REPLY>();
        room = whole.len();
        whole.iter().try_for_each(check)?;
        answered += room;
        replies.copy_within(room * REPLY..have, 0);
        have -= room * REPLY;
    }
    let seconds = started.elapsed().as_secs_f64();
    stream.write_all(&head(DISCONNECT, 0, 0)).context("disconnect")?;
    Ok(seconds)
}

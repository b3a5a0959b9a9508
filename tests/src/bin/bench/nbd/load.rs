//! Load: an NBD client that does as little as a client can, so that the server is what is measured.
//!
//! Each connection has a thread and a fixed number of requests in flight. Simple replies; what was read is received
//! and not looked at, but for the first bytes of each block, which hold its number.

use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use blksnap_agent::nbd::address::Address;
use blksnap_agent::nbd::client::Connection;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const REQUEST: usize = 28;
pub(crate) const REPLY: usize = 16;

/// Longest handshake.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the clients do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    RandomRead,
    SequentialRead,
    SequentialWrite,
}

/// A load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) kind: Kind,
    /// Bytes of a request.
    pub(crate) block: usize,
    /// Requests in flight on each connection.
    pub(crate) depth: usize,
    pub(crate) connections: usize,
    pub(crate) time: Duration,
}

/// What a load came to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    pub(crate) requests: f64,
    pub(crate) seconds: f64,
}

/// Runs a load against the server at `socket`.
pub(crate) fn run(load: &Load, socket: &Path, export: &str) -> Result<Rate> {
    let address = Address::Unix(socket.to_owned());
    let connections = (0..load.connections)
        .map(|_| Ok(Connection::open(&address, export, PATIENCE)?))
        .collect::<Result<Vec<_>>>()?;
    let barrier = Barrier::new(load.connections);
    std::thread::scope(|scope| {
        let threads: Vec<_> = connections
            .into_iter()
            .enumerate()
            .map(|(index, connection)| {
                let barrier = &barrier;
                scope.spawn(move || {
                    let size = connection.size;
                    let mut client = Client {
                        stream: UnixStream::from(OwnedFd::from(connection)),
                        load: *load,
                        size,
                        random: SmallRng::seed_from_u64(index as u64),
                        // Each client has a part of the file of its own.
                        next: size / load.connections as u64 * index as u64,
                        requests: Vec::new(),
                    };
                    barrier.wait();
                    let started = Instant::now();
                    let done = match load.kind {
                        Kind::SequentialWrite => client.write()?,
                        Kind::RandomRead | Kind::SequentialRead => client.read()?,
                    };
                    let seconds = started.elapsed().as_secs_f64();
                    client.disconnect()?;
                    Ok::<_, anyhow::Error>((done, seconds))
                })
            })
            .collect();
        let mut rate = Rate {
            requests: 0.0,
            seconds: 0.0,
        };
        for thread in threads {
            let (done, seconds) = thread.join().map_err(|_| anyhow!("a client panicked"))??;
            rate.requests += f64::from(done);
            rate.seconds = rate.seconds.max(seconds);
        }
        Ok(rate)
    })
}

struct Client {
    stream: UnixStream,
    load: Load,
    size: u64,
    random: SmallRng,
    next: u64,
    requests: Vec<u8>,
}

/// What the next received bytes are.
enum Expect {
    Header([u8; REPLY], usize),
    Data(usize),
}

impl Client {
    /// Where the next request goes.
    fn offset(&mut self) -> u64 {
        let block = self.load.block as u64;
        if self.load.kind == Kind::RandomRead {
            return self.random.random_range(0..self.size / block) * block;
        }
        let offset = self.next;
        self.next = (offset + block) % self.size;
        offset
    }

    fn request(&mut self, command: u16) {
        let offset = self.offset();
        let length = u32::try_from(self.load.block).unwrap_or(u32::MAX);
        let mut request = [0; REQUEST];
        request[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        request[6..8].copy_from_slice(&command.to_be_bytes());
        request[8..16].copy_from_slice(&offset.to_be_bytes());
        request[16..24].copy_from_slice(&offset.to_be_bytes());
        request[24..28].copy_from_slice(&length.to_be_bytes());
        self.requests.extend_from_slice(&request);
    }

    fn send(&mut self) -> Result<()> {
        self.stream.write_all(&self.requests).context("send requests")?;
        self.requests.clear();
        Ok(())
    }

    /// Reads until the time is over and gives the number of answers.
    fn read(&mut self) -> Result<u32> {
        let end = Instant::now() + self.load.time;
        let mut buffer = vec![0; (self.load.block + REPLY).max(256 << 10)];
        let mut in_flight = self.load.depth;
        for _ in 0..in_flight {
            self.request(0);
        }
        self.send()?;
        let mut done = 0;
        let mut expect = Expect::Header([0; REPLY], 0);
        let mut over = false;
        while in_flight > 0 {
            let count = self.stream.read(&mut buffer).context("receive answers")?;
            ensure!(count > 0, "the server closed the connection");
            over = over || Instant::now() >= end;
            let mut rest = &buffer[..count];
            while !rest.is_empty() {
                match &mut expect {
                    Expect::Header(header, have) => {
                        let taken = rest.len().min(REPLY - *have);
                        header[*have..*have + taken].copy_from_slice(&rest[..taken]);
                        *have += taken;
                        rest = &rest[taken..];
                        if *have == REPLY {
                            check(header)?;
                            expect = Expect::Data(self.load.block);
                        }
                    }
                    Expect::Data(left) => {
                        let taken = rest.len().min(*left);
                        rest = &rest[taken..];
                        *left -= taken;
                        if *left == 0 {
                            expect = Expect::Header([0; REPLY], 0);
                            if over {
                                in_flight -= 1;
                            } else {
                                done += 1;
                                self.request(0);
                            }
                        }
                    }
                }
            }
            if !self.requests.is_empty() {
                self.send()?;
            }
        }
        Ok(done)
    }

    /// Writes until the time is over and gives the number of answers.
    fn write(&mut self) -> Result<u32> {
        let end = Instant::now() + self.load.time;
        let data = vec![0x5a; self.load.block];
        let mut header = [0; REPLY];
        let (mut in_flight, mut done) = (0, 0);
        loop {
            let over = Instant::now() >= end;
            if over && in_flight == 0 {
                return Ok(done);
            }
            if over || in_flight == self.load.depth {
                self.stream.read_exact(&mut header).context("receive an answer")?;
                check(&header)?;
                in_flight -= 1;
                done += 1;
                continue;
            }
            self.request(1);
            self.send()?;
            self.stream.write_all(&data).context("send data")?;
            in_flight += 1;
        }
    }

    fn disconnect(mut self) -> Result<()> {
        self.request(2);
        self.send()
    }
}

pub(crate) fn check(header: &[u8; REPLY]) -> Result<()> {
    let magic = u32::from_be_bytes([header[0], header[1], header[2], header[3]]);
    let error = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
    ensure!(
        magic == REPLY_MAGIC && error == 0,
        "an answer with magic {magic:#x}, error {error}"
    );
    Ok(())
}

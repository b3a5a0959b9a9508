//! Tests of the server over its socket, with a client written here byte by byte: what other people's clients never
//! do, or do only when something fails.

use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::counters::CountersSnapshot;
use super::export::{Export, ExportError};
use super::proto::wire::{CommandType, ErrorCode};
use super::proto::{ContextName, StatusExtent};
use super::registry::Exports;
use super::server::{Server, ServerLimits};

const SIZE: u64 = 64 << 20;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const WRITE_ZEROES: u16 = 6;
const BLOCK_STATUS: u16 = 7;

/// A door that reads wait at.
#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }

    fn pass(&self) {
        let open = self.open.lock().unwrap();
        drop(self.opened.wait_while(open, |open| !*open).unwrap());
    }
}

/// Opens the gate when the test ends, however it ends, so that no thread stays behind.
struct OpenAtEnd(Arc<Gate>);

impl Drop for OpenAtEnd {
    fn drop(&mut self) {
        self.0.open();
    }
}

/// Each byte is the lowest byte of its block's number. Reads below 4096 wait at the gate.
struct Blocks {
    gate: Arc<Gate>,
    failing: AtomicBool,
}

const PANIC_AT: u64 = 32 << 20;

impl Export for Blocks {
    fn name(&self) -> &str {
        "blocks"
    }

    fn size(&self) -> u64 {
        SIZE
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), ExportError> {
        assert_ne!(offset, PANIC_AT, "an export that is broken on purpose");
        if self.failing.load(Ordering::SeqCst) {
            return Err(ExportError::Corrupted {
                name: "blocks".into(),
                reason: "the difference storage is full".into(),
            });
        }
        if offset < 4096 {
            self.gate.pass();
        }
        for (byte, position) in buffer.iter_mut().zip(offset..) {
            *byte = (position / 4096).to_be_bytes()[7];
        }
        Ok(())
    }

    fn contexts(&self) -> Vec<ContextName> {
        vec![ContextName::base_allocation()]
    }

    fn block_status(
        &self,
        _: &ContextName,
        _: u64,
        length: u64,
        _: usize,
    ) -> Result<Vec<StatusExtent>, ExportError> {
        Ok(vec![StatusExtent { length, flags: 0 }])
    }
}

/// A server with the export `blocks`.
struct Fixture {
    directory: TempDir,
    server: Server,
    exports: Arc<Exports>,
    export: Arc<Blocks>,
    gate: Arc<Gate>,
    _open: OpenAtEnd,
}

impl Fixture {
    fn new(limits: ServerLimits) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let gate = Arc::new(Gate::default());
        let export = Arc::new(Blocks {
            gate: Arc::clone(&gate),
            failing: AtomicBool::new(false),
        });
        let exports = Arc::new(Exports::new());
        exports.add(Arc::clone(&export) as Arc<dyn Export>).unwrap();
        let server = Server::start(&directory.path().join("s"), Arc::clone(&exports), &limits).unwrap();
        Self {
            directory,
            server,
            exports,
            export,
            _open: OpenAtEnd(Arc::clone(&gate)),
            gate,
        }
    }

    fn path(&self) -> &Path {
        self.server.path().unwrap()
    }

    fn counters(&self) -> CountersSnapshot {
        self.server.counters().snapshot()
    }

    /// Waits until the counters are so.
    async fn wait_for(&self, what: impl Fn(&CountersSnapshot) -> bool) {
        while !what(&self.counters()) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// A client in transmission with simple replies.
struct Client(UnixStream);

impl Client {
    async fn connect(path: &Path) -> Self {
        Self::choose(path, b"blocks").await.unwrap()
    }

    async fn choose(path: &Path, name: &[u8]) -> io::Result<Self> {
        let mut stream = UnixStream::connect(path).await?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).await?;
        let mut hello = vec![0, 0, 0, 3];
        hello.extend_from_slice(b"IHAVEOPT\0\0\0\x01\0\0\0");
        hello.push(u8::try_from(name.len()).unwrap());
        hello.extend_from_slice(name);
        stream.write_all(&hello).await?;
        let mut export = [0; 10];
        stream.read_exact(&mut export).await?;
        assert_eq!(export[..8], SIZE.to_be_bytes());
        Ok(Self(stream))
    }

    async fn send(&mut self, cookie: u64, command: u16, offset: u64, length: u32) {
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend_from_slice(&[0, 0]);
        bytes.extend_from_slice(&command.to_be_bytes());
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&length.to_be_bytes());
        self.0.write_all(&bytes).await.unwrap();
    }

    /// Error and cookie of the next reply.
    async fn reply(&mut self) -> io::Result<(u32, u64)> {
        let mut bytes = [0; 16];
        self.0.read_exact(&mut bytes).await?;
        assert_eq!(bytes[..4], 0x6744_6698_u32.to_be_bytes());
        let error = u32::from_be_bytes(bytes[4..8].try_into().unwrap());
        Ok((error, u64::from_be_bytes(bytes[8..].try_into().unwrap())))
    }

    async fn data(&mut self, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.0.read_exact(&mut data).await.unwrap();
        data
    }

    async fn assert_read(&mut self, block: u8) {
        self.send(1, READ, u64::from(block) * 4096, 4096).await;
        assert_eq!(self.reply().await.unwrap(), (0, 1));
        assert_eq!(self.data(4096).await, [block; 4096]);
    }

    async fn assert_closed(&mut self) {
        match self.0.read(&mut [0; 16]).await {
            Ok(0) => {}
            Ok(count) => panic!("{count} more bytes"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        }
    }
}

#[tokio::test]
async fn writes_are_refused_and_the_session_goes_on() {
    let fixture = Fixture::new(ServerLimits::default());
    let mut client = Client::connect(fixture.path()).await;
    for (cookie, command) in (10..).zip([WRITE, TRIM, WRITE_ZEROES]) {
        client.send(cookie, command, 0, 100_000).await;
        if command == WRITE {
            client.0.write_all(&vec![0x25; 100_000]).await.unwrap();
        }
        assert_eq!(client.reply().await.unwrap(), (1, cookie), "EPERM");
    }
    client.assert_read(7).await;
    let counters = fixture.counters();
    for kind in [
        CommandType::Write,
        CommandType::Trim,
        CommandType::WriteZeroes,
        CommandType::Read,
    ] {
        assert_eq!(counters.requests_of(kind), 1, "{kind:?}");
    }
    assert_eq!(counters.errors_of(ErrorCode::NotPermitted), 3);
    assert_eq!(counters.bytes_read, 4096);
}

#[tokio::test]
async fn other_commands_and_errors() {
    let fixture = Fixture::new(ServerLimits::default());
    let mut client = Client::connect(fixture.path()).await;
    for (command, offset, length, error) in [
        (FLUSH, 0, 0, 0),
        (CACHE, 4096, 4096, 0),
        (READ, SIZE, 1, 22),
        (READ, 4096, 0, 0),
        (BLOCK_STATUS, 0, 4096, 22),
        (99, 0, 4096, 22),
        (8, 0, 4096, 22),
    ] {
        client.send(5, command, offset, length).await;
        assert_eq!(client.reply().await.unwrap(), (error, 5), "command {command}");
    }
    client.assert_read(3).await;
    assert_eq!(fixture.counters().requests_unknown, 1);
}

#[tokio::test]
async fn replies_come_in_the_order_of_completion() {
    let fixture = Fixture::new(ServerLimits::default());
    let mut client = Client::connect(fixture.path()).await;
    client.send(1, READ, 0, 4096).await;
    client.send(2, READ, 4096, 4096).await;
    assert_eq!(
        client.reply().await.unwrap(),
        (0, 2),
        "the one that does not wait is first"
    );
    assert_eq!(client.data(4096).await, [1; 4096]);
    fixture.gate.open();
    assert_eq!(client.reply().await.unwrap(), (0, 1));
    assert_eq!(client.data(4096).await, [0; 4096]);
}

#[tokio::test]
async fn requests_in_flight_are_bounded() {
    let limits = ServerLimits {
        in_flight: 4,
        ..ServerLimits::default()
    };
    let fixture = Fixture::new(limits);
    let mut client = Client::connect(fixture.path()).await;
    for cookie in 0..20 {
        client.send(cookie, READ, 0, 512).await;
    }
    fixture.wait_for(|now| now.in_flight == 4).await;
    let mut other = Client::connect(fixture.path()).await;
    other.assert_read(9).await;
    // The other one is counted out a moment after it has its answer.
    fixture.wait_for(|now| now.in_flight == 4).await;
    fixture.gate.open();
    let mut answered = Vec::new();
    for _ in 0..20 {
        let (error, cookie) = client.reply().await.unwrap();
        assert_eq!(error, 0);
        client.data(512).await;
        answered.push(cookie);
    }
    answered.sort_unstable();
    assert_eq!(answered, (0..20).collect::<Vec<u64>>());
}

#[tokio::test]
async fn memory_is_bounded_for_a_client_that_does_not_read() {
    let limits = ServerLimits {
        connection_bytes: 40 << 20,
        write_timeout: Duration::from_millis(300),
        ..ServerLimits::default()
    };
    let fixture = Fixture::new(limits);
    let mut greedy = Client::connect(fixture.path()).await;
    for cookie in 0..60 {
        greedy.send(cookie, READ, 4096, 16 << 20).await;
    }
    // Two answers of 16 MiB fit into 40 MiB.
    fixture.wait_for(|now| now.in_flight == 2).await;
    let mut other = Client::connect(fixture.path()).await;
    other.assert_read(9).await;
    // The other one is counted out a moment after it has its answer.
    fixture.wait_for(|now| now.in_flight <= 2).await;
    fixture.wait_for(|now| now.sessions_dropped == 1).await;
    fixture
        .wait_for(|now| now.connections_open == 1 && now.in_flight == 0)
        .await;
    other.assert_read(10).await;
}

#[tokio::test]
async fn failures_and_panics_of_an_export_are_answered() {
    let fixture = Fixture::new(ServerLimits::default());
    let mut client = Client::connect(fixture.path()).await;
    client.send(1, READ, PANIC_AT, 4096).await;
    assert_eq!(client.reply().await.unwrap(), (5, 1), "EIO");
    fixture.export.failing.store(true, Ordering::SeqCst);
    client.send(2, READ, 4096, 4096).await;
    assert_eq!(client.reply().await.unwrap(), (5, 2), "EIO");
    fixture.export.failing.store(false, Ordering::SeqCst);
    client.assert_read(1).await;
    assert_eq!(fixture.counters().errors_of(ErrorCode::Io), 2);
}

#[tokio::test]
async fn a_removed_export_is_gone_for_its_clients() {
    let fixture = Fixture::new(ServerLimits::default());
    let mut client = Client::connect(fixture.path()).await;
    client.assert_read(2).await;
    assert_eq!(fixture.exports.clients("blocks"), 1);
    assert!(fixture.exports.remove("blocks"));
    client.send(3, READ, 4096, 4096).await;
    assert_eq!(client.reply().await.unwrap(), (108, 3), "ESHUTDOWN");
    assert_eq!(Arc::strong_count(&fixture.export), 1, "nobody holds it");
    assert!(Client::choose(fixture.path(), b"blocks").await.is_err());
}

#[tokio::test]
async fn disconnect_finishes_what_is_in_flight() {
    let fixture = Fixture::new(ServerLimits::default());
    let mut client = Client::connect(fixture.path()).await;
    client.send(1, READ, 0, 4096).await;
    client.send(2, DISCONNECT, 0, 0).await;
    fixture
        .wait_for(|now| now.requests_of(CommandType::Disconnect) == 1)
        .await;
    fixture.gate.open();
    assert_eq!(client.reply().await.unwrap(), (0, 1));
    client.data(4096).await;
    client.assert_closed().await;
    fixture.wait_for(|now| now.connections_open == 0).await;
    assert_eq!(fixture.counters().sessions_dropped, 0);
}

#[tokio::test]
async fn stopping_finishes_what_is_in_flight_and_refuses_the_rest() {
    let fixture = Fixture::new(ServerLimits {
        grace: Duration::from_secs(3600),
        ..ServerLimits::default()
    });
    let mut client = Client::connect(fixture.path()).await;
    let mut idle = Client::connect(fixture.path()).await;
    client.send(1, READ, 0, 4096).await;
    fixture.wait_for(|now| now.in_flight == 1).await;
    let path = fixture.path().to_owned();
    let Fixture {
        server,
        gate,
        directory,
        ..
    } = fixture;
    let stopping = tokio::spawn(server.stop());
    idle.assert_closed().await;
    assert!(UnixStream::connect(&path).await.is_err(), "nobody new is served");
    client.send(2, READ, 4096, 4096).await;
    assert_eq!(client.reply().await.unwrap(), (108, 2), "ESHUTDOWN");
    gate.open();
    assert_eq!(client.reply().await.unwrap(), (0, 1));
    assert_eq!(client.data(4096).await, [0; 4096]);
    client.assert_closed().await;
    stopping.await.unwrap();
    assert!(!path.exists());
    drop(directory);
}

#[tokio::test]
async fn stopping_drops_clients_after_the_grace_time() {
    let fixture = Fixture::new(ServerLimits {
        grace: Duration::from_millis(10),
        ..ServerLimits::default()
    });
    let mut client = Client::connect(fixture.path()).await;
    client.send(1, READ, 0, 4096).await;
    fixture.wait_for(|now| now.in_flight == 1).await;
    let mut shy = UnixStream::connect(fixture.path()).await.unwrap();
    let mut greeting = [0; 18];
    shy.read_exact(&mut greeting).await.unwrap();
    let counters = fixture.server.counters();
    fixture.server.stop().await;
    client.assert_closed().await;
    assert_eq!(counters.snapshot().sessions_dropped, 2);
    assert_eq!(counters.snapshot().connections_open, 0);
    fixture.gate.open();
}

#[tokio::test]
async fn a_slow_handshake_ends() {
    let fixture = Fixture::new(ServerLimits {
        handshake_timeout: Duration::from_millis(20),
        ..ServerLimits::default()
    });
    let mut stream = UnixStream::connect(fixture.path()).await.unwrap();
    stream.write_all(&[0, 0]).await.unwrap();
    let mut all = Vec::new();
    let _ = stream.read_to_end(&mut all).await;
    assert_eq!(all.len(), 18, "the greeting, then the end");
    fixture.wait_for(|now| now.connections_open == 0).await;
    assert_eq!(fixture.counters().handshakes_failed, 1);
}

#[tokio::test]
async fn connections_are_bounded() {
    let fixture = Fixture::new(ServerLimits {
        connections: 2,
        ..ServerLimits::default()
    });
    let mut first = Client::connect(fixture.path()).await;
    let second = Client::connect(fixture.path()).await;
    assert!(Client::choose(fixture.path(), b"blocks").await.is_err());
    assert_eq!(fixture.counters().connections_refused, 1);
    drop(second);
    fixture.wait_for(|now| now.connections_open == 1).await;
    Client::connect(fixture.path()).await.assert_read(5).await;
    first.assert_read(6).await;
}

#[tokio::test]
async fn broken_clients_do_not_matter_to_others() {
    let fixture = Fixture::new(ServerLimits::default());
    let mut good = Client::connect(fixture.path()).await;
    for noise in [
        b"".as_slice(),
        &[0],
        &[0xff; 4],
        &[0, 0, 0, 3, 1, 2, 3],
        &[7; 100],
    ] {
        let mut stream = UnixStream::connect(fixture.path()).await.unwrap();
        stream.write_all(noise).await.unwrap();
        stream.shutdown().await.unwrap();
        let _ = stream.read_to_end(&mut Vec::new()).await;
    }
    let mut half = Client::connect(fixture.path()).await;
    half.0.write_all(&[0x25, 0x60, 0x95]).await.unwrap();
    drop(half);
    let mut wrong = Client::connect(fixture.path()).await;
    wrong.0.write_all(&[0xaa; 28]).await.unwrap();
    wrong.assert_closed().await;
    good.assert_read(4).await;
    fixture.wait_for(|now| now.connections_open == 1).await;
    assert_eq!(fixture.counters().sessions_dropped, 1);
}

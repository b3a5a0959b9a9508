//! Tests of the data path: whatever way the bytes take, they are those of plain memory.

mod ahead;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{RngCore as _, SeedableRng as _};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::nbd::address::Address;
use crate::nbd::client::Connection;
use crate::nbd::export::{Export, ExportError};
use crate::nbd::file::FileExport;
use crate::nbd::proto::{ContextName, StatusExtent};
use crate::nbd::registry::Exports;
use crate::nbd::server::{Server, ServerLimits};

const SIZE: usize = 6 << 20;
const NAME: &str = "image";
/// A bound against hanging for ever.
const PATIENCE: Duration = Duration::from_secs(120);

/// An export that hides its file: everything goes through workers.
struct Hidden(FileExport);

impl Export for Hidden {
    fn name(&self) -> &str {
        self.0.name()
    }
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), ExportError> {
        self.0.read_at(buffer, offset)
    }
    fn write_at(&self, data: Bytes, offset: u64, fua: bool) -> Result<(), ExportError> {
        self.0.write_at(data, offset, fua)
    }
    fn flush(&self) -> Result<(), ExportError> {
        self.0.flush()
    }
    fn block_status(
        &self,
        context: &ContextName,
        offset: u64,
        length: u64,
        most: usize,
    ) -> Result<Vec<StatusExtent>, ExportError> {
        self.0.block_status(context, offset, length, most)
    }
}

fn in_memory() -> File {
    use nix::sys::memfd::MFdFlags;
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    File::from(nix::sys::memfd::memfd_create(c"blksnap-test", flags).unwrap())
}

struct Fixture {
    runtime: Runtime,
    server: Option<Server>,
    exports: Arc<Exports>,
    directory: TempDir,
}

impl Fixture {
    fn new(export: Arc<dyn Export>, limits: &ServerLimits) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let exports = Arc::new(Exports::new());
        exports.add(export).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let server = {
            let _guard = runtime.enter();
            Server::start(&directory.path().join("s"), Arc::clone(&exports), limits).unwrap()
        };
        Self {
            runtime,
            server: Some(server),
            exports,
            directory,
        }
    }

    fn connect(&self) -> Client {
        let address = Address::Unix(self.directory.path().join("s"));
        let connection = Connection::open(&address, NAME, PATIENCE).unwrap();
        let stream = UnixStream::from(OwnedFd::from(connection));
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Client { stream, cookie: 0 }
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            self.runtime.block_on(server.stop());
        }
    }
}

struct Client {
    stream: UnixStream,
    cookie: u64,
}

impl Client {
    /// Sends a request's header and gives its cookie.
    fn request(&mut self, command: u16, flags: u16, offset: usize, length: usize) -> u64 {
        self.cookie += 1;
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&command.to_be_bytes());
        bytes.extend_from_slice(&self.cookie.to_be_bytes());
        bytes.extend_from_slice(&(offset as u64).to_be_bytes());
        bytes.extend_from_slice(&u32::try_from(length).unwrap().to_be_bytes());
        self.stream.write_all(&bytes).unwrap();
        self.cookie
    }

    /// Error and cookie of the next answer.
    fn reply(&mut self) -> (u32, u64) {
        let mut bytes = [0; 16];
        self.stream.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes[..4], 0x6744_6698_u32.to_be_bytes());
        let error = u32::from_be_bytes(bytes[4..8].try_into().unwrap());
        (error, u64::from_be_bytes(bytes[8..].try_into().unwrap()))
    }

    fn data(&mut self, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.stream.read_exact(&mut data).unwrap();
        data
    }

    fn read(&mut self, offset: usize, length: usize) -> Result<Vec<u8>, u32> {
        let cookie = self.request(0, 0, offset, length);
        match self.reply() {
            (0, told) => {
                assert_eq!(told, cookie);
                Ok(self.data(length))
            }
            (error, _) => Err(error),
        }
    }

    fn write(&mut self, offset: usize, data: &[u8], flags: u16) -> u32 {
        let cookie = self.request(1, flags, offset, data.len());
        self.stream.write_all(data).unwrap();
        let (error, told) = self.reply();
        assert_eq!(told, cookie);
        error
    }
}

fn random() -> StdRng {
    let seed = match std::env::var("BLKSNAP_SEED") {
        Ok(text) => text.parse().unwrap(),
        Err(_) => rand::random(),
    };
    println!("BLKSNAP_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// A length of one of the ways that data can take: in a batch, as pages, more than a pipe.
fn length(random: &mut StdRng, left: usize) -> usize {
    let most = [1, 512, 5000, 40_000, 200_000, 1_500_000, 3 << 20][random.next_u32() as usize % 7];
    (random.next_u32() as usize % (most + 1)).min(left)
}

/// Random reads and writes of one client after the other, each compared with plain memory.
fn compare_with_memory(export: Arc<dyn Export>, rounds: usize) {
    let mut random = random();
    let fixture = Fixture::new(export, &ServerLimits::default());
    let mut clients = [fixture.connect(), fixture.connect()];
    let mut model = vec![0; SIZE];
    for round in 0..rounds {
        let client = &mut clients[random.next_u32() as usize % 2];
        let offset = random.next_u32() as usize % SIZE;
        let length = length(&mut random, SIZE - offset);
        if random.next_u32().is_multiple_of(2) {
            let mut data = vec![0; length];
            random.fill_bytes(&mut data);
            let fua = u16::from(random.next_u32().is_multiple_of(4));
            assert_eq!(client.write(offset, &data, fua), 0);
            model[offset..offset + length].copy_from_slice(&data);
        } else {
            let data = client.read(offset, length).unwrap();
            assert!(
                data == model[offset..offset + length],
                "round {round}: {length} bytes at {offset}"
            );
        }
    }
    assert!(clients[0].read(0, SIZE).unwrap() == model);
}

fn sized(file: File) -> Arc<File> {
    file.set_len(SIZE as u64).unwrap();
    Arc::new(file)
}

#[test]
fn a_file_in_memory_is_plain_memory() {
    let export = FileExport::new(NAME, sized(in_memory()), SIZE as u64).writable();
    compare_with_memory(Arc::new(export), 400);
}

#[test]
fn a_file_on_a_disk_is_plain_memory() {
    let export = FileExport::new(NAME, sized(tempfile::tempfile().unwrap()), SIZE as u64).writable();
    compare_with_memory(Arc::new(export), 300);
}

#[test]
fn an_export_without_a_file_is_plain_memory() {
    let export = FileExport::new(NAME, sized(in_memory()), SIZE as u64).writable();
    compare_with_memory(Arc::new(Hidden(export)), 300);
}

#[test]
fn many_requests_in_flight_are_all_answered() {
    for memory in [true, false] {
        let mut random = random();
        let file = if memory {
            in_memory()
        } else {
            tempfile::tempfile().unwrap()
        };
        let file = sized(file);
        let mut content = vec![0; SIZE];
        random.fill_bytes(&mut content);
        file.write_all_at(&content, 0).unwrap();
        let export = FileExport::new(NAME, Arc::clone(&file), SIZE as u64).writable();
        let fixture = Fixture::new(Arc::new(export), &ServerLimits::default());
        let mut client = fixture.connect();
        let mut sender = Client {
            stream: client.stream.try_clone().unwrap(),
            cookie: 0,
        };
        // Reads of the first half, writes to slots of the second.
        const SLOT: usize = 100_000;
        const SLOTS: usize = SIZE / 2 / SLOT;
        let requests: Vec<(bool, usize, usize)> = (0..300)
            .map(|index| {
                if random.next_u32().is_multiple_of(3) {
                    (true, SIZE / 2 + index % SLOTS * SLOT, SLOT)
                } else {
                    let offset = random.next_u32() as usize % (SIZE / 2);
                    (false, offset, length(&mut random, SIZE / 2 - offset))
                }
            })
            .collect();
        let sent = requests.clone();
        let sending = std::thread::spawn(move || {
            for (write, offset, length) in sent {
                let cookie = sender.request(u16::from(write), 0, offset, length);
                if write {
                    let byte = cookie.to_le_bytes()[0];
                    sender.stream.write_all(&vec![byte; length]).unwrap();
                }
            }
        });
        let mut open: BTreeMap<u64, (bool, usize, usize)> = (1..).zip(requests).collect();
        while !open.is_empty() {
            let (error, cookie) = client.reply();
            assert_eq!(error, 0);
            let (write, offset, length) = open.remove(&cookie).expect("an answer to an open request");
            if !write {
                assert!(client.data(length) == content[offset..offset + length]);
            }
        }
        sending.join().unwrap();
        for slot in 0..SLOTS {
            let mut now = vec![0; SLOT];
            file.read_exact_at(&mut now, (SIZE / 2 + slot * SLOT) as u64)
                .unwrap();
            assert!(
                now.iter().all(|byte| *byte == now[0]) || now == content[SIZE / 2 + slot * SLOT..][..SLOT]
            );
        }
    }
}

#[test]
fn a_client_that_reads_late_gets_everything() {
    let file = sized(in_memory());
    file.write_all_at(&vec![7; SIZE], 0).unwrap();
    let export = FileExport::new(NAME, Arc::clone(&file), SIZE as u64).writable();
    let fixture = Fixture::new(Arc::new(export), &ServerLimits::default());
    let mut client = fixture.connect();
    // Far more than any socket holds, then a write whose data must be taken all the same.
    for _ in 0..30 {
        client.request(0, 0, 0, 1 << 20);
    }
    client.request(1, 0, 0, 2 << 20);
    client.stream.write_all(&vec![9; 2 << 20]).unwrap();
    let mut writes = 0;
    for _ in 0..31 {
        let (error, cookie) = client.reply();
        assert_eq!(error, 0);
        if cookie == 31 {
            writes += 1;
        } else {
            client.data(1 << 20);
        }
    }
    assert_eq!(writes, 1);
    assert_eq!(client.read(5, 3).unwrap(), [9; 3]);
}

#[test]
fn a_file_that_became_shorter_is_an_error() {
    for memory in [true, false] {
        let file = if memory {
            in_memory()
        } else {
            tempfile::tempfile().unwrap()
        };
        let file = sized(file);
        let export = FileExport::new(NAME, Arc::clone(&file), SIZE as u64).writable();
        let fixture = Fixture::new(Arc::new(export), &ServerLimits::default());
        let mut client = fixture.connect();
        file.set_len(100_000).unwrap();
        for (offset, length) in [(99_000, 4096), (50_000, 100_000), (0, 3 << 20), (200_000, 512)] {
            assert_eq!(client.read(offset, length), Err(5), "{length} at {offset}");
        }
        assert_eq!(client.read(0, 4096).unwrap().len(), 4096);
    }
}

#[test]
fn a_full_file_system_is_said_and_the_session_goes_on() {
    // A seal makes every write beyond the size fail, as a full file system does.
    let file = in_memory();
    file.set_len(1 << 20).unwrap();
    let seal = nix::fcntl::SealFlag::F_SEAL_GROW | nix::fcntl::SealFlag::F_SEAL_WRITE;
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_ADD_SEALS(seal)).unwrap();
    let export = FileExport::new(NAME, Arc::new(file), 1 << 20).writable();
    let fixture = Fixture::new(Arc::new(export), &ServerLimits::default());
    let mut client = fixture.connect();
    for length in [512, 100_000, 1 << 20] {
        let error = client.write(0, &vec![1; length], 0);
        assert_eq!(error, 1, "EPERM for {length}");
        assert_eq!(client.read(0, 512).unwrap(), [0; 512]);
    }
}

#[test]
fn an_export_that_goes_in_the_middle_of_a_write_is_let_go() {
    let file = sized(in_memory());
    let export: Arc<dyn Export> = Arc::new(FileExport::new(NAME, file, SIZE as u64).writable());
    let watch = Arc::downgrade(&export);
    let fixture = Fixture::new(export, &ServerLimits::default());
    let mut client = fixture.connect();
    assert_eq!(client.read(0, 1).unwrap(), [0]);
    let cookie = client.request(1, 0, 0, 1 << 20);
    client.stream.write_all(&vec![1; 300_000]).unwrap();
    assert!(fixture.exports.remove(NAME));
    while watch.upgrade().is_some() {
        std::thread::sleep(Duration::from_millis(1));
    }
    client.stream.write_all(&vec![1; (1 << 20) - 300_000]).unwrap();
    assert_eq!(client.reply(), (108, cookie), "ESHUTDOWN");
    assert_eq!(client.read(0, 512), Err(108));
}

#[test]
fn clients_that_stop_are_dropped_and_others_are_not() {
    let file = sized(in_memory());
    let export = FileExport::new(NAME, file, SIZE as u64).writable();
    let limits = ServerLimits {
        write_timeout: Duration::from_millis(200),
        idle_timeout: Duration::from_millis(1500),
        ..ServerLimits::default()
    };
    let fixture = Fixture::new(Arc::new(export), &limits);
    let counters = fixture.server.as_ref().unwrap().counters();
    let mut good = fixture.connect();
    let mut inside_header = fixture.connect();
    inside_header.stream.write_all(&[0x25, 0x60]).unwrap();
    let mut inside_data = fixture.connect();
    inside_data.request(1, 0, SIZE / 2, 1 << 20);
    inside_data.stream.write_all(&[1; 1000]).unwrap();
    let mut deaf = fixture.connect();
    for _ in 0..64 {
        deaf.request(0, 0, 0, 1 << 20);
    }
    let mut idle = fixture.connect();
    loop {
        assert_eq!(good.read(0, 512).unwrap(), [0; 512]);
        let now = counters.snapshot();
        if (now.request_timeouts, now.write_timeouts) == (2, 1) {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(inside_header.stream.read(&mut [0; 1]).unwrap_or(0), 0);
    assert_eq!(inside_data.stream.read(&mut [0; 1]).unwrap_or(0), 0);
    assert_eq!(
        idle.stream.read(&mut [0; 1]).unwrap_or(0),
        0,
        "dropped after its time"
    );
    assert_eq!(counters.snapshot().idle_timeouts, 1);
    assert_eq!(counters.snapshot().memory, 0);
}

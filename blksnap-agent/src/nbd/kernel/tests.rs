//! Tests of the kernel client with our own server and a kernel played by [`FakeKernel`].

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::fake::FakeKernel;
use super::*;
use crate::nbd::file::FileExport;
use crate::nbd::registry::Exports;
use crate::nbd::server::{Server, ServerLimits};

const SIZE: u64 = 1 << 20;
const NAME: &str = "id/sdb1";

struct Fixture {
    runtime: Runtime,
    server: Option<Server>,
    exports: Arc<Exports>,
    directory: TempDir,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let exports = Arc::new(Exports::new());
        exports.add(Arc::new(image(NAME, SIZE))).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let _guard = runtime.enter();
        let path = directory.path().join("nbd.sock");
        let server = Server::start(&path, Arc::clone(&exports), &ServerLimits::default()).unwrap();
        drop(_guard);
        Self {
            runtime,
            server: Some(server),
            exports,
            directory,
        }
    }

    fn request(&self) -> Request {
        Request {
            server: Address::Unix(self.directory.path().join("nbd.sock")),
            export: NAME.to_owned(),
            index: None,
            connections: None,
            timeout: Duration::from_secs(30),
            dead_timeout: Duration::from_secs(60),
            block_size: None,
            read_only: false,
        }
    }

    /// Sysfs as the kernel would show the device.
    fn sysfs(&self, index: u32, size: u64, backend: &str) -> Sysfs {
        let root = self.directory.path().join("block");
        let folder = root.join(format!("nbd{index}"));
        fs::create_dir_all(&folder).unwrap();
        let write = |name: &str, text: &str| fs::write(folder.join(name), text).unwrap();
        write("size", &format!("{}\n", size / 512));
        write("ro", "1\n");
        write("pid", "1\n");
        write("backend", &format!("{backend}\n"));
        Sysfs::under(root)
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            self.runtime.block_on(server.stop());
        }
    }
}

/// A file whose bytes are 7.
fn image(name: &str, size: u64) -> FileExport {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&vec![7; usize::try_from(size).unwrap()], 0)
        .unwrap();
    FileExport::new(name, Arc::<File>::new(file), size)
}

#[test]
fn an_export_becomes_a_device() {
    let fixture = Fixture::new();
    let kernel = FakeKernel::default();
    let mut nbd = NbdFamily::open(Box::new(kernel.clone())).unwrap();
    let made = connect(&mut nbd, &fixture.request()).unwrap();
    assert_eq!((made.index, made.size, made.block_size), (0, SIZE, 512));
    assert!(made.read_only);
    let device = kernel.device(0).unwrap();
    assert_eq!(device.sockets.len(), CONNECTIONS as usize);
    assert_eq!(device.size, SIZE);
    assert_eq!(device.block_size, 512);
    let flags = TransmissionFlags::from_bits_retain(u16::try_from(device.server_flags).unwrap());
    assert!(flags.contains(TransmissionFlags::READ_ONLY | TransmissionFlags::CAN_MULTI_CONN));
    assert_eq!(device.backend.parse::<Backend>().unwrap(), made.backend);
}

#[test]
fn what_cannot_be_a_device_is_refused_before_the_kernel_hears_of_it() {
    let fixture = Fixture::new();
    let kernel = FakeKernel::default();
    let mut nbd = NbdFamily::open(Box::new(kernel.clone())).unwrap();
    let mut request = fixture.request();
    request.export = "none".to_owned();
    let error = connect(&mut nbd, &request).unwrap_err();
    assert!(error.to_string().contains("no export has this name"), "{error}");
    for block_size in [0, 256, 768, 8192] {
        let request = Request {
            block_size: Some(block_size),
            ..fixture.request()
        };
        let error = connect(&mut nbd, &request).unwrap_err();
        assert!(matches!(error, DeviceError::BlockSize { .. }), "{error}");
    }
    let request = Request {
        server: Address::Unix(fixture.directory.path().join("nobody")),
        ..fixture.request()
    };
    let error = connect(&mut nbd, &request).unwrap_err();
    assert!(
        error.to_string().starts_with("connect to the nbd server "),
        "{error}"
    );
    assert!(nbd.devices().unwrap().is_empty());
}

#[test]
fn a_server_that_came_back_gets_its_device_again() {
    let fixture = Fixture::new();
    let kernel = FakeKernel::default();
    let mut nbd = NbdFamily::open(Box::new(kernel.clone())).unwrap();
    let made = connect(&mut nbd, &fixture.request()).unwrap();
    let before = kernel.device(0).unwrap().sockets;
    let sysfs = fixture.sysfs(0, SIZE, &made.backend.to_string());
    kernel.kill_links(0);
    assert_eq!(reconnect(&mut nbd, &sysfs, 0).unwrap(), made.backend);
    assert_eq!(kernel.device(0).unwrap().sockets.len(), before.len());

    // Another export under the same name is not what the device shows.
    fixture.exports.remove(NAME);
    fixture.exports.add(Arc::new(image(NAME, 2 * SIZE))).unwrap();
    let error = reconnect(&mut nbd, &sysfs, 0).unwrap_err();
    assert!(matches!(error, DeviceError::Changed { .. }), "{error}");

    let others = fixture.sysfs(1, SIZE, "of another program");
    for index in [1, 9] {
        let error = reconnect(&mut nbd, &others, index).unwrap_err();
        assert!(matches!(error, DeviceError::NotOurs(_)), "{error}");
    }
}

#[test]
fn a_chosen_export_is_in_transmission() {
    let fixture = Fixture::new();
    let request = fixture.request();
    let connection = Connection::open(&request.server, NAME, PATIENCE).unwrap();
    assert_eq!((connection.minimum_block, connection.preferred_block), (1, 4096));
    let mut stream = UnixStream::from(OwnedFd::from(connection));
    let mut read = vec![0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0];
    read.extend_from_slice(b"cookie!!");
    read.extend_from_slice(&4096_u64.to_be_bytes());
    read.extend_from_slice(&3_u32.to_be_bytes());
    stream.write_all(&read).unwrap();
    let mut reply = [0; 19];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(&reply, b"\x67\x44\x66\x98\0\0\0\0cookie!!\x07\x07\x07");
}

/// A server that sends `bytes` and then nothing.
fn server_that_says(path: &Path, bytes: &'static [u8]) -> std::thread::JoinHandle<()> {
    let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        // The client may be gone already.
        let _ = stream.write_all(bytes);
        let _ = stream.read_to_end(&mut Vec::new());
    })
}

#[test]
fn servers_that_break_the_protocol_are_left() {
    let directory = tempfile::tempdir().unwrap();
    let cases: [(&[u8], &str); 6] = [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "no newstyle server"),
        (b"NBDMAGICIHAVEOPT\0\0", "fixed newstyle"),
        (
            b"NBDMAGICIHAVEOPT\0\x03\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x06\0\0\0\x01\0\0\0\0",
            "an answer to no question",
        ),
        (
            b"NBDMAGICIHAVEOPT\0\x03\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x01\0\0\0\0",
            "without a size",
        ),
        (
            b"NBDMAGICIHAVEOPT\0\x03\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x03\xff\xff\xff\xff",
            "too long",
        ),
        (
            b"NBDMAGICIHAVEOPT\0\x03\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\x80\0\0\x05\0\0\0\0",
            "wants TLS",
        ),
    ];
    for (index, (bytes, reason)) in cases.into_iter().enumerate() {
        let path = directory.path().join(format!("{index}"));
        let server = server_that_says(&path, bytes);
        let error = Connection::open(&Address::Unix(path), NAME, PATIENCE).unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
        server.join().unwrap();
    }
    let path = directory.path().join("silent");
    let server = server_that_says(&path, b"NBDMAGIC");
    let error = Connection::open(&Address::Unix(path), NAME, Duration::from_millis(20)).unwrap_err();
    assert!(matches!(error, ClientError::Io { .. }), "{error}");
    server.join().unwrap();
}

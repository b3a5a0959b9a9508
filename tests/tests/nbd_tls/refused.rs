//! Refused: who must be kept out, and what others notice of it, which is nothing.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use blksnap_agent::nbd::endpoint::LocalTls;
use blksnap_agent::nbd::file::FileExport;
use blksnap_agent::nbd::registry::Exports;
use blksnap_agent::nbd::server::{Server, ServerLimits};
use blksnap_agent::nbd::tls::Clients;

use crate::authority::{Authority, Role, Valid, WITHDRAWN};
use crate::scene::{NAME, SIZE, Scene, libnbd, stderr, stdout};

/// A bound against hanging for ever.
const PATIENCE: Duration = Duration::from_secs(120);

const FLAGS: [u8; 4] = [0, 0, 0, 3];
const EXPORT_NAME: u32 = 1;
const LIST: u32 = 3;
const STARTTLS: u32 = 5;
const ACK: u32 = 1;
const ERR_TLS_REQD: u32 = 0x8000_0005;

/// Tries to read with the certificates of `directory`, and checks that nothing came of it.
fn assert_refused(scene: &Scene, directory: &Path) -> Result<()> {
    let before = scene.counters()?;
    let uri = scene.uri(directory);
    let said = libnbd("nbdinfo", &[&uri])?;
    ensure!(!said.status.success(), "nbdinfo was served: {said:?}");
    ensure!(!stdout(&said).contains("export-size"), "{said:?}");
    let copy = scene.beside("copy");
    let said = libnbd("nbdcopy", &["--connections=1", &uri, &copy.display().to_string()])?;
    ensure!(!said.status.success(), "nbdcopy was served: {said:?}");
    ensure!(std::fs::metadata(&copy).map_or(0, |copy| copy.len()) == 0);
    // The server hears of the failure a moment after the client does.
    let refused = (0..6000).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        scene
            .counters()
            .is_ok_and(|now| now.tls_failed >= before.tls_failed + 2)
    });
    let now = scene.counters()?;
    ensure!(
        refused,
        "{} TLS handshakes failed",
        now.tls_failed - before.tls_failed
    );
    ensure!(now.bytes_read == before.bytes_read, "something was read");
    scene.assert_serves()
}

#[test]
fn a_client_without_a_certificate() -> Result<()> {
    let scene = Scene::new("a_client_without_a_certificate", Clients::Certified)?;
    let directory = scene.client("bare")?;
    let [option, credentials, image] = scene.qemu(&directory, "NORMAL");
    let info = ["info", &option, &credentials, "--image-opts", &image];
    let said = Command::new("qemu-img").args(info).output()?;
    ensure!(!said.status.success(), "{said:?}");
    ensure!(!stdout(&said).contains("virtual size"), "{said:?}");
    scene.assert_serves()
}

#[test]
fn a_client_of_another_authority() -> Result<()> {
    let scene = Scene::new("a_client_of_another_authority", Clients::Certified)?;
    let directory = scene.client("foreign")?;
    // Of the same name, so that only the signature tells.
    Authority::new("authority")?.issue(&directory, Role::Client, Valid::Now, 3)?;
    assert_refused(&scene, &directory)
}

#[test]
fn a_client_that_signed_for_itself() -> Result<()> {
    let scene = Scene::new("a_client_that_signed_for_itself", Clients::Certified)?;
    let directory = scene.client("self")?;
    let key = rcgen::KeyPair::generate()?;
    let own = rcgen::CertificateParams::new(vec!["localhost".to_owned()])?.self_signed(&key)?;
    std::fs::write(directory.join("client-cert.pem"), own.pem())?;
    std::fs::write(directory.join("client-key.pem"), key.serialize_pem())?;
    assert_refused(&scene, &directory)
}

#[test]
fn certificates_out_of_their_time() -> Result<()> {
    let scene = Scene::new("certificates_out_of_their_time", Clients::Certified)?;
    for (name, valid) in [("expired", Valid::NoLonger), ("early", Valid::NotYet)] {
        let directory = scene.client(name)?;
        scene.authority.issue(&directory, Role::Client, valid, 4)?;
        assert_refused(&scene, &directory)?;
    }
    Ok(())
}

#[test]
fn a_certificate_that_was_withdrawn() -> Result<()> {
    let scene = Scene::new("a_certificate_that_was_withdrawn", Clients::Certified)?;
    let directory = scene.client("withdrawn")?;
    scene
        .authority
        .issue(&directory, Role::Client, Valid::Now, WITHDRAWN)?;
    assert_refused(&scene, &directory)
}

#[test]
fn a_servers_certificate_is_none_of_a_client() -> Result<()> {
    let scene = Scene::new("a_servers_certificate_is_none_of_a_client", Clients::Certified)?;
    let directory = scene.client("server_as_client")?;
    scene.authority.issue(&directory, Role::Server, Valid::Now, 5)?;
    for part in ["cert", "key"] {
        std::fs::rename(
            directory.join(format!("server-{part}.pem")),
            directory.join(format!("client-{part}.pem")),
        )?;
    }
    assert_refused(&scene, &directory)
}

#[test]
fn versions_of_tls_that_are_too_old() -> Result<()> {
    let scene = Scene::new("versions_of_tls_that_are_too_old", Clients::Certified)?;
    for version in ["VERS-TLS1.0", "VERS-TLS1.1"] {
        let priority = format!("LEGACY:-VERS-ALL:+{version}");
        let [option, credentials, image] = scene.qemu(&scene.certified(), &priority);
        let info = ["info", &option, &credentials, "--image-opts", &image];
        let said = Command::new("qemu-img").args(info).output()?;
        ensure!(!said.status.success(), "{version}: {said:?}");
    }
    scene.assert_serves()
}

/// A client must not believe a server of another authority; ours lives through it.
#[test]
fn a_client_that_does_not_trust_the_server() -> Result<()> {
    let scene = Scene::new("a_client_that_does_not_trust_the_server", Clients::Certified)?;
    let directory = scene.beside("doubtful");
    Authority::new("another authority")?.trust(&directory)?;
    scene.authority.issue(&directory, Role::Client, Valid::Now, 6)?;
    assert_refused(&scene, &directory)
}

#[test]
fn a_client_in_the_clear() -> Result<()> {
    let scene = Scene::new("a_client_in_the_clear", Clients::Certified)?;
    let uri = format!("nbd://localhost:{}/{NAME}", scene.port());
    let said = libnbd("nbdinfo", &[&uri])?;
    ensure!(!said.status.success(), "{said:?}");
    let image = format!("nbd://localhost:{}/{NAME}", scene.port());
    let said = Command::new("qemu-img").args(["info", &image]).output()?;
    ensure!(
        !said.status.success() && stderr(&said).contains("TLS"),
        "{said:?}"
    );

    // By hand: every option but ABORT and STARTTLS is refused, EXPORT_NAME ends it.
    let mut raw = Raw::open(&scene)?;
    ensure!(raw.option(LIST, &[])? == (LIST, ERR_TLS_REQD));
    for option in [6_u32, 7, 8, 9, 10, 11, 77] {
        ensure!(
            raw.option(option, &[0; 6])? == (option, ERR_TLS_REQD),
            "option {option}"
        );
    }
    raw.send(EXPORT_NAME, NAME.as_bytes())?;
    ensure!(raw.rest()?.is_empty(), "something came behind EXPORT_NAME");
    scene.assert_serves()
}

#[test]
fn tls_may_be_left_out_where_it_is_only_offered() -> Result<()> {
    let scene = Scene::with(
        "tls_may_be_left_out_where_it_is_only_offered",
        Clients::Certified,
        LocalTls::Offered,
        &ServerLimits::default(),
    )?;
    let uri = format!("nbd://localhost:{}/{NAME}", scene.port());
    let said = libnbd("nbdinfo", &["--size", &uri])?;
    ensure!(stdout(&said).trim() == SIZE.to_string(), "{said:?}");
    scene.assert_serves()
}

#[test]
fn noise_in_place_of_tls() -> Result<()> {
    let scene = Scene::new("noise_in_place_of_tls", Clients::Certified)?;
    let before = scene.counters()?.tls_failed;
    for noise in [
        b"GET / HTTP/1.1\r\n\r\n".as_slice(),
        &[0x16, 3, 1, 0xff, 0xff, 1, 0xff, 0xff, 0xff],
        &[0; 4096],
        // In place of TLS the next option: nothing of it may be understood.
        b"IHAVEOPT\0\0\0\x03\0\0\0\0",
    ] {
        let mut raw = Raw::open(&scene)?;
        ensure!(raw.option(STARTTLS, &[])? == (STARTTLS, ACK));
        raw.0.write_all(noise)?;
        raw.0.shutdown(std::net::Shutdown::Write)?;
        // At most an alert, which is no reply to an option.
        let rest = raw.rest()?;
        ensure!(
            rest.len() < 20 && rest.first().is_none_or(|byte| *byte == 0x15),
            "{rest:x?}"
        );
    }
    ensure!(scene.counters()?.tls_failed >= before + 3);
    scene.assert_serves()
}

/// What is sent in the clear together with STARTTLS would be taken for something that came with TLS.
#[test]
fn options_smuggled_in_before_tls() -> Result<()> {
    let scene = Scene::new("options_smuggled_in_before_tls", Clients::Certified)?;
    let mut raw = Raw::open(&scene)?;
    let mut both = header(STARTTLS, 0);
    both.extend_from_slice(&header(LIST, 0));
    raw.0.write_all(&both)?;
    let rest = raw.rest()?;
    ensure!(
        !rest.windows(NAME.len()).any(|part| part == NAME.as_bytes()),
        "{rest:x?}"
    );
    scene.assert_serves()
}

#[test]
fn tls_that_never_goes_on_is_ended() -> Result<()> {
    let limits = ServerLimits {
        handshake_timeout: Duration::from_millis(1500),
        ..ServerLimits::default()
    };
    let scene = Scene::with(
        "tls_that_never_goes_on_is_ended",
        Clients::Certified,
        LocalTls::Required,
        &limits,
    )?;
    let mut stopped = Vec::new();
    for part in [&[][..], &[0x16], &[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc]] {
        let mut raw = Raw::open(&scene)?;
        ensure!(raw.option(STARTTLS, &[])? == (STARTTLS, ACK));
        raw.0.write_all(part)?;
        stopped.push(raw);
    }
    for mut raw in stopped {
        ensure!(raw.rest()?.is_empty());
    }
    // It is counted a moment after the connection is closed.
    let counted = (0..6000).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        scene.counters().is_ok_and(|now| now.handshake_timeouts >= 3)
    });
    ensure!(counted, "{} time-outs", scene.counters()?.handshake_timeouts);
    Ok(())
}

/// Asks for far more than any socket holds and reads none of it.
#[test]
fn a_client_with_tls_that_never_reads_is_dropped() -> Result<()> {
    let limits = ServerLimits {
        write_timeout: Duration::from_millis(500),
        ..ServerLimits::default()
    };
    let scene = Scene::with(
        "a_client_with_tls_that_never_reads_is_dropped",
        Clients::Certified,
        LocalTls::Required,
        &limits,
    )?;
    let script = format!(
        r#"
import sys
h.set_tls(nbd.TLS_REQUIRE)
h.set_tls_certificates("{directory}")
h.set_export_name("{NAME}")
h.connect_tcp("localhost", "{port}")
for _ in range(60):
    h.aio_pread(nbd.Buffer(8 << 20), 0)
sys.stdin.read()
"#,
        directory = scene.certified().display(),
        port = scene.port()
    );
    let mut deaf = Command::new("nbdsh")
        .args(["-c", &script])
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(std::process::Stdio::piped())
        .spawn()?;
    let (mut dropped, mut most) = (false, 0);
    for _ in 0..12_000 {
        let now = scene.counters()?;
        most = most.max(now.memory);
        dropped = now.write_timeouts > 0;
        if dropped || deaf.try_wait()?.is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let served = scene.assert_serves();
    deaf.kill()?;
    deaf.wait()?;
    ensure!(dropped, "it is still there");
    ensure!(
        most <= limits.connection_bytes as u64,
        "{most} bytes were in flight"
    );
    ensure!(scene.counters()?.memory == 0, "memory was not given back");
    served
}

/// Nobody but the owner of the socket gets on it.
#[test]
fn another_user_on_the_unix_socket() -> Result<()> {
    let directory = tempfile::Builder::new().prefix("blksnap-nbd-").tempdir()?;
    // Everybody may look into the directory: only the socket's own mode is left.
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755))?;
    let file = tempfile::tempfile()?;
    file.set_len(1 << 20)?;
    let exports = Arc::new(Exports::new());
    exports.add(Arc::new(FileExport::new(NAME, Arc::new(file), 1 << 20)))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let socket = directory.path().join("s");
    let server = {
        let _guard = runtime.enter();
        Server::start(&socket, exports, &ServerLimits::default())?
    };
    ensure!(std::fs::symlink_metadata(&socket)?.permissions().mode() & 0o777 == 0o600);
    let uri = format!("nbd+unix:///{NAME}?socket={}", socket.display());
    let other = [
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "nbdinfo",
        "--size",
        &uri,
    ];
    let refused = libnbd("setpriv", &other)?;
    let served = libnbd("nbdinfo", &["--size", &uri])?;
    runtime.block_on(server.stop());
    ensure!(
        !refused.status.success() && stderr(&refused).contains("Permission denied"),
        "{refused:?}"
    );
    ensure!(stdout(&served).trim() == "1048576", "{served:?}");
    Ok(())
}

/// An option's header.
fn header(option: u32, length: u32) -> Vec<u8> {
    [
        b"IHAVEOPT".as_slice(),
        &option.to_be_bytes(),
        &length.to_be_bytes(),
    ]
    .concat()
}

/// A client in the clear, by hand.
struct Raw(TcpStream);

impl Raw {
    fn open(scene: &Scene) -> Result<Self> {
        let mut stream = TcpStream::connect(("127.0.0.1", scene.port()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.read_exact(&mut [0; 18])?;
        stream.write_all(&FLAGS)?;
        Ok(Self(stream))
    }

    fn send(&mut self, option: u32, data: &[u8]) -> Result<()> {
        let mut bytes = header(option, u32::try_from(data.len())?);
        bytes.extend_from_slice(data);
        Ok(self.0.write_all(&bytes)?)
    }

    /// Sends an option and gives the option and the type of its reply.
    fn option(&mut self, option: u32, data: &[u8]) -> Result<(u32, u32)> {
        self.send(option, data)?;
        let mut reply = [0; 20];
        self.0.read_exact(&mut reply)?;
        let number = |at: usize| -> Result<u32> { Ok(u32::from_be_bytes(reply[at..at + 4].try_into()?)) };
        let mut text = vec![0; number(16)? as usize];
        self.0.read_exact(&mut text)?;
        Ok((number(8)?, number(12)?))
    }

    /// All that comes until the server ends the connection, however it does.
    fn rest(&mut self) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        match self.0.read_to_end(&mut all) {
            Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => Err(error.into()),
            _ => Ok(all),
        }
    }
}

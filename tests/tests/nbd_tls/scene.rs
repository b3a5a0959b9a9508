//! Scene: a server on a TCP port of this machine, an authority, and clients with certificates of every kind.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use blksnap_agent::nbd::address::Address;
use blksnap_agent::nbd::counters::CountersSnapshot;
use blksnap_agent::nbd::endpoint::{Endpoint, LocalTls};
use blksnap_agent::nbd::file::FileExport;
use blksnap_agent::nbd::registry::Exports;
use blksnap_agent::nbd::server::{Server, ServerLimits};
use blksnap_agent::nbd::tls::{Clients, ServerTls};
use blksnap_tests::seed;
use rand::rngs::StdRng;
use rand::{RngCore as _, SeedableRng as _};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::authority::{Authority, Role, Valid};

/// Size of the export in bytes.
pub(crate) const SIZE: usize = 9 << 20;
/// Its name.
pub(crate) const NAME: &str = "disk";

/// A server with TLS, and what belongs to it.
pub(crate) struct Scene {
    runtime: Runtime,
    server: Option<Server>,
    port: u16,
    directory: TempDir,
    pub(crate) authority: Authority,
    /// What the file held at the start.
    pub(crate) content: Vec<u8>,
}

impl Scene {
    /// A writable export behind TLS that is required.
    pub(crate) fn new(test: &str, clients: Clients) -> Result<Self> {
        Self::with(test, clients, LocalTls::Required, &ServerLimits::default())
    }

    pub(crate) fn with(test: &str, clients: Clients, local: LocalTls, limits: &ServerLimits) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("blksnap-tls-").tempdir()?;
        let mut content = vec![0; SIZE];
        StdRng::seed_from_u64(seed(test)).fill_bytes(&mut content);
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(directory.path().join("disk"))?;
        file.write_all_at(&content, 0)?;
        let authority = Authority::new("authority")?;
        for folder in ["server", "client"] {
            authority.trust(&directory.path().join(folder))?;
        }
        authority.issue(&directory.path().join("server"), Role::Server, Valid::Now, 1)?;
        authority.issue(&directory.path().join("client"), Role::Client, Valid::Now, 2)?;
        authority.withdraw(&directory.path().join("server"))?;
        let tls = Arc::new(ServerTls::load(&directory.path().join("server"), clients)?);
        let exports = Arc::new(Exports::new());
        exports.add(Arc::new(
            FileExport::new(NAME, Arc::new(file), SIZE as u64).writable(),
        ))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let server = {
            let _guard = runtime.enter();
            let endpoint = Endpoint::tcp("127.0.0.1:0".parse()?, Some(&tls), local)?;
            Server::start_on(vec![endpoint], exports, limits)
        };
        let port = match server.endpoints() {
            [(Address::Tcp(address), _)] => address.port(),
            other => bail!("endpoints {other:?}"),
        };
        Ok(Self {
            runtime,
            server: Some(server),
            port,
            directory,
            authority,
            content,
        })
    }

    pub(crate) const fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The directory with the certificates of a client that may connect.
    pub(crate) fn certified(&self) -> PathBuf {
        self.beside("client")
    }

    /// A client's directory of its own, which trusts the server's authority.
    pub(crate) fn client(&self, name: &str) -> Result<PathBuf> {
        let directory = self.beside(name);
        self.authority.trust(&directory)?;
        Ok(directory)
    }

    /// URI for libnbd with the certificates of `directory`.
    pub(crate) fn uri(&self, directory: &Path) -> String {
        format!(
            "nbds://localhost:{}/{NAME}?tls-certificates={}",
            self.port,
            directory.display()
        )
    }

    /// Arguments by which a program of qemu finds the export with the certificates of `directory`.
    pub(crate) fn qemu(&self, directory: &Path, priority: &str) -> [String; 3] {
        let credentials = format!(
            "tls-creds-x509,id=tls0,endpoint=client,dir={},priority={priority}",
            directory.display()
        );
        let image = format!(
            "driver=nbd,server.type=inet,server.host=localhost,server.port={},export={NAME},tls-creds=tls0",
            self.port
        );
        ["--object".to_owned(), credentials, image]
    }

    pub(crate) fn counters(&self) -> Result<CountersSnapshot> {
        let server = self.server.as_ref().context("the server runs")?;
        Ok(server.counters().snapshot())
    }

    /// What the file holds now.
    pub(crate) fn now(&self) -> Result<Vec<u8>> {
        Ok(std::fs::read(self.beside("disk"))?)
    }

    /// Checks that a copy is the content.
    pub(crate) fn assert_copy(&self, name: &str) -> Result<()> {
        let copy = std::fs::read(self.beside(name))?;
        ensure!(copy == self.content, "{name} differs, {} bytes", copy.len());
        Ok(())
    }

    /// Checks that a client that may connect is served.
    pub(crate) fn assert_serves(&self) -> Result<()> {
        let said = libnbd("nbdinfo", &["--size", &self.uri(&self.certified())])?;
        ensure!(
            said.status.success() && stdout(&said).trim() == SIZE.to_string(),
            "{said:?}"
        );
        Ok(())
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            self.runtime.block_on(server.stop());
        }
    }
}

/// Runs a program of libnbd without certificates of the machine or of the user.
pub(crate) fn libnbd(program: &str, arguments: &[&str]) -> Result<Output> {
    // The distribution's own Python has the module.
    let environment = [
        ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        ("HOME", "/nonexistent"),
    ];
    Command::new(program)
        .args(arguments)
        .envs(environment)
        .output()
        .with_context(|| format!("start {program}"))
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Checks that a program succeeded, and gives what it said.
pub(crate) fn succeeded(output: &Output) -> Result<String> {
    ensure!(
        output.status.success(),
        "{}: {}{}",
        output.status,
        stdout(output),
        stderr(output)
    );
    Ok(stdout(output))
}

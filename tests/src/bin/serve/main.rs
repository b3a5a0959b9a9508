//! Serve: a file or a block device over NBD, in a process of its own, with the library's server.
//!
//! For tests that must see a server from outside (its memory, its end), and for trying a client by hand:
//! `blksnap-serve /tmp/s disk.img --writable`. It says `ready` on standard output, and ends in good order when its
//! standard input ends, so that nothing is left behind by a test that was killed.

use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use blksnap_agent::cbt::CbtMap;
use blksnap_agent::nbd::export::Export as _;
use blksnap_agent::nbd::file::FileExport;
use blksnap_agent::nbd::registry::Exports;
use blksnap_agent::nbd::server::{Server, ServerLimits};
use blksnap_agent::units::{BlockSize, Generation, Sectors};
use blksnap_tests::complain;
use clap::Parser;
use nix::sys::resource::{Resource, setrlimit};
use uuid::Uuid;

/// Serve a file or a block device over NBD until standard input ends.
#[derive(Debug, Parser)]
#[command(name = "blksnap-serve")]
struct Arguments {
    /// Path of the unix socket to make
    socket: PathBuf,
    /// What to serve
    file: PathBuf,
    /// Name of the export
    #[arg(long, default_value = "disk")]
    name: String,
    /// Takes writes
    #[arg(long)]
    writable: bool,
    /// A change map with this many takes, for the contexts of changes; block N changed in period N
    #[arg(long, default_value_t = 0)]
    takes: u8,
    /// Connections at once
    #[arg(long)]
    connections: Option<u32>,
    /// Bytes in flight on a connection
    #[arg(long)]
    connection_bytes: Option<usize>,
    /// Bytes in flight on all connections
    #[arg(long)]
    total_bytes: Option<usize>,
    /// Files and sockets that the process may have open
    #[arg(long)]
    descriptors: Option<u64>,
    /// Longest handshake in milliseconds
    #[arg(long)]
    handshake_ms: Option<u64>,
    /// Longest time in milliseconds without progress of a client in a request or an answer
    #[arg(long)]
    write_ms: Option<u64>,
}

impl Arguments {
    fn limits(&self) -> ServerLimits {
        let default = ServerLimits::default();
        ServerLimits {
            connections: self.connections.unwrap_or(default.connections),
            connection_bytes: self.connection_bytes.unwrap_or(default.connection_bytes),
            total_bytes: self.total_bytes.unwrap_or(default.total_bytes),
            handshake_timeout: self
                .handshake_ms
                .map_or(default.handshake_timeout, Duration::from_millis),
            write_timeout: self.write_ms.map_or(default.write_timeout, Duration::from_millis),
            ..default
        }
    }

    fn export(&self) -> Result<FileExport> {
        let export = FileExport::open(&self.name, &self.file, self.writable)?
            .with_description(self.file.display().to_string());
        if self.takes == 0 {
            return Ok(export);
        }
        // Generation 1, so that tests know the names of its contexts.
        let generation = Generation::new(Uuid::from_u128(1));
        let capacity = Sectors::new(export.size() / 512);
        let mut map = CbtMap::new(generation, BlockSize::from_bytes(64 << 10)?, capacity)?;
        for block in 1..=u64::from(self.takes) {
            map.mark_blocks(block, block);
            map.take(Generation::new(Uuid::from_u128(2)), capacity)?;
        }
        let read = map.read_map().context("a map that was taken")?;
        Ok(export.with_changes(read))
    }
}

fn main() -> ExitCode {
    match serve(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(format_args!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn serve(arguments: &Arguments) -> Result<()> {
    if let Some(most) = arguments.descriptors {
        setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    }
    let exports = Arc::new(Exports::new());
    exports.add(Arc::new(arguments.export()?))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let server = {
        let _guard = runtime.enter();
        Server::start(&arguments.socket, exports, &arguments.limits())?
    };
    let mut out = std::io::stdout();
    writeln!(out, "ready")?;
    out.flush()?;
    // What is typed means nothing; the end of it does.
    let mut input = std::io::stdin();
    while input.read(&mut [0; 256])? > 0 {}
    runtime.block_on(server.stop());
    Ok(())
}

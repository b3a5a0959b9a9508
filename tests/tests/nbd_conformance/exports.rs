//! Exports: a server with one export of each kind that matters, made for a test.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use blksnap_agent::nbd::export::{Export, ExportError, ZeroOptions};
use blksnap_agent::nbd::file::FileExport;
use blksnap_agent::nbd::proto::{BlockSizes, ContextName, StatusExtent};
use blksnap_agent::nbd::registry::Exports;
use blksnap_agent::nbd::server::{Server, ServerLimits};
use blksnap_agent::units::Extent;
use blksnap_tests::nbd::{Client, Framing, Haggling};
use bytes::Bytes;
use tempfile::TempDir;

/// Size of every export in bytes.
pub(crate) const SIZE: u64 = 4 << 20;

/// A disk with a cache that a power cut would empty.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    /// What reads see.
    pub(crate) cached: Vec<u8>,
    /// What a power cut leaves.
    pub(crate) durable: Vec<u8>,
    /// Ranges that must stay allocated: offset and length.
    pub(crate) provisioned: Vec<(u64, u64)>,
}

/// `volatile`: keeps what is written in a cache until it is told to persist it.
pub(crate) struct Volatile(Mutex<Contents>);

impl Volatile {
    /// What there is now.
    pub(crate) fn contents(&self) -> MutexGuard<'_, Contents> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, fua: bool, change: impl FnOnce(&mut Contents)) {
        let mut contents = self.contents();
        change(&mut contents);
        if fua {
            // All of it, which is more than is asked.
            contents.durable = contents.cached.clone();
        }
    }
}

fn range(offset: u64, length: u64) -> std::ops::Range<usize> {
    let place = |bytes: u64| usize::try_from(bytes).expect("inside the export");
    place(offset)..place(offset + length)
}

impl Export for Volatile {
    fn name(&self) -> &str {
        "volatile"
    }

    fn size(&self) -> u64 {
        SIZE
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), ExportError> {
        let contents = self.contents();
        buffer.copy_from_slice(&contents.cached[range(offset, buffer.len() as u64)]);
        Ok(())
    }

    fn write_at(&self, data: Bytes, offset: u64, fua: bool) -> Result<(), ExportError> {
        self.change(fua, |contents| {
            contents.cached[range(offset, data.len() as u64)].copy_from_slice(&data);
        });
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64, fua: bool) -> Result<(), ExportError> {
        self.change(fua, |contents| contents.cached[range(offset, length)].fill(0));
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, length: u64, options: ZeroOptions) -> Result<(), ExportError> {
        if options.fast {
            return Err(ExportError::NotFast {
                name: "volatile".into(),
                offset,
            });
        }
        self.change(options.fua, |contents| {
            contents.cached[range(offset, length)].fill(0);
            if options.no_hole {
                contents.provisioned.push((offset, length));
            }
        });
        Ok(())
    }

    fn flush(&self) -> Result<(), ExportError> {
        self.change(true, |_| {});
        Ok(())
    }

    fn block_status(
        &self,
        context: &ContextName,
        _: u64,
        _: u64,
        _: usize,
    ) -> Result<Vec<StatusExtent>, ExportError> {
        Err(ExportError::NoContext {
            name: "volatile".into(),
            context: context.as_str().into(),
        })
    }
}

/// `coarse`: large blocks, a small largest payload, a rotating medium, for one connection, with more extents than fit
/// into a chunk.
pub(crate) struct Coarse;

impl Export for Coarse {
    fn name(&self) -> &str {
        "coarse"
    }

    fn size(&self) -> u64 {
        SIZE
    }

    fn block_sizes(&self) -> BlockSizes {
        BlockSizes::new(512, 4096, 8192).expect("sizes as the specification allows")
    }

    fn rotational(&self) -> bool {
        true
    }

    fn can_multi_conn(&self) -> bool {
        false
    }

    fn read_at(&self, buffer: &mut [u8], _: u64) -> Result<(), ExportError> {
        buffer.fill(b'c');
        Ok(())
    }

    fn contexts(&self) -> Vec<ContextName> {
        vec![ContextName::base_allocation()]
    }

    fn block_status(
        &self,
        _: &ContextName,
        offset: u64,
        length: u64,
        most: usize,
    ) -> Result<Vec<StatusExtent>, ExportError> {
        let blocks = offset / 512..(offset + length) / 512;
        Ok(blocks
            .take(most)
            .map(|block| StatusExtent {
                length: 512,
                flags: if block % 2 == 0 { 3 } else { 0 },
            })
            .collect())
    }
}

/// A server with `disk` (read-only, half of it a hole, some of it dirty), `scratch` (the same, writable), [`Volatile`]
/// and [`Coarse`].
pub(crate) struct Fixture {
    runtime: tokio::runtime::Runtime,
    server: Option<Server>,
    directory: TempDir,
    pub(crate) exports: Arc<Exports>,
    pub(crate) volatile: Arc<Volatile>,
}

impl Fixture {
    pub(crate) fn new() -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("blksnap-nbd-").tempdir()?;
        let exports = Arc::new(Exports::new());
        for (name, writable) in [("disk", false), ("scratch", true)] {
            let path = directory.path().join(name);
            let file = std::fs::File::create_new(&path)?;
            std::os::unix::fs::FileExt::write_all_at(&file, &vec![b'd'; 1 << 20], 0)?;
            file.set_len(SIZE)?;
            let dirty = [Extent {
                offset: 65536,
                length: 65536,
            }];
            let export = FileExport::open(name, &path, writable)?.with_description("A disk of a test");
            exports.add(Arc::new(export.with_dirty(dirty)))?;
        }
        let contents = vec![0; usize::try_from(SIZE)?];
        let volatile = Arc::new(Volatile(Mutex::new(Contents {
            cached: contents.clone(),
            durable: contents,
            provisioned: Vec::new(),
        })));
        exports.add(Arc::clone(&volatile) as Arc<dyn Export>)?;
        exports.add(Arc::new(Coarse))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let server = {
            let _guard = runtime.enter();
            Server::start(
                &directory.path().join("s"),
                Arc::clone(&exports),
                &ServerLimits::default(),
            )?
        };
        Ok(Self {
            runtime,
            server: Some(server),
            directory,
            exports,
            volatile,
        })
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("s")
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn haggling(&self) -> Result<Haggling> {
        Haggling::open(&self.socket(), 3)
    }

    pub(crate) fn client(&self, export: &str, framing: Framing, contexts: &[&str]) -> Result<Client> {
        Client::connect(&self.socket(), export, framing, contexts)
    }

    /// Stops the server while clients are there; the wait for it is the handle's.
    pub(crate) fn stop(&mut self) -> Option<tokio::task::JoinHandle<()>> {
        let server = self.server.take()?;
        Some(self.runtime.spawn(server.stop()))
    }

    pub(crate) fn wait(&self, handle: tokio::task::JoinHandle<()>) -> Result<()> {
        Ok(self.runtime.block_on(handle)?)
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            self.runtime.block_on(server.stop());
        }
    }
}

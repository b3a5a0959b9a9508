//! Peers: other people's NBD clients against our server, on a real socket with real sparse files.
//!
//! Each test makes an image of random layout (the seed is printed; `BLKSNAP_SEED` repeats a run), serves it, and
//! compares what a client says with what was written. Needs nbdinfo, nbdcopy, qemu-img and qemu-io.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use blksnap_agent::nbd::counters::CountersSnapshot;
use blksnap_agent::nbd::export::{Export, ExportError};
use blksnap_agent::nbd::file::FileExport;
use blksnap_agent::nbd::proto::wire::{CommandType, ErrorCode};
use blksnap_agent::nbd::proto::{ContextName, StatusExtent};
use blksnap_agent::nbd::registry::Exports;
use blksnap_agent::nbd::server::{Server, ServerLimits};
use blksnap_agent::units::Extent;
use blksnap_tests::{run, seed};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// Granularity of the layouts: no file system of these tests allocates more coarsely.
const BLOCK: usize = 64 << 10;
/// What a hole is in `base:allocation`.
const HOLE: u64 = 3;
/// The name of the export in most tests.
const NAME: &str = "image";

/// An image and what is known of it.
struct Image {
    bytes: Vec<u8>,
    /// Whether each block was written.
    data: Vec<bool>,
    /// Whether each block is dirty.
    dirty: Vec<bool>,
}

impl Image {
    /// Random blocks, some of them holes, and a short last one of whole sectors.
    fn random(random: &mut StdRng, blocks: usize) -> Self {
        let size = blocks * BLOCK - 512 * random.random_range(0..64);
        let mut data = runs(random, blocks);
        let dirty = runs(random, blocks);
        // Both kinds are there whatever the seed.
        (data[0], data[1]) = (true, false);
        let mut bytes = vec![0; size];
        for (index, chunk) in bytes.chunks_mut(BLOCK).enumerate() {
            if data[index] {
                random.fill_bytes(chunk);
            }
        }
        Self { bytes, data, dirty }
    }

    fn write(&self, path: &Path) -> Result<File> {
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)?;
        file.set_len(self.bytes.len() as u64)?;
        for (index, chunk) in self.bytes.chunks(BLOCK).enumerate() {
            if self.data[index] {
                file.write_all_at(chunk, (index * BLOCK) as u64)?;
            }
        }
        file.sync_all()?;
        Ok(file)
    }

    /// Blocks as extents, those that are set only.
    fn extents(&self, blocks: &[bool]) -> Vec<Extent> {
        self.layout(blocks)
            .into_iter()
            .filter(|(_, _, set)| *set)
            .map(|(offset, length, _)| Extent { offset, length })
            .collect()
    }

    /// Blocks as a gapless list of offset, length and value.
    fn layout(&self, blocks: &[bool]) -> Vec<(u64, u64, bool)> {
        let mut layout: Vec<(u64, u64, bool)> = Vec::new();
        for (index, chunk) in self.bytes.chunks(BLOCK).enumerate() {
            match layout.last_mut() {
                Some(last) if last.2 == blocks[index] => last.1 += chunk.len() as u64,
                _ => layout.push(((index * BLOCK) as u64, chunk.len() as u64, blocks[index])),
            }
        }
        layout
    }
}

/// Runs of equal values.
fn runs(random: &mut StdRng, blocks: usize) -> Vec<bool> {
    let mut values = Vec::with_capacity(blocks);
    let mut value: bool = random.random();
    while values.len() < blocks {
        let length = random.random_range(1..6);
        values.extend(std::iter::repeat_n(value, length));
        value = !value;
    }
    values.truncate(blocks);
    values
}

/// A served image.
struct Peer {
    runtime: Runtime,
    server: Option<Server>,
    exports: Arc<Exports>,
    directory: TempDir,
    image: Image,
    random: StdRng,
}

impl Peer {
    fn new(test: &str, blocks: usize) -> Result<Self> {
        let mut random = StdRng::seed_from_u64(seed(test));
        let image = Image::random(&mut random, blocks);
        let directory = tempfile::Builder::new().prefix("blksnap-nbd-").tempdir()?;
        let file = Arc::new(image.write(&directory.path().join("image.raw"))?);
        let exports = Arc::new(Exports::new());
        let export = FileExport::new(NAME, file, image.bytes.len() as u64)
            .with_description("An image of a test")
            .with_dirty(image.extents(&image.dirty));
        exports.add(Arc::new(export))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let server = {
            let _guard = runtime.enter();
            Server::start(
                &directory.path().join("nbd.sock"),
                Arc::clone(&exports),
                &ServerLimits::default(),
            )?
        };
        Ok(Self {
            runtime,
            server: Some(server),
            exports,
            directory,
            image,
            random,
        })
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("nbd.sock")
    }

    fn uri_of(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket().display())
    }

    fn uri(&self) -> String {
        self.uri_of(NAME)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn counters(&self) -> Result<CountersSnapshot> {
        Ok(self
            .server
            .as_ref()
            .context("the server runs")?
            .counters()
            .snapshot())
    }

    /// Checks that a file holds the image.
    fn assert_copied(&self, name: &str) -> Result<()> {
        let copy = std::fs::read(self.file(name))?;
        ensure!(
            copy.len() == self.image.bytes.len(),
            "the copy has {} bytes",
            copy.len()
        );
        if copy != self.image.bytes {
            let different = copy.iter().zip(&self.image.bytes).position(|(a, b)| a != b);
            bail!("the copy differs at {different:?}");
        }
        Ok(())
    }

    /// What nbdinfo maps for a context, neighbours of equal type joined.
    fn map(&self, context: &str) -> Result<Vec<(u64, u64, u64)>> {
        let context = format!("--map={context}");
        let text = run("nbdinfo", ["--json", &context, &self.uri()])?;
        let mut layout: Vec<(u64, u64, u64)> = Vec::new();
        for extent in array(&serde_json::from_str(&text)?)? {
            let kind = number(extent, "type")?;
            let (offset, length) = (number(extent, "offset")?, number(extent, "length")?);
            match layout.last_mut() {
                Some(last) if last.2 == kind && last.0 + last.1 == offset => last.1 += length,
                _ => layout.push((offset, length, kind)),
            }
        }
        Ok(layout)
    }

    /// What nbdinfo should map for these blocks.
    fn expected(&self, blocks: &[bool], set: u64, clear: u64) -> Vec<(u64, u64, u64)> {
        self.image
            .layout(blocks)
            .into_iter()
            .map(|(offset, length, value)| (offset, length, if value { set } else { clear }))
            .collect()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            self.runtime.block_on(server.stop());
            assert!(!self.socket().exists(), "the socket is removed");
        }
    }
}

fn array(value: &Value) -> Result<&Vec<Value>> {
    value.as_array().with_context(|| format!("no list: {value}"))
}

fn number(value: &Value, key: &str) -> Result<u64> {
    value[key]
        .as_u64()
        .with_context(|| format!("no number {key}: {value}"))
}

/// Runs a client that may fail.
fn attempt(program: &str, arguments: &[&str]) -> Result<(Output, String)> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("start {program}"))?;
    let text = [&*output.stdout, &*output.stderr].concat();
    Ok((output, String::from_utf8_lossy(&text).into_owned()))
}

#[test]
fn nbdinfo_reads_size_flags_and_description() -> Result<()> {
    let peer = Peer::new("nbdinfo_reads_size_flags_and_description", 40)?;
    let size = peer.image.bytes.len();
    assert_eq!(run("nbdinfo", ["--size", &peer.uri()])?.trim(), size.to_string());

    let text = run("nbdinfo", [peer.uri()])?;
    for line in [
        "newstyle-fixed without TLS, using structured packets",
        "export=\"image\"",
        "description: An image of a test",
        "is_read_only: true",
        "can_flush: true",
        "can_multi_conn: true",
        "can_df: true",
        "can_cache: true",
        "can_fua: false",
        "can_trim: false",
        "can_zero: false",
        "block_size_minimum: 1",
        "block_size_preferred: 4096",
        "block_size_maximum: 33554432",
        "base:allocation",
        "qemu:dirty-bitmap:last",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }

    let told: Value = serde_json::from_str(&run("nbdinfo", ["--json", &peer.uri()])?)?;
    let export = &told["exports"][0];
    assert_eq!(export["export-name"], NAME);
    assert_eq!(export["description"], "An image of a test");
    assert_eq!(number(export, "export-size")?, size as u64);
    assert_eq!(export["is_read_only"], true);
    assert_eq!(export["can_multi_conn"], true);
    let contexts: Vec<&str> = array(&export["contexts"])?
        .iter()
        .filter_map(Value::as_str)
        .collect();
    assert_eq!(contexts, ["base:allocation", "qemu:dirty-bitmap:last"]);
    Ok(())
}

#[test]
fn nbdinfo_lists_exports_as_they_come_and_go() -> Result<()> {
    let peer = Peer::new("nbdinfo_lists_exports_as_they_come_and_go", 4)?;
    let list = || -> Result<Vec<String>> {
        let told: Value = serde_json::from_str(&run("nbdinfo", ["--list", "--json", &peer.uri_of("")])?)?;
        let names = array(&told["exports"])?
            .iter()
            .filter_map(|export| export["export-name"].as_str());
        Ok(names.map(str::to_owned).collect())
    };
    assert_eq!(list()?, [NAME]);
    let file = Arc::new(File::open(peer.file("image.raw"))?);
    for name in ["7:0", "a name with spaces"] {
        peer.exports
            .add(Arc::new(FileExport::new(name, Arc::clone(&file), 4096)))?;
    }
    assert_eq!(list()?, ["7:0", "a name with spaces", NAME]);
    assert_eq!(
        run("nbdinfo", ["--size", &peer.uri_of("a%20name%20with%20spaces")])?.trim(),
        "4096"
    );
    assert!(peer.exports.remove(NAME));
    assert_eq!(list()?, ["7:0", "a name with spaces"]);
    let (output, text) = attempt("nbdinfo", &[&peer.uri()])?;
    assert!(!output.status.success(), "{text}");
    // How libnbd words NBD_REP_ERR_UNKNOWN.
    assert!(text.contains("No such file or directory for export"), "{text}");
    Ok(())
}

#[test]
fn nbdinfo_opens_the_only_export_by_the_empty_name() -> Result<()> {
    let peer = Peer::new("nbdinfo_opens_the_only_export_by_the_empty_name", 4)?;
    let told: Value = serde_json::from_str(&run("nbdinfo", ["--json", &peer.uri_of("")])?)?;
    assert_eq!(
        number(&told["exports"][0], "export-size")?,
        peer.image.bytes.len() as u64
    );
    Ok(())
}

#[test]
fn nbdinfo_maps_the_real_layout() -> Result<()> {
    let peer = Peer::new("nbdinfo_maps_the_real_layout", 300)?;
    assert_eq!(
        peer.map("base:allocation")?,
        peer.expected(&peer.image.data, 0, HOLE)
    );
    assert_eq!(
        peer.map("qemu:dirty-bitmap:last")?,
        peer.expected(&peer.image.dirty, 1, 0)
    );
    let table = run("nbdinfo", ["--map=base:allocation", &peer.uri()])?;
    assert!(table.contains("hole,zero") && table.contains("data"), "{table}");
    let table = run("nbdinfo", ["--map=qemu:dirty-bitmap:last", &peer.uri()])?;
    assert!(table.contains("dirty"), "{table}");
    Ok(())
}

#[test]
fn nbdcopy_copies_every_byte() -> Result<()> {
    let peer = Peer::new("nbdcopy_copies_every_byte", 500)?;
    // nbdcopy uses no more connections than threads.
    let cases: [(&[&str], u64); 5] = [
        (&["--connections=1"], 1),
        (&["--threads=4", "--connections=4", "--requests=32"], 4),
        (&["--threads=4", "--connections=4", "--request-size=33554432"], 4),
        (&["--threads=2", "--connections=2", "--no-extents"], 2),
        (&["--synchronous"], 1),
    ];
    for (index, (case, connections)) in cases.into_iter().enumerate() {
        let name = format!("copy{index}.raw");
        let target = peer.file(&name);
        let uri = peer.uri();
        let before = peer.counters()?.connections;
        run(
            "nbdcopy",
            case.iter().copied().chain([uri.as_str(), path(&target)?]),
        )?;
        peer.assert_copied(&name)
            .with_context(|| format!("nbdcopy {case:?}"))?;
        assert_eq!(
            peer.counters()?.connections - before,
            connections,
            "nbdcopy {case:?}"
        );
    }
    let counters = peer.counters()?;
    assert!(counters.requests_of(CommandType::Read) > 0);
    assert!(counters.bytes_read >= peer.image.bytes.len() as u64);
    assert!(
        counters.connections >= 12,
        "several connections: {}",
        counters.connections
    );
    assert_eq!((counters.in_flight, counters.sessions_dropped), (0, 0));
    Ok(())
}

#[test]
fn nbdcopy_reads_many_exports_at_once() -> Result<()> {
    let peer = Peer::new("nbdcopy_reads_many_exports_at_once", 200)?;
    let file = Arc::new(File::open(peer.file("image.raw"))?);
    let size = peer.image.bytes.len() as u64;
    for index in 0..6 {
        let export = FileExport::new(format!("copy{index}"), Arc::clone(&file), size);
        peer.exports.add(Arc::new(export))?;
    }
    let clients = (0..6)
        .map(|index| {
            Command::new("nbdcopy")
                .arg("--connections=3")
                .arg(peer.uri_of(&format!("copy{index}")))
                .arg(peer.file(&format!("copy{index}.raw")))
                .spawn()
        })
        .collect::<Result<Vec<_>, _>>()?;
    for mut client in clients {
        assert!(client.wait()?.success());
    }
    for index in 0..6 {
        peer.assert_copied(&format!("copy{index}.raw"))?;
    }
    Ok(())
}

#[test]
fn qemu_img_understands_the_export() -> Result<()> {
    let peer = Peer::new("qemu_img_understands_the_export", 300)?;
    let uri = peer.uri();
    let size = peer.image.bytes.len() as u64;
    let told: Value = serde_json::from_str(&run("qemu-img", ["info", "--output=json", "-f", "raw", &uri])?)?;
    assert_eq!(number(&told, "virtual-size")?, size);

    run(
        "qemu-img",
        [
            "convert",
            "-f",
            "raw",
            "-O",
            "raw",
            &uri,
            path(&peer.file("convert.raw"))?,
        ],
    )?;
    peer.assert_copied("convert.raw")?;
    run(
        "qemu-img",
        [
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-W",
            "-m",
            "8",
            &uri,
            path(&peer.file("convert.qcow2"))?,
        ],
    )?;
    let text = run(
        "qemu-img",
        [
            "compare",
            "-f",
            "raw",
            "-F",
            "qcow2",
            &uri,
            path(&peer.file("convert.qcow2"))?,
        ],
    )?;
    assert!(text.contains("identical"), "{text}");
    run(
        "qemu-img",
        [
            "compare",
            "-f",
            "raw",
            "-F",
            "raw",
            &uri,
            path(&peer.file("image.raw"))?,
        ],
    )?;

    // One byte elsewhere must be seen.
    let other = File::options().write(true).open(peer.file("convert.raw"))?;
    other.write_all_at(&[peer.image.bytes[100] ^ 1], 100)?;
    let (output, text) = attempt(
        "qemu-img",
        &[
            "compare",
            "-f",
            "raw",
            "-F",
            "raw",
            &uri,
            path(&peer.file("convert.raw"))?,
        ],
    )?;
    assert_eq!(output.status.code(), Some(1), "{text}");
    Ok(())
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().context("the path is text")
}

/// What `qemu-img map` tells, by a key, neighbours joined.
fn qemu_map(told: &str, key: &str) -> Result<Vec<(u64, u64, bool)>> {
    let mut layout: Vec<(u64, u64, bool)> = Vec::new();
    for extent in array(&serde_json::from_str(told)?)? {
        let value = extent[key]
            .as_bool()
            .with_context(|| format!("no {key}: {extent}"))?;
        let length = number(extent, "length")?;
        match layout.last_mut() {
            Some(last) if last.2 == value => last.1 += length,
            _ => layout.push((number(extent, "start")?, length, value)),
        }
    }
    Ok(layout)
}

#[test]
fn qemu_img_maps_both_contexts() -> Result<()> {
    let peer = Peer::new("qemu_img_maps_both_contexts", 300)?;
    let told = run("qemu-img", ["map", "--output=json", "-f", "raw", &peer.uri()])?;
    let data = peer.image.layout(&peer.image.data);
    assert_eq!(qemu_map(&told, "data")?, data);
    let zero: Vec<_> = data
        .into_iter()
        .map(|(offset, length, data)| (offset, length, !data))
        .collect();
    assert_eq!(qemu_map(&told, "zero")?, zero);

    // qemu shows dirty extents as holes: its way to read another context in place of the allocation.
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},export={NAME},x-dirty-bitmap=qemu:dirty-bitmap:last",
        peer.socket().display()
    );
    let told = run("qemu-img", ["map", "--output=json", "--image-opts", &options])?;
    let clean: Vec<_> = peer
        .image
        .layout(&peer.image.dirty)
        .into_iter()
        .map(|(offset, length, dirty)| (offset, length, !dirty))
        .collect();
    assert_eq!(qemu_map(&told, "data")?, clean);
    Ok(())
}

#[test]
fn qemu_io_reads_patterns_at_random_places() -> Result<()> {
    let mut peer = Peer::new("qemu_io_reads_patterns_at_random_places", 64)?;
    // An export of constant runs, so that a pattern names what must be read.
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(peer.file("pattern.raw"))?;
    let mut patterns = BTreeMap::new();
    let size: u64 = 32 << 20;
    file.set_len(size)?;
    for block in 0..32_u64 {
        let pattern: u8 = if block % 5 == 4 {
            0
        } else {
            peer.random.random_range(1..=255)
        };
        if pattern != 0 {
            file.write_all_at(&vec![pattern; 1 << 20], block << 20)?;
        }
        patterns.insert(block, pattern);
    }
    peer.exports
        .add(Arc::new(FileExport::new("pattern", Arc::new(file), size)))?;

    let mut arguments = vec!["-r".into(), "-f".into(), "raw".into()];
    for _ in 0..60 {
        let (block, pattern) = (peer.random.random_range(0..32_u64), |block| patterns[&block]);
        let offset = peer.random.random_range(0..2048_u64) * 512;
        let length = (peer.random.random_range(1..=64) * 512).min((1 << 20) - offset);
        arguments.push("-c".into());
        arguments.push(format!(
            "read -P {} {} {length}",
            pattern(block),
            (block << 20) + offset
        ));
    }
    arguments.push("-c".into());
    arguments.push(format!("read -P {} {} {}", patterns[&31], 31 << 20, 1 << 20));
    arguments.push(peer.uri_of("pattern"));
    let text = run("qemu-io", &arguments)?;
    assert!(!text.contains("Pattern verification failed"), "{text}");
    assert_eq!(text.matches("ops;").count(), 61, "{text}");

    // The client's check is real: a wrong pattern is found.
    let wrong = format!("read -P {} 0 512", patterns[&0] ^ 0xff);
    let (_, text) = attempt(
        "qemu-io",
        &["-r", "-f", "raw", "-c", &wrong, &peer.uri_of("pattern")],
    )?;
    assert!(text.contains("Pattern verification failed"), "{text}");
    Ok(())
}

/// An export that hides that it is read-only, so that clients send writes.
struct Unflagged(FileExport);

impl Export for Unflagged {
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

#[test]
fn writes_are_refused_and_change_nothing() -> Result<()> {
    let peer = Peer::new("writes_are_refused_and_change_nothing", 16)?;
    // qemu does not even open a read-only export for writing.
    let (output, text) = attempt("qemu-io", &["-f", "raw", "-c", "write -P 1 0 4096", &peer.uri()])?;
    assert!(!output.status.success() || text.contains("read-only"), "{text}");
    // An export that does not show the flag gets the writes themselves, and refuses each kind.
    let file = Arc::new(File::open(peer.file("image.raw"))?);
    let inner = FileExport::new("bold", file, peer.image.bytes.len() as u64);
    peer.exports.add(Arc::new(Unflagged(inner)))?;
    let (_, text) = attempt(
        "qemu-io",
        &["-f", "raw", "-c", "write -P 1 0 100000", &peer.uri_of("bold")],
    )?;
    assert!(text.contains("write failed: Operation not permitted"), "{text}");
    let counters = peer.counters()?;
    assert!(counters.requests_of(CommandType::Write) > 0);
    assert_eq!(
        counters.errors_of(ErrorCode::NotPermitted),
        counters.requests_of(CommandType::Write)
    );
    // nbdcopy refuses a read-only target.
    let source = peer.file("zeroes.raw");
    File::create_new(&source)?.set_len(peer.image.bytes.len() as u64)?;
    let (output, text) = attempt("nbdcopy", &[path(&source)?, &peer.uri()])?;
    assert!(!output.status.success(), "{text}");
    run("nbdcopy", [&peer.uri(), path(&peer.file("copy.raw"))?])?;
    peer.assert_copied("copy.raw")?;
    Ok(())
}

#[test]
fn a_client_of_a_removed_export_is_told() -> Result<()> {
    let peer = Peer::new("a_client_of_a_removed_export_is_told", 16)?;
    let mut client = Command::new("qemu-io")
        .args(["-r", "-f", "raw", &peer.uri()])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()?;
    let mut commands = client.stdin.take().context("stdin")?;
    use std::io::Write as _;
    writeln!(commands, "read 0 512")?;
    while peer.counters()?.requests_of(CommandType::Read) == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(peer.exports.clients(NAME), 1);
    assert!(peer.exports.remove(NAME));
    writeln!(commands, "read 0 512\nquit")?;
    drop(commands);
    let output = client.wait_with_output()?;
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(text.contains("read failed"), "{text}");
    assert!(peer.counters()?.errors_of(ErrorCode::Shutdown) > 0);
    Ok(())
}

//! Copy on write: a served device with a snapshot held, beside qemu-storage-daemon with a copy-before-write filter.
//!
//! Both serve a file full of random data, on the same file system, over NBD on a unix socket; old data goes to another
//! file there. The same client drives both. Each round has a fresh snapshot, and a fresh filter; a ratio is that of one
//! round.

mod load;
mod take;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use blksnap_tests::{Daemon, run, seed};
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{RngCore as _, SeedableRng as _};
use serde_json::Value;

use self::load::{BLOCK, DEPTH};
use crate::nbd::load::{Kind, Load, run as run_load};
use crate::nbd::servers::Peer;
use crate::{Bench, REPEATS};

/// Bytes of a device.
const SIZE: u64 = 512 << 20;
/// Blocks that are written in a round: an eighth of the device.
const WRITES: usize = (SIZE / 8 / BLOCK as u64) as usize;
/// How often they are written again.
const PASSES: usize = 3;
/// How long something is read.
const READ: Duration = Duration::from_millis(1000);
/// Name of the served device.
const NAME: &str = "bench";

pub(crate) fn measure(bench: &mut Bench) -> Result<()> {
    take::measure(bench)?;
    let scene = Scene::new(bench)?;
    let mut samples = Samples::default();
    let rounds = bench.rounds(REPEATS);
    for round in 1..=rounds {
        bench.step(&format!("cow: writes and reads, {round} of {rounds}"))?;
        scene.round(round, &mut samples)?;
    }
    samples.report(bench);
    Ok(())
}

/// What the rounds came to.
#[derive(Default)]
struct Samples {
    first_touch: Vec<f64>,
    first_touch_rate: Vec<f64>,
    peer_rate: Vec<f64>,
    rewrite: Vec<f64>,
    rewrite_rate: Vec<f64>,
    clean_image: Vec<f64>,
    scattered_image: Vec<f64>,
    peer_image: Vec<f64>,
    amplification: Vec<f64>,
}

impl Samples {
    fn report(self, bench: &mut Bench) {
        let report = &mut bench.report;
        let writes = format!("4 KiB random writes, each block once, depth {DEPTH}");
        let peer = "qemu-storage-daemon, copy-before-write to a raw file, its default clusters of 64 KiB";
        report.add(
            "served_first_touch_ratio",
            ">= 1.2",
            format!("{writes}, a snapshot held; to {peer}"),
            self.first_touch,
        );
        report.add(
            "served_first_touch_iops",
            "",
            writes.clone(),
            self.first_touch_rate,
        );
        report.add(
            "served_first_touch_peer_iops",
            "",
            format!("{writes}; {peer}"),
            self.peer_rate,
        );
        report.add(
            "served_rewrite_ratio",
            ">= 0.9",
            "the same blocks again, to the same with no snapshot".to_owned(),
            self.rewrite,
        );
        report.add(
            "served_rewrite_iops",
            "",
            "the same blocks again".to_owned(),
            self.rewrite_rate,
        );
        let reads = "1 MiB sequential reads, depth 4, of an image";
        report.add(
            "image_read_ratio",
            ">= 0.9",
            format!("{reads} just taken, to those of the served device"),
            self.clean_image,
        );
        report.add(
            "image_read_peer_ratio",
            "",
            format!("{reads} just taken, to qemu-nbd on the file"),
            self.peer_image,
        );
        report.add(
            "image_read_kept_ratio",
            "",
            format!("{reads} of which an eighth was kept in blocks of 4 KiB, to those of the served device"),
            self.scattered_image,
        );
        report.add(
            "write_amplification",
            "",
            "bytes of difference storage and journal for each byte first written, 4 KiB random".to_owned(),
            self.amplification,
        );
    }
}

/// Two equal files, ours served.
struct Scene {
    daemon: Daemon,
    ours: PathBuf,
    theirs: PathBuf,
    blocks: Vec<u64>,
    directory: tempfile::TempDir,
}

impl Scene {
    fn new(bench: &Bench) -> Result<Self> {
        bench.step("cow: filling the files")?;
        let directory = tempfile::Builder::new().prefix("blksnap-bench-").tempdir()?;
        let mut random = StdRng::seed_from_u64(seed("cow"));
        let ours = directory.path().join("ours.img");
        let theirs = directory.path().join("theirs.img");
        for path in [&ours, &theirs] {
            fill(path, &mut random)?;
        }
        let mut blocks: Vec<u64> = (0..SIZE / u64::from(BLOCK)).collect();
        blocks.shuffle(&mut random);
        blocks.truncate(WRITES);
        let daemon = Daemon::start()?;
        daemon.run([
            "serve".as_ref(),
            ours.as_os_str(),
            "--name".as_ref(),
            NAME.as_ref(),
        ])?;
        Ok(Self {
            daemon,
            ours,
            theirs,
            blocks,
            directory,
        })
    }

    fn round(&self, round: usize, samples: &mut Samples) -> Result<()> {
        // Whoever is second finds the page cache and the disk busier: the order goes round.
        let peer_first = round.is_multiple_of(2);
        let before = if peer_first { Some(self.peer()?) } else { None };
        let snapshot = self.create()?;
        let image = export(&snapshot)?;
        let socket = self.daemon.nbd_socket();
        let device = read(&socket, NAME)?;
        let clean = read(&socket, &image)?;
        samples.clean_image.push(clean / device);
        samples.peer_image.push(clean / self.read_peer()?);

        let seconds = self.write(0x11)?;
        let kept = read(&socket, &image)?;
        samples.scattered_image.push(kept / read(&socket, NAME)?);
        samples.amplification.push(self.amplification(&snapshot)?);
        let held = self.rewrite()?;
        self.destroy(&snapshot)?;
        let free = self.rewrite()?;

        let peer = match before {
            Some(seconds) => seconds,
            None => self.peer()?,
        };
        samples.first_touch.push(peer / seconds);
        samples.first_touch_rate.push(rate(1, seconds));
        samples.peer_rate.push(rate(1, peer));
        samples.rewrite.push(free / held);
        samples.rewrite_rate.push(rate(PASSES, held));
        Ok(())
    }

    fn create(&self) -> Result<Value> {
        self.daemon
            .json(["snapshot".as_ref(), "create".as_ref(), self.ours.as_os_str()])
    }

    fn destroy(&self, snapshot: &Value) -> Result<()> {
        self.daemon.run(["snapshot", "destroy", id(snapshot)?])?;
        Ok(())
    }

    fn write(&self, fill: u8) -> Result<f64> {
        load::write(&self.daemon.nbd_socket(), NAME, &self.blocks, fill)
    }

    fn rewrite(&self) -> Result<f64> {
        (0x21..).take(PASSES).map(|fill| self.write(fill)).sum()
    }

    /// Bytes of storage and journal for each byte that was written.
    fn amplification(&self, snapshot: &Value) -> Result<f64> {
        let id = id(snapshot)?;
        let now = self.daemon.json(["snapshot", "info", id])?;
        let used = now["usage"]["used"]
            .as_u64()
            .context("the snapshot says no usage")?;
        let journal = self
            .daemon
            .state_dir()
            .join("snapshots")
            .join(id)
            .join("journal-0");
        let journal = fs::metadata(journal)?.blocks() * 512;
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let ratio = (used + journal) as f64 / (WRITES as u64 * u64::from(BLOCK)) as f64;
        Ok(ratio)
    }

    /// Seconds of qemu-storage-daemon for the first writes.
    fn peer(&self) -> Result<f64> {
        let target = self.directory.path().join("target.img");
        File::create(&target)?.set_len(SIZE)?;
        let name = "qemu-storage-daemon";
        let socket = self.directory.path().join(format!("{name}.sock"));
        let file =
            |node: &str, path: &Path| format!("driver=file,node-name={node},filename={}", path.display());
        let mut command = Command::new(name);
        command
            .args(["--blockdev", &file("origin", &self.theirs)])
            .args(["--blockdev", &file("target", &target)])
            .args([
                "--blockdev",
                "driver=copy-before-write,node-name=cbw,file=origin,target=target",
            ])
            .arg("--nbd-server")
            .arg(format!("addr.type=unix,addr.path={}", socket.display()))
            .arg("--export")
            .arg(format!(
                "type=nbd,id=export,node-name=cbw,name={NAME},writable=on"
            ));
        let peer = Peer::start(name, NAME, self.directory.path(), &mut command)?;
        let seconds = load::write(&peer.socket, NAME, &self.blocks, 0x11)?;
        drop(peer);
        fs::remove_file(&socket)?;
        fs::remove_file(&target)?;
        Ok(seconds)
    }

    /// MiB a second of qemu-nbd on the file of the device.
    fn read_peer(&self) -> Result<f64> {
        let name = "qemu-nbd";
        let socket = self.directory.path().join(format!("{name}.sock"));
        let mut command = Command::new(name);
        command
            .args([
                "--persistent",
                "--read-only",
                "--format=raw",
                "--export-name",
                NAME,
                "--socket",
            ])
            .args([&socket, &self.theirs]);
        let peer = Peer::start(name, NAME, self.directory.path(), &mut command)?;
        read(&peer.socket, NAME)
    }
}

/// MiB a second of sequential reads.
fn read(socket: &Path, export: &str) -> Result<f64> {
    let load = Load {
        kind: Kind::SequentialRead,
        block: 1 << 20,
        depth: 4,
        connections: 1,
        time: READ,
    };
    let rate = run_load(&load, socket, export)?;
    Ok(rate.requests / rate.seconds)
}

/// Writes a second.
fn rate(passes: usize, seconds: f64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let writes = (passes * WRITES) as f64;
    writes / seconds
}

fn id(snapshot: &Value) -> Result<&str> {
    snapshot["id"].as_str().context("the snapshot has no id")
}

fn export(snapshot: &Value) -> Result<String> {
    let name = snapshot["devices"][0]["image"]["export"].as_str();
    Ok(name.context("the snapshot has no image")?.to_owned())
}

/// Makes a file of random bytes, on the disk when this returns.
fn fill(path: &Path, random: &mut StdRng) -> Result<()> {
    let file = File::create(path)?;
    let mut piece = vec![0; 1 << 20];
    for offset in (0..SIZE).step_by(piece.len()) {
        random.fill_bytes(&mut piece);
        file.write_all_at(&piece, offset)?;
    }
    run("sync", [path])?;
    Ok(())
}

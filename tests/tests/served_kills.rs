//! Kills of a daemon that serves disks: SIGKILL over and over, with clients that write and snapshots that are held.
//!
//! Two clients send numbered writes to two disks (one step after the other was answered) and connect again after each
//! kill. Snapshots are taken and destroyed between and while the daemon dies. While no daemon runs, the files must
//! hold every step that was answered, in order. After each start every image that was known must be what it was when
//! it was first read, byte by byte, or be declared lost, which a kill must never bring about; and the clients go on.
//!
//! `BLKSNAP_SEED` repeats the choices of a run, not its timing. A run ends after 200 seconds, on a slow machine with
//! fewer kills than 300; `BLKSNAP_KILLS` asks for a number of them however long it takes.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::nbd::{Client, Framing};
use blksnap_tests::numbered::{Numbered, Sequence};
use blksnap_tests::{Daemon, DaemonOptions, seed};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::Value;

/// Kills in a run.
const KILLS: u32 = 300;
/// What a run may take; a bound for machines that are slow, not a measurement.
const TIME: Duration = Duration::from_secs(200);
/// Fewest kills of a run that the bound ends.
const FEWEST: u32 = 20;
/// Snapshots that are held at the same time, at most.
const HELD: usize = 3;
/// Steps before the daemon starts.
const STEPS: u64 = 200;
const NAMES: [&str; 2] = ["one", "two"];
const SIZE: u64 = 2 << 20;

/// What a snapshot showed when it was first read.
struct Known {
    id: String,
    images: Vec<Vec<u8>>,
}

#[derive(Debug, Default)]
struct Tally {
    kills: u32,
    /// Kills while a snapshot was being taken, or destroyed.
    busy: u32,
    snapshots: u32,
    /// Images that were read again after a kill and were exact.
    exact: u32,
    broken: u32,
    /// Snapshots of a take that was killed: gone, or found taken.
    unborn: u32,
    born: u32,
}

struct Run {
    daemon: Daemon,
    files: Vec<PathBuf>,
    sequences: [Sequence; 2],
    writers: Vec<Numbered>,
    known: Vec<Known>,
    tally: Tally,
    random: StdRng,
}

fn image(daemon: &Daemon, id: &str, name: &str) -> Result<Vec<u8>> {
    let export = format!("{id}/{name}");
    let mut client = Client::connect(&daemon.nbd_socket(), &export, Framing::Structured, &[])?;
    let bytes = client.read(0, SIZE)?;
    client.disconnect()?;
    Ok(bytes)
}

impl Run {
    fn new(seed: u64) -> Result<Self> {
        let daemon = Daemon::start()?;
        let sequences = [0, 1].map(|writer: u64| Sequence {
            seed: seed ^ writer,
            disks: NAMES.len(),
            first: writer * SIZE / 1024,
            count: SIZE / 1024,
        });
        let files: Vec<PathBuf> = NAMES.iter().map(|name| daemon.scratch().join(name)).collect();
        for file in &files {
            std::fs::File::create(file)?.set_len(SIZE)?;
        }
        for sequence in &sequences {
            sequence.fill(&files, STEPS)?;
        }
        for (file, chunk) in files.iter().zip(["32K", "256K"]) {
            let options = [
                "serve".as_ref(),
                file.as_os_str(),
                "--chunk-size".as_ref(),
                chunk.as_ref(),
            ];
            daemon.run(options)?;
        }
        let writers = sequences.map(|sequence| {
            let exports = NAMES.map(str::to_owned).to_vec();
            Numbered::start(daemon.nbd_socket(), exports, sequence, STEPS, true)
        });
        Ok(Self {
            daemon,
            files,
            sequences,
            writers: writers.into(),
            known: Vec::new(),
            tally: Tally::default(),
            random: StdRng::seed_from_u64(seed),
        })
    }

    /// Both images of a snapshot, which must be one instant.
    fn read(&self, id: &str) -> Result<Vec<Vec<u8>>> {
        let images = NAMES.iter().map(|name| image(&self.daemon, id, name));
        let images = images.collect::<Result<Vec<_>>>()?;
        let shown: Vec<Option<&[u8]>> = images.iter().map(|image| Some(image.as_slice())).collect();
        for sequence in &self.sequences {
            // A kill may have stopped a step in its midst, just before the take.
            sequence.judge(&shown, true).with_context(|| {
                let steps = self
                    .writers
                    .iter()
                    .map(|writer| (writer.answered(), writer.sent()));
                format!("{id}, steps {:?}", steps.collect::<Vec<_>>())
            })?;
        }
        Ok(images)
    }

    fn take(&mut self) -> Result<()> {
        let files = self.files.iter().map(|file| file.as_os_str());
        let command: [&std::ffi::OsStr; 2] = ["snapshot".as_ref(), "create".as_ref()];
        let value = self.daemon.json(command.into_iter().chain(files))?;
        let id = value["id"].as_str().context("an id")?.to_owned();
        self.tally.snapshots += 1;
        let images = self.read(&id)?;
        self.known.push(Known { id, images });
        Ok(())
    }

    fn destroy(&mut self) -> Result<()> {
        let known = self.known.remove(self.random.random_range(0..self.known.len()));
        self.daemon.run(["snapshot", "destroy", &known.id]).map(drop)
    }

    /// The files hold each step that was answered, and no step without those before it.
    fn check_files(&self) -> Result<()> {
        let now = self
            .files
            .iter()
            .map(std::fs::read)
            .collect::<Result<Vec<_>, _>>()?;
        let now: Vec<Option<&[u8]>> = now.iter().map(|bytes| Some(bytes.as_slice())).collect();
        for (sequence, writer) in self.sequences.iter().zip(&self.writers) {
            let (answered, sent) = (writer.answered(), writer.sent());
            let instant = sequence.judge(&now, true)?;
            ensure!(
                instant.latest >= answered && instant.earliest <= sent,
                "the files are as of {instant:?}; answered {answered}, sent {sent}"
            );
        }
        Ok(())
    }

    /// Kills the daemon at a random moment, perhaps within a take or the end of a snapshot.
    fn kill(&mut self) -> Result<()> {
        let mut ending = None;
        let mut command = None;
        if self.random.random_bool(0.4) {
            self.tally.busy += 1;
            let mut busy = if self.known.len() < HELD {
                let mut create = self.daemon.command(["snapshot", "create"]);
                create.args(&self.files);
                create
            } else {
                let which = self.random.random_range(0..self.known.len());
                ending = Some(self.known[which].id.clone());
                self.daemon
                    .command(["snapshot", "destroy", &self.known[which].id])
            };
            busy.stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null());
            command = Some(busy.spawn()?);
            std::thread::sleep(Duration::from_millis(self.random.random_range(0..150)));
        } else {
            std::thread::sleep(Duration::from_millis(self.random.random_range(0..60)));
        }
        self.daemon.kill()?;
        self.tally.kills += 1;
        let busy = command.is_some();
        if let Some(mut command) = command {
            command.wait()?;
        }
        self.check_files()?;
        self.daemon.launch(&DaemonOptions::default())?;
        let before = self.tally.born;
        let created = busy && ending.is_none();
        self.check_snapshots(ending)?;
        self.tally.unborn += u32::from(created && self.tally.born == before);
        Ok(())
    }

    /// All that was known is there, but for `ending`, and what else is there is a take that was killed.
    fn check_snapshots(&mut self, ending: Option<String>) -> Result<()> {
        let list = self.daemon.json(["snapshot", "list"])?;
        let list = list["snapshots"].as_array().context("a list")?;
        let mut known = Vec::new();
        for before in std::mem::take(&mut self.known) {
            let found = list.iter().find(|snapshot| snapshot["id"] == before.id.as_str());
            let Some(snapshot) = found else {
                ensure!(ending.as_ref() == Some(&before.id), "{} is gone", before.id);
                continue;
            };
            if snapshot["state"] != "taken" {
                // Half destroyed, it must say so.
                ensure!(snapshot["state"] == "corrupted", "{snapshot}");
                self.tally.broken += u32::from(ending.as_ref() != Some(&before.id));
                println!("broken after kill {}: {}", self.tally.kills, snapshot["reason"]);
                self.daemon.run(["snapshot", "destroy", &before.id])?;
                continue;
            }
            for (name, image_before) in NAMES.iter().zip(&before.images) {
                let now = image(&self.daemon, &before.id, name)?;
                ensure!(
                    &now == image_before,
                    "kill {}: image {name} of {} differs",
                    self.tally.kills,
                    before.id
                );
                self.tally.exact += 1;
            }
            known.push(before);
        }
        self.known = known;
        let others: Vec<String> = list
            .iter()
            .filter_map(|snapshot| snapshot["id"].as_str())
            .filter(|id| ending.as_deref() != Some(*id) && self.known.iter().all(|known| known.id != **id))
            .filter(|id| {
                self.daemon
                    .try_run(["snapshot", "info", id])
                    .is_ok_and(|answer| answer.code == 0)
            })
            .map(str::to_owned)
            .collect();
        ensure!(others.len() <= 1, "{others:?}");
        for id in others {
            let info: Value = self.daemon.json(["snapshot", "info", &id])?;
            ensure!(info["state"] == "taken", "{info}");
            self.tally.born += 1;
            let images = self.read(&id)?;
            self.known.push(Known { id, images });
        }
        Ok(())
    }

    fn round(&mut self) -> Result<()> {
        if self.known.len() < HELD && self.random.random_bool(0.7) {
            self.take()?;
        }
        if self.known.len() > 1 && self.random.random_bool(0.3) {
            self.destroy()?;
        }
        for writer in &mut self.writers {
            // The clients go on after each start.
            writer.wait_for(self.random.random_range(1..12))?;
        }
        self.kill()
    }

    fn end(&mut self) -> Result<[u64; 2]> {
        let mut ends = [0; 2];
        for (end, writer) in ends.iter_mut().zip(&mut self.writers) {
            writer.wait_for(20)?;
            *end = writer.stop()?;
        }
        self.check_files()?;
        let ids: Vec<String> = self.known.iter().map(|known| known.id.clone()).collect();
        for (known, id) in self.known.iter().zip(&ids) {
            ensure!(self.read(id)? == known.images, "{id} differs at the end");
            self.daemon.run(["snapshot", "destroy", id])?;
        }
        let left: Vec<_> = std::fs::read_dir(self.daemon.storage())?.collect::<Result<_, _>>()?;
        ensure!(left.is_empty(), "difference storage is left: {left:?}");
        let states = self.daemon.state_dir().join("snapshots");
        let left = std::fs::read_dir(&states).map_or(0, Iterator::count);
        ensure!(left == 0, "{left} entries are left in {}", states.display());
        Ok(ends)
    }
}

#[test]
fn kills_lose_no_write_and_no_image() -> Result<()> {
    let seed = seed("kills_lose_no_write_and_no_image");
    let (kills, time) = match std::env::var("BLKSNAP_KILLS") {
        Ok(text) => (text.parse().context("BLKSNAP_KILLS is a number")?, Duration::MAX),
        Err(_) => (KILLS, TIME),
    };
    let mut run = Run::new(seed)?;
    let begun = Instant::now();
    while run.tally.kills < kills && begun.elapsed() < time {
        run.round()
            .with_context(|| format!("round {}: {}", run.tally.kills, run.daemon.log()))?;
    }
    let steps = run.end()?;
    let reconnected: u64 = run.writers.iter().map(Numbered::reconnected).sum();
    println!(
        "{:?}, steps answered {steps:?}, {reconnected} times connected again, {} s",
        run.tally,
        begun.elapsed().as_secs()
    );
    let tally = &run.tally;
    ensure!(tally.kills == kills || tally.kills >= FEWEST, "{tally:?}");
    ensure!(tally.broken == 0, "{tally:?}");
    ensure!(tally.snapshots > 0 && tally.exact > 0, "{tally:?}");
    ensure!(steps.iter().all(|steps| *steps > STEPS), "{steps:?}");
    Ok(())
}

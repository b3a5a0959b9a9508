//! Kills: an agent killed over and over at random points, with writers at work all the time, misses no block.
//!
//! Writers note what they wrote. In each round the agent does something (a take, a backup, an attach, its own start)
//! and gets SIGKILL in the midst of it; the writers go on, and the next agent starts. Then the writers pause, a
//! snapshot is taken, and the agent is asked what changed since the round before. Every block noted must be among
//! the answer; or the answer is that a full copy is needed, with a reason, which must stay rare. Now and then an
//! incremental backup that went through all of this is compared with the device, byte by byte.
//!
//! `BLKSNAP_SEED` repeats the choices of a run, not its timing; `BLKSNAP_KILLS` asks for another number of kills.

mod load;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use blksnap_tests::{Daemon, DaemonOptions, LoopDevice, Writer, seed};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::Value;

use load::{Load, Paused, UNIT};

const MIB: u64 = 1 << 20;

/// Kills in a run.
const KILLS: u32 = 300;

/// Percent of the kills that the generation has to survive.
const SURVIVE: u32 = 95;

/// Rounds between two comparisons of a backup with the device.
const COMPARE: u32 = 15;

/// Bound against hanging for ever, not a measurement.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the agent does when it is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Work {
    Nothing,
    /// A snapshot of the raw device.
    Take,
    /// A snapshot of the raw device and one with a file system, which is frozen for it.
    TakeFrozen,
    Backup,
    /// Another device is detached and attached.
    Attach,
    Mark,
    Ask,
    /// Its own start: adoption.
    Start,
}

impl Work {
    const ALL: [Self; 8] = [
        Self::Nothing,
        Self::Take,
        Self::TakeFrozen,
        Self::Backup,
        Self::Attach,
        Self::Mark,
        Self::Ask,
        Self::Start,
    ];
}

/// A take that the client knows.
#[derive(Clone, Debug)]
struct Base {
    generation: String,
    number: u64,
}

/// How the questions were answered.
#[derive(Debug, Default)]
struct Tally {
    /// Kills by what went on.
    kills: BTreeMap<Work, u32>,
    /// Answers with extents.
    extents: u32,
    /// Answers "full needed", by reason.
    full: BTreeMap<String, u32>,
    /// Blocks noted and reported.
    blocks: u64,
    /// Backups compared, and those of them that were incremental.
    compared: (u32, u32),
}

/// All that takes part.
struct Scene {
    // Dropped in this order: the writers stop before their devices go, and the agent lets go of them.
    load: Load,
    files: Writer,
    daemon: Daemon,
    raw: LoopDevice,
    mounted: LoopDevice,
    other: LoopDevice,
    random: StdRng,
    base: Option<Base>,
    tally: Tally,
}

impl Scene {
    fn new(seed: u64) -> Result<Self> {
        let raw = LoopDevice::new(16 * MIB)?;
        let other = LoopDevice::new(16 * MIB)?;
        let mut mounted = LoopDevice::new(24 * MIB)?;
        mounted.mkfs("ext4")?;
        let files = Writer::files(&mounted.mount()?, seed);
        Ok(Self {
            load: Load::start(raw.path(), seed, 2)?,
            files,
            daemon: Daemon::start()?,
            raw,
            mounted,
            other,
            random: StdRng::seed_from_u64(seed),
            base: None,
            tally: Tally::default(),
        })
    }

    fn backup(&self) -> PathBuf {
        self.daemon.scratch().join("killed.img")
    }

    /// Attaches what is not tracked.
    fn attach(&self) -> Result<()> {
        let status = self.daemon.json(["status"])?;
        let tracked: Vec<&str> = status["devices"]
            .as_array()
            .context("no devices")?
            .iter()
            .filter_map(|device| device["device"].as_str())
            .collect();
        for (device, size) in [(&self.raw, "4K"), (&self.mounted, "64K"), (&self.other, "4K")] {
            if !tracked.iter().any(|path| Path::new(path) == device.path()) {
                self.daemon.run([
                    "attach".as_ref(),
                    "--block-size".as_ref(),
                    size.as_ref(),
                    device.path(),
                ])?;
            }
        }
        Ok(())
    }

    /// A command that begins `work`.
    fn begin(&mut self, work: Work) -> Result<Vec<Child>> {
        let raw = self.raw.path().as_os_str();
        let mut commands: Vec<Vec<OsString>> = Vec::new();
        let mut say = |words: &[&std::ffi::OsStr]| commands.push(words.iter().map(Into::into).collect());
        let word = |text: &'static str| std::ffi::OsStr::new(text);
        let backup = self.backup();
        let base = self.base.as_ref().map_or_else(
            || "00000000-0000-0000-0000-000000000001:1".to_owned(),
            |base| format!("{}:{}", base.generation, base.number),
        );
        match work {
            Work::Nothing | Work::Start => {}
            Work::Take => say(&[word("snapshot"), word("create"), raw]),
            Work::TakeFrozen => {
                say(&[
                    word("snapshot"),
                    word("create"),
                    raw,
                    self.mounted.path().as_os_str(),
                ]);
            }
            Work::Backup => say(&[word("backup"), word("--incremental"), raw, backup.as_os_str()]),
            Work::Attach => {
                for verb in ["detach", "attach"] {
                    say(&[word(verb), self.other.path().as_os_str()]);
                }
            }
            Work::Mark => say(&[word("cbt"), word("mark"), raw, word("--range"), word("64K:1M")]),
            Work::Ask => say(&[word("cbt"), word("extents"), raw, word("--since"), base.as_ref()]),
        }
        commands
            .into_iter()
            .map(|words| {
                let mut command = self.daemon.command(words);
                command.stdout(Stdio::null()).stderr(Stdio::null());
                command.spawn().context("start a command")
            })
            .collect()
    }

    /// Lets the agent work and kills it, with a chance at every stage of what it does.
    fn kill(&mut self) -> Result<()> {
        let work = Work::ALL[self.random.random_range(0..Work::ALL.len())];
        *self.tally.kills.entry(work).or_default() += 1;
        if work == Work::Start {
            self.daemon.kill()?;
            self.daemon.begin_launch(&DaemonOptions::default())?;
        }
        let commands = self.begin(work)?;
        let longest = [3, 20, 100, 250][self.random.random_range(0..4)];
        std::thread::sleep(Duration::from_micros(self.random.random_range(0..longest * 1000)));
        self.daemon.kill()?;
        for mut command in commands {
            command.wait()?;
        }
        // Nobody listens now but the programs, if they are there.
        std::thread::sleep(Duration::from_millis(self.random.random_range(0..20)));
        Ok(())
    }

    /// Takes the raw device while nobody writes to it.
    fn take(&self) -> Result<Base> {
        let raw = self.raw.path();
        let snapshot = self.daemon.json(["snapshot".as_ref(), "create".as_ref(), raw])?;
        let image = &snapshot["devices"][0]["image"];
        let base = Base {
            generation: image["generation"].as_str().context("no generation")?.to_owned(),
            number: image["number"].as_u64().context("no number")?,
        };
        let id = snapshot["id"].as_str().context("no id")?;
        self.daemon.run(["snapshot", "destroy", id])?;
        Ok(base)
    }

    /// Asks what changed since the round before, and compares it with what was written.
    fn ask(&mut self) -> Result<()> {
        let paused = self.load.pause();
        let base = self.take()?;
        if let Some(since) = self.base.replace(base) {
            let since = format!("{}:{}", since.generation, since.number);
            let raw = self.raw.path();
            let answer = self.daemon.json([
                "cbt".as_ref(),
                "extents".as_ref(),
                raw,
                "--since".as_ref(),
                Path::new(&since),
            ])?;
            compare(&paused, &answer, &mut self.tally).with_context(|| format!("since {since}"))?;
        }
        paused.forget();
        Ok(())
    }

    /// Renews the backup and compares it with the device.
    fn compare_backup(&mut self) -> Result<()> {
        let _paused = self.load.pause();
        // One of its own: a killed backup leaves a file that only a full one can mend.
        let backup = self.daemon.scratch().join("compared.img");
        let result = self.daemon.json([
            "backup".as_ref(),
            "--incremental".as_ref(),
            self.raw.path(),
            &backup,
        ])?;
        self.tally.compared.0 += 1;
        self.tally.compared.1 += u32::from(result["kind"] == "incremental");
        // The pages of the file behind the device are what the device has.
        let (device, copy) = (fs::read(self.raw.image())?, fs::read(&backup)?);
        ensure!(
            device.len() == copy.len(),
            "{} and {} bytes",
            device.len(),
            copy.len()
        );
        let unit = usize::try_from(UNIT)?;
        let wrong: Vec<usize> = (0..device.len() / unit)
            .filter(|at| device[at * unit..][..unit] != copy[at * unit..][..unit])
            .collect();
        ensure!(
            wrong.is_empty(),
            "{} blocks of the {} backup are old: {:?}",
            wrong.len(),
            result["kind"],
            &wrong[..wrong.len().min(20)]
        );
        Ok(())
    }

    /// Waits until both loads got on: nobody is left frozen.
    fn writers_get_on(&self) -> Result<()> {
        let (raw, files) = (self.load.writes(), self.files.writes());
        let deadline = Instant::now() + PATIENCE;
        while self.load.writes() == raw || self.files.writes() == files {
            ensure!(Instant::now() < deadline, "a writer is stuck");
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn round(&mut self, round: u32) -> Result<()> {
        self.kill()?;
        self.writers_get_on()?;
        self.daemon.launch(&DaemonOptions::default())?;
        self.attach()?;
        self.ask()?;
        if round.is_multiple_of(COMPARE) {
            self.compare_backup()?;
        }
        Ok(())
    }
}

/// Every unit that was written must be in the answer, unless that has a reason.
fn compare(paused: &Paused<'_>, answer: &Value, tally: &mut Tally) -> Result<()> {
    if let Some(full) = answer.get("full_needed") {
        let reason = full["reason"].as_str().unwrap_or_default();
        ensure!(
            !reason.is_empty(),
            "a full copy is needed without a reason: {answer}"
        );
        *tally.full.entry(reason.to_owned()).or_default() += 1;
        return Ok(());
    }
    let extents = answer["extents"]
        .as_array()
        .context("neither extents nor a reason")?;
    let mut reported = Vec::new();
    for extent in extents {
        let (Some(offset), Some(length)) = (extent["offset"].as_u64(), extent["length"].as_u64()) else {
            bail!("not an extent: {extent}");
        };
        reported.push(offset..offset + length);
    }
    let written = paused.written();
    let missed: Vec<u64> = written
        .iter()
        .copied()
        .filter(|unit| {
            let byte = unit * UNIT;
            let after = reported.partition_point(|extent| extent.start <= byte);
            after == 0 || !reported[after - 1].contains(&byte)
        })
        .collect();
    ensure!(
        missed.is_empty(),
        "{} of {} blocks were written and are not reported: {:?}",
        missed.len(),
        written.len(),
        &missed[..missed.len().min(20)]
    );
    tally.extents += 1;
    tally.blocks += written.len() as u64;
    Ok(())
}

#[test]
fn an_agent_killed_at_random_points_misses_no_block() -> Result<()> {
    let kills = match std::env::var("BLKSNAP_KILLS") {
        Ok(text) => text.parse().context("BLKSNAP_KILLS is no number")?,
        Err(_) => KILLS,
    };
    let mut scene = Scene::new(seed("kills"))?;
    scene.attach()?;
    scene.ask()?;
    for round in 1..=kills {
        scene
            .round(round)
            .with_context(|| format!("kill {round}; until now {:?}", scene.tally))?;
    }
    println!("{:#?}", scene.tally);
    let Scene {
        load, daemon, tally, ..
    } = scene;
    load.finish()?;
    drop(daemon);
    ensure!(
        tally.extents + tally.full.values().sum::<u32>() == kills,
        "{tally:?}"
    );
    ensure!(tally.blocks > u64::from(kills), "nobody wrote: {tally:?}");
    // A generation that ends loses nothing, but it costs a full backup.
    ensure!(tally.extents * 100 >= kills * SURVIVE, "{tally:?}");
    let (compared, incremental) = tally.compared;
    ensure!(incremental * 2 >= compared || compared < 2, "{tally:?}");
    Ok(())
}

//! Power: guests that are killed while they write, started again on the same disks, and asked what is left.
//!
//! What a guest does is `tests/src/bin/power`. It prints what must be known after a cut; this is kept here, and given to
//! the next boot. QEMU is killed with SIGKILL: what the guest's kernel had not sent to its disks is lost, what its disks
//! had answered is there. So this is the cut of a machine whose disks have no volatile cache.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};

use super::kernels;
use super::machine::{Bus, Content, Disk, End, Machine, quote};
use crate::workspace::{self, Profile};

/// How often.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  cargo xtask power
  cargo xtask power --rounds 50 --kernel 6.12 --seed 7
  cargo xtask power --dm --rounds 10 --kernel 6.12")]
pub(crate) struct Arguments {
    /// Power cuts
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// As `cargo xtask vm` has it
    #[arg(long, default_value = "fei")]
    kernel: String,
    /// Snapshots by the dm filter, of a volume of LVM: each cut ends them
    #[arg(long)]
    dm: bool,
    /// Repeats the choices of a run, not its timing [default: a random one]
    #[arg(long)]
    seed: Option<u64>,
    /// How long one boot may take, in seconds
    #[arg(long, default_value_t = 900, value_name = "SECONDS")]
    timeout: u64,
}

const HOME_BYTES: u64 = 512 << 20;
const TRACKED_BYTES: u64 = 64 << 20;

/// When the power goes: so long after the guest's word.
#[derive(Clone, Copy, Debug)]
struct Moment {
    word: &'static str,
    /// Which of these words.
    count: u32,
    delay: Duration,
}

impl Moment {
    fn draw(random: &mut StdRng, round: u32) -> Self {
        let mut after = |word, most, milliseconds| Self {
            word,
            count: random.random_range(1..=most),
            delay: Duration::from_millis(random.random_range(0..milliseconds)),
        };
        // The first boot has to leave something.
        match if round == 0 { 0 } else { round % 5 } {
            1 => after("flushed", 60, 20),
            2 => after("ending", 8, 300),
            3 => after("known", 6, 500),
            4 => after("started", 1, 8000),
            _ => after("writing", 1, 6000),
        }
    }
}

/// What the guest said, of all boots.
#[derive(Debug, Default)]
struct Said {
    /// Ranges of writes that are durable.
    flushed: Vec<(u64, u64)>,
    /// First write of this boot.
    first: u64,
    known: Vec<Value>,
    checked: Option<Value>,
    moment: Option<Moment>,
    /// When the word of the moment came.
    came: Option<Instant>,
    /// The start of a line.
    rest: Vec<u8>,
}

impl Said {
    fn line(&mut self, line: &str) {
        let (word, value) = line.split_once(' ').unwrap_or((line, "null"));
        let value: Value = serde_json::from_str(value).unwrap_or_default();
        match word {
            "started" => self.first = value.as_u64().unwrap_or_default() + 1,
            "flushed" => {
                let number = value.as_u64().unwrap_or_default();
                match self.flushed.last_mut() {
                    Some((first, last)) if *first == self.first => *last = number,
                    _ => self.flushed.push((self.first, number)),
                }
            }
            "known" => self.known.push(value),
            "ending" => {
                for known in &mut self.known {
                    if known["id"] == value {
                        known["ending"] = true.into();
                    }
                }
            }
            "checked" => {
                // They were destroyed then, and what is known from now on is new.
                self.known.clear();
                self.checked = Some(value);
            }
            _ => {}
        }
        if let Some(moment) = &mut self.moment
            && moment.word == word
            && self.came.is_none()
        {
            moment.count -= 1;
            if moment.count == 0 {
                self.came = Some(Instant::now());
            }
        }
    }

    fn is_over(&self) -> bool {
        let due = self.moment.zip(self.came);
        due.is_some_and(|(moment, came)| came.elapsed() >= moment.delay)
    }
}

/// Reads what the guest prints.
#[derive(Clone, Debug, Default)]
struct Host(Arc<Mutex<Said>>);

impl Host {
    fn said(&self) -> MutexGuard<'_, Said> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for Host {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut said = self.said();
        said.rest.extend_from_slice(bytes);
        while let Some(end) = said.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = said.rest.drain(..=end).collect();
            said.line(String::from_utf8_lossy(&line).trim_end());
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A row of boots on the same disks.
struct Row<'a> {
    host: Host,
    machine: Machine,
    tool: &'a Path,
    seed: u64,
    before: &'a Path,
}

impl Row<'_> {
    /// One boot. Gives what it found of the cut before, if it came so far.
    fn boot(&mut self, moment: Option<Moment>, options: &str) -> Result<Option<Value>> {
        {
            let mut said = self.host.said();
            said.moment = moment;
            said.came = None;
            said.checked = None;
            said.rest.clear();
            let before = json!({"flushed": said.flushed, "known": said.known});
            fs::write(self.before, before.to_string()).context("writing what is known failed")?;
        }
        let command = format!(
            "exec {} --seed {} --before {} {options}",
            quote(&self.tool.display().to_string()),
            self.seed,
            quote(&self.before.display().to_string())
        );
        let mut err = Vec::new();
        let (host, mut out) = (self.host.clone(), self.host.clone());
        let outcome = self
            .machine
            .run_until(&command, &mut out, &mut err, &|| host.said().is_over())?;
        let wanted = if moment.is_some() {
            End::Cut
        } else {
            End::Exited(0)
        };
        ensure!(
            outcome.end == wanted,
            "{:?}: {}\n{}",
            outcome.end,
            String::from_utf8_lossy(&err),
            outcome.tail.join("\n")
        );
        ensure!(
            outcome.complaints.is_empty(),
            "the kernel said: {}",
            outcome.complaints.join("; ")
        );
        Ok(self.host.said().checked.take())
    }
}

fn disk(path: &Path, bytes: u64) -> Result<Disk> {
    let file = File::create(path).with_context(|| format!("creating {} failed", path.display()))?;
    file.set_len(bytes).context("making a disk failed")?;
    Ok(Disk {
        bus: Bus::Virtio,
        content: Content::File(path.to_owned()),
    })
}

/// Cuts the power so often, and fails if anything is wrong after one.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    super::check()?;
    let kernel = kernels::find(&arguments.kernel, false)?;
    let (agent, tool) = workspace::build_with_tool(Profile::Development, "blksnap-power")?;
    let lab = workspace::target().join("lab");
    fs::create_dir_all(&lab).with_context(|| format!("creating {} failed", lab.display()))?;
    let folder = tempfile::Builder::new().prefix("power-").tempdir_in(&lab)?;
    let seed = arguments.seed.unwrap_or_else(rand::random);
    println!("power: --seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut row = Row {
        host: Host::default(),
        machine: Machine {
            kernel,
            cpus: 2,
            memory_mib: 1024,
            disks: vec![
                disk(&folder.path().join("home"), HOME_BYTES)?,
                disk(&folder.path().join("tracked"), TRACKED_BYTES)?,
            ],
            shares: Vec::new(),
            append: Vec::new(),
            modules: vec!["loop".to_owned()],
            environment: vec![("BLKSNAP_AGENT".to_owned(), agent.display().to_string())],
            timeout: Duration::from_secs(arguments.timeout),
            console: false,
        },
        tool: &tool,
        seed,
        before: &folder.path().join("before"),
    };
    let (mut exact, mut refused) = (0, 0);
    for round in 0..=arguments.rounds {
        let last = round == arguments.rounds;
        let moment = (!last).then(|| Moment::draw(&mut random, round));
        let mut options = match (round, last) {
            (0, _) => "--new",
            (_, true) => "--last",
            _ => "",
        }
        .to_owned();
        if arguments.dm {
            options += " --dm";
        }
        let checked = row
            .boot(moment, &options)
            .with_context(|| format!("boot {round} of a run with --seed {seed}, {moment:?}"))?;
        if let Some(checked) = checked {
            exact += checked["exact"].as_u64().unwrap_or_default();
            refused += checked["refused"].as_u64().unwrap_or_default();
            println!("power: boot {round}: found {checked}");
        } else {
            println!("power: boot {round}: cut before it had looked");
        }
        if let Some(moment) = moment {
            let writes: u64 = row.host.said().flushed.iter().map(|(a, b)| b - a + 1).sum();
            println!("power: boot {round}: cut by {moment:?}, {writes} writes durable");
        }
    }
    println!(
        "power: {} cuts: {exact} snapshots exact, {refused} refused",
        arguments.rounds
    );
    let looked_at = if arguments.dm { refused } else { exact };
    ensure!(looked_at > 0, "no snapshot was there to be looked at");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_said_is_kept_for_the_next_boot() {
        let mut host = Host::default();
        host.said().moment = Some(Moment {
            word: "flushed",
            count: 2,
            delay: Duration::ZERO,
        });
        host.write_all(b"started 0\nknown {\"id\":\"a\"}\nflushed 8\nfl")
            .unwrap();
        assert!(!host.said().is_over());
        host.write_all(b"ushed 16\nending \"a\"\nflushed 2").unwrap();
        assert!(host.said().is_over());
        assert_eq!(host.said().flushed, [(1, 16)], "half a line says nothing");
        assert_eq!(host.said().known[0]["ending"], true);
        host.said().rest.clear();
        // Write 17 was there, 18 was lost and is sent again.
        host.write_all(b"started 17\nchecked {\"exact\":1}\nflushed 24\n")
            .unwrap();
        assert_eq!(host.said().flushed, [(1, 16), (18, 24)]);
        assert!(host.said().known.is_empty());
        assert_eq!(host.said().checked.take().unwrap()["exact"], 1);
    }
}

//! Kills: who holds writes is killed at any moment, again and again: while it attaches, takes, holds. Writers go on
//! without an error, and nothing stays but an alias partition, which the next one takes over or back.

use std::io::Read as _;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use blksnap_agent::filter::gate::remove_left_aliases;
use blksnap_tests::lab::{self, KernelLog};
use blksnap_tests::seed;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::agent::{Busy, alias_of, nothing_is_left, prepare, rounds};

/// Bound against hanging for ever.
const PATIENCE: Duration = Duration::from_secs(120);

/// A process that holds the writes of a device. Killed when dropped.
struct Holder {
    child: Child,
    held: Arc<AtomicBool>,
}

impl Holder {
    fn start(device: &std::path::Path) -> Result<Self> {
        let mut child = Command::new(env!("CARGO_BIN_EXE_blksnap-gate"))
            .arg(device)
            .stdout(Stdio::piped())
            .spawn()
            .context("start blksnap-gate")?;
        let mut said = child.stdout.take().context("its output")?;
        let held = Arc::new(AtomicBool::new(false));
        let tell = Arc::clone(&held);
        std::thread::spawn(move || {
            let mut word = [0; 4];
            if said.read_exact(&mut word).is_ok() {
                tell.store(word == *b"held", Ordering::Release);
            }
        });
        Ok(Self { child, held })
    }

    fn is_holding(&self) -> bool {
        self.held.load(Ordering::Acquire)
    }

    fn kill(&mut self) -> Result<()> {
        ensure!(self.child.try_wait()?.is_none(), "it ended by itself");
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn kills_at_any_moment() -> Result<()> {
    prepare()?;
    let seed = seed("gate kills at any moment");
    let mut random = StdRng::seed_from_u64(seed);
    let disk = lab::virtio(1)?;
    let busy = Busy::new(&disk, seed)?;
    let mut log = KernelLog::follow()?;
    let (kills, began) = (rounds("BLKSNAP_GATE_KILLS", 10), Instant::now());
    let (mut holding, mut longest) = (0, Duration::from_secs(2));
    for number in 0..kills {
        let started = Instant::now();
        let mut holder = Holder::start(&disk)?;
        // One of two is killed on its way there.
        let until = if random.random() {
            longest.mul_f64(random.random())
        } else {
            PATIENCE
        };
        while !holder.is_holding() && started.elapsed() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        if holder.is_holding() {
            longest = longest.max(started.elapsed());
            busy.goes_on(random.random_range(0..5), PATIENCE)?;
            holding += 1;
        }
        holder.kill().with_context(|| format!("kill {number}"))?;
        busy.goes_on(2, PATIENCE)
            .with_context(|| format!("after kill {number}"))?;
        if number % 20 == 19 {
            println!("{} kills after {:?}", number + 1, began.elapsed());
        }
    }
    println!(
        "{kills} kills, {holding} of one that held writes, in {:?}",
        began.elapsed()
    );
    ensure!(holding > 0, "none held writes");
    remove_left_aliases();
    nothing_is_left(&alias_of(&disk))?;
    log.is_quiet()?;
    busy.check()
}

//! Instant: writes that are under way when devices are taken at one moment, on this kernel.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do, by a panic")]

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use blksnap_agent::cbt::{Base, CbtMap, ResetReason, Taken};
use blksnap_agent::disk::{BlockDevice, WatchdogCommand};
use blksnap_agent::engine::CancelToken;
use blksnap_agent::filter::converge::{ConvergeError, Limits};
use blksnap_agent::filter::instant::{self, Terms};
use blksnap_agent::tracker::{Granularity, TrackedDevice, Tracker, TrackerConfig};
use blksnap_agent::units::BlockSize;
use blksnap_tests::{LoopDevice, LoopOptions, Tamper, Zram, agent_binary, run};

const MIB: u64 = 1 << 20;
/// Only a hang is longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// Held by the test that has a tracker: [`Tamper`] takes the process's only one.
static TRACKER: Mutex<()> = Mutex::new(());

fn attach(tracker: &Tracker, path: &Path) -> Result<Arc<TrackedDevice>> {
    let granularity = Granularity::Fixed(BlockSize::from_bytes(65536).unwrap());
    Ok(tracker.attach(BlockDevice::open(path)?, granularity)?)
}

/// Takes one device, with nothing that holds writes; `while_armed` is called before the instant.
fn take(device: &Arc<TrackedDevice>, while_armed: impl FnOnce() -> Result<()>) -> Result<Taken> {
    let limits = Limits {
        watchdog: WatchdogCommand {
            program: agent_binary()?,
            ..WatchdogCommand::own()
        },
        ..Limits::default()
    };
    let terms = Terms {
        limits: &limits,
        hook: None,
        cancel: &CancelToken::new(),
    };
    let moments = instant::take(std::slice::from_ref(device), &terms, |close| {
        while_armed()?;
        close()?;
        Ok::<_, Failed>(())
    });
    Ok(moments.map_err(|Failed(error)| error)?.remove(0).taken)
}

#[derive(Debug)]
struct Failed(anyhow::Error);

impl From<ConvergeError> for Failed {
    fn from(error: ConvergeError) -> Self {
        Self(error.into())
    }
}

impl From<anyhow::Error> for Failed {
    fn from(error: anyhow::Error) -> Self {
        Self(error)
    }
}

fn base(taken: &Taken) -> Base {
    Base {
        generation: taken.generation,
        number: taken.number,
    }
}

/// A disk whose writes wait as long as the file system below it is frozen.
struct Stalled {
    disk: LoopDevice,
    /// There until it is thawed.
    frozen: Option<PathBuf>,
    writes: Vec<JoinHandle<()>>,
    _below: LoopDevice,
}

impl Stalled {
    fn new() -> Result<Self> {
        let mut below = LoopDevice::new(128 * MIB)?;
        below.mkfs("ext4")?;
        let place = below.mount()?;
        let file = place.join("disk");
        fs::write(&file, vec![0; 64 << 20])?;
        let disk = LoopDevice::on(&file, &LoopOptions::default())?;
        // A flush would wait for the writes before it.
        fs::write(
            format!("/sys/block/{}/queue/write_cache", disk.name()),
            "write through",
        )?;
        run("fsfreeze", [Path::new("--freeze"), &place])?;
        Ok(Self {
            disk,
            frozen: Some(place),
            writes: Vec::new(),
            _below: below,
        })
    }

    /// Begins a write that does not end before the disk goes on.
    fn write(&mut self, offset: u64) {
        let path = self.disk.path().to_owned();
        self.writes.push(thread::spawn(move || {
            let mut memory = vec![0xa5_u8; 8192];
            let start = memory.as_ptr().align_offset(4096);
            let node = OpenOptions::new()
                .write(true)
                .custom_flags(libc::O_DIRECT)
                .open(path);
            node.unwrap()
                .write_all_at(&memory[start..start + 4096], offset)
                .unwrap();
            memory.clear();
        }));
    }

    fn go_on(&mut self) -> Result<()> {
        if let Some(place) = self.frozen.take() {
            run("fsfreeze", [Path::new("--unfreeze"), &place])?;
        }
        for write in self.writes.drain(..) {
            ensure!(write.join().is_ok(), "a write failed");
        }
        Ok(())
    }
}

impl Drop for Stalled {
    fn drop(&mut self) {
        let _ = self.go_on();
    }
}

#[test]
fn a_write_that_lands_after_the_instant_is_in_the_next_difference() -> Result<()> {
    let _one = TRACKER.lock().unwrap_or_else(PoisonError::into_inner);
    let tracker = Tracker::load(&TrackerConfig::default())?;
    let other = LoopDevice::new(16 * MIB)?;
    let other = attach(&tracker, other.path())?;
    let mut stalled = Stalled::new()?;
    let device = attach(&tracker, stalled.disk.path())?;

    // One take has the turn, so that the other one waits for it and has not closed its period.
    let (has_turn, turn_is_had) = mpsc::channel();
    let (let_go, may_go) = mpsc::channel::<()>();
    let first = thread::spawn(move || {
        take(&other, || {
            has_turn.send(())?;
            Ok(may_go.recv_timeout(PATIENCE)?)
        })
    });
    turn_is_had.recv_timeout(PATIENCE)?;
    let second = thread::spawn({
        let device = Arc::clone(&device);
        move || take(&device, || Ok(()))
    });
    // Until one is written that the take knows to be under way.
    let began = Instant::now();
    let mut offset = 0;
    while device.ledger_status()?.pending == 0 && began.elapsed() < Duration::from_secs(5) {
        offset += MIB;
        ensure!(offset < 64 * MIB, "the take follows no write");
        stalled.write(offset);
        thread::sleep(Duration::from_millis(100));
    }
    let_go.send(()).context("the first take has ended")?;
    ensure!(
        first.join().is_ok_and(|taken| taken.is_ok()),
        "the first take failed"
    );
    let taken = second.join().ok().context("the second take panicked")??;
    stalled.go_on()?;

    let next = take(&device, || Ok(()))?;
    ensure!(next.reset.is_none(), "{next:?}");
    let changed: Vec<_> = device
        .with_map(CbtMap::live_map)?
        .changed_since(&base(&taken))?
        .collect();
    // The last one was under way, as the take knew, and landed after the instant.
    let found = changed
        .iter()
        .any(|extent| (extent.offset..extent.offset + extent.length).contains(&offset));
    ensure!(found, "the write to {offset} is in no difference: {changed:?}");
    Ok(())
}

#[test]
fn a_write_that_could_not_be_followed_ends_the_generation() -> Result<()> {
    let _one = TRACKER.lock().unwrap_or_else(PoisonError::into_inner);
    let tracker = Tracker::load(&TrackerConfig::default())?;
    let disk = Zram::new(64 * MIB)?;
    let device = attach(&tracker, &disk.path())?;
    let tamper = Tamper::with(std::process::id())?;
    let taken = take(&device, || Ok(()))?;
    ensure!(device.with_map(CbtMap::corrupted).is_none());
    let later = take(&device, || tamper.state(|state| state.unknown_completions += 1))?;
    // What was taken is right; what comes next may lack the write.
    ensure!(
        later.reset.is_none() && later.generation == taken.generation,
        "{later:?}"
    );
    let doubt = device.with_map(CbtMap::corrupted);
    ensure!(doubt == Some(ResetReason::NotFollowed), "{doubt:?}");
    let next = take(&device, || Ok(()))?;
    ensure!(next.reset == Some(ResetReason::NotFollowed), "{next:?}");
    ensure!(next.generation != later.generation, "{next:?}");
    Ok(())
}

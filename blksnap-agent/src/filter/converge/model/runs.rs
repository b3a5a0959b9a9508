//! Runs: converge against the model, with random writers, disks and faults.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::world::{Faults, Habit, Random, World, block};
use super::*;
use crate::disk::WatchdogCommand;
use crate::engine::{CancelToken, Copier, Method, Phase, Progress, Silent};
use crate::filter::converge::{ConvergeError, Converged, Initial, Limits, Target, run_with};

/// Runs of each test.
const RUNS: u64 = 160;

/// Runs at a time.
const THREADS: usize = 8;

/// Blocks of a disk.
const BLOCKS: usize = 40;

fn limits() -> Limits {
    Limits {
        max_rounds: 64,
        max_time: Duration::from_secs(60),
        freeze_limit: Duration::from_secs(1),
        watchdog: WatchdogCommand {
            program: "unused".into(),
            arguments: Vec::new(),
        },
    }
}

/// Makes runs, each with a seed of its own, several at a time: they mostly sleep. Gives how many were true.
fn runs(test: &str, run: impl Fn(u64) -> bool + Sync) -> u64 {
    let seed = match std::env::var("BLKSNAP_SEED") {
        Ok(text) => text.parse().expect("BLKSNAP_SEED is a number"),
        Err(_) => u64::try_from(uuid::Uuid::new_v4().as_u128() >> 80).unwrap(),
    };
    println!("{test}: BLKSNAP_SEED={seed}");
    let (next, count) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= RUNS {
                        return;
                    }
                    let is_true = run(seed.wrapping_add(number * 0x1_0001));
                    count.fetch_add(u64::from(is_true), Ordering::Relaxed);
                }
            });
        }
    });
    count.into_inner()
}

/// A world, its disks, and memories that become their copies.
struct Setting {
    world: Shared,
    disks: Vec<Arc<Disk>>,
    copies: Vec<Memory>,
    witness: Witness,
}

impl Setting {
    fn new(seed: u64, habits: &[Habit], faults: Faults) -> Self {
        let world = Shared(Arc::new(Mutex::new(World::new(seed, BLOCKS, habits, faults))));
        // Writes that nobody has in a ledger are under way from the beginning.
        world.lock().steps(60);
        let length = BLOCKS * usize::try_from(block().bytes()).unwrap();
        Self {
            disks: (0..habits.len()).map(|index| Disk::new(&world, index)).collect(),
            copies: habits.iter().map(|_| Memory::new(length, u64::MAX)).collect(),
            witness: Witness::new(&world),
            world,
        }
    }

    fn run(
        &self,
        initial: &[Initial],
        limits: &Limits,
        progress: &dyn Progress,
    ) -> Result<Vec<Converged>, ConvergeError> {
        let targets = self.disks.iter().zip(&self.copies).zip(initial);
        let targets = targets
            .map(|((disk, copy), initial)| Target {
                device: Arc::clone(disk) as _,
                initial: *initial,
                sink: Box::new(copy.clone()),
            })
            .collect();
        let freezer = Box::new(ModelFreezer::new(&self.world));
        // One thread: a seed is a run.
        let copier = Copier::new(Method::Threads(NonZeroUsize::MIN));
        let result = run_with(
            targets,
            freezer,
            copier,
            limits,
            Some(&self.witness),
            progress,
            &CancelToken::new(),
        );
        assert!(!self.world.lock().is_frozen(), "left frozen");
        result
    }

    /// The copies are the disks as the witness saw them.
    fn check_copies(&self, context: &str) {
        let seen = self.witness.seen.lock().unwrap();
        for (index, copy) in self.copies.iter().enumerate() {
            let bytes = copy.bytes.lock().unwrap();
            let wrong = bytes
                .chunks(SECTOR)
                .zip(seen[index].chunks(SECTOR))
                .position(|(a, b)| a != b);
            assert_eq!(wrong, None, "{context}: disk {index}, first wrong sector");
        }
    }

    /// The one limit of the map, see the module's page, was met at the instant.
    fn has_hidden(&self) -> bool {
        *self.witness.hidden.lock().unwrap()
    }

    /// After some more time, all that differs from the copies is among what the maps say.
    /// False if that can't be said.
    fn check_maps(&self, converged: &[Converged], context: &str) -> bool {
        if self.has_hidden() {
            return false;
        }
        let mut world = self.world.lock();
        world.steps(300);
        world.come_to_rest();
        for (index, converged) in converged.iter().enumerate() {
            world.close(index);
            let base = converged.read_map.as_ref().expect("no doubt").base();
            // Somebody else may have taken so many snapshots that the numbers ran out.
            let Ok(changed) = world.map(index).live_map().unwrap().changed_since(&base) else {
                return false;
            };
            let changed: Vec<Extent> = changed.collect();
            let copy = self.copies[index].bytes.lock().unwrap();
            let content = &world.contents()[index];
            for sector in 0..content.len() / SECTOR {
                let range = sector * SECTOR..(sector + 1) * SECTOR;
                let reported = changed
                    .iter()
                    .any(|extent| (extent.offset..extent.end()).contains(&(range.start as u64)));
                assert!(
                    reported || content[range.clone()] == copy[range],
                    "{context}: disk {index}, change of sector {sector} not reported"
                );
            }
        }
        true
    }
}

fn habits(random: &mut Random) -> Vec<Habit> {
    (0..=random.below(3))
        .map(|_| Habit {
            file_system: random.once_in(2),
            write_every: 1 + random.below(12),
            pause_every: 2 + random.below(12),
        })
        .collect()
}

#[test]
fn copies_are_the_disks_at_the_instant_and_the_maps_know_the_rest() {
    let test = "copies_are_the_disks_at_the_instant_and_the_maps_know_the_rest";
    let complete = runs(test, |seed| {
        let habits = habits(&mut Random::new(seed));
        let setting = Setting::new(seed, &habits, Faults::default());
        let initial = vec![Initial::All; habits.len()];
        let context = format!("seed {seed}, {habits:?}");
        let converged = match setting.run(&initial, &limits(), &Silent) {
            Ok(converged) => converged,
            Err(error) => {
                assert_honest(&error, &context);
                return false;
            }
        };
        setting.check_copies(&context);
        if setting.has_hidden() {
            return false;
        }
        // Again, on top of it: only what changed.
        let since: Vec<Initial> = converged
            .iter()
            .map(|one| Initial::Since(one.read_map.as_ref().unwrap().base()))
            .collect();
        setting.world.lock().steps(100);
        match setting.run(&since, &limits(), &Silent) {
            Ok(converged) => {
                setting.check_copies(&format!("{context}, second"));
                setting.check_maps(&converged, &context)
            }
            // Somebody else may have taken so many snapshots that the numbers ran out.
            Err(ConvergeError::FullNeeded(_)) => false,
            Err(error) => {
                assert_honest(&error, &context);
                false
            }
        }
    });
    assert!(
        complete > RUNS / 3,
        "only {complete} of {RUNS} runs came to their end"
    );
}

/// Errors that a world without faults may lead to.
fn assert_honest(error: &ConvergeError, context: &str) {
    assert!(
        matches!(
            error,
            ConvergeError::NotFollowed { .. }
                | ConvergeError::NeverQuiet { .. }
                | ConvergeError::NotConverging { .. }
        ),
        "{context}: {error}"
    );
}

#[test]
fn whatever_fails_thaws_and_no_wrong_copy_is_called_right() {
    let test = "whatever_fails_thaws_and_no_wrong_copy_is_called_right";
    let failed = runs(test, |seed| {
        let mut random = Random::new(seed);
        let mut habits = habits(&mut random);
        habits[0].file_system = true;
        let faults = Faults {
            freeze: random
                .once_in(3)
                .then(|| 1 + u32::try_from(random.below(2)).unwrap()),
            watchdog: random.once_in(3).then(|| random.below(2000) as u64),
            ledger_full: random.once_in(3).then(|| 5 + random.below(500)),
            alone: false,
        };
        let mut setting = Setting::new(seed, &habits, faults);
        if random.once_in(4) {
            let length = BLOCKS * usize::try_from(block().bytes()).unwrap();
            setting.copies[0] = Memory::new(length, random.below(length * 2) as u64);
        }
        let stages = [Stage::Freeze, Stage::Frozen, Stage::Thaw];
        setting.witness.fails = random.once_in(4).then(|| stages[random.below(3)]);
        let short = Limits {
            max_rounds: 5,
            freeze_limit: Duration::from_millis(300),
            ..limits()
        };
        let context = format!("seed {seed}, {habits:?}, {faults:?}");
        match setting.run(&vec![Initial::All; habits.len()], &short, &Silent) {
            Ok(converged) => {
                setting.check_copies(&context);
                setting.check_maps(&converged, &context);
                false
            }
            Err(error) => {
                assert!(!error.to_string().contains('\n'), "{context}: {error}");
                true
            }
        }
    });
    assert!(failed > RUNS / 4, "only {failed} of {RUNS} runs failed");
}

#[test]
fn a_writer_faster_than_the_copy_ends_with_an_error() {
    let habit = Habit {
        file_system: true,
        write_every: 1,
        pause_every: 0,
    };
    let setting = Setting::new(1, &[habit], Faults::default());
    let tight = Limits {
        max_rounds: 3,
        // At the rate assumed, a quarter of it is enough for less than a block.
        freeze_limit: Duration::from_micros(200),
        ..limits()
    };
    let error = setting.run(&[Initial::All], &tight, &Silent).unwrap_err();
    assert!(
        matches!(error, ConvergeError::NotConverging { rounds: 3, .. }),
        "{error}"
    );
}

#[test]
fn a_raw_writer_that_never_pauses_ends_with_an_error() {
    let habit = Habit {
        file_system: false,
        write_every: 1,
        pause_every: 0,
    };
    let setting = Setting::new(2, &[habit], Faults::default());
    let short = Limits {
        freeze_limit: Duration::from_millis(50),
        ..limits()
    };
    let error = setting.run(&[Initial::All], &short, &Silent).unwrap_err();
    assert!(
        matches!(
            error,
            ConvergeError::NeverQuiet { .. } | ConvergeError::NotFollowed { .. }
        ),
        "{error}"
    );
}

#[test]
fn progress_is_silent_while_frozen() {
    #[derive(Debug)]
    struct Listener(Shared, Mutex<Vec<Phase>>);
    impl Progress for Listener {
        fn update(&self, phase: Phase, done: u64, total: u64) {
            assert!(!self.0.lock().is_frozen());
            assert!(done <= total, "{phase:?}: {done} of {total}");
            let mut phases = self.1.lock().unwrap();
            if phases.last() != Some(&phase) {
                phases.push(phase);
            }
        }
    }
    let habit = Habit {
        file_system: true,
        write_every: 20,
        pause_every: 0,
    };
    let setting = Setting::new(3, &[habit], Faults::default());
    let listener = Listener(setting.world.clone(), Mutex::default());
    setting.run(&[Initial::All], &limits(), &listener).unwrap();
    let phases = listener.1.into_inner().unwrap();
    let expected = [
        Phase::Preparing,
        Phase::Copying,
        Phase::CatchingUp,
        Phase::Frozen,
        Phase::Done,
    ];
    let mut last_four = phases.clone();
    last_four.dedup();
    assert!(
        last_four.starts_with(&expected[..3]) && last_four.ends_with(&expected[3..]),
        "{phases:?}"
    );
}

#[test]
fn doubt_ends_the_run_or_the_generation() {
    let habit = Habit {
        file_system: true,
        write_every: 6,
        pause_every: 0,
    };
    let alone = Faults {
        alone: true,
        ..Faults::default()
    };
    let setting = Setting::new(4, &[habit], alone);
    let converged = setting.run(&[Initial::All], &limits(), &Silent).unwrap();
    let base = converged[0].read_map.as_ref().unwrap().base();
    // Doubt from before: a full copy is right, and its generation is new.
    setting.world.lock().map(0).corrupt(ResetReason::RunMissed);
    let error = setting
        .run(&[Initial::Since(base)], &limits(), &Silent)
        .unwrap_err();
    assert!(matches!(error, ConvergeError::FullNeeded(_)), "{error}");
    let converged = setting.run(&[Initial::All], &limits(), &Silent).unwrap();
    assert_eq!(converged[0].taken.reset, Some(ResetReason::RunMissed));
    assert_ne!(converged[0].taken.generation, base.generation);
    setting.check_copies("after doubt");

    // Doubt that arises during the run.
    #[derive(Debug)]
    struct Doubting(Shared);
    impl Progress for Doubting {
        fn update(&self, phase: Phase, _done: u64, _total: u64) {
            if phase == Phase::CatchingUp {
                self.0.lock().map(0).corrupt(ResetReason::MapError);
            }
        }
    }
    let error = setting
        .run(&[Initial::All], &limits(), &Doubting(setting.world.clone()))
        .unwrap_err();
    assert!(
        matches!(
            error,
            ConvergeError::Doubt {
                reason: ResetReason::MapError,
                ..
            }
        ),
        "{error}"
    );
}

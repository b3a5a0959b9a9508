//! Model: a device, its kernel, an agent that is killed, systems that stop and start, and clients that keep what they
//! were told, against the bytes of the device at every take.
//!
//! The oracle has a copy of the whole device for every take that a client may know. Whatever the agent says changed
//! since one of them has to contain every block whose bytes differ, or the answer is "full needed". Too much is
//! never wrong, and yet the runs are counted: where nothing speaks against a map, it has to go on.
//!
//! - [`world`]: what there is besides the agent: bytes, counters, the hook and its bitmaps, files.
//! - [`agent`]: the agent's steps in their order, of which any may be its last.
//!
//! What the steps do is not modelled but called: [`CbtMap`](crate::cbt::CbtMap), its saved form in a frame, and
//! [`decide`](super::decide()).

mod agent;
mod world;

use std::collections::BTreeMap;
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use self::agent::{Agent, Killed};
use self::world::{Offline, World};
use crate::cbt::{Base, FullReason, ReadMap, ResetReason};

/// Steps of all runs together.
const STEPS: usize = 120_000;

/// Steps of one run.
const RUN: usize = 600;

/// What a client has of the device.
#[derive(Clone)]
struct Copy {
    base: Base,
    sectors: Arc<Vec<u64>>,
}

/// How often what was seen.
#[derive(Debug, Default)]
struct Seen {
    steps: usize,
    answered: usize,
    full: BTreeMap<&'static str, usize>,
    resumed: usize,
    adopted: usize,
    begun: BTreeMap<&'static str, usize>,
}

struct Run {
    world: World,
    agent: Option<Agent>,
    /// What was there at each take, whether or not anybody was told of it.
    instants: BTreeMap<(u128, u8), Arc<Vec<u64>>>,
    /// What clients keep.
    copies: Vec<Copy>,
    random: StdRng,
    /// How this run differs from others: chance of each disturbance.
    rough: f64,
}

impl Run {
    fn new(seed: u64, seen: &mut Seen) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let mut run = Self {
            world: World::new(random.random_range(500..1000)),
            agent: None,
            instants: BTreeMap::new(),
            copies: Vec::new(),
            rough: [0.0, 0.2, 1.0][random.random_range(0..3)],
            random,
        };
        run.start(seen, None);
        run
    }

    fn chance(&mut self, percent: f64) -> bool {
        self.random.random_bool((percent / 100.0).min(1.0))
    }

    fn write(&mut self) {
        let capacity = self.world.capacity();
        let start = self.random.random_range(0..capacity);
        let count = self.random.random_range(1..=(capacity - start).min(40));
        self.world.write(start, count);
    }

    /// Somebody may write at any moment.
    fn writes(&mut self) {
        while self.chance(40.0) {
            self.write();
        }
    }

    fn step(&mut self, seen: &mut Seen) {
        self.writes();
        let Some(mut agent) = self.agent.take() else {
            if self.chance(30.0) {
                self.start(seen, None);
            }
            return;
        };
        let rough = self.rough;
        let end = match self.random.random_range(0..1000_u32) {
            0..250 => agent.drain(&mut self.world).map(|()| true),
            250..600 => self.take(&mut agent, false),
            600..603 => {
                let mut going = Ok(true);
                for _ in 0..self.random.random_range(200..300_u32) {
                    if matches!(going, Ok(true)) {
                        going = self.take(&mut agent, true);
                    }
                }
                going
            }
            603..700 => self.mark(&mut agent),
            700..760 => agent.save(&mut self.world).map(|()| true),
            // A sign of doubt: this write left no bit.
            760..780 if self.chance(50.0 * rough) => {
                let start = self.random.random_range(0..self.world.capacity());
                self.world.miss(start);
                Ok(true)
            }
            780..800 if self.chance(50.0 * rough) => {
                let capacity = self.random.random_range(500..1000);
                self.world.resize(capacity);
                Ok(true)
            }
            800..850 => Err(Killed),
            850..880 => {
                self.reboot(seen, agent);
                return;
            }
            _ => Ok(true),
        };
        if end.is_ok() {
            self.ask(&mut agent, seen);
            self.agent = Some(agent);
        }
    }

    /// A take; the agent may be killed within, and somebody may write.
    fn take(&mut self, agent: &mut Agent, quick: bool) -> Result<bool, Killed> {
        if !quick && self.chance(10.0) {
            self.world.kill_after = Some(self.random.random_range(0..8));
        }
        let instant = Arc::new(self.world.sectors().to_vec());
        agent.close(&mut self.world)?;
        if !quick {
            self.writes();
        }
        let base = agent.number(&mut self.world);
        // A number that was lost with an agent before was nobody's.
        self.instants.insert(
            (base.generation.uuid().as_u128(), base.number),
            Arc::clone(&instant),
        );
        agent.save(&mut self.world)?;
        self.world.kill_after = None;
        if self.copies.len() > 30 {
            let place = self.random.random_range(0..self.copies.len());
            self.copies.swap_remove(place);
        }
        self.copies.push(Copy {
            base,
            sectors: instant,
        });
        Ok(true)
    }

    /// A client asks for blocks to be copied again.
    fn mark(&mut self, agent: &mut Agent) -> Result<bool, Killed> {
        let start = self.random.random_range(0..self.world.capacity());
        let count = self
            .random
            .random_range(1..=(self.world.capacity() - start).min(40));
        if !agent.mark(&mut self.world, start, count)? {
            return Ok(true);
        }
        // Every take that has a later number than a copy's has to say so from now on.
        self.world.asked_for(start, count);
        if let Ok(read) = agent.frozen(&self.world) {
            let key = (read.generation().uuid().as_u128(), read.number());
            let mut sectors = self.instants[&key].to_vec();
            let blocks = world::blocks_of(start, count);
            for sector in sectors
                .iter_mut()
                .enumerate()
                .filter(|(at, _)| blocks.contains(&world::block_of(*at)))
            {
                *sector.1 = self.world.next();
            }
            // Who copied at this very take has them by his own asking, and is not told of them before the next.
            self.instants.insert(key, Arc::new(sectors));
        }
        Ok(true)
    }

    /// What clients are told has to be enough.
    fn ask(&mut self, agent: &mut Agent, seen: &mut Seen) {
        let frozen = agent.frozen(&self.world);
        let live = agent.live(&mut self.world);
        let now = Arc::new(self.world.sectors().to_vec());
        for _ in 0..4.min(self.copies.len()) {
            let copy = self.copies[self.random.random_range(0..self.copies.len())].clone();
            if let Ok(read) = &frozen {
                let key = (read.generation().uuid().as_u128(), read.number());
                let sectors = Arc::clone(&self.instants[&key]);
                // The copy of this take has what the take has.
                if copy.base != read.base() {
                    check(&copy, read, &sectors, seen);
                }
            }
            match &live {
                Ok(read) => check(&copy, read, &now, seen),
                Err(full) => *seen.full.entry(full.reason.code()).or_default() += 1,
            }
        }
    }

    /// The system stops, in one way or another, and starts again.
    fn reboot(&mut self, seen: &mut Seen, agent: Agent) {
        let clean = self.chance(70.0);
        let in_use = self.chance(10.0);
        let doubt = agent.doubt(&self.world).is_some();
        if clean {
            agent.seal(&mut self.world, in_use);
        }
        let offline = if self.chance(40.0) {
            Offline::any(&mut self.random)
        } else {
            Offline::Nothing
        };
        self.world.reboot(offline, &mut self.random);
        let proof = clean && !in_use && !doubt && offline == Offline::Nothing;
        self.start(seen, Some((proof, offline)));
    }

    /// The agent starts: it adopts what the kernel has, or attaches the device.
    fn start(&mut self, seen: &mut Seen, boot: Option<(bool, Offline)>) {
        if let Some(agent) = Agent::adopt(&mut self.world) {
            seen.adopted += 1;
            self.agent = Some(agent);
            return;
        }
        let early = self.chance(10.0);
        if early {
            self.write();
        }
        let between = self.chance(5.0);
        let random = &mut self.random;
        let (agent, outcome) = Agent::attach(&mut self.world, |world| {
            if between {
                world.write(random.random_range(0..world.capacity()), 1);
            }
        });
        match outcome {
            Ok(()) => seen.resumed += 1,
            Err(reason) => *seen.begun.entry(reason.code()).or_default() += 1,
        }
        if let Some((proof, offline)) = boot {
            assert_eq!(
                outcome.is_ok(),
                proof && !early && !between,
                "{outcome:?} after {offline:?}, proof {proof}, early {early}, between {between}"
            );
            if let (Err(reason), Some(want)) = (outcome, offline.reason()) {
                let other = [ResetReason::ContinuityUnproven, want];
                assert!(other.contains(&reason), "{reason:?} after {offline:?}");
            }
        }
        self.agent = Some(agent);
    }
}

/// Whether what `read` says changed since `copy` is all that did.
fn check(copy: &Copy, read: &Arc<ReadMap>, sectors: &[u64], seen: &mut Seen) {
    let changes = match read.changed_since(&copy.base) {
        Ok(changes) => changes,
        Err(full) => {
            let ended = matches!(full.reason, FullReason::GenerationEnded { .. });
            assert!(
                ended || full.reason != FullReason::NotTaken,
                "a map was handed out that was not taken"
            );
            *seen.full.entry(full.reason.code()).or_default() += 1;
            return;
        }
    };
    seen.answered += 1;
    assert_eq!(copy.sectors.len(), sectors.len(), "extents for another capacity");
    let mut told = vec![false; sectors.len()];
    for extent in changes {
        let range =
            usize::try_from(extent.offset / 512).unwrap()..usize::try_from(extent.end() / 512).unwrap();
        told[range].fill(true);
    }
    for (at, told) in told.into_iter().enumerate() {
        assert!(
            told || copy.sectors[at] == sectors[at],
            "sector {at} changed between {} and {} and was not told",
            copy.base,
            read.base()
        );
    }
}

#[test]
fn no_change_is_ever_left_out() {
    let seed: u64 =
        std::env::var("BLKSNAP_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    println!("BLKSNAP_SEED={seed}");
    let mut seen = Seen::default();
    for run in 0..(STEPS / RUN) as u64 {
        let mut run = Run::new(seed.wrapping_add(run), &mut seen);
        for _ in 0..RUN {
            run.step(&mut seen);
            seen.steps += 1;
        }
    }
    println!("{seen:?}");
    assert!(seen.steps >= 100_000);
    // Nothing of the above says much if it never comes to it.
    assert!(seen.answered > seen.steps / 2, "{seen:?}");
    assert!(seen.resumed > 300 && seen.adopted > 3000, "{seen:?}");
    for reason in [
        ResetReason::ContinuityUnproven,
        ResetReason::DeviceReplaced,
        ResetReason::Resized,
        ResetReason::StateDamaged,
        ResetReason::StateVersion,
    ] {
        assert!(seen.begun.contains_key(reason.code()), "{reason:?}: {seen:?}");
    }
    for reason in [
        ResetReason::Wrapped,
        ResetReason::RunMissed,
        ResetReason::Resized,
        ResetReason::ContinuityUnproven,
    ] {
        assert!(seen.full.contains_key(reason.code()), "{reason:?}: {seen:?}");
    }
}

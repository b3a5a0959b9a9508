//! Agent: its steps, in the order in which the tracker and the daemon do them.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::world::{Tracked, World, bits, merge};
use crate::cbt::{Base, CbtMap, FullNeeded, ReadMap, ResetReason, SavedHeader};
use crate::seal::decide::{decide, settle};
use crate::seal::fingerprint::{Fingerprint, places};
use crate::seal::record::{SealHeader, Sealed};
use crate::statefile::frame::{self, FrameError};
use crate::statefile::{Format, StateFileError};
use crate::units::{BlockSize, Sectors};

const DOCUMENT: Format = Format {
    name: "model-document",
    version: 1,
};

const SEAL: Format = Format {
    name: "model-seal",
    version: 1,
};

/// The agent is no more.
#[derive(Debug)]
pub(super) struct Killed;

#[derive(Serialize, Deserialize)]
struct Document {
    map: SavedHeader,
    /// Missed runs that are known.
    missed: u64,
}

pub(super) struct Agent {
    map: CbtMap,
    missed: u64,
}

impl Agent {
    /// What speaks against the map.
    pub(super) fn doubt(&self, world: &World) -> Option<ResetReason> {
        let tracked = world.tracked.as_ref().unwrap();
        if let Some(reason) = self.map.corrupted() {
            Some(reason)
        } else if self.map.capacity().count() != world.capacity() as u64 {
            Some(ResetReason::Resized)
        } else {
            (tracked.missed != self.missed).then_some(ResetReason::RunMissed)
        }
    }

    fn check_doubt(&mut self, world: &World) {
        if let Some(reason) = self.doubt(world) {
            self.map.corrupt(reason);
        }
    }

    /// Marks what the open bitmap has.
    pub(super) fn drain(&mut self, world: &mut World) -> Result<(), Killed> {
        let tracked = world.tracked.as_ref().unwrap();
        self.map.mark_bits(&tracked.open);
        alive(world)
    }

    /// Closes the open period of the bitmap.
    pub(super) fn close(&mut self, world: &mut World) -> Result<(), Killed> {
        self.check_doubt(world);
        let capacity = world.capacity();
        let tracked = world.tracked.as_mut().unwrap();
        let closed = std::mem::replace(&mut tracked.open, bits(capacity));
        tracked.capacity = capacity;
        tracked.closed.push(closed.clone());
        alive(world)?;
        merge(
            world.tracked.as_mut().unwrap().pending.last_mut().unwrap(),
            &closed,
        );
        alive(world)?;
        world.tracked.as_mut().unwrap().closed.pop();
        if self.map.capacity().count() == capacity as u64 {
            self.map.mark_bits(&closed);
        }
        alive(world)
    }

    /// Gives the take its number. Nobody is told before the next [`Agent::save`].
    pub(super) fn number(&mut self, world: &mut World) -> Base {
        let fresh = world.fresh();
        let taken = self
            .map
            .take(fresh, Sectors::new(world.capacity() as u64))
            .unwrap();
        if taken.reset.is_some() {
            self.missed = world.tracked.as_ref().unwrap().missed;
        }
        Base {
            generation: taken.generation,
            number: taken.number,
        }
    }

    /// Writes the document.
    pub(super) fn save(&mut self, world: &mut World) -> Result<(), Killed> {
        let tracked = world.tracked.as_mut().unwrap();
        let covered = tracked.pending.len();
        tracked.pending.push(bits(tracked.capacity));
        alive(world)?;
        world.document = Some(self.document());
        alive(world)?;
        world.tracked.as_mut().unwrap().pending.drain(..covered);
        alive(world)
    }

    fn document(&self) -> Vec<u8> {
        let saved = self.map.save();
        let document = Document {
            map: saved.header.clone(),
            missed: self.missed,
        };
        let mut bytes = Vec::new();
        frame::encode(&mut bytes, DOCUMENT, &document, &saved.sections()).unwrap();
        bytes
    }

    /// Marks on request; false if the map does not cover the device any more.
    pub(super) fn mark(&mut self, world: &mut World, start: usize, count: usize) -> Result<bool, Killed> {
        self.check_doubt(world);
        if self.map.corrupted().is_some() {
            return Ok(false);
        }
        let range = (Sectors::new(start as u64), Sectors::new(count as u64));
        if self.map.mark_both(range.0, range.1).is_err() {
            return Ok(false);
        }
        // The client is told when the document has it.
        self.save(world)?;
        Ok(true)
    }

    /// The map of the last take, as clients get it.
    pub(super) fn frozen(&mut self, world: &World) -> Result<Arc<ReadMap>, FullNeeded> {
        self.check_doubt(world);
        self.map.frozen()
    }

    /// The map as it is now.
    pub(super) fn live(&mut self, world: &mut World) -> Result<Arc<ReadMap>, FullNeeded> {
        self.map.mark_bits(&world.tracked.as_ref().unwrap().open);
        self.check_doubt(world);
        self.map.live_map()
    }

    /// Goes on with what an agent before left, if it left something.
    pub(super) fn adopt(world: &mut World) -> Option<Self> {
        world.enter();
        let document = world.document.as_ref()?;
        let (header, sections) =
            frame::decode::<Document>(&document[..], document.len() as u64, DOCUMENT).unwrap();
        let mut map = CbtMap::restore_sections(&header.map, sections).unwrap();
        let tracked = world.tracked.as_mut().unwrap();
        // A bitmap of another capacity has a capacity of the device beside it that gives it away.
        for bits in tracked
            .closed
            .iter()
            .chain(&tracked.pending)
            .chain([&tracked.open])
        {
            if tracked.capacity as u64 == map.capacity().count() {
                map.mark_bits(bits);
            } else {
                map.corrupt(ResetReason::Resized);
            }
        }
        let mut pending = bits(tracked.capacity);
        for bits in tracked.closed.drain(..).chain(tracked.pending.drain(..)) {
            merge(&mut pending, &bits);
        }
        tracked.pending.push(pending);
        let mut agent = Self {
            map,
            missed: header.missed,
        };
        agent.check_doubt(world);
        world.kill_after = None;
        agent.save(world).unwrap();
        // A record, unsealed.
        world.seal = None;
        world.record = Some(world.new_record());
        Some(agent)
    }

    /// Attaches the device, with the map of the seal where it is proven to have everything. `between` happens when the
    /// proof was given and the hook is not there yet.
    pub(super) fn attach(
        world: &mut World,
        between: impl FnOnce(&mut World),
    ) -> (Self, Result<(), ResetReason>) {
        let resumed = match &world.record {
            None => Err(ResetReason::NewAttach),
            Some(record) => decide(record, read_seal(world), world).map_err(|doubt| doubt.reason()),
        };
        let identity = world.identity_now();
        world.seal = None;
        world.record = Some(world.new_record());
        between(world);
        let capacity = world.capacity();
        world.tracked = Some(Tracked {
            capacity,
            open: bits(capacity),
            closed: Vec::new(),
            pending: vec![bits(capacity)],
            missed: 0,
        });
        let outcome = resumed.as_ref().map(|_| ()).map_err(|reason| *reason);
        let fresh = world.fresh();
        let (mut map, going_on) = match resumed {
            Ok(map) => (map, true),
            Err(reason) => {
                let size = BlockSize::from_shift(12).unwrap();
                let map = CbtMap::begin(fresh, reason, size, Sectors::new(capacity as u64)).unwrap();
                (map, false)
            }
        };
        let outcome = match settle(&identity, world) {
            Err(doubt) if going_on => {
                map.corrupt(doubt.reason());
                Err(doubt.reason())
            }
            _ => outcome,
        };
        let mut agent = Self { map, missed: 0 };
        agent.save(world).unwrap();
        (agent, outcome)
    }

    /// Ends with the system, and seals the map if nothing uses the device.
    pub(super) fn seal(mut self, world: &mut World, in_use: bool) {
        if in_use {
            return;
        }
        self.map.mark_bits(&world.tracked.as_ref().unwrap().open);
        self.check_doubt(world);
        if self.map.corrupted().is_some() {
            return;
        }
        let saved = self.map.save();
        let places = places(
            world.capacity() as u64 * 512,
            &[],
            &saved.bytes,
            saved.header.block_size,
        );
        let header = SealHeader {
            record: world.record.clone().unwrap(),
            boot: world.boot_name(),
            at: 0,
            identity: world.identity_now(),
            counters: Vec::new(),
            fingerprint: Fingerprint::of(world, &places).unwrap(),
            map: saved.header.clone(),
        };
        let mut bytes = Vec::new();
        frame::encode(&mut bytes, SEAL, &header, &saved.sections()).unwrap();
        world.seal = Some(bytes);
    }
}

fn alive(world: &mut World) -> Result<(), Killed> {
    if world.lives() { Ok(()) } else { Err(Killed) }
}

/// The seal as the state directory would give it.
fn read_seal(world: &World) -> Result<Option<Sealed>, StateFileError> {
    let Some(bytes) = &world.seal else {
        return Ok(None);
    };
    let path = "/state/seal".into();
    match frame::decode(&bytes[..], bytes.len() as u64, SEAL) {
        Ok((header, sections)) => Ok(Some(Sealed { header, sections })),
        Err(FrameError::Version(found)) => Err(StateFileError::Version {
            path,
            found,
            format: SEAL,
        }),
        Err(error) => Err(StateFileError::Damaged {
            path,
            why: error.to_string(),
        }),
    }
}

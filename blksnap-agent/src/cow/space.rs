//! Space: what a snapshot's difference storage has, and how it is given out.
//!
//! Regions are used in the order in which they were added. A *dense* region (sectors of a block device, a file that was
//! made before) gives out whole slots; its rest that is too small for a slot is skipped. A *sparse* one (a file
//! that takes no room where nothing was written) gives out slots of its address space, and only what is written to
//! them counts.
//!
//! A space that is opened again is told which slots were given out ([`Space::restore`]): what can't be true is refused,
//! since two chunks in one place would read as each other.

/// Number of a region in its space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionId(u32);

impl RegionId {
    /// The region with this number, as it was saved.
    #[must_use]
    pub const fn new(number: u32) -> Self {
        Self(number)
    }

    /// The number, to be saved.
    #[must_use]
    pub const fn number(self) -> u32 {
        self.0
    }

    /// The number, from 0 on in the order of [`Space::append`].
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// A piece of difference storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Where its address space begins.
    pub start: u64,
    /// Length of its address space.
    pub length: u64,
    /// Bytes that may be used in it.
    pub bytes: u64,
    /// What was never written takes no room.
    pub sparse: bool,
}

impl Region {
    /// The `bytes` bytes from `start` on.
    #[must_use]
    pub const fn dense(start: u64, bytes: u64) -> Self {
        Self {
            start,
            length: bytes,
            bytes,
            sparse: false,
        }
    }

    /// Room for `bytes` bytes, anywhere in `length` bytes.
    #[must_use]
    pub const fn sparse(length: u64, bytes: u64) -> Self {
        Self {
            start: 0,
            length,
            bytes,
            sparse: true,
        }
    }

    const fn end(&self) -> u64 {
        self.start.saturating_add(self.length)
    }
}

/// Where a chunk has its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slot {
    /// The region.
    pub region: RegionId,
    /// First byte in it.
    pub offset: u64,
}

/// There is no room left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the difference storage is full: {used} of {bytes} bytes are in use")]
pub struct Overflow {
    /// Bytes in use.
    pub used: u64,
    /// Bytes there are.
    pub bytes: u64,
}

/// A slot that was never given out so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the slot at {offset} in region {region} of the difference storage {why}")]
pub struct Misplaced {
    /// Number of the region.
    pub region: u32,
    /// First byte of the slot.
    pub offset: u64,
    /// What is wrong with it.
    pub why: &'static str,
}

/// A slot that was given out before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// The slot.
    pub slot: Slot,
    /// Its length: bytes of a whole chunk.
    pub chunk: u64,
    /// Bytes that are stored in it.
    pub stored: u64,
}

/// Something that whoever provides storage should know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpaceEvent {
    /// More space is wanted, in bytes; sent at the creation and whenever what is left of what was asked for falls to
    /// half of the minimum.
    LowFreeSpace {
        /// How much more.
        requested: u64,
    },
}

#[derive(Clone, Copy, Debug)]
struct RegionState {
    region: Region,
    /// First byte that was not given out.
    next: u64,
    used: u64,
}

/// All storage of one snapshot, shared by its devices.
#[derive(Clone, Debug)]
pub struct Space {
    regions: Vec<RegionState>,
    /// `diff_storage_minimum`, in bytes.
    minimum: u64,
    /// Bytes asked for by events so far.
    requested: u64,
    used: u64,
}

impl Space {
    /// A space without regions, and the event that asks for the first `minimum` bytes.
    #[must_use]
    pub fn new(minimum: u64) -> (Self, SpaceEvent) {
        let space = Self {
            regions: Vec::new(),
            minimum,
            requested: minimum,
            used: 0,
        };
        (space, SpaceEvent::LowFreeSpace { requested: minimum })
    }

    /// Adds a region, also while the snapshot is held.
    pub fn append(&mut self, region: Region) -> RegionId {
        let id = RegionId(u32::try_from(self.regions.len()).expect("fewer regions than 2^32"));
        self.regions.push(RegionState {
            region,
            next: region.start,
            used: 0,
        });
        id
    }

    /// Lets a sparse region have `bytes` bytes, more or fewer than before, but what is in use.
    pub fn resize(&mut self, id: RegionId, bytes: u64) {
        let state = &mut self.regions[id.index()];
        if state.region.sparse {
            state.region.bytes = bytes.max(state.used);
        }
    }

    /// Gives out nothing more of a region of which nothing is in use; it has no bytes any more.
    pub fn close(&mut self, id: RegionId) {
        let state = &mut self.regions[id.index()];
        debug_assert_eq!(state.used, 0, "what is in use stays");
        state.region.length = 0;
        state.region.bytes = 0;
        state.next = state.region.start;
    }

    /// Bytes in use of a region.
    #[must_use]
    pub fn used_of(&self, id: RegionId) -> u64 {
        self.regions[id.index()].used
    }

    /// A region as it is now.
    #[must_use]
    pub fn region(&self, id: RegionId) -> Region {
        self.regions[id.index()].region
    }

    /// All regions, in order.
    pub fn regions(&self) -> impl Iterator<Item = RegionId> + use<> {
        (0..u32::try_from(self.regions.len()).unwrap_or(u32::MAX)).map(RegionId)
    }

    /// Marks slots as given out, in a space from which nothing was given out yet. A sparse region may have the bytes
    /// that are in use then.
    ///
    /// # Errors
    /// A slot is in no region, not all in its region, or overlaps another one. The space is of no use then.
    pub fn restore(&mut self, taken: impl IntoIterator<Item = Taken>) -> Result<(), Misplaced> {
        let mut taken: Vec<Taken> = taken.into_iter().collect();
        taken.sort_unstable_by_key(|taken| (taken.slot.region, taken.slot.offset));
        for Taken { slot, chunk, stored } in taken {
            let wrong = |why| Misplaced {
                region: slot.region.0,
                offset: slot.offset,
                why,
            };
            let state = self
                .regions
                .get_mut(slot.region.index())
                .ok_or(wrong("is in none that was opened"))?;
            let end = slot.offset.checked_add(chunk).ok_or(wrong("has no end"))?;
            if slot.offset < state.region.start || end > state.region.end() {
                return Err(wrong("is not within the region"));
            }
            // By now this is the end of the slot before.
            if slot.offset < state.next {
                return Err(wrong("overlaps another one"));
            }
            if stored > chunk {
                return Err(wrong("has more bytes than a chunk"));
            }
            let bytes = if state.region.sparse { stored } else { chunk };
            state.next = end;
            state.used += bytes;
            state.region.bytes = state.region.bytes.max(state.used);
            self.used += bytes;
        }
        Ok(())
    }

    /// Bytes of all regions.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(|state| state.region.bytes).sum()
    }

    /// Bytes in use.
    #[must_use]
    pub const fn used(&self) -> u64 {
        self.used
    }

    /// Gives out a slot of `chunk` bytes. `first` bytes of it are written at once.
    ///
    /// # Errors
    /// No region has room.
    pub fn slot(&mut self, chunk: u64, first: u64) -> Result<Slot, Overflow> {
        let overflow = self.overflow();
        let (index, state) = self
            .regions
            .iter_mut()
            .enumerate()
            .find(|(_, state)| {
                let fits = chunk <= state.region.end().saturating_sub(state.next);
                fits && (!state.region.sparse || state.used + first <= state.region.bytes)
            })
            .ok_or(overflow)?;
        let offset = state.next;
        state.next += chunk;
        let taken = if state.region.sparse { first } else { chunk };
        state.used += taken;
        self.used += taken;
        Ok(Slot {
            region: RegionId(u32::try_from(index).expect("fewer regions than 2^32")),
            offset,
        })
    }

    /// Counts `bytes` more that are written to a slot.
    ///
    /// # Errors
    /// Its region may not take more.
    pub fn extend(&mut self, slot: Slot, bytes: u64) -> Result<(), Overflow> {
        let overflow = self.overflow();
        let state = &mut self.regions[slot.region.index()];
        if state.region.sparse {
            if state.used + bytes > state.region.bytes {
                return Err(overflow);
            }
            state.used += bytes;
            self.used += bytes;
        }
        Ok(())
    }

    /// Takes back `bytes` of a slot that were counted and not written. The slot itself stays given out.
    pub fn retract(&mut self, slot: Slot, bytes: u64) {
        let state = &mut self.regions[slot.region.index()];
        if state.region.sparse {
            let bytes = bytes.min(state.used);
            state.used -= bytes;
            self.used -= bytes;
        }
    }

    /// The event that is due after what was given out, if one is.
    pub fn event(&mut self) -> Option<SpaceEvent> {
        if self.minimum == 0 || self.requested.saturating_sub(self.used) > self.minimum / 2 {
            return None;
        }
        let mut requested = 0;
        while self.requested.saturating_sub(self.used) <= self.minimum / 2 {
            self.requested += self.minimum;
            requested += self.minimum;
        }
        Some(SpaceEvent::LowFreeSpace { requested })
    }

    fn overflow(&self) -> Overflow {
        Overflow {
            used: self.used,
            bytes: self.bytes(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Op {
        Append(u64, bool),
        Slot(u64),
        Extend(usize, u64),
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        proptest::collection::vec(
            prop_oneof![
                1 => (0_u64..40, any::<bool>()).prop_map(|(n, sparse)| Op::Append(n, sparse)),
                4 => (1_u64..5).prop_map(Op::Slot),
                2 => (any::<prop::sample::Index>(), 1_u64..3).prop_map(|(i, n)| Op::Extend(i.index(1 << 20), n)),
            ],
            0..200,
        )
    }

    proptest! {
        /// Chunks are of 4 bytes; a slot's first write has 1 to 4.
        #[test]
        fn slots_do_not_overlap_and_limits_hold(ops in ops()) {
            let (mut space, event) = Space::new(16);
            prop_assert_eq!(event, SpaceEvent::LowFreeSpace { requested: 16 });
            let mut regions: Vec<Region> = Vec::new();
            let mut slots: Vec<(Slot, u64)> = Vec::new();
            let mut asked = 16;
            for op in ops {
                match op {
                    Op::Append(bytes, sparse) => {
                        let region = match sparse {
                            true => Region::sparse(64 * bytes, bytes),
                            false => Region::dense(1000, bytes),
                        };
                        prop_assert_eq!(space.append(region).index(), regions.len());
                        regions.push(region);
                    }
                    Op::Slot(first) => {
                        let first = first.min(4);
                        match space.slot(4, first) {
                            Ok(slot) => slots.push((slot, first)),
                            Err(overflow) => {
                                prop_assert_eq!(overflow.bytes, space.bytes());
                                // Nobody had room.
                                for (index, region) in regions.iter().enumerate() {
                                    let mine = slots.iter().filter(|(slot, _)| slot.region.index() == index);
                                    if region.sparse {
                                        prop_assert!(mine.map(|(_, n)| n).sum::<u64>() + first > region.bytes);
                                    } else {
                                        prop_assert!(mine.count() as u64 * 4 + 4 > region.bytes);
                                    }
                                }
                            }
                        }
                    }
                    Op::Extend(at, more) if !slots.is_empty() => {
                        let at = at % slots.len();
                        let more = more.min(4 - slots[at].1);
                        if space.extend(slots[at].0, more).is_ok() {
                            slots[at].1 += more;
                        }
                    }
                    Op::Extend(..) => {}
                }
                // What was given out can be opened again, and goes on behind it.
                let mut again = Space::new(16).0;
                for region in &regions {
                    again.append(*region);
                }
                let taken = slots.iter().rev().map(|(slot, stored)| Taken { slot: *slot, chunk: 4, stored: *stored });
                prop_assert_eq!(again.restore(taken), Ok(()));
                prop_assert_eq!(again.used(), space.used());
                prop_assert_eq!(again.slot(4, 4), space.clone().slot(4, 4));
                let mut used = 0;
                for (index, region) in regions.iter().enumerate() {
                    let mine: Vec<_> = slots.iter().filter(|(slot, _)| slot.region.index() == index).collect();
                    let written: u64 = mine.iter().map(|(_, n)| *n).sum();
                    let taken = if region.sparse { written } else { mine.len() as u64 * 4 };
                    prop_assert!(taken <= region.bytes);
                    used += taken;
                    let mut offsets: Vec<u64> = mine.iter().map(|(slot, _)| slot.offset).collect();
                    offsets.sort_unstable();
                    prop_assert!(offsets.windows(2).all(|pair| pair[0] + 4 <= pair[1]));
                }
                prop_assert_eq!(space.used(), used);
                if let Some(SpaceEvent::LowFreeSpace { requested }) = space.event() {
                    prop_assert!(asked - used.min(asked) <= 8 && requested % 16 == 0);
                    asked += requested;
                }
                prop_assert!(asked > used + 8, "asked for {} at {}", asked, used);
                prop_assert!(space.event().is_none());
            }
        }
    }

    #[test]
    fn slots_that_were_never_given_out_so_are_refused() {
        let taken = |region, offset, chunk, stored| Taken {
            slot: Slot {
                region: RegionId(region),
                offset,
            },
            chunk,
            stored,
        };
        let why = |slots: &[Taken]| {
            let mut space = Space::new(0).0;
            space.append(Region::dense(100, 10));
            space.append(Region::sparse(100, 4));
            space
                .restore(slots.iter().copied())
                .map_err(|misplaced| misplaced.why)
        };
        assert_eq!(
            why(&[taken(0, 100, 4, 1), taken(1, 96, 4, 1), taken(0, 104, 4, 4)]),
            Ok(())
        );
        assert_eq!(why(&[taken(2, 0, 4, 1)]), Err("is in none that was opened"));
        assert_eq!(why(&[taken(0, u64::MAX, 4, 1)]), Err("has no end"));
        assert_eq!(why(&[taken(0, 96, 4, 1)]), Err("is not within the region"));
        assert_eq!(why(&[taken(0, 108, 4, 1)]), Err("is not within the region"));
        assert_eq!(
            why(&[taken(1, 0, 4, 1), taken(1, 3, 4, 1)]),
            Err("overlaps another one")
        );
        assert_eq!(
            why(&[taken(1, 0, 4, 1), taken(1, 0, 4, 1)]),
            Err("overlaps another one")
        );
        assert_eq!(why(&[taken(1, 0, 4, 5)]), Err("has more bytes than a chunk"));
    }
}

//! Pinned: the object's programs and maps on a BPF file system, and the programs of agents before.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya::programs::BtfTracePoint;
use aya::programs::links::{FdLink, PinnedLink};

use super::super::TrackerError;
use super::super::pins::{self, PinError, Pins};
use super::super::refusal::one_line;
use super::{Object, STEADY, program, recursion_misses};

/// What attaches a steady program.
pub(super) enum Link {
    Free(FdLink),
    Pinned(PinnedLink),
}

/// Pinned programs of an agent before.
pub(super) struct Earlier {
    /// None if the agent did not come to pin both with their links.
    misses: Option<Vec<OwnedFd>>,
}

impl Earlier {
    pub(super) fn find(pins: &Pins) -> Result<BTreeMap<u32, Self>, TrackerError> {
        let mut found = BTreeMap::new();
        for id in pins.program_sets()? {
            let directory = pins.programs(id);
            let whole = STEADY.iter().all(|name| link_path(&directory, name).exists());
            let open = |name: &&str| -> Result<OwnedFd, TrackerError> {
                let path = directory.join(name);
                let program = BtfTracePoint::from_pin(&path).map_err(|e| pin_error(&path, &e))?;
                let fd = program.fd().map_err(|e| pin_error(&path, &e))?;
                fd.as_fd().try_clone_to_owned().map_err(|e| pin_error(&path, &e))
            };
            let misses = if whole {
                Some(STEADY.iter().map(open).collect::<Result<_, _>>()?)
            } else {
                None
            };
            found.insert(id, Self { misses });
        }
        Ok(found)
    }

    fn misses(&self) -> Result<Option<u64>, TrackerError> {
        let Some(programs) = &self.misses else {
            return Ok(None);
        };
        let mut sum = 0;
        for fd in programs {
            sum += recursion_misses(fd.as_fd())?;
        }
        Ok(Some(sum))
    }
}

impl Object {
    /// Pins everything, unless it is pinned: before the first device is tracked.
    pub(in super::super) fn pin(&mut self) -> Result<(), TrackerError> {
        let Some(pins) = self.pins.as_ref().filter(|_| !self.pinned) else {
            return Ok(());
        };
        pins.prepare()?;
        for (name, fd) in &self.maps {
            pins::pin_map(fd.as_fd(), &pins.map(name))?;
        }
        self.pin_programs()?;
        self.pinned = true;
        Ok(())
    }

    pub(super) fn pin_programs(&mut self) -> Result<(), TrackerError> {
        let Some(pins) = &self.pins else { return Ok(()) };
        pins.prepare()?;
        let directory = pins.programs(self.id);
        pins::make(&directory)?;
        for name in STEADY {
            let path = directory.join(name);
            program(&mut self.ebpf, name)?
                .pin(&path)
                .map_err(|e| pin_error(&path, &e))?;
        }
        for (name, link) in std::mem::take(&mut self.links) {
            let Link::Free(free) = link else {
                self.links.push((name, link));
                continue;
            };
            let path = link_path(&directory, name);
            let pinned = free.pin(&path).map_err(|e| pin_error(&path, &e))?;
            self.links.push((name, Link::Pinned(pinned)));
        }
        Ok(())
    }

    /// Removes all pins once no device is tracked. The programs stay attached as long as this agent lives.
    pub(in super::super) fn unpin_if_unused(&mut self) -> Result<(), TrackerError> {
        if !self.pinned || !self.table.is_empty() {
            return Ok(());
        }
        for (name, link) in std::mem::take(&mut self.links) {
            let free = match link {
                Link::Free(free) => free,
                // The handle is kept, the file goes below.
                Link::Pinned(pinned) => pinned.into(),
            };
            self.links.push((name, Link::Free(free)));
        }
        for name in STEADY {
            // Forgets the path, which `clear` removes.
            let _ = program(&mut self.ebpf, name)?.unpin();
        }
        self.earlier.clear();
        self.pinned = false;
        if let Some(pins) = &self.pins {
            pins.clear()?;
        }
        Ok(())
    }

    /// Skipped runs of the steady programs, by the number of the first program of each set: of this agent, and of
    /// those before that still run. `None` for a set that was never whole.
    pub(in super::super) fn misses_by_set(&mut self) -> Result<BTreeMap<u32, Option<u64>>, TrackerError> {
        let mut sets = BTreeMap::from([(self.id, Some(self.run_misses()?.steady))]);
        for (id, earlier) in &self.earlier {
            sets.insert(*id, earlier.misses()?);
        }
        Ok(sets)
    }

    /// Ends the programs of agents before. All documents name this agent's programs by now.
    pub(in super::super) fn drop_earlier(&mut self) -> Result<(), TrackerError> {
        if let Some(pins) = &self.pins {
            for id in self.earlier.keys() {
                pins::remove_tree(&pins.programs(*id))?;
            }
        }
        self.earlier.clear();
        Ok(())
    }
}

fn link_path(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}_link"))
}

fn pin_error(path: &Path, error: &dyn std::error::Error) -> TrackerError {
    PinError::Object {
        action: "pin or open",
        path: path.to_owned(),
        reason: one_line(error),
    }
    .into()
}

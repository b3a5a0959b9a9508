//! Counters: whether anything was written to a device since the system started, as its disks counted it.
//!
//! `/sys/block/DISK/stat` counts from the moment the kernel made the disk. That is the start of the system only for
//! disks that were there from the start and stay: what is made at will (loop, zram, nbd, device mapper) or can be
//! unplugged and written elsewhere begins at 0 again, and proves nothing by it. A device-mapper or md device is
//! therefore judged by the disks that it stands on: [`grounds`].
//!
//! # Partitions
//! A partition counts what is written through its own node. What is written through the node of the disk is
//! counted by the disk only, which has the sum of everything: the disk's count less those of all its partitions
//! went past them, to any place. So a partition is untouched if both are 0, even where others are in use. The
//! partitions are read before the disk: a write in between then counts as one past them, never the other way
//! round.
//!
//! # In flight
//! A request counts when it is complete. The number in flight is therefore read before the others: a write that
//! was begun before is in one of them.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::units::DeviceId;

/// Most devices that may be stacked on each other.
const MAX_DEPTH: usize = 16;

/// How often the counts of a disk with partitions in use are read until they fit.
const TRIES: usize = 20;

/// The writes of a disk or partition since its counters began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WriteCounters {
    /// Writes, complete.
    pub writes: u64,
    /// Sectors written.
    pub sectors: u64,
    /// Discards, complete.
    pub discards: u64,
    /// Sectors discarded.
    pub discarded: u64,
    /// Writes and discards in flight.
    pub in_flight: u64,
}

impl WriteCounters {
    /// Nothing was written and nothing is in flight.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        *self == Self::default()
    }

    fn sum(&self, other: &Self) -> Self {
        Self {
            writes: self.writes.saturating_add(other.writes),
            sectors: self.sectors.saturating_add(other.sectors),
            discards: self.discards.saturating_add(other.discards),
            discarded: self.discarded.saturating_add(other.discarded),
            in_flight: self.in_flight.saturating_add(other.in_flight),
        }
    }

    /// What `self` has more than `other`, but for what is in flight, which comes and goes.
    fn beyond(&self, other: &Self) -> Self {
        Self {
            writes: self.writes.saturating_sub(other.writes),
            sectors: self.sectors.saturating_sub(other.sectors),
            discards: self.discards.saturating_sub(other.discards),
            discarded: self.discarded.saturating_sub(other.discarded),
            in_flight: 0,
        }
    }
}

/// The counters of a device can't say what was written since the system started.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unprovable {
    /// The device is made at will.
    #[error("{0} is made by software: its counters begin when it is made")]
    Virtual(String),
    /// The device can be taken away and come back.
    #[error("{0} can be unplugged while the system runs: its counters begin when it is plugged in")]
    Removable(String),
    /// The device does not count.
    #[error("{0} does not count what is written to it: set queue/iostats to 1 at boot")]
    NotCounting(String),
    /// An attribute can't be read.
    #[error("can't read {path}: {why}")]
    Unreadable {
        /// The attribute.
        path: PathBuf,
        /// Why.
        why: String,
    },
}

impl Unprovable {
    fn unreadable(path: &Path, why: &dyn std::fmt::Display) -> Self {
        Self::Unreadable {
            path: path.to_owned(),
            why: why.to_string(),
        }
    }
}

/// A disk or partition that counts all that is written to a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ground {
    /// The kernel's name of the disk or the partition.
    pub name: String,
    disk: PathBuf,
    partition: Option<PathBuf>,
}

/// The disks and partitions that the device with this number stands on; it is one itself if it is no stack.
///
/// # Errors
/// Their counters prove nothing.
pub fn grounds(sysfs: &Path, id: DeviceId) -> Result<Vec<Ground>, Unprovable> {
    let link = sysfs.join("dev/block").join(id.to_string());
    let mut found = Vec::new();
    descend(&resolve(&link)?, MAX_DEPTH, &mut found)?;
    Ok(found)
}

fn descend(place: &Path, depth: usize, found: &mut Vec<Ground>) -> Result<(), Unprovable> {
    let partition = place.join("partition").exists();
    let disk = if partition {
        place.parent().unwrap_or(place)
    } else {
        place
    };
    let name = name_of(disk);
    let parts: Vec<_> = disk
        .components()
        .map(|part| part.as_os_str().to_string_lossy())
        .collect();
    let below = |names: &[&str]| parts.windows(names.len()).any(|window| window == names);
    if below(&["devices", "virtual", "block"]) {
        // What a partition of a stack stands on is what the stack stands on.
        let slaves = entries(&disk.join("slaves"));
        if slaves.is_empty() || depth == 0 {
            return Err(Unprovable::Virtual(name));
        }
        for slave in slaves {
            descend(&resolve(&slave)?, depth - 1, found)?;
        }
        return Ok(());
    }
    if parts.iter().any(|part| is_usb(part)) || attribute(&disk.join("removable"))? != "0" {
        return Err(Unprovable::Removable(name));
    }
    if attribute(&disk.join("queue/iostats"))? != "1" {
        return Err(Unprovable::NotCounting(name));
    }
    let ground = Ground {
        name: name_of(place),
        disk: disk.to_owned(),
        partition: partition.then(|| place.to_owned()),
    };
    if !found.contains(&ground) {
        found.push(ground);
    }
    Ok(())
}

/// A bus of USB in the path of a device: `usb1`.
fn is_usb(part: &str) -> bool {
    part.strip_prefix("usb")
        .is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

impl Ground {
    /// What was written to it, through whatever node.
    ///
    /// # Errors
    /// The counters can't be read.
    pub fn counters(&self) -> Result<WriteCounters, Unprovable> {
        let Some(partition) = &self.partition else {
            return counters_of(&self.disk);
        };
        let mut own = counters_of(partition)?;
        let mut past = self.past_partitions()?;
        for _ in 1..TRIES {
            if past.is_zero() {
                break;
            }
            // Others are in use: what they completed between two readings looks like this, too.
            own = counters_of(partition)?;
            past = self.past_partitions()?;
        }
        Ok(own.sum(&past))
    }

    /// What was written to the disk and to none of its partitions.
    fn past_partitions(&self) -> Result<WriteCounters, Unprovable> {
        let mut parts = WriteCounters::default();
        for place in entries(&self.disk) {
            if place.join("partition").exists() {
                parts = parts.sum(&counters_of(&place)?);
            }
        }
        Ok(counters_of(&self.disk)?.beyond(&parts))
    }
}

/// The counters in `stat` and `inflight` of a disk or partition, as `Documentation/block/stat.rst` orders them.
fn counters_of(place: &Path) -> Result<WriteCounters, Unprovable> {
    let numbers = |name: &str, least: usize| {
        let path = place.join(name);
        let text = attribute(&path)?;
        let numbers: Vec<u64> = text
            .split_whitespace()
            .map_while(|word| word.parse().ok())
            .collect();
        if numbers.len() < least {
            return Err(Unprovable::unreadable(
                &path,
                &format_args!("unexpected content {text:?}"),
            ));
        }
        Ok(numbers)
    };
    // Reads, then writes; before the counts of what is complete.
    let in_flight = numbers("inflight", 2)?[1];
    // Discards are counted since Linux 4.18.
    let stat = numbers("stat", 15)?;
    Ok(WriteCounters {
        writes: stat[4],
        sectors: stat[6],
        discards: stat[11],
        discarded: stat[13],
        in_flight,
    })
}

fn resolve(link: &Path) -> Result<PathBuf, Unprovable> {
    link.canonicalize()
        .map_err(|error| Unprovable::unreadable(link, &error))
}

fn attribute(path: &Path) -> Result<String, Unprovable> {
    fs::read_to_string(path)
        .map(|text| text.trim().to_owned())
        .map_err(|error| Unprovable::unreadable(path, &error))
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<PathBuf> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    entries.sort();
    entries
}

fn name_of(place: &Path) -> String {
    place
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests;

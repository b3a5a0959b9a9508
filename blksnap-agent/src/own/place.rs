//! Place: whether a file is on a device that the agent serves, directly or not.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;

use serde::{Deserialize, Serialize};

use crate::disk::device::sysfs_directory;
use crate::disk::mounts::{Table, block_devices_of, disk_of_partition};
use crate::units::{DeviceId, SECTOR_BYTES};

/// A device that files may be on, as the kernel shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// Name under which it is served, or its node.
    pub name: String,
    /// Number of its block device.
    pub id: DeviceId,
}

/// Where a file is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum On {
    /// On none of the served devices, as far as the kernel tells.
    Elsewhere,
    /// In a file system on a served device, or on a partition of it.
    Served {
        /// Name of the device.
        device: String,
        /// Where the file system begins on it, in bytes.
        start: u64,
    },
    /// In a file system on something that stands on a served device.
    Above {
        /// Name of the device.
        device: String,
        /// What the file system is on.
        source: String,
    },
}

/// Where `file` is, among the `served` devices.
///
/// # Errors
/// `/proc` is not mounted.
pub fn find(file: &File, served: &[Candidate]) -> io::Result<On> {
    if served.is_empty() {
        return Ok(On::Elsewhere);
    }
    let table = Table::read().map_err(io::Error::other)?;
    let mount = table.of_file(file)?;
    let named = |id: DeviceId| served.iter().find(|candidate| candidate.id == id);
    // btrfs names its device twice, or several.
    let devices: BTreeSet<DeviceId> = block_devices_of(mount).into_iter().collect();
    if let (Some(id), 1) = (devices.first().copied(), devices.len())
        && let Some((candidate, start)) = directly(id, named)
    {
        return Ok(On::Served {
            device: candidate.name.clone(),
            start,
        });
    }
    let above = table.devices_beneath(mount).into_iter().find_map(named);
    Ok(above.map_or(On::Elsewhere, |candidate| On::Above {
        device: candidate.name.clone(),
        source: mount.source.display().to_string(),
    }))
}

/// The served device that is `id` or has it as a partition, and where that begins.
fn directly<'a>(
    id: DeviceId,
    named: impl Fn(DeviceId) -> Option<&'a Candidate>,
) -> Option<(&'a Candidate, u64)> {
    if let Some(candidate) = named(id) {
        return Some((candidate, 0));
    }
    let sysfs = sysfs_directory(id).ok()?;
    let candidate = named(disk_of_partition(&sysfs)?)?;
    let start: u64 = fs::read_to_string(sysfs.join("start"))
        .ok()?
        .trim()
        .parse()
        .ok()?;
    Some((candidate, start.checked_mul(SECTOR_BYTES)?))
}

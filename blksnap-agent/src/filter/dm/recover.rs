//! Recover: what an agent before this one has left.

use std::collections::BTreeMap;

use super::error::DmError;
use super::journal::{Entry, boot_id};
use super::plan::{self, View};
use super::storage::{Storage, beneath_device};
use super::table::Node;
use super::take::{Dm, DmImage, Held};
use crate::storage::DeviceExtent;
use crate::units::SnapshotId;

/// A snapshot that is not there any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// Why.
    pub why: String,
}

/// What a start found.
#[derive(Clone, Debug, Default)]
pub struct Recovered {
    /// Snapshots that go on, with their images.
    pub held: BTreeMap<SnapshotId, Vec<DmImage>>,
    /// Snapshots that were taken, and are gone.
    pub lost: Vec<Lost>,
}

impl Dm {
    /// Goes on with the snapshots that are whole, and undoes all else; with `keep` false it undoes everything.
    ///
    /// # Errors
    /// The journal can't be read, or the kernel refused something; another try does the rest.
    pub fn recover(&self, keep: bool) -> Result<Recovered, DmError> {
        let mut recovered = Recovered::default();
        let mut inner = self.lock();
        self.journal.tidy()?;
        let (entries, damaged) = self.journal.read()?;
        for error in damaged {
            tracing::warn!(%error, "an entry of the journal of device-mapper snapshots is of no use");
        }
        let view = inner.mapper.view(&[])?;
        let boot = boot_id().map_err(|source| DmError::Io {
            action: "read the boot id of",
            path: "/proc".into(),
            source,
        })?;
        let mut ended = Vec::new();
        for entry in entries {
            match go_on(&view, &entry, &boot, keep) {
                Ok((held, images)) => {
                    inner.held.insert(entry.snapshot, held);
                    recovered.held.insert(entry.snapshot, images);
                }
                Err(why) => {
                    if entry.taken {
                        recovered.lost.push(Lost {
                            snapshot: entry.snapshot,
                            why,
                        });
                    }
                    ended.push(entry);
                }
            }
        }
        if !view.is_empty() {
            self.settle_guarded(&mut inner, None)?;
        }
        for entry in &ended {
            self.forget_files(entry)?;
        }
        Ok(recovered)
    }
}

/// Why a snapshot of another boot is lost.
pub const ANOTHER_BOOT: &str = "the machine was started again since; the kernel's copies end with a boot";

/// The snapshot of an entry, if it is what it was, or why not.
fn go_on(view: &View, entry: &Entry, boot: &str, keep: bool) -> Result<(Held, Vec<DmImage>), String> {
    if !keep {
        return Err("it was released".to_owned());
    }
    if !entry.taken {
        return Err("it was never taken".to_owned());
    }
    if entry.boot != boot {
        return Err(ANOTHER_BOOT.to_owned());
    }
    let mut held = Held {
        storage: BTreeMap::new(),
        beneath: std::collections::BTreeSet::new(),
    };
    let mut images = Vec::new();
    for origin in &entry.origins {
        let number = origin.device;
        let name = &origin.name;
        if !plan::is_held(view, number) {
            return Err(format!("the table of {name} was changed by somebody else"));
        }
        if !plan::is_whole(view, entry.snapshot, number) {
            return Err(format!(
                "the kernel gave up the image of {name}: its difference storage was full, or it or the device failed"
            ));
        }
        let image = view.get(&Node::Image(entry.snapshot, number));
        let storage = view.get(&Node::Storage(entry.snapshot, number));
        let (Some(image), Some(storage)) = (image, storage) else {
            return Err(format!("devices of {name} are gone"));
        };
        let Some(device) = image.number else {
            return Err(format!("the image of {name} is gone"));
        };
        images.push(DmImage {
            origin: number,
            device,
            sectors: image.active.sectors(),
        });
        let ranges = ranges_of(storage.active.targets());
        let first = ranges.first().map(|range| range.device);
        let adopted = match (origin.files.first(), first) {
            (Some(path), Some(device)) => Storage::adopt(path, device).map_err(|error| error.to_string())?,
            _ => Storage::of_ranges(ranges.clone()),
        };
        let beneath = match origin.files.first() {
            Some(path) => super::storage::beneath_file(path).map_err(|error| error.to_string())?,
            None => ranges
                .iter()
                .flat_map(|range| beneath_device(range.device))
                .collect(),
        };
        held.beneath.extend(beneath);
        held.storage.insert(number, adopted);
    }
    Ok((held, images))
}

/// The ranges of a table of `linear` lines.
fn ranges_of(targets: &[crate::sys::dm::Target]) -> Vec<DeviceExtent> {
    let range = |target: &crate::sys::dm::Target| {
        let (device, sector) = target.parameters.split_once(' ')?;
        Some(DeviceExtent {
            device: device.parse().ok()?,
            sector: sector.trim().parse().ok()?,
            count: target.length,
        })
    };
    targets.iter().filter_map(range).collect()
}

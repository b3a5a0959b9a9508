//! Gated own: difference storage in files on the very devices whose writes are held.
//!
//! A directory of an ext4 or XFS that is mounted from a device of the snapshot gets a file that has all its blocks before
//! the take. It is never written through its file system, whose writes wait for what is stored: the agent stores by
//! the way that it reads old data, at the places that the file has on the device ([`Gate::storage`]). These units are
//! excluded from all images, and the programs let their writes pass.
//!
//! # What keeps the file in its place
//! It is immutable, so that nobody cuts, moves or removes it by mistake, and open here, so that the file system is not
//! unmounted and made anew, and its blocks stay its own though it be unlinked. Who takes the flag from it and cuts it
//! destroys the snapshot, and what the file system puts there: nobody looks at writes to these units.
//!
//! # No growth
//! Blocks that a file gets after the instant may have been another's at the instant, and making it writes to the device.
//! So all of the storage is allocated before, and storage that is full is an overflow.
//!
//! # Crash consistency
//! The file is noted before it is made, and durable before the take. Nothing of it outlives the agent: the next one
//! takes the flag from it and removes it ([`super::places`]).

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::files::{held_by_gates, next_key, pieces};
use super::gated::{GateHold, on_disk};
use super::{SnapshotError, places};
use crate::cow::SnapshotKey;
use crate::disk::mounts::Table;
use crate::disk::{BlockDevice, FileSystems};
use crate::engine::cow::{Fence, Image};
use crate::filter::gate::{Gate, Reading};
use crate::own::{Candidate, Helper, Kept, Make, On, find};
use crate::storage::{Numbered, Own, OwnFile, OwnPlace, Pool, StorageSpec};
use crate::units::{DeviceId, Extent, SnapshotId};

/// File systems on which a file stays where it is while it is immutable.
const KNOWN: [&str; 2] = ["ext4", "xfs"];

/// What part of a file must be of use.
const LEAST: u64 = 2;

/// The files of a snapshot. Let go when this is dropped.
#[derive(Debug)]
pub(super) struct OwnStorage {
    id: SnapshotId,
    root: PathBuf,
    helper: Helper,
    /// What the pool had before.
    given: Vec<StorageSpec>,
    files: Vec<InUse>,
}

/// A file in use.
#[derive(Debug)]
struct InUse {
    gate: Arc<Gate>,
    key: SnapshotKey,
    fence: Arc<Fence>,
    kept: Kept,
    /// Keeps its file system from being unmounted.
    _open: File,
}

/// The device, by its number.
#[derive(Debug)]
struct Node(DeviceId);

impl Numbered for Node {
    fn number(&self) -> Option<DeviceId> {
        Some(self.0)
    }
}

impl OwnStorage {
    /// Makes the files of the directories of a pool that are on devices of the take, and has the pool use them instead.
    /// `None` if there are no such directories.
    pub(super) fn make(hold: &GateHold) -> Result<Option<Self>, SnapshotError> {
        let given = hold.pool.specs();
        let places = given
            .iter()
            .map(|spec| Ok((spec, directory_on(spec, &hold.devices)?)))
            .collect::<Result<Vec<_>, SnapshotError>>()?;
        let Some((first, root)) = places
            .iter()
            .find_map(|(spec, place)| place.as_ref().map(|_| *spec))
            .zip(hold.place.directory.clone())
        else {
            return Ok(None);
        };
        tracing::debug!(snapshot = %hold.id, place = %first, "storage on a device of the snapshot itself");
        let mut own = Self {
            id: hold.id,
            root,
            helper: Helper::default(),
            given: given.clone(),
            files: Vec::new(),
        };
        let filled = hold.pool.withdraw().map_err(SnapshotError::from).and_then(|()| {
            places.iter().try_for_each(|(spec, place)| match place {
                Some(place) => own.add(hold, place),
                None => Ok(hold.pool.append(spec)?),
            })
        });
        match filled {
            Ok(()) => Ok(Some(own)),
            Err(error) => {
                own.undo(&hold.pool);
                Err(error)
            }
        }
    }

    /// Makes a file, and gives it to the pool.
    fn add(&mut self, hold: &GateHold, place: &Place<'_>) -> Result<(), SnapshotError> {
        let gate = hold.gate(&*hold.tracker.device_for_take(place.device.id)?)?;
        refuse_backing(&gate, &hold.devices, place)?;
        let number = uuid::Uuid::new_v4().as_fields().0;
        let path = place
            .directory
            .join(format!("blksnap-{}-{number:08x}.diff", self.id));
        let device = place.device.path.display().to_string();
        let kept = Kept {
            path: path.clone(),
            created: true,
            device: device.clone(),
        };
        places::note_own(&self.root, self.id, &kept)
            .map_err(|source| SnapshotError::state("note in", &self.root, source))?;
        let wanted = place.limit.unwrap_or(hold.options.minimum);
        let opened = || -> Result<_, SnapshotError> {
            let made = self.helper.make(Make {
                path: path.clone(),
                length: Some(wanted),
                fresh: Some(wanted),
                free: None,
            })?;
            let open = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                .open(&path)
                .map_err(|source| SnapshotError::state("open", &path, source))?;
            Ok((made, open, gate.storage()?))
        };
        let (made, open, disk) = opened().inspect_err(|_| self.remove(std::slice::from_ref(&kept)))?;
        let origin = gate.origin();
        let layout = *origin.layout();
        let block = u64::from(disk.logical_block());
        let name = format!("{} by its sectors", path.display());
        // Nothing is written to the origin but by the kernel, of which nobody here keeps account.
        let fence = Fence::new(name, disk, Arc::new(|| {}));
        let key = next_key();
        let claimed = origin.claim(key, &fence, &whole_units(&made.ranges, layout.unit_bytes()));
        let ranges = pieces(&claimed, layout.chunk_bytes(), block.max(layout.unit_bytes()));
        let in_use = InUse {
            gate,
            key,
            fence,
            kept,
            _open: open,
        };
        let disk = OwnPlace {
            disk: Arc::clone(&in_use.fence) as _,
            numbered: Arc::new(Node(place.device.id)),
        };
        self.files.push(in_use);
        let usable: u64 = ranges.iter().map(|range| range.length).sum();
        match self.helper.ranges(&path)? {
            again if again != made.ranges => return Err(SnapshotError::OwnMoved { path }),
            // It will never have more.
            _ if usable < wanted / LEAST => return Err(SnapshotError::OwnNeeded { path }),
            _ => {}
        }
        tracing::info!(snapshot = %self.id, file = %path.display(), usable, "storage on a device whose writes are held, which does not grow");
        let own = Own {
            device,
            start: 0,
            path: place.directory.clone(),
            directory: true,
            limit: place.limit,
            file: Some(OwnFile {
                path,
                bytes: made.ranges.iter().map(|range| range.length).sum(),
                ranges,
            }),
        };
        Ok(hold.pool.append_own(own, disk)?)
    }

    /// An image needs what is stored.
    pub(super) fn used_by(&self, image: &Image) {
        for file in &self.files {
            if !file.fence.used_by(image.origin(), image.key()) {
                file.fence.break_off(image.origin(), image.key());
            }
        }
    }

    /// The pool has again what it had before. No snapshot uses it.
    pub(super) fn undo(&mut self, pool: &Pool) {
        self.end();
        let again = pool
            .withdraw()
            .and_then(|()| self.given.iter().try_for_each(|spec| pool.append(spec)));
        if let Err(error) = again {
            tracing::warn!(snapshot = %self.id, %error, "a snapshot that could not be taken has lost its storage");
        }
    }

    /// Writes to the files no more, and removes them.
    fn end(&mut self) {
        let files = std::mem::take(&mut self.files);
        if files.is_empty() {
            return;
        }
        for file in &files {
            file.gate.origin().give_back(file.key);
        }
        let kept: Vec<Kept> = files.into_iter().map(|file| file.kept).collect();
        self.remove(&kept);
    }

    /// Removes files. Those that stay are noted.
    fn remove(&self, kept: &[Kept]) {
        match self.helper.release(kept, &held_by_gates(kept)) {
            Ok(left) if left.is_empty() => {
                if self.files.is_empty() {
                    places::forget_own(&self.root, self.id);
                }
            }
            Ok(left) => {
                for kept in left {
                    tracing::warn!(snapshot = %self.id, file = %kept.path.display(), "a file of a snapshot that is gone stays; the next start of the daemon tries again");
                }
            }
            Err(error) => tracing::warn!(snapshot = %self.id, %error, "files of a snapshot stay"),
        }
    }
}

impl Drop for OwnStorage {
    fn drop(&mut self) {
        self.end();
    }
}

/// A directory on a device of the take.
struct Place<'a> {
    device: &'a BlockDevice,
    directory: PathBuf,
    limit: Option<u64>,
}

/// Where storage is, if it is a directory of a file system that can have such files, mounted from one of the devices.
fn directory_on<'a>(
    spec: &StorageSpec,
    devices: &'a [BlockDevice],
) -> Result<Option<Place<'a>>, SnapshotError> {
    let StorageSpec::Directory {
        path,
        limit,
        keep: None,
    } = spec
    else {
        return Ok(None);
    };
    let failed = |source| SnapshotError::state("open", path, source);
    let directory = path.canonicalize().map_err(failed)?;
    let file = File::open(&directory).map_err(failed)?;
    let candidates: Vec<_> = devices
        .iter()
        .map(|device| Candidate {
            name: device.path.display().to_string(),
            id: device.id,
        })
        .collect();
    let On::Served { device, start: 0 } = find(&file, &candidates).map_err(failed)? else {
        return Ok(None);
    };
    let table = Table::read().map_err(on_disk)?;
    let kind = &table.of_file(&file).map_err(failed)?.fs_type;
    if !KNOWN.contains(&kind.as_str()) {
        return Ok(None);
    }
    let on = devices.iter().find(|known| known.path == Path::new(&device));
    Ok(on.map(|device| Place {
        device,
        directory,
        limit: *limit,
    }))
}

/// Refuses a loop device whose file is in a file system whose writes are held: storing would wait there.
fn refuse_backing(gate: &Gate, devices: &[BlockDevice], place: &Place<'_>) -> Result<(), SnapshotError> {
    let Reading::Backing(path) = gate.reading() else {
        return Ok(());
    };
    let file = File::open(path).map_err(|source| SnapshotError::state("open", path, source))?;
    let devices: Vec<_> = devices.iter().collect();
    let file_systems = FileSystems::on(&devices).map_err(on_disk)?;
    match file_systems.hold(&file).map_err(on_disk)? {
        None => Ok(()),
        Some(origin) => Err(SnapshotError::OnOrigin {
            place: place.directory.display().to_string(),
            origin,
        }),
    }
}

/// The whole units of ranges that are wholly in one of them: what is in the image, or is held, never shares a unit with
/// storage.
fn whole_units(ranges: &[Extent], unit: u64) -> Vec<Extent> {
    let whole = ranges.iter().filter_map(|range| {
        let offset = range.offset.next_multiple_of(unit);
        let end = range.end() / unit * unit;
        (offset < end).then(|| Extent {
            offset,
            length: end - offset,
        })
    });
    whole.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_units_that_are_wholly_in_a_range_are_storage() {
        let at = |offset, length| Extent { offset, length };
        let ranges = [
            at(4096, 16384),
            at(40960, 8192),
            at(65536, 4096),
            at(100_000, 50_000),
        ];
        assert_eq!(
            whole_units(&ranges, 8192),
            [at(8192, 8192), at(40960, 8192), at(106_496, 40960)]
        );
        assert_eq!(whole_units(&ranges[..1], 4096), [at(4096, 16384)]);
    }

    #[test]
    fn storage_that_is_no_directory_on_a_device_is_left_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let plain = StorageSpec::Directory {
            path: directory.path().to_owned(),
            limit: None,
            keep: None,
        };
        let memory = StorageSpec::Memory { limit: 1 << 20 };
        for spec in [&plain, &memory] {
            assert!(directory_on(spec, &[]).unwrap().is_none(), "{spec}");
        }
        let gone = StorageSpec::Directory {
            path: directory.path().join("gone"),
            limit: None,
            keep: None,
        };
        let error = directory_on(&gone, &[]).err().unwrap().to_string();
        assert!(error.starts_with("can't open "), "{error}");
    }
}

//! Opening: from what was said of difference storage to stores and regions.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::growth::{self, Growth};
use super::store::Store;
use super::{DirStorage, Own, StorageError, StorageSpec};
use crate::cow::Region;
use crate::disk::{BlockDevice, Disk, FileDisk, MemoryDisk};
use crate::units::{DeviceId, Extent};

/// Ranges of devices are used from and to multiples of this, so that a page of the page cache has no bytes of anybody
/// else: those would be written back as they were when the page was read.
const PAGE: u64 = 4096;

/// Longest address space of a sparse file that is tried first: 1 PiB less a block.
const LONGEST: u64 = (1 << 50) - PAGE;

/// Address space of memory, for each byte that may be used: as many as the units of a chunk.
const SPREAD: u64 = 64;

/// Memory beside the limit: a short last unit of a device takes a whole page.
const SLACK: u64 = 64 * PAGE;

/// What every place needs to know.
pub(super) struct Terms<'a> {
    /// Largest logical block of a device.
    pub(super) logical_block: u32,
    /// Devices to be snapshotted.
    pub(super) origins: &'a [BlockDevice],
    /// Number of the first region.
    pub(super) number: u32,
    /// A place that was used before is opened again.
    pub(super) again: bool,
    /// What is behind [`StorageSpec::Own`].
    pub(super) own: Option<OwnPlace>,
}

/// A served device as storage.
#[derive(Clone, Debug)]
pub struct OwnPlace {
    /// Its bytes.
    pub disk: Arc<dyn Disk>,
    /// Who knows its number.
    pub numbered: Arc<dyn Numbered>,
}

/// A served device, which may be a block device for a time only.
pub trait Numbered: std::fmt::Debug + Send + Sync {
    /// Its number now; `None` if it is no block device.
    fn number(&self) -> Option<DeviceId>;
}

/// A place, open.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) store: Arc<Store>,
    /// At least one. A region that grows has no bytes yet.
    pub(super) regions: Vec<Region>,
    pub(super) growth: Option<Growth>,
    /// The device that the regions are ranges of.
    pub(super) device: Option<DeviceId>,
    /// The served device that they are ranges of.
    pub(super) numbered: Option<Arc<dyn Numbered>>,
    /// The file that is to be removed with the snapshot.
    pub(super) kept: Option<PathBuf>,
}

impl Opened {
    pub(super) fn open(spec: &StorageSpec, terms: &Terms<'_>) -> Result<Self, StorageError> {
        match spec {
            StorageSpec::Directory { path, limit, keep } => directory(path, *limit, keep.as_deref(), terms),
            StorageSpec::File { path, limit } => file(path, *limit),
            StorageSpec::Device { path, ranges } => device(path, ranges, terms),
            StorageSpec::Own(spec) => own(spec, terms),
            StorageSpec::Memory { .. } if terms.again => Err(StorageError::Volatile(spec.to_string())),
            StorageSpec::Memory { limit } => {
                let length = limit.saturating_mul(SPREAD);
                Ok(Self {
                    store: Store::memory(MemoryDisk::new(
                        spec.to_string(),
                        length,
                        limit.saturating_add(SLACK),
                    )),
                    regions: vec![Region::sparse(length, *limit)],
                    growth: None,
                    device: None,
                    numbered: None,
                    kept: None,
                })
            }
        }
    }

    fn growing(name: String, file: File, limit: Option<u64>) -> Result<Self, StorageError> {
        let length = stretch(&file, Path::new(&name))?;
        let file = Arc::new(file);
        let growth = Growth::new(Arc::clone(&file), limit);
        let disk = FileDisk::new(name, file, length);
        disk.claim()?;
        Ok(Self {
            store: Store::file(disk),
            regions: vec![Region::sparse(length, 0)],
            growth: Some(growth),
            device: None,
            numbered: None,
            kept: None,
        })
    }
}

fn directory(
    path: &Path,
    limit: Option<u64>,
    keep: Option<&str>,
    terms: &Terms<'_>,
) -> Result<Opened, StorageError> {
    let storage = DirStorage::open(path)?;
    let Some(keep) = keep else {
        if terms.again {
            return Err(StorageError::Volatile(path.display().to_string()));
        }
        growth::check(path, &storage.create(0)?)?;
        return Opened::growing(path.display().to_string(), storage.create(0)?, limit);
    };
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if keep.is_empty() || keep.len() > 200 || !keep.chars().all(allowed) {
        return Err(StorageError::Name(keep.to_owned()));
    }
    let name = format!("blksnap-{keep}-{}.diff", terms.number);
    let kept = storage.path().join(&name);
    let file = if terms.again {
        storage.open_named(&name)?
    } else {
        growth::check(path, &storage.create(0)?)?;
        storage.create_named(&name)?
    };
    match Opened::growing(kept.display().to_string(), file, limit) {
        Ok(opened) => Ok(Opened {
            kept: Some(kept),
            ..opened
        }),
        Err(error) if terms.again => Err(error),
        Err(error) => {
            // It was made here, and is of no use; the first error counts.
            let _ = std::fs::remove_file(&kept);
            Err(error)
        }
    }
}

fn file(path: &Path, limit: Option<u64>) -> Result<Opened, StorageError> {
    let failed = |source| StorageError::Io {
        action: "open",
        path: path.to_owned(),
        source,
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(limit.is_some())
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(StorageError::Kind {
            path: path.to_owned(),
            wanted: "regular file",
        });
    }
    let name = path.display().to_string();
    if limit.is_some() {
        growth::check(path, &file)?;
        return Opened::growing(name, file, limit);
    }
    if metadata.len() < PAGE {
        return Err(StorageError::Empty {
            path: path.to_owned(),
        });
    }
    let disk = FileDisk::new(name, Arc::new(file), metadata.len());
    disk.claim()?;
    Ok(Opened {
        store: Store::file(disk),
        regions: vec![Region::dense(0, metadata.len())],
        growth: None,
        device: None,
        numbered: None,
        kept: None,
    })
}

fn device(path: &Path, ranges: &[Extent], terms: &Terms<'_>) -> Result<Opened, StorageError> {
    let device = BlockDevice::open(path)?;
    let disk = FileDisk::open(path, true)?;
    if disk.logical_block() > terms.logical_block {
        return Err(StorageError::LogicalBlock {
            path: path.to_owned(),
            block: disk.logical_block(),
            allowed: terms.logical_block,
        });
    }
    let whole = [Extent {
        offset: 0,
        length: disk.size(),
    }];
    let ranges = if ranges.is_empty() {
        if terms.origins.iter().any(|origin| is_on(&device, origin)) {
            return Err(StorageError::Origin {
                path: path.to_owned(),
            });
        }
        disk.claim()?;
        &whole
    } else {
        // Ranges are those of files, or of what nobody else uses: the device may well be in use.
        ranges
    };
    Ok(Opened {
        regions: regions(
            path,
            disk.size(),
            ranges,
            u64::from(disk.logical_block()).max(PAGE),
        )?,
        store: Store::file(disk),
        growth: None,
        device: Some(device.id),
        numbered: None,
        kept: None,
    })
}

fn own(spec: &Own, terms: &Terms<'_>) -> Result<Opened, StorageError> {
    let (Some(file), Some(place)) = (&spec.file, &terms.own) else {
        return Err(StorageError::NotServed {
            path: spec.path.clone(),
            device: spec.device.clone(),
        });
    };
    let block = u64::from(place.disk.logical_block()).max(PAGE);
    let regions = regions(&file.path, place.disk.size(), &file.ranges, block)?;
    Ok(Opened {
        store: Store::other(Arc::clone(&place.disk)),
        regions,
        growth: None,
        device: None,
        numbered: Some(Arc::clone(&place.numbered)),
        kept: None,
    })
}

/// Whether a device has sectors in common with one of those that are to be snapshotted.
fn is_on(device: &BlockDevice, origin: &BlockDevice) -> bool {
    let end = |device: &BlockDevice| device.first_sector.count() + device.capacity.count();
    origin.disk_id == device.disk_id
        && origin.first_sector.count() < end(device)
        && device.first_sector.count() < end(origin)
}

/// Ranges as regions: cut to whole blocks, in the order given, none of them on another.
fn regions(path: &Path, size: u64, ranges: &[Extent], block: u64) -> Result<Vec<Region>, StorageError> {
    let mut regions = Vec::new();
    for (index, range) in ranges.iter().enumerate() {
        let refused = |why| StorageError::Range {
            path: path.to_owned(),
            offset: range.offset,
            length: range.length,
            why,
        };
        let end = range.offset.checked_add(range.length).filter(|end| *end <= size);
        let end = end.ok_or(refused("the device ends before"))?;
        let overlaps = |other: &Extent| other.offset < end && range.offset < other.end();
        if ranges[..index].iter().any(overlaps) {
            return Err(refused("another range has some of them"));
        }
        let start = range.offset.next_multiple_of(block);
        let end = end - end % block;
        if start >= end {
            return Err(refused("they have no whole block of 4 KiB"));
        }
        regions.push(Region::dense(start, end - start));
    }
    Ok(regions)
}

/// Makes a file as long as its file system allows, all of it a hole behind what it has, and gives the length.
fn stretch(file: &File, path: &Path) -> Result<u64, StorageError> {
    /// A length that every file system has, and in which blocks would be seen.
    const PROBE: u64 = 64 << 20;
    let failed = |source| StorageError::Io {
        action: "lengthen",
        path: path.to_owned(),
        source,
    };
    let (now, blocks) = {
        let metadata = file.metadata().map_err(failed)?;
        (metadata.len(), metadata.blocks())
    };
    if now < PROBE {
        file.set_len(PROBE).map_err(failed)?;
        let grown = file.metadata().map_err(failed)?.blocks() - blocks;
        if grown * 512 >= PROBE - now {
            file.set_len(now).map_err(failed)?;
            return Err(StorageError::NotSparse {
                path: path.to_owned(),
            });
        }
    }
    let mut length = LONGEST;
    while length > now.max(PROBE) {
        match file.set_len(length) {
            Ok(()) => return Ok(length),
            Err(error)
                if error.kind() == io::ErrorKind::FileTooLarge
                    || error.raw_os_error() == Some(libc::EINVAL) =>
            {
                length = (length + PAGE) / 2 - PAGE;
            }
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(now.max(PROBE))
}

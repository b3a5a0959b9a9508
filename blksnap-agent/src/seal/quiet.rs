//! Quiet: whether nothing can write to a device any more.
//!
//! - An exclusive open succeeds. File systems, swap, device mapper, md and others open their disks exclusively, and a
//!   disk with a partition so opened counts, too. The open is kept, so that none of them begins meanwhile.
//! - No process has the device, its disk, an overlapping partition or a disk that it stands on open for writing, or
//!   mapped into its memory for writing.
//! - No loop device is made of one of them.
//!
//! What the kernel itself may hold open without telling anybody (a target of NVMe over fabrics, a file registered
//! with `io_uring` and closed) is not seen.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::disk::BlockDevice;
use crate::disk::device::device_number;
use crate::units::DeviceId;

/// Something may still write to a device.
#[derive(Debug, thiserror::Error)]
pub enum InUse {
    /// A file system or the like.
    #[error("{0} is in use: mounted, swapped to, or part of another device")]
    Exclusive(PathBuf),
    /// A process.
    #[error("process {process} ({name}) has {path} open for writing")]
    Process {
        /// Its number.
        process: u32,
        /// Its name.
        name: String,
        /// The node.
        path: PathBuf,
    },
    /// A loop device.
    #[error("{name} is made of {path}")]
    Loop {
        /// The kernel's name of the loop device.
        name: String,
        /// The node.
        path: PathBuf,
    },
    /// There is no telling.
    #[error("can't tell what uses it: {path}: {source}")]
    Io {
        /// What was looked at.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A device that nothing else uses, as long as this is held.
#[derive(Debug)]
pub struct Claim {
    _exclusive: File,
    /// The nodes of the device and its family, with their paths.
    nodes: Vec<(PathBuf, File)>,
}

impl Claim {
    /// Claims `device`.
    ///
    /// # Errors
    /// It is in use, or there is no telling.
    pub fn take(device: &BlockDevice, sysfs: &Path, proc: &Path) -> Result<Self, InUse> {
        let exclusive = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_EXCL)
            .open(&device.path)
            .map_err(|source| match source.raw_os_error() {
                Some(libc::EBUSY) => InUse::Exclusive(device.path.clone()),
                _ => InUse::Io {
                    path: device.path.clone(),
                    source,
                },
            })?;
        let family = family(device.id);
        no_process(&family, proc)?;
        no_loop(&family, sysfs)?;
        let nodes = family.iter().filter_map(|id| node_of(*id));
        let nodes = nodes
            .map(|path| match File::open(&path) {
                Ok(node) => Ok((path, node)),
                Err(source) => Err(InUse::Io { path, source }),
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            _exclusive: exclusive,
            nodes,
        })
    }

    /// Writes back what is cached of the nodes: a writer that has closed one leaves that to the last reader.
    ///
    /// # Errors
    /// A disk fails.
    pub fn sync(&self) -> Result<(), InUse> {
        self.nodes.iter().try_for_each(|(path, node)| {
            node.sync_all().map_err(|source| InUse::Io {
                path: path.clone(),
                source,
            })
        })
    }
}

/// The node of a device, named as the device.
fn node_of(id: DeviceId) -> Option<PathBuf> {
    let place = Path::new("/sys/dev/block")
        .join(id.to_string())
        .canonicalize()
        .ok()?;
    let name = place.file_name()?.to_str()?.replace('!', "/");
    let path = Path::new("/dev").join(name);
    (block_device(&path) == Some(id)).then_some(path)
}

/// The device, and all through which its blocks can be written: its disk, overlapping partitions, and what it stands
/// on.
fn family(id: DeviceId) -> BTreeSet<DeviceId> {
    let mut family = BTreeSet::new();
    let mut queue = vec![id];
    while let Some(id) = queue.pop() {
        if !family.insert(id) {
            continue;
        }
        let Ok(place) = Path::new("/sys/dev/block").join(id.to_string()).canonicalize() else {
            continue;
        };
        let parent = place.parent().filter(|_| place.join("partition").exists());
        let disk = parent.unwrap_or(&place);
        for slave in fs::read_dir(disk.join("slaves")).into_iter().flatten().flatten() {
            queue.extend(number(&slave.path(), "dev").and_then(|dev| dev.parse::<DeviceId>().ok()));
        }
        family.extend(number(disk, "dev").and_then(|dev| dev.parse::<DeviceId>().ok()));
        let own = range(&place);
        for entry in fs::read_dir(disk).into_iter().flatten().flatten() {
            let other = entry.path();
            if other.join("partition").exists() && (parent.is_none() || overlap(own, range(&other))) {
                family.extend(number(&other, "dev").and_then(|dev| dev.parse::<DeviceId>().ok()));
            }
        }
    }
    family
}

fn number(place: &Path, name: &str) -> Option<String> {
    fs::read_to_string(place.join(name))
        .ok()
        .map(|text| text.trim().to_owned())
}

/// First sector and length of a partition; `None` if it is none.
fn range(place: &Path) -> Option<(u64, u64)> {
    let read = |name| number(place, name)?.parse::<u64>().ok();
    Some((read("start")?, read("size")?))
}

/// Whether two ranges share a sector; what is not known does.
fn overlap(one: Option<(u64, u64)>, other: Option<(u64, u64)>) -> bool {
    match (one, other) {
        (Some((a, n)), Some((b, m))) => a < b.saturating_add(m) && b < a.saturating_add(n),
        _ => true,
    }
}

/// The number of a block device at a path, links followed.
fn block_device(path: &Path) -> Option<DeviceId> {
    let metadata = fs::metadata(path).ok()?;
    metadata
        .file_type()
        .is_block_device()
        .then(|| device_number(metadata.rdev()))
}

fn no_process(family: &BTreeSet<DeviceId>, proc: &Path) -> Result<(), InUse> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| InUse::Io { path, source }
    };
    for entry in fs::read_dir(proc).map_err(failed(proc))? {
        let entry = entry.map_err(failed(proc))?;
        let Some(process) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let place = entry.path();
        let found = match writable_of(&place, family) {
            Ok(found) => found,
            // It ended meanwhile.
            Err(error) if gone(&error) => continue,
            Err(error) => return Err(failed(&place)(error)),
        };
        if let Some(path) = found {
            let name = fs::read_to_string(place.join("comm")).unwrap_or_default();
            return Err(InUse::Process {
                process,
                name: name.trim().to_owned(),
                path,
            });
        }
    }
    Ok(())
}

fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// What a process can write of the family.
fn writable_of(process: &Path, family: &BTreeSet<DeviceId>) -> io::Result<Option<PathBuf>> {
    for entry in fs::read_dir(process.join("fd"))? {
        let entry = entry?;
        let path = entry.path();
        if block_device(&path).is_some_and(|id| family.contains(&id)) {
            let info = process.join("fdinfo").join(entry.file_name());
            let info = match fs::read_to_string(info) {
                Err(error) if gone(&error) => continue,
                info => info?,
            };
            if can_write(&info) {
                return Ok(Some(fs::read_link(&path).unwrap_or(path)));
            }
        }
    }
    // Of a mapping nothing but the path is told.
    for line in fs::read_to_string(process.join("maps"))?.lines() {
        let mut words = line.split_ascii_whitespace();
        let shared = words
            .nth(1)
            .is_some_and(|mode| mode.contains('w') && mode.contains('s'));
        if let Some(path) = words.nth(3).filter(|path| shared && path.starts_with('/'))
            && block_device(Path::new(path)).is_some_and(|id| family.contains(&id))
        {
            return Ok(Some(PathBuf::from(path)));
        }
    }
    Ok(None)
}

/// Whether a descriptor can write, by its `fdinfo`; one that says nothing can.
fn can_write(info: &str) -> bool {
    let flags = info
        .lines()
        .find_map(|line| line.strip_prefix("flags:"))
        .and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
    flags.is_none_or(|flags| flags & libc::O_ACCMODE != libc::O_RDONLY)
}

fn no_loop(family: &BTreeSet<DeviceId>, sysfs: &Path) -> Result<(), InUse> {
    for entry in fs::read_dir(sysfs.join("class/block"))
        .into_iter()
        .flatten()
        .flatten()
    {
        if let Some(path) = number(&entry.path(), "loop/backing_file").map(PathBuf::from)
            && block_device(&path).is_some_and(|id| family.contains(&id))
        {
            let name = entry.file_name().to_string_lossy().into_owned();
            return Err(InUse::Loop { name, path });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn descriptors_tell_whether_they_can_write() {
        for (info, can) in [
            ("pos:\t0\nflags:\t0100000\nmnt_id:\t5\n", false),
            ("pos:\t0\nflags:\t0100001\n", true),
            ("flags:\t02\n", true),
            ("flags:\t0140000\n", false),
            ("flags:\tnone\n", true),
            ("", true),
        ] {
            assert_eq!(can_write(info), can, "{info:?}");
        }
    }

    #[test]
    fn ranges_overlap_or_are_not_known() {
        for (one, other, want) in [
            (Some((0, 8)), Some((8, 8)), false),
            (Some((0, 9)), Some((8, 8)), true),
            (Some((10, 2)), Some((8, 8)), true),
            (Some((16, 2)), Some((8, 8)), false),
            (None, Some((8, 8)), true),
        ] {
            assert_eq!(overlap(one, other), want, "{one:?} {other:?}");
        }
    }

    /// A `/proc` with this process only: others may be out of reach.
    fn own_proc() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let own = std::process::id().to_string();
        symlink(Path::new("/proc").join(&own), directory.path().join(&own)).unwrap();
        fs::write(directory.path().join("uptime"), "1").unwrap();
        directory
    }

    #[test]
    fn who_can_not_be_looked_at_may_write() {
        // Nothing has this number.
        let family = BTreeSet::from([DeviceId {
            major: 4095,
            minor: 1,
        }]);
        let proc = own_proc();
        no_process(&family, proc.path()).unwrap();
        no_loop(&family, Path::new("/sys")).unwrap();
        // One that ended while it was looked for.
        symlink("/no/such/process", proc.path().join("7")).unwrap();
        no_process(&family, proc.path()).unwrap();
        let process = proc.path().join("8");
        fs::create_dir_all(process.join("fd")).unwrap();
        fs::create_dir(process.join("maps")).unwrap();
        let error = no_process(&family, proc.path()).unwrap_err();
        assert!(matches!(error, InUse::Io { .. }), "{error}");
        assert!(no_process(&family, Path::new("/no/such/proc")).is_err());
    }
}

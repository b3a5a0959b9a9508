//! File: difference storage that is made, kept where it is, and let go. Runs in a process of its own.
//!
//! The file is allocated and never written through its file system: its blocks read as zeroes there, whatever is in
//! them. It is immutable, so nobody cuts, moves or removes it; whoever can take that from it is noticed by the fence.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statvfs::fstatvfs;
use serde::{Deserialize, Serialize};

use super::place::{Candidate, On, find};
use crate::disk::extents::{self, ExtentsError};
use crate::sys::{flags, fsmap};
use crate::units::Extent;

/// The part of a file system that stays free.
const RESERVE: u64 = 20;

/// A file that is to be storage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Make {
    /// Where.
    pub path: PathBuf,
    /// Bytes that it is to have; `None` for those that it has.
    pub length: Option<u64>,
    /// It must not be there, and may be shorter where the file system has no more, down to this.
    pub fresh: Option<u64>,
    /// Free ranges of the file system are asked for, those of at least so many bytes.
    pub free: Option<u64>,
}

/// A file that is storage.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    /// It was not there before.
    pub created: bool,
    /// Where it is on the file system's device, in bytes.
    pub ranges: Vec<Extent>,
    /// What was free before, durably: of each of these ranges no file that survives a power cut from now on has
    /// bytes, unless it writes them anew.
    pub free: Vec<Extent>,
}

/// A file that was made, to be let go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Where.
    pub path: PathBuf,
    /// It is to be removed.
    pub created: bool,
    /// Name of the served device that it is on.
    pub device: String,
}

fn failed<'a>(action: &'a str, path: &'a Path) -> impl Fn(io::Error) -> String + 'a {
    move |error| format!("can't {action} {}: {error}", path.display())
}

/// Makes or opens a file, allocates it, and keeps everybody from changing it.
///
/// # Errors
/// It can't be storage; one line says why. Nothing is left of it then.
pub fn make(request: &Make) -> Result<Made, String> {
    let path = &request.path;
    let parent = path.parent().unwrap_or(Path::new("/"));
    let directory = File::open(parent).map_err(failed("open", parent))?;
    // Before the file is made: making it durable makes durable what freed these, too.
    let free = match request.free {
        Some(least) => fsmap::free_ranges(&directory, least).unwrap_or_default(),
        None => Vec::new(),
    };
    let (file, created) = open(request)?;
    let settled = settle(&file, request).and_then(|ranges| {
        directory.sync_all().map_err(failed("make durable", parent))?;
        if !free.is_empty() {
            nix::unistd::syncfs(&directory).map_err(|errno| failed("make durable", parent)(errno.into()))?;
        }
        Ok(ranges)
    });
    match settled {
        Ok(ranges) => Ok(Made {
            created,
            ranges,
            free,
        }),
        Err(error) => {
            // The first error counts.
            let _ = let_go(&file, path, created);
            Err(error)
        }
    }
}

fn open(request: &Make) -> Result<(File, bool), String> {
    let path = &request.path;
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW);
    if request.length.is_some() {
        match options.clone().create_new(true).open(path) {
            Err(error) if request.fresh.is_none() && error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return Ok((made.map_err(failed("create", path))?, true)),
        }
    }
    let file = options.open(path).map_err(failed("open", path))?;
    let metadata = file.metadata().map_err(failed("look at", path))?;
    if !metadata.is_file() {
        return Err(format!(
            "can't use {} as difference storage: it is not a regular file",
            path.display()
        ));
    }
    if metadata.nlink() == 0 || metadata.len() < 4096 && request.length.is_none() {
        return Err(format!(
            "{path} has no bytes to be used: give a limit up to which it may grow, as in {path},limit=10G",
            path = path.display()
        ));
    }
    Ok((file, false))
}

/// Allocates the file, and fixes it in its place.
fn settle(file: &File, request: &Make) -> Result<Vec<Extent>, String> {
    let path = &request.path;
    if let Some(wanted) = request.length {
        let length = allowed(file, request, wanted)?;
        fallocate(
            file.as_fd(),
            FallocateFlags::empty(),
            0,
            i64::try_from(length).unwrap_or(i64::MAX),
        )
        .map_err(|errno| failed("allocate", path)(errno.into()))?;
    }
    // What is in the page cache must not be written back later.
    file.sync_all().map_err(failed("write back", path))?;
    flags::set_immutable(file, true)
        .map_err(|errno| failed("make nobody change (FS_IMMUTABLE_FL)", path)(errno.into()))?;
    extents::of_own_file(file, path).map_err(|error: ExtentsError| error.to_string())
}

/// Bytes that the file may have.
fn allowed(file: &File, request: &Make, wanted: u64) -> Result<u64, String> {
    let path = &request.path;
    let found = fstatvfs(file).map_err(|errno| failed("ask for the space of", path)(errno.into()))?;
    let fragment = found.fragment_size();
    let available = found.blocks_available().saturating_mul(fragment);
    let reserve = found.blocks().saturating_mul(fragment) / RESERVE;
    let has = file.metadata().map_err(failed("look at", path))?.blocks() * 512;
    let most = has.saturating_add(available.saturating_sub(reserve));
    let least = request.fresh.unwrap_or(wanted);
    if most < least.min(wanted) {
        return Err(format!(
            "can't have {wanted} bytes in {}: its file system has {available} bytes left, and {reserve} are kept free; free some space, give a limit that it has room for, or another place",
            path.display()
        ));
    }
    let most = most / 4096 * 4096;
    Ok(wanted.min(most))
}

/// Where a file is now, on the device of its file system.
///
/// # Errors
/// It is no storage any more, or nobody can tell.
pub fn ranges(path: &Path) -> Result<Vec<Extent>, String> {
    let file = look(path).map_err(failed("open", path))?;
    extents::of_own_file(&file, path).map_err(|error| error.to_string())
}

/// Opens a file for looking at it and for its flags.
fn look(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
}

/// Lets files go that are on the device that they were made on. Those that can't be reached now are given back.
#[must_use]
pub fn release(files: &[Kept], served: &[Candidate]) -> Vec<Kept> {
    let reached = |kept: &Kept| -> io::Result<bool> {
        let parent = kept.path.parent().unwrap_or(Path::new("/"));
        let directory = match File::open(parent) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            opened => opened?,
        };
        // Another file system may be there now, and this one be mounted elsewhere or not at all.
        if !matches!(find(&directory, served)?, On::Served { device, .. } if device == kept.device) {
            return Ok(false);
        }
        match look(&kept.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
            opened => let_go(&opened?, &kept.path, kept.created).map(|()| true),
        }
    };
    files
        .iter()
        .filter(|kept| !reached(kept).unwrap_or(false))
        .cloned()
        .collect()
}

fn let_go(file: &File, path: &Path, created: bool) -> io::Result<()> {
    match flags::set_immutable(file, false) {
        // Then it was never set.
        Ok(()) | Err(nix::errno::Errno::ENOTTY | nix::errno::Errno::EOPNOTSUPP) => {}
        Err(errno) => return Err(errno.into()),
    }
    if created {
        fs::remove_file(path)?;
    }
    Ok(())
}

/// Takes back a file that was made for somebody who is gone.
pub(super) fn undo(path: &Path, created: bool) {
    if let Ok(file) = look(path) {
        let _ = let_go(&file, path, created);
    }
}

//! Growth: how far a sparse file may grow.
//!
//! A file system that runs full hurts everybody who uses it, and may be the one that is snapshotted. So a twentieth of
//! it is left free, whatever limit was given: the snapshot overflows before.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use nix::sys::statvfs::fstatvfs;

use super::StorageError;

/// The part of a file system that stays free.
const RESERVE: u64 = 20;

/// A file that grows.
#[derive(Clone, Debug)]
pub(super) struct Growth {
    file: Arc<File>,
    limit: Option<u64>,
}

impl Growth {
    pub(super) const fn new(file: Arc<File>, limit: Option<u64>) -> Self {
        Self { file, limit }
    }

    /// Most bytes, as far as somebody said.
    pub(super) const fn limit(&self) -> Option<u64> {
        self.limit
    }

    /// Bytes that a region may have of which `used` are in use: those and what is left. `wanted` of them are asked for.
    pub(super) fn allowed(&self, used: u64, wanted: u64) -> u64 {
        let left = match space(&self.file) {
            Ok(space) => space.left(),
            // Not known: the limit has to do, and the write says when there is none.
            Err(_) => u64::MAX,
        };
        wanted
            .min(used.saturating_add(left))
            .min(self.limit.unwrap_or(u64::MAX))
    }
}

/// Bytes of a file system.
#[derive(Clone, Copy, Debug)]
struct FileSystem {
    available: u64,
    reserve: u64,
}

impl FileSystem {
    const fn left(&self) -> u64 {
        self.available.saturating_sub(self.reserve)
    }
}

fn space(file: &File) -> io::Result<FileSystem> {
    let found = fstatvfs(file)?;
    let fragment = found.fragment_size();
    // btrfs and others without a fixed size tell 0 blocks at times: then nothing is kept free.
    Ok(FileSystem {
        available: found.blocks_available().saturating_mul(fragment),
        reserve: found.blocks().saturating_mul(fragment) / RESERVE,
    })
}

/// Refuses a file system that has nothing left.
pub(super) fn check(path: &Path, file: &File) -> Result<(), StorageError> {
    match space(file) {
        Ok(space) if space.left() == 0 => Err(StorageError::Full {
            path: path.to_owned(),
            available: space.available,
            reserve: space.reserve,
        }),
        _ => Ok(()),
    }
}

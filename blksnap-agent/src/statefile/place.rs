//! Place: puts a file where another one was, so that a crash leaves the one or the other.
//!
//! The steps go through [`Files`], the few operations of a file system that they need, so that a test can cut them
//! short at any of them and look at what a file system may have kept (`crash`).

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::StateFileError;

/// What a writer of state files does to a file system.
pub(super) trait Files {
    /// A file open for writing.
    type File: Write;

    /// `unlink(2)`.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// `open(2)` with `O_CREAT | O_EXCL`, for its owner only.
    fn create(&self, path: &Path) -> io::Result<Self::File>;
    /// `fsync(2)`.
    fn sync(&self, file: &Self::File) -> io::Result<()>;
    /// `rename(2)`.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// `fsync(2)` of a directory.
    fn sync_directory(&self, directory: &Path) -> io::Result<()>;
}

/// The file system itself.
pub(super) struct System;

impl Files for System {
    type File = File;

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn create(&self, path: &Path) -> io::Result<File> {
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        file.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn sync_directory(&self, directory: &Path) -> io::Result<()> {
        File::open(directory)?.sync_all()
    }
}

/// A file system that makes nothing durable before its time.
pub(super) struct Unsynced<F>(pub(super) F);

impl<F: Files> Files for Unsynced<F> {
    type File = F::File;

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.0.remove(path)
    }

    fn create(&self, path: &Path) -> io::Result<F::File> {
        self.0.create(path)
    }

    fn sync(&self, _file: &F::File) -> io::Result<()> {
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.rename(from, to)
    }

    fn sync_directory(&self, _directory: &Path) -> io::Result<()> {
        Ok(())
    }
}

/// Makes what `content` writes the file at `path`.
pub(super) fn place<F: Files>(
    files: &F,
    path: &Path,
    content: impl FnOnce(&mut F::File) -> io::Result<()>,
) -> Result<(), StateFileError> {
    let temporary = temporary_of(path);
    let placed = replace(files, &temporary, path, content);
    if placed.is_err() {
        // It may never have come to exist; the error to tell is the first one.
        let _ = files.remove(&temporary);
    }
    placed
}

fn replace<F: Files>(
    files: &F,
    temporary: &Path,
    path: &Path,
    content: impl FnOnce(&mut F::File) -> io::Result<()>,
) -> Result<(), StateFileError> {
    let failed = StateFileError::io;
    match files.remove(temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed("remove", temporary)(error));
        }
        _ => {}
    }
    let mut file = files.create(temporary).map_err(failed("create", temporary))?;
    content(&mut file).map_err(failed("write", temporary))?;
    // The content first: a name that leads to a file not written yet would be worse than the old name.
    files.sync(&file).map_err(failed("sync", temporary))?;
    files
        .rename(temporary, path)
        .map_err(failed("rename a new version to", path))?;
    sync_parent(files, path)
}

/// Makes a change of names in the directory of `path` permanent.
pub(super) fn sync_parent<F: Files>(files: &F, path: &Path) -> Result<(), StateFileError> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    files
        .sync_directory(directory)
        .map_err(StateFileError::io("sync", directory))
}

/// Removes the file at `path`, if there is one, for good.
pub(super) fn remove<F: Files>(files: &F, path: &Path) -> Result<(), StateFileError> {
    match files.remove(path) {
        Ok(()) => sync_parent(files, path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(StateFileError::io("remove", path)(error)),
    }
}

/// The name of the temporary file: fixed, so that one left by a crash is replaced by the next writer.
pub(super) fn temporary_of(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".new");
    path.with_file_name(name)
}

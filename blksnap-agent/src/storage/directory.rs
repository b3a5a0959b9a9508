//! Directory storage: unnamed files in a directory.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use uuid::Uuid;

/// The difference storage can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// There is no such directory.
    #[error("can't use {path} as difference storage: {source}; create the directory, or give another one")]
    Directory {
        /// The path as given.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is something else.
    #[error("can't use {path} as difference storage: it is not a directory")]
    NotDirectory {
        /// The path as given.
        path: PathBuf,
    },
    /// No file can be made there.
    #[error("can't make a file of {length} bytes in {path}: {source}{}", remedy(source))]
    Create {
        /// The directory.
        path: PathBuf,
        /// Length of the file.
        length: u64,
        /// Why.
        source: io::Error,
    },
}

fn remedy(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free some space there, or choose another place"
        }
        io::ErrorKind::FileTooLarge => "; its file system has no files of this length, choose another place",
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
            "; choose a place that can be written"
        }
        _ => "",
    }
}

/// A directory that holds images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirStorage {
    path: PathBuf,
}

impl DirStorage {
    /// The storage in `path`, in which a file can be made.
    ///
    /// # Errors
    /// It is no directory, or can't be written.
    pub fn open(path: &Path) -> Result<Self, StorageError> {
        let failed = |source| StorageError::Directory {
            path: path.to_owned(),
            source,
        };
        let resolved = path.canonicalize().map_err(failed)?;
        if !fs::metadata(&resolved).map_err(failed)?.is_dir() {
            return Err(StorageError::NotDirectory {
                path: path.to_owned(),
            });
        }
        let storage = Self { path: resolved };
        storage.create(0)?;
        Ok(storage)
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A new file of `length` bytes, all of it a hole. It is gone when it is closed.
    ///
    /// # Errors
    /// No space, no permission, or too long for the file system.
    pub fn create(&self, length: u64) -> Result<File, StorageError> {
        self.unnamed()
            .and_then(|file| file.set_len(length).map(|()| file))
            .map_err(|source| StorageError::Create {
                path: self.path.clone(),
                length,
                source,
            })
    }

    fn unnamed(&self) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        // O_EXCL: it can't be given a name later.
        match options
            .clone()
            .custom_flags(libc::O_TMPFILE | libc::O_EXCL)
            .open(&self.path)
        {
            Ok(file) => Ok(file),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {
                // A file system without unnamed files (NFS): make one and take its name away.
                let name = self.path.join(format!(".blksnap-{}", Uuid::new_v4()));
                let file = options.create_new(true).open(&name)?;
                fs::remove_file(&name)?;
                Ok(file)
            }
            Err(error) => Err(error),
        }
    }
}

/// Bytes that a file occupies.
///
/// # Errors
/// The file system fails.
pub fn stored_bytes(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.blocks() * 512)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn files_have_no_name_and_no_blocks() {
        let directory = tempfile::tempdir().unwrap();
        let storage = DirStorage::open(directory.path()).unwrap();
        let file = storage.create(1 << 30).unwrap();
        assert_eq!(
            (file.metadata().unwrap().len(), stored_bytes(&file).unwrap()),
            (1 << 30, 0)
        );
        file.write_all_at(&[1; 4096], 1 << 20).unwrap();
        file.sync_all().unwrap();
        assert_eq!(stored_bytes(&file).unwrap(), 4096);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_no_directory_is_refused_with_the_remedy() {
        let text = |path: &str| DirStorage::open(Path::new(path)).unwrap_err().to_string();
        assert!(text("/no/such").contains("create the directory, or give another one"));
        assert_eq!(
            text("/dev/null"),
            "can't use /dev/null as difference storage: it is not a directory"
        );
        assert!(text("/proc").starts_with("can't make a file of 0 bytes in /proc: "));
    }
}

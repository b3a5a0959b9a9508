//! Directory storage: files in a directory, unnamed or named to be found again.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::StorageError;

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

    /// A new file with this name, which must not be there yet. It stays when it is closed.
    ///
    /// # Errors
    /// As for [`DirStorage::create`]; or it is there.
    pub fn create_named(&self, name: &str) -> Result<File, StorageError> {
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| StorageError::Io { action, path, source }
        };
        let path = self.path.join(name);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .mode(0o600)
            .create_new(true)
            .open(&path)
            .map_err(failed("create", &path))?;
        // A power cut must not take the name away from a file that is in use.
        File::open(&self.path)
            .and_then(|directory| directory.sync_all())
            .map_err(failed("make durable", &self.path))?;
        Ok(file)
    }

    /// The file with this name, as [`DirStorage::create_named`] made it.
    ///
    /// # Errors
    /// It is not there, or is no regular file.
    pub fn open_named(&self, name: &str) -> Result<File, StorageError> {
        let path = self.path.join(name);
        let opened = |source| StorageError::Io {
            action: "open",
            path: path.clone(),
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(&path)
            .map_err(opened)?;
        match file.metadata().map_err(opened)?.is_file() {
            true => Ok(file),
            false => Err(StorageError::Kind {
                path,
                wanted: "regular file",
            }),
        }
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

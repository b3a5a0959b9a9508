//! Directory: where the sockets are, in which nobody but its owner can replace them.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

/// A directory can't have the sockets.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// The directory can't be made or looked at.
    #[error("make the directory {}: {source}; choose another one with --runtime-dir", path.display())]
    Make {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others could replace the sockets.
    #[error(
        "use the directory {}: others than its owner can write to it; chmod go-w, or choose another one with --runtime-dir",
        .0.display()
    )]
    Writable(PathBuf),
}

/// The directory of the sockets. One that this made goes with it, when it is empty again.
#[derive(Debug)]
pub struct RuntimeDirectory {
    made: Option<PathBuf>,
}

impl RuntimeDirectory {
    /// Makes the directory with mode 0755 where it is missing, and refuses one in which others could replace a
    /// socket.
    ///
    /// # Errors
    /// See [`DirectoryError`].
    pub fn prepare(path: &Path) -> Result<Self, DirectoryError> {
        let wrong = |source| DirectoryError::Make {
            path: path.to_owned(),
            source,
        };
        let made = !path.exists();
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(path)
            .map_err(wrong)?;
        let metadata = fs::metadata(path).map_err(wrong)?;
        if metadata.mode() & 0o022 != 0 || metadata.uid() != nix::unistd::geteuid().as_raw() {
            return Err(DirectoryError::Writable(path.to_owned()));
        }
        Ok(Self {
            made: made.then(|| path.to_owned()),
        })
    }
}

impl Drop for RuntimeDirectory {
    fn drop(&mut self) {
        if let Some(path) = &self.made {
            // Somebody else's files keep it.
            let _ = fs::remove_dir(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_directory_that_others_write_to_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run");
        drop(RuntimeDirectory::prepare(&path).unwrap());
        assert!(!path.exists());
        fs::create_dir(&path).unwrap();
        drop(RuntimeDirectory::prepare(&path).unwrap());
        assert!(path.exists());
        fs::set_permissions(&path, Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(
            RuntimeDirectory::prepare(&path),
            Err(DirectoryError::Writable(_))
        ));
        let file = directory.path().join("file");
        fs::write(&file, b"").unwrap();
        assert!(matches!(
            RuntimeDirectory::prepare(&file),
            Err(DirectoryError::Make { .. })
        ));
    }
}

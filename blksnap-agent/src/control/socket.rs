//! Socket: a unix socket that only its owner can connect to, from the first moment on.
//!
//! `bind` makes the node with the mode that the umask leaves, and a `chmod` after it is late. So the socket is
//! bound in a new directory that nobody else can enter, gets its mode there, and is renamed to its place.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// A socket or its directory can't be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The directory can't be made or looked at.
    #[error("make the directory {}: {source}: choose another one with --runtime-dir", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others could replace the socket.
    #[error("use the directory {}: others than its owner can write to it: chmod go-w, or choose another one with --runtime-dir", path.display())]
    Writable {
        /// The directory.
        path: PathBuf,
    },
    /// Something that is no socket has the name.
    #[error("make the socket {}: a file that is no socket has this name: remove it, or choose another --runtime-dir", path.display())]
    NotSocket {
        /// The socket.
        path: PathBuf,
    },
    /// A process listens there.
    #[error("make the socket {}: another process listens on it: stop it, or choose another --runtime-dir", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// The socket can't be made.
    #[error("make the socket {}: {source}", path.display())]
    Bind {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Makes the directory of the sockets with mode 0755 where it is missing, and refuses one in which others could
/// replace them.
///
/// # Errors
/// See [`SocketError`].
pub fn prepare_directory(path: &Path) -> Result<(), SocketError> {
    let wrong = |source| SocketError::Directory {
        path: path.to_owned(),
        source,
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .map_err(wrong)?;
    let metadata = fs::metadata(path).map_err(wrong)?;
    if metadata.mode() & 0o022 != 0 || metadata.uid() != nix::unistd::geteuid().as_raw() {
        return Err(SocketError::Writable {
            path: path.to_owned(),
        });
    }
    Ok(())
}

/// Listens on a new socket at `path` with mode 0600. A socket left behind by a process that is gone is replaced.
///
/// # Errors
/// See [`SocketError`].
pub fn listen(path: &Path) -> Result<UnixListener, SocketError> {
    let wrong = |source| SocketError::Bind {
        path: path.to_owned(),
        source,
    };
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SocketError::NotSocket {
                path: path.to_owned(),
            });
        }
        Ok(_) if UnixStream::connect(path).is_ok() => {
            return Err(SocketError::InUse {
                path: path.to_owned(),
            });
        }
        _ => {}
    }
    let name = path
        .file_name()
        .ok_or_else(|| wrong(io::ErrorKind::InvalidFilename.into()))?;
    let mut private = path.as_os_str().to_owned();
    private.push(format!(".{}", std::process::id()));
    let private = PathBuf::from(private);
    // A process that died here may have had the same id.
    let _ = fs::remove_dir_all(&private);
    DirBuilder::new().mode(0o700).create(&private).map_err(wrong)?;
    let made = (|| {
        let inner = private.join(name);
        let listener = UnixListener::bind(&inner)?;
        fs::set_permissions(&inner, Permissions::from_mode(0o600))?;
        fs::rename(&inner, path)?;
        Ok(listener)
    })();
    let _ = fs::remove_dir_all(&private);
    made.map_err(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_private_and_replaces_only_a_dead_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let first = listen(&path).unwrap();
        assert_eq!(fs::symlink_metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(matches!(listen(&path), Err(SocketError::InUse { .. })));
        drop(first);
        let second = listen(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(second);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        fs::remove_file(&path).unwrap();
        fs::write(&path, b"").unwrap();
        assert!(matches!(listen(&path), Err(SocketError::NotSocket { .. })));
    }

    #[test]
    fn a_directory_that_others_write_to_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run");
        prepare_directory(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(
            prepare_directory(&path),
            Err(SocketError::Writable { .. })
        ));
    }
}

//! Socket: the unix socket of the server, made for its owner alone and removed at the end.
//!
//! The mode 0600 is set on the socket before it gets its name: Linux gives the name the mode of the socket's inode
//! (`unix_bind_bsd` in net/unix/af_unix.c), so there is no moment at which others could connect, and the umask of
//! the process stays alone.
//!
//! A name left by a server that died is replaced, one where a server answers is not. Two servers that start at once
//! can't take each other's name: the directory is locked (flock(2)) between looking and binding.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::sys::stat::{Mode, fchmod};

/// The server's socket can't be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A server answers there.
    #[error("cannot listen on {}: another server answers there, stop it or choose another path", .0.display())]
    InUse(PathBuf),
    /// Something that is no socket has the name.
    #[error("cannot listen on {}: it exists and is no socket, choose another path", .0.display())]
    NoSocket(PathBuf),
    /// The path does not fit a socket address.
    #[error("cannot listen on {}: the path is too long for a socket (107 bytes), choose a shorter one", .0.display())]
    TooLong(PathBuf),
    /// A system call failed.
    #[error("cannot listen on {}: {action}", .path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// The name of a socket that this process made; dropping it removes the name, if it still is that socket's.
#[derive(Debug)]
pub struct SocketName {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketName {
    /// The path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketName {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| metadata.dev() == self.device && metadata.ino() == self.inode);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the nbd socket could not be removed");
        }
    }
}

/// Makes the socket `path` with mode 0600 and listens on it.
///
/// # Errors
/// A server answers there, something else has the name, or the system refuses.
pub fn listen_on(path: &Path) -> Result<(UnixListener, SocketName), SocketError> {
    let failed = |action: &'static str| {
        move |source: io::Error| SocketError::Io {
            path: path.to_owned(),
            action,
            source,
        }
    };
    let address = UnixAddr::new(path).map_err(|errno| match errno {
        Errno::ENAMETOOLONG => SocketError::TooLong(path.to_owned()),
        errno => failed("use the path")(errno.into()),
    })?;
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let directory = File::open(directory).map_err(failed("open its directory"))?;
    let _lock = Flock::lock(directory, FlockArg::LockExclusive)
        .map_err(|(_, errno)| failed("lock its directory")(errno.into()))?;

    let handle = match bound(&address) {
        Err(Errno::EADDRINUSE) => {
            remove_stale(path)?;
            bound(&address)
        }
        other => other,
    }
    .map_err(|errno| failed("bind")(errno.into()))?;
    let metadata = fs::symlink_metadata(path).map_err(failed("look at it"))?;
    let name = SocketName {
        path: path.to_owned(),
        device: metadata.dev(),
        inode: metadata.ino(),
    };
    listen(&handle, Backlog::MAXCONN).map_err(|errno| failed("listen")(errno.into()))?;
    Ok((UnixListener::from(handle), name))
}

/// A socket bound to `address` with mode 0600.
fn bound(address: &UnixAddr) -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let handle = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    fchmod(&handle, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(handle.as_raw_fd(), address)?;
    Ok(handle)
}

/// Removes a socket on which nobody listens.
fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let failed = |action: &'static str| {
        move |source: io::Error| SocketError::Io {
            path: path.to_owned(),
            action,
            source,
        }
    };
    let metadata = fs::symlink_metadata(path).map_err(failed("look at it"))?;
    if !metadata.file_type().is_socket() {
        return Err(SocketError::NoSocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed("remove the socket of a server that is gone"))
        }
        // A full backlog (EAGAIN) or a forbidden connect also means that somebody is there.
        _ => Err(SocketError::InUse(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_socket_is_private_and_goes_with_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nbd.sock");
        let (listener, name) = listen_on(&path).unwrap();
        let mode = fs::symlink_metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        drop((listener, name));
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nbd.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let (_listener, name) = listen_on(&path).unwrap();
        let error = listen_on(&path).unwrap_err();
        assert!(matches!(error, SocketError::InUse(_)), "{error}");
        assert!(path.exists());
        drop(name);
        assert!(!path.exists());
    }

    #[test]
    fn a_name_that_others_took_over_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nbd.sock");
        let (_listener, name) = listen_on(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "other").unwrap();
        drop(name);
        assert!(path.exists());
    }

    #[test]
    fn other_files_and_wrong_paths_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(listen_on(&path), Err(SocketError::NoSocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        assert!(matches!(
            listen_on(&directory.path().join("x".repeat(200))),
            Err(SocketError::TooLong(_))
        ));
        assert!(matches!(
            listen_on(&directory.path().join("none/nbd.sock")),
            Err(SocketError::Io { .. })
        ));
    }
}

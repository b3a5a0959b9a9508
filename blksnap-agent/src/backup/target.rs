//! Target: the file that a backup is written to.
//!
//! It has to be a regular file that is not on the device being backed up: writing it would change the device, and
//! wait for ever while the device's file system is frozen. While a backup runs the file is locked (`flock`) against
//! another one.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::sidecar::{Fingerprint, Sidecar};
use crate::disk::mounts::Table;
use crate::disk::{BlockDevice, DiskError};
use crate::engine::FileSink;
use crate::statefile::{self, StateFileError};
use crate::units::DeviceId;

/// A target can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// It is no regular file.
    #[error("{path} is {what}: give the path of a file, which is made if it does not exist")]
    NotFile {
        /// The target.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// It is on the device.
    #[error("{path} is on {device}, the device to be backed up: give a file on another disk")]
    OnDevice {
        /// The target.
        path: PathBuf,
        /// The device.
        device: PathBuf,
    },
    /// It is the file that the device is made of.
    #[error("{path} holds the data of {device}, the device to be backed up: give another file")]
    IsDevice {
        /// The target.
        path: PathBuf,
        /// The device.
        device: PathBuf,
    },
    /// Another backup writes it.
    #[error("{path} is being written by another backup: wait for its end")]
    Busy {
        /// The target.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("can't {action} {path}: {source}{}", remedy_of(source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// The target or its directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Where it is can't be found out.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The sidecar can't be written.
    #[error(transparent)]
    Sidecar(#[from] StateFileError),
}

impl TargetError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

fn remedy_of(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => "; make the directory first",
        io::ErrorKind::PermissionDenied => "; run as root",
        io::ErrorKind::StorageFull => "; free some space",
        io::ErrorKind::FileTooLarge => "; use a file system that can hold a file this long",
        io::ErrorKind::ReadOnlyFilesystem => "; give a file on a writable file system",
        _ => "",
    }
}

/// An open and locked target.
#[derive(Debug)]
pub struct Target {
    file: Flock<File>,
    path: PathBuf,
    existed: bool,
}

impl Target {
    /// Opens the file at `path`, or makes an empty one, and locks it.
    ///
    /// # Errors
    /// It is not a regular file, in use, or can't be opened. A file that was made is removed then.
    pub fn open(path: &Path) -> Result<Self, TargetError> {
        let path = resolve(path)?;
        let existed = match fs::symlink_metadata(&path) {
            Ok(metadata) => {
                check_kind(&path, &metadata)?;
                true
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(TargetError::io("open", &path)(error)),
        };
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        // No link that takes the file's place now is followed, and no pipe waited for.
        options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY);
        if !existed {
            options.create_new(true).mode(0o600);
        }
        let file = options
            .open(&path)
            .map_err(TargetError::io(if existed { "open" } else { "make" }, &path))?;
        let metadata = file.metadata().map_err(TargetError::io("read", &path))?;
        check_kind(&path, &metadata)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => Ok(Self { file, path, existed }),
            Err((_, Errno::EWOULDBLOCK)) => Err(TargetError::Busy { path }),
            Err((_, errno)) => {
                if !existed {
                    // The error to tell is the other one.
                    let _ = fs::remove_file(&path);
                }
                Err(TargetError::io("lock", &path)(errno.into()))
            }
        }
    }

    /// Refuses a target that is on `device` or is the file that it is made of.
    ///
    /// # Errors
    /// It is, or where it is can't be found out.
    pub fn check_not_on(&self, device: &BlockDevice) -> Result<(), TargetError> {
        let path = || self.path.clone();
        let metadata = self
            .file
            .metadata()
            .map_err(TargetError::io("read", &self.path))?;
        if is_file_of(&metadata, device.id) {
            return Err(TargetError::IsDevice {
                path: path(),
                device: device.path.clone(),
            });
        }
        let table = Table::read()?;
        let mount = table
            .of_file(&*self.file)
            .map_err(TargetError::io("find the mount of", &self.path))?;
        let beneath = table.beneath(mount);
        if table
            .on_device(device)
            .iter()
            .any(|on| beneath.contains(&on.superblock))
        {
            return Err(TargetError::OnDevice {
                path: path(),
                device: device.path.clone(),
            });
        }
        Ok(())
    }

    /// The file as the end of a copy. It is one hole (`fresh`), or holds older data.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn sink(&self, fresh: bool) -> Result<FileSink, TargetError> {
        let open = || {
            let file = Arc::new(self.file.try_clone()?);
            let length = file.metadata()?.len();
            let make = if fresh {
                FileSink::fresh
            } else {
                FileSink::existing
            };
            make(file, self.path.display().to_string(), length)
        };
        open().map_err(TargetError::io("open", &self.path))
    }

    pub(super) fn write_failed(&self, source: io::Error) -> TargetError {
        TargetError::io("write", &self.path)(source)
    }

    /// Its path, symbolic links resolved.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Path of its sidecar.
    #[must_use]
    pub fn sidecar_path(&self) -> PathBuf {
        Sidecar::path_of(&self.path)
    }

    /// How the file looks now; `None` if it was made by [`Target::open`].
    ///
    /// # Errors
    /// The file system fails.
    pub fn earlier(&self) -> Result<Option<Fingerprint>, TargetError> {
        self.existed.then(|| self.fingerprint()).transpose()
    }

    fn fingerprint(&self) -> Result<Fingerprint, TargetError> {
        self.file
            .metadata()
            .map(|metadata| Fingerprint::of(&metadata))
            .map_err(TargetError::io("read", &self.path))
    }

    /// Makes the file one hole of `length` bytes.
    ///
    /// # Errors
    /// The file system can't hold such a file.
    pub fn clear(&self, length: u64) -> Result<(), TargetError> {
        self.file
            .set_len(0)
            .and_then(|()| self.file.set_len(length))
            .map_err(TargetError::io("set the length of", &self.path))
    }

    /// Makes everything written permanent, and gives how the file looks then.
    ///
    /// # Errors
    /// Something could not be written.
    pub fn sync(&self) -> Result<Fingerprint, TargetError> {
        self.file
            .sync_all()
            .map_err(TargetError::io("sync", &self.path))?;
        if !self.existed {
            statefile::sync_directory_of(&self.path)?;
        }
        self.fingerprint()
    }

    /// Gives the file up. One that was made by [`Target::open`] is removed.
    pub fn abandon(self) {
        if !self.existed {
            // Nothing better can be done for a file that does not go.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The path with symbolic links resolved, also where the last part does not exist.
fn resolve(path: &Path) -> Result<PathBuf, TargetError> {
    let directory = || TargetError::NotFile {
        path: path.to_owned(),
        what: "a directory",
    };
    match path.canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
                return Err(directory());
            }
            let name = path.file_name().ok_or_else(directory)?;
            let parent = match path.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent,
                _ => Path::new("."),
            };
            let parent = parent.canonicalize().map_err(TargetError::io("open", parent))?;
            Ok(parent.join(name))
        }
        resolved => resolved.map_err(TargetError::io("open", path)),
    }
}

fn check_kind(path: &Path, metadata: &Metadata) -> Result<(), TargetError> {
    let kind = metadata.file_type();
    let what = if kind.is_file() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_block_device() {
        "a block device, whose data would be lost"
    } else if kind.is_symlink() {
        "a symbolic link that leads nowhere"
    } else {
        "a pipe, a socket or a character device"
    };
    Err(TargetError::NotFile {
        path: path.to_owned(),
        what,
    })
}

/// Whether the file with this metadata is the one that a loop device at or below `id` is made of.
fn is_file_of(metadata: &Metadata, id: DeviceId) -> bool {
    let mut queue = vec![PathBuf::from(format!("/sys/dev/block/{id}"))];
    // Devices stack without circles; the bound is for a sysfs that changes meanwhile.
    for _ in 0..256 {
        let Some(sysfs) = queue.pop() else { break };
        let Ok(sysfs) = sysfs.canonicalize() else { continue };
        if sysfs.join("partition").exists() {
            queue.extend(sysfs.parent().map(Path::to_owned));
        }
        let slaves = fs::read_dir(sysfs.join("slaves")).into_iter().flatten().flatten();
        queue.extend(slaves.map(|slave| slave.path()));
        let Ok(backing) = fs::read_to_string(sysfs.join("loop/backing_file")) else {
            continue;
        };
        let same = fs::metadata(backing.trim_end_matches('\n'))
            .is_ok_and(|backing| backing.dev() == metadata.dev() && backing.ino() == metadata.ino());
        if same {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(path: &Path) -> String {
        Target::open(path).unwrap_err().to_string()
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        nix::unistd::mkfifo(&at("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::os::unix::fs::symlink("nowhere", at("dangling")).unwrap();
        for (path, what) in [
            (directory.path().to_owned(), "is a directory"),
            (at("new/"), "is a directory"),
            (at("pipe"), "is a pipe"),
            (at("dangling"), "leads nowhere"),
            ("/dev/null".into(), "is a pipe, a socket or a character device"),
            ("/".into(), "is a directory"),
        ] {
            let text = error(&path);
            assert!(
                text.contains(what) && text.contains("give the path of a file"),
                "{text}"
            );
        }
        let text = error(&at("no/such/file"));
        assert!(text.contains("make the directory first"), "{text}");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
    }

    #[test]
    fn one_backup_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.img");
        let first = Target::open(&path).unwrap();
        assert_eq!(first.earlier().unwrap(), None);
        assert!(error(&path).contains("another backup"));
        first.clear(1 << 20).unwrap();
        let print = first.sync().unwrap();
        drop(first);
        let second = Target::open(&path).unwrap();
        assert_eq!(second.earlier().unwrap(), Some(print));
        second.abandon();
        assert!(path.exists());
        fs::remove_file(&path).unwrap();
        Target::open(&path).unwrap().abandon();
        assert!(!path.exists());
    }

    #[test]
    fn links_are_resolved() {
        let directory = tempfile::tempdir().unwrap();
        let real = directory.path().join("real.img");
        fs::write(&real, "x").unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink("real.img", &link).unwrap();
        let target = Target::open(&link).unwrap();
        assert_eq!(target.path(), real.canonicalize().unwrap());
        assert!(target.sidecar_path().ends_with("real.img.blksnap.json"));
    }
}

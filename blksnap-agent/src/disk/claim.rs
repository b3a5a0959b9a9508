//! Claim: exclusive use of a block device or an image file.
//!
//! A block device is claimed as file systems, LVM, md and swap do it: by an open with `O_EXCL` (open(2)). A regular
//! file is locked from its first to its last byte by a lock of the open file description (`F_OFD_SETLK`, fcntl(2)),
//! which is what qemu takes on its images, so that neither gets a file that the other uses. Both end when the
//! descriptors are closed, however the process ends.
//!
//! A process that this one starts has all its descriptors for a moment, until its `execve` closes them: what was let go
//! meanwhile looks as if somebody had it. So one that seems to be in use is tried again for [`GRACE`].

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::device::{device_number, sysfs_directory};
use super::mounts::Table;
use super::{DiskError, FileDisk};
use crate::units::DeviceId;

/// How long somebody else's claim is waited for.
const GRACE: Duration = Duration::from_millis(300);

/// How often it is tried meanwhile.
const RETRY: Duration = Duration::from_millis(10);

/// What holds a claim as long as it is kept, beside the file itself.
#[derive(Debug)]
pub(super) struct Claim {
    /// The node, open with `O_EXCL`.
    _node: Option<File>,
}

impl Claim {
    /// Claims what `disk` is.
    pub(super) fn new(disk: &FileDisk) -> Result<Self, DiskError> {
        let begun = Instant::now();
        loop {
            match Self::attempt(disk) {
                Err(DiskError::Busy { .. }) if begun.elapsed() < GRACE => std::thread::sleep(RETRY),
                done => return done,
            }
        }
    }

    fn attempt(disk: &FileDisk) -> Result<Self, DiskError> {
        let path = PathBuf::from(disk.path());
        let failed = |source: io::Error| DiskError::Claim {
            path: path.clone(),
            source,
        };
        let file = disk.shared();
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.file_type().is_block_device() {
            return lock(file, &path).map(|()| Self { _node: None });
        }
        // By the descriptor, which leads to this device whatever the path does by now.
        let node = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_EXCL)
            .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
            .map_err(|source| match source.kind() {
                io::ErrorKind::ResourceBusy => DiskError::Busy {
                    path: path.clone(),
                    holder: holder_of(device_number(metadata.rdev()), &path),
                },
                _ => failed(source),
            })?;
        Ok(Self { _node: Some(node) })
    }
}

/// Locks a regular file: for writing if it is open so, else against writers.
fn lock(file: &File, path: &Path) -> Result<(), DiskError> {
    let mut last = Errno::EBADF;
    for kind in [libc::F_WRLCK, libc::F_RDLCK] {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&whole(kind))) {
            Ok(_) => return Ok(()),
            Err(Errno::EAGAIN | Errno::EACCES) => {
                return Err(DiskError::Busy {
                    path: path.to_owned(),
                    holder: locker_of(file, kind, path),
                });
            }
            // Not open for writing.
            Err(errno) => last = errno,
        }
        if last != Errno::EBADF {
            break;
        }
    }
    Err(DiskError::Claim {
        path: path.to_owned(),
        source: last.into(),
    })
}

/// A lock of the whole file.
fn whole(kind: libc::c_int) -> libc::flock {
    let short = |value| libc::c_short::try_from(value).unwrap_or_default();
    libc::flock {
        l_type: short(kind),
        l_whence: short(libc::SEEK_SET),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// Who has the lock that is in the way, as far as the kernel tells.
fn locker_of(file: &File, kind: libc::c_int, path: &Path) -> String {
    let mut found = whole(kind);
    let asked = fcntl(file, FcntlArg::F_OFD_GETLK(&mut found));
    // A lock of an open file description has no process: -1.
    if asked.is_ok() && found.l_pid > 0 {
        return format!("process {} has locked it", found.l_pid);
    }
    format!(
        "another program has locked it, such as qemu or another agent (`lsof {}`)",
        path.display()
    )
}

/// Who has claimed a block device, as far as mounts and sysfs tell.
fn holder_of(id: DeviceId, path: &Path) -> String {
    let mounts = Table::read().ok();
    let mounted = mounts
        .iter()
        .flat_map(Table::all)
        .find(|mount| mount.superblock == id);
    if let Some(mount) = mounted {
        return format!("it is mounted at {}", mount.mountpoint.display());
    }
    let holders: Vec<String> = sysfs_directory(id)
        .and_then(|directory| fs::read_dir(directory.join("holders")))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    if !holders.is_empty() {
        return format!("{} stands on it", holders.join(", "));
    }
    format!(
        "a file system on one of its partitions, swap, or another program holds it (`lsblk {0}`, `fuser -v {0}`)",
        path.display()
    )
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn what_is_let_go_while_a_process_starts_can_be_claimed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image.raw");
        File::create(&path).unwrap().set_len(4096).unwrap();
        let open = || FileDisk::open(&path, true).unwrap();
        let (first, second) = (open(), open());
        first.claim().unwrap();
        let error = second.claim().unwrap_err();
        assert!(matches!(error, DiskError::Busy { .. }), "{error}");
        // As a child that has not come to its execve.
        let inherited = first.shared().try_clone().unwrap();
        let mut child = Command::new("sleep")
            .arg("0.05")
            .stdin(Stdio::from(inherited))
            .spawn()
            .unwrap();
        drop(first);
        second.claim().unwrap();
        child.wait().unwrap();
    }
}

//! Pins: files on a BPF file system that keep programs, links and maps alive while no agent runs.
//!
//! ```text
//! BPFFS/blksnap/v2/maps/NAME                 the maps of the object
//! BPFFS/blksnap/v2/programs/ID/HOOK          the programs that see writes begin
//! BPFFS/blksnap/v2/programs/ID/HOOK_link     what attaches them
//! BPFFS/blksnap/v2/slots/SLOT/bN             a bitmap whose blocks are not in a document, or in pN, yet
//! BPFFS/blksnap/v2/slots/SLOT/pN             blocks of closed periods
//! ```
//!
//! The version in the path is [`ABI_VERSION`]. ID is the kernel's number of the program on `block_bio_queue`; there
//! may be several while an agent takes over from another. A BPF file system is empty after a reboot, and so are
//! the maps: what is found here is of this boot.
//!
//! Whoever holds the directory's lock is the only one to change it.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aya::maps::MapData;
use blksnap_common::track::ABI_VERSION;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::refusal::one_line;

/// Where the kernel's own mount point for it is.
pub const BPFFS: &str = "/sys/fs/bpf";

/// The directory of all pins of all versions.
const DIRECTORY: &str = "blksnap";

/// Longest wait for an agent that is ending: a child of one that was killed holds the lock until its exec.
const ENDING: Duration = Duration::from_secs(3);

/// Pins can't be made, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// There is no BPF file system, and none could be mounted.
    #[error(
        "can't mount a bpf file system at {}: {source}; mount one there, name another place with --bpffs, or run with --no-pins (tracking then ends with the daemon)",
        path.display()
    )]
    NoBpffs {
        /// Where it should be.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Another agent has the directory.
    #[error("another agent uses the pins in {}; stop it, or choose another place with --bpffs", .0.display())]
    Used(PathBuf),
    /// A file or directory.
    #[error("can't {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel refuses to pin, or to give what is pinned.
    #[error("can't {action} {}: {reason}", path.display())]
    Object {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

impl PinError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

/// The directory of this version's pins, locked.
#[derive(Debug)]
pub(super) struct Pins {
    root: PathBuf,
    version: PathBuf,
    /// An agent of another version tracked something.
    superseded: bool,
    _lock: Flock<File>,
}

impl Drop for Pins {
    fn drop(&mut self) {
        // They stay where something is pinned.
        let _ = fs::remove_dir(&self.version);
        let _ = fs::remove_dir(&self.root);
    }
}

impl Pins {
    /// Opens the directory on the BPF file system at `bpffs`, which is mounted where it is missing, and removes what
    /// agents of other versions left: nobody reads that.
    pub(super) fn open(bpffs: &Path) -> Result<Self, PinError> {
        ensure_bpffs(bpffs)?;
        let root = bpffs.join(DIRECTORY);
        make(&root)?;
        let lock = lock(&root)?;
        let version = root.join(format!("v{ABI_VERSION}"));
        let mut superseded = false;
        for entry in entries(&root)? {
            if entry != version {
                superseded = true;
                tracing::warn!(path = %entry.display(), "what an agent of another version tracked is given up");
                remove_tree(&entry)?;
            }
        }
        Ok(Self {
            root,
            version,
            superseded,
            _lock: lock,
        })
    }

    /// Whether an agent of another version tracked something, which is given up.
    pub(super) const fn superseded(&self) -> bool {
        self.superseded
    }

    /// Where map `name` is.
    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.version.join("maps").join(name)
    }

    /// Whether all of these maps are pinned.
    pub(super) fn has_maps(&self, names: &[&str]) -> bool {
        names.iter().all(|name| self.map(name).exists())
    }

    /// Makes the directories.
    pub(super) fn prepare(&self) -> Result<(), PinError> {
        make(&self.version)?;
        ["maps", "programs", "slots"]
            .iter()
            .try_for_each(|part| make(&self.version.join(part)))
    }

    /// The directory of the programs whose first has the number `id`.
    pub(super) fn programs(&self, id: u32) -> PathBuf {
        self.version.join("programs").join(id.to_string())
    }

    /// The numbers of all pinned sets of programs.
    pub(super) fn program_sets(&self) -> Result<Vec<u32>, PinError> {
        Ok(numbers(&entries(&self.version.join("programs"))?))
    }

    /// The directory of a slot.
    pub(super) fn slot(&self, slot: u32) -> PathBuf {
        self.version.join("slots").join(slot.to_string())
    }

    /// All slots that have a directory.
    pub(super) fn slots(&self) -> Result<Vec<u32>, PinError> {
        Ok(numbers(&entries(&self.version.join("slots"))?))
    }

    /// Removes all pins of this version: programs and maps without another owner end.
    pub(super) fn clear(&self) -> Result<(), PinError> {
        remove_tree(&self.version)
    }
}

/// Removes every pin under `bpffs`, of all versions; says whether there was one.
///
/// # Errors
/// An agent uses them, or a file can't be removed.
pub fn purge(bpffs: &Path) -> Result<bool, PinError> {
    let root = bpffs.join(DIRECTORY);
    if !root.exists() {
        return Ok(false);
    }
    let lock = lock(&root)?;
    let any = !entries(&root)?.is_empty();
    remove_tree(&root)?;
    drop(lock);
    Ok(any)
}

/// Pins a map.
pub(super) fn pin_map(fd: BorrowedFd<'_>, path: &Path) -> Result<(), PinError> {
    let failed = |reason: String| PinError::Object {
        action: "pin",
        path: path.to_owned(),
        reason,
    };
    let fd = fd.try_clone_to_owned().map_err(|e| failed(e.to_string()))?;
    MapData::from_fd(fd)
        .map_err(|e| failed(one_line(&e)))?
        .pin(path)
        .map_err(|e| failed(one_line(&e)))
}

/// A pinned map.
pub(super) fn open_map(path: &Path) -> Result<MapData, PinError> {
    MapData::from_pin(path).map_err(|e| PinError::Object {
        action: "open the pinned map",
        path: path.to_owned(),
        reason: one_line(&e),
    })
}

/// Removes a pin or a directory of pins, with all in it. Nothing there is no error.
pub(super) fn remove_tree(path: &Path) -> Result<(), PinError> {
    let removed = if path.is_dir() {
        for entry in entries(path)? {
            remove_tree(&entry)?;
        }
        fs::remove_dir(path)
    } else {
        fs::remove_file(path)
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(PinError::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Makes a directory that may be there.
pub(super) fn make(path: &Path) -> Result<(), PinError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(PinError::io("make", path)(error)),
        _ => Ok(()),
    }
}

/// What is in a directory, in no order; nothing if there is none.
pub(super) fn entries(path: &Path) -> Result<Vec<PathBuf>, PinError> {
    match fs::read_dir(path) {
        Ok(read) => read
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<io::Result<_>>()
            .map_err(PinError::io("list", path)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(PinError::io("list", path)(error)),
    }
}

fn numbers(paths: &[PathBuf]) -> Vec<u32> {
    paths
        .iter()
        .filter_map(|path| path.file_name()?.to_str()?.parse().ok())
        .collect()
}

/// Mounts a BPF file system at `path` if there is none, as bpftool does.
fn ensure_bpffs(path: &Path) -> Result<(), PinError> {
    let missing = |source| PinError::NoBpffs {
        path: path.to_owned(),
        source,
    };
    match DirBuilder::new().recursive(true).mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(missing(error)),
        _ => {}
    }
    let found = statfs(path).map_err(|errno| missing(errno.into()))?;
    if found.filesystem_type() == BPF_FS_MAGIC {
        return Ok(());
    }
    mount(
        Some("bpf"),
        path,
        Some("bpf"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        Some("mode=0700"),
    )
    .map_err(|errno| missing(errno.into()))
}

fn lock(root: &Path) -> Result<Flock<File>, PinError> {
    let deadline = Instant::now() + ENDING;
    loop {
        let file = File::open(root).map_err(PinError::io("open", root))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((_, Errno::EWOULDBLOCK)) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err((_, Errno::EWOULDBLOCK)) => return Err(PinError::Used(root.to_owned())),
            Err((_, errno)) => return Err(PinError::io("lock", root)(errno.into())),
        }
    }
}

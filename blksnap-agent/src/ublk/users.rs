//! Users: whether anybody has a block device open.
//!
//! The kernel tells of mounts, swap and stacked devices by refusing exclusive use; of programs it says nothing, so the
//! descriptors of all processes are looked at. One that opens it just then is not seen.

use std::fs;
use std::os::linux::fs::MetadataExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;

/// Who uses a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum User {
    /// A mount, swap, or another device.
    Kernel,
    /// A process.
    Process(String),
}

impl std::fmt::Display for User {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Kernel => formatter.write_str("it is mounted, swap, or part of another device"),
            Self::Process(name) => write!(formatter, "{name} has it open"),
        }
    }
}

/// Somebody who has the device at `node`, or a partition of it, open; `None` if nobody has, or it is gone.
pub(super) fn user(node: &Path) -> Option<User> {
    let exclusive = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_EXCL | libc::O_NONBLOCK)
        .open(node);
    if exclusive.is_err_and(|error| error.raw_os_error() == Some(Errno::EBUSY as i32)) {
        return Some(User::Kernel);
    }
    let devices = numbers(node);
    processes(&devices).map(User::Process)
}

/// Numbers of a disk and its partitions.
fn numbers(node: &Path) -> Vec<u64> {
    let mut nodes = vec![node.to_owned()];
    if let Some(name) = node.file_name() {
        let parts = fs::read_dir(Path::new("/sys/class/block").join(name));
        for part in parts.into_iter().flatten().flatten() {
            if part.path().join("partition").exists() {
                nodes.push(Path::new("/dev").join(part.file_name()));
            }
        }
    }
    nodes
        .iter()
        .filter_map(|node| fs::metadata(node).ok())
        .filter(|metadata| metadata.file_type().is_block_device())
        .map(|metadata| metadata.st_rdev())
        .collect()
}

/// A process that has one of the block devices open.
fn processes(devices: &[u64]) -> Option<String> {
    let processes = fs::read_dir("/proc").ok()?;
    for process in processes.flatten() {
        if !process
            .file_name()
            .to_string_lossy()
            .starts_with(|c: char| c.is_ascii_digit())
        {
            continue;
        }
        // Those that end meanwhile have nothing open.
        for descriptor in fs::read_dir(process.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let open = fs::metadata(descriptor.path())
                .is_ok_and(|file| file.file_type().is_block_device() && devices.contains(&file.st_rdev()));
            if open {
                let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                return Some(format!(
                    "{} ({})",
                    name.trim(),
                    process.file_name().to_string_lossy()
                ));
            }
        }
    }
    None
}

//! Storage errors: what was tried with which place, and the remedy.

use std::io;
use std::path::PathBuf;

use crate::cow::Misplaced;
use crate::disk::DiskError;
use crate::disk::extents::ExtentsError;

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
    /// Files take room for what was never written.
    #[error(
        "can't use {path} as difference storage: its file system has no sparse files; give another place"
    )]
    NotSparse {
        /// The directory or file.
        path: PathBuf,
    },
    /// There is hardly any space.
    #[error(
        "can't use {path} as difference storage: its file system has {available} bytes left, and {reserve} are kept free; free some space, or give another place"
    )]
    Full {
        /// The directory or file.
        path: PathBuf,
        /// Bytes that are free.
        available: u64,
        /// Bytes that stay free.
        reserve: u64,
    },
    /// A file without bytes, and no limit to grow to.
    #[error("{path} has no bytes to be used: give a limit up to which it may grow, as in {path},limit=10G")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A directory was given as a file, say.
    #[error("can't use {path} as difference storage: it is not a {wanted}")]
    Kind {
        /// The path as given.
        path: PathBuf,
        /// What it should be.
        wanted: &'static str,
    },
    /// Its device or file can't be had.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// It can't be written in pieces as small as the origin's.
    #[error(
        "can't use {path} as difference storage: its logical blocks have {block} bytes, those of the device to be snapshotted {allowed}; give a directory on it, or another device"
    )]
    LogicalBlock {
        /// The device.
        path: PathBuf,
        /// Bytes of its logical block.
        block: u32,
        /// Bytes of the largest allowed.
        allowed: u32,
    },
    /// A range of a device that can't be used.
    #[error("can't use {length} bytes at {offset} of {path} as difference storage: {why}")]
    Range {
        /// The device.
        path: PathBuf,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// What is wrong.
        why: &'static str,
    },
    /// The device is the one to be snapshotted.
    #[error(
        "can't use {path} as difference storage: a device to be snapshotted is on it; give the ranges of a file on it"
    )]
    Origin {
        /// The device.
        path: PathBuf,
    },
    /// It is on a served device, by which it can't be had.
    #[error("{path} is on {device}, which is not served")]
    NotServed {
        /// The path as given.
        path: PathBuf,
        /// Name of the device.
        device: String,
    },
    /// Where it is can't be told.
    #[error("where the difference storage is can't be told: {0}")]
    Extents(#[from] ExtentsError),
    /// It is on no device.
    #[error("where the difference storage is can't be told: {0} is in memory")]
    NoDevice(String),
    /// It was gone when the agent ended.
    #[error("the difference storage {0} does not outlive the agent; give a name to keep it by")]
    Volatile(String),
    /// A name that can't be part of a file's name.
    #[error("\"{0}\" can't be part of a file's name: use letters, digits, - and _")]
    Name(String),
    /// What is said to be in it can't be.
    #[error("the difference storage is not the one that was used: {0}")]
    Misplaced(#[from] Misplaced),
    /// A call to the kernel failed.
    #[error("can't {action} {path}: {source}{}", remedy(source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
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

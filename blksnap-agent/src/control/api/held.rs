//! Served devices, difference storage and events in the words of the control interface.

use serde::{Deserialize, Serialize};

use super::CbtInfo;
use crate::storage::DeviceExtent;

/// Serve a disk read-write over NBD, and as a block device if asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serve {
    /// Absolute path of a block device or an image file.
    pub path: String,
    /// Name of the export; the file's name when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Bytes of a tracking block; by the size of the disk when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<u64>,
    /// Smallest bytes of a chunk, a power of two; 256 KiB when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunk_size: Option<u64>,
    /// Make it a block device of this machine, too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ublk: bool,
}

/// All served devices.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ServedDevices {
    /// By name.
    pub served: Vec<ServedDevice>,
}

/// A device that the agent serves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServedDevice {
    /// Name of the export.
    pub name: String,
    /// The file or block device.
    pub path: String,
    /// Where NBD clients find it.
    pub uri: String,
    /// The block device that it is, too, such as `/dev/ublkb0`.
    #[serde(default)]
    pub node: Option<String>,
    /// Bytes.
    pub size: u64,
    /// Bytes of a chunk.
    pub chunk_size: u64,
    /// Bytes of a unit of preserving.
    pub unit_size: u64,
    /// Clients that are connected.
    pub clients: u64,
    /// Snapshots that hold it.
    pub snapshots: u64,
    /// Writes that had to wait for old data to be kept, since the start.
    pub held_writes: u64,
    /// How long they waited together, in seconds.
    pub held_seconds: f64,
    /// The longest wait, in seconds.
    pub longest_hold_seconds: f64,
    /// Bytes of old data that the snapshots held now have preserved.
    pub preserved_bytes: u64,
    /// Pieces of preserving under way.
    pub jobs: u64,
    /// Buffers in memory that wait to be stored.
    pub queued: u64,
    /// The change map.
    pub cbt: CbtInfo,
    /// Why what an agent before knew of the disk could not be gone on with, if so.
    pub unproven: Option<String>,
}

/// Add difference storage to a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AppendStorage {
    /// As in the request that creates a snapshot.
    pub storage: String,
}

/// Where the difference storage of a snapshot is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StorageExtents {
    /// Sectors of block devices, in the order in which they are used.
    pub extents: Vec<DeviceExtent>,
}

/// Wait for an event of a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WaitEvent {
    /// How long, in milliseconds.
    pub timeout_ms: u64,
}

/// How waiting ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum WaitedEvent {
    /// None came in time.
    None,
    /// More difference storage is wanted.
    LowFreeSpace {
        /// When, in microseconds since 1970.
        time_us: u64,
        /// The original's number of it: 0.
        code: u32,
        /// How many sectors more.
        requested_nr_sect: u64,
    },
    /// Images are lost.
    Corrupted {
        /// When, in microseconds since 1970.
        time_us: u64,
        /// The original's number of it: 1.
        code: u32,
        /// The device.
        device: String,
        /// Its number; 0 for a file.
        dev_id_mj: u32,
        /// See `dev_id_mj`.
        dev_id_mn: u32,
        /// The error number.
        err_code: i32,
        /// Why, in words.
        reason: String,
    },
}

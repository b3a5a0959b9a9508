//! Control API: the JSON of every request and answer.
//!
//! Sizes, offsets and lengths are bytes; times are seconds since 1970 or durations in seconds. Devices are named
//! by path in requests, and by path, kernel name and number in answers. Extents are ascending and do not touch.
//! New fields may come with any version; a field never changes its meaning within [`API_VERSION`].
//!
//! | request | body | answer |
//! |---|---|---|
//! | `GET /v1/version` | | [`Version`] |
//! | `GET /v1/devices` | | [`Devices`] |
//! | `POST /v1/devices/attach` | [`Attach`] | [`DeviceStatus`] |
//! | `POST /v1/devices/plan` | [`Attach`] | [`AttachPlan`] |
//! | `POST /v1/devices/detach` | [`DeviceName`] | [`Empty`] |
//! | `GET /v1/cbt?device=` | | [`CbtInfo`] |
//! | `GET /v1/cbt/extents?device=[&generation=&number=]` | | [`crate::cbt::ChangedAnswer`] |
//! | the same with `&lines=true` | | lines of [`crate::cbt::ChangedLine`] |
//! | `GET /v1/cbt/map?device=&offset=&length=` | | the map's bytes, one a block |
//! | `GET /v1/cbt/heat?device=&buckets=` | | [`Heat`] |
//! | `POST /v1/cbt/mark` | [`Mark`] | [`Marked`] |
//! | `GET /v1/snapshots` | | [`Snapshots`] |
//! | `POST /v1/snapshots` | [`CreateSnapshot`] | [`Snapshot`] |
//! | `POST /v1/snapshots/take` | [`TakeSnapshot`] | lines of [`Event`]`<`[`Snapshot`]`>` |
//! | `GET /v1/snapshots/ID` | | [`Snapshot`] |
//! | `DELETE /v1/snapshots/ID` | | [`Empty`] |
//! | `POST /v1/snapshots/ID/devices` | [`DeviceName`] | [`Snapshot`] |
//! | `POST /v1/snapshots/ID/take` | [`Limits`] | lines of [`Event`]`<`[`Snapshot`]`>` |
//! | `POST /v1/backups` | [`Backup`] | lines of [`Event`]`<`[`BackupResult`]`>` |
//! | `GET /v1/nbd` | | [`NbdStatus`] |
//! | `GET /metrics` | | OpenMetrics text |
//!
//! A request that fails is answered with a status of 400 or more and [`ErrorBody`].

mod nbd;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use nbd::{NbdCounters, NbdEndpoint, NbdExport, NbdLimits, NbdStatus};

pub use crate::cbt::Base;
use crate::cbt::ResetReason;
use crate::units::{DeviceId, Extent, Generation, SnapshotId};

mod held;
mod snapshots;

pub use held::*;
pub use snapshots::*;

/// Version of this interface.
pub const API_VERSION: u32 = 1;

/// Nothing to say but that it is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Empty {}

/// Who answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Name of the program.
    pub name: String,
    /// Version of the program.
    pub version: String,
    /// [`API_VERSION`].
    pub api: u32,
    /// Version of the maps shared with the kernel.
    pub abi: u32,
    /// Release of the running kernel.
    pub kernel: String,
    /// Process id of the daemon.
    pub pid: u32,
}

/// A request about one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceName {
    /// Absolute path of a block device.
    pub device: String,
}

/// Begin to track a device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// Absolute path of a block device.
    pub device: String,
    /// Size of a tracking block, a power of two from 4 KiB to 64 MiB; chosen by the capacity when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<u64>,
    /// log2 of the smallest block that is chosen by the capacity, 12 to 26; the daemon's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tracking_block_minimum_shift: Option<u32>,
    /// Number of blocks above which larger ones are chosen, at least 1; the daemon's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tracking_block_maximum_count: Option<u64>,
    /// log2 of the largest block that is chosen by the capacity, 12 to 26, raised to the smallest where it is less;
    /// the daemon's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tracking_block_maximum_shift: Option<u32>,
}

/// What an attach would do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachPlan {
    /// Canonical path of the device.
    pub device: String,
    /// Capacity in bytes.
    pub capacity: u64,
    /// Size of a tracking block in bytes.
    pub block_size: u64,
    /// Blocks in the map.
    pub block_count: u64,
    /// What tracking takes.
    pub memory: Memory,
    /// Whether the device is tracked already: the attach would be refused.
    pub attached: bool,
}

/// Memory that tracking a device takes, in bytes. An image or an export that goes on while the device is taken again
/// holds one more copy of the map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// The two change maps of the daemon: the live one, and the one of the last take.
    pub map_bytes: u64,
    /// Bitmaps in the kernel: those that are there at the same time while a period is closed.
    pub bitmap_bytes: u64,
}

impl Memory {
    /// All of it.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.map_bytes.saturating_add(self.bitmap_bytes)
    }
}

/// All tracked devices.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Devices {
    /// In the order of their names.
    pub devices: Vec<DeviceStatus>,
}

/// A mount of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Where.
    pub mountpoint: String,
    /// Type of the file system.
    pub fs_type: String,
}

/// State of a tracked device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Canonical path.
    pub device: String,
    /// The kernel's name.
    pub name: String,
    /// Number.
    pub id: DeviceId,
    /// Kernel name of the whole disk.
    pub disk: String,
    /// Capacity in bytes.
    pub capacity: u64,
    /// Where it is mounted.
    pub mounts: Vec<Mount>,
    /// What became of it, if it is no longer the device that was attached: it can be attached again, or detached.
    pub lost: Option<ResetReason>,
    /// What tracking it takes.
    pub memory: Memory,
    /// The change map.
    pub cbt: CbtInfo,
    /// What was seen since the attach.
    pub counters: Counters,
}

/// Counters of a device since it was attached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Operations by kind.
    pub operations: BTreeMap<String, u64>,
    /// Bytes by kind.
    pub bytes: BTreeMap<String, u64>,
    /// Records that came by the ring.
    pub ring_records: u64,
    /// Records that found the ring full; the bitmap had their blocks.
    pub ring_full: u64,
    /// Runs of the tracking programs that the kernel left out.
    pub run_misses: u64,
    /// Commands past the block layer that may have changed it.
    pub passthrough: u64,
    /// Doubts that came up, by reason: after each, the next backup is a full one.
    #[serde(default)]
    pub doubts: BTreeMap<String, u64>,
    /// Generations begun, by reason.
    pub resets: BTreeMap<String, u64>,
}

/// The change map of a device, as the original's `cbtinfo`, and more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CbtInfo {
    /// Canonical path of the device.
    pub device: String,
    /// Capacity in bytes.
    pub device_capacity: u64,
    /// Size of a tracking block in bytes.
    pub block_size: u64,
    /// Blocks in the map.
    pub block_count: u64,
    /// Numbers are only comparable within one generation.
    pub generation_id: Generation,
    /// Number of the last take; 0 before the first.
    pub changes_number: u8,
    /// Number that blocks written now get.
    pub active_number: u8,
    /// Blocks written since the last take.
    pub dirty_blocks: u64,
    /// Why the generation began.
    pub began: ResetReason,
    /// Why the next take begins a new one, where it does.
    pub corrupted: Option<ResetReason>,
}

/// Question for the extents that changed between a base and the last take: since any older number (differential),
/// or, without a base, between the take before the last one and that (incremental).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangesQuery {
    /// Absolute path of a block device.
    pub device: String,
    /// Generation of the base; with the number, or neither.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<Generation>,
    /// Number of the base.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub number: Option<u8>,
    /// Answer with a JSON object a line.
    #[serde(default)]
    pub lines: bool,
}

/// Question for bytes of the map of the last take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MapQuery {
    /// Absolute path of a block device.
    pub device: String,
    /// First block.
    #[serde(default)]
    pub offset: u64,
    /// How many blocks; to the end when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub length: Option<u64>,
}

/// Question for where and how recently a device changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeatQuery {
    /// Absolute path of a block device.
    pub device: String,
    /// Most buckets of the answer, 1 to [`crate::cbt::MAX_BUCKETS`]; 1024 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub buckets: Option<u64>,
}

/// Where and how recently a device changed, with what was written until now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heat {
    /// Canonical path of the device.
    pub device: String,
    /// The map in buckets.
    #[serde(flatten)]
    pub heat: crate::cbt::Heat,
}

/// Mark ranges as changed, in both maps.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mark {
    /// Absolute path of a block device.
    pub device: String,
    /// The ranges; each one counts.
    #[serde(default)]
    pub ranges: Vec<Extent>,
    /// Absolute paths of files on the device (ext2 to 4, XFS), whose ranges are marked as they are now.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<String>,
}

/// What was marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marked {
    /// Blocks that the ranges touch, each counted once.
    pub blocks: u64,
    /// Ranges, those of files included; ranges that touch are one.
    pub ranges: u64,
    /// Bytes in them.
    pub bytes: u64,
}

/// Make or renew a raw image file of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Backup {
    /// Absolute path of a block device.
    pub device: String,
    /// Absolute path of the file.
    pub target: String,
    /// Write only what changed since the file was made, where that can be proven.
    #[serde(default)]
    pub incremental: bool,
    /// Take the image of this snapshot instead of the live device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotId>,
    /// Bounds of the take of a live device.
    #[serde(default)]
    pub limits: Limits,
}

/// Which kind a backup was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum BackupKind {
    /// Everything was written.
    Full {
        /// Why, where an incremental one was asked for: stable code.
        reason: Option<String>,
        /// The same in words.
        message: Option<String>,
    },
    /// Only what changed was written.
    Incremental {
        /// The base that the file had.
        base: Base,
    },
}

/// A backup that was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BackupResult {
    /// Canonical path of the device.
    pub device: String,
    /// The file.
    pub target: String,
    /// Full or incremental.
    #[serde(flatten)]
    pub kind: BackupKind,
    /// Size of the image in bytes.
    pub size: u64,
    /// Bytes read from the device (a block written while copying counts each time).
    pub copied_bytes: u64,
    /// Rounds of copying; 1 when nothing was written meanwhile.
    pub rounds: u32,
    /// What the image is as good as.
    pub consistency: Consistency,
    /// How long the file systems were frozen, in seconds.
    pub frozen_seconds: f64,
    /// Time in all, in seconds.
    pub seconds: f64,
    /// Generation and number of the take: the base of the next one.
    pub taken: Base,
}

/// A line of the answer of work that takes long. The last line is `done` or `error`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum Event<T> {
    /// How far it is.
    Progress(Progress),
    /// It is done.
    Done {
        /// What came of it.
        result: T,
    },
    /// It failed.
    Error(ErrorBody),
}

/// How far work is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done.
    pub phase: String,
    /// Bytes done in this phase.
    pub done: u64,
    /// Bytes of this phase; 0 where it is not known.
    pub total: u64,
}

/// Why a request failed, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// Stable code.
    pub code: String,
    /// What was tried on what, and what went wrong.
    pub message: String,
    /// What to do.
    pub remedy: String,
    /// The errno that the kernel's filter interface has for it, where it has one, otherwise the nearest; 0 for none.
    #[serde(default)]
    pub errno: i32,
}

/// The state of one requirement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckState {
    /// As it should be.
    Ok,
    /// Works, but not as well as it could.
    Warning,
    /// Does not work.
    Failed,
}

/// One thing that `doctor` looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Stable name.
    pub name: String,
    /// How it is.
    pub state: CheckState,
    /// What was found.
    pub found: String,
    /// What to do, where it is not as it should be.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

/// What `doctor` found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DoctorReport {
    /// Nothing that must be is missing.
    pub ok: bool,
    /// The checks, in the order of the text.
    pub checks: Vec<Check>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn events_are_told_apart_by_one_field() {
        let line = serde_json::to_string(&Event::<Empty>::Progress(Progress {
            phase: "copy".to_owned(),
            done: 1,
            total: 2,
        }))
        .unwrap();
        assert_eq!(line, r#"{"event":"progress","phase":"copy","done":1,"total":2}"#);
        let line = r#"{"event":"error","code":"no_space","message":"m","remedy":"r"}"#;
        assert!(matches!(
            serde_json::from_str::<Event<Empty>>(line).unwrap(),
            Event::Error(body) if body.code == "no_space"
        ));
    }

    #[test]
    fn unknown_fields_of_requests_are_refused() {
        assert!(serde_json::from_value::<Attach>(json!({"device": "/dev/x", "blocksize": 1})).is_err());
        assert!(serde_json::from_value::<Attach>(json!({"device": "/dev/x"})).is_ok());
    }
}

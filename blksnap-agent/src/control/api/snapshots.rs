//! Snapshots in the words of the control interface.

use serde::{Deserialize, Deserializer, Serialize};

use super::Base;
use crate::engine::cow::Promise;
use crate::snapshot::FilterWish;
use crate::storage::Usage;
use crate::units::{DeviceId, SnapshotId};

/// Create a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// Absolute paths of its devices; more can be added before the take.
    #[serde(default)]
    pub devices: Vec<String>,
    /// Difference storage, used in this order; the daemon's directory when there is none. A single text will do.
    #[serde(
        default,
        deserialize_with = "one_or_many",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub storage: Vec<String>,
    /// What a snapshot of served devices survives: `agent_crash` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promise: Option<Promise>,
    /// How old data of devices that are not served survives: the daemon's `--filter` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<FilterWish>,
    /// `diff_storage_minimum` in bytes: how much storage is asked for at a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minimum: Option<u64>,
    /// Whether storage that can does not grow by itself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub no_autogrow: bool,
}

fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Given {
        One(String),
        Many(Vec<String>),
    }
    Ok(match Given::deserialize(deserializer)? {
        Given::One(text) => vec![text],
        Given::Many(texts) => texts,
    })
}

/// Bounds of a take.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Longest time for copying until the take, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_seconds: Option<u64>,
    /// Most rounds of copying what changed meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_rounds: Option<u32>,
    /// Longest time that the file systems may be frozen, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze_limit_ms: Option<u64>,
    /// Absolute path of a program run before, in and after the freeze.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze_hook: Option<String>,
}

/// Create a snapshot and take it: all or nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TakeSnapshot {
    /// What to create.
    pub create: CreateSnapshot,
    /// Bounds of the take.
    #[serde(default)]
    pub limits: Limits,
}

/// All snapshots.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Snapshots {
    /// In the order of their creation.
    pub snapshots: Vec<Snapshot>,
}

/// State of a snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Identifier.
    pub id: SnapshotId,
    /// How far it is.
    pub state: SnapshotState,
    /// When it was created, in seconds since 1970.
    pub created: u64,
    /// The point in time of its images, in seconds since 1970; none before the take.
    pub taken: Option<u64>,
    /// How old data survives: `converge`, `gate`, `dm` or `served`; none before the first device.
    pub filter: Option<String>,
    /// Why that filter was chosen, where it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter_reason: Option<String>,
    /// The difference storage.
    pub storage: Vec<String>,
    /// Bytes that it occupies there.
    pub storage_bytes: u64,
    /// Space of the storage of served devices.
    pub usage: Option<Usage>,
    /// Events that nobody has taken yet.
    pub events: u64,
    /// Why its images are lost, if they are.
    pub reason: Option<String>,
    /// Its devices.
    pub devices: Vec<SnapshotDevice>,
}

/// How far a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotState {
    /// Not taken yet.
    Created,
    /// Being taken.
    Taking,
    /// Its images can be read.
    Taken,
    /// Its images answer with errors.
    Corrupted,
}

impl SnapshotState {
    /// All states.
    pub const ALL: [Self; 4] = [Self::Created, Self::Taking, Self::Taken, Self::Corrupted];

    /// The word of the JSON.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Taking => "taking",
            Self::Taken => "taken",
            Self::Corrupted => "corrupted",
        }
    }
}

/// A device of a snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotDevice {
    /// Canonical path.
    pub device: String,
    /// The kernel's name, or that under which it is served.
    pub name: String,
    /// Number; none for a file that is served.
    pub id: Option<DeviceId>,
    /// Capacity in bytes.
    pub capacity: u64,
    /// The image, after the take.
    pub image: Option<Image>,
}

/// A readable image of a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Image {
    /// Name of the NBD export.
    pub export: String,
    /// Where NBD clients find it.
    pub uri: String,
    /// Size in bytes.
    pub size: u64,
    /// Bytes that it occupies in the difference storage.
    pub stored_bytes: u64,
    /// Generation and number of the take: the base of the next incremental backup.
    #[serde(flatten)]
    pub taken: Base,
    /// What the image is as good as.
    pub consistency: Consistency,
    /// How long the file systems were frozen, in seconds; none where nothing was.
    pub frozen_seconds: f64,
    /// How long devices of device-mapper were suspended for the take, in seconds; none of another filter, or if an agent
    /// before this one took it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspended_seconds: Option<f64>,
    /// 0, or the errno that corrupted it.
    pub error_code: i32,
}

/// What an image is as good as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Consistency {
    /// The file system was frozen: nothing to replay or repair.
    FileSystem,
    /// As after a power cut at that instant.
    Crash,
}

impl Consistency {
    /// In words.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::FileSystem => "file system consistent",
            Self::Crash => "crash consistent",
        }
    }
}

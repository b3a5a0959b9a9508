//! Table: what the devices of a snapshot are called, and what they are made of.

use std::fmt;
use std::str::FromStr as _;

use crate::storage::DeviceExtent;
use crate::sys::dm::Target;
use crate::units::{DeviceId, SnapshotId};

/// Beginning of the names of all our devices.
const NAME: &str = "blksnap-";

/// Beginning of the uuids of all our devices; device-mapper's subsystems have one each (`LVM-`, `CRYPT-`).
const UUID: &str = "BLKSNAP-";

/// Targets that may be active in two devices at once: they keep nothing of their own that the two would have to agree
/// on. A thin volume is opened once in its pool, however many devices have it.
const SHAREABLE: [&str; 8] = [
    "crypt", "delay", "error", "flakey", "linear", "striped", "thin", "zero",
];

/// The kernel's target over a device whose old data is kept.
pub(super) const ORIGIN: &str = "snapshot-origin";

/// The kernel's target of an image.
pub(super) const SNAPSHOT: &str = "snapshot";

/// A device of a snapshot. All but the origin are ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Node {
    /// The device that is snapshotted.
    Origin(DeviceId),
    /// What the origin was before: its old table. One for all snapshots of the origin.
    Real(DeviceId),
    /// Difference storage of a snapshot of the origin.
    Storage(SnapshotId, DeviceId),
    /// The image of the origin in a snapshot.
    Image(SnapshotId, DeviceId),
}

impl Node {
    /// Number of the origin that it belongs to.
    #[must_use]
    pub const fn origin(self) -> DeviceId {
        match self {
            Self::Origin(origin) | Self::Real(origin) => origin,
            Self::Storage(_, origin) | Self::Image(_, origin) => origin,
        }
    }

    /// The snapshot that it belongs to, if it is of one.
    #[must_use]
    pub const fn snapshot(self) -> Option<SnapshotId> {
        match self {
            Self::Origin(_) | Self::Real(_) => None,
            Self::Storage(snapshot, _) | Self::Image(snapshot, _) => Some(snapshot),
        }
    }

    fn tail(self) -> String {
        let origin = self.origin();
        let origin = format!("{}.{}", origin.major, origin.minor);
        match self {
            Self::Origin(_) => origin,
            Self::Real(_) => format!("{origin}-real"),
            Self::Storage(snapshot, _) => format!("{}-{origin}-cow", snapshot.uuid().simple()),
            Self::Image(snapshot, _) => format!("{}-{origin}", snapshot.uuid().simple()),
        }
    }

    /// Its name, as in `/dev/mapper`.
    #[must_use]
    pub fn name(self) -> String {
        format!("{NAME}{}", self.tail())
    }

    /// Its uuid.
    #[must_use]
    pub fn uuid(self) -> String {
        format!("{UUID}{}", self.tail())
    }

    /// The device with this uuid; `None` if it is not one of ours.
    #[must_use]
    pub fn of_uuid(uuid: &str) -> Option<Self> {
        let tail = uuid.strip_prefix(UUID)?;
        let number = |text: &str| DeviceId::from_str(&text.replacen('.', ":", 1)).ok();
        if let Some(origin) = tail.strip_suffix("-real") {
            return number(origin).map(Self::Real);
        }
        let (rest, is_storage) = match tail.strip_suffix("-cow") {
            Some(rest) => (rest, true),
            None => (tail, false),
        };
        let (snapshot, origin) = rest.split_once('-')?;
        let (snapshot, origin) = (snapshot.parse().ok()?, number(origin)?);
        Some(if is_storage {
            Self::Storage(snapshot, origin)
        } else {
            Self::Image(snapshot, origin)
        })
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Origin(origin) => write!(f, "{origin}"),
            _ => f.write_str(&self.name()),
        }
    }
}

/// A table. It may have keys: it is wiped when dropped, and not shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table(Vec<Target>);

impl Table {
    /// The table of these lines.
    #[must_use]
    pub const fn new(targets: Vec<Target>) -> Self {
        Self(targets)
    }

    /// Its lines.
    #[must_use]
    pub fn targets(&self) -> &[Target] {
        &self.0
    }

    /// Length in sectors.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.0
            .last()
            .map_or(0, |last| last.start.saturating_add(last.length))
    }

    /// Whether it is that of an origin over the device `real`.
    #[must_use]
    pub fn is_over(&self, real: DeviceId) -> bool {
        matches!(self.0.as_slice(), [only] if only.kind == ORIGIN && only.parameters.trim() == real.to_string())
    }

    /// Whether it is an image.
    #[must_use]
    pub fn is_image(&self) -> bool {
        matches!(self.0.as_slice(), [only] if only.kind == SNAPSHOT)
    }

    /// The first target of it that can't be in two devices at once.
    #[must_use]
    pub fn not_shareable(&self) -> Option<&str> {
        let mut kinds = self.0.iter().map(|target| target.kind.as_str());
        kinds.find(|kind| !SHAREABLE.contains(kind))
    }

    /// Whether a key of it is in the kernel's keyring, from where nobody gets it back (`:SIZE:TYPE:NAME`).
    #[must_use]
    pub fn has_key_in_keyring(&self) -> bool {
        self.0.iter().any(|target| {
            target.kind == "crypt"
                && target
                    .parameters
                    .split_whitespace()
                    .nth(1)
                    .is_some_and(|key| key.starts_with(':'))
        })
    }
}

/// How the table of a device is made. Devices are named by what they are, since most have no number when this is
/// planned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Recipe {
    /// As given.
    Exactly(Table),
    /// `snapshot-origin` over the real device of the origin.
    Over {
        /// The origin.
        origin: DeviceId,
        /// Length in sectors.
        sectors: u64,
    },
    /// `snapshot` of the real device, on the difference storage, which is forgotten with the device.
    Snapshot {
        /// The snapshot.
        snapshot: SnapshotId,
        /// The origin.
        origin: DeviceId,
        /// Length in sectors.
        sectors: u64,
        /// Sectors that are kept at once, a power of two.
        chunk: u32,
    },
    /// These ranges, one after the other.
    Ranges(Vec<DeviceExtent>),
    /// Errors.
    Error {
        /// Length in sectors.
        sectors: u64,
    },
}

impl Recipe {
    /// The devices that must be there.
    #[must_use]
    pub fn needs(&self) -> Vec<Node> {
        match self {
            Self::Over { origin, .. } => vec![Node::Real(*origin)],
            Self::Snapshot { snapshot, origin, .. } => {
                vec![Node::Real(*origin), Node::Storage(*snapshot, *origin)]
            }
            Self::Exactly(_) | Self::Ranges(_) | Self::Error { .. } => Vec::new(),
        }
    }

    /// The table, where `number` tells the numbers of devices; `None` if one is missing.
    pub fn table(&self, number: impl Fn(Node) -> Option<DeviceId>) -> Option<Table> {
        let single = |length: u64, kind: &str, parameters: String| {
            Table(vec![Target {
                start: 0,
                length,
                kind: kind.to_owned(),
                parameters,
            }])
        };
        Some(match self {
            Self::Exactly(table) => table.clone(),
            Self::Over { origin, sectors } => {
                single(*sectors, ORIGIN, number(Node::Real(*origin))?.to_string())
            }
            Self::Snapshot {
                snapshot,
                origin,
                sectors,
                chunk,
            } => {
                let real = number(Node::Real(*origin))?;
                let storage = number(Node::Storage(*snapshot, *origin))?;
                single(*sectors, SNAPSHOT, format!("{real} {storage} N {chunk}"))
            }
            Self::Error { sectors } => single(*sectors, "error", String::new()),
            Self::Ranges(ranges) => {
                let mut start = 0;
                let line = |range: &DeviceExtent| {
                    let target = Target {
                        start,
                        length: range.count,
                        kind: "linear".to_owned(),
                        parameters: format!("{} {}", range.device, range.sector),
                    };
                    start += range.count;
                    target
                };
                Table(ranges.iter().map(line).collect())
            }
        })
    }
}

/// What the status of an image says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageStatus {
    /// Sectors of the storage in use, and all of them.
    Valid {
        /// In use.
        used: u64,
        /// All.
        total: u64,
    },
    /// The kernel gave it up: the storage was full, or failed.
    Invalid,
    /// Something else.
    Unknown,
}

impl ImageStatus {
    /// By the status line of a `snapshot` target: `used/total metadata`, or a word.
    #[must_use]
    pub fn of(kind: &str, status: &str) -> Self {
        if kind != SNAPSHOT {
            return Self::Unknown;
        }
        let first = status.split_whitespace().next().unwrap_or_default();
        if first == "Invalid" || first == "Overflow" {
            return Self::Invalid;
        }
        let numbers = first.split_once('/');
        let numbers = numbers.and_then(|(used, total)| Some((used.parse().ok()?, total.parse().ok()?)));
        numbers.map_or(Self::Unknown, |(used, total)| Self::Valid { used, total })
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    const ORIGIN_ID: DeviceId = DeviceId { major: 253, minor: 7 };

    fn target(kind: &str, parameters: &str) -> Target {
        Target {
            start: 0,
            length: 64,
            kind: kind.to_owned(),
            parameters: parameters.to_owned(),
        }
    }

    #[test]
    fn devices_are_found_again_by_their_uuid() {
        let snapshot = SnapshotId::new(Uuid::from_u128(0x1234_5678));
        for node in [
            Node::Real(ORIGIN_ID),
            Node::Storage(snapshot, ORIGIN_ID),
            Node::Image(snapshot, ORIGIN_ID),
        ] {
            assert_eq!(Node::of_uuid(&node.uuid()), Some(node));
            assert!(node.name().len() <= crate::sys::dm::MAX_NAME);
            assert!(!node.name().contains('/'));
        }
        for other in [
            "",
            "LVM-abc",
            "BLKSNAP-",
            "BLKSNAP-x-real",
            "BLKSNAP-1-253.7",
            "BLKSNAP-253:7",
        ] {
            assert_eq!(Node::of_uuid(other), None, "{other}");
        }
    }

    #[test]
    fn tables_name_devices_by_number() {
        let snapshot = SnapshotId::new(Uuid::from_u128(1));
        let number = |node: Node| {
            let minor = match node {
                Node::Real(_) => 20,
                _ => 21,
            };
            Some(DeviceId { major: 253, minor })
        };
        let text = |recipe: Recipe| {
            let table = recipe.table(number).unwrap();
            let lines = table.targets().iter();
            let lines =
                lines.map(|line| format!("{} {} {} {}", line.start, line.length, line.kind, line.parameters));
            lines.collect::<Vec<_>>()
        };
        let (origin, sectors) = (ORIGIN_ID, 64);
        assert_eq!(
            text(Recipe::Over { origin, sectors }),
            ["0 64 snapshot-origin 253:20"]
        );
        let image = Recipe::Snapshot {
            snapshot,
            origin,
            sectors,
            chunk: 8,
        };
        assert_eq!(text(image.clone()), ["0 64 snapshot 253:20 253:21 N 8"]);
        assert_eq!(image.table(|_| None), None);
        let range = |sector, count| DeviceExtent {
            device: DeviceId { major: 7, minor: 0 },
            sector,
            count,
        };
        assert_eq!(
            text(Recipe::Ranges(vec![range(8, 16), range(0, 8)])),
            ["0 16 linear 7:0 8", "16 8 linear 7:0 0"]
        );
        let over = Recipe::Over { origin, sectors }.table(number).unwrap();
        assert!(over.is_over(DeviceId {
            major: 253,
            minor: 20
        }));
        assert!(!over.is_over(DeviceId { major: 253, minor: 2 }));
        assert_eq!(over.sectors(), 64);
    }

    #[test]
    fn what_two_devices_can_not_share_is_told() {
        let table = |kind| Table::new(vec![target("linear", "7:0 0"), target(kind, "")]);
        for kind in [
            "raid",
            "cache",
            "snapshot-origin",
            "thin-pool",
            "writecache",
            "vdo",
        ] {
            assert_eq!(table(kind).not_shareable(), Some(kind));
        }
        assert_eq!(table("thin").not_shareable(), None);
        let crypt = |key: &str| Table::new(vec![target("crypt", &format!("aes-xts-plain64 {key} 0 7:0 0"))]);
        assert!(crypt(":64:logon:cryptsetup:x-d0").has_key_in_keyring());
        assert!(!crypt("00ff").has_key_in_keyring());
    }

    #[test]
    fn status_of_images() {
        let valid = ImageStatus::Valid {
            used: 16,
            total: 81920,
        };
        assert_eq!(ImageStatus::of("snapshot", "16/81920 0"), valid);
        assert_eq!(ImageStatus::of("snapshot", "Invalid"), ImageStatus::Invalid);
        assert_eq!(ImageStatus::of("snapshot", "Overflow"), ImageStatus::Invalid);
        assert_eq!(ImageStatus::of("snapshot", "Merge failed"), ImageStatus::Unknown);
        assert_eq!(ImageStatus::of("error", ""), ImageStatus::Unknown);
    }
}

//! Continuity: whether what was known of a served disk still holds when an agent comes to it again.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::sys::stat::{major, minor};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::seal::counters;
use crate::units::DeviceId;

/// A served disk as `stat` and the kernel's counters tell of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Facts {
    /// Number of the device that the file is on, or of the device itself.
    pub device: u64,
    /// Number of the file; 0 for a device.
    pub inode: u64,
    /// Bytes.
    pub size: u64,
    /// Last change of the content in nanoseconds of the wall clock; 0 for a device.
    pub modified: u64,
    /// Last change of anything.
    pub changed: u64,
    /// Whether it is a block device.
    pub block_device: bool,
    /// What a block device counted; none for a file, and for a device that proves nothing by that.
    pub counted: Option<Counted>,
}

/// What a block device and the disks that it stands on tell of writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counted {
    /// The disk's sequence number.
    pub diskseq: Option<u64>,
    /// Sectors that were written and discarded since the system started, by disk or partition.
    pub changed: BTreeMap<String, (u64, u64)>,
}

/// Looks at what a block device counted. The caller has made it write back what was written to it.
fn count(sysfs: &Path, number: u64) -> Option<Counted> {
    let id = DeviceId {
        major: u32::try_from(major(number)).ok()?,
        minor: u32::try_from(minor(number)).ok()?,
    };
    let mut changed = BTreeMap::new();
    for ground in counters::grounds(sysfs, id).ok()? {
        let counters = ground
            .counters()
            .ok()
            .filter(|counters| counters.in_flight == 0)?;
        changed.insert(ground.name, (counters.sectors, counters.discarded));
    }
    let diskseq = sysfs.join("dev/block").join(id.to_string()).join("diskseq");
    Some(Counted {
        diskseq: fs::read_to_string(diskseq)
            .ok()
            .and_then(|text| text.trim().parse().ok()),
        changed,
    })
}

impl Facts {
    /// The facts of a file or device of `size` bytes. What was written to it is on the disk, and nobody writes to it
    /// now.
    #[must_use]
    pub fn of(metadata: &Metadata, size: u64, sysfs: &Path) -> Self {
        let time = |seconds: i64, nanoseconds: i64| {
            u64::try_from(seconds)
                .unwrap_or_default()
                .saturating_mul(1_000_000_000)
                .saturating_add(u64::try_from(nanoseconds).unwrap_or_default())
        };
        let block_device = metadata.file_type().is_block_device();
        Self {
            device: if block_device {
                metadata.rdev()
            } else {
                metadata.dev()
            },
            inode: if block_device { 0 } else { metadata.ino() },
            size,
            modified: if block_device {
                0
            } else {
                time(metadata.mtime(), metadata.mtime_nsec())
            },
            changed: if block_device {
                0
            } else {
                time(metadata.ctime(), metadata.ctime_nsec())
            },
            block_device,
            counted: block_device.then(|| count(sysfs, metadata.rdev())).flatten(),
        }
    }
}

/// What an agent leaves behind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Left {
    /// Which of all times that the disk was served this is; it is written before the first write.
    pub session: Uuid,
    /// The boot in which it ran.
    pub boot: String,
    /// The disk when it was opened.
    pub opened: Facts,
    /// The disk after everything was flushed at a clean stop; none while an agent runs, or after it was killed.
    pub stopped: Option<Facts>,
}

/// The lease that the agent before left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leased {
    /// Its end in nanoseconds of the wall clock.
    pub until: u64,
    /// It was made durable before the writes that it covers: it counts after a power cut, too.
    pub durable: bool,
}

/// What is proven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// The disk is as the agent left it, and so are the files in which it noted changes.
    Everything,
    /// Nobody else wrote to the disk, but notes that were not durable may be lost with the page cache.
    DiskOnly,
}

/// Why nothing can be said of what happened to the disk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unproven {
    /// It is another one.
    #[error("another disk is there now")]
    Other,
    /// Its size is another one.
    #[error("its size is {now} bytes, not {before}")]
    Size {
        /// Before.
        before: u64,
        /// Now.
        now: u64,
    },
    /// It was written by somebody else.
    #[error("it was written while no agent served it")]
    Written,
    /// A device does not say when it was written.
    #[error("it is a block device, and nothing proves that it was not written while no agent served it")]
    BlockDevice,
    /// The system went down while it was served.
    #[error("the system went down while it was served")]
    Boot,
    /// What the agent before left can't be read.
    #[error("what the agent before left of it can't be read")]
    Unreadable,
    /// The agent before left no lease that can be read.
    #[error("nothing says when the agent before wrote last")]
    NoLease,
}

/// Whether nobody but the agent has written to the disk since it was opened. `boot` is the boot of now.
///
/// # Errors
/// That is not proven.
pub fn prove(left: &Left, now: &Facts, lease: Option<Leased>, boot: &str) -> Result<Proof, Unproven> {
    let before = &left.opened;
    if (before.device, before.inode, before.block_device) != (now.device, now.inode, now.block_device) {
        return Err(Unproven::Other);
    }
    if before.size != now.size {
        return Err(Unproven::Size {
            before: before.size,
            now: now.size,
        });
    }
    let same_boot = left.boot == boot && !boot.is_empty();
    if now.block_device {
        let before = left.stopped.as_ref().and_then(|stopped| stopped.counted.as_ref());
        return match (before, &now.counted) {
            (Some(before), Some(now)) if same_boot && before == now => Ok(Proof::Everything),
            (Some(before), Some(now)) if same_boot && before.diskseq != now.diskseq => Err(Unproven::Other),
            (Some(_), Some(_)) if same_boot => Err(Unproven::Written),
            _ => Err(Unproven::BlockDevice),
        };
    }
    if let Some(stopped) = &left.stopped {
        return if stopped == now {
            Ok(Proof::Everything)
        } else {
            Err(Unproven::Written)
        };
    }
    match lease {
        None if same_boot => Err(Unproven::NoLease),
        Some(lease) if (same_boot || lease.durable) && now.modified > lease.until => Err(Unproven::Written),
        // Killed: what it wrote, and its notes of it, are in the page cache.
        Some(_) if same_boot => Ok(Proof::Everything),
        Some(lease) if lease.durable => Ok(Proof::DiskOnly),
        _ => Err(Unproven::Boot),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            device: 1,
            inode: 2,
            size: 4096,
            modified: 1000,
            changed: 1000,
            block_device: false,
            counted: None,
        }
    }

    #[test]
    fn only_what_is_proven_goes_on() {
        let killed = Left {
            session: Uuid::from_u128(1),
            boot: "a".to_owned(),
            opened: facts(),
            stopped: None,
        };
        let now = |change: fn(&mut Facts)| {
            let mut facts = facts();
            change(&mut facts);
            facts
        };
        let same = facts();
        let lease = |until, durable| Some(Leased { until, durable });
        for durable in [false, true] {
            let until = |until| lease(until, durable);
            assert_eq!(prove(&killed, &same, until(1000), "a"), Ok(Proof::Everything));
            let older = now(|f| f.modified = 900);
            assert_eq!(prove(&killed, &older, until(1000), "a"), Ok(Proof::Everything));
            assert_eq!(prove(&killed, &same, until(999), "a"), Err(Unproven::Written));
        }
        assert_eq!(prove(&killed, &same, None, "a"), Err(Unproven::NoLease));
        assert_eq!(prove(&killed, &same, None, "b"), Err(Unproven::Boot));
        assert_eq!(
            prove(&killed, &same, lease(1000, false), "b"),
            Err(Unproven::Boot)
        );
        assert_eq!(prove(&killed, &same, lease(1000, true), "b"), Ok(Proof::DiskOnly));
        assert_eq!(
            prove(&killed, &same, lease(999, true), "b"),
            Err(Unproven::Written)
        );
        let lease = lease(1000, false);
        assert_eq!(
            prove(&killed, &now(|f| f.inode = 3), lease, "a"),
            Err(Unproven::Other)
        );
        assert_eq!(
            prove(&killed, &now(|f| f.size = 1), lease, "a"),
            Err(Unproven::Size { before: 4096, now: 1 })
        );
        let stopped = Left {
            stopped: Some(facts()),
            ..killed
        };
        // A clean stop outlives the boot, and needs no lease.
        assert_eq!(prove(&stopped, &same, None, "b"), Ok(Proof::Everything));
        for changed in [now(|f| f.modified = 1001), now(|f| f.changed = 1001)] {
            assert_eq!(prove(&stopped, &changed, lease, "a"), Err(Unproven::Written));
        }
    }

    #[test]
    fn a_block_device_proves_by_its_counters_alone() {
        let device = |sectors: Option<u64>| Facts {
            block_device: true,
            inode: 0,
            counted: sectors.map(|sectors| Counted {
                diskseq: Some(7),
                changed: BTreeMap::from([("sda".to_owned(), (sectors, 3))]),
            }),
            ..facts()
        };
        let left = |stopped| Left {
            session: Uuid::from_u128(1),
            boot: "a".to_owned(),
            opened: device(Some(1)),
            stopped,
        };
        let stopped = left(Some(device(Some(100))));
        let lease = Some(Leased {
            until: u64::MAX,
            durable: true,
        });
        assert_eq!(
            prove(&stopped, &device(Some(100)), None, "a"),
            Ok(Proof::Everything)
        );
        for (left, now, boot, why) in [
            (&stopped, device(Some(101)), "a", Unproven::Written),
            (&stopped, device(Some(100)), "b", Unproven::BlockDevice),
            (&stopped, device(None), "a", Unproven::BlockDevice),
            (
                &left(Some(device(None))),
                device(None),
                "a",
                Unproven::BlockDevice,
            ),
            (&left(None), device(Some(1)), "a", Unproven::BlockDevice),
        ] {
            assert_eq!(prove(left, &now, lease, boot), Err(why));
        }
        let mut other = device(Some(100));
        other.counted.as_mut().unwrap().diskseq = Some(8);
        assert_eq!(prove(&stopped, &other, lease, "a"), Err(Unproven::Other));
    }
}

//! Plan: whether a backup can be incremental. Pure: everything it needs is handed in.
//!
//! The rule is to take everything unless each link of this chain holds: there is a sidecar and it is undamaged; the
//! target is the very file that the sidecar was completed for, unchanged since; the device has the capacity it had;
//! its map is in the same generation, can be relied on, and has reached the number of the base.

use std::fmt;

use serde::Serialize;

use super::sidecar::{Fingerprint, Sidecar, SidecarState};
use crate::cbt::{Base, CbtInfo, FullNeeded, FullReason};
use crate::statefile::StateFileError;

/// What the plan needs to know of the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFacts {
    /// Canonical path.
    pub path: std::path::PathBuf,
    /// Capacity in bytes, now.
    pub capacity: u64,
    /// The map that the changes would be taken from.
    pub map: CbtInfo,
}

/// Why a backup is full: a stable code and a sentence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FullWhy {
    /// Stable code.
    pub code: &'static str,
    /// For people.
    pub text: String,
}

impl FullWhy {
    /// A reason.
    #[must_use]
    pub fn new(code: &'static str, text: impl Into<String>) -> Self {
        Self {
            code,
            text: text.into(),
        }
    }

    /// No incremental backup was asked for.
    #[must_use]
    pub fn requested() -> Self {
        Self::new("requested", "a full backup was asked for")
    }
}

impl From<FullNeeded> for FullWhy {
    fn from(full: FullNeeded) -> Self {
        Self::new(full.reason.code(), full.reason.to_string())
    }
}

impl fmt::Display for FullWhy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// What a backup will be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Everything is written.
    Full {
        /// Why.
        why: FullWhy,
    },
    /// What changed since `base` is written to a target that shows it.
    Incremental {
        /// The take that the target shows.
        base: Base,
    },
}

/// Decides. `sidecar` is what reading it gave, `target` the file as it is now, if it exists.
#[must_use]
pub fn plan(
    incremental: bool,
    sidecar: &Result<Option<Sidecar>, StateFileError>,
    target: Option<&Fingerprint>,
    device: &DeviceFacts,
) -> Plan {
    let decided = if incremental {
        base_of(sidecar, target, device)
    } else {
        Err(FullWhy::requested())
    };
    match decided {
        Ok(base) => Plan::Incremental { base },
        Err(why) => Plan::Full { why },
    }
}

fn base_of(
    sidecar: &Result<Option<Sidecar>, StateFileError>,
    target: Option<&Fingerprint>,
    device: &DeviceFacts,
) -> Result<Base, FullWhy> {
    let Some(target) = target else {
        return Err(FullWhy::new(
            "no_target",
            "there is no earlier backup at the target",
        ));
    };
    let sidecar = match sidecar {
        Ok(Some(sidecar)) => sidecar,
        Ok(None) => {
            return Err(FullWhy::new(
                "no_sidecar",
                "nothing says what the target is: it has no sidecar",
            ));
        }
        Err(error @ StateFileError::Version { .. }) => {
            return Err(FullWhy::new("sidecar_version", error.to_string()));
        }
        Err(error @ StateFileError::Damaged { .. }) => {
            return Err(FullWhy::new("sidecar_damaged", error.to_string()));
        }
        Err(error @ StateFileError::Io { .. }) => {
            return Err(FullWhy::new("sidecar_unreadable", error.to_string()));
        }
    };
    let (base, written) = match &sidecar.state {
        SidecarState::Writing { .. } => {
            return Err(FullWhy::new("unfinished", "the last backup was not finished"));
        }
        SidecarState::Stopped { base, target } | SidecarState::Complete { base, target } => (base, target),
    };
    same_file(written, target)?;
    if sidecar.device.capacity != device.capacity {
        let (old, new) = (sidecar.device.capacity, device.capacity);
        return Err(FullWhy::new(
            "capacity_changed",
            format!("the device had {old} bytes and has {new} now"),
        ));
    }
    same_generation(sidecar, *base, device)?;
    Ok(*base)
}

fn same_file(written: &Fingerprint, now: &Fingerprint) -> Result<(), FullWhy> {
    if written.length != now.length {
        let (old, new) = (written.length, now.length);
        return Err(FullWhy::new(
            "target_length",
            format!("the target had {old} bytes and has {new} now"),
        ));
    }
    if written.inode != now.inode {
        return Err(FullWhy::new(
            "target_replaced",
            "the target is another file than the one written",
        ));
    }
    if written != now {
        return Err(FullWhy::new(
            "target_modified",
            "the target was written by somebody else since",
        ));
    }
    Ok(())
}

fn same_generation(sidecar: &Sidecar, base: Base, device: &DeviceFacts) -> Result<(), FullWhy> {
    let map = &device.map;
    if let Some(reason) = map.corrupted {
        return Err(FullNeeded::from(FullReason::Corrupted(reason)).into());
    }
    if base.generation != map.generation {
        let mut why = FullWhy::from(FullNeeded::from(FullReason::GenerationEnded {
            base: base.generation,
            current: map.generation,
            began: map.began,
        }));
        if sidecar.device.path != device.path {
            let (old, new) = (sidecar.device.path.display(), device.path.display());
            why.text = format!("the target was made from {old}, not {new}: {}", why.text);
        }
        return Err(why);
    }
    if base.number > map.changes_number {
        return Err(FullNeeded::from(FullReason::FutureNumber {
            base: base.number,
            number: map.changes_number,
        })
        .into());
    }
    if sidecar.block_size != map.block_size {
        let (old, new) = (sidecar.block_size, map.block_size);
        return Err(FullWhy::new(
            "block_size",
            format!("the tracking block size was {old} bytes and is {new} now"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backup::sidecar::SidecarDevice;
    use crate::cbt::ResetReason;
    use crate::units::{DeviceId, Generation};
    use uuid::Uuid;

    const TARGET: Fingerprint = Fingerprint {
        length: 1 << 30,
        inode: 7,
        modified_seconds: 100,
        modified_nanoseconds: 5,
    };

    fn base(generation: u128, number: u8) -> Base {
        Base {
            generation: Generation::new(Uuid::from_u128(generation)),
            number,
        }
    }

    fn sidecar() -> Sidecar {
        Sidecar {
            device: SidecarDevice {
                path: "/dev/sda1".into(),
                name: "sda1".to_owned(),
                id: DeviceId { major: 8, minor: 1 },
                capacity: 1 << 30,
            },
            block_size: 65_536,
            state: SidecarState::Complete {
                base: base(1, 4),
                target: TARGET,
            },
        }
    }

    fn device() -> DeviceFacts {
        DeviceFacts {
            path: "/dev/sda1".into(),
            capacity: 1 << 30,
            map: CbtInfo {
                device_capacity: 1 << 30,
                block_size: 65_536,
                block_count: 1 << 14,
                generation: base(1, 0).generation,
                changes_number: 4,
                dirty_blocks: 9,
                began: ResetReason::NewAttach,
                corrupted: None,
            },
        }
    }

    fn code(
        sidecar: Result<Option<Sidecar>, StateFileError>,
        target: Option<Fingerprint>,
        device: &DeviceFacts,
    ) -> &'static str {
        match plan(true, &sidecar, target.as_ref(), device) {
            Plan::Full { why } => {
                assert!(!why.text.is_empty() && !why.text.contains('\n'));
                why.code
            }
            Plan::Incremental { base: found } => {
                assert_eq!(found, base(1, 4));
                "incremental"
            }
        }
    }

    #[test]
    fn an_unbroken_chain_is_incremental() {
        assert_eq!(code(Ok(Some(sidecar())), Some(TARGET), &device()), "incremental");
        let mut later = device();
        later.map.changes_number = 254;
        later.path = "/dev/sdb1".into();
        assert_eq!(code(Ok(Some(sidecar())), Some(TARGET), &later), "incremental");
        let mut stopped = sidecar();
        stopped.state = SidecarState::Stopped {
            base: base(1, 4),
            target: TARGET,
        };
        assert_eq!(code(Ok(Some(stopped)), Some(TARGET), &device()), "incremental");
    }

    #[test]
    fn full_when_asked_for() {
        let Plan::Full { why } = plan(false, &Ok(Some(sidecar())), Some(&TARGET), &device()) else {
            panic!("incremental although not asked for");
        };
        assert_eq!(why, FullWhy::requested());
    }

    #[test]
    fn every_broken_link_is_full_and_says_which() {
        let path = || "/x".into();
        let error = |error| code(Err(error), Some(TARGET), &device());
        assert_eq!(
            error(StateFileError::Damaged {
                path: path(),
                why: "cut".to_owned()
            }),
            "sidecar_damaged"
        );
        let found = "\"blksnap-backup\" version 9".to_owned();
        let format = crate::backup::sidecar::FORMAT;
        assert_eq!(
            error(StateFileError::Version {
                path: path(),
                found,
                format
            }),
            "sidecar_version"
        );
        let source = std::io::ErrorKind::PermissionDenied.into();
        assert_eq!(
            error(StateFileError::Io {
                action: "open",
                path: path(),
                source
            }),
            "sidecar_unreadable"
        );
        assert_eq!(code(Ok(None), Some(TARGET), &device()), "no_sidecar");
        assert_eq!(code(Ok(Some(sidecar())), None, &device()), "no_target");

        let mut writing = sidecar();
        writing.state = SidecarState::Writing { full: false };
        assert_eq!(code(Ok(Some(writing)), Some(TARGET), &device()), "unfinished");

        for (target, want) in [
            (Fingerprint { length: 5, ..TARGET }, "target_length"),
            (Fingerprint { inode: 5, ..TARGET }, "target_replaced"),
            (
                Fingerprint {
                    modified_nanoseconds: 6,
                    ..TARGET
                },
                "target_modified",
            ),
        ] {
            assert_eq!(code(Ok(Some(sidecar())), Some(target), &device()), want);
        }

        let with = |change: fn(&mut DeviceFacts)| {
            let mut device = device();
            change(&mut device);
            code(Ok(Some(sidecar())), Some(TARGET), &device)
        };
        assert_eq!(with(|d| d.capacity += 512), "capacity_changed");
        assert_eq!(
            with(|d| d.map.corrupted = Some(ResetReason::RunMissed)),
            "run_missed"
        );
        assert_eq!(
            with(|d| d.map.generation = base(2, 0).generation),
            "generation_ended"
        );
        assert_eq!(with(|d| d.map.changes_number = 3), "future_number");
        assert_eq!(with(|d| d.map.block_size = 4096), "block_size");
        assert_eq!(
            with(|d| {
                d.map.generation = base(2, 0).generation;
                d.map.began = ResetReason::Wrapped;
            }),
            "wrapped"
        );
    }
}

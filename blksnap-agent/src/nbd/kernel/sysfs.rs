//! Sysfs: the NBD devices of the kernel, and which of them are ours.
//!
//! `/sys/block/nbdN` is there for every device; `pid` only while it is connected, `backend` only when one was given
//! at the connection (drivers/block/nbd.c).

use std::fs;
use std::path::PathBuf;

use super::backend::Backend;

/// Bytes of the unit of `size`.
const SECTOR: u64 = 512;

/// An NBD device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// N of `/dev/nbdN`.
    pub index: u32,
    /// Size in bytes; 0 while it is not connected.
    pub size: u64,
    /// Refuses writes.
    pub read_only: bool,
    /// Whether it is connected. Its connections may be dead, or it was ended and somebody still has it open.
    pub connected: bool,
    /// What it is connected to, if that is ours.
    pub backend: Option<Backend>,
}

/// The kernel's block devices, `/sys/block` but in tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sysfs {
    root: PathBuf,
}

impl Default for Sysfs {
    fn default() -> Self {
        Self::under("/sys/block")
    }
}

impl Sysfs {
    /// Devices below `root`.
    pub fn under(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// All NBD devices, ascending.
    #[must_use]
    pub fn devices(&self) -> Vec<Known> {
        let Ok(entries) = fs::read_dir(&self.root) else {
            return Vec::new();
        };
        let mut indices: Vec<u32> = entries
            .filter_map(|entry| {
                entry
                    .ok()?
                    .file_name()
                    .to_str()?
                    .strip_prefix("nbd")?
                    .parse()
                    .ok()
            })
            .collect();
        indices.sort_unstable();
        indices
            .into_iter()
            .filter_map(|index| self.device(index))
            .collect()
    }

    /// The device `/dev/nbdN`; `None` if the kernel has none.
    #[must_use]
    pub fn device(&self, index: u32) -> Option<Known> {
        let folder = self.root.join(format!("nbd{index}"));
        let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
        let sectors: u64 = read("size")?.trim().parse().ok()?;
        let connected = folder.join("pid").exists();
        Some(Known {
            index,
            size: sectors.saturating_mul(SECTOR),
            read_only: read("ro").is_some_and(|text| text.trim() == "1"),
            connected,
            backend: read("backend")
                .filter(|_| connected)
                .and_then(|text| text.parse().ok()),
        })
    }

    /// The connected devices of ours that show this export of any server.
    #[must_use]
    pub fn of_export(&self, export: &str) -> Vec<Known> {
        let mut devices = self.devices();
        devices.retain(|device| {
            device
                .backend
                .as_ref()
                .is_some_and(|backend| backend.export == export)
        });
        devices
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = "blksnap connections=2 timeout=30 dead-timeout=60 server=/run/s export=id/sdb1\n";

    #[test]
    fn devices_are_told_apart_by_their_backend() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let device = |name: &str, files: &[(&str, &str)]| {
            fs::create_dir(root.join(name)).unwrap();
            for (file, text) in files {
                fs::write(root.join(name).join(file), text).unwrap();
            }
        };
        device("sda", &[("size", "1\n")]);
        device(
            "nbd10",
            &[("size", "16\n"), ("ro", "1\n"), ("pid", "7\n"), ("backend", OURS)],
        );
        device(
            "nbd2",
            &[
                ("size", "8\n"),
                ("ro", "0\n"),
                ("pid", "8\n"),
                ("backend", "another\n"),
            ],
        );
        device("nbd0", &[("size", "0\n"), ("ro", "0\n"), ("backend", OURS)]);
        let sysfs = Sysfs::under(root);
        let found = sysfs.devices();
        let indices: Vec<u32> = found.iter().map(|device| device.index).collect();
        assert_eq!(indices, [0, 2, 10]);
        assert!(!found[0].connected && found[0].backend.is_none());
        assert!(found[1].connected && found[1].backend.is_none());
        let mut shown = sysfs.of_export("id/sdb1");
        let ours = shown.remove(0);
        assert!(shown.is_empty());
        assert_eq!((ours.index, ours.size, ours.read_only), (10, 8192, true));
        assert_eq!(ours.backend.unwrap().connections, 2);
        assert!(sysfs.of_export("id/sdc").is_empty());
        assert!(Sysfs::under("/nonexistent").devices().is_empty());
    }
}

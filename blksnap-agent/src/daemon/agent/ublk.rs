//! Served devices as block devices: made, found again, left for the next daemon.
//!
//! What is known of one is in the state directory of its disk. It is found again after the snapshots of the disk go on,
//! as writes come at once.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::super::errors::Tell as _;
use super::Agent;
use super::served::ServedList;
use crate::control::error::ApiError;
use crate::disk::device::device_number;
use crate::filter::served::Served;
use crate::own::Candidate;
use crate::statefile::{self, Format, StateFileError};
use crate::ublk::{Device, Left, UblkError};

const FORMAT: Format = Format {
    name: "blksnap-ublk-device",
    version: 1,
};

/// The block devices, by the name of the served device.
#[derive(Debug, Default)]
pub(super) struct UblkList(Mutex<BTreeMap<String, Arc<Device>>>);

impl UblkList {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Device>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Path of a block device.
    pub(super) fn node(&self, name: &str) -> Option<String> {
        Some(self.lock().get(name)?.node().display().to_string())
    }

    /// All of them, as the kernel numbers them.
    pub(super) fn nodes(&self) -> Vec<Candidate> {
        let nodes: Vec<_> = {
            let list = self.lock();
            let node = |(name, device): (&String, &Arc<Device>)| (name.clone(), device.node());
            list.iter().map(node).collect()
        };
        let candidate = |(name, node): (String, _)| {
            let number = std::fs::metadata(node).ok()?.rdev();
            Some(Candidate {
                name,
                id: device_number(number),
            })
        };
        nodes.into_iter().filter_map(candidate).collect()
    }
}

/// The served devices, as snapshots see them.
#[derive(Debug)]
pub(super) struct Devices {
    pub(super) served: Arc<ServedList>,
    pub(super) ublk: Arc<UblkList>,
}

impl crate::snapshot::Devices for Devices {
    fn served(&self, name: &str) -> Option<Arc<Served>> {
        self.served.get(name)
    }

    fn nodes(&self) -> Vec<Candidate> {
        self.ublk.nodes()
    }
}

/// An error on the way to a device.
enum Failed {
    Device(UblkError),
    Note(StateFileError),
}

impl From<UblkError> for Failed {
    fn from(error: UblkError) -> Self {
        Self::Device(error)
    }
}

impl Agent {
    /// Makes the block device of a served device, or takes over the one that a daemon before has left.
    pub(super) fn open_ublk(&self, served: &Arc<Served>, action: &str) -> Result<(), ApiError> {
        let path = self.served_directory(served.name()).join("ublk");
        let left = match statefile::read::<Left>(&path, FORMAT) {
            Ok(Some(left)) => left,
            Ok(None) => Left::fresh(),
            Err(error) => {
                tracing::error!(%error, "a block device that was served is not found again; a new one is made");
                Left::fresh()
            }
        };
        let note = |left: &Left| statefile::write(&path, FORMAT, left).map_err(Failed::Note);
        let device = Device::open(Arc::clone(served), &left, note).map_err(|failed| match failed {
            Failed::Device(error) => error.tell(action),
            Failed::Note(error) => error.tell(action),
        })?;
        self.ublk
            .lock()
            .insert(served.name().to_owned(), Arc::new(device));
        Ok(())
    }

    /// Ends the block device of a served device, if it has one that nobody uses.
    pub(super) fn remove_ublk(&self, name: &str, action: &str) -> Result<(), ApiError> {
        let Some(device) = self.ublk.lock().get(name).cloned() else {
            return Ok(());
        };
        device.check_unused().map_err(|error| error.tell(action))?;
        device.remove().map_err(|error| error.tell(action))?;
        self.ublk.lock().remove(name);
        Ok(())
    }

    /// Ends the block device of a disk that is not served any more, and for which requests may wait.
    pub(super) fn give_up_ublk(&self, name: &str, action: &str) -> Result<(), ApiError> {
        let path = self.served_directory(name).join("ublk");
        match statefile::read::<Left>(&path, FORMAT) {
            Ok(Some(left)) => Device::give_up(&left).map_err(|error| error.tell(action)),
            Ok(None) => Ok(()),
            Err(error) => Err(error.tell(action)),
        }
    }

    /// Ends the block devices that nobody uses, and leaves the others for the next daemon: their requests wait.
    pub(super) fn end_ublk(&self) {
        let devices: Vec<_> = self.ublk.lock().values().cloned().collect();
        for device in devices {
            if let Err(error) = device.check_unused() {
                tracing::warn!(%error, "a block device stays, and its requests wait for the next daemon");
                device.leave();
            } else if let Err(error) = device.remove() {
                tracing::warn!(%error, "a block device stays");
                device.leave();
            }
        }
    }
}

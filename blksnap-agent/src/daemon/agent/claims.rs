//! Claims: who works on a device at the moment.
//!
//! Takes and backups of one device may run at the same time. A detach would end the tracking under them, so it
//! waits for nobody and is refused instead.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::units::DeviceId;

/// Why a device is claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Take,
    Backup,
    Detach,
}

impl Purpose {
    /// Nobody else may have a claim beside it.
    const fn exclusive(self) -> bool {
        matches!(self, Self::Detach)
    }
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Take => "a snapshot of it is being taken",
            Self::Backup => "a backup of it is being made",
            Self::Detach => "it is being detached",
        })
    }
}

/// A device is claimed already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Claimed {
    pub(super) device: DeviceId,
    pub(super) purpose: Purpose,
}

/// The claims of a process.
#[derive(Clone, Debug, Default)]
pub(super) struct Claims(Arc<Mutex<HashMap<DeviceId, Vec<Purpose>>>>);

impl Claims {
    /// Claims all `devices`, or none of them where one is claimed in a way that excludes this.
    pub(super) fn claim(&self, devices: &[DeviceId], purpose: Purpose) -> Result<Claim, Claimed> {
        let mut claims = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for device in devices {
            let others = claims.get(device).map_or(&[][..], Vec::as_slice);
            if let Some(other) = others
                .iter()
                .find(|other| other.exclusive() || purpose.exclusive())
            {
                return Err(Claimed {
                    device: *device,
                    purpose: *other,
                });
            }
        }
        for device in devices {
            claims.entry(*device).or_default().push(purpose);
        }
        Ok(Claim {
            claims: self.clone(),
            devices: devices.to_vec(),
            purpose,
        })
    }
}

/// Claimed devices, until it is dropped.
#[derive(Debug)]
pub(super) struct Claim {
    claims: Claims,
    devices: Vec<DeviceId>,
    purpose: Purpose,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claims = self.claims.0.lock().unwrap_or_else(PoisonError::into_inner);
        for device in &self.devices {
            let Some(list) = claims.get_mut(device) else {
                continue;
            };
            if let Some(at) = list.iter().position(|purpose| *purpose == self.purpose) {
                list.swap_remove(at);
            }
            if list.is_empty() {
                claims.remove(device);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(minor: u32) -> DeviceId {
        DeviceId { major: 7, minor }
    }

    #[test]
    fn takes_and_backups_share_a_device_and_a_detach_does_not() {
        let claims = Claims::default();
        let take = claims.claim(&[device(1), device(2)], Purpose::Take).unwrap();
        let backup = claims.claim(&[device(2)], Purpose::Backup).unwrap();
        assert_eq!(
            claims
                .claim(&[device(3), device(2)], Purpose::Detach)
                .unwrap_err(),
            Claimed {
                device: device(2),
                purpose: Purpose::Take
            }
        );
        drop(take);
        assert_eq!(
            claims.claim(&[device(2)], Purpose::Detach).unwrap_err().purpose,
            Purpose::Backup
        );
        drop(backup);
        let detach = claims.claim(&[device(1), device(2)], Purpose::Detach).unwrap();
        assert!(claims.claim(&[device(3), device(1)], Purpose::Take).is_err());
        // All or none: device 3 is free.
        drop(claims.claim(&[device(3)], Purpose::Detach).unwrap());
        drop(detach);
        assert!(claims.0.lock().unwrap().is_empty());
    }
}

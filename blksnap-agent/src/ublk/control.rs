//! Control: what is asked of the driver through `/dev/ublk-control`.
//!
//! libublk takes a signal that comes while it waits for the end of a command, which the driver writes its answer to,
//! and a ring of the thread's own. So each command has a thread of its own, without signals.

use std::io;
use std::path::Path;

use libublk::UblkFlags;
use libublk::ctrl::UblkCtrl;
use libublk::io::UblkDev;
use libublk::sys;
use nix::errno::Errno;
use nix::sys::signal::SigSet;

use super::geometry::Geometry;
use super::{CONTROL, UblkError};

/// Requests in flight.
pub(super) const DEPTH: u16 = 128;
/// Bytes of the longest read or write; what is longer comes in pieces.
const LONGEST: u32 = 512 << 10;
/// Bytes of the longest discard or write of zeroes: a snapshot may have to keep all of it first.
const LONGEST_DISCARD: u32 = 64 << 20;

/// What devices need of the driver, and where that comes from.
const NEEDED: [(u32, &str); 3] = [
    (sys::UBLK_F_USER_RECOVERY, "user recovery"),
    (sys::UBLK_F_USER_RECOVERY_REISSUE, "reissue at recovery"),
    (sys::UBLK_F_USER_COPY, "user copy"),
];

/// What the driver says of a device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    /// The number by which its maker knows it.
    pub(super) token: u64,
    /// It was made and never started, or was stopped.
    pub(super) dead: bool,
}

/// Calls libublk in a thread that gets no signal.
fn quiet<T: Send>(call: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let called = scope.spawn(|| {
            // A thread that can't block signals still works, unless one comes.
            let _ = SigSet::all().thread_block();
            call()
        });
        match called.join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// The same, with the ring that commands of a device that is known go through.
fn command<T: Send>(
    action: &str,
    number: u32,
    call: impl FnOnce() -> Result<T, libublk::UblkError> + Send,
) -> Result<T, UblkError> {
    quiet(|| {
        libublk::ublk_init_ctrl_task_ring(|ring| {
            if ring.is_none() {
                *ring = Some(io_uring::IoUring::builder().build(4)?);
            }
            Ok(())
        })?;
        call()
    })
    .map_err(|error| refused(format!("{action} ublk device {number}"), error))
}

fn refused(action: impl Into<String>, error: libublk::UblkError) -> UblkError {
    UblkError::Driver {
        action: action.into(),
        source: source_of(error),
    }
}

/// libublk gives error numbers as the kernel does, below 0.
pub(super) fn source_of(error: libublk::UblkError) -> io::Error {
    use libublk::UblkError as E;
    match error {
        E::IOError(error) => error,
        E::OtherError(code) | E::UringIOError(code) => io::Error::from_raw_os_error(code.saturating_neg()),
        other => io::Error::other(other.to_string()),
    }
}

/// Whether devices can be made.
///
/// # Errors
/// The driver is missing or too old.
pub fn available() -> Result<(), UblkError> {
    if !Path::new(CONTROL).exists() {
        return Err(UblkError::NoDriver);
    }
    let features = quiet(UblkCtrl::get_features).unwrap_or(0);
    match NEEDED.iter().find(|(bit, _)| features & u64::from(*bit) == 0) {
        Some((_, name)) => Err(UblkError::Lacks(name)),
        None => Ok(()),
    }
}

/// What is known of the device with a number; `None` if there is none.
pub(super) fn look(number: u32) -> Result<Option<Known>, UblkError> {
    match command("look at", number, || UblkCtrl::new_simple(id(number)?)) {
        Ok(control) => {
            let info = control.dev_info();
            Ok(Some(Known {
                token: info.ublksrv_flags,
                dead: u32::from(info.state) == sys::UBLK_S_DEV_DEAD,
            }))
        }
        Err(UblkError::Driver { source, .. }) if source.raw_os_error() == Some(Errno::ENODEV as i32) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn id(number: u32) -> Result<i32, libublk::UblkError> {
    i32::try_from(number).map_err(|_| libublk::UblkError::InvalidVal)
}

/// A device that the driver knows. Dropped, it stays there.
pub(super) struct Control {
    number: u32,
    inner: UblkCtrl,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Control")
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

impl Control {
    /// Makes a device, with the number that is wanted if that is free.
    pub(super) fn add(wanted: Option<u32>, token: u64) -> Result<Self, UblkError> {
        let flags = NEEDED.iter().fold(0, |flags, (bit, _)| flags | u64::from(*bit));
        let new = |id| {
            quiet(|| {
                UblkCtrl::new(
                    Some("blksnap".to_owned()),
                    id,
                    1,
                    u32::from(DEPTH),
                    LONGEST,
                    flags,
                    token,
                    UblkFlags::UBLK_DEV_F_ADD_DEV,
                )
            })
        };
        let wanted = wanted.and_then(|number| i32::try_from(number).ok());
        let made = match wanted.map(new) {
            Some(Ok(made)) => Ok(made),
            // Somebody has the number.
            _ => new(-1),
        };
        let inner = made.map_err(|error| refused("make a ublk device", error))?;
        // Or it is removed with this value.
        inner.disown();
        let number = inner.dev_info().dev_id;
        Ok(Self { number, inner })
    }

    /// Takes over a device that an agent before has left: its requests wait from now on for this one. Waits half a
    /// minute for the agent before to be wholly gone.
    pub(super) fn recover(number: u32) -> Result<Self, UblkError> {
        let action = "take over";
        let inner = command(action, number, || {
            let inner = UblkCtrl::new(
                Some("blksnap".to_owned()),
                id(number)?,
                0,
                0,
                0,
                0,
                0,
                UblkFlags::UBLK_DEV_F_RECOVER_DEV,
            )?;
            match inner.start_user_recover()? {
                code if code < 0 => Err(libublk::UblkError::OtherError(code)),
                _ => Ok(inner),
            }
        })?;
        Ok(Self { number, inner })
    }

    pub(super) const fn number(&self) -> u32 {
        self.number
    }

    /// Bytes of the longest read or write.
    pub(super) fn longest(&self) -> usize {
        usize::try_from(self.inner.dev_info().max_io_buf_bytes).unwrap_or(0)
    }

    /// Opens its character device, with the sizes that it is to have if it is new.
    pub(super) fn open(&self, geometry: &Geometry) -> Result<UblkDev, UblkError> {
        let params = params(geometry);
        let name = "blksnap".to_owned();
        command("open", self.number, || {
            UblkDev::new(
                name,
                |device| {
                    device.tgt.dev_size = geometry.size;
                    device.tgt.params = params;
                    // One more for what wakes the thread.
                    device.tgt.sq_depth = device.dev_info.queue_depth.saturating_mul(2);
                    device.tgt.cq_depth = device.dev_info.queue_depth.saturating_mul(2);
                    Ok(())
                },
                &self.inner,
            )
        })
    }

    /// Starts it, or ends the recovery: requests come from now on. The queue must be waiting for them.
    pub(super) fn start(&self, device: &UblkDev) -> Result<(), UblkError> {
        command("start", self.number, || match self.inner.start_dev(device)? {
            code if code < 0 => Err(libublk::UblkError::OtherError(code)),
            _ => Ok(()),
        })
    }

    /// Bytes of the device, as the driver has them.
    pub(super) fn size(&self) -> Result<u64, UblkError> {
        let mut params = sys::ublk_params::default();
        command("ask for the size of", self.number, || {
            self.inner.get_params(&mut params)
        })?;
        Ok(params.basic.dev_sectors.saturating_mul(512))
    }

    /// Ends the block device, after what was written to it has gone through the queue. What comes later fails.
    pub(super) fn stop(&self) -> Result<(), UblkError> {
        command("stop", self.number, || self.inner.stop_dev()).map(drop)
    }

    /// Removes what is left of a stopped device; its number is free when the last user of it is gone.
    pub(super) fn delete(&self) -> Result<(), UblkError> {
        command("remove", self.number, || match self.inner.del_dev_async() {
            // Before Linux 6.9 there is only the kind that waits.
            Err(_) => self.inner.del_dev(),
            deleted => deleted,
        })
        .map(drop)
    }
}

/// Removes a device that was made and never started.
pub(super) fn discard(number: u32) -> Result<(), UblkError> {
    let inner = command("look at", number, || UblkCtrl::new_simple(id(number)?))?;
    Control { number, inner }.delete()
}

/// Ends a device that nobody serves.
pub(super) fn give_up(number: u32) -> Result<(), UblkError> {
    let inner = command("look at", number, || UblkCtrl::new_simple(id(number)?))?;
    let control = Control { number, inner };
    control.stop()?;
    control.delete()
}

/// What the driver is told of a device.
fn params(geometry: &Geometry) -> sys::ublk_params {
    // All are powers of two below 2^32.
    let shift = |bytes: u32| u8::try_from(bytes.trailing_zeros()).unwrap_or(0);
    sys::ublk_params {
        types: sys::UBLK_PARAM_TYPE_BASIC | sys::UBLK_PARAM_TYPE_DISCARD,
        basic: sys::ublk_param_basic {
            // The disk is behind a page cache: durable is what was flushed.
            attrs: sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA,
            logical_bs_shift: shift(geometry.logical),
            physical_bs_shift: shift(geometry.physical),
            io_min_shift: shift(geometry.minimum),
            io_opt_shift: shift(geometry.minimum),
            max_sectors: LONGEST / 512,
            dev_sectors: geometry.size / 512,
            ..Default::default()
        },
        discard: sys::ublk_param_discard {
            discard_granularity: geometry.physical,
            max_discard_sectors: LONGEST_DISCARD / 512,
            max_write_zeroes_sectors: LONGEST_DISCARD / 512,
            max_discard_segments: 1,
            ..Default::default()
        },
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_is_told_the_sizes() {
        let geometry = Geometry {
            size: 1 << 30,
            logical: 512,
            physical: 4096,
            minimum: 65536,
        };
        let params = params(&geometry);
        let basic = params.basic;
        assert_eq!(
            (
                basic.logical_bs_shift,
                basic.physical_bs_shift,
                basic.io_min_shift
            ),
            (9, 12, 16)
        );
        assert_eq!(basic.dev_sectors, 1 << 21);
        assert_eq!(basic.attrs, sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA);
        // The driver takes a discard of one piece only, and wants a granularity.
        assert_eq!(params.discard.max_discard_segments, 1);
        assert_eq!(params.discard.discard_granularity, 4096);
    }

    #[test]
    fn errors_keep_their_numbers() {
        let busy = source_of(libublk::UblkError::UringIOError(-libc::EBUSY));
        assert_eq!(busy.raw_os_error(), Some(libc::EBUSY));
        let missing = source_of(libublk::UblkError::IOError(io::ErrorKind::NotFound.into()));
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }
}

//! Image backup: a snapshot's image is copied to the target. Nothing changes meanwhile.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::plan::{DeviceFacts, Plan};
use super::report::{Mode, Report};
use super::session::Session;
use super::sidecar::SidecarDevice;
use super::sparse::SparseImage;
use super::{BackupError, Target};
use crate::cbt::{Base, FullNeeded, ReadMap};
use crate::engine::{CancelToken, Copier, Job, Method, Phase, Progress, Sink as _};
use crate::filter::converge::Consistency;
use crate::units::Extent;

/// An image of a device as it was at a take.
#[derive(Clone, Copy, Debug)]
pub struct ImageSource<'a> {
    /// The device.
    pub device: &'a SidecarDevice,
    /// The image, as long as the device.
    pub image: &'a File,
    /// The device's map at the take.
    pub read_map: &'a Arc<ReadMap>,
    /// What the image is as good as.
    pub consistency: Consistency,
    /// How long file systems were frozen for the take.
    pub frozen: Duration,
}

/// Who listens to a backup, and who may stop it.
#[derive(Clone, Copy)]
pub struct Control<'a> {
    /// Listens.
    pub progress: &'a dyn Progress,
    /// Stops.
    pub cancel: &'a CancelToken,
}

/// Writes the image to the file at `target`, if `incremental` only what changed since the take that it shows.
/// `check` may refuse the target.
///
/// # Errors
/// The target can't be used or written, the image not read, or it was stopped. The image stays as it is. A target
/// made for this is removed; another one is marked as unfinished, or as good for one more incremental backup.
pub fn from_image<E>(
    source: ImageSource<'_>,
    target: &Path,
    incremental: bool,
    check: impl FnOnce(&Target) -> Result<(), E>,
    control: Control<'_>,
) -> Result<Report, BackupError>
where
    BackupError: From<E>,
{
    let began = Instant::now();
    let length = image_length(source)?;
    let session = Session::open(target, check)?;
    match write(source, &session, length, incremental, control) {
        Ok((mode, bytes_copied)) => Ok(Report {
            mode,
            device: source.device.path.clone(),
            target: session.path().to_owned(),
            bytes_copied,
            bytes_total: length,
            taken: source.read_map.base(),
            consistency: source.consistency,
            frozen_ms: source.frozen.as_secs_f64() * 1000.0,
            rounds: 0,
            seconds: began.elapsed().as_secs_f64(),
        }),
        Err(error) => {
            session.abandon();
            Err(error)
        }
    }
}

fn write(
    source: ImageSource<'_>,
    session: &Session,
    length: u64,
    incremental: bool,
    control: Control<'_>,
) -> Result<(Mode, u64), BackupError> {
    let ImageSource { device, read_map, .. } = source;
    let facts = DeviceFacts {
        path: device.path.clone(),
        capacity: device.capacity,
        map: read_map.info(),
    };
    let reason = match session.plan(incremental, &facts) {
        Plan::Full { why } => why,
        Plan::Incremental { base: since } => match write_changed(source, session, since, control)? {
            Ok(bytes) => return Ok((Mode::Incremental { since }, bytes)),
            Err(full) => full.into(),
        },
    };
    let block_size = facts.map.block_size;
    session.start(device, block_size, true)?;
    let all = Extent { offset: 0, length };
    copy(source, session, [all].into_iter(), length, true, control)?;
    session.complete(device, block_size, read_map.base())?;
    Ok((Mode::Full { reason }, length))
}

/// Writes what changed since `since`, or says why that is not enough.
fn write_changed(
    source: ImageSource<'_>,
    session: &Session,
    since: Base,
    control: Control<'_>,
) -> Result<Result<u64, FullNeeded>, BackupError> {
    let ImageSource { device, read_map, .. } = source;
    let block_size = read_map.block_size().bytes();
    let changed = match read_map.changed_since(&since) {
        Ok(changed) => changed,
        Err(full) => return Ok(Err(full)),
    };
    let total = changed.total_bytes();
    session.start(device, block_size, false)?;
    if let Err(error) = copy(source, session, changed, total, false, control) {
        // The error to tell is the first one; where this one fails too, the target stays unfinished.
        let _ = session.stop(device, block_size, since);
        return Err(error);
    }
    // Doubt may have come up while this was copied.
    if let Err(full) = read_map.changed_since(&since) {
        return Ok(Err(full));
    }
    session.complete(device, block_size, read_map.base())?;
    Ok(Ok(total))
}

fn copy(
    source: ImageSource<'_>,
    session: &Session,
    extents: impl Iterator<Item = Extent>,
    total: u64,
    fresh: bool,
    control: Control<'_>,
) -> Result<(), BackupError> {
    let Control { progress, cancel } = control;
    let done = AtomicU64::new(0);
    let step = |bytes| {
        let before = done.fetch_add(bytes, Ordering::Relaxed);
        progress.update(Phase::Copying, before + bytes, total);
    };
    step(0);
    let name = format!("the image of {}", source.device.path.display());
    let image = SparseImage::new(source.image, name, source.device.capacity);
    let (data, holes) = image.split(extents).map_err(|error| BackupError::Image {
        device: source.device.path.clone(),
        source: error,
    })?;
    let sink = session.sink(fresh)?;
    for hole in holes {
        sink.zero_at(hole.offset, hole.length)
            .map_err(|error| session.write_failed(error))?;
        step(hole.length);
    }
    let job = Job {
        source: &image,
        sink: &sink,
        extents: &data,
    };
    Copier::new(Method::Auto).copy(&[job], cancel, &step)?;
    Ok(())
}

/// The image's length, which has to be the device's.
fn image_length(source: ImageSource<'_>) -> Result<u64, BackupError> {
    let capacity = source.device.capacity;
    let metadata = source.image.metadata().map_err(|error| BackupError::Image {
        device: source.device.path.clone(),
        source: error,
    })?;
    if metadata.len() == capacity && source.read_map.capacity().bytes() == capacity {
        Ok(capacity)
    } else {
        Err(BackupError::ImageLength {
            device: source.device.path.clone(),
            found: metadata.len(),
            capacity,
        })
    }
}

#[cfg(test)]
mod tests;

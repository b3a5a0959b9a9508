//! Backups: of live devices and of images.

use std::path::Path;
use std::time::Instant;

use super::super::errors::Tell as _;
use super::snapshots::{consistency, listen, take_options};
use super::{Agent, Purpose};
use crate::backup::{self, BackupError, Control, ImageSource, Mode, Report, SidecarDevice, Taking};
use crate::control::api;
use crate::control::error::{ApiError, Code};
use crate::control::stream::Reporter;
use crate::snapshot::{Content, MemberId};
use crate::units::SnapshotId;

impl Agent {
    pub(super) fn make_backup(
        &self,
        request: &api::Backup,
        reporter: &Reporter,
    ) -> Result<api::BackupResult, ApiError> {
        let action = format!("back up {}", request.device);
        if !Path::new(&request.target).is_absolute() {
            return Err(ApiError::new(
                Code::InvalidRequest,
                format!("{action} to {}: not an absolute path", request.target),
                "give the whole path of a file",
            ));
        }
        match request.snapshot {
            Some(id) => self.backup_of_image(id, request, &action, reporter),
            None => self.backup_of_device(request, &action, reporter),
        }
    }

    fn backup_of_device(
        &self,
        request: &api::Backup,
        action: &str,
        reporter: &Reporter,
    ) -> Result<api::BackupResult, ApiError> {
        let options = take_options(&request.limits, action)?;
        let ensured = self.ensure_tracked(&request.device, Purpose::Backup, "back up")?;
        // A device that was resized begins anew first.
        let device = self
            .tracker
            .device_for_take(ensured.device.device().id)
            .map_err(|error| error.tell(action))?;
        let (progress, cancel, _guard) = listen(reporter);
        let made = backup::from_device(
            &device,
            Path::new(&request.target),
            request.incremental,
            Taking {
                limits: &options.limits,
                hook: options.hook.as_deref(),
            },
            Control {
                progress: &*progress,
                cancel: &cancel,
            },
        );
        let report = made.map_err(|error| {
            self.takes.failed();
            tracing::warn!(device = %request.device, %error, "the backup failed");
            error.tell(action)
        })?;
        self.takes
            .succeeded(report.frozen_ms / 1000.0, report.bytes_copied);
        tracing::info!(
            device = %report.device.display(),
            target = %report.target.display(),
            copied = report.bytes_copied,
            frozen_ms = report.frozen_ms,
            "device backed up"
        );
        ensured.keep();
        Ok(told(report, request.incremental))
    }

    fn backup_of_image(
        &self,
        id: SnapshotId,
        request: &api::Backup,
        action: &str,
        reporter: &Reporter,
    ) -> Result<api::BackupResult, ApiError> {
        self.snapshots.info(id).map_err(|error| error.tell(action))?;
        let device = Self::open(&request.device, "back up")?;
        let image = self
            .snapshots
            .image(id, &MemberId::Device(device.id))
            .map_err(|error| error.tell(action))?;
        let (Content::Copy(file), Some(tracked)) = (&image.content, image.member.tracked()) else {
            return Err(ApiError::new(
                Code::Unsupported,
                format!("{action}: the image is no file"),
                "copy it with an NBD client, such as nbdcopy",
            ));
        };
        let (progress, cancel, _guard) = listen(reporter);
        let read_map = image.read_map.as_ref().ok_or_else(|| {
            ApiError::new(
                Code::Corrupted,
                format!("{action}: the change map of snapshot {id} is doubtful"),
                "take another snapshot, or copy the image with an NBD client",
            )
        })?;
        let began = Instant::now();
        let report = backup::from_image(
            ImageSource {
                device: &SidecarDevice::of(tracked),
                image: file,
                read_map,
                consistency: image.consistency,
                frozen: image.frozen,
            },
            Path::new(&request.target),
            request.incremental,
            |target| target.check_not_on(tracked),
            Control {
                progress: &*progress,
                cancel: &cancel,
            },
        )
        .map_err(|error: BackupError| error.tell(action))?;
        tracing::info!(snapshot = %id, target = %report.target.display(), took = ?began.elapsed(), "image backed up");
        Ok(told(report, request.incremental))
    }
}

fn told(report: Report, incremental: bool) -> api::BackupResult {
    api::BackupResult {
        device: report.device.display().to_string(),
        target: report.target.display().to_string(),
        kind: match report.mode {
            Mode::Incremental { since } => api::BackupKind::Incremental { base: since },
            Mode::Full { reason } => api::BackupKind::Full {
                reason: incremental.then(|| reason.code.to_owned()),
                message: incremental.then_some(reason.text),
            },
        },
        size: report.bytes_total,
        copied_bytes: report.bytes_copied,
        rounds: report.rounds,
        consistency: consistency(report.consistency),
        frozen_seconds: report.frozen_ms / 1000.0,
        seconds: report.seconds,
        taken: report.taken,
    }
}

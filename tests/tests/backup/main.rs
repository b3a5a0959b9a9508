//! Backups of loop devices in use: full and incremental ones against copies made while the device is frozen.

mod ends;
mod in_use;
mod kills;
mod plan;
mod writer;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use blksnap_agent::backup::{self, BackupError, Control, Mode, Report, Sidecar, SidecarState, Taking};
use blksnap_agent::disk::{BlockDevice, WatchdogCommand};
use blksnap_agent::engine::{CancelToken, Progress, Silent};
use blksnap_agent::filter::converge::{FreezeHook, HookError, Limits, Stage};
use blksnap_agent::tracker::{Granularity, TrackedDevice, Tracker, TrackerConfig};
use blksnap_agent::units::BlockSize;
use blksnap_tests::agent_binary;
use tempfile::TempDir;

pub(crate) const MIB: u64 = 1 << 20;

/// Bytes copied at a time.
pub(crate) const PIECE: usize = 1 << 20;

/// Copies the device to a file while everything is frozen.
#[derive(Debug)]
pub(crate) struct CopyAtInstant {
    pub(crate) device: PathBuf,
    pub(crate) copy: PathBuf,
}

impl FreezeHook for CopyAtInstant {
    fn run(&self, stage: Stage, _devices: &[PathBuf], _deadline: Instant) -> Result<(), HookError> {
        if stage == Stage::Frozen {
            let failed = |source| HookError::Start {
                program: self.device.clone(),
                stage: "frozen",
                source,
            };
            copy_direct(&self.device, &self.copy).map_err(failed)?;
        }
        Ok(())
    }
}

/// Copies a device past its page cache.
pub(crate) fn copy_direct(device: &Path, copy: &Path) -> std::io::Result<()> {
    let device = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(device)?;
    let copy = File::create(copy)?;
    let mut memory = vec![0_u8; PIECE + 4096];
    let start = memory.as_ptr().align_offset(4096);
    let buffer = &mut memory[start..start + PIECE];
    let mut offset = 0;
    loop {
        let count = device.read_at(buffer, offset)?;
        if count == 0 {
            return Ok(());
        }
        copy.write_all_at(&buffer[..count], offset)?;
        offset += count as u64;
    }
}

pub(crate) fn same(a: &Path, b: &Path) -> Result<()> {
    let (a_bytes, b_bytes) = (fs::read(a)?, fs::read(b)?);
    ensure!(
        a_bytes.len() == b_bytes.len(),
        "{} and {} bytes",
        a_bytes.len(),
        b_bytes.len()
    );
    let wrong: Vec<usize> = a_bytes
        .chunks(4096)
        .zip(b_bytes.chunks(4096))
        .enumerate()
        .filter(|(_, (a, b))| a != b)
        .map(|(block, _)| block)
        .collect();
    let first = &wrong[..wrong.len().min(10)];
    ensure!(
        wrong.is_empty(),
        "{} blocks of 4 KiB differ, first {first:?}",
        wrong.len()
    );
    Ok(())
}

/// A tracked device and a directory for its backups.
pub(crate) struct Bench {
    // Dropped in this order: the tracker lets go of the device before the device goes.
    pub(crate) device: Arc<TrackedDevice>,
    pub(crate) tracker: Arc<Tracker>,
    pub(crate) directory: TempDir,
    pub(crate) limits: Limits,
}

impl Bench {
    pub(crate) fn new(path: &Path) -> Result<Self> {
        let tracker = Tracker::load(&TrackerConfig::default())?;
        let size = Granularity::Fixed(BlockSize::from_bytes(65536)?);
        let mut limits = Limits {
            max_time: Duration::from_secs(120),
            freeze_limit: Duration::from_secs(60),
            ..Limits::default()
        };
        limits.watchdog = WatchdogCommand {
            program: agent_binary()?,
            ..limits.watchdog
        };
        Ok(Self {
            device: tracker.attach(BlockDevice::open(path)?, size)?,
            tracker,
            directory: tempfile::Builder::new().prefix("blksnap-backup-").tempdir()?,
            limits,
        })
    }

    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn target(&self) -> PathBuf {
        self.at("device.img")
    }

    pub(crate) fn copy(&self) -> PathBuf {
        self.at("instant.img")
    }

    /// Backs up, and copies the device at the instant.
    pub(crate) fn backup(&self, incremental: bool) -> Result<Report> {
        let hook = CopyAtInstant {
            device: self.device.device().path.clone(),
            copy: self.copy(),
        };
        let report = self.backup_to(
            &self.target(),
            incremental,
            Some(&hook),
            &Silent,
            &CancelToken::new(),
        )?;
        Ok(report)
    }

    pub(crate) fn backup_to(
        &self,
        target: &Path,
        incremental: bool,
        hook: Option<&dyn FreezeHook>,
        progress: &dyn Progress,
        cancel: &CancelToken,
    ) -> Result<Report, BackupError> {
        let taking = Taking {
            limits: &self.limits,
            hook,
        };
        let control = Control { progress, cancel };
        backup::from_device(&self.device, target, incremental, taking, control)
    }

    /// Backs up, compares with the copy, and gives the reason of a full backup.
    pub(crate) fn right(&self, incremental: bool) -> Result<String> {
        let report = self.backup(incremental)?;
        same(&self.target(), &self.copy()).with_context(|| format!("{report:?}"))?;
        Ok(kind(&report))
    }

    pub(crate) fn state(&self) -> Result<SidecarState> {
        let path = Sidecar::path_of(&self.target());
        Ok(Sidecar::read(&path)?.context("no sidecar")?.state)
    }
}

pub(crate) fn kind(report: &Report) -> String {
    match &report.mode {
        Mode::Full { reason } => reason.code.to_owned(),
        Mode::Incremental { .. } => "incremental".to_owned(),
    }
}

//! Ends: backups that are cancelled or refused, and targets that are full.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use blksnap_agent::backup::{BackupError, Mode, Sidecar, SidecarState, TargetError};
use blksnap_agent::engine::{CancelToken, Phase, Progress, Silent};
use blksnap_tests::LoopDevice;

use crate::{Bench, MIB, same};

/// Cancels when the copy has begun.
struct CancelWhenCopying(CancelToken);

impl Progress for CancelWhenCopying {
    fn update(&self, phase: Phase, done: u64, _total: u64) {
        if phase == Phase::Copying && done > 0 {
            self.0.cancel();
        }
    }
}

#[test]
fn a_cancelled_backup_goes_on_from_its_base() -> Result<()> {
    let disk = LoopDevice::new(64 * MIB)?;
    let node = OpenOptions::new().write(true).open(disk.path())?;
    let bench = Bench::new(disk.path())?;
    let cancel = CancelToken::new();
    let progress = CancelWhenCopying(cancel.clone());
    let cancelled = bench.backup_to(&bench.target(), false, None, &progress, &cancel);
    ensure!(cancelled.is_err(), "{cancelled:?}");
    ensure!(
        fs::read_dir(bench.directory.path())?.count() == 0,
        "something was left"
    );

    let first = bench.backup(false)?;
    for n in 0..30 {
        node.write_all_at(&[9; 512 * 1024], n * 2 * MIB)?;
    }
    node.sync_all()?;
    let cancel = CancelToken::new();
    let progress = CancelWhenCopying(cancel.clone());
    let cancelled = bench.backup_to(&bench.target(), true, None, &progress, &cancel);
    ensure!(cancelled.is_err(), "{cancelled:?}");
    let state = bench.state()?;
    ensure!(
        matches!(state, SidecarState::Stopped { base, .. } if base == first.taken),
        "{state:?}"
    );
    let report = bench.backup(true)?;
    ensure!(
        report.mode == Mode::Incremental { since: first.taken },
        "{report:?}"
    );
    same(&bench.target(), &bench.copy())
}

#[test]
fn targets_that_would_harm_are_refused() -> Result<()> {
    let mut disk = LoopDevice::new(32 * MIB)?;
    disk.mkfs("ext4")?;
    let mount = disk.mount()?;
    let before = fs::read(disk.image())?;
    let bench = Bench::new(disk.path())?;
    let refuse = |target: &Path| {
        let result = bench.backup_to(target, false, None, &Silent, &CancelToken::new());
        result
            .err()
            .with_context(|| format!("{} was not refused", target.display()))
    };
    let error = refuse(&mount.join("backup.img"))?;
    ensure!(
        matches!(error, BackupError::Target(TargetError::OnDevice { .. })),
        "{error}"
    );
    ensure!(!mount.join("backup.img").exists());
    let error = refuse(&disk.image())?;
    ensure!(
        matches!(error, BackupError::Target(TargetError::IsDevice { .. })),
        "{error}"
    );
    for (target, what) in [
        (disk.path().to_owned(), "a block device"),
        (mount.clone(), "a directory"),
        (bench.at("no/such/directory"), "make the directory first"),
        ("/dev/null".into(), "character device"),
    ] {
        let error = refuse(&target)?.to_string();
        ensure!(error.contains(what) && !error.contains('\n'), "{error}");
    }
    // A file on a file system in a file on the device: it stands on it all the same.
    let inner = mount.join("inner.img");
    File::create(&inner)?.set_len(8 * MIB)?;
    blksnap_tests::run("mkfs.ext4", ["-q".as_ref(), "-F".as_ref(), inner.as_os_str()])?;
    let node = blksnap_tests::run(
        "losetup",
        ["--find".as_ref(), "--show".as_ref(), inner.as_os_str()],
    )?;
    let inner_mount = bench.at("inner");
    fs::create_dir(&inner_mount)?;
    blksnap_tests::run("mount", [Path::new(node.trim()), &inner_mount])?;
    let refused = refuse(&inner_mount.join("backup.img"));
    blksnap_tests::unmount(&inner_mount)?;
    blksnap_tests::run("losetup", ["--detach", node.trim()])?;
    let error = refused?;
    ensure!(
        matches!(error, BackupError::Target(TargetError::OnDevice { .. })),
        "{error}"
    );
    ensure!(before.len() as u64 == 32 * MIB);
    Ok(())
}

#[test]
fn a_full_target_is_an_error_and_the_device_goes_on() -> Result<()> {
    let mut disk = LoopDevice::new(128 * MIB)?;
    disk.mkfs("ext4")?;
    let mount = disk.mount()?;
    fs::write(mount.join("data"), vec![5; 40 << 20])?;
    let mut small = LoopDevice::new(24 * MIB)?;
    small.mkfs("ext4")?;
    let place = small.mount()?;
    let bench = Bench::new(disk.path())?;
    let target = place.join("backup.img");
    let error = bench
        .backup_to(&target, false, None, &Silent, &CancelToken::new())
        .err()
        .context("a backup of 40 MiB fits in 24")?;
    ensure!(error.to_string().contains("free some space"), "{error}");
    ensure!(!target.exists() && !Sidecar::path_of(&target).exists());
    // Thawed, and writable.
    fs::write(mount.join("after"), "x")?;
    File::open(mount.join("after"))?.sync_all()?;
    ensure!(bench.right(true)? == "no_target");
    Ok(())
}

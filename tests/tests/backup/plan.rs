//! Plan: what is copied, and why.

use std::fs::{self, File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use blksnap_agent::backup::{self, Control, ImageSource, Mode, Sidecar, SidecarDevice};
use blksnap_agent::engine::{CancelToken, Silent};
use blksnap_agent::snapshot::{
    Content, HoldOptions, HoldPlace, Image, Member, MemberId, Snapshots, TakeOptions,
};
use blksnap_agent::storage::StorageSpec;
use blksnap_tests::{LoopDevice, seed};

use crate::writer::Writer;
use crate::{Bench, MIB, kind, same};

#[test]
fn an_incremental_equals_a_full_of_the_same_point() -> Result<()> {
    let seed = seed("incremental and full");
    let mut disk = LoopDevice::new(128 * MIB)?;
    disk.mkfs("ext4")?;
    let mount = disk.mount()?;
    let bench = Bench::new(disk.path())?;
    let writer = Writer::start(mount.join("busy"), 8 * MIB, seed, Duration::ZERO);
    bench.backup(false)?;
    writer.stop()?;
    fs::write(mount.join("more"), vec![3; 3 << 20])?;
    // Even a freeze writes to the file system; without it the device has one state only.
    disk.unmount()?;
    let incremental = bench.backup(true)?;
    ensure!(kind(&incremental) == "incremental", "{incremental:?}");
    let other = bench.at("full.img");
    let full = bench.backup_to(&other, false, None, &Silent, &CancelToken::new())?;
    ensure!(kind(&full) == "requested", "{full:?}");
    same(&bench.target(), &other)?;
    same(&bench.target(), &bench.copy())?;
    blksnap_tests::run("e2fsck", ["-fn".as_ref(), other.as_os_str()])?;
    Ok(())
}

#[test]
fn what_does_not_fit_is_full_and_says_why() -> Result<()> {
    let disk = LoopDevice::new(32 * MIB)?;
    let node = OpenOptions::new().write(true).open(disk.path())?;
    let write = |n: u64| node.write_all_at(&[7; 70_000], n * 100_000 / 512 * 512);
    write(1)?;
    let bench = Bench::new(disk.path())?;
    ensure!(bench.right(true)? == "no_target");
    ensure!(bench.right(false)? == "requested");
    let (target, sidecar) = (bench.target(), Sidecar::path_of(&bench.target()));
    let open = || OpenOptions::new().write(true).open(&target);
    let spoil: [(&str, &dyn Fn() -> Result<()>); 7] = [
        ("target_length", &|| Ok(open()?.set_len(MIB)?)),
        ("target_modified", &|| Ok(open()?.write_all_at(b"x", 5 * MIB)?)),
        ("target_replaced", &|| {
            let other = bench.at("other");
            File::create(&other)?.set_len(32 * MIB)?;
            Ok(fs::rename(other, &target)?)
        }),
        ("sidecar_damaged", &|| Ok(fs::write(&sidecar, "{}")?)),
        ("sidecar_damaged", &|| {
            let mut text = String::new();
            File::open(&sidecar)?.read_to_string(&mut text)?;
            Ok(fs::write(&sidecar, text.replace("complete", "stopped"))?)
        }),
        ("no_sidecar", &|| Ok(fs::remove_file(&sidecar)?)),
        ("run_missed", &|| {
            bench.device.corrupt(blksnap_agent::cbt::ResetReason::RunMissed);
            Ok(())
        }),
    ];
    for (n, (reason, spoil)) in spoil.into_iter().enumerate() {
        // The file's clock moves on.
        thread::sleep(Duration::from_millis(20));
        spoil()?;
        write(n as u64)?;
        let got = bench.right(true)?;
        ensure!(got == reason, "{got} instead of {reason}");
        write(50 + n as u64)?;
        let got = bench.right(true)?;
        ensure!(got == "incremental", "{got} after {reason}");
    }
    // Another device's backup.
    let other_disk = LoopDevice::new(32 * MIB)?;
    let other = Bench::new(other_disk.path())?;
    let report = other.backup_to(&target, true, None, &Silent, &CancelToken::new())?;
    ensure!(kind(&report) == "generation_ended", "{report:?}");
    let Mode::Full { reason } = &report.mode else {
        bail!("{report:?}")
    };
    ensure!(
        reason.text.contains(&disk.path().display().to_string()),
        "{reason}"
    );
    Ok(())
}

#[test]
fn images_of_snapshots_and_the_device_in_turn() -> Result<()> {
    let seed = seed("images and devices");
    let mut disk = LoopDevice::new(64 * MIB)?;
    disk.mkfs("ext4")?;
    let mount = disk.mount()?;
    let bench = Bench::new(disk.path())?;
    let writer = Writer::start(mount.join("busy"), 8 * MIB, seed, Duration::from_millis(1));
    let storage = bench.at("storage");
    fs::create_dir(&storage)?;
    let snapshots = Snapshots::new(
        Arc::clone(&bench.tracker),
        HoldPlace {
            directory: None,
            boot: String::new(),
        },
    );
    let id = bench.device.device().id;
    let snapshot = || -> Result<Arc<Image>> {
        let places = vec![StorageSpec::Directory {
            path: storage.clone(),
            limit: None,
            keep: None,
        }];
        let member = Member::Tracked(bench.device.device().clone());
        let created = snapshots.create(vec![member], places, HoldOptions::default())?;
        let options = TakeOptions {
            limits: bench.limits.clone(),
            hook: None,
        };
        snapshots.take(created.id, options, Arc::new(Silent), CancelToken::new())?;
        Ok(snapshots.image(created.id, &MemberId::Device(id))?)
    };
    let of_image = |image: &Image| -> Result<String> {
        let (Content::Copy(file), Some(device)) = (&image.content, image.member.tracked()) else {
            bail!("{image:?} is no copy of a tracked device");
        };
        let source = ImageSource {
            device: &SidecarDevice::of(device),
            image: file,
            read_map: image.read_map.as_ref().context("the map is doubtful")?,
            consistency: image.consistency,
            frozen: image.frozen,
        };
        let control = Control {
            progress: &Silent,
            cancel: &CancelToken::new(),
        };
        let check = |target: &backup::Target| target.check_not_on(device);
        let report = backup::from_image(source, &bench.target(), true, check, control)?;
        let mut bytes = vec![0; usize::try_from(image.size)?];
        file.read_exact_at(&mut bytes, 0)?;
        fs::write(bench.copy(), bytes)?;
        same(&bench.target(), &bench.copy()).with_context(|| format!("{report:?}"))?;
        Ok(kind(&report))
    };
    let early = snapshot()?;
    ensure!(of_image(&early)? == "no_target");
    ensure!(bench.right(true)? == "incremental");
    let late = snapshot()?;
    ensure!(of_image(&late)? == "incremental");
    ensure!(of_image(&late)? == "incremental");
    // The target is newer than this image.
    ensure!(of_image(&early)? == "future_number");
    ensure!(of_image(&late)? == "incremental");
    ensure!(bench.right(true)? == "incremental");
    writer.stop()
}

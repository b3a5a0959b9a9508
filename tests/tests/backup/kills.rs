//! Kills: a backup that was killed is known as one.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use blksnap_agent::backup::{Sidecar, SidecarState};
use blksnap_agent::engine::{CancelToken, Silent};
use blksnap_tests::{Daemon, DaemonOptions, LoopDevice, seed};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::writer::Writer;
use crate::{Bench, CopyAtInstant, MIB, kind, same};

/// Environment of the child: the device and the directory for its backups.
const CHILD: [&str; 2] = ["BLKSNAP_TEST_DEVICE", "BLKSNAP_TEST_DIRECTORY"];

/// Makes a full backup, says so, and then incremental ones until it is killed. Nothing when run by itself.
#[test]
fn child_of_the_kill_test() -> Result<()> {
    let [Some(device), Some(directory)] = CHILD.map(std::env::var_os) else {
        return Ok(());
    };
    let mut bench = Bench::new(Path::new(&device))?;
    bench.directory = tempfile::Builder::new()
        .disable_cleanup(true)
        .tempdir_in(&directory)?;
    let report = bench.backup_to(
        &Path::new(&directory).join("device.img"),
        true,
        None,
        &Silent,
        &CancelToken::new(),
    )?;
    println!("\nready {}", kind(&report));
    loop {
        let hook = CopyAtInstant {
            device: device.clone().into(),
            copy: bench.copy(),
        };
        let target = Path::new(&directory).join("device.img");
        bench.backup_to(&target, true, Some(&hook), &Silent, &CancelToken::new())?;
    }
}

#[test]
fn killed_at_any_point_the_next_backup_is_right() -> Result<()> {
    let seed = seed("killed backups");
    let mut random = StdRng::seed_from_u64(seed);
    let mut disk = LoopDevice::new(32 * MIB)?;
    disk.mkfs("ext4")?;
    let mount = disk.mount()?;
    let directory = tempfile::Builder::new().prefix("blksnap-killed-").tempdir()?;
    let target = directory.path().join("device.img");
    let mut states = Vec::new();
    for round in 0..5 {
        let writer = Writer::start(
            mount.join("busy"),
            8 * MIB,
            random.random(),
            Duration::from_millis(1),
        );
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--exact", "kills::child_of_the_kill_test", "--nocapture"])
            .env(CHILD[0], disk.path())
            .env(CHILD[1], directory.path())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = BufReader::new(child.stdout.take().context("no output")?);
        let mut ready = None;
        for line in output.lines() {
            if let Some(reason) = line?.strip_prefix("ready ") {
                ready = Some(reason.to_owned());
                break;
            }
        }
        thread::sleep(Duration::from_millis(random.random_range(0..400)));
        child.kill()?;
        child.wait()?;
        ensure!(ready.is_some(), "round {round}: the child failed");
        // Nothing stays frozen: the writer comes to its end.
        writer.stop()?;
        fs::write(mount.join(format!("after{round}")), "x")?;
        File::open(mount.join(format!("after{round}")))?.sync_all()?;

        let state = Sidecar::read(&Sidecar::path_of(&target))?
            .context("no sidecar")?
            .state;
        let bench = Bench::new(disk.path())?;
        let hook = CopyAtInstant {
            device: disk.path().to_owned(),
            copy: bench.copy(),
        };
        let report = bench.backup_to(&target, true, Some(&hook), &Silent, &CancelToken::new())?;
        same(&target, &bench.copy()).with_context(|| format!("round {round}: {state:?} {report:?}"))?;
        let want = match state {
            SidecarState::Writing { .. } => "unfinished",
            _ => "generation_ended",
        };
        ensure!(kind(&report) == want, "round {round}: {state:?} {report:?}");
        states.push(want);
    }
    println!("{states:?}");
    Ok(())
}

#[test]
fn a_daemon_killed_in_a_backup_leaves_a_target_that_the_next_one_makes_right() -> Result<()> {
    let seed = seed("killed daemon");
    let mut random = StdRng::seed_from_u64(seed);
    let mut disk = LoopDevice::new(32 * MIB)?;
    disk.mkfs("ext4")?;
    let mount = disk.mount()?;
    let mut daemon = Daemon::start()?;
    let (target, copy) = (daemon.scratch().join("x.img"), daemon.scratch().join("copy.img"));
    let hook = daemon.scratch().join("hook");
    let script = format!(
        "#!/bin/sh\nif [ $1 = frozen ]; then exec dd if=$BLKSNAP_DEVICES of={} bs=1M iflag=direct status=none; fi\n",
        copy.display()
    );
    fs::write(&hook, script)?;
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755))?;
    let arguments: Vec<OsString> = vec![
        "backup".into(),
        "--incremental".into(),
        "--freeze-limit=60000".into(),
        "--freeze-hook".into(),
        hook.into(),
        disk.path().into(),
        target.clone().into(),
    ];
    let expect = |daemon: &Daemon, want: &[Option<&str>]| -> Result<()> {
        let answer = daemon.json(&arguments)?;
        same(&target, &copy).with_context(|| answer.to_string())?;
        let reason = answer["reason"].as_str();
        ensure!(want.contains(&reason), "{answer}");
        Ok(())
    };
    expect(&daemon, &[Some("no_target")])?;
    for round in 0..3 {
        let writer = Writer::start(
            mount.join("busy"),
            4 * MIB,
            random.random(),
            Duration::from_millis(1),
        );
        thread::sleep(Duration::from_millis(200));
        let mut client = daemon.command(&arguments).stderr(Stdio::null()).spawn()?;
        thread::sleep(Duration::from_millis(random.random_range(0..300)));
        daemon.kill()?;
        client.wait()?;
        writer.stop()?;
        daemon.launch(&DaemonOptions::default())?;
        // Killed in it, or before it began or after its end: the map outlives the daemon.
        expect(&daemon, &[Some("unfinished"), None]).with_context(|| format!("round {round}"))?;
        fs::write(mount.join("more"), vec![round; 1 << 20])?;
        expect(&daemon, &[None])?;
    }
    Ok(())
}

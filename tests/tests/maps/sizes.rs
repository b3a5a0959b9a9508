//! Sizes: how large blocks are, what that takes, and what is refused.

use anyhow::{Result, bail, ensure};
use blksnap_agent::control::api;
use blksnap_agent::control::client::{Client, ClientError};
use blksnap_tests::{Daemon, DaemonOptions, LoopDevice, write_block};
use serde_json::json;

use crate::{KIB, MIB, backup, base, refused, since};

#[test]
fn fine_grain_finds_less_and_says_what_it_takes() -> Result<()> {
    let daemon = Daemon::start()?;
    let disk = LoopDevice::new(64 * MIB)?;
    let node = disk.path().display().to_string();
    for (size, bytes) in [("4K", 4 * KIB), ("64K", 64 * KIB), ("1M", MIB), ("64M", 64 * MIB)] {
        let plan = daemon.json(["attach", "--dry-run", "--block-size", size, &node])?;
        let blocks = 64 * MIB / bytes;
        let memory = json!({
            "map_bytes": 2 * blocks,
            "bitmap_bytes": blocks.div_ceil(64) * 8 * 4,
        });
        ensure!(
            plan == json!([{
                "device": node,
                "capacity": 64 * MIB,
                "block_size": bytes,
                "block_count": blocks,
                "memory": memory,
                "attached": false,
            }]),
            "{plan}"
        );
        ensure!(daemon.json(["status"])?["devices"] == json!([]));
        let attached = daemon.json(["attach", "--block-size", size, &node])?;
        ensure!(attached["devices"][0]["memory"] == memory, "{attached}");
        let plan = daemon.json(["attach", "--dry-run", &node])?;
        ensure!(plan[0]["attached"] == true, "{plan}");
        let before = base(&backup(&daemon, &node, false)?)?;
        write_block(disk.path(), 33 * MIB + 8 * KIB)?;
        backup(&daemon, &node, true)?;
        let offset = (33 * MIB + 8 * KIB) / bytes * bytes;
        ensure!(since(&daemon, &node, &before)? == [(offset, bytes)]);
        daemon.run(["detach", &node])?;
    }
    let text = daemon.run(["attach", "--dry-run", &node])?;
    ensure!(
        text.contains("64 KiB") && text.contains("1024") && text.contains("not tracked"),
        "{text}"
    );
    let text = daemon.run(["attach", &node])?;
    ensure!(text.contains("KiB of memory"), "{text}");
    Ok(())
}

#[test]
fn parameters_are_the_daemons_or_the_requests() -> Result<()> {
    let options = DaemonOptions {
        arguments: vec![
            "--tracking-block-minimum-shift=17".into(),
            "--tracking-block-maximum-count=100".into(),
        ],
        ..DaemonOptions::default()
    };
    let daemon = Daemon::with_options(&options)?;
    let disk = LoopDevice::new(64 * MIB)?;
    let node = disk.path().display().to_string();
    let planned = |arguments: &[&str]| -> Result<u64> {
        let mut all = vec!["attach", "--dry-run", &node];
        all.extend(arguments);
        Ok(daemon.json(all)?[0]["block_size"].as_u64().unwrap_or_default())
    };
    ensure!(planned(&[])? == MIB);
    ensure!(planned(&["--tracking-block-maximum-count", "1000"])? == 128 * KIB);
    ensure!(
        planned(&[
            "--tracking-block-minimum-shift",
            "12",
            "--tracking-block-maximum-count",
            "100000"
        ])? == 4 * KIB
    );
    ensure!(planned(&["--tracking-block-maximum-shift", "18"])? == 256 * KIB);
    // A maximum below the minimum is raised to it.
    ensure!(planned(&["--tracking-block-maximum-shift", "12"])? == 128 * KIB);
    for (wrong, expected) in [
        (
            &["--tracking-block-minimum-shift", "11"][..],
            "from 12 (4 KiB) to 26 (64 MiB)",
        ),
        (
            &["--tracking-block-maximum-shift", "27"],
            "from 12 (4 KiB) to 26 (64 MiB)",
        ),
        (&["--tracking-block-maximum-count", "0"], "must be at least 1"),
        (&["--block-size", "2K"], "2048"),
        (&["--block-size", "128M"], "134217728"),
        (&["--block-size", "5000"], "5000"),
    ] {
        let mut arguments = vec!["attach", &node];
        arguments.extend(wrong);
        refused(&daemon, &arguments, &[expected])?;
    }
    daemon.run(["attach", "--tracking-block-maximum-count", "1000", &node])?;
    ensure!(daemon.json(["cbt", "info", &node])?[0]["block_size"] == 128 * KIB);
    Ok(())
}

#[test]
fn more_memory_than_allowed_is_refused_before_anything_is_done() -> Result<()> {
    let options = DaemonOptions {
        arguments: vec!["--memory-limit=64K".into()],
        ..DaemonOptions::default()
    };
    let daemon = Daemon::with_options(&options)?;
    let disk = LoopDevice::new(256 * MIB)?;
    let node = disk.path().display().to_string();
    for how in [
        &["attach", "--block-size", "4K"][..],
        &["attach", "--dry-run", "--block-size", "4K"],
    ] {
        let mut arguments = how.to_vec();
        arguments.push(&node);
        refused(
            &daemon,
            &arguments,
            &["65536 blocks of 4096 bytes take 163840 bytes", "--memory-limit"],
        )?;
    }
    ensure!(daemon.json(["status"])?["devices"] == json!([]));
    daemon.run(["attach", &node])?;
    Ok(())
}

/// The code and errno of a request that is refused.
fn refusal(daemon: &Daemon, path: &str, body: &serde_json::Value) -> Result<(String, i32)> {
    let client = Client::new(&daemon.control_socket());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    match runtime.block_on(client.post::<_, serde_json::Value>(path, body)) {
        Err(ClientError::Refused(api::ErrorBody { code, errno, .. })) => Ok((code, errno)),
        other => bail!("{path} {body}: {other:?}"),
    }
}

#[test]
fn errors_have_the_numbers_of_the_filter_interface() -> Result<()> {
    let daemon = Daemon::start()?;
    let disk = LoopDevice::new(16 * MIB)?;
    let node = disk.path().display().to_string();
    let device = json!({ "device": node });
    let attach = "/v1/devices/attach";
    let detach = "/v1/devices/detach";
    let is = |path: &str, body: &serde_json::Value, code: &str, errno: i32| -> Result<()> {
        let found = refusal(&daemon, path, body)?;
        ensure!(found == (code.to_owned(), errno), "{path} {body}: {found:?}");
        Ok(())
    };
    is(detach, &device, "not_attached", libc::ENOENT)?;
    is(
        attach,
        &json!({ "device": "/dev/no-such" }),
        "no_device",
        libc::ENODEV,
    )?;
    is(
        attach,
        &json!({ "device": "/dev/null" }),
        "not_block_device",
        libc::ENOTBLK,
    )?;
    is(
        attach,
        &json!({ "device": node, "block_size": 3 }),
        "invalid_request",
        libc::EINVAL,
    )?;
    is(
        attach,
        &json!({ "device": node, "block_size": 4096, "tracking_block_minimum_shift": 12 }),
        "invalid_request",
        libc::EINVAL,
    )?;
    is("/v1/devices/frobnicate", &device, "unknown_request", libc::ENOTTY)?;
    daemon.run(["attach", &node])?;
    is(attach, &device, "already", libc::EALREADY)?;
    let range = json!({ "device": node, "ranges": [{ "offset": 32 * MIB, "length": 1 }] });
    is("/v1/cbt/mark", &range, "out_of_range", libc::EINVAL)?;
    let unknown = format!("/v1/snapshots/{}/devices", uuid::Uuid::new_v4());
    is(&unknown, &device, "unknown_snapshot", libc::ESRCH)?;
    Ok(())
}

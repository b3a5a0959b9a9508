//! Take: how long it takes to create and take a snapshot of four served files of 1 TiB.

use std::fs::File;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result};
use blksnap_agent::control::api;
use blksnap_agent::control::client::Client;
use blksnap_tests::Daemon;

use crate::{Bench, REPEATS};

const DEVICES: usize = 4;
const SIZE: u64 = 1 << 40;

pub(crate) fn measure(bench: &mut Bench) -> Result<()> {
    bench.step("cow: take_4x1tib_ms")?;
    let directory = tempfile::Builder::new().prefix("blksnap-bench-").tempdir()?;
    let daemon = Daemon::start()?;
    let mut devices = Vec::new();
    for number in 0..DEVICES {
        let path = directory.path().join(format!("{number}.img"));
        File::create(&path)?.set_len(SIZE)?;
        daemon.run(["serve".as_ref(), path.as_os_str()])?;
        devices.push(path);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut by_cli = Vec::new();
    let mut by_http = Vec::new();
    for _ in 0..REPEATS {
        by_cli.push(cli(&daemon, &devices)?);
        by_http.push(runtime.block_on(http(&daemon, &devices))?);
    }
    let what = "of four served sparse files of 1 TiB";
    bench.report.add(
        "take_4x1tib_ms",
        "<= 100",
        format!("blksnap-agent snapshot create A B C D, {what}"),
        by_cli,
    );
    bench.report.add(
        "take_4x1tib_http_ms",
        "<= 100",
        format!("POST /v1/snapshots/take {what}"),
        by_http,
    );
    Ok(())
}

fn cli(daemon: &Daemon, devices: &[PathBuf]) -> Result<f64> {
    let mut arguments = vec!["snapshot".as_ref(), "create".as_ref()];
    arguments.extend(devices.iter().map(|path| path.as_os_str()));
    let started = Instant::now();
    let taken = daemon.json(arguments)?;
    let milliseconds = started.elapsed().as_secs_f64() * 1000.0;
    let id = taken["id"].as_str().context("the snapshot has no id")?;
    daemon.run(["snapshot", "destroy", id])?;
    Ok(milliseconds)
}

async fn http(daemon: &Daemon, devices: &[PathBuf]) -> Result<f64> {
    let client = Client::new(&daemon.control_socket());
    let request = api::TakeSnapshot {
        create: api::CreateSnapshot {
            devices: devices.iter().map(|path| path.display().to_string()).collect(),
            ..api::CreateSnapshot::default()
        },
        limits: api::Limits::default(),
    };
    let started = Instant::now();
    let taken: api::Snapshot = client.run("/v1/snapshots/take", &request, |_| {}).await?;
    let milliseconds = started.elapsed().as_secs_f64() * 1000.0;
    client.delete(&format!("/v1/snapshots/{}", taken.id)).await?;
    Ok(milliseconds)
}

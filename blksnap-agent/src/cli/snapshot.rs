//! `snapshot create`, `add`, `append`, `take`, `wait`, `watch`, `storage`, `list`, `info` and `destroy`.

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;

use super::args::{self, Snapshot as Command};
use super::progress::Display;
use super::size::{duration, human};
use super::table::{Align, Table};
use super::{Context, absolute};
use crate::control::api::{self, Consistency, Snapshot, Snapshots, StorageExtents, WaitedEvent};
use crate::units::SnapshotId;

/// Exit code of a wait that no event has ended.
const NO_EVENT: u8 = 3;

pub(super) async fn run(context: &Context, command: &Command) -> Result<ExitCode> {
    if let Command::Wait { id, timeout } = command {
        let event = wait(context, *id, *timeout).await?;
        context.print(&event, described)?;
        return Ok(match event {
            WaitedEvent::None => ExitCode::from(NO_EVENT),
            _ => ExitCode::SUCCESS,
        });
    }
    change(context, command).await.map(|()| ExitCode::SUCCESS)
}

async fn wait(context: &Context, id: SnapshotId, timeout_ms: u64) -> Result<WaitedEvent> {
    let path = format!("/v1/snapshots/{id}/wait");
    let request = api::WaitEvent { timeout_ms };
    Ok(context.client.run(&path, &request, |_| {}).await?)
}

/// Prints events until the snapshot is gone.
async fn watch(context: &Context, id: SnapshotId) -> Result<()> {
    /// Between two questions, in milliseconds.
    const PATIENCE: u64 = 60_000;
    loop {
        match wait(context, id, PATIENCE).await? {
            WaitedEvent::None => {}
            event => context.print(&event, described)?,
        }
    }
}

async fn change(context: &Context, command: &Command) -> Result<()> {
    match command {
        Command::Create {
            devices,
            storage,
            promise,
            filter,
            minimum,
            no_autogrow,
            no_take,
            limits: bounds,
        } => {
            let create = api::CreateSnapshot {
                devices: devices.iter().map(|path| absolute(path)).collect::<Result<_>>()?,
                storage: storage.iter().map(|text| place(text)).collect::<Result<_>>()?,
                promise: *promise,
                filter: *filter,
                minimum: *minimum,
                no_autogrow: *no_autogrow,
            };
            if *no_take || devices.is_empty() {
                let snapshot: Snapshot = context.client.post("/v1/snapshots", &create).await?;
                return context.print(&snapshot, |snapshot| snapshot.id.to_string());
            }
            let request = api::TakeSnapshot {
                create,
                limits: limits(bounds)?,
            };
            let mut display = Display::new(context.output);
            let taken = context
                .client
                .run("/v1/snapshots/take", &request, |progress| display.show(progress))
                .await;
            display.end();
            context.print(&taken?, images)
        }
        Command::Add { id, devices } => {
            for device in devices {
                let request = api::DeviceName {
                    device: absolute(device)?,
                };
                let path = format!("/v1/snapshots/{id}/devices");
                let snapshot: Snapshot = context.client.post(&path, &request).await?;
                context.print(&snapshot, |snapshot| {
                    format!("{}: added to {}", request.device, snapshot.id)
                })?;
            }
            Ok(())
        }
        Command::Take { id, limits: bounds } => {
            let mut display = Display::new(context.output);
            let path = format!("/v1/snapshots/{id}/take");
            let request = limits(bounds)?;
            let taken = context
                .client
                .run(&path, &request, |progress| display.show(progress))
                .await;
            display.end();
            context.print(&taken?, images)
        }
        Command::Append { id, storage } => {
            let request = api::AppendStorage {
                storage: place(storage)?,
            };
            let path = format!("/v1/snapshots/{id}/storage");
            let snapshot: Snapshot = context.client.post(&path, &request).await?;
            context.print(&snapshot, |snapshot| {
                format!("{}: added to {}", request.storage, snapshot.id)
            })
        }
        Command::Storage { id } => {
            let extents: StorageExtents = context.client.get(&format!("/v1/snapshots/{id}/storage")).await?;
            context.print(&extents, storage_extents)
        }
        Command::Wait { .. } => Ok(()),
        Command::Watch { id } => watch(context, *id).await,
        Command::List => {
            let snapshots: Snapshots = context.client.get("/v1/snapshots").await?;
            context.print(&snapshots, list)
        }
        Command::Info { id } => {
            let snapshot: Snapshot = context.client.get(&format!("/v1/snapshots/{id}")).await?;
            context.print(&snapshot, info)
        }
        Command::Destroy { ids } => {
            for id in ids {
                context.client.delete(&format!("/v1/snapshots/{id}")).await?;
                context.print(&serde_json::json!({"destroyed": id}), |_| {
                    format!("{id}: destroyed")
                })?;
            }
            Ok(())
        }
    }
}

/// The bounds of a request.
pub(super) fn limits(options: &args::Limits) -> Result<api::Limits> {
    Ok(api::Limits {
        max_seconds: options.max_seconds,
        max_rounds: options.max_rounds,
        freeze_limit_ms: options.freeze_limit,
        freeze_hook: options.freeze_hook.as_deref().map(absolute).transpose()?,
    })
}

/// The id, and where the images are: what comes out of a take.
fn images(snapshot: &Snapshot) -> String {
    let mut text = format!("{}\n", snapshot.id);
    for device in &snapshot.devices {
        let Some(image) = &device.image else { continue };
        // Writing to a string can't fail.
        let _ = writeln!(
            text,
            "{}  {}  {}",
            device.device,
            image.uri,
            consistency(image.consistency, image.frozen_seconds)
        );
    }
    if let (Some(filter), Some(why)) = (&snapshot.filter, &snapshot.filter_reason) {
        let _ = writeln!(text, "filter {filter}: {why}");
    }
    text
}

/// What an image is as good as, and what that cost.
pub(super) fn consistency(of: Consistency, frozen_seconds: f64) -> String {
    match of {
        Consistency::FileSystem => format!("{}, frozen {}", of.label(), duration(frozen_seconds)),
        Consistency::Crash => format!("{}, nothing was frozen", of.label()),
    }
}

fn list(snapshots: &Snapshots) -> String {
    if snapshots.snapshots.is_empty() {
        return "no snapshot: `blksnap-agent snapshot create DEVICE` takes one\n".to_owned();
    }
    let mut table = Table::new([
        ("SNAPSHOT", Align::Left),
        ("STATE", Align::Left),
        ("TAKEN", Align::Left),
        ("STORED", Align::Right),
        ("DEVICES", Align::Left),
    ]);
    for snapshot in &snapshots.snapshots {
        let devices: Vec<_> = snapshot
            .devices
            .iter()
            .map(|device| device.device.as_str())
            .collect();
        table.row([
            snapshot.id.to_string(),
            snapshot.state.label().to_owned(),
            snapshot.taken.map(utc).unwrap_or_default(),
            human(snapshot.storage_bytes),
            devices.join(", "),
        ]);
    }
    table.text()
}

/// Difference storage as the daemon wants it: with a whole path.
fn place(text: &str) -> Result<String> {
    if text.starts_with('/') || text.starts_with("memory:") {
        Ok(text.to_owned())
    } else {
        absolute(Path::new(text))
    }
}

fn described(event: &WaitedEvent) -> String {
    match event {
        WaitedEvent::None => "no event\n".to_owned(),
        WaitedEvent::LowFreeSpace {
            requested_nr_sect, ..
        } => format!(
            "low free space: {} more are wanted\n",
            human(requested_nr_sect * 512)
        ),
        WaitedEvent::Corrupted { device, reason, .. } => {
            format!("corrupted: the image of {device} is lost: {reason}\n")
        }
    }
}

fn storage_extents(extents: &StorageExtents) -> String {
    if extents.extents.is_empty() {
        return "no sectors of block devices are in use\n".to_owned();
    }
    let mut table = Table::new([
        ("DEVICE", Align::Left),
        ("SECTOR", Align::Right),
        ("COUNT", Align::Right),
    ]);
    for extent in &extents.extents {
        table.row([
            extent.device.to_string(),
            extent.sector.to_string(),
            extent.count.to_string(),
        ]);
    }
    table.text()
}

fn info(snapshot: &Snapshot) -> String {
    let mut text = String::new();
    let rows = [
        ("snapshot", snapshot.id.to_string()),
        ("state", snapshot.state.label().to_owned()),
        ("created", utc(snapshot.created)),
        ("taken", snapshot.taken.map_or_else(|| "-".to_owned(), utc)),
        (
            "filter",
            match (&snapshot.filter, &snapshot.filter_reason) {
                (Some(filter), Some(why)) => format!("{filter}: {why}"),
                (Some(filter), None) => filter.clone(),
                (None, _) => "-".to_owned(),
            },
        ),
        (
            "storage",
            format!(
                "{} in {}",
                human(snapshot.storage_bytes),
                snapshot.storage.join(", ")
            ),
        ),
        ("events", snapshot.events.to_string()),
    ];
    for (name, value) in rows {
        // Writing to a string can't fail, here and below.
        let _ = writeln!(text, "{name:<12}{value}");
    }
    if let Some(usage) = &snapshot.usage {
        let limit = usage.limit.map_or_else(|| "the space there is".to_owned(), human);
        let _ = writeln!(text, "{:<12}{} now, up to {limit}", "space", human(usage.bytes));
    }
    if let Some(reason) = &snapshot.reason {
        let _ = writeln!(text, "{:<12}{reason}", "lost");
    }
    for device in &snapshot.devices {
        let _ = writeln!(
            text,
            "\n{:<12}{} ({})",
            "device",
            device.device,
            human(device.capacity)
        );
        let Some(image) = &device.image else { continue };
        let rows = [
            ("image", image.uri.clone()),
            (
                "consistency",
                consistency(image.consistency, image.frozen_seconds),
            ),
            (
                "base",
                format!("{}:{}", image.taken.generation, image.taken.number),
            ),
            ("error code", image.error_code.to_string()),
        ];
        for (name, value) in rows {
            let _ = writeln!(text, "{name:<12}{value}");
        }
    }
    text
}

/// A moment in seconds since 1970 as `2026-05-17 08:30:00 UTC`.
///
/// The calendar is counted in eras of 400 years, which have 146 097 days, from 1 March of the year 0, so that a
/// leap day is the last of its year.
fn utc(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (
        day - (153 * month + 2) / 5 + 1,
        if month < 10 { month + 3 } else { month - 9 },
    );
    let year = era * 400 + year + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_shown_in_utc() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (951_868_800, "2000-03-01 00:00:00 UTC"),
            (1_735_689_599, "2024-12-31 23:59:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(utc(seconds), text);
        }
    }
}

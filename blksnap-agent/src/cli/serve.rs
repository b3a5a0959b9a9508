//! `serve`, `served` and `unserve`.

use std::fmt::Write as _;

use anyhow::Result;

use super::args::{Serve, Unserve};
use super::size::{duration, human};
use super::table::{Align, Table};
use super::{Context, absolute};
use crate::control::api::{self, ServedDevice, ServedDevices};
use crate::control::client::encode;

pub(super) async fn serve(context: &Context, options: &Serve) -> Result<()> {
    let request = api::Serve {
        path: absolute(&options.path)?,
        name: options.name.clone(),
        block_size: options.block_size,
        chunk_size: options.chunk_size,
        ublk: options.ublk,
    };
    let served: ServedDevice = context.client.post("/v1/served", &request).await?;
    context.print(&served, told)
}

/// What one wants to know of a device that was just served.
fn told(served: &ServedDevice) -> String {
    let mut text = format!("{}\n", served.uri);
    if let Some(node) = &served.node {
        // Writing to a string can't fail.
        let _ = writeln!(text, "{node}");
    }
    if let Some(why) = &served.unproven {
        // Writing to a string can't fail.
        let _ = writeln!(text, "the change map begins anew: {why}");
    }
    text
}

pub(super) async fn list(context: &Context) -> Result<()> {
    let served: ServedDevices = context.client.get("/v1/served").await?;
    context.print(&served, table)
}

fn table(served: &ServedDevices) -> String {
    if served.served.is_empty() {
        return "nothing is served: `blksnap-agent serve ORIGIN` serves a disk or an image file\n".to_owned();
    }
    let mut table = Table::new([
        ("NAME", Align::Left),
        ("SIZE", Align::Right),
        ("CLIENTS", Align::Right),
        ("SNAPSHOTS", Align::Right),
        ("KEPT", Align::Right),
        ("HELD WRITES", Align::Right),
        ("LONGEST", Align::Right),
        ("BLOCK DEVICE", Align::Left),
        ("ORIGIN", Align::Left),
    ]);
    for device in &served.served {
        table.row([
            device.name.clone(),
            human(device.size),
            device.clients.to_string(),
            device.snapshots.to_string(),
            human(device.preserved_bytes),
            device.held_writes.to_string(),
            duration(device.longest_hold_seconds),
            device.node.clone().unwrap_or_else(|| "-".to_owned()),
            device.path.clone(),
        ]);
    }
    table.text()
}

pub(super) async fn unserve(context: &Context, options: &Unserve) -> Result<()> {
    for name in &options.names {
        context
            .client
            .delete(&format!("/v1/served/{}", encode(name)))
            .await?;
        context.print(&serde_json::json!({"unserved": name}), |_| {
            format!("{name}: no longer served")
        })?;
    }
    Ok(())
}

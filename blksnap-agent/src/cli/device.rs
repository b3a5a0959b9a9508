//! `attach`, `detach` and `status`.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::args;
use super::size::human;
use super::table::{Align, Table};
use super::{Context, absolute};
use crate::control::api::{self, AttachPlan, DeviceStatus, Devices};

pub(super) async fn attach(context: &Context, options: &args::Attach) -> Result<()> {
    if options.dry_run {
        return plan(context, options).await;
    }
    let mut attached = Devices::default();
    let mut failed = Ok(());
    for device in &options.devices {
        match attach_one(context, device, options).await {
            Ok(status) => attached.devices.push(status),
            Err(error) => {
                failed = Err(error);
                break;
            }
        }
    }
    // Those before the one that failed stay attached.
    if failed.is_ok() || !attached.devices.is_empty() {
        context.print(&attached, |attached| {
            attached.devices.iter().map(sentence).collect()
        })?;
    }
    failed
}

async fn attach_one(context: &Context, device: &Path, options: &args::Attach) -> Result<DeviceStatus> {
    let request = request(device, options)?;
    Ok(context.client.post("/v1/devices/attach", &request).await?)
}

fn request(device: &Path, options: &args::Attach) -> Result<api::Attach> {
    Ok(api::Attach {
        device: absolute(device)?,
        block_size: options.block_size,
        tracking_block_minimum_shift: options.tracking_block_minimum_shift,
        tracking_block_maximum_count: options.tracking_block_maximum_count,
        tracking_block_maximum_shift: options.tracking_block_maximum_shift,
    })
}

/// What an attach would do.
async fn plan(context: &Context, options: &args::Attach) -> Result<()> {
    let mut plans: Vec<AttachPlan> = Vec::new();
    for device in &options.devices {
        let request = request(device, options)?;
        plans.push(context.client.post("/v1/devices/plan", &request).await?);
    }
    context.print(&plans, |plans| {
        let mut table = Table::new([
            ("DEVICE", Align::Left),
            ("SIZE", Align::Right),
            ("BLOCK", Align::Right),
            ("BLOCKS", Align::Right),
            ("MAPS", Align::Right),
            ("BITMAPS", Align::Right),
            ("STATE", Align::Left),
        ]);
        for plan in plans {
            table.row([
                plan.device.clone(),
                human(plan.capacity),
                human(plan.block_size),
                plan.block_count.to_string(),
                human(plan.memory.map_bytes),
                human(plan.memory.bitmap_bytes),
                if plan.attached {
                    "tracked already"
                } else {
                    "not tracked"
                }
                .to_owned(),
            ]);
        }
        table.text()
    })
}

fn sentence(device: &DeviceStatus) -> String {
    format!(
        "{}: tracked, {} in {} blocks of {}, {} of memory, generation {}\n",
        device.device,
        human(device.capacity),
        device.cbt.block_count,
        human(device.cbt.block_size),
        human(device.memory.total()),
        device.cbt.generation_id,
    )
}

pub(super) async fn detach(context: &Context, options: &args::Detach) -> Result<()> {
    for device in &options.devices {
        let request = api::DeviceName {
            device: absolute(device)?,
        };
        let _: api::Empty = context.client.post("/v1/devices/detach", &request).await?;
        context.print(&request, |request| {
            format!("{}: no longer tracked", request.device)
        })?;
    }
    Ok(())
}

/// The tracked devices, or those of them that have one of `names`, each of which must be tracked.
pub(super) async fn select(context: &Context, names: &[PathBuf]) -> Result<Devices> {
    let all: Devices = context.client.get("/v1/devices").await?;
    if names.is_empty() {
        return Ok(all);
    }
    let mut devices = Vec::new();
    for name in names {
        // The daemon names a device by its canonical path.
        let canonical = name.canonicalize().unwrap_or_else(|_| name.clone());
        match all
            .devices
            .iter()
            .find(|device| Path::new(&device.device) == canonical)
        {
            Some(device) => devices.push(device.clone()),
            None => bail!(
                "find {}: it is not tracked: attach it with `blksnap-agent attach {}`",
                name.display(),
                name.display()
            ),
        }
    }
    Ok(Devices { devices })
}

pub(super) async fn status(context: &Context, options: &args::Status) -> Result<()> {
    let devices = select(context, &options.devices).await?;
    context.print(&devices, |devices| {
        if devices.devices.is_empty() {
            return "no device is tracked: `blksnap-agent attach DEVICE` begins\n".to_owned();
        }
        table(devices)
    })
}

fn table(devices: &Devices) -> String {
    let mut table = Table::new([
        ("DEVICE", Align::Left),
        ("SIZE", Align::Right),
        ("BLOCK", Align::Right),
        ("TAKES", Align::Right),
        ("CHANGED", Align::Right),
        ("WRITTEN", Align::Right),
        ("STATE", Align::Left),
        ("MOUNTED ON", Align::Left),
    ]);
    for device in &devices.devices {
        let cbt = &device.cbt;
        let changed = cbt
            .dirty_blocks
            .saturating_mul(cbt.block_size)
            .min(device.capacity);
        let mounts: Vec<_> = device
            .mounts
            .iter()
            .map(|mount| mount.mountpoint.as_str())
            .collect();
        table.row([
            device.device.clone(),
            human(device.capacity),
            human(cbt.block_size),
            cbt.changes_number.to_string(),
            human(changed),
            human(device.counters.bytes.values().sum()),
            match (device.lost, cbt.corrupted) {
                (Some(reason), _) => format!("lost: {}", reason.code()),
                (None, Some(reason)) => format!("full needed: {}", reason.code()),
                (None, None) => "tracked".to_owned(),
            },
            mounts.join(", "),
        ]);
    }
    table.text()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{DeviceId, Generation};

    #[test]
    fn a_device_is_a_row() {
        let device = DeviceStatus {
            device: "/dev/sdb1".to_owned(),
            name: "sdb1".to_owned(),
            id: DeviceId { major: 8, minor: 17 },
            disk: "sdb".to_owned(),
            capacity: 1 << 30,
            mounts: vec![api::Mount {
                mountpoint: "/srv".to_owned(),
                fs_type: "ext4".to_owned(),
            }],
            lost: None,
            memory: api::Memory::default(),
            cbt: api::CbtInfo {
                device: "/dev/sdb1".to_owned(),
                device_capacity: 1 << 30,
                block_size: 65_536,
                block_count: 16_384,
                generation_id: Generation::new(uuid::Uuid::nil()),
                changes_number: 2,
                active_number: 3,
                dirty_blocks: 24,
                began: crate::cbt::ResetReason::NewAttach,
                corrupted: None,
            },
            counters: api::Counters::default(),
        };
        let text = table(&Devices {
            devices: vec![
                device.clone(),
                DeviceStatus {
                    cbt: api::CbtInfo {
                        corrupted: Some(crate::cbt::ResetReason::RunMissed),
                        ..device.cbt.clone()
                    },
                    mounts: Vec::new(),
                    ..device.clone()
                },
                DeviceStatus {
                    lost: Some(crate::cbt::ResetReason::DeviceGone),
                    mounts: Vec::new(),
                    ..device
                },
            ],
        });
        assert_eq!(
            text,
            "DEVICE      SIZE   BLOCK  TAKES  CHANGED  WRITTEN  STATE                    MOUNTED ON\n\
             /dev/sdb1  1 GiB  64 KiB      2  1.5 MiB      0 B  tracked                  /srv\n\
             /dev/sdb1  1 GiB  64 KiB      2  1.5 MiB      0 B  full needed: run_missed  -\n\
             /dev/sdb1  1 GiB  64 KiB      2  1.5 MiB      0 B  lost: device_gone        -\n"
        );
    }
}

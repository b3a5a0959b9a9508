//! `cbt info`, `extents`, `map` and `mark`.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::args::Cbt;
use super::device::select;
use super::size::human;
use super::table::{Align, Table};
use super::{Context, absolute, write_out};
use crate::control::api::{self, CbtInfo, ServedDevices};
use crate::control::client::with_query;

pub(super) async fn run(context: &Context, command: &Cbt) -> Result<()> {
    match command {
        Cbt::Info { devices } => {
            let served: ServedDevices = context.client.get("/v1/served").await?;
            let of_served = |path: &PathBuf| {
                let path = path.canonicalize().ok()?;
                let mut all = served.served.iter();
                all.find(|served| Path::new(&served.path) == path)
            };
            let tracked: Vec<PathBuf> = devices
                .iter()
                .filter(|path| of_served(path).is_none())
                .cloned()
                .collect();
            let mut maps: Vec<CbtInfo> = Vec::new();
            if devices.is_empty() || !tracked.is_empty() {
                let tracked = select(context, &tracked).await?.devices;
                maps.extend(tracked.into_iter().map(|device| device.cbt));
            }
            maps.extend(
                served
                    .served
                    .iter()
                    .filter(|device| {
                        devices.is_empty()
                            || devices
                                .iter()
                                .filter_map(of_served)
                                .any(|named| named.name == device.name)
                    })
                    .map(|device| device.cbt.clone()),
            );
            context.print(&maps, |maps| info(maps))
        }
        Cbt::Extents {
            device, since, lines, ..
        } => super::extents::run(context, device, since.as_ref(), *lines).await,
        Cbt::Heat {
            device,
            file,
            cells,
            color,
        } => super::heat::run(context, device, file.as_deref(), *cells, *color).await,
        Cbt::Map { device, file } => map(context, device, file.as_deref()).await,
        Cbt::Mark {
            device,
            ranges,
            files,
        } => {
            let request = api::Mark {
                device: absolute(device)?,
                ranges: ranges.clone(),
                files: files.iter().map(|file| absolute(file)).collect::<Result<_>>()?,
            };
            let marked: api::Marked = context.client.post("/v1/cbt/mark", &request).await?;
            context.print(&marked, |marked| {
                format!(
                    "{}: {} blocks marked, for {} in {} ranges",
                    request.device,
                    marked.blocks,
                    human(marked.bytes),
                    marked.ranges
                )
            })
        }
    }
}

fn info(maps: &[CbtInfo]) -> String {
    let mut table = Table::new([
        ("DEVICE", Align::Left),
        ("SIZE", Align::Right),
        ("BLOCK", Align::Right),
        ("BLOCKS", Align::Right),
        ("DIRTY", Align::Right),
        ("GENERATION:NUMBER", Align::Left),
        ("STATE", Align::Left),
    ]);
    for map in maps {
        table.row([
            map.device.clone(),
            human(map.device_capacity),
            human(map.block_size),
            map.block_count.to_string(),
            map.dirty_blocks.to_string(),
            format!("{}:{}", map.generation_id, map.changes_number),
            map.corrupted.as_ref().map_or_else(
                || "right".to_owned(),
                |reason| format!("full needed: {}", reason.code()),
            ),
        ]);
    }
    table.text()
}

async fn map(context: &Context, device: &Path, file: Option<&Path>) -> Result<()> {
    let device = absolute(device)?;
    let path = with_query("/v1/cbt/map", &[("device", &device)]);
    let bytes = context.client.get_bytes(&path).await?;
    match file {
        Some(file) if file == Path::new("-") => write_out(&bytes),
        Some(file) => std::fs::write(file, &bytes).with_context(|| format!("write {}", file.display())),
        None => context.print(&Summary::of(&device, &bytes), Summary::text),
    }
}

/// How many blocks last changed in which period.
#[derive(Debug, PartialEq, Eq, serde::Serialize)]
struct Summary {
    device: String,
    blocks: u64,
    periods: Vec<Period>,
}

#[derive(Debug, PartialEq, Eq, serde::Serialize)]
struct Period {
    number: u8,
    blocks: u64,
}

impl Summary {
    fn of(device: &str, map: &[u8]) -> Self {
        let mut counts = [0_u64; 256];
        for byte in map {
            counts[usize::from(*byte)] += 1;
        }
        Self {
            device: device.to_owned(),
            blocks: map.len() as u64,
            periods: (0_u8..=255)
                .zip(counts)
                .filter(|(_, blocks)| *blocks > 0)
                .map(|(number, blocks)| Period { number, blocks })
                .collect(),
        }
    }

    fn text(&self) -> String {
        let mut table = Table::new([
            ("LAST CHANGED BEFORE TAKE", Align::Left),
            ("BLOCKS", Align::Right),
            ("SHARE", Align::Right),
        ]);
        for period in &self.periods {
            table.row([
                match period.number {
                    0 => "never".to_owned(),
                    number => number.to_string(),
                },
                period.blocks.to_string(),
                format!("{:.1} %", period.blocks as f64 * 100.0 / self.blocks as f64),
            ]);
        }
        table.text()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_is_summed_up_by_period() {
        let summary = Summary::of("/dev/x", &[0, 0, 0, 1, 255]);
        assert_eq!(
            summary.text(),
            "LAST CHANGED BEFORE TAKE  BLOCKS   SHARE\n\
             never                          3  60.0 %\n\
             1                              1  20.0 %\n\
             255                            1  20.0 %\n"
        );
    }
}

//! `nbd status`, `connect`, `disconnect`, `reconnect` and `list`.
//!
//! All but the first talk to the kernel themselves, so that devices can be looked at and ended when no daemon runs.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use clap::Subcommand;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use serde::Serialize;

use super::size::{self, human};
use super::table::{Align, Table};
use super::{Context, print};
use crate::control::NBD_SOCKET;
use crate::control::api::{NbdStatus, Snapshots};
use crate::disk::BlockDevice;
use crate::nbd::address::Address;
use crate::nbd::kernel::commands::NbdFamily;
use crate::nbd::kernel::genetlink::KernelSocket;
use crate::nbd::kernel::links::Links;
use crate::nbd::kernel::sysfs::{Known, Sysfs};
use crate::nbd::kernel::{self, MAX_CONNECTIONS, Request};
use crate::units::DeviceId;

/// Longest wait for those who have a device open, but no file system on it, to see that it ended and close it.
const LETTING_GO: Duration = Duration::from_secs(5);

/// `nbd`
#[derive(Debug, Subcommand)]
pub enum Nbd {
    /// Show the NBD server: where it listens, what it serves, its limits and what it did
    #[command(after_help = "Examples:
  blksnap-agent nbd status
  blksnap-agent nbd status --output json | jq '.counters.timeouts'")]
    Status,
    /// Make an export a block device /dev/nbdN of this machine
    #[command(after_help = "Examples:
  blksnap-agent nbd connect $id/sdb1               prints the device; mount it read-only from there
  blksnap-agent nbd connect --device /dev/nbd3 --connections 8 $id/sdb1
  mount -o ro,norecovery /dev/disk/by-blksnap/$id/sdb1 /mnt

Should the daemon die, reads wait for --dead-timeout, then they fail: nothing hangs for ever. A daemon that comes
back with the same export gives the device new connections.")]
    Connect {
        /// Name of the export: SNAPSHOT/DEVICE; `nbdinfo --list` and `snapshot info` show them
        export: String,
        /// The device; a free one when not given
        #[arg(long, value_name = "DEVICE", value_parser = parse_index)]
        device: Option<u32>,
        /// Connections; as many as requests can be in flight on processors [default: 4, or what the server allows]
        #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=MAX_CONNECTIONS as i64))]
        connections: Option<u32>,
        /// A request without an answer for so long ends its connection
        #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
        timeout: u32,
        /// Without a connection, requests wait so long for a new one, then they fail
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        dead_timeout: u32,
        /// Logical block size, a power of two from 512 to 4096 [default: the one of the snapshot's device]
        #[arg(long, value_name = "SIZE", value_parser = size::parse)]
        block_size: Option<u64>,
        /// Refuse writes, also where the export takes them
        #[arg(long)]
        read_only: bool,
        /// Server: path of a socket, or IP:PORT [default: nbd.sock beside --socket]
        #[arg(long, value_name = "ADDRESS")]
        server: Option<Address>,
        /// Make no links in /dev/disk/by-blksnap
        #[arg(long)]
        no_links: bool,
    },
    /// End devices that were made by `nbd connect`
    #[command(after_help = "Examples:
  blksnap-agent nbd disconnect /dev/nbd0
  blksnap-agent nbd disconnect $id/sdb1")]
    Disconnect {
        /// Devices, or names of exports
        #[arg(required = true, value_name = "DEVICE|EXPORT")]
        devices: Vec<String>,
        /// Also while somebody has it open: reads and writes fail from then on
        #[arg(long)]
        force: bool,
    },
    /// Give devices new connections in place of dead ones; the daemon does it when it starts
    #[command(after_help = "Example:
  blksnap-agent nbd reconnect")]
    Reconnect {
        /// Devices, or names of exports; all that were made by `nbd connect` when none is named
        #[arg(value_name = "DEVICE|EXPORT")]
        devices: Vec<String>,
    },
    /// List the devices that were made by `nbd connect`
    #[command(after_help = "Example:
  blksnap-agent nbd list --output json | jq -r '.devices[].device'")]
    List,
}

/// The devices that were made by `nbd connect`.
#[derive(Debug, Serialize)]
struct Devices {
    devices: Vec<Device>,
}

/// A device.
#[derive(Debug, Serialize)]
struct Device {
    device: PathBuf,
    export: String,
    server: String,
    size: u64,
    read_only: bool,
    connections: u32,
    timeout_seconds: u64,
    dead_timeout_seconds: u64,
    /// It was ended, and stays until nobody has it open.
    ended: bool,
    links: Vec<PathBuf>,
}

fn node(index: u32) -> String {
    format!("nbd{index}")
}

fn path(index: u32) -> PathBuf {
    Path::new("/dev").join(node(index))
}

fn parse_index(text: &str) -> Result<u32, String> {
    text.strip_prefix("/dev/")
        .unwrap_or(text)
        .strip_prefix("nbd")
        .and_then(|number| number.parse().ok())
        .ok_or_else(|| "give a device such as /dev/nbd0".to_owned())
}

fn family() -> Result<NbdFamily> {
    Ok(NbdFamily::open(Box::new(KernelSocket::open()?))?)
}

pub(super) async fn run(context: &Context, socket: &Path, command: Nbd) -> Result<()> {
    match command {
        Nbd::Connect {
            export,
            device,
            connections,
            timeout,
            dead_timeout,
            block_size,
            read_only,
            server,
            no_links,
        } => {
            let origin = origin(context, &export, server.is_none()).await;
            let server = match server {
                Some(server) => server,
                None => Address::Unix(std::path::absolute(socket.with_file_name(NBD_SOCKET))?),
            };
            let block_size = match block_size {
                // Too large for the field is too large for the kernel: it is said there.
                Some(size) => Some(u32::try_from(size).unwrap_or(u32::MAX)),
                None => origin.as_ref().map(|origin| origin.logical_block),
            };
            let request = Request {
                server,
                export,
                index: device,
                connections,
                timeout: Duration::from_secs(timeout.into()),
                dead_timeout: Duration::from_secs(dead_timeout.into()),
                block_size,
                read_only,
            };
            connect(context, &request, origin.map(|origin| origin.id), !no_links)
        }
        Nbd::Disconnect { devices, force } => {
            let mut nbd = family()?;
            for name in &devices {
                disconnect(context, &mut nbd, name, force)?;
            }
            Ok(())
        }
        Nbd::Reconnect { devices } => reconnect(context, &devices),
        Nbd::Status => {
            let status: NbdStatus = context.client.get("/v1/nbd").await?;
            context.print(&status, status_text)
        }
        Nbd::List => {
            let mut nbd = family()?;
            let devices = ours(&Sysfs::default())
                .map(|known| describe(&mut nbd, known))
                .collect::<Result<_>>()?;
            context.print(&Devices { devices }, list)
        }
    }
}

/// The device that a snapshot's export is an image of, if the daemon knows it and it is still there.
async fn origin(context: &Context, export: &str, own_server: bool) -> Option<BlockDevice> {
    if !own_server {
        return None;
    }
    let known: Snapshots = context.client.get("/v1/snapshots").await.ok()?;
    let device = known
        .snapshots
        .iter()
        .flat_map(|snapshot| &snapshot.devices)
        .find(|device| device.image.as_ref().is_some_and(|image| image.export == export))?;
    let found = BlockDevice::open(Path::new(&device.device)).ok()?;
    (Some(found.id) == device.id).then_some(found)
}

fn connect(context: &Context, request: &Request, origin: Option<DeviceId>, with_links: bool) -> Result<()> {
    let mut nbd = family()?;
    if let Some(known) = of_export(&mut nbd, &request.export)? {
        bail!(
            "connect \"{}\": it is {} already",
            request.export,
            path(known.index).display()
        );
    }
    let made = kernel::connect(&mut nbd, request)?;
    let links = if with_links {
        Links::default()
            .make(&node(made.index), &request.export, origin)
            .with_context(|| format!("{} is connected, but it got no links", path(made.index).display()))?
    } else {
        Vec::new()
    };
    let device = Device {
        device: path(made.index),
        export: made.backend.export,
        server: made.backend.server.to_string(),
        size: made.size,
        read_only: made.read_only,
        connections: made.backend.connections,
        timeout_seconds: made.backend.timeout.as_secs(),
        dead_timeout_seconds: made.backend.dead_timeout.as_secs(),
        ended: false,
        links,
    };
    print(context.output, &device, |device| {
        device.device.display().to_string()
    })
}

/// The devices of ours.
fn ours(sysfs: &Sysfs) -> impl Iterator<Item = Known> {
    sysfs
        .devices()
        .into_iter()
        .filter(|known| known.backend.is_some())
}

/// The device of ours that shows this export of any server, and was not ended.
fn of_export(nbd: &mut NbdFamily, export: &str) -> Result<Option<Known>> {
    for known in Sysfs::default().of_export(export) {
        if !kernel::has_ended(nbd, &known)? {
            return Ok(Some(known));
        }
    }
    Ok(None)
}

/// The device of ours with this path or this export.
fn find(nbd: &mut NbdFamily, name: &str) -> Result<Known> {
    let known = match parse_index(name) {
        Ok(index) => Sysfs::default()
            .device(index)
            .filter(|known| known.backend.is_some()),
        Err(_) => of_export(nbd, name)?,
    };
    known.ok_or_else(|| anyhow!("{name} is no device made by `nbd connect`: see `blksnap-agent nbd list`"))
}

/// A device was ended.
#[derive(Debug, Serialize)]
struct Ended {
    disconnected: PathBuf,
    /// Somebody still has it open: its number is free when that ends.
    open: bool,
}

fn disconnect(context: &Context, nbd: &mut NbdFamily, name: &str, force: bool) -> Result<()> {
    let known = find(nbd, name)?;
    let device = path(known.index);
    let flags = OFlag::O_RDONLY | OFlag::O_EXCL | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    // A device whose connections are dead can't be opened, but it can be ended.
    let in_use = !force && matches!(open(&device, flags, Mode::empty()), Err(Errno::EBUSY));
    if in_use {
        bail!(
            "disconnect {}: it is mounted or otherwise in use: unmount it first, or use --force",
            device.display()
        )
    }
    nbd.disconnect(known.index)?;
    Links::default()
        .remove(&node(known.index))
        .with_context(|| format!("remove the links of {}", device.display()))?;
    let started = Instant::now();
    let is_there = || {
        Sysfs::default()
            .device(known.index)
            .is_some_and(|now| now.connected)
    };
    while is_there() && started.elapsed() < LETTING_GO {
        std::thread::sleep(Duration::from_millis(10));
    }
    let ended = Ended {
        disconnected: device,
        open: is_there(),
    };
    print(context.output, &ended, |ended| {
        let device = ended.disconnected.display();
        if ended.open {
            format!("{device}: disconnected; somebody still has it open, and gets errors from it")
        } else {
            format!("{device}: disconnected")
        }
    })
}

fn reconnect(context: &Context, names: &[String]) -> Result<()> {
    let mut nbd = family()?;
    let sysfs = Sysfs::default();
    let wanted: Vec<Known> = if names.is_empty() {
        let mut wanted = Vec::new();
        for known in ours(&sysfs) {
            if !kernel::has_ended(&mut nbd, &known)? {
                wanted.push(known);
            }
        }
        wanted
    } else {
        names
            .iter()
            .map(|name| find(&mut nbd, name))
            .collect::<Result<_>>()?
    };
    for known in wanted {
        kernel::reconnect(&mut nbd, &sysfs, known.index)?;
        let device = path(known.index);
        print(
            context.output,
            &serde_json::json!({"reconnected": device}),
            |_| format!("{}: reconnected", device.display()),
        )?;
    }
    Ok(())
}

fn describe(nbd: &mut NbdFamily, known: Known) -> Result<Device> {
    let ended = kernel::has_ended(nbd, &known)?;
    let backend = known.backend;
    let text = |get: fn(&kernel::backend::Backend) -> String| backend.as_ref().map(get).unwrap_or_default();
    let number = |get: fn(&kernel::backend::Backend) -> u64| backend.as_ref().map(get).unwrap_or_default();
    Ok(Device {
        device: path(known.index),
        export: text(|backend| backend.export.clone()),
        server: text(|backend| backend.server.to_string()),
        size: known.size,
        read_only: known.read_only,
        connections: backend.as_ref().map_or(0, |backend| backend.connections),
        timeout_seconds: number(|backend| backend.timeout.as_secs()),
        dead_timeout_seconds: number(|backend| backend.dead_timeout.as_secs()),
        ended,
        links: Links::default().of(&node(known.index)).unwrap_or_default(),
    })
}

fn status_text(status: &NbdStatus) -> String {
    let mut text = String::new();
    // Writing to a string can't fail, here and below.
    for endpoint in &status.endpoints {
        let _ = writeln!(
            text,
            "{:<12}{}, TLS {}",
            "listens", endpoint.address, endpoint.tls
        );
    }
    let (limits, counters) = (&status.limits, &status.counters);
    let rows = [
        (
            "clients",
            format!(
                "{} of {}, {} since the start, {} refused, {} dropped",
                counters.connections_open,
                limits.connections,
                counters.connections,
                counters.connections_refused,
                counters.sessions_dropped
            ),
        ),
        (
            "handshakes",
            format!(
                "{} failed, {} of them by TLS; longest {} s",
                counters.handshakes_failed, counters.tls_failed, limits.handshake_seconds
            ),
        ),
        (
            "memory",
            format!(
                "{} of {}",
                human(counters.memory_bytes),
                human(limits.total_bytes)
            ),
        ),
        (
            "data",
            format!(
                "{} read, {} written",
                human(counters.read_bytes),
                human(counters.written_bytes)
            ),
        ),
        (
            "timeouts",
            counters
                .timeouts
                .iter()
                .map(|(name, count)| format!("{name} {count}"))
                .collect::<Vec<_>>()
                .join(", "),
        ),
    ];
    for (name, value) in rows {
        let _ = writeln!(text, "{name:<12}{value}");
    }
    let mut table = Table::new([
        ("EXPORT", Align::Left),
        ("SIZE", Align::Right),
        ("MODE", Align::Left),
        ("CLIENTS", Align::Right),
    ]);
    for export in &status.exports {
        table.row([
            export.name.clone(),
            human(export.size),
            if export.read_only { "ro" } else { "rw" }.to_owned(),
            export.clients.to_string(),
        ]);
    }
    let _ = write!(text, "\n{}", table.text());
    text
}

fn list(devices: &Devices) -> String {
    if devices.devices.is_empty() {
        return "no device: `blksnap-agent nbd connect EXPORT` makes one\n".to_owned();
    }
    let mut table = Table::new([
        ("DEVICE", Align::Left),
        ("SIZE", Align::Right),
        ("MODE", Align::Left),
        ("CONNECTIONS", Align::Right),
        ("EXPORT", Align::Left),
        ("SERVER", Align::Left),
    ]);
    for device in &devices.devices {
        table.row([
            device.device.display().to_string(),
            human(device.size),
            match (device.ended, device.read_only) {
                (true, _) => "ended",
                (false, true) => "ro",
                (false, false) => "rw",
            }
            .to_owned(),
            device.connections.to_string(),
            device.export.clone(),
            device.server.clone(),
        ]);
    }
    table.text()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_by_node() {
        for text in ["/dev/nbd7", "nbd7"] {
            assert_eq!(parse_index(text), Ok(7));
        }
        for wrong in ["", "nbd", "7", "/dev/sda", "/dev/nbd7p1", "id/nbd7", "nbd-1"] {
            assert!(parse_index(wrong).is_err(), "{wrong}");
        }
    }
}

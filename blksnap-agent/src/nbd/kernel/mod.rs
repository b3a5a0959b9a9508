//! Kernel client: exports as block devices `/dev/nbdN` of this machine.
//!
//! The sockets are connected and the export is chosen here ([`super::client`]); then they are given to the kernel by
//! generic netlink, and nobody of ours has to stay. The kernel keeps with the device what it is connected to
//! ([`backend`]), so that a daemon that starts again can give it new sockets.
//!
//! | file | role |
//! |---|---|
//! | `message` | netlink messages as bytes |
//! | [`genetlink`] | a socket to the kernel |
//! | [`commands`] | what the kernel's client can be told |
//! | [`backend`] | what a device is connected to, as text |
//! | [`sysfs`] | the devices as sysfs shows them |
//! | [`links`] | names in `/dev` |
//!
//! # When the server dies
//! Requests wait for a new connection, at most for the dead-connection time-out, then they fail; a request that
//! gets no answer ends its connection after the request time-out. Both are always set here, because a task that
//! waits for a block device can't be killed.

pub mod backend;
pub mod commands;
#[cfg(test)]
mod fake;
pub mod genetlink;
pub mod links;
mod message;
pub mod sysfs;
#[cfg(test)]
mod tests;

use std::os::fd::AsFd as _;
use std::time::Duration;

use self::backend::Backend;
use self::commands::{Device, KernelError, Link, NbdFamily};
use self::genetlink::KernelSocket;
use self::sysfs::{Known, Sysfs};
use super::address::Address;
use super::client::{ClientError, Connection};
use super::proto::wire::TransmissionFlags;

/// Longest step of a handshake with the server.
const PATIENCE: Duration = Duration::from_secs(20);

/// Connections of a device unless told otherwise, where the server allows several.
pub const CONNECTIONS: u32 = 4;

/// Most connections of a device. More than processors are of no use to the kernel.
pub const MAX_CONNECTIONS: u32 = 64;

/// Logical block size of a device unless the export wants a larger one.
const SECTOR: u32 = 512;

/// An export that is to be a device.
#[derive(Clone, Debug)]
pub struct Request {
    /// The server.
    pub server: Address,
    /// Name of the export.
    pub export: String,
    /// N of `/dev/nbdN`; a free one without.
    pub index: Option<u32>,
    /// Number of connections; [`CONNECTIONS`] without, or one where the server allows no more.
    pub connections: Option<u32>,
    /// A request without an answer for so long ends its connection; whole seconds, not 0.
    pub timeout: Duration,
    /// Requests wait so long for a new connection before they fail; whole seconds.
    pub dead_timeout: Duration,
    /// Logical block size in bytes; the export's smallest block, at least 512, without.
    pub block_size: Option<u32>,
    /// Refuse writes, also where the server takes them.
    pub read_only: bool,
}

/// A device was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connected {
    /// N of `/dev/nbdN`.
    pub index: u32,
    /// Size in bytes.
    pub size: u64,
    /// Logical block size in bytes.
    pub block_size: u32,
    /// Refuses writes.
    pub read_only: bool,
    /// What it is connected to.
    pub backend: Backend,
}

/// An export can't be a device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The server.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The server allows one connection only.
    #[error("connect \"{0}\": its server allows one connection: use --connections 1")]
    OneConnection(String),
    /// Nothing in it.
    #[error("connect \"{0}\": the export is empty")]
    Empty(String),
    /// Names that don't fit.
    #[error("connect \"{0}\": the names of export and socket are too long for the kernel to keep")]
    TooLong(String),
    /// A block size that the kernel does not take.
    #[error(
        "connect \"{export}\" with blocks of {block_size} bytes: give a power of two from {least} to 4096"
    )]
    BlockSize {
        /// The export.
        export: String,
        /// What was asked for.
        block_size: u32,
        /// The least that both sides take.
        least: u32,
    },
    /// The device shows something else.
    #[error("reconnect /dev/nbd{index}: \"{export}\" has {now} bytes now, the device has {size}")]
    Changed {
        /// N of `/dev/nbdN`.
        index: u32,
        /// The export.
        export: String,
        /// Its size now.
        now: u64,
        /// The device's size.
        size: u64,
    },
    /// The device is none of ours.
    #[error("/dev/nbd{0} is not connected by blksnap: see `blksnap-agent nbd list`")]
    NotOurs(u32),
}

/// Opens `count` connections more to the export of `first`.
fn more(first: &Connection, backend: &Backend, count: u32) -> Result<Vec<Connection>, DeviceError> {
    (0..count)
        .map(|_| {
            let connection = Connection::open(&backend.server, &backend.export, PATIENCE)?;
            if connection.size == first.size && connection.flags == first.flags {
                Ok(connection)
            } else {
                // Another export has taken the name since the first connection.
                Err(DeviceError::Client(ClientError::Refused {
                    address: backend.server.clone(),
                    export: backend.export.clone(),
                    reason: "the export changed while it was being connected".to_owned(),
                }))
            }
        })
        .collect()
}

/// Makes a device of an export.
///
/// # Errors
/// The server or the kernel refuses. Nothing is left behind then.
pub fn connect(nbd: &mut NbdFamily, request: &Request) -> Result<Connected, DeviceError> {
    let first = Connection::open(&request.server, &request.export, PATIENCE)?;
    let several = first.flags.contains(TransmissionFlags::CAN_MULTI_CONN);
    let connections = match request.connections {
        Some(count) if count > 1 && !several => {
            return Err(DeviceError::OneConnection(request.export.clone()));
        }
        Some(count) => count.clamp(1, MAX_CONNECTIONS),
        None if several => CONNECTIONS,
        None => 1,
    };
    if first.size == 0 {
        return Err(DeviceError::Empty(request.export.clone()));
    }
    let least = first.minimum_block.max(SECTOR);
    let block_size = request.block_size.unwrap_or(least);
    if !block_size.is_power_of_two() || block_size < least || block_size > 4096 {
        return Err(DeviceError::BlockSize {
            export: request.export.clone(),
            block_size,
            least,
        });
    }
    let backend = Backend {
        connections,
        timeout: request.timeout.max(Duration::from_secs(1)),
        dead_timeout: request.dead_timeout,
        server: request.server.clone(),
        export: request.export.clone(),
    };
    if !backend.fits() {
        return Err(DeviceError::TooLong(request.export.clone()));
    }
    let mut flags = first.flags;
    if request.read_only {
        flags.insert(TransmissionFlags::READ_ONLY);
    }
    let size = first.size;
    let mut all = more(&first, &backend, connections - 1)?;
    all.insert(0, first);
    let sockets: Vec<_> = all.iter().map(|connection| connection.as_fd()).collect();
    let text = backend.to_string();
    let index = nbd.connect(
        &Device {
            index: request.index,
            size,
            block_size: block_size.into(),
            flags,
            link: link(&backend, &text),
        },
        &sockets,
    )?;
    Ok(Connected {
        index,
        size,
        block_size,
        read_only: flags.contains(TransmissionFlags::READ_ONLY),
        backend,
    })
}

/// Gives a device new connections in place of dead ones. Living ones stay.
///
/// # Errors
/// The device is none of ours, its export is gone or another one, or the kernel refuses.
pub fn reconnect(nbd: &mut NbdFamily, sysfs: &Sysfs, index: u32) -> Result<Backend, DeviceError> {
    let known = sysfs.device(index).ok_or(DeviceError::NotOurs(index))?;
    let backend = known.backend.ok_or(DeviceError::NotOurs(index))?;
    let first = Connection::open(&backend.server, &backend.export, PATIENCE)?;
    if first.size != known.size {
        return Err(DeviceError::Changed {
            index,
            export: backend.export,
            now: first.size,
            size: known.size,
        });
    }
    let mut all = more(
        &first,
        &backend,
        backend.connections.clamp(1, MAX_CONNECTIONS) - 1,
    )?;
    all.insert(0, first);
    let sockets: Vec<_> = all.iter().map(|connection| connection.as_fd()).collect();
    let text = backend.to_string();
    nbd.reconnect(index, &link(&backend, &text), &sockets)?;
    Ok(backend)
}

/// How the kernel treats the connections to `backend`, of which `text` is the text.
const fn link<'a>(backend: &Backend, text: &'a str) -> Link<'a> {
    Link {
        timeout: backend.timeout,
        dead_timeout: backend.dead_timeout,
        backend: text,
    }
}

/// Whether a device of ours was ended, and only stays until nobody has it open any more.
///
/// # Errors
/// The kernel does not answer.
pub fn has_ended(nbd: &mut NbdFamily, known: &Known) -> Result<bool, DeviceError> {
    match &known.backend {
        Some(backend) => {
            let text = backend.to_string();
            Ok(!nbd.takes_connections(known.index, &link(backend, &text))?)
        }
        None => Ok(false),
    }
}

/// Gives all devices that are connected to `server` new connections in place of dead ones, but for those that were
/// ended. Empty where the kernel has no NBD client, or no such device.
#[must_use]
pub fn reconnect_all(server: &Address) -> Vec<(u32, Result<Backend, DeviceError>)> {
    let sysfs = Sysfs::default();
    let ours: Vec<Known> = sysfs
        .devices()
        .into_iter()
        .filter(|known| {
            known
                .backend
                .as_ref()
                .is_some_and(|backend| backend.server == *server)
        })
        .collect();
    if ours.is_empty() {
        return Vec::new();
    }
    let family = KernelSocket::open()
        .map_err(|source| KernelError::Netlink {
            action: "reconnect the nbd devices",
            source,
        })
        .and_then(|socket| NbdFamily::open(Box::new(socket)));
    match family {
        Ok(mut nbd) => ours
            .into_iter()
            .filter_map(|known| match has_ended(&mut nbd, &known) {
                Ok(true) => None,
                Ok(false) => Some((known.index, reconnect(&mut nbd, &sysfs, known.index))),
                Err(error) => Some((known.index, Err(error))),
            })
            .collect(),
        Err(error) => vec![(ours[0].index, Err(error.into()))],
    }
}

//! Commands: what the kernel's NBD client can be told (include/uapi/linux/nbd-netlink.h, drivers/block/nbd.c).

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;

use super::genetlink::{Channel, NetlinkError, exchange, family};
use super::message::{Attributes, Builder};
use crate::nbd::proto::wire::TransmissionFlags;

#[doc(alias = "NBD_GENL_FAMILY_NAME")]
const FAMILY: &CStr = c"nbd";
#[doc(alias = "NBD_GENL_VERSION")]
const VERSION: u8 = 1;

/// What is tried when a device is made.
const CONNECT: &str = "connect an nbd device";

/// Commands.
mod command {
    #[doc(alias = "NBD_CMD_CONNECT")]
    pub(super) const CONNECT: u8 = 1;
    #[doc(alias = "NBD_CMD_DISCONNECT")]
    pub(super) const DISCONNECT: u8 = 2;
    #[doc(alias = "NBD_CMD_RECONFIGURE")]
    pub(super) const RECONFIGURE: u8 = 3;
    #[doc(alias = "NBD_CMD_STATUS")]
    pub(super) const STATUS: u8 = 5;
}

/// Attributes.
mod attribute {
    #[doc(alias = "NBD_ATTR_INDEX")]
    pub(super) const INDEX: u16 = 1;
    #[doc(alias = "NBD_ATTR_SIZE_BYTES")]
    pub(super) const SIZE_BYTES: u16 = 2;
    #[doc(alias = "NBD_ATTR_BLOCK_SIZE_BYTES")]
    pub(super) const BLOCK_SIZE_BYTES: u16 = 3;
    #[doc(alias = "NBD_ATTR_TIMEOUT")]
    pub(super) const TIMEOUT: u16 = 4;
    #[doc(alias = "NBD_ATTR_SERVER_FLAGS")]
    pub(super) const SERVER_FLAGS: u16 = 5;
    #[doc(alias = "NBD_ATTR_CLIENT_FLAGS")]
    pub(super) const CLIENT_FLAGS: u16 = 6;
    #[doc(alias = "NBD_ATTR_SOCKETS")]
    pub(super) const SOCKETS: u16 = 7;
    #[doc(alias = "NBD_ATTR_DEAD_CONN_TIMEOUT")]
    pub(super) const DEAD_CONN_TIMEOUT: u16 = 8;
    #[doc(alias = "NBD_ATTR_DEVICE_LIST")]
    pub(super) const DEVICE_LIST: u16 = 9;
    #[doc(alias = "NBD_ATTR_BACKEND_IDENTIFIER")]
    pub(super) const BACKEND_IDENTIFIER: u16 = 10;

    #[doc(alias = "NBD_SOCK_ITEM")]
    pub(super) const SOCK_ITEM: u16 = 1;
    #[doc(alias = "NBD_SOCK_FD")]
    pub(super) const SOCK_FD: u16 = 1;
    #[doc(alias = "NBD_DEVICE_ITEM")]
    pub(super) const DEVICE_ITEM: u16 = 1;
    #[doc(alias = "NBD_DEVICE_INDEX")]
    pub(super) const DEVICE_INDEX: u16 = 1;
    #[doc(alias = "NBD_DEVICE_CONNECTED")]
    pub(super) const DEVICE_CONNECTED: u16 = 2;
}

/// The kernel's NBD client can't do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The module is not loaded, or was not built.
    #[error("this kernel has no nbd: modprobe nbd")]
    NoNbd,
    /// The kernel refused.
    #[error("{action}: {errno}; {remedy}")]
    Refused {
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        errno: Errno,
        /// What to do.
        remedy: &'static str,
    },
    /// The kernel can't be talked to.
    #[error("{action}")]
    Netlink {
        /// What was tried.
        action: &'static str,
        /// Why.
        source: NetlinkError,
    },
    /// The name of the backend has a NUL byte.
    #[error("tell the kernel the name of the export: it contains NUL")]
    Backend,
}

/// What a device is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device<'a> {
    /// N of `/dev/nbdN`; the kernel takes a free one without.
    pub index: Option<u32>,
    /// Size in bytes.
    pub size: u64,
    /// Logical block size in bytes: a power of two from 512 to a page.
    pub block_size: u64,
    /// As the server gave them in the handshake.
    pub flags: TransmissionFlags,
    /// How it is served and by whom.
    pub link: Link<'a>,
}

/// How the kernel treats the connections of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link<'a> {
    /// A request without an answer for so long ends its connection; whole seconds, 0 for ever.
    pub timeout: Duration,
    /// Without a connection, requests wait so long for a new one before they fail; whole seconds.
    pub dead_timeout: Duration,
    /// Kept by the kernel and shown in `/sys/block/nbdN/backend`; a new connection must bring the same one.
    pub backend: &'a str,
}

/// A device that the kernel knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// N of `/dev/nbdN`.
    pub index: u32,
    /// Whether it is connected.
    pub connected: bool,
}

/// The kernel's NBD client.
pub struct NbdFamily {
    channel: Box<dyn Channel>,
    number: u16,
    sequence: u32,
}

impl std::fmt::Debug for NbdFamily {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("NbdFamily")
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

impl NbdFamily {
    /// Looks the family up.
    ///
    /// # Errors
    /// The kernel has no NBD client, or does not answer.
    pub fn open(mut channel: Box<dyn Channel>) -> Result<Self, KernelError> {
        let number = family(&mut *channel, FAMILY)
            .map_err(|source| KernelError::Netlink {
                action: "ask the kernel for nbd",
                source,
            })?
            .ok_or(KernelError::NoNbd)?;
        Ok(Self {
            channel,
            number,
            sequence: 1,
        })
    }

    fn request(&mut self, command: u8) -> Builder {
        self.sequence = self.sequence.wrapping_add(1);
        Builder::new(self.number, command, VERSION, self.sequence)
    }

    fn exchange(
        &mut self,
        request: Builder,
        action: &'static str,
        mut each: impl FnMut(Attributes<'_>) -> Result<(), NetlinkError>,
    ) -> Result<(), KernelError> {
        exchange(&mut *self.channel, &request.finish(), |message| {
            let (_, attributes) = message.generic()?;
            each(attributes)
        })
        .map_err(|source| match source {
            NetlinkError::Refused(errno) => KernelError::Refused {
                action,
                errno,
                remedy: remedy(action, errno),
            },
            source => KernelError::Netlink { action, source },
        })
    }

    /// Makes a device of connected sockets that are in transmission. The kernel keeps them. Gives N of `/dev/nbdN`.
    ///
    /// # Errors
    /// The device is in use, a value is not allowed, or this is not root.
    pub fn connect(&mut self, device: &Device<'_>, sockets: &[BorrowedFd<'_>]) -> Result<u32, KernelError> {
        let mut request = self.request(command::CONNECT);
        if let Some(index) = device.index {
            request.u32(attribute::INDEX, index);
        }
        request
            .u64(attribute::SIZE_BYTES, device.size)
            .u64(attribute::BLOCK_SIZE_BYTES, device.block_size)
            .u64(attribute::SERVER_FLAGS, device.flags.bits().into())
            .u64(attribute::CLIENT_FLAGS, 0);
        put_link(&mut request, &device.link)?;
        put_sockets(&mut request, sockets);
        let mut made = None;
        self.exchange(request, CONNECT, |attributes| {
            made = Some(attributes.find(attribute::INDEX)?.u32()?);
            Ok(())
        })?;
        made.or(device.index).ok_or(KernelError::Netlink {
            action: CONNECT,
            source: NetlinkError::Unexpected,
        })
    }

    /// Gives a device new sockets in place of dead ones. Those that it has no place for are let go.
    ///
    /// # Errors
    /// The device is not connected, or was made for another backend.
    pub fn reconnect(
        &mut self,
        index: u32,
        link: &Link<'_>,
        sockets: &[BorrowedFd<'_>],
    ) -> Result<(), KernelError> {
        let mut request = self.request(command::RECONFIGURE);
        request.u32(attribute::INDEX, index);
        put_link(&mut request, link)?;
        put_sockets(&mut request, sockets);
        self.exchange(request, "reconnect an nbd device", |_| Ok(()))
    }

    /// Whether a device still has a use for connections. One that was ended while somebody has it open is shown as
    /// connected until the last one closes it, but never gets another connection.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub fn takes_connections(&mut self, index: u32, link: &Link<'_>) -> Result<bool, KernelError> {
        // A reconnection without sockets changes nothing, and is refused where one with sockets would be.
        match self.reconnect(index, link, &[]) {
            Ok(()) => Ok(true),
            Err(KernelError::Refused {
                errno: Errno::EINVAL | Errno::ENOENT | Errno::ENODEV,
                ..
            }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Ends a device: what is in flight is finished, the connections are closed. Requests that come after it fail at
    /// once. Its number is free when nobody has it open any more.
    ///
    /// # Errors
    /// There is no such device.
    pub fn disconnect(&mut self, index: u32) -> Result<(), KernelError> {
        let mut request = self.request(command::DISCONNECT);
        request.u32(attribute::INDEX, index);
        self.exchange(request, "disconnect an nbd device", |_| Ok(()))
    }

    /// All devices, connected or not, in the kernel's order.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub fn devices(&mut self) -> Result<Vec<DeviceState>, KernelError> {
        let request = self.request(command::STATUS);
        let mut devices = Vec::new();
        self.exchange(request, "list the nbd devices", |attributes| {
            for item in attributes.find(attribute::DEVICE_LIST)?.nested().list()? {
                if item.kind != attribute::DEVICE_ITEM {
                    continue;
                }
                let device = item.nested();
                devices.push(DeviceState {
                    index: device.find(attribute::DEVICE_INDEX)?.u32()?,
                    connected: device.find(attribute::DEVICE_CONNECTED)?.u8()? != 0,
                });
            }
            Ok(())
        })?;
        Ok(devices)
    }
}

fn put_link(request: &mut Builder, link: &Link<'_>) -> Result<(), KernelError> {
    let backend = CString::new(link.backend).map_err(|_| KernelError::Backend)?;
    request
        .u64(attribute::TIMEOUT, link.timeout.as_secs())
        .u64(attribute::DEAD_CONN_TIMEOUT, link.dead_timeout.as_secs())
        .string(attribute::BACKEND_IDENTIFIER, &backend);
    Ok(())
}

fn put_sockets(request: &mut Builder, sockets: &[BorrowedFd<'_>]) {
    request.nest(attribute::SOCKETS, |list| {
        for socket in sockets {
            list.nest(attribute::SOCK_ITEM, |item| {
                // A file descriptor is never negative.
                item.u32(
                    attribute::SOCK_FD,
                    u32::try_from(socket.as_raw_fd()).unwrap_or(u32::MAX),
                );
            });
        }
    });
}

/// What may help, by what the kernel answers.
fn remedy(action: &str, errno: Errno) -> &'static str {
    match errno {
        Errno::EINVAL | Errno::ENOMEM if action == CONNECT => {
            "the kernel can't have this device: choose another --device, or none, and see the kernel's log"
        }
        Errno::EPERM | Errno::EACCES => "run as root",
        Errno::EBUSY => "it is in use: choose another --device, or none",
        Errno::ENOENT | Errno::ENODEV => "there is no such device: see `blksnap-agent nbd list`",
        Errno::EINVAL => {
            "it is not connected, or not to this export: see `blksnap-agent nbd list` and the kernel's log"
        }
        _ => "see the kernel's log",
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd as _;

    use super::super::fake::FakeKernel;
    use super::*;

    fn link(backend: &str) -> Link<'_> {
        Link {
            timeout: Duration::from_secs(30),
            dead_timeout: Duration::from_secs(60),
            backend,
        }
    }

    fn device(index: Option<u32>) -> Device<'static> {
        Device {
            index,
            size: 1 << 40,
            block_size: 4096,
            flags: TransmissionFlags::HAS_FLAGS
                | TransmissionFlags::READ_ONLY
                | TransmissionFlags::CAN_MULTI_CONN,
            link: link("blksnap"),
        }
    }

    #[test]
    fn a_kernel_without_nbd_says_what_to_do() {
        let error = NbdFamily::open(Box::new(FakeKernel::without_nbd())).unwrap_err();
        assert_eq!(error.to_string(), "this kernel has no nbd: modprobe nbd");
    }

    #[test]
    fn a_device_is_made_as_the_kernel_is_told() {
        let kernel = FakeKernel::default();
        let mut nbd = NbdFamily::open(Box::new(kernel.clone())).unwrap();
        let files = [File::open("/dev/null").unwrap(), File::open("/dev/null").unwrap()];
        let sockets = [files[0].as_fd(), files[1].as_fd()];
        assert_eq!(nbd.connect(&device(None), &sockets).unwrap(), 0);
        assert_eq!(nbd.connect(&device(Some(5)), &sockets[..1]).unwrap(), 5);
        let made = kernel.device(0).unwrap();
        assert_eq!(made.size, 1 << 40);
        assert_eq!(made.block_size, 4096);
        assert_eq!(made.server_flags, 1 | 2 | 256);
        assert_eq!((made.timeout, made.dead_timeout), (30, 60));
        assert_eq!(made.backend, "blksnap");
        let numbers: Vec<u32> = sockets
            .iter()
            .map(|socket| u32::try_from(socket.as_raw_fd()).unwrap())
            .collect();
        assert_eq!(made.sockets, numbers);
        assert_eq!(
            nbd.devices().unwrap(),
            [
                DeviceState {
                    index: 0,
                    connected: true
                },
                DeviceState {
                    index: 5,
                    connected: true
                }
            ]
        );
        nbd.disconnect(0).unwrap();
        assert!(!nbd.devices().unwrap()[0].connected);
    }

    #[test]
    fn refusals_say_what_was_tried_and_what_helps() {
        let kernel = FakeKernel::default();
        let mut nbd = NbdFamily::open(Box::new(kernel)).unwrap();
        let file = File::open("/dev/null").unwrap();
        nbd.connect(&device(Some(3)), &[file.as_fd()]).unwrap();
        let error = nbd.connect(&device(Some(3)), &[file.as_fd()]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "connect an nbd device: EBUSY: Device or resource busy; it is in use: choose another --device, or none"
        );
        let error = nbd.connect(&device(Some(70_000)), &[file.as_fd()]).unwrap_err();
        assert!(error.to_string().contains("choose another --device"), "{error}");
        let error = nbd.disconnect(9).unwrap_err();
        assert!(error.to_string().contains("nbd list"), "{error}");
        let wrong = Device {
            link: link("a\0b"),
            ..device(None)
        };
        assert!(matches!(
            nbd.connect(&wrong, &[file.as_fd()]),
            Err(KernelError::Backend)
        ));
    }

    #[test]
    fn a_device_that_was_ended_wants_no_connections() {
        let kernel = FakeKernel::default();
        let mut nbd = NbdFamily::open(Box::new(kernel.clone())).unwrap();
        let file = File::open("/dev/null").unwrap();
        nbd.connect(&device(Some(1)), &[file.as_fd()]).unwrap();
        let before = kernel.device(1);
        assert!(nbd.takes_connections(1, &link("blksnap")).unwrap());
        kernel.kill_links(1);
        assert!(nbd.takes_connections(1, &link("blksnap")).unwrap());
        assert_eq!(
            kernel.device(1).map(|device| device.sockets),
            before.map(|device| device.sockets)
        );
        nbd.disconnect(1).unwrap();
        assert!(!nbd.takes_connections(1, &link("blksnap")).unwrap());
    }

    #[test]
    fn dead_connections_are_replaced_for_the_same_backend_only() {
        let kernel = FakeKernel::default();
        let mut nbd = NbdFamily::open(Box::new(kernel.clone())).unwrap();
        let files: Vec<File> = (0..3).map(|_| File::open("/dev/null").unwrap()).collect();
        nbd.connect(&device(Some(1)), &[files[0].as_fd()]).unwrap();
        kernel.kill_links(1);
        nbd.reconnect(1, &link("blksnap"), &[files[1].as_fd(), files[2].as_fd()])
            .unwrap();
        let number = u32::try_from(files[1].as_raw_fd()).unwrap();
        assert_eq!(kernel.device(1).unwrap().sockets, [number], "it had one place");
        let other = nbd
            .reconnect(1, &link("another"), &[files[2].as_fd()])
            .unwrap_err();
        assert!(
            matches!(
                other,
                KernelError::Refused {
                    errno: Errno::EINVAL,
                    ..
                }
            ),
            "{other}"
        );
    }
}

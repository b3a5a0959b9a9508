//! Generic netlink: a socket to the kernel, and the number of a family.
//!
//! A request is answered by messages of its family, then by an error or an acknowledgement; `exchange` gathers
//! them. The socket is behind [`Channel`], so that tests can play the kernel.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, connect, recv, send,
    setsockopt, socket,
};
use nix::sys::time::{TimeVal, TimeValLike};

use super::message::{Builder, DONE, ERROR, Message, MessageError, messages};

/// Longest wait for the kernel's answer. It answers in the system call; this only keeps a fault from hanging.
const PATIENCE_SECONDS: i64 = 60;
/// Bytes of the largest answer: a list of devices of 24 bytes each.
const ANSWER: usize = 1 << 20;

/// The family that knows the others.
#[doc(alias = "GENL_ID_CTRL")]
const CONTROLLER: u16 = 16;
#[doc(alias = "CTRL_CMD_GETFAMILY")]
const GET_FAMILY: u8 = 3;
#[doc(alias = "CTRL_ATTR_FAMILY_ID")]
const FAMILY_ID: u16 = 1;
#[doc(alias = "CTRL_ATTR_FAMILY_NAME")]
const FAMILY_NAME: u16 = 2;

/// A request to the kernel failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket can't be had or used.
    #[error("talk to the kernel by netlink: {action}")]
    Socket {
        /// What was tried.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The kernel answered with an error.
    #[error("{0}")]
    Refused(Errno),
    /// The answer can't be understood.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// The answer is not what was asked for.
    #[error("the kernel's answer is none to the question")]
    Unexpected,
}

/// A way to send a request and to receive answers.
pub trait Channel {
    /// Sends one message.
    ///
    /// # Errors
    /// It can't be sent.
    fn send(&mut self, message: &[u8]) -> io::Result<()>;

    /// Receives one datagram: one message or several.
    ///
    /// # Errors
    /// Nothing comes in time.
    fn receive(&mut self) -> io::Result<Vec<u8>>;
}

/// The kernel.
#[derive(Debug)]
pub struct KernelSocket(OwnedFd);

impl KernelSocket {
    /// Opens a socket.
    ///
    /// # Errors
    /// The system refuses.
    pub fn open() -> Result<Self, NetlinkError> {
        let failed = |action| {
            move |errno: Errno| NetlinkError::Socket {
                action,
                source: errno.into(),
            }
        };
        let handle = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkGeneric,
        )
        .map_err(failed("open a socket"))?;
        bind(handle.as_raw_fd(), &NetlinkAddr::new(0, 0)).map_err(failed("bind the socket"))?;
        connect(handle.as_raw_fd(), &NetlinkAddr::new(0, 0)).map_err(failed("connect the socket"))?;
        setsockopt(&handle, ReceiveTimeout, &TimeVal::seconds(PATIENCE_SECONDS))
            .map_err(failed("set its time-out"))?;
        Ok(Self(handle))
    }
}

impl Channel for KernelSocket {
    fn send(&mut self, message: &[u8]) -> io::Result<()> {
        let sent = send(self.0.as_raw_fd(), message, MsgFlags::empty())?;
        if sent == message.len() {
            Ok(())
        } else {
            Err(io::ErrorKind::WriteZero.into())
        }
    }

    fn receive(&mut self) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; ANSWER];
        loop {
            match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(length) => {
                    buffer.truncate(length);
                    return Ok(buffer);
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// Sends `request`, gives each message of its family to `each`, and waits for the acknowledgement.
pub(super) fn exchange(
    channel: &mut dyn Channel,
    request: &[u8],
    mut each: impl FnMut(&Message<'_>) -> Result<(), NetlinkError>,
) -> Result<(), NetlinkError> {
    let asked = *messages(request)?.first().ok_or(NetlinkError::Unexpected)?;
    channel.send(request).map_err(|source| NetlinkError::Socket {
        action: "send a request",
        source,
    })?;
    loop {
        let answer = channel.receive().map_err(|source| NetlinkError::Socket {
            action: "wait for an answer",
            source,
        })?;
        for message in messages(&answer)? {
            if message.sequence != asked.sequence {
                // An answer to a request that was given up.
                continue;
            }
            match message.kind {
                ERROR => {
                    return match message.errno()? {
                        0 => Ok(()),
                        errno => Err(NetlinkError::Refused(Errno::from_raw(errno))),
                    };
                }
                DONE => return Ok(()),
                kind if kind == asked.kind => each(&message)?,
                _ => return Err(NetlinkError::Unexpected),
            }
        }
    }
}

/// The number of the family `name`; `None` if the kernel has none of this name.
pub(super) fn family(channel: &mut dyn Channel, name: &std::ffi::CStr) -> Result<Option<u16>, NetlinkError> {
    let mut request = Builder::new(CONTROLLER, GET_FAMILY, 1, 1);
    request.string(FAMILY_NAME, name);
    let mut number = None;
    let asked = exchange(channel, &request.finish(), |message| {
        let (_, attributes) = message.generic()?;
        number = Some(attributes.find(FAMILY_ID)?.u16()?);
        Ok(())
    });
    match asked {
        Ok(()) => number.map(Some).ok_or(NetlinkError::Unexpected),
        Err(NetlinkError::Refused(Errno::ENOENT)) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_knows_its_controller_and_not_what_does_not_exist() {
        let mut socket = KernelSocket::open().unwrap();
        assert_eq!(family(&mut socket, c"nlctrl").unwrap(), Some(CONTROLLER));
        assert_eq!(family(&mut socket, c"blksnap-none").unwrap(), None);
    }
}

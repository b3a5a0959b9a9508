//! Stream: the client's socket, plain or with TLS. It never waits: what can't be done now is `WouldBlock`.

use std::io::{self, IoSlice, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::sys::socket::sockopt::{SndBuf, SndBufForce};
use nix::sys::socket::{MsgFlags, Shutdown, recv, sendmsg, setsockopt, shutdown};
use rustls::ServerConnection;

/// Bytes that the kernel may keep of what was sent and not yet read. Enough for an answer of 1 MiB and the next one:
/// client and server then work at once and not in turns.
const SEND_BUFFER: usize = 4 << 20;

/// The client's socket.
pub(in crate::nbd) struct Stream {
    socket: OwnedFd,
    tls: Option<Box<ServerConnection>>,
}

impl Stream {
    /// A connected socket; with TLS if its handshake was done.
    ///
    /// # Errors
    /// The socket can't be prepared.
    pub(in crate::nbd) fn new(socket: OwnedFd, tls: Option<Box<ServerConnection>>) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&socket, FcntlArg::F_GETFL)?);
        fcntl(&socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        // Root may go beyond the system's limit. A smaller buffer only costs speed.
        if setsockopt(&socket, SndBufForce, &SEND_BUFFER).is_err() {
            let _ = setsockopt(&socket, SndBuf, &SEND_BUFFER);
        }
        Ok(Self { socket, tls })
    }

    /// Whether bytes can go through without passing here.
    pub(super) const fn is_plain(&self) -> bool {
        self.tls.is_none()
    }

    /// Whether something was sent that the socket has not taken yet.
    pub(super) fn wants_write(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.wants_write())
    }

    /// Receives; 0 is the end.
    pub(super) fn receive(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match &mut self.tls {
            None => receive(&self.socket, into),
            Some(tls) => loop {
                match tls.reader().read(into) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    // A client that is gone without saying so: what came is complete requests all the same.
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                    other => return other,
                }
                if tls.read_tls(&mut Raw(&self.socket))? == 0 {
                    return Ok(0);
                }
                tls.process_new_packets().map_err(io::Error::other)?;
            },
        }
    }

    /// Sends the front of `parts`; `more` follows at once. Gives how much was taken.
    pub(super) fn send(&mut self, parts: &[IoSlice<'_>], more: bool) -> io::Result<usize> {
        match &mut self.tls {
            None => send(&self.socket, parts, more),
            Some(tls) => {
                // What was taken before goes first: then there is room.
                flush(tls, &self.socket)?;
                let taken = tls.writer().write_vectored(parts)?;
                match flush(tls, &self.socket) {
                    Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
                    _ => Ok(taken),
                }
            }
        }
    }

    /// Gives what was sent before to the socket.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        match &mut self.tls {
            None => Ok(()),
            Some(tls) => flush(tls, &self.socket),
        }
    }

    /// Moves bytes from a pipe to the client. Plain sockets only.
    pub(super) fn splice_from(&self, pipe: BorrowedFd<'_>, length: usize, more: bool) -> io::Result<usize> {
        let mut flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
        flags.set(SpliceFFlags::SPLICE_F_MORE, more);
        Ok(retry(|| splice(pipe, None, &self.socket, None, length, flags))?)
    }

    /// Moves bytes from the client to a pipe; 0 is the end. Plain sockets only.
    pub(super) fn splice_to(&self, pipe: BorrowedFd<'_>, length: usize) -> io::Result<usize> {
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
        Ok(retry(|| splice(&self.socket, None, pipe, None, length, flags))?)
    }

    /// Says that nothing more will be sent. Errors don't matter: it is the end.
    pub(super) fn close(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
            let _ = flush(tls, &self.socket);
        }
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Write);
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn retry<T>(call: impl Fn() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}

fn receive(socket: &OwnedFd, into: &mut [u8]) -> io::Result<usize> {
    loop {
        match recv(socket.as_raw_fd(), into, MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EINTR) => {}
            other => return Ok(other?),
        }
    }
}

fn send(socket: &OwnedFd, parts: &[IoSlice<'_>], more: bool) -> io::Result<usize> {
    let mut flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    flags.set(MsgFlags::from_bits_retain(libc::MSG_MORE), more);
    Ok(retry(|| {
        sendmsg::<()>(socket.as_raw_fd(), parts, &[], flags, None)
    })?)
}

fn flush(tls: &mut ServerConnection, socket: &OwnedFd) -> io::Result<()> {
    while tls.wants_write() {
        if tls.write_tls(&mut Raw(socket))? == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
    }
    Ok(())
}

/// The socket as TLS reads and writes it.
struct Raw<'a>(&'a OwnedFd);

impl io::Read for Raw<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        receive(self.0, into)
    }
}

impl io::Write for Raw<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        send(self.0, parts, false)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

//! Endpoint: a socket on which a server accepts clients.
//!
//! A unix socket is protected by its mode. TCP without TLS is for this machine only: what a snapshot holds is
//! everything that the machine holds. TCP from elsewhere always needs TLS.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::sockopt::{AcceptConn, KeepAlive, SockType as TypeOf, TcpKeepIdle, TcpUserTimeout};
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike as _, SockaddrStorage, getsockname, getsockopt, setsockopt,
};
use tokio::net::{TcpStream, UnixStream};
use tokio_util::either::Either;

use super::address::Address;
use super::proto::Tls;
use super::socket::{SocketError, SocketName, listen_on};
use super::tls::ServerTls;

/// A connection to a client that is silent is checked after this time.
const KEEP_ALIVE: Duration = Duration::from_secs(60);

/// An endpoint can't be made.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The unix socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Others could read images, and nobody would know who.
    #[error(
        "serve nbd on {0}: not a loopback address, and no TLS: give --nbd-tls DIRECTORY with certificates, or use 127.0.0.1 or ::1"
    )]
    NeedsTls(SocketAddr),
    /// The port can't be had.
    #[error("serve nbd on {address}: {source}; choose another port")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// A socket of the service manager that is of no use.
    #[error("serve nbd on the inherited socket {descriptor}: {reason}")]
    Inherited {
        /// Its number.
        descriptor: i32,
        /// What is wrong.
        reason: String,
    },
}

#[derive(Debug)]
enum Listener {
    Unix(tokio::net::UnixListener),
    Tcp(tokio::net::TcpListener),
}

/// A client's connection of either kind.
pub(super) type ClientStream = Either<UnixStream, TcpStream>;

/// A socket on which a server accepts clients.
#[derive(Debug)]
pub struct Endpoint {
    listener: Listener,
    address: Address,
    /// Removes the socket at the end, if we made it.
    _name: Option<SocketName>,
    tls: Option<Arc<ServerTls>>,
    required: bool,
}

/// Whether clients on the same machine must use TLS too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LocalTls {
    /// They may.
    #[default]
    Offered,
    /// They must.
    Required,
}

impl Endpoint {
    /// A new unix socket, mode 0600. Must be called in a tokio runtime, as all of these.
    ///
    /// # Errors
    /// The socket can't be made; the error says why.
    pub fn unix(path: &Path) -> Result<Self, EndpointError> {
        let (listener, name) = listen_on(path)?;
        let failed = |source| SocketError::Io {
            path: path.to_owned(),
            action: "watch it",
            source,
        };
        Ok(Self {
            listener: Listener::Unix(tokio::net::UnixListener::from_std(listener).map_err(failed)?),
            address: Address::Unix(path.to_owned()),
            _name: Some(name),
            tls: None,
            required: false,
        })
    }

    /// A TCP port.
    ///
    /// # Errors
    /// The address is not a loopback one and there is no TLS, or the port can't be had.
    pub fn tcp(
        address: SocketAddr,
        tls: Option<&Arc<ServerTls>>,
        local: LocalTls,
    ) -> Result<Self, EndpointError> {
        check_tls(address, tls)?;
        let failed = |source| EndpointError::Listen { address, source };
        let listener = TcpListener::bind(address).map_err(failed)?;
        Self::of_tcp(listener, tls, local).map_err(failed)
    }

    fn of_tcp(listener: TcpListener, tls: Option<&Arc<ServerTls>>, local: LocalTls) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let address = Address::Tcp(listener.local_addr()?);
        Ok(Self {
            listener: Listener::Tcp(tokio::net::TcpListener::from_std(listener)?),
            required: tls.is_some() && (local == LocalTls::Required || !address.is_local()),
            tls: tls.cloned(),
            address,
            _name: None,
        })
    }

    /// A socket of the service manager: a unix socket, whose access is the service manager's to set, or a TCP port,
    /// to which the same holds as to one of our own.
    ///
    /// # Errors
    /// It is no listening stream socket, or it needs TLS and there is none.
    pub fn inherited(
        socket: OwnedFd,
        tls: Option<&Arc<ServerTls>>,
        local: LocalTls,
    ) -> Result<Self, EndpointError> {
        let descriptor = socket.as_raw_fd();
        let wrong = |reason: String| EndpointError::Inherited { descriptor, reason };
        let failed = |error: io::Error| wrong(error.to_string());
        let listens = getsockopt(&socket, AcceptConn).map_err(|errno| wrong(errno.to_string()))?;
        let kind = getsockopt(&socket, TypeOf).map_err(|errno| wrong(errno.to_string()))?;
        if !listens || kind != SockType::Stream {
            return Err(wrong(
                "it is no listening stream socket: use ListenStream= in the socket unit".to_owned(),
            ));
        }
        let bound: SockaddrStorage =
            getsockname(socket.as_raw_fd()).map_err(|errno| wrong(errno.to_string()))?;
        match bound.family() {
            Some(AddressFamily::Unix) => {
                let listener = UnixListener::from(socket);
                listener.set_nonblocking(true).map_err(failed)?;
                let path = listener
                    .local_addr()
                    .ok()
                    .and_then(|address| address.as_pathname().map(Path::to_owned))
                    .unwrap_or_else(|| PathBuf::from(format!("/proc/self/fd/{descriptor}")));
                Ok(Self {
                    listener: Listener::Unix(tokio::net::UnixListener::from_std(listener).map_err(failed)?),
                    address: Address::Unix(path),
                    _name: None,
                    tls: None,
                    required: false,
                })
            }
            Some(AddressFamily::Inet | AddressFamily::Inet6) => {
                let listener = TcpListener::from(socket);
                check_tls(listener.local_addr().map_err(failed)?, tls)?;
                Self::of_tcp(listener, tls, local).map_err(failed)
            }
            _ => Err(wrong("it is neither a unix socket nor TCP".to_owned())),
        }
    }

    /// Where clients find it.
    #[must_use]
    pub const fn address(&self) -> &Address {
        &self.address
    }

    /// How it stands to TLS.
    pub(super) const fn mode(&self) -> Tls {
        match (&self.tls, self.required) {
            (None, _) => Tls::Unavailable,
            (Some(_), false) => Tls::Offered,
            (Some(_), true) => Tls::Required,
        }
    }

    pub(super) const fn tls(&self) -> Option<&Arc<ServerTls>> {
        self.tls.as_ref()
    }

    /// The next client.
    pub(super) async fn accept(&self) -> io::Result<ClientStream> {
        match &self.listener {
            Listener::Unix(listener) => Ok(Either::Left(listener.accept().await?.0)),
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                // A machine that lost power says nothing: nobody waits for it for ever. Refusals cost only that.
                let _ = setsockopt(&stream, KeepAlive, &true);
                let seconds = u32::try_from(KEEP_ALIVE.as_secs()).unwrap_or(u32::MAX);
                let _ = setsockopt(&stream, TcpKeepIdle, &seconds);
                let _ = setsockopt(&stream, TcpUserTimeout, &(2 * seconds * 1000));
                Ok(Either::Right(stream))
            }
        }
    }
}

fn check_tls(address: SocketAddr, tls: Option<&Arc<ServerTls>>) -> Result<(), EndpointError> {
    if tls.is_none() && !Address::Tcp(address).is_local() {
        return Err(EndpointError::NeedsTls(address));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[tokio::test]
    async fn tcp_from_elsewhere_needs_tls() {
        for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:10809"] {
            let error = Endpoint::tcp(address.parse().unwrap(), None, LocalTls::Offered).unwrap_err();
            assert!(matches!(error, EndpointError::NeedsTls(_)), "{error}");
        }
        let local = Endpoint::tcp("127.0.0.1:0".parse().unwrap(), None, LocalTls::Required).unwrap();
        assert_eq!(local.mode(), Tls::Unavailable);
        let Address::Tcp(taken) = local.address().clone() else {
            panic!("{}", local.address())
        };
        assert_ne!(taken.port(), 0);
        let error = Endpoint::tcp(taken, None, LocalTls::Offered).unwrap_err();
        assert!(matches!(error, EndpointError::Listen { .. }), "{error}");
    }

    #[tokio::test]
    async fn inherited_sockets_are_looked_at() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let unix = UnixListener::bind(&path).unwrap();
        let endpoint = Endpoint::inherited(unix.into(), None, LocalTls::Offered).unwrap();
        assert_eq!(endpoint.address(), &Address::Unix(path.clone()));
        drop(endpoint);
        assert!(path.exists(), "the service manager made it and removes it");

        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        Endpoint::inherited(tcp.into(), None, LocalTls::Offered).unwrap();
        let everywhere = TcpListener::bind("0.0.0.0:0").unwrap();
        let error = Endpoint::inherited(everywhere.into(), None, LocalTls::Offered).unwrap_err();
        assert!(matches!(error, EndpointError::NeedsTls(_)), "{error}");

        let datagram = UnixDatagram::unbound().unwrap();
        let (connected, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        for socket in [OwnedFd::from(datagram), connected.into(), file.into()] {
            let error = Endpoint::inherited(socket, None, LocalTls::Offered).unwrap_err();
            assert!(matches!(error, EndpointError::Inherited { .. }), "{error}");
        }
    }
}

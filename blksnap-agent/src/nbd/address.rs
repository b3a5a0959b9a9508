//! Address: where a server listens, or is.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

/// Where a server listens, or is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// TCP.
    Tcp(SocketAddr),
}

/// An address that can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{0}\" is no address: give the path of a unix socket, or IP:PORT such as 127.0.0.1:10809 or [::1]:10809"
)]
pub struct AddressError(String);

impl Address {
    /// Whether only this machine can reach it.
    #[must_use]
    pub const fn is_local(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Tcp(address) => match address.ip() {
                IpAddr::V4(ip) => ip.is_loopback(),
                IpAddr::V6(ip) => ip.is_loopback(),
            },
        }
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if let Ok(address) = text.parse() {
            Ok(Self::Tcp(address))
        } else if text.contains('/') {
            Ok(Self::Unix(text.into()))
        } else {
            Err(AddressError(text.to_owned()))
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(formatter),
            Self::Tcp(address) => address.fmt(formatter),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_paths_or_ip_and_port() {
        for (text, local) in [
            ("/run/blksnap/nbd.sock", true),
            ("./s", true),
            ("127.0.0.1:10809", true),
            ("127.9.9.9:1", true),
            ("[::1]:10809", true),
            ("0.0.0.0:10809", false),
            ("192.0.2.1:10809", false),
            ("[::]:10809", false),
            // Mapped: reaches the loopback of the other family only on some systems, so it counts as outside.
            ("[::ffff:127.0.0.1]:10809", false),
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address.is_local(), local, "{text}");
            assert_eq!(address.to_string(), text);
        }
        for wrong in ["", "10809", "localhost:10809", "127.0.0.1", "nbd.sock"] {
            assert!(wrong.parse::<Address>().is_err(), "{wrong}");
        }
    }
}

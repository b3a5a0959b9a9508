//! Activation: sockets that the service manager made before the daemon was started (sd_listen_fds(3)).
//!
//! A socket is told apart by its name: `FileDescriptorName=` of the socket unit, or the unit's own name without that.
//! What ends in `nbd` is for NBD clients, and what ends in `control` for the control interface.

use std::os::fd::{OwnedFd, RawFd};

use nix::errno::Errno;

use crate::sys::inherit;

/// The inherited sockets can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ActivationError {
    /// The environment makes no sense.
    #[error("use the sockets of the service manager: {name}={value} is no number")]
    Number {
        /// The variable.
        name: &'static str,
        /// Its value.
        value: String,
    },
    /// A socket whose purpose is not known.
    #[error(
        "use the sockets of the service manager: descriptor {descriptor} is called \"{name}\": set FileDescriptorName= to nbd or control"
    )]
    Name {
        /// Its number.
        descriptor: RawFd,
        /// Its name.
        name: String,
    },
    /// Two where one is used.
    #[error("use the sockets of the service manager: there is more than one for the control interface")]
    Twice,
    /// A descriptor is not open.
    #[error("use the sockets of the service manager: {0}")]
    Taken(Errno),
}

/// What a socket is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Nbd,
    Control,
}

/// Sockets of the service manager.
#[derive(Debug, Default)]
pub struct Inherited {
    /// For NBD clients.
    pub nbd: Vec<OwnedFd>,
    /// For the control interface.
    pub control: Option<OwnedFd>,
}

impl Inherited {
    /// Takes the sockets that were made for this process; none if it was started otherwise.
    ///
    /// # Errors
    /// The environment makes no sense, or a socket is not known.
    pub fn take() -> Result<Self, ActivationError> {
        let roles = plan(|name| std::env::var(name).ok(), std::process::id())?;
        let mut inherited = Self::default();
        if roles.is_empty() {
            return Ok(inherited);
        }
        let count = RawFd::try_from(roles.len()).map_err(|_| ActivationError::Taken(Errno::EBADF))?;
        for (socket, role) in inherit::take(count)
            .map_err(ActivationError::Taken)?
            .into_iter()
            .zip(roles)
        {
            match role {
                Role::Nbd => inherited.nbd.push(socket),
                Role::Control => inherited.control = Some(socket),
            }
        }
        Ok(inherited)
    }
}

/// The roles of the inherited descriptors, in their order.
fn plan(get: impl Fn(&str) -> Option<String>, process: u32) -> Result<Vec<Role>, ActivationError> {
    let number = |name: &'static str| match get(name) {
        None => Ok(None),
        Some(value) => value
            .parse::<u32>()
            .map(Some)
            .map_err(|_| ActivationError::Number { name, value }),
    };
    // Set for a parent of ours, they are none of our business.
    if number("LISTEN_PID")? != Some(process) {
        return Ok(Vec::new());
    }
    let count = number("LISTEN_FDS")?.unwrap_or_default();
    let names = get("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':');
    let mut roles = Vec::new();
    for index in 0..count {
        let name = names.next().unwrap_or_default();
        let bare = name.strip_suffix(".socket").unwrap_or(name);
        let role = if bare.ends_with("nbd") {
            Role::Nbd
        } else if bare.ends_with("control") {
            Role::Control
        } else {
            return Err(ActivationError::Name {
                descriptor: inherit::FIRST.saturating_add_unsigned(index),
                name: name.to_owned(),
            });
        };
        if role == Role::Control && roles.contains(&role) {
            return Err(ActivationError::Twice);
        }
        roles.push(role);
    }
    Ok(roles)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn roles(variables: &[(&str, &str)]) -> Result<Vec<Role>, ActivationError> {
        plan(
            |name| {
                variables
                    .iter()
                    .find(|(known, _)| *known == name)
                    .map(|(_, value)| (*value).to_owned())
            },
            42,
        )
    }

    #[test]
    fn sockets_are_known_by_name() {
        let named = |names| {
            roles(&[
                ("LISTEN_PID", "42"),
                ("LISTEN_FDS", "3"),
                ("LISTEN_FDNAMES", names),
            ])
        };
        assert_eq!(
            named("nbd:control:nbd"),
            Ok(vec![Role::Nbd, Role::Control, Role::Nbd])
        );
        assert_eq!(
            named("blksnap-nbd.socket:blksnap-control.socket:nbd"),
            Ok(vec![Role::Nbd, Role::Control, Role::Nbd])
        );
        assert_eq!(
            named("nbd:nbd"),
            Err(ActivationError::Name {
                descriptor: 5,
                name: String::new()
            })
        );
        assert_eq!(named("control:control:nbd"), Err(ActivationError::Twice));
        let error = named("nbd:connection:nbd").unwrap_err();
        assert!(error.to_string().contains("FileDescriptorName="), "{error}");
    }

    #[test]
    fn what_is_meant_for_others_is_left_alone() {
        assert_eq!(roles(&[]), Ok(vec![]));
        assert_eq!(
            roles(&[("LISTEN_FDS", "1"), ("LISTEN_FDNAMES", "nbd")]),
            Ok(vec![])
        );
        assert_eq!(
            roles(&[("LISTEN_PID", "41"), ("LISTEN_FDS", "1"), ("LISTEN_FDNAMES", "x")]),
            Ok(vec![])
        );
        assert_eq!(roles(&[("LISTEN_PID", "42")]), Ok(vec![]));
        assert!(matches!(
            roles(&[("LISTEN_PID", "x")]),
            Err(ActivationError::Number {
                name: "LISTEN_PID",
                ..
            })
        ));
        assert!(matches!(
            roles(&[("LISTEN_PID", "42"), ("LISTEN_FDS", "-1")]),
            Err(ActivationError::Number {
                name: "LISTEN_FDS",
                ..
            })
        ));
    }
}

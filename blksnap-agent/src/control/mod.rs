//! Control: the HTTP/JSON interface of the daemon on a unix socket.
//!
//! - [`api`]: every request and answer as a type; the CLI, the tests and other programs use the same ones.
//! - [`error`]: what a request that fails is answered with.
//! - [`server`]: the routes. It knows the daemon only by the trait [`Service`].
//! - [`stream`]: answers of work that takes long: one JSON object a line, and the end of the client ends the work.
//! - [`client`]: requests from another process.
//! - [`directory`]: where the sockets are.

pub mod api;
pub mod client;
pub mod directory;
pub mod error;
pub mod server;
pub mod stream;
#[cfg(test)]
mod tests;

pub use api::ErrorBody;
pub use error::{ApiError, Code};
pub use server::Service;

/// Directory of the sockets unless told otherwise.
pub const RUNTIME_DIR: &str = "/run/blksnap";

/// Name of the control socket in the runtime directory.
pub const CONTROL_SOCKET: &str = "control.sock";

/// Name of the NBD socket in the runtime directory.
pub const NBD_SOCKET: &str = "nbd.sock";

/// Name of the lock file in the runtime directory; it holds the process id of the daemon.
pub const LOCK_FILE: &str = "daemon.lock";

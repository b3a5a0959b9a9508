//! NBD: images for other people's tools.
//!
//! | file | role |
//! |---|---|
//! | [`proto`] | the protocol without input and output (core) |
//! | [`export`] | what can be served; [`mod@file`] is a raw image file or a block device |
//! | [`changes`] | what changed, as metadata contexts |
//! | [`registry`] | the exports offered now; they come and go |
//! | [`server`] | accepts clients, ends in good order; [`limits`] is what bounds it |
//! | [`endpoint`] | the sockets that it listens on: [`socket`], [`activation`], [`tls`] |
//! | `connection` | one client: the handshake, a task |
//! | `transmit` | one client: its requests, a thread; beside it `workers`, `buffers`, `pipes`, `wake`, `end` |
//! | `ahead` | what is read before clients ask for it; `readahead` says what that is |
//! | [`client`] | the other side of the handshake |
//! | [`kernel`] | exports as block devices of this machine |
//! | [`counters`] | what the server did, for metrics |
//!
//! A caller makes a [`registry::Exports`], starts a [`server::Server`] on it, adds and removes exports at will, and
//! stops the server at the end.

pub mod activation;
pub mod address;
mod ahead;
mod buffers;
pub mod changes;
pub mod client;
mod connection;
pub mod counters;
pub mod cow;
mod end;
pub mod endpoint;
pub mod export;
pub mod file;
pub mod kernel;
pub mod limits;
pub mod mapped;
mod pipes;
pub mod proto;
mod readahead;
pub mod registry;
pub mod server;
pub mod socket;
pub mod tls;
mod transmit;
mod wake;
mod workers;

#[cfg(all(test, feature = "shuttle"))]
mod orders;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

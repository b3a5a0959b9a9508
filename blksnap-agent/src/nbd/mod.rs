//! NBD: images for other people's tools.
//!
//! | file | role |
//! |---|---|
//! | [`proto`] | the protocol without input and output (core) |
//! | [`export`] | what can be served; [`mod@file`] is a raw image file or a block device |
//! | [`changes`] | what changed, as metadata contexts |
//! | [`registry`] | the exports offered now; they come and go |
//! | [`server`] | accepts clients on a unix socket, ends in good order; [`socket`] makes the socket |
//! | `connection` | one client |
//! | [`counters`] | what the server did, for metrics |
//!
//! A caller makes a [`registry::Exports`], starts a [`server::Server`] on it, adds and removes exports at will, and
//! stops the server at the end.

pub mod address;
pub mod changes;
pub mod client;
mod connection;
pub mod counters;
pub mod export;
pub mod file;
pub mod kernel;
pub mod proto;
pub mod registry;
pub mod server;
pub mod socket;

#[cfg(test)]
mod tests;

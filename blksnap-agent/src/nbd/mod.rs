//! NBD: images for other people's tools.

mod connection;
pub mod counters;
pub mod export;
pub mod file;
pub mod proto;
pub mod registry;
pub mod server;
pub mod socket;

#[cfg(test)]
mod tests;

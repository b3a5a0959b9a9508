//! NBD: images for other people's tools.

pub mod counters;
pub mod export;
pub mod file;
pub mod proto;
pub mod registry;

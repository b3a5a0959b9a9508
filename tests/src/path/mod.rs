//! Path: every way to write to a block device, and the comparison of what changed with what is reported.

mod operations;
mod subject;

pub use operations::{ALL, Operation};
pub use subject::{Seen, Subject};

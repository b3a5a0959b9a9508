//! Difference storage: where copies of old data are kept.
//!
//! [`DirStorage`] is a directory. Its files have no name: nothing of them outlives the agent, however that ends,
//! and nobody can open or move them by mistake. They are sparse and grow as data comes.

mod directory;

pub use directory::{DirStorage, StorageError, stored_bytes};

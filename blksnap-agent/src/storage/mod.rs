//! Difference storage: where copies of old data are kept.
//!
//! [`DirStorage`] is a directory. Its files have no name, unless they are to be found again: nothing of them outlives
//! the agent, however that ends, and nobody can open or move them by mistake. They are sparse and grow as data comes.
//!
//! [`Pool`] is all the difference storage of one snapshot: directories, files, ranges of block devices, memory
//! ([`StorageSpec`]), several at once, in the order in which they were given.

mod directory;
mod error;
mod growth;
mod open;
mod pool;
mod spec;
mod store;

pub use directory::{DirStorage, stored_bytes};
pub use error::StorageError;
pub use open::{Numbered, OwnPlace};
pub use pool::{DeviceExtent, Pool, PoolOptions, Usage};
pub use spec::{Own, OwnFile, SpecError, StorageSpec};

//! Sync: the primitives by which threads share what must be right in any order of their steps.
//!
//! They are the standard library's. With the feature `shuttle`, which only tests have, they belong to a scheduler
//! that runs the threads of a test one step at a time, in an order that it draws anew for each of thousands of runs;
//! `cargo xtask test` runs the tests named `orders` so. Nothing else works with that feature.

#[cfg(not(feature = "shuttle"))]
pub use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, atomic};

#[cfg(feature = "shuttle")]
pub use shuttle::sync::{Mutex, MutexGuard, PoisonError, RwLock, atomic};

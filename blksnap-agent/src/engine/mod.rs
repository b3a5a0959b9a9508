//! Engine: moves bytes as the core decided.
//!
//! A [`Copier`] reads extents of devices and hands them to [`Sink`]s. It keeps a bounded number of buffers in
//! flight with io_uring, or with a few threads where that is not permitted. Runs of zeroes never travel as data.

mod cancel;
mod copier;
pub mod cow;
mod progress;
mod sink;
mod threads;
mod zeroes;

pub use cancel::CancelToken;
pub use copier::{Copier, CopyError, Job, Method, Source};
pub use progress::{Phase, Progress, Silent};
pub use sink::{FileSink, Sink};

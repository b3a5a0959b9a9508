//! Park: a place where writes sleep, for programs that may (`blksnap-ebpf`, module `park`).

mod calls;
mod parker;
mod place;
#[cfg(test)]
mod tests;
mod wire;

use std::ffi::OsString;
use std::path::PathBuf;

pub use parker::{SUBCOMMAND, main};

pub(super) use calls::put as put_calls;
pub(super) use place::{Maps, Place};

/// The program to run as the parker.
#[derive(Clone, Debug)]
pub struct ParkerCommand {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
}

impl Default for ParkerCommand {
    /// The running program itself, with [`SUBCOMMAND`].
    fn default() -> Self {
        Self {
            program: "/proc/self/exe".into(),
            arguments: vec![SUBCOMMAND.into()],
        }
    }
}

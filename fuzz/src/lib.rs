//! Fuzz targets: what reads bytes from outside, beside an oracle that reads them in another way.
//!
//! A target is a function of bytes that panics when the code under test is wrong: when it panics itself, takes too
//! long or too much memory, or differs from the oracle. `cargo xtask fuzz` runs it under libFuzzer, and `cargo test`
//! over the inputs in `corpus/NAME`, which are kept because they once found something or reach much code.
//!
//! A new target is a module here, a line in [`TARGETS`], and a first input in `corpus/NAME`.

mod checksum;
pub mod cow_ops;
mod frame_oracle;
pub mod nbd_handshake;
pub mod nbd_transmission;
pub mod ring_record;
pub mod saved_map;
pub mod state_file;

/// A target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Name on the command line, and of the folder of inputs.
    pub name: &'static str,
    /// Runs one input; panics when something is wrong.
    pub run: fn(&[u8]),
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target {
        name: "cow_ops",
        run: cow_ops::run,
    },
    Target {
        name: "nbd_handshake",
        run: nbd_handshake::run,
    },
    Target {
        name: "nbd_transmission",
        run: nbd_transmission::run,
    },
    Target {
        name: "ring_record",
        run: ring_record::run,
    },
    Target {
        name: "saved_map",
        run: saved_map::run,
    },
    Target {
        name: "state_file",
        run: state_file::run,
    },
];

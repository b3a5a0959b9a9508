//! Demonstration: the main job on two block devices in use, told as it goes.
//!
//! Everything is real and made for it: loop devices with ext4 and xfs, writers on both, a daemon and its commands,
//! NBD clients and the file systems' own checkers. `cargo xtask run` builds and starts it. Whatever happens, also
//! Ctrl-C, it leaves no device, mount or process behind: each thing made here is removed when its value is
//! dropped.

mod compare;
mod devices;
mod story;
mod table;
mod writers;

use std::process::ExitCode;

use anyhow::{Result, ensure};
use blksnap_tests::{Interrupt, Interrupted, complain};

/// Exit code after a signal, as shells have it for Ctrl-C.
const INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    match tell() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<Interrupted>() => {
            complain("interrupted; everything made here is removed");
            ExitCode::from(INTERRUPTED)
        }
        Err(error) => {
            complain(format_args!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn tell() -> Result<()> {
    ensure!(
        nix::unistd::Uid::effective().is_root(),
        "the demonstration makes block devices and loads eBPF programs: run it as root"
    );
    let interrupt = Interrupt::install()?;
    let outcome = story::tell(&interrupt);
    // A program that was run here may have had the same signal, and failed by it.
    interrupt.check()?;
    outcome
}

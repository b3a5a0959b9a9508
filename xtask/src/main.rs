//! Developer and CI commands of blksnap: `cargo xtask COMMAND`.

mod process;
mod toolchain;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Developer and CI commands of blksnap.
#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    disable_help_subcommand = true
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Provide what the build needs: Rust library sources and bpf-linker
    Setup(toolchain::SetupArguments),
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Setup(arguments) => toolchain::set_up(&arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

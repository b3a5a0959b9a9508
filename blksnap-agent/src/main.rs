//! The `blksnap-agent` binary.

use std::process::ExitCode;

use blksnap_agent::disk::watchdog;

fn main() -> ExitCode {
    if std::env::args_os()
        .nth(1)
        .is_some_and(|argument| argument == watchdog::SUBCOMMAND)
    {
        return match watchdog::main() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("blksnap-agent {}: {error}", watchdog::SUBCOMMAND);
                ExitCode::FAILURE
            }
        };
    }
    ExitCode::SUCCESS
}

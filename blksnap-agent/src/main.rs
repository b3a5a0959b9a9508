//! The `blksnap-agent` binary.

use std::process::ExitCode;

use blksnap_agent::cli;
use blksnap_agent::disk::watchdog;

fn main() -> ExitCode {
    // The watchdog takes no part in the command line: it is started by the daemon and has to be small.
    if std::env::args_os()
        .nth(1)
        .is_some_and(|argument| argument == watchdog::SUBCOMMAND)
    {
        return match watchdog::main() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{} {}: {error}", cli::PROGRAM, watchdog::SUBCOMMAND);
                ExitCode::FAILURE
            }
        };
    }
    cli::main()
}

//! The `blksnap-agent` binary.

use std::process::ExitCode;

use blksnap_agent::cli;
use blksnap_agent::disk::watchdog;
use blksnap_agent::filter::gate::park;
use blksnap_agent::own;

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
    // Nor does the process that looks after files on served devices.
    if std::env::args_os()
        .nth(1)
        .is_some_and(|argument| argument == own::SUBCOMMAND)
    {
        return match own::main() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{} {}: {error}", cli::PROGRAM, own::SUBCOMMAND);
                ExitCode::FAILURE
            }
        };
    }
    // Nor does the one in whose memory writes sleep.
    if std::env::args_os()
        .nth(1)
        .is_some_and(|argument| argument == park::SUBCOMMAND)
    {
        return match park::main() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{} {}: {error}", cli::PROGRAM, park::SUBCOMMAND);
                ExitCode::FAILURE
            }
        };
    }
    cli::main()
}

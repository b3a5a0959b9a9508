//! CLI: the commands of `blksnap-agent`.
//!
//! All but `daemon`, `doctor`, `nbd`, `completions` and `man` are clients of the daemon. An answer goes to standard
//! output, as text for people or, with `--output json`, as the JSON of [`crate::control::api`]. An error is one
//! line on standard error and an exit code that is not 0: 1 when something failed, 2 when the command line is
//! wrong.

mod args;
mod backup;
mod cbt;
mod daemon;
mod device;
mod doctor;
mod extents;
mod generate;
mod heat;
mod nbd;
mod progress;
mod serve;
mod size;
mod snapshot;
mod table;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::error::ErrorKind;
use clap::{CommandFactory as _, FromArgMatches as _};
use serde::Serialize;

pub use args::{Cli, Command, Output};

use crate::control::client::Client;

/// Name of the program, in messages.
pub const PROGRAM: &str = env!("CARGO_PKG_NAME");

/// Runs the command line of the process.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::command()
        .try_get_matches()
        .and_then(|matches| Cli::from_arg_matches(&matches))
    {
        Ok(cli) => cli,
        Err(error) => return wrong_usage(&error),
    };
    match run(cli) {
        Ok(code) => code,
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&crate::control::error::chain(&*error));
            ExitCode::FAILURE
        }
    }
}

/// One line on standard error.
fn complain(message: &str) {
    let line = message.split_whitespace().collect::<Vec<_>>().join(" ");
    // Nowhere to say that standard error is closed.
    let _ = writeln!(std::io::stderr(), "{PROGRAM}: {line}");
}

/// Help and version go out as clap makes them; what is wrong is said in one line.
fn wrong_usage(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = error.print();
            ExitCode::SUCCESS
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            ExitCode::from(2)
        }
        _ => {
            let text = error.to_string();
            let wrong = text
                .split("\n\n")
                .next()
                .unwrap_or_default()
                .trim_start_matches("error: ");
            complain(&format!("{wrong}: see `{PROGRAM} --help`"));
            ExitCode::from(2)
        }
    }
}

/// The reader of our output left, as `head` does: no reason to complain.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

fn run(cli: Cli) -> Result<ExitCode> {
    let done = ExitCode::SUCCESS;
    let is_picture = matches!(cli.output, Output::Svg | Output::Png);
    if is_picture && !matches!(cli.command, Command::Cbt(args::Cbt::Heat { .. })) {
        complain(&format!(
            "--output: only `{PROGRAM} cbt heat` draws a picture: see `{PROGRAM} --help`"
        ));
        return Ok(ExitCode::from(2));
    }
    match &cli.command {
        Command::Completions { shell } => generate::completions(*shell).map(|()| done),
        Command::Man { directory } => generate::man(directory.as_deref()).map(|()| done),
        Command::Doctor(options) => doctor::run(options, cli.output),
        command if !nix::unistd::geteuid().is_root() => {
            bail!("{}: needs root: run with sudo", command.name())
        }
        _ => privileged(cli),
    }
}

fn privileged(cli: Cli) -> Result<ExitCode> {
    let done = |()| ExitCode::SUCCESS;
    let context = Context {
        client: Client::new(&cli.socket),
        output: cli.output,
    };
    match cli.command {
        Command::Daemon(options) => daemon::run(*options, &cli.socket).map(done),
        Command::Attach(options) => block_on(device::attach(&context, &options)).map(done),
        Command::Detach(options) => block_on(device::detach(&context, &options)).map(done),
        Command::Status(options) => block_on(device::status(&context, &options)).map(done),
        Command::Cbt(command) => block_on(cbt::run(&context, &command)).map(done),
        Command::Snapshot(command) => block_on(snapshot::run(&context, &command)),
        Command::Serve(options) => block_on(serve::serve(&context, &options)).map(done),
        Command::Served => block_on(serve::list(&context)).map(done),
        Command::Unserve(options) => block_on(serve::unserve(&context, &options)).map(done),
        Command::Backup(options) => block_on(backup::run(&context, &options)).map(done),
        Command::Nbd(command) => block_on(nbd::run(&context, &cli.socket, command)).map(done),
        Command::Doctor(_) | Command::Completions { .. } | Command::Man { .. } => Ok(ExitCode::SUCCESS),
    }
}

fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?
        .block_on(work)
}

/// What every command of a client has.
#[derive(Debug)]
pub(crate) struct Context {
    client: Client,
    output: Output,
}

impl Context {
    /// Prints `answer` as JSON, or as the text that `text` makes of it.
    fn print<T: Serialize>(&self, answer: &T, text: impl FnOnce(&T) -> String) -> Result<()> {
        print(self.output, answer, text)
    }
}

fn print<T: Serialize>(output: Output, answer: &T, text: impl FnOnce(&T) -> String) -> Result<()> {
    let mut text = match output {
        Output::Json => serde_json::to_string_pretty(answer)?,
        Output::Text | Output::Svg | Output::Png => text(answer),
    };
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    write_out(text.as_bytes())
}

fn write_out(bytes: &[u8]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()?;
    Ok(())
}

/// The path as the daemon, which has another working directory, can use it. Symbolic links stay.
fn absolute(path: &Path) -> Result<String> {
    let path = std::path::absolute(path).with_context(|| format!("find {}", path.display()))?;
    path.into_os_string().into_string().map_err(|path| {
        anyhow::anyhow!(
            "use {}: the path is no UTF-8: rename it",
            PathBuf::from(path).display()
        )
    })
}

//! Generate: completion scripts and manual pages, both made of the command line's own description.

use std::path::Path;

use anyhow::{Context as _, Result};
use clap::CommandFactory as _;

use super::{Cli, PROGRAM, write_out};

pub(super) fn completions(shell: clap_complete::Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), PROGRAM, &mut script);
    write_out(&script)
}

pub(super) fn man(directory: Option<&Path>) -> Result<()> {
    match directory {
        Some(directory) => clap_mangen::generate_to(Cli::command(), directory)
            .with_context(|| format!("write manual pages to {}", directory.display())),
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(Cli::command())
                .render(&mut page)
                .context("make the manual page")?;
            write_out(&page)
        }
    }
}

//! Dm: takes or releases a snapshot by the dm filter, and ends itself, as a crash would, before a step; or works until it is
//! killed.

mod work;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use blksnap_agent::disk::WatchdogCommand;
use blksnap_agent::disk::watchdog::SUBCOMMAND;
use blksnap_agent::filter::dm::{Dm, DmOptions};
use blksnap_agent::units::SnapshotId;
use blksnap_tests::agent_binary;
use blksnap_tests::volumes::Nothing;
use clap::Parser;
use nix::sys::signal::{Signal, raise};
use work::Work;

/// Take or release a snapshot by the dm filter, and maybe end before it is done. Run by the tests, in a guest.
#[derive(Debug, Parser)]
#[command(name = "blksnap-dm")]
struct Arguments {
    /// Directory of the journal
    #[arg(long)]
    journal: PathBuf,
    /// Directory of the difference storage
    #[arg(long)]
    storage: PathBuf,
    /// The snapshot
    #[arg(long, required_unless_present = "sums")]
    snapshot: Option<SnapshotId>,
    /// Takes, reads and releases until it is killed, with files of sums in this directory
    #[arg(long, value_name = "DIR")]
    sums: Option<PathBuf>,
    /// With --sums: looks at what was left, releases it, and ends
    #[arg(long)]
    once: bool,
    /// Ends itself before this step, counted from 0
    #[arg(long)]
    end_before: Option<u32>,
    /// Releases the snapshot instead of taking it
    #[arg(long)]
    release: bool,
    /// The origins
    devices: Vec<PathBuf>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let mut options = DmOptions::new(arguments.journal.clone());
    options.watchdog = WatchdogCommand {
        program: agent_binary()?,
        arguments: vec![SUBCOMMAND.into()],
    };
    if let Some(sums) = arguments.sums {
        // The sums are read while the origins are suspended, and guests are slow.
        options.limit = Duration::from_secs(120);
        let work = Work {
            dm: Dm::open(options)?,
            origins: work::origins(&arguments.devices, &arguments.storage)?,
            sums,
        };
        return work.run(arguments.once);
    }
    let snapshot = arguments.snapshot.context("a snapshot")?;
    let done = AtomicU32::new(0);
    let end_before = arguments.end_before;
    let dm = Dm::open(options.clone())?;
    if arguments.release {
        // What the process before left is adopted before steps are counted.
        dm.recover(true)?;
    }
    drop(dm);
    options.observer = Some(Arc::new(move |_| {
        if Some(done.fetch_add(1, Ordering::Relaxed)) == end_before {
            // It does not return.
            let _ = raise(Signal::SIGKILL);
        }
    }));
    let dm = Dm::open(options)?;
    if arguments.release {
        dm.release(snapshot)?;
    } else {
        let origins = work::origins(&arguments.devices, &arguments.storage)?;
        dm.take(snapshot, &origins, &mut Nothing)?;
    }
    println!("done");
    Ok(())
}

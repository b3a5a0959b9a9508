//! Holds the writes of a device until it is killed: for tests in a guest (`cargo xtask test --vm 7.2 -- lab_gate kills`).

use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use blksnap_agent::cow::{ChunkParams, SnapshotKey};
use blksnap_agent::disk::BlockDevice;
use blksnap_agent::engine::cow::{Broken, Promise, Store, StoreOptions};
use blksnap_agent::filter::gate::{GateOptions, Gates, Member, Wish};
use blksnap_agent::storage::{Pool, PoolOptions, StorageSpec};
use clap::Parser;

/// Takes a snapshot by the gate, prints `held`, and waits until it is killed.
#[derive(Parser)]
struct Arguments {
    /// Copies of the waiting program
    #[arg(long, default_value_t = 4)]
    copies: usize,
    /// The device
    device: PathBuf,
}

/// Nobody asks what became of the snapshot.
#[derive(Debug)]
struct Unheard;

impl Broken for Unheard {
    fn broken(&self, errno: i32, what: &str) {
        eprintln!("lost: {errno}: {what}");
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let gates = Gates::new(GateOptions {
        copies: arguments.copies,
        // This program is no parker.
        technique: Wish::Spin,
        ..GateOptions::with_deadline(Duration::from_secs(10))
    });
    let device = BlockDevice::open(&arguments.device)?;
    let gate = gates.gate(&device, &ChunkParams::default())?;
    let pool = Pool::new(PoolOptions::default(), Arc::new(|_| {}));
    pool.append(&StorageSpec::Memory { limit: 64 << 20 })?;
    let options = StoreOptions {
        promise: Promise::AgentCrash,
        queue: 16,
        buffers: 128,
        journal: None,
        excluded: Vec::new(),
        free: None,
        broken: Arc::new(Unheard),
    };
    let member = Member {
        gate,
        store: Arc::new(Store::new(SnapshotKey(1), Arc::new(pool), options)),
    };
    // It may be too busy to be taken: a kill finds another moment then.
    let image = loop {
        match Gates::take(std::slice::from_ref(&member), || Ok(())) {
            Ok(mut images) => break images.pop().context("no image")?,
            Err(error) => eprintln!("{error}"),
        }
    };
    println!("held");
    std::io::stdout().flush()?;
    loop {
        let mut bytes = [0; 4096];
        if let Err(error) = image.read_at(&mut bytes, 0) {
            eprintln!("{error}");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

//! Held: a snapshot by the gate, and what was counted of its holds.

use std::fs::File;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use blksnap_agent::cow::{ChunkParams, SnapshotKey};
use blksnap_agent::disk::BlockDevice;
use blksnap_agent::engine::cow::{Broken, Image, Promise, Store, StoreOptions};
use blksnap_agent::filter::gate::{Gate, GateOptions, Gates, Member, Preemption, Wish};
use blksnap_agent::storage::{Pool, PoolOptions, StorageSpec};
use blksnap_common::gate::{GateState, HOLD_BUCKETS};
use blksnap_tests::{complain, lab};

use super::disks::Disks;

/// Says that the snapshot is lost.
struct Told;

impl Broken for Told {
    fn broken(&self, errno: i32, what: &str) {
        complain(format_args!("bench: lost: {errno}: {what}"));
    }
}

/// A snapshot of the origin that is held.
pub(crate) struct Held {
    gate: Arc<Gate>,
    image: Image,
    storage: std::path::PathBuf,
}

impl Held {
    /// Takes it, with chunks of `chunk` bytes.
    pub(crate) fn new(disks: &Disks, options: &GateOptions, chunk: u64) -> Result<Self> {
        if !Preemption::now().can_spin() {
            // A kernel that can't says so below.
            let _ = std::fs::write("/sys/kernel/debug/sched/preempt", "full");
        }
        if options.technique == Wish::Spin && !Preemption::now().can_spin() {
            return lab::absent(format!("preemption is {}", Preemption::now()));
        }
        let device = BlockDevice::open(disks.origin())?;
        let shift = chunk.trailing_zeros();
        let gate = Gates::new(options.clone()).gate(&device, &ChunkParams::new(shift, shift, 40)?)?;
        let pool = Pool::new(PoolOptions::default(), Arc::new(|_| {}));
        pool.append(&StorageSpec::Device {
            path: disks.storage().to_owned(),
            ranges: Vec::new(),
        })?;
        let options = StoreOptions {
            promise: Promise::Nothing,
            // As the daemon has them if it is not told otherwise.
            queue: 16,
            buffers: 128,
            journal: None,
            excluded: Vec::new(),
            free: None,
            broken: Arc::new(Told),
        };
        let store = Store::new(SnapshotKey(1), Arc::new(pool), options);
        let member = Member {
            gate: Arc::clone(&gate),
            store: Arc::new(store),
        };
        let mut images = Gates::take(&[member], || Ok(()))?;
        let image = images.pop().context("no image")?;
        Ok(Self {
            gate,
            image,
            storage: disks.storage().to_owned(),
        })
    }

    /// Ends it; gives what was counted.
    pub(crate) fn end(self) -> Result<GateState> {
        let state = self.gate.state();
        complain(format_args!("bench: {state:?}"));
        if state.broken != 0 {
            bail!("the snapshot was lost");
        }
        ensure!(state.held > 0, "no write was held: {state:?}");
        let mut byte = [0];
        self.image.read_at(&mut byte, 0)?;
        self.gate.release(self.image.key());
        drop(self.image);
        drop(self.gate);
        // What is next must not wait for what was stored here.
        File::open(&self.storage)?.sync_all()?;
        Ok(state)
    }
}

/// The longest hold in milliseconds.
pub(crate) fn longest(state: &GateState) -> f64 {
    milliseconds(state.longest)
}

/// A quantile of the holds in milliseconds, between the bounds of its bucket by its place there.
pub(crate) fn quantile(state: &GateState, part: f64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let count = |n: u64| n as f64;
    let wanted = count(state.hold_buckets.iter().sum()) * part;
    let mut before = 0.0;
    for (number, bucket) in state.hold_buckets.iter().enumerate() {
        let here = count(*bucket);
        if before + here >= wanted && here > 0.0 {
            let low = if number == 0 { 0 } else { 1 << (9 + number) };
            let high = if number == HOLD_BUCKETS - 1 {
                state.longest
            } else {
                (1 << (10 + number)).min(state.longest)
            };
            let (low, high) = (milliseconds(low), milliseconds(high));
            return low + (high - low) * (wanted - before) / here;
        }
        before += here;
    }
    longest(state)
}

fn milliseconds(nanoseconds: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let nanoseconds = nanoseconds as f64;
    nanoseconds / 1e6
}

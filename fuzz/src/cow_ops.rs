//! Copy on write: any order of writes to the origin and to images, reads, takes, ends of snapshots, more storage,
//! overflows and faults, in the smallest steps.
//!
//! The bytes of an input choose what comes next in the model of the agent's copy-on-write core, which the core's own
//! test drives by seeds. Its oracle is a copy of the origin made at each take: every sector that is read from an image is
//! compared with it.

use blksnap_agent::choices::Bytes;
use blksnap_agent::cow::model::World;

/// Most steps of one input: one that ends at a step that chooses nothing would go on for ever.
const STEPS: usize = 20_000;

/// Runs one input.
///
/// # Panics
/// An image is wrong.
pub fn run(data: &[u8]) {
    let mut world = World::new(Bytes::new(data));
    for _ in 0..STEPS {
        if world.is_over() {
            break;
        }
        world.step();
    }
    world.finish();
}

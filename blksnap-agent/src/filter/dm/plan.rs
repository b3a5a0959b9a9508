//! Plan: takes, releases and recoveries as lists of steps.
//!
//! Pure: a plan is made of what the kernel shows ([`View`]) and what is wanted, and somebody else executes it
//! ([`super::Mapper`]). Whatever ended in the middle is undone by [`settle`], which needs no memory of how far it came:
//! the kernel's devices tell. The tests end every plan after every step and settle.

use std::collections::{BTreeMap, BTreeSet};

use super::table::{Node, Recipe, Table};
use crate::storage::DeviceExtent;
use crate::units::{DeviceId, SnapshotId};

/// One call to the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A device without a table.
    Create(Node),
    /// Loads a table beside the active one.
    Load(Node, Recipe),
    /// Forgets the table that was loaded.
    Clear(Node),
    /// Waits for what is under way, and makes what comes later wait.
    Suspend(Node),
    /// Makes the loaded table the active one, and lets all go on.
    Resume(Node),
    /// Removes a device; one that is open goes when it is closed.
    Remove(Node),
}

/// A device as the kernel shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Its number.
    pub number: Option<DeviceId>,
    /// What it does.
    pub active: Table,
    /// What was loaded; empty if nothing.
    pub inactive: Table,
    /// Nothing passes.
    pub suspended: bool,
    /// The image was given up by the kernel.
    pub invalid: bool,
}

/// Our devices and their origins.
pub type View = BTreeMap<Node, Seen>;

/// An origin that is to be taken.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Its number.
    pub origin: DeviceId,
    /// Its table; that of the real device if there is one.
    pub table: Table,
    /// Where its old data is to be kept.
    pub storage: Vec<DeviceExtent>,
    /// Sectors that are kept at once.
    pub chunk: u32,
}

/// Whether the origin's writes go through the real device, as they have to while images of it are held.
#[must_use]
pub fn is_held(view: &View, origin: DeviceId) -> bool {
    let real = view.get(&Node::Real(origin)).and_then(|seen| seen.number);
    let active = view.get(&Node::Origin(origin)).map(|seen| &seen.active);
    real.zip(active)
        .is_some_and(|(real, active)| active.is_over(real))
}

/// Whether the snapshot's image of the origin is what it was at the instant: the kernel has kept everything since.
#[must_use]
pub fn is_whole(view: &View, snapshot: SnapshotId, origin: DeviceId) -> bool {
    is_held(view, origin)
        && view
            .get(&Node::Image(snapshot, origin))
            .is_some_and(|seen| seen.active.is_image() && !seen.invalid && !seen.suspended)
}

/// What is made before anything is suspended. All of it can be undone without anybody having noticed.
#[must_use]
pub fn prepare(view: &View, snapshot: SnapshotId, wanted: &[Wanted]) -> Vec<Step> {
    let mut steps = Vec::new();
    for one in wanted {
        let origin = one.origin;
        let sectors = one.table.sectors();
        let (real, storage) = (Node::Real(origin), Node::Storage(snapshot, origin));
        let image = Node::Image(snapshot, origin);
        if !view.contains_key(&real) {
            steps.push(Step::Create(real));
            steps.push(Step::Load(real, Recipe::Exactly(one.table.clone())));
            steps.push(Step::Resume(real));
        }
        steps.push(Step::Create(storage));
        steps.push(Step::Load(storage, Recipe::Ranges(one.storage.clone())));
        steps.push(Step::Resume(storage));
        steps.push(Step::Create(image));
        let recipe = Recipe::Snapshot {
            snapshot,
            origin,
            sectors,
            chunk: one.chunk,
        };
        steps.push(Step::Load(image, recipe));
        if !is_held(view, origin) {
            steps.push(Step::Load(Node::Origin(origin), Recipe::Over { origin, sectors }));
        }
    }
    steps
}

/// Stops all origins, in the order given: those that stand on others first. When this is done is the instant.
#[must_use]
pub fn stop(wanted: &[Wanted]) -> Vec<Step> {
    let origins = wanted.iter();
    origins
        .map(|one| Step::Suspend(Node::Origin(one.origin)))
        .collect()
}

/// Makes the images count and lets the origins go on. An image must count before its origin goes on.
#[must_use]
pub fn go_on(snapshot: SnapshotId, wanted: &[Wanted]) -> Vec<Step> {
    let images = wanted.iter();
    let images = images.map(|one| Step::Resume(Node::Image(snapshot, one.origin)));
    let origins = wanted.iter().rev();
    images
        .chain(origins.map(|one| Step::Resume(Node::Origin(one.origin))))
        .collect()
}

/// Gives a storage more room. The kernel looks at its length for every piece that it keeps.
#[must_use]
pub fn grow(snapshot: SnapshotId, origin: DeviceId, storage: Vec<DeviceExtent>) -> Vec<Step> {
    let node = Node::Storage(snapshot, origin);
    vec![
        Step::Load(node, Recipe::Ranges(storage)),
        Step::Suspend(node),
        Step::Resume(node),
    ]
}

/// Undoes everything but the snapshots in `keep`: what was begun, what is to be released, what is of no use any more.
/// An origin without a snapshot gets its old table back. After it there is nothing suspended, and no image that reads
/// as good though its origin was written past it.
#[must_use]
pub fn settle(view: &View, keep: &BTreeSet<SnapshotId>) -> Vec<Step> {
    let origins: BTreeSet<DeviceId> = view.keys().map(|node| node.origin()).collect();
    origins
        .into_iter()
        .flat_map(|origin| settle_one(view, origin, keep))
        .collect()
}

fn settle_one(view: &View, origin: DeviceId, keep: &BTreeSet<SnapshotId>) -> Vec<Step> {
    let mut steps = Vec::new();
    let of_snapshots: BTreeSet<SnapshotId> = view
        .keys()
        .filter(|node| node.origin() == origin)
        .filter_map(|node| node.snapshot())
        .collect();
    let real_node = Node::Real(origin);
    let origin_node = Node::Origin(origin);
    let real = view.get(&real_node);
    let stays: BTreeSet<SnapshotId> = of_snapshots
        .iter()
        .copied()
        .filter(|snapshot| keep.contains(snapshot) && is_kept(view, *snapshot, origin))
        .collect();
    let goes: Vec<SnapshotId> = of_snapshots.difference(&stays).copied().collect();

    // The growth of one that stays is completed.
    for snapshot in &stays {
        let node = Node::Storage(*snapshot, origin);
        if view.get(&node).is_some_and(|seen| seen.suspended) {
            steps.push(Step::Resume(node));
        }
    }
    // Who has an image open gets errors from now on, not bytes that are wrong.
    for snapshot in &goes {
        let node = Node::Image(*snapshot, origin);
        let Some(image) = view.get(&node) else { continue };
        if image.active.is_image() {
            let sectors = image.active.sectors();
            steps.push(Step::Load(node, Recipe::Error { sectors }));
            if !image.suspended {
                steps.push(Step::Suspend(node));
            }
            steps.push(Step::Resume(node));
        }
    }
    let held = is_held(view, origin);
    let prepared = real.and_then(|real| real.number);
    if let Some(seen) = view.get(&origin_node) {
        let loaded = prepared.is_some_and(|real| seen.inactive.is_over(real));
        if held && stays.is_empty() {
            // What is in the real device is the old table, exactly, with keys.
            let old = real.map(|real| real.active.clone()).unwrap_or_default();
            steps.push(Step::Load(origin_node, Recipe::Exactly(old)));
            if !seen.suspended {
                steps.push(Step::Suspend(origin_node));
            }
            steps.push(Step::Resume(origin_node));
        } else if loaded {
            steps.push(Step::Clear(origin_node));
            if seen.suspended {
                steps.push(Step::Resume(origin_node));
            }
        } else if held && seen.suspended {
            steps.push(Step::Resume(origin_node));
        }
    }
    for snapshot in goes {
        for node in [Node::Image(snapshot, origin), Node::Storage(snapshot, origin)] {
            if view.contains_key(&node) {
                steps.push(Step::Remove(node));
            }
        }
    }
    if real.is_some() && stays.is_empty() {
        steps.push(Step::Remove(real_node));
    }
    steps
}

/// Whether there is still something to keep: also an image that the kernel gave up, whose owner has to say so.
fn is_kept(view: &View, snapshot: SnapshotId, origin: DeviceId) -> bool {
    is_held(view, origin)
        && view
            .get(&Node::Image(snapshot, origin))
            .is_some_and(|seen| seen.active.is_image() && !seen.suspended)
}

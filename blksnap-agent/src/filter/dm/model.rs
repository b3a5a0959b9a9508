//! Model: a kernel in memory that refuses what the real one refuses, and complains about what must never be.
//!
//! Every plan is ended after every step, and settled; the settling is ended after every step as well, and settled again.

use std::collections::BTreeSet;

use proptest::prelude::*;
use uuid::Uuid;

use super::plan::{Seen, Step, View, Wanted, go_on, grow, is_held, is_whole, prepare, settle, stop};
use super::table::{Node, Table};
use crate::storage::DeviceExtent;
use crate::sys::dm::Target;
use crate::units::{DeviceId, SnapshotId};

#[derive(Clone, Debug, Default)]
struct Kernel {
    devices: View,
    next: u32,
    /// Images that were let count.
    images: BTreeSet<Node>,
}

fn origin(number: u32) -> DeviceId {
    DeviceId {
        major: 253,
        minor: number,
    }
}

fn snapshot(number: u128) -> SnapshotId {
    SnapshotId::new(Uuid::from_u128(number))
}

fn old_table(number: u32) -> Table {
    let line = |start, length, parameters: String| Target {
        start,
        length,
        kind: "linear".to_owned(),
        parameters,
    };
    Table::new(vec![
        line(0, 1000, format!("8:{number} 0")),
        line(1000, 24, format!("8:{number} 5000")),
    ])
}

impl Kernel {
    fn with_origins(count: u32) -> Self {
        let devices = (0..count).map(|number| {
            let seen = Seen {
                number: Some(origin(number)),
                active: old_table(number),
                ..Seen::default()
            };
            (Node::Origin(origin(number)), seen)
        });
        Self {
            devices: devices.collect(),
            next: 100,
            images: BTreeSet::new(),
        }
    }

    fn number(&self, node: Node) -> Option<DeviceId> {
        self.devices.get(&node)?.number
    }

    /// Devices whose active or loaded table stands on `node`.
    fn users(&self, node: Node) -> usize {
        let Some(number) = self.number(node) else { return 0 };
        let number = number.to_string();
        let stands = |table: &Table| {
            let mut targets = table.targets().iter();
            targets.any(|target| target.parameters.split(' ').any(|word| word == number))
        };
        self.devices
            .values()
            .filter(|seen| stands(&seen.active) || stands(&seen.inactive))
            .count()
    }

    fn apply(&mut self, step: &Step) {
        match step {
            Step::Create(node) => {
                self.next += 1;
                let seen = Seen {
                    number: Some(origin(self.next)),
                    ..Seen::default()
                };
                assert!(
                    self.devices.insert(*node, seen).is_none(),
                    "{step:?}: there is one"
                );
            }
            Step::Load(node, recipe) => {
                for needed in recipe.needs() {
                    let seen = self
                        .devices
                        .get(&needed)
                        .expect("a table stands on what is there");
                    assert!(seen.active.sectors() > 0, "{step:?}: {needed} has no size");
                }
                let table = recipe
                    .table(|node| self.number(node))
                    .expect("all numbers are known");
                self.devices.get_mut(node).expect("load").inactive = table;
            }
            Step::Clear(node) => self.devices.get_mut(node).expect("clear").inactive = Table::default(),
            Step::Suspend(node) => {
                let seen = self.devices.get_mut(node).expect("suspend");
                assert!(!seen.suspended, "{step:?}: it is suspended");
                seen.suspended = true;
            }
            Step::Resume(node) => self.resume(*node),
            Step::Remove(node) => {
                assert_eq!(self.users(*node), 0, "{step:?}: something stands on it");
                assert!(!matches!(node, Node::Origin(_)));
                self.images.remove(node);
                self.devices.remove(node).expect("remove");
            }
        }
        self.check(step);
    }

    fn resume(&mut self, node: Node) {
        let seen = self.devices.get_mut(&node).expect("resume");
        if seen.inactive.sectors() > 0 {
            let fits = match node {
                Node::Storage(..) => seen.active.sectors() <= seen.inactive.sectors(),
                _ => seen.active.sectors() == 0 || seen.active.sectors() == seen.inactive.sectors(),
            };
            assert!(fits, "{node}: another size");
            seen.active = std::mem::take(&mut seen.inactive);
        }
        seen.suspended = false;
        if seen.active.is_image() {
            self.images.insert(node);
        } else {
            self.images.remove(&node);
        }
    }

    fn check(&self, step: &Step) {
        for image in &self.images {
            let origin = image.origin();
            let suspended = self.devices[&Node::Origin(origin)].suspended;
            assert!(
                suspended || is_held(&self.devices, origin),
                "{step:?}: {image} reads as good, and its origin is written past it"
            );
        }
    }

    /// What the watchdog does when the agent is gone.
    fn watchdog(&mut self) {
        let suspended: Vec<Node> = self
            .devices
            .iter()
            .filter(|(node, seen)| matches!(node, Node::Origin(_)) && seen.suspended)
            .map(|(node, _)| *node)
            .collect();
        for node in suspended {
            self.apply(&Step::Resume(node));
        }
    }

    fn run(&mut self, steps: &[Step]) {
        steps.iter().for_each(|step| self.apply(step));
    }

    /// All origins are as they were, and nothing of ours is left.
    fn assert_clean(&self, count: u32) {
        assert_eq!(self.devices.len(), count as usize, "{:?}", self.devices.keys());
        for number in 0..count {
            let seen = &self.devices[&Node::Origin(origin(number))];
            assert_eq!(seen.active, old_table(number));
            assert_eq!(seen.inactive, Table::default());
            assert!(!seen.suspended);
        }
    }

    /// As [`settle`], ended after every step, with or without the watchdog, and settled again.
    fn settle(&self, keep: &BTreeSet<SnapshotId>) -> Self {
        let steps = settle(&self.devices, keep);
        for end in 0..=steps.len() {
            for watched in [false, true] {
                let mut ended = self.clone();
                ended.run(&steps[..end]);
                if watched {
                    ended.watchdog();
                }
                let rest = settle(&ended.devices, keep);
                ended.run(&rest);
                assert!(settle(&ended.devices, keep).is_empty(), "settled is settled");
                let mut whole = self.clone();
                whole.run(&steps);
                assert_eq!(
                    ended.devices.keys().collect::<Vec<_>>(),
                    whole.devices.keys().collect::<Vec<_>>()
                );
            }
        }
        let mut settled = self.clone();
        settled.run(&steps);
        settled
    }
}

fn wanted(kernel: &Kernel, number: u32) -> Wanted {
    let id = origin(number);
    let real = kernel.devices.get(&Node::Real(id));
    let table = real.unwrap_or(&kernel.devices[&Node::Origin(id)]).active.clone();
    Wanted {
        origin: id,
        table,
        storage: vec![DeviceExtent {
            device: DeviceId { major: 7, minor: 0 },
            sector: 0,
            count: 64,
        }],
        chunk: 8,
    }
}

fn whole_take(kernel: &Kernel, id: SnapshotId, origins: &[u32]) -> Vec<Step> {
    let wanted: Vec<Wanted> = origins.iter().map(|number| wanted(kernel, *number)).collect();
    [
        prepare(&kernel.devices, id, &wanted),
        stop(&wanted),
        go_on(id, &wanted),
    ]
    .concat()
}

/// Takes a snapshot after which nobody was told of it, ended after every step.
fn try_takes(kernel: &Kernel, id: SnapshotId, origins: &[u32], held: &BTreeSet<SnapshotId>) {
    let steps = whole_take(kernel, id, origins);
    for end in 0..=steps.len() {
        for watched in [false, true] {
            let mut ended = kernel.clone();
            ended.run(&steps[..end]);
            if watched {
                ended.watchdog();
            }
            let settled = ended.settle(held);
            assert_eq!(settled.devices, kernel.devices, "ended after {:?}", &steps[..end]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn whatever_ends_in_the_middle_is_undone(
        takes in proptest::collection::vec((proptest::bits::u8::between(0, 4), any::<bool>()), 1..4)
    ) {
        const ORIGINS: u32 = 4;
        let mut kernel = Kernel::with_origins(ORIGINS);
        let mut held: Vec<(SnapshotId, Vec<u32>)> = Vec::new();
        for (turn, (mask, release)) in takes.into_iter().enumerate() {
            let origins: Vec<u32> = (0..ORIGINS).filter(|bit| mask & (1 << bit) != 0).collect();
            let keep: BTreeSet<SnapshotId> = held.iter().map(|(id, _)| *id).collect();
            let id = snapshot(turn as u128 + 1);
            try_takes(&kernel, id, &origins, &keep);
            let steps = whole_take(&kernel, id, &origins);
            kernel.run(&steps);
            held.push((id, origins));
            for (id, origins) in &held {
                prop_assert!(origins.iter().all(|number| is_whole(&kernel.devices, *id, origin(*number))));
            }
            if release {
                held.remove(0);
                let keep: BTreeSet<SnapshotId> = held.iter().map(|(id, _)| *id).collect();
                kernel = kernel.settle(&keep);
            }
        }
        let settled = kernel.settle(&BTreeSet::new());
        settled.assert_clean(ORIGINS);
    }
}

#[test]
fn a_table_that_somebody_else_put_there_stays() {
    let mut kernel = Kernel::with_origins(2);
    let id = snapshot(1);
    let steps = whole_take(&kernel, id, &[0, 1]);
    kernel.run(&steps);
    // LVM extends the volume: from here on the image is not what it was.
    let longer = {
        let mut lines = old_table(0).targets().to_vec();
        lines[1].length += 8;
        Table::new(lines)
    };
    kernel.images.remove(&Node::Image(id, origin(0)));
    kernel
        .devices
        .get_mut(&Node::Origin(origin(0)))
        .expect("there")
        .active = longer.clone();
    assert!(!is_whole(&kernel.devices, id, origin(0)));
    assert!(is_whole(&kernel.devices, id, origin(1)));
    let settled = kernel.settle(&BTreeSet::new());
    assert_eq!(settled.devices.len(), 2);
    assert_eq!(settled.devices[&Node::Origin(origin(0))].active, longer);
    assert_eq!(settled.devices[&Node::Origin(origin(1))].active, old_table(1));
}

#[test]
fn a_growth_that_ends_in_the_middle_harms_nobody() {
    let mut kernel = Kernel::with_origins(1);
    let id = snapshot(1);
    let steps = whole_take(&kernel, id, &[0]);
    kernel.run(&steps);
    let longer = vec![DeviceExtent {
        device: DeviceId { major: 7, minor: 0 },
        sector: 0,
        count: 128,
    }];
    let steps = grow(id, origin(0), longer);
    for end in 0..=steps.len() {
        let mut ended = kernel.clone();
        ended.run(&steps[..end]);
        let settled = ended.settle(&BTreeSet::from([id]));
        assert!(is_whole(&settled.devices, id, origin(0)));
        assert!(!settled.devices[&Node::Storage(id, origin(0))].suspended);
        settled.settle(&BTreeSet::new()).assert_clean(1);
    }
}

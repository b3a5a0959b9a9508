//! Mapper: shows what device-mapper has of ours, and executes steps.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::error::DmError;
use super::plan::{Seen, Step, View};
use super::table::{ImageStatus, Node, ORIGIN, SNAPSHOT, Table};
use crate::sys::dm::{Control, Flags, PRIVATE, Which};
use crate::units::DeviceId;

/// How long a device is tried to be removed that somebody has open; whoever looks at new devices soon closes them.
const REMOVE_LIMIT: Duration = Duration::from_secs(2);
/// Pause between two tries.
const REMOVE_PAUSE: Duration = Duration::from_millis(20);

/// Device-mapper, and the numbers of our devices.
#[derive(Debug)]
pub struct Mapper {
    control: Control,
    numbers: BTreeMap<Node, DeviceId>,
}

impl Mapper {
    /// Opens device-mapper.
    ///
    /// # Errors
    /// There is none.
    pub fn open() -> Result<Self, DmError> {
        Ok(Self {
            control: Control::open().map_err(|source| DmError::Control { source })?,
            numbers: BTreeMap::new(),
        })
    }

    /// The calls.
    #[must_use]
    pub const fn control(&self) -> &Control {
        &self.control
    }

    /// Whether the kernel has the targets; it loads a module only for a table that needs it, so what is missing may be
    /// loaded by the first take.
    ///
    /// # Errors
    /// The kernel's own.
    pub fn has_targets(&self) -> Result<bool, DmError> {
        let kinds = self
            .control
            .target_kinds()
            .map_err(|source| failed("list the targets of", "device-mapper", source))?;
        Ok([ORIGIN, SNAPSHOT]
            .iter()
            .all(|wanted| kinds.iter().any(|kind| kind == wanted)))
    }

    /// Number of a device of ours, once it was seen or made.
    #[must_use]
    pub fn number(&self, node: Node) -> Option<DeviceId> {
        match node {
            Node::Origin(origin) => Some(origin),
            _ => self.numbers.get(&node).copied(),
        }
    }

    /// All our devices, their origins, and `origins`, as far as they are device-mapper devices.
    ///
    /// # Errors
    /// The kernel's own.
    pub fn view(&mut self, origins: &[DeviceId]) -> Result<View, DmError> {
        let mut view = View::new();
        let listed = self
            .control
            .list()
            .map_err(|source| failed("list the devices of", "device-mapper", source))?;
        self.numbers.clear();
        for (number, _) in listed {
            let Ok((_, uuid)) = self.control.names(Which::Device(number)) else {
                // Gone since.
                continue;
            };
            let Some(node) = Node::of_uuid(&uuid) else {
                continue;
            };
            self.numbers.insert(node, number);
            self.see(&mut view, node, number)?;
        }
        let mut wanted: Vec<DeviceId> = view.keys().map(|node| node.origin()).collect();
        wanted.extend(origins);
        wanted.sort_unstable();
        wanted.dedup();
        for origin in wanted {
            self.see(&mut view, Node::Origin(origin), origin)?;
        }
        Ok(view)
    }

    fn see(&self, view: &mut View, node: Node, number: DeviceId) -> Result<(), DmError> {
        let which = Which::Device(number);
        let look = || -> Result<Seen, Errno> {
            let info = self.control.info(which)?;
            let invalid = match node {
                Node::Image(..) => self
                    .control
                    .status(which)?
                    .iter()
                    .any(|line| ImageStatus::of(&line.kind, &line.parameters) == ImageStatus::Invalid),
                _ => false,
            };
            Ok(Seen {
                number: Some(number),
                active: Table::new(self.control.table(which)?),
                inactive: Table::new(self.control.inactive_table(which)?),
                suspended: info.flags.contains(Flags::SUSPEND) && info.flags.contains(Flags::ACTIVE),
                invalid,
            })
        };
        match look() {
            Ok(seen) => {
                view.insert(node, seen);
                Ok(())
            }
            // It is gone, or is no device of device-mapper.
            Err(Errno::ENXIO | Errno::EINVAL) => Ok(()),
            Err(source) => Err(failed("look at", &node.to_string(), source)),
        }
    }

    /// The active table of a device, with its keys.
    ///
    /// # Errors
    /// It is gone.
    pub fn table(&self, node: Node) -> Result<Table, DmError> {
        let number = self.known(node, "read the table of")?;
        let table = self.control.table(Which::Device(number));
        table
            .map(Table::new)
            .map_err(|source| failed("read the table of", &node.to_string(), source))
    }

    fn known(&self, node: Node, action: &'static str) -> Result<DeviceId, DmError> {
        self.number(node).ok_or_else(|| DmError::Gone {
            action,
            device: node.to_string(),
        })
    }

    /// Executes a step.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn apply(&mut self, step: &Step) -> Result<(), DmError> {
        let (node, action) = match step {
            Step::Create(node) => (*node, "create"),
            Step::Load(node, _) => (*node, "load a table into"),
            Step::Clear(node) => (*node, "clear the loaded table of"),
            Step::Suspend(node) => (*node, "suspend"),
            Step::Resume(node) => (*node, "resume"),
            Step::Remove(node) => (*node, "remove"),
        };
        if let Step::Create(node) = step {
            let number = self.control.create(&node.name(), &node.uuid());
            let number = number.map_err(|source| failed(action, &node.to_string(), source))?;
            self.numbers.insert(*node, number);
            return Ok(());
        }
        let which = Which::Device(self.known(node, action)?);
        let done = match step {
            Step::Create(_) => Ok(()),
            Step::Load(_, recipe) => {
                let table = recipe
                    .table(|node| self.number(node))
                    .ok_or_else(|| DmError::Gone {
                        action,
                        device: node.to_string(),
                    })?;
                self.control.load(which, table.targets(), false)
            }
            Step::Clear(_) => self.control.clear(which),
            // The file systems were frozen by whoever wanted them to be; one that is frozen can't be frozen once more.
            Step::Suspend(_) => self.control.suspend(which, Flags::SKIP_LOCKFS),
            Step::Resume(Node::Origin(_)) => self.control.resume(which, 0),
            Step::Resume(_) => self.control.resume(which, PRIVATE),
            Step::Remove(_) => self.remove(node, which),
        };
        done.map_err(|source| failed(action, &node.to_string(), source))
    }

    /// Removes a device, at the latest when the last one closes it.
    fn remove(&mut self, node: Node, which: Which<'_>) -> Result<(), Errno> {
        let until = Instant::now() + REMOVE_LIMIT;
        let removed = loop {
            match self.control.remove(which, false) {
                Err(Errno::EBUSY) if Instant::now() < until => std::thread::sleep(REMOVE_PAUSE),
                Err(Errno::EBUSY) => break self.control.remove(which, true).map(drop),
                Err(Errno::ENXIO) => break Ok(()),
                other => break other.map(drop),
            }
        };
        if removed.is_ok() {
            self.numbers.remove(&node);
        }
        removed
    }
}

fn failed(action: &'static str, device: &str, source: Errno) -> DmError {
    DmError::Step {
        action,
        device: device.to_owned(),
        source,
    }
}

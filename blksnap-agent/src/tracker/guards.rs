//! Guards: which slots want to know of passthrough commands to which disks.
//!
//! A slot guards its own disk and every disk beneath it, since what a command does to a lower disk shows through
//! what is stacked on it. The table is scanned by the program only when there is a passthrough command.

use std::path::Path;

use aya::maps::{Array, Map, MapData};
use blksnap_common::passthrough::Commands;
use blksnap_common::track::{GUARD_CONTROLLER, GUARD_FREE, GUARD_HIDDEN, GUARDS, Guard};

use super::TrackerError;
use super::layout::KnownCommands;
use super::refusal::one_line;
use crate::disk::presence::SYSFS;
use crate::disk::stack::{Driver, Stack};
use crate::units::DeviceId;

/// The `GUARDS` map.
pub(super) struct Guards {
    map: Array<MapData, Guard>,
    known: KnownCommands,
}

impl Guards {
    pub(super) fn new(map: Map, known: KnownCommands) -> Result<Self, TrackerError> {
        let map = Array::try_from(map).map_err(|e| TrackerError::Load(one_line(&e)))?;
        Ok(Self { map, known })
    }

    /// Lets `slot` guard exactly what `device`, and all that is beneath it, is made of now, and gives that.
    pub(super) fn set(&mut self, slot: u32, device: DeviceId) -> Result<Stack, TrackerError> {
        let stack = Stack::beneath(Path::new(SYSFS), device);
        self.replace(slot, entries(&stack, slot, self.known))?;
        Ok(stack)
    }

    /// Ends all guards of `slot`.
    pub(super) fn clear(&mut self, slot: u32) -> Result<(), TrackerError> {
        self.replace(slot, Vec::new())
    }

    fn replace(&mut self, slot: u32, mut wanted: Vec<Guard>) -> Result<(), TrackerError> {
        let error = |reason: String| TrackerError::Map {
            action: "guard the disks of",
            slot,
            reason,
        };
        let (mut free, mut stale) = (Vec::new(), Vec::new());
        for index in 0..GUARDS {
            let guard = self.map.get(&index, 0).map_err(|e| error(one_line(&e)))?;
            if guard.disk == GUARD_FREE {
                free.push(index);
            } else if guard.slot == slot {
                match wanted.iter().position(|wanted| *wanted == guard) {
                    Some(at) => drop(wanted.swap_remove(at)),
                    None => stale.push(index),
                }
            }
        }
        let mut free = free.into_iter();
        // New ones first: what is guarded before and after is guarded meanwhile.
        for guard in wanted {
            let index = free
                .next()
                .ok_or_else(|| error(format!("all {GUARDS} places are taken")))?;
            self.map.set(index, guard, 0).map_err(|e| error(one_line(&e)))?;
        }
        for index in stale {
            self.map
                .set(index, Guard::default(), 0)
                .map_err(|e| error(one_line(&e)))?;
        }
        Ok(())
    }
}

/// The guards of a slot over `stack`.
fn entries(stack: &Stack, slot: u32, known: KnownCommands) -> Vec<Guard> {
    let guard = |disk, commands: Commands| Guard {
        disk,
        slot,
        commands: commands as u32,
        reserved: 0,
    };
    let nvme = |commands| if known.nvme { commands } else { Commands::Unknown };
    let mut guards = Vec::new();
    for disk in &stack.disks {
        let commands = match disk.driver {
            Driver::Scsi if known.scsi => Commands::Scsi,
            Driver::Nvme | Driver::NvmeMultipath => nvme(Commands::Nvme),
            Driver::Scsi | Driver::Other => Commands::Unknown,
        };
        guards.push(guard(disk.id.kernel_dev(), commands));
    }
    if stack.any(Driver::NvmeMultipath) {
        guards.push(guard(GUARD_HIDDEN, nvme(Commands::Nvme)));
    }
    if stack.any(Driver::Nvme) || stack.any(Driver::NvmeMultipath) {
        // Format and sanitize go by the controller's queue, which names no disk.
        guards.push(guard(GUARD_CONTROLLER, nvme(Commands::NvmeAdmin)));
    }
    guards
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::cbt::ResetReason;
    use crate::disk::stack::Disk;
    use crate::tracker::testing::TestLoop;
    use crate::tracker::{Granularity, TrackedDevice, Tracker, TrackerConfig};
    use crate::units::BlockSize;

    /// `REQ_OP_WRITE` and `REQ_OP_FLUSH`.
    const WRITE: u32 = 1;
    const FLUSH: u32 = 2;

    /// A tracker that takes ordinary operations for passthrough, on a device whose driver knows no other ones: the
    /// program, its map and everything after it are the real ones.
    fn tracker(data_in: u32, data_out: u32) -> Arc<Tracker> {
        Tracker::load_adjusted(&TrackerConfig::default(), |layout| {
            layout.set("OP_DRV_IN", data_in);
            layout.set("OP_DRV_OUT", data_out);
        })
        .unwrap()
    }

    fn attach(tracker: &Tracker, disk: &TestLoop) -> Arc<TrackedDevice> {
        let granularity = Granularity::Fixed(BlockSize::from_bytes(65536).unwrap());
        tracker.attach(disk.device(), granularity).unwrap()
    }

    #[test]
    fn data_to_the_device_ends_the_generation_and_only_once() {
        let tracker = tracker(u32::MAX, WRITE);
        let (disk, other) = (TestLoop::new(16 << 20), TestLoop::new(16 << 20));
        let (device, bystander) = (attach(&tracker, &disk), attach(&tracker, &other));
        assert_eq!(device.check_doubt(), None);
        disk.write(4096, 4096, 1);
        assert_eq!(device.check_doubt(), Some(ResetReason::PassthroughWrite));
        assert_eq!(bystander.check_doubt(), None);
        // The take begins anew, and what comes later is told from what was before.
        device.close_period().unwrap();
        let (taken, _) = device.take().unwrap();
        assert_eq!(taken.reset, Some(ResetReason::PassthroughWrite));
        assert_eq!(device.check_doubt(), None);
        disk.write(4096, 4096, 2);
        assert_eq!(device.check_doubt(), Some(ResetReason::PassthroughWrite));
    }

    #[test]
    fn a_take_in_the_same_moment_does_not_pass_it_by() {
        let tracker = tracker(u32::MAX, WRITE);
        let disk = TestLoop::new(16 << 20);
        let device = attach(&tracker, &disk);
        device.close_period().unwrap();
        device.take().unwrap();
        for round in 0..20 {
            assert_eq!(device.check_doubt(), None, "round {round}");
            // Nobody looks for doubt between the command and the take.
            disk.write(0, 4096, round);
            let (taken, _) = device.take().unwrap();
            assert_eq!(taken.reset, Some(ResetReason::PassthroughWrite), "round {round}");
        }
    }

    #[test]
    fn a_command_without_data_counts_and_one_that_reads_does_not() {
        let disk = TestLoop::new(16 << 20);
        // A flush has no data.
        let without = tracker(FLUSH, u32::MAX);
        let device = attach(&without, &disk);
        disk.open().sync_all().unwrap();
        assert_eq!(device.check_doubt(), Some(ResetReason::PassthroughWrite));
        drop(without);
        // The self test of the attach has read.
        let reading = tracker(0, u32::MAX);
        let device = attach(&reading, &disk);
        assert!(device.hook_is_alive().unwrap());
        assert_eq!(device.check_doubt(), None);
    }

    /// The number of a disk whose driver asks it for its serial number by a passthrough request (20 bytes of data
    /// come back) when the attribute is read, and the attribute.
    fn disk_with_a_command() -> Option<(u32, std::path::PathBuf)> {
        let disks = std::fs::read_dir("/sys/block").unwrap();
        disks.flatten().find_map(|disk| {
            let serial = disk.path().join("serial");
            let driver = std::fs::read_link(disk.path().join("device/driver")).ok()?;
            let id = std::fs::read_to_string(disk.path().join("dev")).ok()?;
            let id: DeviceId = id.trim().parse().ok()?;
            (serial.exists() && driver.ends_with("virtio_blk")).then_some((id.kernel_dev(), serial))
        })
    }

    #[test]
    fn a_command_of_a_real_driver_is_seen() {
        /// `REQ_OP_DRV_IN`.
        const DRV_IN: u32 = 34;
        let Some((other, serial)) = disk_with_a_command() else {
            println!("no disk here takes commands: left to the kernel lab");
            return;
        };
        let disk = TestLoop::new(16 << 20);
        let ask = |tracker: &Tracker| {
            let device = attach(tracker, &disk);
            let guard = Guard {
                disk: other,
                slot: device.slot_id(),
                ..Guard::default()
            };
            // As if the device stood on that disk, which is neither tracked nor written.
            tracker
                .shared
                .object()
                .guards
                .replace(device.slot_id(), vec![guard])
                .unwrap();
            std::fs::read_to_string(&serial).unwrap();
            device.check_doubt()
        };
        // It reads.
        let as_it_is = Tracker::load(&TrackerConfig::default()).unwrap();
        assert_eq!(ask(&as_it_is), None);
        drop(as_it_is);
        // The same request, taken for one with data to the device.
        let taken_for_writing = tracker(u32::MAX, DRV_IN);
        assert_eq!(ask(&taken_for_writing), Some(ResetReason::PassthroughWrite));
    }

    #[test]
    fn guards_go_with_their_slot() {
        let tracker = tracker(u32::MAX, WRITE);
        let disk = TestLoop::new(16 << 20);
        let device = attach(&tracker, &disk);
        let slot = device.slot_id();
        let guarded = || {
            let object = tracker.shared.object();
            (0..GUARDS)
                .filter(|index| object.guards.map.get(index, 0).unwrap().disk != GUARD_FREE)
                .count()
        };
        assert_eq!(guarded(), 1);
        // What is wanted already stays as it is.
        tracker
            .shared
            .object()
            .guards
            .set(slot, device.device().id)
            .unwrap();
        assert_eq!(guarded(), 1);
        tracker.detach(device.device().id).unwrap();
        assert_eq!(guarded(), 0);
    }

    fn stack(disks: &[(u32, Driver)]) -> Stack {
        Stack {
            disks: disks
                .iter()
                .map(|(minor, driver)| Disk {
                    id: DeviceId {
                        major: 8,
                        minor: *minor,
                    },
                    driver: *driver,
                })
                .collect(),
        }
    }

    #[test]
    fn every_disk_beneath_is_guarded_with_its_commands() {
        let known = KnownCommands {
            scsi: true,
            nvme: true,
        };
        let guards = entries(&stack(&[(0, Driver::Other), (16, Driver::Scsi)]), 7, known);
        let found: Vec<_> = guards
            .iter()
            .map(|guard| (guard.disk, guard.slot, guard.commands))
            .collect();
        assert_eq!(found, [(8 << 20, 7, 0), (8 << 20 | 16, 7, 1)]);
    }

    #[test]
    fn nvme_also_guards_its_controllers_and_hidden_paths() {
        let all = KnownCommands {
            scsi: true,
            nvme: true,
        };
        let disks = |stack, known| -> Vec<_> {
            entries(stack, 0, known)
                .iter()
                .map(|guard| (guard.disk, guard.commands))
                .collect()
        };
        let single = stack(&[(1, Driver::Nvme)]);
        assert_eq!(disks(&single, all), [(8 << 20 | 1, 2), (GUARD_CONTROLLER, 3)]);
        let multipath = stack(&[(1, Driver::NvmeMultipath)]);
        assert_eq!(
            disks(&multipath, all),
            [(8 << 20 | 1, 2), (GUARD_HIDDEN, 2), (GUARD_CONTROLLER, 3)]
        );
        let unknown = KnownCommands {
            scsi: false,
            nvme: false,
        };
        assert_eq!(disks(&single, unknown), [(8 << 20 | 1, 0), (GUARD_CONTROLLER, 0)]);
        assert_eq!(disks(&stack(&[(1, Driver::Scsi)]), unknown), [(8 << 20 | 1, 0)]);
    }
}

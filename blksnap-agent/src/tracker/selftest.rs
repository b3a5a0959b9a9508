//! Self test: whether the hook still sees what a device does, looked at from time to time.
//!
//! A program that was detached, or a table that somebody emptied, would make a device look idle. So the kernel's own
//! count of completed I/O (`stat` in sysfs) is compared with what the programs saw:
//!
//! | sectors that the kernel counted | events that the programs saw | |
//! |---|---|---|
//! | nothing | | nothing could be missed; a disk that sleeps is left alone |
//! | something | something | the hook is alive |
//! | something | nothing | an O_DIRECT read must be seen now, or the generation ends (`hook_dead`) |
//!
//! A device whose I/O is not counted (`queue/iostats` is 0) is read each time, unless it is suspended. The tests run
//! on a thread of their own, since a device may take its time for a read, or never end it.

use std::collections::HashMap;
use std::fs;
use std::sync::Weak;
use std::thread;
use std::time::{Duration, Instant};

use super::{TrackedDevice, Tracker};
use crate::cbt::ResetReason;
use crate::disk::BlockDevice;
use crate::disk::presence::Completed;

/// How often, where nothing else is said.
pub const INTERVAL: Duration = Duration::from_secs(60);

/// Longest sleep: so long may the thread outlive the tracker.
const STEP: Duration = Duration::from_millis(500);

/// What was seen of a device at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    /// I/O that the kernel counted; `None` if it does not count.
    completed: Option<Completed>,
    /// Events that the programs counted.
    events: u64,
}

/// What a test has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Nothing happened.
    Skip,
    /// The device sleeps; what happened before is looked into when it is awake.
    Later,
    /// What the programs saw is proof.
    Alive,
    /// The device has to be read.
    Read,
}

fn next(before: &Seen, now: &Seen, counts: bool, suspended: bool) -> Step {
    if now.events != before.events {
        Step::Alive
    } else if counts && now.completed.is_some() && now.completed == before.completed {
        Step::Skip
    } else if suspended {
        Step::Later
    } else {
        Step::Read
    }
}

/// Body of the thread: until the tracker is gone.
pub(super) fn run(tracker: &Weak<Tracker>, interval: Duration) {
    let mut before: HashMap<u32, Seen> = HashMap::new();
    loop {
        let until = Instant::now() + interval;
        while Instant::now() < until {
            if tracker.strong_count() == 0 {
                return;
            }
            thread::sleep(STEP.min(until.saturating_duration_since(Instant::now())));
        }
        // Not the tracker itself: who drops it wants its programs to go.
        let Some(devices) = tracker.upgrade().map(|tracker| tracker.devices()) else {
            return;
        };
        let slots: Vec<u32> = devices.iter().map(|device| device.slot_id()).collect();
        before.retain(|slot, _| slots.contains(slot));
        for device in devices {
            let Some(now) = seen(&device) else { continue };
            let slot = device.slot_id();
            let step = match before.get(&slot) {
                Some(last) => test(&device, last, &now),
                None => Step::Alive,
            };
            let last = match step {
                Step::Later => continue,
                // The read itself is no news the next time.
                Step::Read => seen(&device).unwrap_or(now),
                Step::Alive | Step::Skip => now,
            };
            before.insert(slot, last);
        }
    }
}

fn seen(device: &TrackedDevice) -> Option<Seen> {
    // Doubt about the device itself comes first, and brings the kernel's counts up to date.
    device.check_doubt();
    if device.lost().is_some() {
        return None;
    }
    Some(Seen {
        completed: device.completed(),
        events: device.events().ok()?,
    })
}

/// Tests a device; says how.
fn test(device: &TrackedDevice, before: &Seen, now: &Seen) -> Step {
    let step = next(
        before,
        now,
        counts_io(device.device()),
        is_suspended(device.device()),
    );
    if step != Step::Read {
        return step;
    }
    match device.hook_is_alive() {
        Ok(true) => tracing::debug!(device = %device.path().display(), "the hook is alive"),
        Ok(false) => device.corrupt(ResetReason::HookDead),
        // A disk that can't be read proves nothing either way; who copies it will be told.
        Err(error) => tracing::warn!(%error, "the hook was not tested"),
    }
    step
}

/// Whether the kernel counts the disk's I/O (`queue/iostats`).
fn counts_io(device: &BlockDevice) -> bool {
    attribute(device, "queue/iostats").is_none_or(|text| text != "0")
}

/// Whether the disk is asleep by its driver's word (`power/runtime_status` of the device that it belongs to).
fn is_suspended(device: &BlockDevice) -> bool {
    attribute(device, "device/power/runtime_status").is_some_and(|text| text == "suspended")
}

fn attribute(device: &BlockDevice, name: &str) -> Option<String> {
    let path = format!("/sys/dev/block/{}/{name}", device.disk_id);
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: Seen = Seen {
        completed: Some(Completed {
            reads: 10,
            writes: 20,
            discards: 0,
        }),
        events: 100,
    };

    #[test]
    fn a_device_is_read_only_if_something_could_have_been_missed() {
        let more_io = Seen {
            completed: Some(Completed {
                reads: 10,
                writes: 21,
                discards: 0,
            }),
            ..BEFORE
        };
        let more_events = Seen {
            events: 101,
            ..more_io
        };
        assert_eq!(next(&BEFORE, &BEFORE, true, false), Step::Skip);
        assert_eq!(next(&BEFORE, &more_io, true, false), Step::Read);
        assert_eq!(next(&BEFORE, &more_events, true, false), Step::Alive);
        // Asleep: nothing is missed meanwhile, and nothing is woken.
        assert_eq!(next(&BEFORE, &more_io, true, true), Step::Later);
        assert_eq!(next(&BEFORE, &BEFORE, true, true), Step::Skip);
        // The kernel does not count: the look has to be a read.
        assert_eq!(next(&BEFORE, &BEFORE, false, false), Step::Read);
        assert_eq!(next(&BEFORE, &BEFORE, false, true), Step::Later);
        let unknown = Seen {
            completed: None,
            ..BEFORE
        };
        assert_eq!(next(&unknown, &unknown, true, false), Step::Read);
    }
}

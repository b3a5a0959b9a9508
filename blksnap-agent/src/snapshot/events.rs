//! Events: what happens to a snapshot that whoever made it should know.
//!
//! A queue for each snapshot; an event is given to one who waits, once. Codes and meaning are the original's.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::units::Sectors;

/// Events that are kept while nobody waits. The oldest is forgotten for the next one.
const MOST: usize = 4096;

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventData {
    /// More difference storage is wanted (code 0).
    #[doc(alias = "blksnap_event_code_low_free_space")]
    LowFreeSpace {
        /// How much more.
        requested: Sectors,
    },
    /// Images are lost (code 1).
    #[doc(alias = "blksnap_event_code_corrupted")]
    Corrupted {
        /// Name of the device.
        device: String,
        /// Number of the device; 0:0 for a file.
        major: u32,
        /// See `major`.
        minor: u32,
        /// Why, as an error number.
        errno: i32,
        /// Why, in words.
        reason: String,
    },
}

impl EventData {
    /// The name of each code, in their order.
    pub const LABELS: [&'static str; 2] = ["low_free_space", "corrupted"];

    /// The original's number of it.
    #[must_use]
    pub const fn code(&self) -> u32 {
        match self {
            Self::LowFreeSpace { .. } => 0,
            Self::Corrupted { .. } => 1,
        }
    }

    /// Its name.
    #[must_use]
    pub const fn label(&self) -> &'static str {
        Self::LABELS[self.code() as usize]
    }
}

/// An event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// When.
    pub time: SystemTime,
    /// What.
    pub data: EventData,
}

/// How waiting for an event ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Waited {
    /// With this one.
    Event(Event),
    /// None came in time.
    TimedOut,
    /// Somebody wanted it to end.
    Interrupted,
    /// The snapshot is gone.
    Gone,
}

/// The queue of a snapshot.
#[derive(Debug, Default)]
pub struct Events {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Event>,
    sent: [u64; 2],
    closed: bool,
}

impl Events {
    /// Adds an event that happens now.
    pub fn send(&self, data: EventData) {
        let mut state = self.lock();
        if state.queue.len() == MOST {
            state.queue.pop_front();
        }
        if let Some(sent) = state.sent.get_mut(data.code() as usize) {
            *sent += 1;
        }
        let time = SystemTime::now();
        state.queue.push_back(Event { time, data });
        self.changed.notify_one();
    }

    /// Takes the oldest event, or waits for one, as long as `interrupted` says no.
    pub fn wait(&self, timeout: Duration, interrupted: &dyn Fn() -> bool) -> Waited {
        /// How often the waiter is asked whether it still wants to.
        const LOOK: Duration = Duration::from_millis(100);
        let end = Instant::now().checked_add(timeout);
        let mut state = self.lock();
        loop {
            if let Some(event) = state.queue.pop_front() {
                return Waited::Event(event);
            }
            if state.closed {
                return Waited::Gone;
            }
            if interrupted() {
                return Waited::Interrupted;
            }
            let left = end.map_or(LOOK, |end| end.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Waited::TimedOut;
            }
            let waited = self.changed.wait_timeout(state, left.min(LOOK));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Events that nobody has taken yet.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.lock().queue.len()
    }

    /// Events sent so far, by code.
    #[must_use]
    pub fn sent(&self) -> [u64; 2] {
        self.lock().sent
    }

    /// The snapshot is gone: whoever waits is told so.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn low(sectors: u64) -> EventData {
        EventData::LowFreeSpace {
            requested: Sectors::new(sectors),
        }
    }

    #[test]
    fn an_event_is_given_once_in_order() {
        let events = Events::default();
        let never = || false;
        assert_eq!(events.wait(Duration::ZERO, &never), Waited::TimedOut);
        events.send(low(1));
        events.send(low(2));
        assert_eq!((events.pending(), events.sent()), (2, [2, 0]));
        for sectors in [1, 2] {
            match events.wait(Duration::ZERO, &never) {
                Waited::Event(event) => assert_eq!(event.data, low(sectors)),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(events.wait(Duration::from_millis(1), &never), Waited::TimedOut);
        assert_eq!(
            events.wait(Duration::from_secs(60), &|| true),
            Waited::Interrupted
        );
    }

    #[test]
    fn who_waits_is_woken() {
        let events = Events::default();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| events.wait(Duration::from_secs(600), &|| false));
            events.send(low(7));
            assert!(matches!(waiter.join().unwrap(), Waited::Event(_)));
            let waiter = scope.spawn(|| events.wait(Duration::from_secs(600), &|| false));
            events.close();
            assert_eq!(waiter.join().unwrap(), Waited::Gone);
        });
    }

    #[test]
    fn the_queue_is_bounded() {
        let events = Events::default();
        (0..=MOST as u64).for_each(|n| events.send(low(n)));
        assert_eq!(events.pending(), MOST);
        match events.wait(Duration::ZERO, &|| false) {
            Waited::Event(event) => assert_eq!(event.data, low(1)),
            other => panic!("{other:?}"),
        }
    }
}

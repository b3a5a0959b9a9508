//! Priority: when the threads that writes wait for get the processor.
//!
//! A writer that turns in a loop uses up its slice while what it waits for could be done. With real-time priority those that
//! preserve come first. Where writers sleep there is nobody to compete with.

use std::str::FromStr;

use nix::errno::Errno;

use super::technique::Technique;
use crate::sys::sched;

/// Where writers turn, and the kernel permits it.
const TURNING: u8 = 50;

/// Priority of the threads that preserve. Those that store old data have one less: they share locks, and one that is kept
/// from the processor by waiting writers would keep these locks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Priority {
    /// `SCHED_FIFO` 50 where writers turn in a loop, if it is permitted; that of every other thread where they sleep.
    #[default]
    Auto,
    /// That of every other thread.
    Usual,
    /// `SCHED_FIFO` with this number, 1 to 99, or no gate at all.
    Fixed(u8),
}

impl Priority {
    /// Gives it to the calling thread, which preserves.
    ///
    /// # Errors
    /// A number was asked for, and the kernel refuses it.
    pub(super) fn preserve(self, technique: Technique) -> Result<(), Errno> {
        match (self, technique) {
            (Self::Usual, _) | (Self::Auto, Technique::Park) => Ok(()),
            (Self::Auto, Technique::Spin) => {
                if let Err(errno) = sched::real_time(TURNING) {
                    tracing::info!(%errno, "threads that writes wait for have no priority");
                }
                Ok(())
            }
            (Self::Fixed(number), _) => sched::real_time(number),
        }
    }

    /// Gives it to the calling thread, which stores.
    pub(super) fn store(self, technique: Technique) {
        let number = match (self, technique) {
            (Self::Usual, _) | (Self::Auto, Technique::Park) => return,
            (Self::Auto, Technique::Spin) => TURNING,
            (Self::Fixed(number), _) => number,
        };
        if let Err(errno) = sched::real_time(number.saturating_sub(1).max(1)) {
            tracing::debug!(%errno, "a thread that stores old data has no priority");
        }
    }
}

impl FromStr for Priority {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match (text, text.parse()) {
            ("auto", _) => Ok(Self::Auto),
            ("none", _) => Ok(Self::Usual),
            (_, Ok(number @ 1..=99)) => Ok(Self::Fixed(number)),
            _ => Err("give auto, none, or a number of 1 to 99".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn priorities_are_words_or_numbers() {
        assert_eq!("auto".parse(), Ok(Priority::Auto));
        assert_eq!("none".parse(), Ok(Priority::Usual));
        assert_eq!("99".parse(), Ok(Priority::Fixed(99)));
        for wrong in ["", "0", "100", "-1", "high", "Auto"] {
            assert!(wrong.parse::<Priority>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn who_preserves_comes_first_only_where_writers_turn() {
        let policy = |priority: Priority, technique, stores: bool| {
            std::thread::spawn(move || {
                if stores {
                    priority.store(technique);
                } else {
                    priority.preserve(technique).unwrap();
                }
                sched::real_time_of_this().unwrap()
            })
            .join()
            .unwrap()
        };
        // As root, as tests are run.
        for (priority, technique, expected) in [
            (Priority::Auto, Technique::Spin, [Some(50), Some(49)]),
            (Priority::Auto, Technique::Park, [None, None]),
            (Priority::Usual, Technique::Spin, [None, None]),
            (Priority::Fixed(1), Technique::Park, [Some(1), Some(1)]),
            (Priority::Fixed(7), Technique::Spin, [Some(7), Some(6)]),
        ] {
            let found = [false, true].map(|stores| policy(priority, technique, stores));
            assert_eq!(found, expected, "{priority:?} {technique:?}");
        }
    }
}

//! Preempt: the kernel preempts tasks anywhere for as long as gates stand, where it can be told to.
//!
//! What it did before is noted in a file, and put back with the last gate; after an agent that was killed, by the next.

use std::fs;
use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{GateError, Preemption};
use crate::statefile::{self, Format};

/// Where a kernel that can change how it preempts says how it does, and is told.
const MODES: &str = "/sys/kernel/debug/sched/preempt";

const FORMAT: Format = Format {
    name: "blksnap-preempt",
    version: 1,
};

/// What was before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Before {
    /// In this boot only.
    boot: String,
    mode: String,
}

/// May switch the kernel.
#[derive(Clone, Debug)]
pub struct Switch {
    modes: PathBuf,
    note: PathBuf,
    boot: String,
}

impl Switch {
    /// What was before is noted in `note`; `boot` is the boot that this is.
    #[must_use]
    pub fn new(note: PathBuf, boot: String) -> Self {
        Self {
            modes: PathBuf::from(MODES),
            note,
            boot,
        }
    }

    /// The same with the kernel's file elsewhere.
    #[cfg(test)]
    fn at(modes: &std::path::Path, note: &std::path::Path, boot: &str) -> Self {
        Self {
            modes: modes.to_owned(),
            note: note.to_owned(),
            boot: boot.to_owned(),
        }
    }

    /// The mode now, and whether `full` is one of them.
    fn modes(&self) -> io::Result<(String, bool)> {
        let modes = fs::read_to_string(&self.modes)?;
        let now = modes
            .split_once('(')
            .and_then(|(_, rest)| rest.split_once(')'))
            .map(|(mode, _)| mode.to_owned())
            .ok_or_else(|| io::Error::other(format!("no mode in {modes:?}")))?;
        let words = modes.split_whitespace();
        let full = words
            .map(|word| word.trim_matches(['(', ')']))
            .any(|word| word == "full");
        Ok((now, full))
    }

    /// Whether this kernel can be switched.
    #[must_use]
    pub fn can(&self) -> bool {
        self.modes().is_ok_and(|(_, full)| full)
    }

    /// Makes the kernel preempt fully, if it does not so much that a writer can wait. Dropping what is given puts back
    /// what was before.
    ///
    /// # Errors
    /// It can't be noted, or the kernel refuses, as one that is locked down does.
    pub(super) fn raise(&self) -> Result<Option<Switched>, GateError> {
        let failed = |action| move |error: io::Error| GateError::Thread(action, error);
        if Preemption::now().can_spin() {
            return Ok(None);
        }
        let (mode, _) = self.modes().map_err(failed("read how the kernel is preempted"))?;
        self.raise_from(mode)
            .map(Some)
            .map_err(failed("make the kernel preempt fully"))
    }

    fn raise_from(&self, mode: String) -> io::Result<Switched> {
        let before = Before {
            boot: self.boot.clone(),
            mode,
        };
        statefile::write(&self.note, FORMAT, &before).map_err(io::Error::other)?;
        let switched = Switched(self.clone());
        fs::write(&self.modes, "full")?;
        tracing::info!(
            before = before.mode,
            "the kernel preempts fully while gates stand"
        );
        Ok(switched)
    }

    /// Puts back what was before, if something is noted.
    pub fn put_back(&self) {
        let before = match statefile::read::<Before>(&self.note, FORMAT) {
            Ok(None) => return,
            Ok(Some(before)) => before,
            Err(error) => {
                tracing::warn!(%error, "how the kernel was preempted before is not known");
                return;
            }
        };
        if before.boot == self.boot {
            if let Err(error) = fs::write(&self.modes, &before.mode) {
                tracing::error!(%error, mode = before.mode, "the kernel can't be told to preempt as before");
                return;
            }
            tracing::info!(mode = before.mode, "the kernel preempts as before");
        }
        if let Err(error) = fs::remove_file(&self.note) {
            tracing::warn!(%error, "a note of how the kernel was preempted stays");
        }
    }
}

/// A kernel that was switched. Dropped, it is as before.
#[derive(Debug)]
pub(super) struct Switched(Switch);

impl Drop for Switched {
    fn drop(&mut self) {
        self.0.put_back();
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn what_was_before_is_put_back_also_by_the_next_agent() {
        let directory = tempfile::tempdir().unwrap();
        let (modes, note) = (directory.path().join("modes"), directory.path().join("note"));
        fs::write(&modes, "none (voluntary) full \n").unwrap();
        let switch = Switch::at(&modes, &note, "this boot");
        assert!(switch.can());
        let read = || fs::read_to_string(&modes).unwrap();
        let (mode, _) = switch.modes().unwrap();
        let switched = switch.raise_from(mode.clone()).unwrap();
        assert_eq!(read(), "full");
        drop(switched);
        assert_eq!((read().as_str(), note.exists()), ("voluntary", false));
        // An agent that is killed.
        std::mem::forget(switch.raise_from(mode.clone()).unwrap());
        assert_eq!((read().as_str(), note.exists()), ("full", true));
        switch.put_back();
        assert_eq!((read().as_str(), note.exists()), ("voluntary", false));
        // Another boot has its own.
        std::mem::forget(switch.raise_from(mode).unwrap());
        Switch::at(&modes, &note, "the next").put_back();
        assert_eq!((read().as_str(), note.exists()), ("full", false));
    }

    #[test]
    fn a_kernel_without_the_choice_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let modes = directory.path().join("modes");
        let switch = Switch::at(&modes, Path::new("/nonexistent"), "");
        assert!(!switch.can());
        fs::write(&modes, "none (voluntary) \n").unwrap();
        assert!(!switch.can());
    }
}

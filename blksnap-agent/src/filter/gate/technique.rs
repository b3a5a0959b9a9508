//! Technique: whether this kernel can hold writes, and what it lacks if not.

use std::fs;

use super::object::Object;
use super::{GateError, GateOptions};

/// How the kernel is preempted. A writer that waits turns in a loop, and who ends its wait needs the processor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Preemption {
    /// At its own points only, or not at all.
    Voluntary(String),
    /// Anywhere, at the next tick at the latest.
    Lazy,
    /// Anywhere, at once.
    Full,
    /// The kernel does not say.
    Unknown,
}

impl Preemption {
    /// Of this kernel: debugfs says it, where it may be read, else the command line that it was started with, else the
    /// version.
    #[must_use]
    pub fn now() -> Self {
        let modes = fs::read_to_string("/sys/kernel/debug/sched/preempt");
        let version = fs::read_to_string("/proc/sys/kernel/version").unwrap_or_default();
        let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
        Self::of(modes.ok().as_deref(), &line, &version)
    }

    /// From the list of modes of a kernel that can change them, where it is, the command line (`preempt=`), and the
    /// version (`uname -v`).
    #[must_use]
    pub fn of(modes: Option<&str>, line: &str, version: &str) -> Self {
        let chosen = modes.and_then(|modes| modes.split_once('(')?.1.split_once(')'));
        let given = || {
            let mut words = line.split_whitespace().rev();
            words.find_map(|word| word.strip_prefix("preempt="))
        };
        let given = given().filter(|_| version.contains("PREEMPT_DYNAMIC"));
        match chosen.map(|(mode, _)| mode).or(given) {
            Some("lazy") => Self::Lazy,
            Some("full") => Self::Full,
            Some(mode) => Self::Voluntary(mode.to_owned()),
            None if version.contains("PREEMPT_DYNAMIC") => Self::Unknown,
            None if version.contains("PREEMPT_LAZY") => Self::Lazy,
            None if version.contains("PREEMPT") => Self::Full,
            None => Self::Voluntary("none or voluntary".to_owned()),
        }
    }

    /// Whether a writer may wait in a loop.
    #[must_use]
    pub const fn can_spin(&self) -> bool {
        matches!(self, Self::Lazy | Self::Full)
    }
}

impl std::fmt::Display for Preemption {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Voluntary(mode) => mode,
            Self::Lazy => "lazy",
            Self::Full => "full",
            Self::Unknown => "not known",
        })
    }
}

/// Whether the gate works here.
#[derive(Debug)]
pub struct Availability {
    /// How the kernel is preempted.
    pub preemption: Preemption,
    /// Whether it takes the programs.
    pub programs: Result<(), GateError>,
}

impl Availability {
    /// Loads the programs, and attaches none.
    #[must_use]
    pub fn find(options: &GateOptions) -> Self {
        Self {
            preemption: Preemption::now(),
            programs: Object::check(options),
        }
    }

    /// Whether the kernel takes the programs.
    ///
    /// # Errors
    /// Why not.
    pub fn check(options: &GateOptions) -> Result<(), GateError> {
        Object::check(&GateOptions {
            copies: 1,
            ..options.clone()
        })
    }

    /// What keeps it from working, with the remedy.
    #[must_use]
    pub fn lacks(&self) -> Option<String> {
        match &self.programs {
            Err(GateError::Load(why)) => {
                return Some(format!(
                    "it refuses programs on entry of its functions ({why}); use a kernel with CONFIG_FUNCTION_TRACER=y \
                     that is not locked down"
                ));
            }
            Err(error) => return Some(error.to_string()),
            Ok(()) => {}
        }
        match &self.preemption {
            Preemption::Lazy | Preemption::Full => None,
            Preemption::Voluntary(mode) => Some(format!(
                "preemption is {mode}; boot with preempt=full, or run the daemon with --gate-preempt"
            )),
            Preemption::Unknown => Some(
                "how the kernel is preempted can't be read; mount debugfs on /sys/kernel/debug, or boot with preempt=full"
                    .to_owned(),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn preemption_is_read_from_the_list_first() {
        let dynamic = "#1 SMP PREEMPT_DYNAMIC Debian 6.12";
        let of = |modes| Preemption::of(Some(modes), "quiet preempt=none", dynamic);
        assert_eq!(of("none voluntary (full) \n"), Preemption::Full);
        assert_eq!(of("full (lazy)\n"), Preemption::Lazy);
        assert_eq!(
            of("none (voluntary) full"),
            Preemption::Voluntary("voluntary".into())
        );
        assert_eq!(Preemption::of(None, "quiet", dynamic), Preemption::Unknown);
        assert_eq!(
            Preemption::of(None, "preempt=none preempt=full", dynamic),
            Preemption::Full
        );
        assert_eq!(Preemption::of(None, "", "#1 SMP PREEMPT_LAZY"), Preemption::Lazy);
        assert_eq!(Preemption::of(None, "", "#1 SMP PREEMPT_RT"), Preemption::Full);
        assert!(!Preemption::of(None, "preempt=full", "#1 SMP").can_spin());
    }
}

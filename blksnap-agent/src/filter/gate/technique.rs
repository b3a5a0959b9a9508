//! Technique: whether this kernel can hold writes, and what it lacks if not.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use clap::ValueEnum;

use super::object::{Loaded, Object};
use super::park::Place;
use super::preempt::Switched;
use super::{GateError, GateOptions};
use crate::sys::AlignedBuffer;

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

impl fmt::Display for Preemption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Voluntary(mode) => mode,
            Self::Lazy => "lazy",
            Self::Full => "full",
            Self::Unknown => "not known",
        })
    }
}

/// How a write waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Technique {
    /// In a loop, on a kernel that preempts it.
    Spin,
    /// Asleep, on a kernel with function error injection.
    Park,
}

impl Technique {
    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Spin => "spin",
            Self::Park => "park",
        }
    }
}

impl fmt::Display for Technique {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How writes are to wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Wish {
    /// Asleep where that works, otherwise in a loop.
    #[default]
    Auto,
    /// In a loop: any kernel that preempts it (`preempt=full`, or 7.x).
    Spin,
    /// Asleep: kernels with function error injection.
    Park,
}

/// A technique, and why it was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chosen {
    pub(super) technique: Technique,
    pub(super) why: String,
}

/// Loads and attaches the programs of the technique that is wished for, or that works; `device` is read to see that they
/// are called.
pub(super) fn load(
    options: &GateOptions,
    device: &Path,
) -> Result<(Loaded, Chosen, Option<Switched>), GateError> {
    let chosen = |technique, why: &str| Chosen {
        technique,
        why: why.to_owned(),
    };
    let why_not = match options.technique {
        Wish::Spin => None,
        Wish::Park => {
            let loaded = load_park(options, &[device.to_owned()])?;
            return Ok((loaded, chosen(Technique::Park, "it was asked for"), None));
        }
        Wish::Auto => match load_park(options, &[device.to_owned()]) {
            Ok(loaded) => return Ok((loaded, chosen(Technique::Park, PARK_WORKS), None)),
            Err(error) => Some(error),
        },
    };
    let switched = match &options.preempt {
        Some(switch) => switch.raise()?,
        None => None,
    };
    let loaded = Object::load(options, Technique::Spin)?;
    let why = why_not.map_or_else(|| "it was asked for".to_owned(), |error| no_park(&error));
    Ok((loaded, chosen(Technique::Spin, &why), switched))
}

/// What is said of a kernel on which writes can sleep.
const PARK_WORKS: &str = "this kernel lets programs sleep where writes begin";

/// Why writes can't sleep, as one of the reasons for another technique.
fn no_park(error: &GateError) -> String {
    format!("writes can't sleep: {}", why_no_park(error))
}

/// Why writes can't sleep here.
fn why_no_park(error: &GateError) -> String {
    match error {
        GateError::Load(_) => "the kernel was built without function error injection".to_owned(),
        GateError::Btf(_) => "the kernel is older than 6.2".to_owned(),
        error => error.to_string(),
    }
}

/// Loads and attaches the sleeping programs, makes sure that they are called, since the compiler may have put the function
/// into its callers, and makes the place to sleep. One of `devices` is read for that.
fn load_park(options: &GateOptions, devices: &[PathBuf]) -> Result<Loaded, GateError> {
    let mut loaded = Object::load(options, Technique::Park)?;
    let is_called = devices.iter().any(|device| {
        if let Err(error) = read_a_block(device) {
            tracing::debug!(%error, device = %device.display(), "a disk can't be read");
        }
        loaded.hits.words()[0].load(Ordering::Acquire) != 0
    });
    if !is_called {
        let names: Vec<_> = devices.iter().map(|path| path.display().to_string()).collect();
        let seen = if names.is_empty() {
            "any disk".to_owned()
        } else {
            names.join(", ")
        };
        return Err(GateError::NoHits { seen });
    }
    loaded.place = Some(Place::open(options, loaded.park.clone())?);
    Ok(loaded)
}

/// Reads the first bytes of a device past the page cache.
fn read_a_block(device: &Path) -> io::Result<()> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(device)?;
    let mut buffer = AlignedBuffer::zeroed(BLOCK);
    file.read_at(buffer.as_mut_slice(), 0).map(|_| ())
}

/// Bytes that every disk can give at once.
const BLOCK: usize = 4096;

/// Disks of this machine that can be read without waiting for somebody to insert them.
fn disks() -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir("/sys/block") else {
        return Vec::new();
    };
    let number = |path: &Path, name: &str| {
        let text = fs::read_to_string(path.join(name)).ok();
        text.and_then(|text| text.trim().parse::<u64>().ok())
    };
    let mut disks: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| {
            let path = entry.path();
            number(&path, "size").is_some_and(|size| size > 0) && number(&path, "removable") == Some(0)
        })
        .map(|entry| Path::new("/dev").join(entry.file_name()))
        .filter(|node| node.exists())
        .collect();
    disks.sort();
    // A few tell as much as all.
    disks.truncate(4);
    disks
}

/// Whether the gate works here.
#[derive(Debug)]
pub struct Availability {
    /// How writes are to wait.
    pub wish: Wish,
    /// How the kernel is preempted.
    pub preemption: Preemption,
    /// Whether it takes the programs that wait in a loop.
    pub programs: Result<(), GateError>,
    /// Whether it takes those that sleep, and calls them.
    pub park: Result<(), GateError>,
}

impl Availability {
    /// Loads the programs of both techniques. Those that sleep are attached for a moment, while a disk is read.
    #[must_use]
    pub fn find(options: &GateOptions) -> Self {
        Self {
            wish: options.technique,
            preemption: Preemption::now(),
            programs: Self::check(options),
            park: Self::check_park(options),
        }
    }

    /// Whether the kernel takes the programs that wait in a loop.
    ///
    /// # Errors
    /// Why not.
    pub fn check(options: &GateOptions) -> Result<(), GateError> {
        Object::check(&one_copy(options))
    }

    /// Whether the kernel takes those that sleep, and calls them.
    ///
    /// # Errors
    /// Why not.
    pub fn check_park(options: &GateOptions) -> Result<(), GateError> {
        load_park(&one_copy(options), &disks()).map(|_| ())
    }

    /// How writes would wait, if they can.
    #[must_use]
    pub fn technique(&self) -> Option<Technique> {
        let can_park = self.park.is_ok() && self.wish != Wish::Spin;
        let can_spin = self.programs.is_ok() && self.preemption.can_spin() && self.wish != Wish::Park;
        match (can_park, can_spin) {
            (true, _) => Some(Technique::Park),
            (false, true) => Some(Technique::Spin),
            (false, false) => None,
        }
    }

    /// What is found, for people: how writes would wait, and why so.
    #[must_use]
    pub fn found(&self) -> Option<String> {
        let spin = || format!("writes wait in a loop (spin), preemption is {}", self.preemption);
        Some(match (self.technique()?, &self.park) {
            (Technique::Park, _) => format!("writes sleep (park): {PARK_WORKS}"),
            (Technique::Spin, Err(error)) if self.wish == Wish::Auto => {
                format!("{}; {}", spin(), no_park(error))
            }
            (Technique::Spin, _) => spin(),
        })
    }

    /// What trying to wait in a loop showed.
    ///
    /// # Errors
    /// Why it does not work, with the remedy.
    pub fn spin_found(&self) -> Result<String, String> {
        self.spin_lacks().map_or_else(
            || {
                Ok(format!(
                    "the kernel takes the programs, preemption is {}",
                    self.preemption
                ))
            },
            Err,
        )
    }

    /// What trying to sleep showed.
    ///
    /// # Errors
    /// Why it does not work, with the remedy.
    pub fn park_found(&self) -> Result<String, String> {
        match &self.park {
            Ok(()) => Ok("the kernel takes the programs, and a read of a disk went through them".to_owned()),
            Err(error) => Err(format!(
                "{}; use a kernel with CONFIG_FUNCTION_ERROR_INJECTION=y for writes that sleep",
                why_no_park(error)
            )),
        }
    }

    /// What keeps it from working, with the remedy.
    #[must_use]
    pub fn lacks(&self) -> Option<String> {
        if self.technique().is_some() {
            return None;
        }
        if let (Wish::Park, Err(error)) = (self.wish, &self.park) {
            return Some(format!(
                "writes can't sleep, {}; use a kernel with CONFIG_FUNCTION_ERROR_INJECTION=y, or --gate-technique auto",
                why_no_park(error)
            ));
        }
        self.spin_lacks()
    }

    fn spin_lacks(&self) -> Option<String> {
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

fn one_copy(options: &GateOptions) -> GateOptions {
    GateOptions {
        copies: 1,
        ..options.clone()
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

    #[test]
    fn sleeping_comes_before_turning() {
        let refused = || Err(GateError::Load("no".into()));
        let find = |wish, park, programs, preemption| {
            let found = Availability {
                wish,
                preemption,
                programs,
                park,
            };
            (found.technique(), found.found(), found.lacks())
        };
        let voluntary = || Preemption::Voluntary("voluntary".into());
        let (technique, found, lacks) = find(Wish::Auto, Ok(()), Ok(()), Preemption::Full);
        assert_eq!((technique, lacks), (Some(Technique::Park), None));
        assert!(found.unwrap().contains("(park)"));
        // Preemption does not matter then.
        let (technique, ..) = find(Wish::Auto, Ok(()), refused(), voluntary());
        assert_eq!(technique, Some(Technique::Park));
        let (technique, found, _) = find(Wish::Auto, refused(), Ok(()), Preemption::Lazy);
        assert_eq!(technique, Some(Technique::Spin));
        assert!(found.unwrap().contains("without function error injection"));
        let (technique, _, lacks) = find(Wish::Spin, Ok(()), Ok(()), voluntary());
        assert_eq!(technique, None);
        assert!(lacks.unwrap().contains("preempt=full"));
        let (technique, _, lacks) = find(Wish::Park, refused(), Ok(()), Preemption::Full);
        assert_eq!(technique, None);
        assert!(lacks.unwrap().contains("CONFIG_FUNCTION_ERROR_INJECTION"));
    }
}

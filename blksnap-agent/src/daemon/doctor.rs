//! Doctor: what the machine has and lacks for tracking and snapshots.
//!
//! Every check says what was found, and what to do where it is not as it should be. A check that *failed* means
//! that the daemon can't do its work; a *warning* that it works less well. Nothing is changed on the machine: the
//! programs are loaded for a moment to hear what the verifier says.

use std::fs;
use std::io;
use std::path::Path;

use crate::control::api::{Check, CheckState, DoctorReport};
use crate::filter::dm::{self, DmError};
use crate::filter::gate::{Availability, GateOptions};
use crate::ublk::{self, UblkError};

/// Bits of `CapEff` in `/proc/self/status`, from `include/uapi/linux/capability.h`.
const CAPABILITIES: [(u32, &str); 3] = [(21, "CAP_SYS_ADMIN"), (38, "CAP_PERFMON"), (39, "CAP_BPF")];

/// Oldest kernel on which the programs are tested.
const TESTED: (u32, u32) = (6, 1);

/// Oldest kernel that has what the programs use: ring buffers and map-in-map of one kind each (5.8), atomic
/// operations with a result (5.12).
const OLDEST: (u32, u32) = (5, 12);

/// First bytes of the kernel's type information, `BTF_MAGIC` of `include/uapi/linux/btf.h`.
const BTF_MAGIC: u16 = 0xeb9f;

/// Looks at everything. `btf` is the kernel's type information, `load` loads the tracking programs and drops
/// them again.
pub fn examine(btf: &Path, load: &dyn Fn() -> Result<(), String>) -> DoctorReport {
    let held = Availability::find(&GateOptions {
        copies: 1,
        btf: btf.to_owned(),
        ..GateOptions::default()
    });
    let [spin, park] = techniques(&held);
    let checks = vec![
        kernel(&release()),
        type_information(btf, fs::read(btf)),
        privileges(&fs::read_to_string("/proc/self/status").unwrap_or_default()),
        bpffs(
            &fs::read_to_string("/proc/self/mounts").unwrap_or_default(),
            &fs::read_to_string("/proc/filesystems").unwrap_or_default(),
        ),
        lockdown(
            fs::read_to_string("/sys/kernel/security/lockdown")
                .ok()
                .as_deref(),
        ),
        jit(fs::read_to_string("/proc/sys/net/core/bpf_jit_enable")
            .ok()
            .as_deref()),
        programs(load()),
        io_uring(io_uring::IoUring::new(2).map(drop)),
        block_devices(ublk::available()),
        gate(&held),
        spin,
        park,
        mapped(dm::mapped_devices()),
    ];
    DoctorReport {
        ok: checks.iter().all(|check| check.state != CheckState::Failed),
        checks,
    }
}

fn check(name: &str, state: CheckState, found: impl Into<String>, remedy: impl Into<String>) -> Check {
    Check {
        name: name.to_owned(),
        state,
        found: found.into(),
        remedy: remedy.into(),
    }
}

/// Release of the running kernel.
#[must_use]
pub fn release() -> String {
    nix::sys::utsname::uname().map_or_else(
        |_| "unknown".to_owned(),
        |name| name.release().to_string_lossy().into_owned(),
    )
}

/// Major and minor number of a release such as `6.12.107-1-amd64`.
fn numbers(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn kernel(release: &str) -> Check {
    let found = format!("Linux {release}");
    let upgrade = format!("upgrade to Linux {}.{} or later", TESTED.0, TESTED.1);
    match numbers(release) {
        Some(version) if version >= TESTED => check("kernel", CheckState::Ok, found, ""),
        Some(version) if version < OLDEST => {
            check("kernel", CheckState::Failed, format!("{found}, too old"), upgrade)
        }
        _ => check(
            "kernel",
            CheckState::Warning,
            format!("{found}, not tested"),
            upgrade,
        ),
    }
}

fn type_information(path: &Path, content: io::Result<Vec<u8>>) -> Check {
    let remedy = "boot a kernel built with CONFIG_DEBUG_INFO_BTF=y, as those of the distributions are";
    match content {
        Ok(bytes) if bytes.first_chunk() == Some(&BTF_MAGIC.to_ne_bytes()) => check(
            "btf",
            CheckState::Ok,
            format!("{}, {} KiB", path.display(), bytes.len() / 1024),
            "",
        ),
        Ok(_) => check(
            "btf",
            CheckState::Failed,
            format!("{} is no type information", path.display()),
            remedy,
        ),
        Err(error) => check(
            "btf",
            CheckState::Failed,
            format!("{}: {error}", path.display()),
            remedy,
        ),
    }
}

fn privileges(status: &str) -> Check {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0);
    let (has, lacks): (Vec<_>, Vec<_>) = CAPABILITIES
        .iter()
        .partition(|(bit, _)| effective >> bit & 1 == 1);
    let names = |list: &[&(u32, &str)]| list.iter().map(|(_, name)| *name).collect::<Vec<_>>().join(", ");
    if lacks.is_empty() {
        check("privileges", CheckState::Ok, names(&has), "")
    } else {
        check(
            "privileges",
            CheckState::Failed,
            format!("without {}", names(&lacks)),
            "run with sudo; in a container, give it these capabilities",
        )
    }
}

/// Tracking survives the daemon on a BPF file system.
fn bpffs(mounts: &str, known: &str) -> Check {
    let place = mounts.lines().find_map(|line| {
        let mut words = line.split(' ');
        let (place, kind) = (words.nth(1)?, words.next()?);
        (kind == "bpf").then(|| place.to_owned())
    });
    let known = known.lines().any(|line| line.ends_with("\tbpf"));
    match place {
        Some(place) => check("bpffs", CheckState::Ok, place, ""),
        None if known => check("bpffs", CheckState::Ok, "not mounted, the daemon does it", ""),
        None => check(
            "bpffs",
            CheckState::Failed,
            "this kernel has none",
            "use a kernel with CONFIG_BPF_SYSCALL=y, or run the daemon with --no-pins",
        ),
    }
}

/// `confidentiality` forbids programs that read kernel memory (`LOCKDOWN_BPF_READ_KERNEL`); `integrity`, which
/// Secure Boot sets, does not.
fn lockdown(mode: Option<&str>) -> Check {
    let mode = mode.map_or("none", |modes| {
        modes
            .split_once('[')
            .and_then(|(_, rest)| rest.split_once(']'))
            .map_or("unknown", |(mode, _)| mode)
    });
    match mode {
        "confidentiality" => check(
            "lockdown",
            CheckState::Failed,
            mode,
            "boot with lockdown=integrity: tracing is forbidden in this mode",
        ),
        _ => check("lockdown", CheckState::Ok, mode, ""),
    }
}

fn jit(enabled: Option<&str>) -> Check {
    match enabled.map(str::trim) {
        Some("0") => check(
            "bpf jit",
            CheckState::Warning,
            "off: programs are interpreted, several times slower",
            "sysctl net.core.bpf_jit_enable=1",
        ),
        Some(_) => check("bpf jit", CheckState::Ok, "on", ""),
        None => check("bpf jit", CheckState::Ok, "not known", ""),
    }
}

fn programs(loaded: Result<(), String>) -> Check {
    match loaded {
        Ok(()) => check(
            "tracking programs",
            CheckState::Ok,
            "load, and the verifier agrees",
            "",
        ),
        Err(error) => {
            let (found, remedy) = error.rsplit_once("; ").unwrap_or((
                &error,
                "see what failed above, then ask with the output of this command",
            ));
            check("tracking programs", CheckState::Failed, found, remedy)
        }
    }
}

fn io_uring(made: io::Result<()>) -> Check {
    match made {
        Ok(()) => check("io_uring", CheckState::Ok, "permitted", ""),
        Err(error) => check(
            "io_uring",
            CheckState::Warning,
            format!("{error}: copies use threads instead"),
            "sysctl kernel.io_uring_disabled=0",
        ),
    }
}

/// Served devices as block devices of this machine; all else works without.
fn block_devices(available: Result<(), UblkError>) -> Check {
    let (state, error) = match available {
        Ok(()) => return check("ublk", CheckState::Ok, "served devices can be block devices", ""),
        Err(error @ UblkError::NotBuilt) => (CheckState::Ok, error.to_string()),
        Err(error) => (CheckState::Warning, error.to_string()),
    };
    let (found, remedy) = error.split_once("; ").unwrap_or((&error, ""));
    check("ublk", state, format!("not in use: {found}"), remedy)
}

/// Whether the writes of disks in use could be held (`filter::gate`); all else works without.
fn gate(found: &Availability) -> Check {
    match found.lacks() {
        None => check("gate", CheckState::Ok, found.found().unwrap_or_default(), ""),
        Some(what) => {
            let (found, remedy) = what.split_once("; ").unwrap_or((&what, ""));
            check(
                "gate",
                CheckState::Ok,
                format!("not possible here: {found}"),
                remedy,
            )
        }
    }
}

/// What each of the gate's techniques showed when it was tried.
fn techniques(found: &Availability) -> [Check; 2] {
    let row = |name, outcome: Result<String, String>| {
        let text = outcome.unwrap_or_else(|why| format!("not in use: {why}"));
        let (found, remedy) = text.split_once("; ").unwrap_or((&text, ""));
        check(name, CheckState::Ok, found, remedy)
    };
    [
        row("gate spin", found.spin_found()),
        row("gate park", found.park_found()),
    ]
}

/// Whether the kernel could keep old data of devices of device-mapper itself (`filter::dm`), and of which it would by
/// `auto`; all else works without.
fn mapped(found: Result<Vec<(String, Option<String>)>, DmError>) -> Check {
    let devices = match found {
        Ok(devices) => devices,
        Err(error) => {
            let error = error.to_string();
            let (found, remedy) = error.split_once("; ").unwrap_or((&error, ""));
            return check("dm", CheckState::Ok, format!("not in use: {found}"), remedy);
        }
    };
    let one = |(name, why): &(String, Option<String>)| match why {
        None => format!("{name}: dm"),
        Some(why) => format!("{name}: not dm, {why}"),
    };
    let devices: Vec<String> = devices.iter().map(one).collect();
    let found = if devices.is_empty() {
        "device-mapper is there, and has no device".to_owned()
    } else {
        devices.join("; ")
    };
    check("dm", CheckState::Ok, found, "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::gate::{GateError, Preemption, Wish};

    #[test]
    fn kernels_are_judged_by_their_numbers() {
        for (release, state) in [
            ("6.18.0", CheckState::Ok),
            ("6.1.0-37-amd64", CheckState::Ok),
            ("7.0-rc1", CheckState::Ok),
            ("5.15.0-100-generic", CheckState::Warning),
            ("5.10.0", CheckState::Failed),
            ("unknown", CheckState::Warning),
        ] {
            assert_eq!(kernel(release).state, state, "{release}");
        }
    }

    #[test]
    fn what_must_be_fails_with_a_remedy() {
        let missing = || Err(io::Error::from(io::ErrorKind::NotFound));
        let failed = [
            kernel("4.19.0"),
            type_information(Path::new("/nonexistent"), missing()),
            type_information(Path::new("/x"), Ok(vec![0; 64])),
            privileges("CapEff:\t0000000000000000\n"),
            privileges(""),
            lockdown(Some("none integrity [confidentiality]\n")),
            programs(Err("the verifier says no; ask".to_owned())),
        ];
        for check in failed {
            assert_eq!(check.state, CheckState::Failed, "{check:?}");
            assert!(!check.remedy.is_empty(), "{check:?}");
        }
    }

    #[test]
    fn what_is_there_is_recognised() {
        let good = [
            type_information(Path::new("/x"), Ok(vec![0x9f, 0xeb, 1, 0])),
            privileges("Name:\tx\nCapEff:\t000001ffffffffff\n"),
            bpffs(
                "proc /proc proc rw 0 0\nbpf /sys/fs/bpf bpf rw,mode=700 0 0\n",
                "",
            ),
            bpffs("proc /proc proc rw 0 0\n", "nodev\tproc\nnodev\tbpf\n\text4\n"),
            lockdown(Some("none [integrity] confidentiality\n")),
            lockdown(None),
            jit(Some("1\n")),
            programs(Ok(())),
            io_uring(Ok(())),
            block_devices(Ok(())),
            block_devices(Err(UblkError::NotBuilt)),
        ];
        for check in good {
            assert_eq!(check.state, CheckState::Ok, "{check:?}");
        }
        assert_eq!(
            bpffs("proc /proc proc rw 0 0\n", "nodev\tproc\n").state,
            CheckState::Failed
        );
        let able = |preemption| Availability {
            wish: Wish::Auto,
            preemption,
            programs: Ok(()),
            park: Err(GateError::Load("attach type not supported".into())),
        };
        let full = gate(&able(Preemption::Full)).found;
        assert!(full.contains("preemption is full; writes can't sleep"), "{full}");
        let voluntary = gate(&able(Preemption::Voluntary("voluntary".into())));
        assert!(voluntary.found.contains("not possible") && voluntary.remedy.contains("preempt=full"));
        // Each technique says what it lacks, whatever the other can.
        let [spin, park] = techniques(&able(Preemption::Voluntary("voluntary".into())));
        assert!(
            spin.found.starts_with("not in use: preemption is voluntary") && spin.remedy.contains("preempt")
        );
        assert!(park.found.contains("function error injection") && park.remedy.contains("CONFIG_FUNCTION"));
    }

    #[test]
    fn a_driver_that_is_missing_is_a_warning_with_a_remedy() {
        for error in [UblkError::NoDriver, UblkError::Lacks("user copy")] {
            let check = block_devices(Err(error));
            assert_eq!(check.state, CheckState::Warning, "{check:?}");
            assert!(!check.remedy.is_empty(), "{check:?}");
        }
    }

    #[test]
    fn one_failure_makes_the_report_fail() {
        let report = examine(Path::new("/nonexistent"), &|| Ok(()));
        assert!(!report.ok);
        assert!(report.checks.iter().any(|check| check.name == "btf"));
    }
}

//! Bench: benchmarks of filters in the kernel, in a guest: they need preemption or device-mapper, and disks of their own.

use std::ffi::OsString;
use std::io;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::kernels;
use super::machine::{Bus, Content, Disk, End, Machine, quote};
use crate::workspace::{self, Profile};

/// A group of the benchmark that runs in a guest.
struct Group {
    name: &'static str,
    /// The kernel, if none is named.
    kernel: &'static str,
}

static GROUPS: [Group; 2] = [
    Group {
        name: "gate",
        kernel: "fei+full",
    },
    Group {
        name: "dm",
        kernel: "6.12",
    },
];

/// Bytes of each of the two disks.
const DISK_BYTES: u64 = 1 << 30;

/// Longest time of a run; a round is done in one to two minutes.
const LONGEST: Duration = Duration::from_secs(1500);

/// Whether the arguments of the benchmark ask for it.
pub(crate) fn is_asked(arguments: &[OsString]) -> bool {
    group(arguments).is_some()
}

fn group(arguments: &[OsString]) -> Option<&'static Group> {
    GROUPS
        .iter()
        .find(|group| arguments.iter().any(|argument| argument == group.name))
}

/// Runs it; `--kernel NAME` among the arguments chooses the guest's kernel, the rest is the benchmark's.
pub(crate) fn run(arguments: &[OsString]) -> Result<ExitCode> {
    super::check()?;
    let group = group(arguments).context("no group that runs in a guest is named")?;
    let (kernel, rest) = split(arguments, group.kernel)?;
    let kernel = kernels::find(&kernel, false)?;
    crate::toolchain::set_up(None)?;
    let (agent, tool) = workspace::build_with_tool(Profile::Release, "blksnap-bench")?;
    let disk = || Disk {
        bus: Bus::Virtio,
        content: Content::Scratch(DISK_BYTES),
    };
    let machine = Machine {
        kernel,
        cpus: 2,
        memory_mib: 2048,
        disks: vec![disk(), disk()],
        shares: Vec::new(),
        append: Vec::new(),
        modules: vec!["loop".to_owned()],
        environment: vec![("BLKSNAP_AGENT".to_owned(), agent.display().to_string())],
        timeout: LONGEST,
        console: false,
    };
    let words: Vec<String> = rest.iter().map(|word| quote(word)).collect();
    let command = format!("{} {}", quote(&tool.display().to_string()), words.join(" "));
    let outcome = machine.run(&command, &mut io::stdout(), &mut io::stderr())?;
    for complaint in &outcome.complaints {
        eprintln!("lab: the kernel said: {complaint}");
    }
    match outcome.end {
        End::Exited(0) if outcome.complaints.is_empty() => Ok(ExitCode::SUCCESS),
        End::Exited(0) => Ok(ExitCode::FAILURE),
        End::Exited(code) => Ok(ExitCode::from(code)),
        End::TimedOut | End::Cut | End::Died => {
            eprintln!("lab: the benchmark did not end; the end of the guest's console:");
            for line in &outcome.tail {
                eprintln!("    {line}");
            }
            Ok(ExitCode::FAILURE)
        }
    }
}

/// The kernel, and the arguments without it.
fn split(arguments: &[OsString], kernel: &str) -> Result<(String, Vec<String>)> {
    let mut kernel = kernel.to_owned();
    let mut rest = Vec::new();
    let mut words = arguments.iter().map(|word| word.to_string_lossy().into_owned());
    while let Some(word) = words.next() {
        if word == "--kernel" {
            kernel = words
                .next()
                .context("--kernel needs a name, as `cargo xtask vm` has it")?;
        } else if let Some(name) = word.strip_prefix("--kernel=") {
            name.clone_into(&mut kernel);
        } else {
            rest.push(word);
        }
    }
    Ok((kernel, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_taken_out_of_the_arguments() {
        let words = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        let (kernel, rest) = split(&words("gate --kernel 7.2 --output json"), "6.1").unwrap();
        assert_eq!(
            (kernel.as_str(), rest.join(" ").as_str()),
            ("7.2", "gate --output json")
        );
        assert_eq!(
            split(&words("gate --kernel=6.1+full"), "7.2").unwrap().0,
            "6.1+full"
        );
        assert_eq!(split(&words("gate"), "7.2").unwrap().0, "7.2");
        assert!(split(&words("gate --kernel"), "7.2").is_err());
        assert!(is_asked(&words("gate --short")) && !is_asked(&words("nbd")));
    }
}

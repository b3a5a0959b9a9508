//! Vm: runs a command in a guest with another kernel.
//!
//! [`kernels`] finds and fetches kernels, [`initramfs`] makes what the guest starts with, [`machine`] runs it, and
//! [`matrix`] does so with test binaries on several kernels.

pub(crate) mod bench;
mod debian;
mod elf;
mod fei;
mod initramfs;
mod kernels;
mod machine;
pub(crate) mod matrix;
pub(crate) mod power;
pub(crate) mod results;

use std::env;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use self::machine::{Bus, Content, Disk, End, Machine, quote, size};
use crate::process;

/// What is the caller's exit code when the time is over, as `timeout` has it.
const TIMED_OUT: u8 = 124;
/// And when the guest ended before the command did.
const DIED: u8 = 125;

/// A guest and the command for it.
#[derive(clap::Args)]
#[command(after_help = "\
Exit status: the command's own; 124 when the time was over, 125 when the guest ended before the command did.
The guest's root is the host's, read-only, under an overlay in memory: what is written is gone afterwards, except on
a --disk-file and in a --share.

Examples:
  cargo xtask vm --kernel 6.1 -- uname -r
  cargo xtask vm --kernel 7.2+full --disk 1G --nvme 1G -- 'mkfs.ext4 -q /dev/vda && lsblk'
  cargo xtask vm --kernel fei --timeout 60 -- target/debug/deps/lab_ublk-0123456789abcdef --include-ignored")]
pub(crate) struct Arguments {
    /// 6.1, 6.12 or 7.2 of Debian, fei, or the path of a bzImage; with +full, +lazy, +voluntary or +none, so preempted
    #[arg(long, default_value = "6.12")]
    kernel: String,
    /// Ask the mirror for a newer kernel of the series
    #[arg(long)]
    update: bool,
    /// Processors
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Memory
    #[arg(long, value_name = "MIB", default_value_t = 2048)]
    mem: u32,
    /// A scratch disk, /dev/vda and so on, gone afterwards: 512M, 8G
    #[arg(long, value_name = "SIZE")]
    disk: Vec<String>,
    /// An existing file as a disk, after the scratch disks; it stays
    #[arg(long, value_name = "FILE")]
    disk_file: Vec<PathBuf>,
    /// A scratch NVMe disk, /dev/nvme0n1 and so on
    #[arg(long, value_name = "SIZE")]
    nvme: Vec<String>,
    /// A scratch NVMe disk that two controllers lead to
    #[arg(long, value_name = "SIZE")]
    nvme_multipath: Vec<String>,
    /// A scratch NVMe disk with zones of 8 MiB
    #[arg(long, value_name = "SIZE")]
    nvme_zoned: Vec<String>,
    /// A folder of the host that the guest may write to, at the same path
    #[arg(long, value_name = "DIR")]
    share: Vec<PathBuf>,
    /// More of the kernel's command line
    #[arg(long, value_name = "ARGS", allow_hyphen_values = true)]
    append: Vec<String>,
    /// A module to load before the command, with its parameters
    #[arg(long, value_name = "NAME")]
    module: Vec<String>,
    /// A variable for the command; without a value, as it is here
    #[arg(long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// When to give up, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    timeout: u64,
    /// Show the kernel's console meanwhile
    #[arg(long)]
    console: bool,
    /// A program and its arguments; one word alone is a line for the shell
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Runs the command, and gives its exit code.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    check()?;
    let machine = arguments.machine()?;
    let command = match arguments.command.as_slice() {
        [line] => line.clone(),
        words => words.iter().map(|word| quote(word)).collect::<Vec<_>>().join(" "),
    };
    let outcome = machine.run(&command, &mut io::stdout(), &mut io::stderr())?;
    for complaint in &outcome.complaints {
        eprintln!("lab: the kernel said: {complaint}");
    }
    let (code, why) = match outcome.end {
        End::Exited(code) => return Ok(ExitCode::from(code)),
        End::TimedOut | End::Cut => (
            TIMED_OUT,
            format!("the command did not end in {} s", arguments.timeout),
        ),
        End::Died => (DIED, "the guest ended before the command did".to_owned()),
    };
    eprintln!("lab: {why}; the end of its console:");
    for line in &outcome.tail {
        eprintln!("    {line}");
    }
    Ok(ExitCode::from(code))
}

/// Programs that every guest needs here.
pub(crate) fn check() -> Result<()> {
    for program in [
        "qemu-system-x86_64",
        "busybox",
        "setpriv",
        "modprobe",
        "depmod",
        "dpkg-deb",
        "xz",
    ] {
        ensure!(
            process::find(program).is_some(),
            "{program} is missing: `cargo xtask setup` installs it"
        );
    }
    Ok(())
}

impl Arguments {
    fn machine(&self) -> Result<Machine> {
        let mut disks = Vec::new();
        let scratch = [
            (Bus::Virtio, &self.disk),
            (Bus::Nvme, &self.nvme),
            (Bus::NvmeMultipath, &self.nvme_multipath),
            (Bus::NvmeZoned, &self.nvme_zoned),
        ];
        for (bus, sizes) in scratch {
            for text in sizes {
                disks.push(Disk {
                    bus,
                    content: Content::Scratch(size(text)?),
                });
            }
        }
        disks.extend(self.disk_file.iter().map(|path| Disk {
            bus: Bus::Virtio,
            content: Content::File(path.clone()),
        }));
        let share = |path: &PathBuf| {
            path.canonicalize()
                .with_context(|| format!("there is no folder {}", path.display()))
        };
        let variable = |text: &String| match text.split_once('=') {
            Some((name, value)) => (name.to_owned(), value.to_owned()),
            None => (text.clone(), env::var(text).unwrap_or_default()),
        };
        let kernel = kernels::find(&self.kernel, self.update)?;
        Ok(Machine {
            cpus: kernel.cpus.unwrap_or(self.cpus),
            memory_mib: kernel.memory_mib.unwrap_or(self.mem),
            kernel,
            disks,
            shares: self.share.iter().map(share).collect::<Result<_>>()?,
            append: self.append.clone(),
            modules: self.module.clone(),
            environment: self.env.iter().map(variable).collect(),
            timeout: Duration::from_secs(self.timeout),
            console: self.console,
        })
    }
}

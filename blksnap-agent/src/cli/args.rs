//! Arguments: the command line as types. Its text is the reference of the commands.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::daemon::NbdOptions;
use super::heat::When;
use super::nbd::Nbd;
use super::size;
use crate::cbt::TrackingParams;
use crate::control::api;
use crate::control::{CONTROL_SOCKET, RUNTIME_DIR};
use crate::seal::SealPolicy;
use crate::telemetry::log::LogFormat;
use crate::tracker::KernelBtf;
use crate::units::{Extent, Generation, SnapshotId};

mod snapshot;

pub(super) use snapshot::{Holding, Serve, Snapshot, Unserve};

/// Track what changes on block devices, take consistent snapshots of them, and back up what changed.
#[derive(Debug, Parser)]
#[command(
    name = super::PROGRAM,
    version,
    max_term_width = 100,
    disable_help_subcommand = true,
    after_help = "Examples:
  blksnap-agent doctor                      is this machine ready?
  blksnap-agent daemon &                    start the daemon
  blksnap-agent attach /dev/sdb1            track what changes
  blksnap-agent backup /dev/sdb1 sdb1.img   full backup of the live device
  blksnap-agent backup --incremental /dev/sdb1 sdb1.img"
)]
pub struct Cli {
    /// Control socket of the daemon
    #[arg(
        long,
        global = true,
        env = "BLKSNAP_SOCKET",
        value_name = "PATH",
        default_value_os_t = PathBuf::from(RUNTIME_DIR).join(CONTROL_SOCKET),
        hide_env_values = true,
    )]
    pub socket: PathBuf,

    /// Form of the answer
    #[arg(long, global = true, value_name = "FORM", default_value = "text")]
    pub output: Output,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Form of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Tables and sentences for people
    #[default]
    Text,
    /// JSON, sizes in bytes
    Json,
    /// A picture, of `cbt heat` only
    Svg,
    /// A picture, of `cbt heat` only
    Png,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon, which does the work for all other commands
    Daemon(Box<Daemon>),
    /// Begin to track devices
    Attach(Attach),
    /// End to track devices
    Detach(Detach),
    /// Show the tracked devices
    Status(Status),
    /// Check what this machine has and lacks
    Doctor(Doctor),
    /// Ask about changed blocks
    #[command(subcommand)]
    Cbt(Cbt),
    /// Create, take and destroy snapshots
    #[command(subcommand)]
    Snapshot(Snapshot),
    /// Serve a disk or an image file read-write over NBD, with change tracking and snapshots
    Serve(Serve),
    /// Show what is served
    #[command(after_help = "Example:
  blksnap-agent served --output json | jq -r '.served[].uri'")]
    Served,
    /// End serving disks
    Unserve(Unserve),
    /// Write a consistent image of a device to a file
    Backup(Backup),
    /// Block devices of this machine that show images
    #[command(subcommand)]
    Nbd(Nbd),
    /// Print a completion script for a shell
    #[command(after_help = "Example:
  blksnap-agent completions bash > /etc/bash_completion.d/blksnap-agent")]
    Completions {
        /// Shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page, or write all of them to a directory
    #[command(after_help = "Examples:
  blksnap-agent man | man -l -
  blksnap-agent man /usr/local/share/man/man1")]
    Man {
        /// Directory for a page of each command
        directory: Option<PathBuf>,
    },
}

impl Command {
    /// The word of the command line.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Daemon(_) => "daemon",
            Self::Attach(_) => "attach",
            Self::Detach(_) => "detach",
            Self::Status(_) => "status",
            Self::Doctor(_) => "doctor",
            Self::Cbt(_) => "cbt",
            Self::Snapshot(_) => "snapshot",
            Self::Serve(_) => "serve",
            Self::Served => "served",
            Self::Unserve(_) => "unserve",
            Self::Backup(_) => "backup",
            Self::Nbd(_) => "nbd",
            Self::Completions { .. } => "completions",
            Self::Man { .. } => "man",
        }
    }
}

/// `daemon`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sudo blksnap-agent daemon
  sudo blksnap-agent daemon --storage /mnt/big/blksnap --metrics-listen 127.0.0.1:9911
  sudo blksnap-agent daemon --nbd-listen 0.0.0.0:10809 --nbd-tls /etc/blksnap/tls
  sudo blksnap-agent daemon --purge

It ends by SIGTERM or Ctrl-C: snapshots are destroyed and sockets removed. Devices stay tracked by the kernel, and
the next daemon goes on with them, also after a kill or an upgrade. `--purge` ends that. Under systemd it is a
service of Type=notify.")]
pub struct Daemon {
    /// Directory of the sockets control.sock and nbd.sock [default: the one of --socket]
    #[arg(long, value_name = "DIR")]
    pub runtime_dir: Option<PathBuf>,

    /// Directory for the copies of snapshots that name none
    #[arg(long, value_name = "DIR", default_value = crate::daemon::STORAGE)]
    pub storage: PathBuf,

    /// Directory that says after a reboot what was tracked, on a file system that is not tracked itself
    #[arg(long, value_name = "DIR", default_value = crate::daemon::STATE)]
    pub state_dir: PathBuf,

    /// When to seal change maps, so that they go on after a reboot if nothing was written since
    #[arg(long, value_name = "WHEN", default_value = "shutdown")]
    pub seal: SealPolicy,

    /// Seconds that the start waits for recorded devices that are not there yet
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub device_wait: u32,

    /// BPF file system that keeps tracking alive while no daemon runs; mounted where it is missing
    #[arg(long, value_name = "DIR", default_value = crate::tracker::BPFFS)]
    pub bpffs: PathBuf,

    /// Let tracking end with the daemon
    #[arg(long)]
    pub no_pins: bool,

    /// End all tracking that goes on without a daemon, remove what is kept of it, and exit
    #[arg(long, conflicts_with = "no_pins")]
    pub purge: bool,

    /// Serve /metrics over TCP too, on a loopback address
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub metrics_listen: Option<std::net::SocketAddr>,

    /// The NBD server.
    #[command(flatten)]
    pub nbd: NbdOptions,

    /// What to log: error, warn, info, debug or trace, also as module=level,...
    #[arg(
        long,
        value_name = "FILTER",
        env = "BLKSNAP_LOG",
        default_value = "info",
        hide_env_values = true
    )]
    pub log: String,

    /// Form of the log
    #[arg(long, value_name = "FORM", default_value = "text")]
    pub log_format: LogFormat,

    /// Size of the event ring in bytes, a power of two
    #[arg(long, value_name = "BYTES", value_parser = size::parse)]
    pub ring_bytes: Option<u64>,

    /// Smallest tracking block that is chosen by the capacity, as log2 of its bytes
    #[arg(long, value_name = "SHIFT", default_value_t = TrackingParams::default().minimum_shift())]
    pub tracking_block_minimum_shift: u32,

    /// Number of tracking blocks above which larger ones are chosen
    #[arg(long, value_name = "COUNT", default_value_t = TrackingParams::default().maximum_count())]
    pub tracking_block_maximum_count: u64,

    /// Largest tracking block that is chosen by the capacity, as log2 of its bytes
    #[arg(long, value_name = "SHIFT", default_value_t = TrackingParams::default().maximum_shift())]
    pub tracking_block_maximum_shift: u32,

    /// Parameters of held snapshots
    #[command(flatten)]
    pub holding: Holding,

    /// Most memory that tracking one device may take; an attach that would take more is refused
    #[arg(long, value_name = "SIZE", value_parser = size::parse, default_value = "1G")]
    pub memory_limit: u64,

    /// How often a device that does I/O, of which the tracking programs saw nothing, is read to see that they work
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = crate::tracker::selftest::INTERVAL.as_secs(),
        value_parser = clap::value_parser!(u64).range(1..=86_400)
    )]
    pub self_test_interval: u64,

    /// Type information of the kernel
    #[arg(
        long,
        env = "BLKSNAP_BTF",
        value_name = "PATH",
        default_value = KernelBtf::PATH,
        hide = true
    )]
    pub btf: PathBuf,

    /// Where sysfs tells of the devices that are carried over a reboot
    #[arg(long, value_name = "DIR", default_value = "/sys", hide = true)]
    pub sysfs: PathBuf,

    /// Where the processes are looked for that may write to a device
    #[arg(long, value_name = "DIR", default_value = "/proc", hide = true)]
    pub proc: PathBuf,

    /// File with the number of this boot
    #[arg(
        long,
        value_name = "PATH",
        default_value = "/proc/sys/kernel/random/boot_id",
        hide = true
    )]
    pub boot_id: PathBuf,
}

/// `attach`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  blksnap-agent attach /dev/sdb1
  blksnap-agent attach --block-size 64K /dev/sdb /dev/mapper/root
  blksnap-agent attach --block-size 4K --dry-run /dev/sdb    what would it take?

Small blocks find less that did not change, and take more memory. A device can be attached while it is mounted and written.")]
pub struct Attach {
    /// Disks or partitions
    #[arg(required = true, value_name = "DEVICE")]
    pub devices: Vec<PathBuf>,

    /// Size of a tracking block, a power of two from 4K to 64M [default: by the capacity, from 64K]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub block_size: Option<u64>,

    /// Smallest tracking block that is chosen by the capacity, as log2 of its bytes [default: the daemon's]
    #[arg(long, value_name = "SHIFT", conflicts_with = "block_size")]
    pub tracking_block_minimum_shift: Option<u32>,

    /// Number of tracking blocks above which larger ones are chosen [default: the daemon's]
    #[arg(long, value_name = "COUNT", conflicts_with = "block_size")]
    pub tracking_block_maximum_count: Option<u64>,

    /// Largest tracking block that is chosen by the capacity, as log2 of its bytes [default: the daemon's]
    #[arg(long, value_name = "SHIFT", conflicts_with = "block_size")]
    pub tracking_block_maximum_shift: Option<u32>,

    /// Show blocks and memory, and attach nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// `detach`
#[derive(Debug, Args)]
#[command(after_help = "Example:
  blksnap-agent detach /dev/sdb1

What was known about changes is gone: the next backup of the device is a full one.")]
pub struct Detach {
    /// Tracked devices
    #[arg(required = true, value_name = "DEVICE")]
    pub devices: Vec<PathBuf>,
}

/// `status`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  blksnap-agent status
  blksnap-agent status --output json | jq '.devices[].cbt.dirty_blocks'")]
pub struct Status {
    /// Show only these
    #[arg(value_name = "DEVICE")]
    pub devices: Vec<PathBuf>,
}

/// `doctor`
#[derive(Debug, Args)]
#[command(after_help = "Example:
  sudo blksnap-agent doctor

The exit code is 1 when something that must be is missing.")]
pub struct Doctor {
    /// Type information of the kernel
    #[arg(
        long,
        env = "BLKSNAP_BTF",
        value_name = "PATH",
        default_value = KernelBtf::PATH,
        hide = true
    )]
    pub btf: PathBuf,
}

/// `cbt`
#[derive(Debug, Subcommand)]
pub enum Cbt {
    /// Show the change maps of devices
    #[command(after_help = "Example:
  blksnap-agent cbt info /dev/sdb1")]
    Info {
        /// Tracked devices; all when none is named
        #[arg(value_name = "DEVICE")]
        devices: Vec<PathBuf>,
    },
    /// List what changed between an earlier take and the last one
    #[command(
        visible_alias = "changes",
        after_help = "Examples:
  blksnap-agent cbt extents /dev/sdb1 --since 6fb1c7f0-93c8-4d29-9d1a-8a5a6d8d5a11:3
  blksnap-agent cbt extents /dev/sdb1 --since 6fb1c7f0-93c8-4d29-9d1a-8a5a6d8d5a11:3 --lines | jq -c
  blksnap-agent cbt extents /dev/sdb1 --last

Generation and number come from `snapshot info` or `backup` of that earlier take, which may be any one of the
generation. Where no answer can be trusted, it is \"full needed\" with the reason."
    )]
    Extents {
        /// Tracked device
        device: PathBuf,
        /// The earlier take (differential)
        #[arg(long, value_name = "GENERATION:NUMBER", value_parser = parse_base, required_unless_present = "last")]
        since: Option<api::Base>,
        /// Between the last take and the one before it (incremental)
        #[arg(long, conflicts_with = "since")]
        last: bool,
        /// A JSON object a line, as they come: a head, the extents, and an end with their number
        #[arg(long)]
        lines: bool,
    },
    /// Read the map of the last take: one byte a block, the number of the take before which it last changed
    #[command(after_help = "Examples:
  blksnap-agent cbt map /dev/sdb1                   a summary
  blksnap-agent cbt map /dev/sdb1 --file sdb1.map   the bytes")]
    Map {
        /// Tracked device
        device: PathBuf,
        /// File for the bytes; `-` for standard output
        #[arg(long, short, value_name = "FILE")]
        file: Option<PathBuf>,
    },
    /// Draw where on the device blocks changed, and how long ago
    #[command(after_help = "Examples:
  blksnap-agent cbt heat /dev/sdb1
  blksnap-agent cbt heat /dev/sdb1 sdb1.png
  blksnap-agent cbt heat /dev/sdb1 --output svg > sdb1.svg
  blksnap-agent cbt heat /dev/sdb1 --output json | jq '.buckets[] | select(.newest == 8)'

The device is drawn row by row from its first block to its last one. Red is what changed since the last take,
blue what did long ago; a cell is filled as far as its blocks changed.")]
    Heat {
        /// Tracked device
        device: PathBuf,
        /// File for the picture; its name tells the form (.svg, .png, .json) where --output does not
        #[arg(value_name = "FILE")]
        file: Option<PathBuf>,
        /// How many cells at most [default: what the terminal has room for, 2048 in a file]
        #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..=crate::cbt::MAX_BUCKETS))]
        cells: Option<u64>,
        /// When to use colours in text
        #[arg(long, value_name = "WHEN", default_value = "auto")]
        color: When,
    },
    /// Mark ranges as changed, so that the next backup takes them
    #[command(after_help = "Example:
  blksnap-agent cbt mark /dev/sdb1 --range 0:1M --range 4G:64K
  blksnap-agent cbt mark /dev/sdb1 --file /srv/db/table.ibd

Files are looked up where they are now, on ext2 to 4 and XFS; others do not say where on the device they are.")]
    #[group(required = true, multiple = true, id = "what")]
    Mark {
        /// Tracked device
        device: PathBuf,
        /// Ranges in bytes; suffixes K, M, G, T
        #[arg(long = "range", group = "what", num_args = 1.., value_name = "OFFSET:LENGTH", value_parser = parse_range)]
        ranges: Vec<Extent>,
        /// Files on the device
        #[arg(long = "file", group = "what", num_args = 1.., value_name = "PATH")]
        files: Vec<PathBuf>,
    },
}

/// Bounds of a take
#[derive(Debug, Args)]
pub struct Limits {
    /// Give up when the copy has not caught up with the writers after this time
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_seconds: Option<u64>,

    /// Give up after so many rounds of copying what changed meanwhile
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_rounds: Option<u32>,

    /// Longest time that file systems may be frozen
    #[arg(long, value_name = "MILLISECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub freeze_limit: Option<u64>,

    /// Program run with `freeze` before, `frozen` in and `thaw` after the freeze
    #[arg(long, value_name = "PROGRAM")]
    pub freeze_hook: Option<PathBuf>,
}

/// `backup`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  blksnap-agent backup /dev/sdb1 sdb1.img
  blksnap-agent backup --incremental /dev/sdb1 sdb1.img
  blksnap-agent backup --snapshot $id /dev/sdb1 sdb1.img

The file is a raw image; zeroes are holes. Beside it, sdb1.img.blksnap.json holds what the next incremental
backup needs. A device that is not tracked yet is attached.")]
pub struct Backup {
    /// Disk or partition
    pub device: PathBuf,
    /// Image file, made or renewed
    pub target: PathBuf,
    /// Write only what changed since the file was made; everything where that can't be proven
    #[arg(long, short)]
    pub incremental: bool,
    /// Copy the image of this snapshot instead of the live device
    #[arg(long, value_name = "ID", value_parser = parse_id, conflicts_with_all = ["max_seconds", "max_rounds", "freeze_limit", "freeze_hook"])]
    pub snapshot: Option<SnapshotId>,
    #[command(flatten)]
    /// Bounds of the take.
    pub limits: Limits,
}

fn parse_id(text: &str) -> Result<SnapshotId, String> {
    text.parse()
        .map_err(|_| "no snapshot has such an id, `blksnap-agent snapshot list` shows them".to_owned())
}

fn parse_base(text: &str) -> Result<api::Base, String> {
    let wrong = || "give GENERATION:NUMBER as `snapshot info` shows it".to_owned();
    let (generation, number) = text.split_once(':').ok_or_else(wrong)?;
    Ok(api::Base {
        generation: generation.parse::<Generation>().map_err(|_| wrong())?,
        number: number.parse().map_err(|_| wrong())?,
    })
}

fn parse_range(text: &str) -> Result<Extent, String> {
    let (offset, length) = text
        .split_once(':')
        .ok_or_else(|| "give OFFSET:LENGTH, in bytes or with a suffix as in 4G:64K".to_owned())?;
    let extent = Extent {
        offset: size::parse(offset)?,
        length: size::parse(length)?,
    };
    if extent.length == 0 || extent.offset.checked_add(extent.length).is_none() {
        return Err("the range is empty or ends past 2^64".to_owned());
    }
    Ok(extent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_help_and_an_example() {
        fn visit(command: &clap::Command, path: &str) {
            for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
                let path = format!("{path} {}", sub.get_name());
                assert!(sub.get_about().is_some(), "{path} has no help");
                if sub.has_subcommands() {
                    visit(sub, &path);
                } else {
                    let example = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
                    assert!(example.contains("Example"), "{path} has no example");
                }
                for argument in sub.get_arguments() {
                    assert!(
                        argument.get_help().is_some(),
                        "{path}: {} has no help",
                        argument.get_id()
                    );
                }
            }
        }
        visit(&Cli::command(), "");
    }

    #[test]
    fn bases_and_ranges_are_read_and_wrong_ones_refused() {
        let base = parse_base("00000000-0000-0000-0000-000000000001:255").unwrap();
        assert_eq!(base.number, 255);
        for wrong in [
            "",
            "1:1",
            "00000000-0000-0000-0000-000000000001",
            "00000000-0000-0000-0000-000000000001:256",
        ] {
            assert!(parse_base(wrong).is_err(), "{wrong}");
        }
        assert_eq!(
            parse_range("1M:4K"),
            Ok(Extent {
                offset: 1 << 20,
                length: 4096
            })
        );
        for wrong in ["", "1", "1:0", "x:1", "1:-1", "18446744073709551615:1"] {
            assert!(parse_range(wrong).is_err(), "{wrong}");
        }
    }
}

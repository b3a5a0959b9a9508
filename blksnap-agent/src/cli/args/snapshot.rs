//! Arguments of `snapshot`, `serve`, `served` and `unserve`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::super::size;
use super::{Limits, parse_id};
use crate::engine::cow::Promise;
use crate::snapshot::FilterWish;
use crate::units::SnapshotId;

/// `serve`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  blksnap-agent serve /var/lib/vm/web.img           prints where NBD clients find it
  blksnap-agent serve /dev/vg0/web --name web --block-size 4K

A virtual machine uses it as its disk:
  qemu-system-x86_64 -drive file=nbd+unix:///web.img?socket=/run/blksnap/nbd.sock,format=raw,if=virtio ...

The agent must be the only one that writes to it. It is served again by the next daemon.")]
pub struct Serve {
    /// Block device or image file
    #[arg(value_name = "ORIGIN")]
    pub path: PathBuf,

    /// Name of the export [default: the file's name]
    #[arg(long)]
    pub name: Option<String>,

    /// Size of a tracking block [default: by the size of the disk]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub block_size: Option<u64>,

    /// Smallest size of a chunk of difference storage [default: 256K]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub chunk_size: Option<u64>,

    /// Make it a block device of this machine, too: /dev/ublkbN. The agent must be built with the feature ublk
    #[arg(long)]
    pub ublk: bool,
}

/// `unserve`
#[derive(Debug, Args)]
#[command(after_help = "Example:
  blksnap-agent unserve web.img")]
pub struct Unserve {
    /// Names, as `served` shows them
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
}

/// Parameters of held snapshots, of `daemon`
#[derive(Debug, Args)]
#[command(next_help_heading = "Snapshots")]
pub struct Holding {
    /// Smallest chunk of difference storage, as log2 of its bytes
    #[arg(long, value_name = "SHIFT", default_value_t = 18)]
    pub chunk_minimum_shift: u32,

    /// Largest chunk, as log2 of its bytes
    #[arg(long, value_name = "SHIFT", default_value_t = 26)]
    pub chunk_maximum_shift: u32,

    /// Number of chunks above which larger ones are chosen, as log2
    #[arg(long, value_name = "SHIFT", default_value_t = 40)]
    pub chunk_maximum_count_shift: u32,

    /// Most chunks that wait in memory to be stored, of snapshots that survive nothing
    #[arg(long, value_name = "COUNT", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub chunk_maximum_in_queue: u32,

    /// Free buffers that are kept for them
    #[arg(long, value_name = "COUNT", default_value_t = 128, value_parser = clap::value_parser!(u32).range(..=4096))]
    pub free_diff_buffer_pool_size: u32,

    /// How old data of devices that are not served survives, where a snapshot does not say: auto, converge, gate or dm
    #[arg(long, value_name = "FILTER", default_value = "converge", value_parser = parse_filter)]
    pub filter: FilterWish,

    /// Longest wait of a write that a gate holds, in milliseconds: past that, its snapshots are lost
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 500, value_parser = clap::value_parser!(u64).range(10..=15_000))]
    pub gate_deadline: u64,

    /// Make the kernel preempt fully while there are gates, where it can change that and does not do so already
    #[arg(long)]
    pub gate_preempt: bool,
    /// How writes wait while old data is kept for `--filter gate`: asleep (park), which needs a kernel with function error
    /// injection (Ubuntu's have it), or in a loop (spin), which needs one that preempts. `doctor` says what works
    #[arg(long, value_name = "TECHNIQUE", value_enum, default_value = "auto")]
    pub gate_technique: crate::filter::gate::Wish,

    /// Real-time priority (SCHED_FIFO) of the threads that such writes wait for: 1 to 99, none, or auto, which is 50 where
    /// writes wait in a loop and the kernel permits it
    #[arg(long, value_name = "PRIORITY", default_value = "auto")]
    pub gate_priority: crate::filter::gate::Priority,

    /// How much difference storage is asked for at a time
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = size::parse)]
    pub diff_storage_minimum: u64,
}

fn parse_promise(text: &str) -> Result<Promise, String> {
    match text {
        "nothing" => Ok(Promise::Nothing),
        "agent-crash" => Ok(Promise::AgentCrash),
        "power-cut" => Ok(Promise::PowerCut),
        _ => Err("give nothing, agent-crash or power-cut".to_owned()),
    }
}

fn parse_filter(text: &str) -> Result<FilterWish, String> {
    match text {
        "auto" => Ok(FilterWish::Auto),
        "converge" => Ok(FilterWish::Converge),
        "gate" => Ok(FilterWish::Gate),
        "dm" => Ok(FilterWish::Dm),
        _ => Err("give auto, converge, gate or dm".to_owned()),
    }
}

/// `snapshot`
#[derive(Debug, Subcommand)]
pub enum Snapshot {
    /// Create a snapshot, and take it at once when devices are named
    #[command(after_help = "Examples:
  blksnap-agent snapshot create /dev/sdb1 /dev/sdc  one instant for both; prints the id and the images
  id=$(blksnap-agent snapshot create)               an empty one: add devices, then take it

  blksnap-agent snapshot create vm.img --storage /var/snap,limit=20G --storage /dev/sdd
  blksnap-agent snapshot create vm.img --promise power-cut
  blksnap-agent snapshot create /dev/sdb1 --filter gate --storage /var/snap
  blksnap-agent snapshot create /dev/vg/data --filter dm --storage /var/snap

A device that is not tracked yet is attached. Of a device that is served (`blksnap-agent serve`) old data is kept
from the instant on. Other devices are copied (converge), or programs in the kernel hold their writes (gate): then
there is no copy to wait for, and the snapshot ends with the agent; difference storage must be on another device.
Of devices of device-mapper (LVM, dm-crypt) the kernel can keep old data itself (dm): the snapshot outlives the agent.
With auto it is dm or a gate where that is possible; `blksnap-agent doctor` tells.

Difference storage, used in the order given:
  DIR[,limit=SIZE]             a file that grows, up to the limit or as far as there is space
  FILE[,limit=SIZE]            a file as it is, or one that grows up to the limit
  DEVICE[:SECTOR+COUNT...]     a block device, or ranges of it in sectors of 512 bytes
  memory:SIZE                  memory")]
    Create {
        /// Devices
        #[arg(value_name = "DEVICE")]
        devices: Vec<PathBuf>,
        /// Difference storage, also several [default: the daemon's directory]
        #[arg(long, value_name = "PLACE")]
        storage: Vec<String>,
        /// What a snapshot of served devices survives [default: agent-crash]
        #[arg(long, value_name = "WHAT", value_parser = parse_promise)]
        promise: Option<Promise>,
        /// How old data of devices that are not served survives: auto, converge, gate or dm [default: the daemon's]
        #[arg(long, value_name = "FILTER", value_parser = parse_filter)]
        filter: Option<FilterWish>,
        /// How much difference storage is asked for at a time [default: 1G]
        #[arg(long, value_name = "SIZE", value_parser = size::parse)]
        minimum: Option<u64>,
        /// Storage does not grow by itself
        #[arg(long)]
        no_autogrow: bool,
        /// Do not take it yet
        #[arg(long)]
        no_take: bool,
        #[command(flatten)]
        limits: Limits,
    },
    /// Add devices to a snapshot that is not taken yet
    #[command(after_help = "Example:
  blksnap-agent snapshot add $id /dev/sdb1")]
    Add {
        /// Snapshot
        #[arg(value_parser = parse_id)]
        id: SnapshotId,
        /// Devices
        #[arg(required = true, value_name = "DEVICE")]
        devices: Vec<PathBuf>,
    },
    /// Take a snapshot: one instant for all its devices
    #[command(after_help = "Example:
  blksnap-agent snapshot take --max-seconds 600 $id")]
    Take {
        /// Snapshot
        #[arg(value_parser = parse_id)]
        id: SnapshotId,
        #[command(flatten)]
        limits: Limits,
    },
    /// Add difference storage, also while the snapshot is held
    #[command(after_help = "Example:
  blksnap-agent snapshot append $id /srv/more,limit=10G")]
    Append {
        /// Snapshot
        #[arg(value_parser = parse_id)]
        id: SnapshotId,
        /// Difference storage, as `snapshot create` takes it
        #[arg(value_name = "PLACE")]
        storage: String,
    },
    /// Show in which sectors of which devices the difference storage is
    #[command(after_help = "Example:
  blksnap-agent snapshot storage $id --output json | jq '.extents[]'")]
    Storage {
        /// Snapshot
        #[arg(value_parser = parse_id)]
        id: SnapshotId,
    },
    /// Wait for an event: more storage is wanted, or an image is lost
    #[command(after_help = "Example:
  blksnap-agent snapshot wait $id --timeout 60000

The exit code is 0 with an event and 3 without one in time.")]
    Wait {
        /// Snapshot
        #[arg(value_parser = parse_id)]
        id: SnapshotId,
        /// How long, in milliseconds
        #[arg(long, short, value_name = "MILLISECONDS", default_value_t = 10_000)]
        timeout: u64,
    },
    /// Print events as they come, until the snapshot is gone
    #[command(after_help = "Example:
  blksnap-agent snapshot watch $id --output json | jq -c")]
    Watch {
        /// Snapshot
        #[arg(value_parser = parse_id)]
        id: SnapshotId,
    },
    /// List all snapshots
    #[command(after_help = "Example:
  blksnap-agent snapshot list --output json | jq -r '.snapshots[].id'")]
    List,
    /// Show a snapshot and where its images are
    #[command(after_help = "Example:
  nbdcopy \"$(blksnap-agent snapshot info $id --output json | jq -r '.devices[0].image.uri')\" sdb1.img")]
    Info {
        /// Snapshot
        #[arg(value_parser = parse_id)]
        id: SnapshotId,
    },
    /// Destroy snapshots; tracking goes on
    #[command(after_help = "Example:
  blksnap-agent snapshot destroy $id")]
    Destroy {
        /// Snapshots
        #[arg(required = true, value_name = "ID", value_parser = parse_id)]
        ids: Vec<SnapshotId>,
    },
}

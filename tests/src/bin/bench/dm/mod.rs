//! Dm: a volume of LVM with a snapshot by the dm filter, beside the same volume with LVM's own snapshot.
//!
//! It needs a kernel with device-mapper, and two disks that are its own: `cargo xtask bench dm` starts a guest. The
//! volume is on the first disk. All old data is on the second one: LVM's in a volume, ours in a file of an ext4 on a
//! volume there, and once more in a volume. The size of what is kept at once is the same. Each round has fresh snapshots;
//! a ratio is that of one round, and the order goes round.

mod load;
mod take;

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use blksnap_agent::disk::watchdog::SUBCOMMAND;
use blksnap_agent::disk::{BlockDevice, WatchdogCommand};
use blksnap_agent::filter::dm::{Condition, Dm, DmOptions, Origin, Place};
use blksnap_agent::units::SnapshotId;
use blksnap_tests::volumes::{Group, Nothing, fill, lvm};
use blksnap_tests::{agent_binary, lab, run, seed};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;

use self::load::{BLOCK, THREADS};
use crate::Bench;

/// MiB of the volume.
const SIZE: u64 = 256;
/// MiB of each difference storage.
const STORAGE: u64 = 128;
/// Blocks that are written in a round.
const WRITES: usize = 8192;
/// How often they are written again.
const PASSES: usize = 6;
/// Rounds.
const ROUNDS: usize = 5;
/// KiB that are kept at once, by both: what the dm filter chooses for a device of this size.
const CHUNK: &str = "4k";

pub(crate) fn measure(bench: &mut Bench) -> Result<()> {
    lab::target("snapshot", "dm_snapshot")?;
    let scene = Scene::new(bench)?;
    let mut samples = Samples::default();
    let rounds = bench.rounds(ROUNDS);
    for round in 1..=rounds {
        bench.step(&format!("dm: writes, {round} of {rounds}"))?;
        scene.round(round, &mut samples)?;
    }
    samples.report(bench);
    take::measure(bench, &scene)
}

/// Seconds of one round with one kind of snapshot.
#[derive(Clone, Copy)]
struct Seconds {
    first: f64,
    again: f64,
}

#[derive(Default)]
struct Samples {
    first_touch: Vec<f64>,
    rewrite: Vec<f64>,
    ranges_first_touch: Vec<f64>,
    ranges_rewrite: Vec<f64>,
    rate: Vec<f64>,
    peer_rate: Vec<f64>,
    plain_rate: Vec<f64>,
}

impl Samples {
    fn report(self, bench: &mut Bench) {
        let report = &mut bench.report;
        let writes = format!("4 KiB random writes, each block once, {THREADS} at a time");
        let peer = format!("LVM's own snapshot, --chunksize {CHUNK}");
        let again = "the same blocks again";
        let ranges = "old data in a volume, not in a file";
        let mut add = |name, aim, what: String, samples| report.add(name, aim, what, samples);
        add(
            "dm_first_touch_ratio",
            ">= 0.95",
            format!("{writes}; to {peer}"),
            self.first_touch,
        );
        add(
            "dm_rewrite_ratio",
            ">= 0.95",
            format!("{again}; to {peer}"),
            self.rewrite,
        );
        add(
            "dm_ranges_first_touch_ratio",
            "",
            format!("{writes}, {ranges}; to {peer}"),
            self.ranges_first_touch,
        );
        add(
            "dm_ranges_rewrite_ratio",
            "",
            format!("{again}, {ranges}; to {peer}"),
            self.ranges_rewrite,
        );
        add("dm_first_touch_iops", "", writes.clone(), self.rate);
        add(
            "dm_first_touch_peer_iops",
            "",
            format!("{writes}; {peer}"),
            self.peer_rate,
        );
        add(
            "dm_plain_iops",
            "",
            format!("{writes}; no snapshot"),
            self.plain_rate,
        );
    }
}

/// A group on two disks, and the filter.
pub(super) struct Scene {
    /// Goes before the group.
    _mounted: Mounted,
    dm: Dm,
    group: Group,
    volume: PathBuf,
    /// For old data in ranges.
    ranges: PathBuf,
    /// For old data in a file.
    pub(super) directory: PathBuf,
    disk: PathBuf,
    blocks: Vec<u64>,
    _journal: tempfile::TempDir,
}

/// Unmounted when dropped.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = blksnap_tests::unmount(&self.0) {
            blksnap_tests::complain(format_args!("{error:#}"));
        }
    }
}

impl Scene {
    fn new(bench: &Bench) -> Result<Self> {
        bench.step("dm: making volumes")?;
        let (first, disk) = (lab::virtio(0)?, lab::virtio(1)?);
        let group = Group::over("dmbench", &[&first, &disk])?;
        let on = disk.display().to_string();
        let volume = group.thick_on("volume", SIZE, &[&first.display().to_string()])?;
        let ranges = group.thick_on("ranges", STORAGE, &[&on])?;
        let store = group.thick_on("store", STORAGE * 4, &[&on])?;
        // The disks are files with holes: no round is to be the first one that writes somewhere.
        for (node, mib) in [(&volume, SIZE), (&ranges, STORAGE), (&store, STORAGE * 4)] {
            for at in 0..mib {
                fill(node, at << 20, 1 << 20, 0x55)?;
            }
        }
        run("mkfs.ext4", ["-q".as_ref(), "-F".as_ref(), store.as_os_str()])?;
        let directory = PathBuf::from("/run/dmbench");
        std::fs::create_dir_all(&directory)?;
        run("mount", [&store, &directory])?;
        let mounted = Mounted(directory.clone());
        let journal = tempfile::tempdir()?;
        let mut options = DmOptions::new(journal.path().join("dm"));
        options.watchdog = WatchdogCommand {
            program: agent_binary()?,
            arguments: vec![SUBCOMMAND.into()],
        };
        let mut blocks: Vec<u64> = (0..(SIZE << 20) / BLOCK).collect();
        blocks.shuffle(&mut StdRng::seed_from_u64(seed("dm")));
        blocks.truncate(WRITES);
        Ok(Self {
            dm: Dm::open(options)?,
            group,
            volume,
            ranges,
            directory,
            disk,
            blocks,
            _mounted: mounted,
            _journal: journal,
        })
    }

    fn round(&self, round: usize, samples: &mut Samples) -> Result<()> {
        let mut kinds = [Kind::File, Kind::Lvm, Kind::Ranges];
        kinds.rotate_left(round % 3);
        let mut seconds = [Seconds {
            first: 0.0,
            again: 0.0,
        }; 3];
        for kind in kinds {
            seconds[kind as usize] = self.with(kind)?;
        }
        let [ours, peer, ranges] = seconds;
        samples.first_touch.push(peer.first / ours.first);
        samples.rewrite.push(peer.again / ours.again);
        samples.ranges_first_touch.push(peer.first / ranges.first);
        samples.ranges_rewrite.push(peer.again / ranges.again);
        samples.rate.push(rate(ours.first));
        samples.peer_rate.push(rate(peer.first));
        samples.plain_rate.push(rate(self.write(0)?));
        Ok(())
    }

    /// Writes with a snapshot held.
    fn with(&self, kind: Kind) -> Result<Seconds> {
        let id = SnapshotId::new(uuid::Uuid::new_v4());
        let taken = match kind {
            Kind::Lvm => {
                let size = format!("{STORAGE}M");
                let origin = format!("{}/volume", self.group.name);
                let on = self.disk.display().to_string();
                lvm(
                    "lvcreate",
                    &["-s", "-c", CHUNK, "-L", &size, "-n", "theirs", &origin, &on],
                )?;
                None
            }
            Kind::File => {
                Some(self.take(id, &[&self.volume], &[Place::Directory(self.directory.clone())])?)
            }
            Kind::Ranges => Some(self.take(id, &[&self.volume], &[whole(&self.ranges)?])?),
        };
        let first = self.write(0x11)?;
        let again = (0x21..)
            .take(PASSES)
            .map(|value| self.write(value))
            .sum::<Result<f64>>()?;
        match taken {
            Some(taken) => {
                for image in &taken.images {
                    ensure!(self.dm.check(id, image) == Condition::Whole, "the image is lost");
                    let used = self.dm.usage(id, image).map_or(0, |usage| usage.used);
                    ensure!(used >= WRITES as u64 * BLOCK, "only {used} bytes were kept");
                }
                self.dm.release(id)?;
            }
            None => {
                let snapshot = format!("{}/theirs", self.group.name);
                let status = run("dmsetup", ["status", "dmbench-theirs"])?;
                ensure!(!status.contains("Invalid"), "LVM's snapshot is lost: {status}");
                lvm("lvremove", &["--force", &snapshot])?;
            }
        }
        Ok(Seconds { first, again })
    }

    fn take(
        &self,
        id: SnapshotId,
        nodes: &[&Path],
        places: &[Place],
    ) -> Result<blksnap_agent::filter::dm::Taken> {
        let origin = |(node, place): (&&Path, &Place)| {
            Ok(Origin {
                device: BlockDevice::open(node)?,
                place: place.clone(),
                bytes: STORAGE << 20,
            })
        };
        let origins = nodes.iter().zip(places).map(origin);
        let origins = origins.collect::<Result<Vec<_>>>()?;
        Ok(self.dm.take(id, &origins, &mut Nothing)?)
    }

    fn write(&self, value: u8) -> Result<f64> {
        load::write(&self.volume, &self.blocks, value)
    }
}

/// All of a device.
fn whole(node: &Path) -> Result<Place> {
    let device = BlockDevice::open(node)?;
    Ok(Place::Ranges(vec![blksnap_agent::storage::DeviceExtent {
        device: device.id,
        sector: 0,
        count: device.capacity.bytes() / 512,
    }]))
}

#[derive(Clone, Copy)]
enum Kind {
    File,
    Lvm,
    Ranges,
}

/// Writes a second.
fn rate(seconds: f64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let writes = WRITES as f64;
    writes / seconds
}

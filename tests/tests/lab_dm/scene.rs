//! Scene: volumes to be taken, a place for old data, and what must be the same afterwards. All go with the test.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use blksnap_agent::disk::watchdog::SUBCOMMAND;
use blksnap_agent::disk::{BlockDevice, FileSystems, Freezer, WatchdogCommand};
use blksnap_agent::filter::dm::table::Node;
use blksnap_agent::filter::dm::{
    Condition, Dm, DmError, DmImage, DmOptions, Instants, Mapper, Origin, Place, Taken,
};
use blksnap_agent::units::SnapshotId;
pub(crate) use blksnap_tests::volumes::{Group, fill, lvm, ours, table};
use blksnap_tests::{LoopDevice, agent_binary, complain, lab, read_device, run};
use tempfile::TempDir;

pub(crate) const MIB: u64 = 1 << 20;

/// Longer than a guest that is emulated takes for anything: it only bounds a hang.
const LIMIT: Duration = Duration::from_secs(120);

/// Mounted somewhere, until it is dropped.
pub(crate) struct Mounted {
    directory: TempDir,
}

impl Mounted {
    pub(crate) fn new(kind: &str, node: &Path) -> Result<Self> {
        LoopDevice::mkfs_on(node, kind)?;
        let directory = tempfile::tempdir()?;
        run("mount", [node, directory.path()])?;
        Ok(Self { directory })
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = blksnap_tests::unmount(self.directory.path()) {
            complain(format_args!("{error:#}"));
        }
    }
}

/// A filter with a journal and a place for old data of its own.
pub(crate) struct Scene {
    pub(crate) dm: Dm,
    pub(crate) storage: PathBuf,
    pub(crate) journal: PathBuf,
    _directory: TempDir,
    _disk: LoopDevice,
}

impl Scene {
    pub(crate) fn new() -> Result<Self> {
        lab::inside()?;
        lab::target("snapshot", "dm_snapshot")?;
        let mut disk = LoopDevice::new(256 * MIB)?;
        disk.mkfs("ext4")?;
        let storage = disk.mount()?;
        let directory = tempfile::tempdir()?;
        let journal = directory.path().join("dm");
        Ok(Self {
            dm: Dm::open(options(&journal)?)?,
            storage,
            journal,
            _directory: directory,
            _disk: disk,
        })
    }

    /// The origins, with their old data in the scene's place.
    pub(crate) fn origins(&self, nodes: &[&Path], bytes: u64) -> Result<Vec<Origin>> {
        let origin = |node: &&Path| {
            Ok(Origin {
                device: BlockDevice::open(node)?,
                place: Place::Directory(self.storage.clone()),
                bytes,
            })
        };
        nodes.iter().map(origin).collect()
    }

    /// Takes `nodes`, and what their bytes were at the instant: those of the real devices, read while nothing passed.
    pub(crate) fn take(&self, nodes: &[&Path], bytes: u64) -> Result<(SnapshotId, Taken, Vec<Vec<u8>>)> {
        let origins = self.origins(nodes, bytes)?;
        let snapshot = snapshot();
        let mut witness = Witness::new(&origins)?;
        let taken = self.dm.take(snapshot, &origins, &mut witness)?;
        for image in &taken.images {
            ensure!(self.dm.check(snapshot, image) == Condition::Whole);
        }
        Ok((snapshot, taken, witness.bytes))
    }
}

pub(crate) fn options(journal: &Path) -> Result<DmOptions> {
    let mut options = DmOptions::new(journal.to_owned());
    options.watchdog = watchdog()?;
    options.limit = LIMIT;
    Ok(options)
}

pub(crate) fn snapshot() -> SnapshotId {
    SnapshotId::new(uuid::Uuid::new_v4())
}

fn watchdog() -> Result<WatchdogCommand> {
    Ok(WatchdogCommand {
        program: agent_binary()?,
        arguments: vec![SUBCOMMAND.into()],
    })
}

/// Freezes file systems, and reads the real devices at the instant.
pub(crate) struct Witness {
    freezer: Freezer,
    origins: Vec<BlockDevice>,
    pub(crate) bytes: Vec<Vec<u8>>,
}

impl Witness {
    pub(crate) fn new(origins: &[Origin]) -> Result<Self> {
        let devices: Vec<&BlockDevice> = origins.iter().map(|origin| &origin.device).collect();
        let mut freezer = Freezer::new(FileSystems::on(&devices)?, watchdog()?);
        freezer.arm()?;
        Ok(Self {
            freezer,
            origins: devices.into_iter().cloned().collect(),
            bytes: Vec::new(),
        })
    }
}

impl Instants for Witness {
    fn before(&mut self) -> Result<(), DmError> {
        self.freezer.file_systems().sync()?;
        Ok(self.freezer.freeze(LIMIT)?)
    }

    fn at(&mut self) -> Result<(), DmError> {
        for origin in &self.origins {
            let node = real(origin).map_err(|error| DmError::Instant(format!("{error:#}")))?;
            let bytes = read_device(&node).map_err(|error| DmError::Instant(format!("{error:#}")))?;
            self.bytes.push(bytes);
        }
        Ok(())
    }

    fn after(&mut self) -> Result<(), DmError> {
        self.freezer.thaw()?;
        Ok(())
    }
}

/// Node of the real device of an origin.
fn real(origin: &BlockDevice) -> Result<PathBuf> {
    let mut mapper = Mapper::open()?;
    mapper.view(&[])?;
    let number = mapper.number(Node::Real(origin.id)).context("a real device")?;
    Ok(PathBuf::from(format!("/dev/dm-{}", number.minor)))
}

/// Whether an image is what its origin was.
pub(crate) fn same(image: &DmImage, bytes: &[u8]) -> Result<()> {
    let now = read_device(&image.node())?;
    ensure!(
        now.len() == bytes.len(),
        "{} bytes, not {}",
        now.len(),
        bytes.len()
    );
    let wrong = now
        .chunks(512)
        .zip(bytes.chunks(512))
        .filter(|(one, other)| one != other);
    let wrong = wrong.count();
    ensure!(wrong == 0, "{wrong} sectors of the image are not what they were");
    Ok(())
}

/// Nothing of any snapshot is left, and the table is `table`.
pub(crate) fn assert_restored(scene: &Scene, nodes: &[&Path], tables: &[String]) -> Result<()> {
    let left = ours()?;
    ensure!(left.is_empty(), "{left:?} are left");
    for (node, before) in nodes.iter().zip(tables) {
        let now = table(node)?;
        ensure!(now == *before, "{}: {now:?}, not {before:?}", node.display());
    }
    let files: Vec<_> = fs::read_dir(&scene.storage)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("blksnap-"))
        .collect();
    ensure!(files.is_empty(), "{files:?} are left");
    ensure!(
        fs::read_dir(&scene.journal)?.count() == 0,
        "the journal is not empty"
    );
    Ok(())
}

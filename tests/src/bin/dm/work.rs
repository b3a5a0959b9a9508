//! Work: takes, reads and releases snapshots until it is killed; before that it looks at what the one before it left.
//!
//! The sums of an image are those of the real device, read while its origin was suspended, and are in a file before the
//! take is finished. What it does is printed, a word each: `recover`, `ready`, `take`, `read`, `release`.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hasher as _};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use blksnap_agent::disk::BlockDevice;
use blksnap_agent::filter::dm::table::Node;
use blksnap_agent::filter::dm::{Condition, Dm, DmError, DmImage, Instants, Mapper, Origin};
use blksnap_agent::units::SnapshotId;
use blksnap_tests::read_device;
use rand::Rng as _;

/// Snapshots that are held at the same time.
const HELD: usize = 3;

/// What it works with.
pub(crate) struct Work {
    pub(crate) dm: Dm,
    pub(crate) origins: Vec<Origin>,
    /// Directory of the files with sums.
    pub(crate) sums: PathBuf,
}

fn say(word: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{word}")?;
    Ok(out.flush()?)
}

/// The sum of a device's bytes; the same in every process.
fn sum(node: &Path) -> Result<u64> {
    let mut hasher = DefaultHasher::new();
    hasher.write(&read_device(node)?);
    Ok(hasher.finish())
}

/// Writes down what the real devices are at the instant.
struct Sums<'a> {
    origins: &'a [Origin],
    file: PathBuf,
}

impl Instants for Sums<'_> {
    fn before(&mut self) -> Result<(), DmError> {
        Ok(())
    }

    fn at(&mut self) -> Result<(), DmError> {
        let write = || -> Result<()> {
            let mut mapper = Mapper::open()?;
            mapper.view(&[])?;
            let mut text = String::new();
            for origin in self.origins {
                let real = mapper
                    .number(Node::Real(origin.device.id))
                    .context("a real device")?;
                let node = format!("/dev/dm-{}", real.minor);
                text += &format!("{} {}\n", origin.device.id, sum(Path::new(&node))?);
            }
            Ok(fs::write(&self.file, text)?)
        };
        write().map_err(|error| DmError::Instant(format!("{error:#}")))
    }

    fn after(&mut self) -> Result<(), DmError> {
        Ok(())
    }
}

impl Work {
    /// Looks at what was left, and ends, or goes on until somebody kills it.
    pub(crate) fn run(&self, once: bool) -> Result<()> {
        say("recover")?;
        let found = self.dm.recover(true)?;
        ensure!(found.lost.is_empty(), "lost: {:?}", found.lost);
        let mut held = found.held;
        for (id, images) in &held {
            self.read(*id, images)?;
        }
        say(&format!("found {}", held.len()))?;
        if once {
            for id in held.into_keys() {
                self.dm.release(id)?;
            }
            return Ok(());
        }
        say("ready")?;
        let mut random = rand::rng();
        loop {
            if held.len() < HELD && (held.is_empty() || random.random_bool(0.5)) {
                let (id, images) = self.take()?;
                held.insert(id, images);
            }
            let at = random.random_range(0..held.len());
            let (id, images) = held.iter().nth(at).context("one is held")?;
            self.read(*id, images)?;
            if random.random_bool(0.4) {
                let id = *id;
                say("release")?;
                self.dm.release(id)?;
                held.remove(&id);
            }
        }
    }

    fn take(&self) -> Result<(SnapshotId, Vec<DmImage>)> {
        say("take")?;
        let id = SnapshotId::new(uuid::Uuid::new_v4());
        let mut sums = Sums {
            origins: &self.origins,
            file: self.sums.join(id.to_string()),
        };
        Ok((id, self.dm.take(id, &self.origins, &mut sums)?.images))
    }

    /// Every byte is what it was.
    fn read(&self, id: SnapshotId, images: &[DmImage]) -> Result<()> {
        say("read")?;
        let text = fs::read_to_string(self.sums.join(id.to_string())).context("the sums of an image")?;
        let sums: BTreeMap<&str, &str> = text.lines().filter_map(|line| line.split_once(' ')).collect();
        ensure!(sums.len() == images.len(), "{id}: {} images", images.len());
        for image in images {
            let now = sum(&image.node())?;
            ensure!(
                self.dm.check(id, image) == Condition::Whole,
                "{id}: the image is lost"
            );
            let origin = image.origin.to_string();
            let before = sums.get(origin.as_str()).copied();
            ensure!(
                before == Some(now.to_string().as_str()),
                "{id}: the image of {origin} is not what it was"
            );
        }
        Ok(())
    }
}

/// The devices, each with a place in `storage`.
pub(crate) fn origins(devices: &[PathBuf], storage: &Path) -> Result<Vec<Origin>> {
    let origin = |device: &PathBuf| {
        Ok(Origin {
            device: BlockDevice::open(device)?,
            place: blksnap_agent::filter::dm::Place::Directory(storage.to_owned()),
            bytes: 16 << 20,
        })
    };
    devices.iter().map(origin).collect()
}

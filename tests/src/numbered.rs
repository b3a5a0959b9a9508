//! Numbered writes: steps that depend on each other, so that what a disk held at an instant can be judged.
//!
//! A [`Sequence`] is an endless row of writes to several disks, made from a seed. [`Numbered`] sends them over NBD,
//! each one after the one before was answered, whichever disk that went to. So what the disks hold at one instant is
//! what the first steps of the row leave, up to some step, and nothing of a later one: [`Sequence::judge`] finds that
//! step from the bytes alone.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use crate::nbd::{Client, Framing, Request, cmd, flag};

/// Bytes of a sector, the unit of the steps.
const SECTOR: usize = 512;
/// How many steps may leave no trace, one after the other.
const AHEAD: u32 = 64;

/// Steps of one seed, on a range of sectors that is the same on each disk.
#[derive(Clone, Copy, Debug)]
pub struct Sequence {
    /// What it is made from.
    pub seed: u64,
    /// How many disks there are.
    pub disks: usize,
    /// First sector of the range.
    pub first: u64,
    /// Sectors of the range; more than 256.
    pub count: u64,
}

/// What a step does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Write,
    Zero,
    Trim,
}

#[derive(Clone, Copy, Debug)]
struct Step {
    number: u64,
    disk: usize,
    /// Within the range.
    sector: u64,
    sectors: u64,
    kind: Kind,
    flags: u16,
}

/// A range of steps; the disks are as any step of it left them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instant {
    /// The first of them.
    pub earliest: u64,
    /// The last of them.
    pub latest: u64,
}

/// Well-spread bits of a number.
const fn mix(number: u64) -> u64 {
    // The finalizer of splitmix64.
    let mut bits = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

impl Sequence {
    fn step(&self, number: u64) -> Step {
        let mut bits = mix(self.seed ^ mix(number));
        let mut draw = |most: u64| {
            bits = mix(bits);
            bits % most
        };
        let sectors = match draw(16) {
            0 => 1,
            1 => 1 + draw(16),
            2 => 64,
            3 => 1 + draw(256),
            _ => 8,
        };
        Step {
            number,
            disk: usize::try_from(draw(self.disks as u64)).unwrap_or_default(),
            sector: draw(self.count - sectors + 1),
            sectors,
            kind: match draw(12) {
                0 => Kind::Zero,
                1 => Kind::Trim,
                _ => Kind::Write,
            },
            flags: if draw(32) == 0 { flag::FUA } else { 0 },
        }
    }

    /// What a sector holds after a step wrote it; sector 0 is the first of the range.
    fn sector(&self, number: u64, sector: u64) -> [u8; SECTOR] {
        let mut bytes = [0; SECTOR];
        if number == 0 {
            return bytes;
        }
        let salt = mix(self.seed ^ number.rotate_left(32) ^ sector);
        for (at, word) in bytes.chunks_exact_mut(8).enumerate() {
            let value = if at == 0 { number } else { salt ^ at as u64 };
            word.copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    fn data(&self, step: &Step) -> Vec<u8> {
        let number = match step.kind {
            Kind::Write => step.number,
            Kind::Zero | Kind::Trim => 0,
        };
        (0..step.sectors)
            .flat_map(|at| self.sector(number, step.sector + at))
            .collect()
    }

    fn offset(&self, step: &Step) -> u64 {
        (self.first + step.sector) * SECTOR as u64
    }

    /// Does the first steps directly on the files of the disks.
    ///
    /// # Errors
    /// A file can't be written.
    pub fn fill(&self, files: &[PathBuf], steps: u64) -> Result<()> {
        let files: Vec<File> = files
            .iter()
            .map(|path| File::options().write(true).open(path))
            .collect::<Result<_, _>>()?;
        for number in 1..=steps {
            let step = self.step(number);
            files[step.disk].write_all_at(&self.data(&step), self.offset(&step))?;
        }
        Ok(())
    }

    /// Finds the instant at which the disks held this; `None` for a disk that is not looked at. With `torn` the step
    /// after it may have been done in part.
    ///
    /// # Errors
    /// There is no such instant: a step is there without one before it, or something else is.
    pub fn judge(&self, disks: &[Option<&[u8]>], torn: bool) -> Result<Instant> {
        ensure!(disks.len() == self.disks, "{} disks", disks.len());
        let found = disks
            .iter()
            .enumerate()
            .map(|(disk, bytes)| bytes.map(|bytes| self.numbers(disk, bytes)).transpose())
            .collect::<Result<Vec<_>>>()?;
        let newest = found
            .iter()
            .flatten()
            .flatten()
            .max()
            .copied()
            .unwrap_or_default();
        let mut model = vec![vec![0; usize::try_from(self.count)?]; self.disks];
        let mut differences = Vec::new();
        for number in 1..=newest {
            if number == newest && torn {
                differences = different(&model, &found);
            }
            self.apply(&mut model, number);
        }
        let covers = |number: u64, places: &[(usize, usize)]| {
            let step = self.step(number);
            let range = step.sector..step.sector + step.sectors;
            let inside = |place: &(usize, usize)| place.0 == step.disk && range.contains(&(place.1 as u64));
            places.iter().all(inside)
        };
        // Zeroes and steps to disks that nobody looks at do not show who made them, nor does a write that zeroes are
        // behind of.
        let mut earliest = None;
        let mut partly = None;
        let mut number = newest;
        for _ in 0..AHEAD {
            let now = different(&model, &found);
            if now.is_empty() {
                earliest = Some(number);
                break;
            }
            let next = self.step(number + 1);
            if next.kind != Kind::Write && covers(number + 1, &now) {
                let is_zero = |(disk, sector): &(usize, usize)| {
                    found[*disk].as_ref().is_some_and(|numbers| numbers[*sector] == 0)
                };
                if now.iter().all(is_zero) {
                    partly = Some(number);
                }
            }
            number += 1;
            self.apply(&mut model, number);
        }
        let Some(earliest) = earliest else {
            let last = newest.saturating_sub(1);
            let torn_write = (newest > 0 && covers(newest, &differences)).then_some(last);
            return match partly.or(torn_write).filter(|_| torn) {
                Some(number) => Ok(Instant {
                    earliest: number,
                    latest: number,
                }),
                None => Err(self.complaint(newest, &found)),
            };
        };
        let mut latest = earliest;
        for _ in 0..AHEAD {
            self.apply(&mut model, latest + 1);
            if !different(&model, &found).is_empty() {
                break;
            }
            latest += 1;
        }
        Ok(Instant { earliest, latest })
    }

    /// The steps that wrote the sectors of a disk.
    fn numbers(&self, disk: usize, bytes: &[u8]) -> Result<Vec<u64>> {
        let first = usize::try_from(self.first)? * SECTOR;
        let range = bytes
            .get(first..first + usize::try_from(self.count)? * SECTOR)
            .with_context(|| format!("disk {disk} has {} bytes", bytes.len()))?;
        range
            .chunks_exact(SECTOR)
            .enumerate()
            .map(|(at, sector)| {
                let number = u64::from_le_bytes(sector[..8].try_into()?);
                ensure!(
                    sector == self.sector(number, at as u64),
                    "disk {disk}, sector {}: not what step {number} wrote",
                    self.first + at as u64
                );
                Ok(number)
            })
            .collect()
    }

    fn apply(&self, model: &mut [Vec<u64>], number: u64) {
        let step = self.step(number);
        let value = if step.kind == Kind::Write { number } else { 0 };
        let range = (step.sector..step.sector + step.sectors).filter_map(|at| usize::try_from(at).ok());
        range.for_each(|at| model[step.disk][at] = value);
    }

    fn complaint(&self, newest: u64, found: &[Option<Vec<u64>>]) -> anyhow::Error {
        let mut model = vec![vec![0; usize::try_from(self.count).unwrap_or_default()]; self.disks];
        (1..=newest).for_each(|number| self.apply(&mut model, number));
        let places = different(&model, found);
        let some: Vec<String> = places
            .iter()
            .take(8)
            .map(|(disk, sector)| {
                let there = found[*disk].as_ref().map_or(0, |numbers| numbers[*sector]);
                let due = model[*disk][*sector];
                format!("disk {disk} sector {sector}: step {there} instead of {due}")
            })
            .collect();
        anyhow!(
            "no instant: step {newest} is there, and {} sectors are not as it found them: {}",
            places.len(),
            some.join(", ")
        )
    }
}

/// Where the disks that were looked at are not as the model has it.
fn different(model: &[Vec<u64>], found: &[Option<Vec<u64>>]) -> Vec<(usize, usize)> {
    let disks = model.iter().zip(found).enumerate();
    disks
        .filter_map(|(disk, (model, found))| Some((disk, model, found.as_ref()?)))
        .flat_map(|(disk, model, found)| {
            let sectors = model.iter().zip(found).enumerate();
            sectors
                .filter(|(_, (due, there))| due != there)
                .map(move |(sector, _)| (disk, sector))
        })
        .collect()
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    sent: AtomicU64,
    answered: AtomicU64,
    reconnected: AtomicU64,
}

/// Who sends the steps.
#[derive(Debug)]
pub struct Numbered {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Numbered {
    /// Sends the steps behind `done` to these exports, one for each disk. One that is `patient` connects again and
    /// goes on when the server is gone; another fails then.
    #[must_use]
    pub fn start(
        socket: PathBuf,
        exports: Vec<String>,
        sequence: Sequence,
        done: u64,
        patient: bool,
    ) -> Self {
        let shared = Arc::new(Shared::default());
        shared.sent.store(done, Ordering::SeqCst);
        shared.answered.store(done, Ordering::SeqCst);
        let work = Work {
            socket,
            exports,
            sequence,
            patient,
            shared: Arc::clone(&shared),
        };
        Self {
            shared,
            thread: Some(std::thread::spawn(move || work.run())),
        }
    }

    /// The last step that was answered.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.shared.answered.load(Ordering::SeqCst)
    }

    /// The last step that was sent.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::SeqCst)
    }

    /// How often it had to connect again.
    #[must_use]
    pub fn reconnected(&self) -> u64 {
        self.shared.reconnected.load(Ordering::SeqCst)
    }

    /// Waits for this many steps more.
    ///
    /// # Errors
    /// The writer failed, or there is no progress for two minutes.
    pub fn wait_for(&mut self, more: u64) -> Result<()> {
        let (begun, due) = (std::time::Instant::now(), self.answered() + more);
        while self.answered() < due {
            if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
                self.stop()?;
                bail!("the writer has ended");
            }
            ensure!(begun.elapsed() < Duration::from_secs(120), "the writer is stuck");
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Ends after the step under way and gives the number of the last one answered.
    ///
    /// # Errors
    /// The writer failed.
    pub fn stop(&mut self) -> Result<u64> {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().map_err(|_| anyhow!("the writer panicked"))??;
        }
        Ok(self.answered())
    }
}

impl Drop for Numbered {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            // A test that fails has said so already.
            let _ = thread.join();
        }
    }
}

struct Work {
    socket: PathBuf,
    exports: Vec<String>,
    sequence: Sequence,
    patient: bool,
    shared: Arc<Shared>,
}

impl Work {
    fn stopped(&self) -> bool {
        self.shared.stop.load(Ordering::SeqCst)
    }

    fn connect(&self) -> Result<Vec<Client>> {
        let exports = self.exports.iter();
        exports
            .map(|export| Client::connect(&self.socket, export, Framing::Structured, &[]))
            .collect()
    }

    fn run(&self) -> Result<()> {
        let mut clients = Vec::new();
        let mut number = self.shared.answered.load(Ordering::SeqCst) + 1;
        while !self.stopped() {
            match self.attempt(&mut clients, number) {
                Ok(()) => {
                    self.shared.answered.store(number, Ordering::SeqCst);
                    number += 1;
                }
                Err(error) if !self.patient => return Err(error),
                Err(_) => {
                    clients.clear();
                    self.shared.reconnected.fetch_add(1, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_millis(3));
                }
            }
        }
        Ok(())
    }

    fn attempt(&self, clients: &mut Vec<Client>, number: u64) -> Result<()> {
        if clients.is_empty() {
            *clients = self.connect()?;
        }
        let step = self.sequence.step(number);
        let offset = self.sequence.offset(&step);
        let length = step.sectors * SECTOR as u64;
        let request = match step.kind {
            Kind::Write => Request::write(offset, self.sequence.data(&step)),
            Kind::Zero => Request::new(cmd::WRITE_ZEROES, offset, length),
            Kind::Trim => Request::new(cmd::TRIM, offset, length),
        };
        self.shared.sent.store(number, Ordering::SeqCst);
        let answer = clients[step.disk].ask(request.with(step.flags))?;
        ensure!(
            answer.error == 0,
            "step {number} at {offset}: {}: {}",
            answer.error,
            answer.message
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEQUENCE: Sequence = Sequence {
        seed: 5,
        disks: 2,
        first: 16,
        count: 2048,
    };

    /// The disks after so many steps.
    fn after(steps: impl Iterator<Item = u64>) -> Vec<Vec<u8>> {
        let mut disks = vec![vec![0; (16 + 2048) * SECTOR]; 2];
        for number in steps {
            let step = SEQUENCE.step(number);
            let at = usize::try_from(SEQUENCE.offset(&step)).unwrap();
            let data = SEQUENCE.data(&step);
            disks[step.disk][at..at + data.len()].copy_from_slice(&data);
        }
        disks
    }

    fn judge(disks: &[Vec<u8>], torn: bool) -> Result<Instant> {
        let disks: Vec<_> = disks.iter().map(|disk| Some(disk.as_slice())).collect();
        SEQUENCE.judge(&disks, torn)
    }

    #[test]
    fn each_instant_is_found() {
        for steps in [0, 1, 2, 7, 100, 500, 777] {
            let instant = judge(&after(1..=steps), false).unwrap();
            assert!(
                (instant.earliest..=instant.latest).contains(&steps),
                "{steps}: {instant:?}"
            );
        }
    }

    #[test]
    fn a_step_without_those_before_it_is_no_instant() {
        let (mut told, mut shown) = (0, 0);
        for left_out in 130..150 {
            let disks = after((1..=150).filter(|number| *number != left_out));
            if disks != after(1..=150) {
                shown += 1;
                told += u32::from(judge(&disks, false).is_err());
            }
        }
        // Zeroes that are left out just before the end may look like an earlier instant.
        assert!(shown > 10 && told + 2 >= shown, "{told} of {shown}");
    }

    #[test]
    fn zeroes_that_were_done_are_counted() {
        let zeroes = (100..200).filter(|number| SEQUENCE.step(*number).kind != Kind::Write);
        for number in zeroes {
            let disks = after(1..=number);
            assert!(judge(&disks, true).unwrap().latest >= number);
        }
    }

    #[test]
    fn a_torn_step_is_the_last_one_or_none() {
        let number = (500..600)
            .find(|number| {
                let step = SEQUENCE.step(*number);
                step.kind == Kind::Write && step.sectors > 2
            })
            .unwrap();
        let step = SEQUENCE.step(number);
        let mut disks = after(1..number);
        let at = usize::try_from(SEQUENCE.offset(&step)).unwrap();
        disks[step.disk][at..at + SECTOR].copy_from_slice(&SEQUENCE.sector(number, step.sector));
        assert!(judge(&disks, false).is_err());
        assert_eq!(judge(&disks, true).unwrap().latest, number - 1);
        // One byte that nobody wrote.
        disks[0][20 * SECTOR + 100] ^= 1;
        assert!(judge(&disks, true).is_err());
    }
}

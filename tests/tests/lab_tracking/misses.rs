//! Misses: a kernel that may preempt a program anywhere may also skip one that another task on the same processor is in
//! the middle of. Either nothing is missed, or the generation ends and says so.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::thread;

use anyhow::{Result, ensure};
use blksnap_agent::cbt::ResetReason;
use blksnap_agent::sys::AlignedBuffer;
use blksnap_tests::{Zram, lab, seed};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::{KIB, MIB, subject};

/// Writers at a time: many more than processors.
const WRITERS: u64 = 12;
/// Writes of each in a round.
const WRITES: u32 = 1500;
/// Rounds.
const ROUNDS: u64 = 4;

#[test]
#[ignore = "needs a kernel that preempts: cargo xtask test --vm 7.2+full"]
fn writers_that_preempt_each_other() -> Result<()> {
    lab::inside()?;
    let seed = seed("writers_that_preempt_each_other");
    // Its driver works on the bio at once, on the processor of the writer: nothing else takes time.
    let disk = match Zram::new(64 * MIB) {
        Ok(disk) => disk,
        Err(error) => return lab::absent(format_args!("zram ({error:#})")),
    };
    let path = disk.path();
    let (mut missed, mut changed) = (0, 0);
    for round in 0..ROUNDS {
        let mut subject = subject(&[&path])?;
        let outcome = subject.observe(|| {
            thread::scope(|scope| {
                let writers: Vec<_> = (0..WRITERS)
                    .map(|writer| {
                        let path = &path;
                        scope.spawn(move || -> Result<()> {
                            let mut random = StdRng::seed_from_u64(seed ^ (round << 32) ^ (writer << 56));
                            let file = OpenOptions::new()
                                .write(true)
                                .custom_flags(libc::O_DIRECT)
                                .open(path)?;
                            let mut buffer = AlignedBuffer::zeroed(4096);
                            for _ in 0..WRITES {
                                random.fill(&mut buffer.as_mut_slice()[..64]);
                                let block = random.random_range(0..16 * KIB / 2) * 2;
                                file.write_all_at(&buffer.as_slice()[..4096], block * 4096)?;
                            }
                            Ok(())
                        })
                    })
                    .collect();
                writers
                    .into_iter()
                    .try_for_each(|writer| writer.join().expect("a writer panicked"))
            })
        });
        let doubt = subject.devices().find_map(|device| device.check_doubt());
        match outcome {
            Ok((_, seen)) => changed += seen[0].changed.len(),
            // What may have been missed is said.
            Err(_) if doubt == Some(ResetReason::RunMissed) => missed += 1,
            Err(error) => return Err(error),
        }
    }
    println!("{ROUNDS} rounds, in {missed} the kernel skipped programs; {changed} sectors changed");
    ensure!(missed > 0 || changed > 1000, "nothing was written");
    Ok(())
}

//! Suite: what every disk must do, with plain memory as the oracle.

use crate::choices::{Choices, Seeded};
use crate::disk::{Disk, Zero};

/// Largest part of a disk that is used.
const MOST: u64 = 4 << 20;

/// Does `steps` random operations on the beginning of a disk, which has to be zeroes, and compares with memory.
///
/// # Panics
/// The disk does not do what the contract says.
pub fn conforms(disk: &dyn Disk, seed: u64, steps: usize) {
    println!("{}: seed {seed}", disk.name());
    let size = disk.size().min(MOST);
    let mut model = vec![0_u8; usize::try_from(size).expect("at most 4 MiB")];
    let mut dice = Seeded::new(seed);
    assert!(disk.logical_block() >= 512 && disk.logical_block().is_power_of_two());
    assert!(disk.minimum_io() >= disk.logical_block() && disk.minimum_io().is_power_of_two());
    for step in 0..steps {
        let (offset, length) = range(&mut dice, size);
        let start = usize::try_from(offset).expect("within memory");
        let range = start..start + usize::try_from(length).expect("within memory");
        match dice.below(10) {
            0..=3 => {
                let value = u8::try_from(dice.of(1..256)).unwrap_or(1);
                let data = vec![value; range.len()];
                disk.write_at(&data, offset)
                    .unwrap_or_else(|error| panic!("seed {seed}, step {step}: write at {offset}: {error}"));
                model[range].fill(value);
            }
            4..=6 => {
                let zero = [Zero::Deallocate, Zero::Keep][dice.index(2)];
                let fast = dice.once_in(2);
                match disk.zero_at(offset, length, zero, fast) {
                    Ok(()) => model[range].fill(0),
                    Err(error) => assert!(
                        fast && error.raw_os_error() == Some(libc::EOPNOTSUPP),
                        "seed {seed}, step {step}: zero {length} at {offset}: {error}"
                    ),
                }
            }
            7 => {
                disk.discard_at(offset, length)
                    .unwrap_or_else(|error| panic!("seed {seed}, step {step}: discard at {offset}: {error}"));
                // Anything is right.
                disk.read_at(&mut model[range], offset)
                    .unwrap_or_else(|error| panic!("seed {seed}, step {step}: read at {offset}: {error}"));
            }
            8 => disk.flush().expect("flush"),
            _ => look(disk, &model, offset, length),
        }
        let mut found = vec![0xee; model.len()];
        disk.read_at(&mut found, 0).expect("read it all");
        assert!(found == model, "seed {seed}, step {step}: it differs from memory");
    }
    look(disk, &model, 0, size);
    refuse(disk);
}

/// Any range, or one of whole blocks.
fn range(dice: &mut impl Choices, size: u64) -> (u64, u64) {
    let block = [1, 512, 4096][dice.index(3)];
    let blocks = size / block;
    let first = dice.below(blocks + 1);
    let most = [4, 300, blocks][dice.index(3)];
    let count = dice.below((blocks - first).min(most) + 1);
    (first * block, count * block)
}

/// What is told of a range is right, and at most what was asked for.
fn look(disk: &dyn Disk, model: &[u8], offset: u64, length: u64) {
    if length == 0 {
        return;
    }
    for most in [1, 3, usize::MAX] {
        let pieces = disk.allocation(offset, length, most).expect("allocation");
        assert!(!pieces.is_empty() && pieces.len() <= most);
        let mut at = usize::try_from(offset).expect("within memory");
        for piece in pieces {
            assert!(piece.length > 0);
            let end = at + usize::try_from(piece.length).expect("within memory");
            assert!(
                end as u64 <= offset + length,
                "the pieces are longer than the range"
            );
            assert!(
                !piece.hole || model[at..end].iter().all(|byte| *byte == 0),
                "a hole has bytes"
            );
            at = end;
        }
    }
}

/// Ranges past the end are errors.
fn refuse(disk: &dyn Disk) {
    let mut bytes = [0; 1024];
    for offset in [disk.size() - 512, disk.size(), u64::MAX - 512] {
        assert!(disk.read_at(&mut bytes, offset).is_err(), "read at {offset}");
        assert!(disk.write_at(&bytes, offset).is_err(), "write at {offset}");
        assert!(
            disk.zero_at(offset, 1024, Zero::Keep, false).is_err(),
            "zero at {offset}"
        );
        assert!(
            disk.zero_at(offset, 1024, Zero::Deallocate, false).is_err(),
            "zero at {offset}"
        );
        assert!(disk.discard_at(offset, 1024).is_err(), "discard at {offset}");
        assert!(
            disk.allocation(offset, 1024, 9).is_err(),
            "allocation at {offset}"
        );
    }
}

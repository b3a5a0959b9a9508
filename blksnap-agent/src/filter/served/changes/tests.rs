//! Tests of change maps that outlive the agent: dropping one is a kill, as nothing is written when it goes.

use super::*;
use crate::cbt::Base;
use crate::units::Extent;

const BLOCK: u64 = 65536;

fn capacity() -> Sectors {
    Sectors::new(100 * BLOCK / 512 - 3)
}

fn begin(directory: &Path) -> Changes {
    let size = BlockSize::from_bytes(BLOCK).unwrap();
    Changes::begin(Some(directory), size, capacity(), ResetReason::NewAttach).unwrap()
}

fn resume(directory: &Path) -> Changes {
    Changes::resume(directory, capacity()).unwrap().unwrap()
}

/// First blocks of what changed since a take, the open period included.
fn since(changes: &Changes, base: &Base) -> Vec<u64> {
    let extents: Vec<Extent> = changes.live().unwrap().changed_since(base).unwrap().collect();
    extents.iter().map(|extent| extent.offset / BLOCK).collect()
}

fn base(taken: &Taken) -> Base {
    Base {
        generation: taken.generation,
        number: taken.number,
    }
}

#[test]
fn marks_outlive_a_kill_at_any_moment_around_a_take() {
    let directory = tempfile::tempdir().unwrap();
    let changes = begin(directory.path());
    changes.mark(BLOCK - 1, 2);
    let first = changes.take().unwrap();
    // Killed before the take is saved.
    changes.mark(5 * BLOCK, 1);
    drop(changes);
    let changes = resume(directory.path());
    assert_eq!(since(&changes, &base(&first)), [5]);
    changes.mark(9 * BLOCK, BLOCK);
    drop(changes);
    let changes = resume(directory.path());
    assert_eq!(since(&changes, &base(&first)), [5, 9]);
    let second = changes.take().unwrap();
    changes.save().unwrap();
    changes.mark(capacity().bytes() - 1, 1);
    changes.mark_both(20 * BLOCK, 1);
    drop(changes);
    let changes = resume(directory.path());
    assert_eq!(since(&changes, &base(&second)), [20, 99]);
    let last = changes.frozen().unwrap();
    let last: Vec<u64> = last
        .changed_in_last()
        .unwrap()
        .map(|extent| extent.offset / BLOCK)
        .collect();
    assert_eq!(last, [5, 9, 20]);
}

#[test]
fn a_wrap_that_was_not_saved_is_no_older_generation() {
    let directory = tempfile::tempdir().unwrap();
    let changes = begin(directory.path());
    let generation = changes.info().generation;
    while changes.active() < u8::MAX {
        changes.take().unwrap();
        changes.save().unwrap();
    }
    let wrapped = changes.take().unwrap();
    assert_ne!(wrapped.generation, generation);
    changes.mark(0, 1);
    drop(changes);
    Changes::resume(directory.path(), capacity()).unwrap_err();
}

#[test]
fn marks_that_are_gone_or_damaged_are_no_map() {
    let directory = tempfile::tempdir().unwrap();
    let changes = begin(directory.path());
    let period = period_path(directory.path(), changes.info().generation, changes.active());
    drop(changes);
    assert!(
        Changes::resume(directory.path(), Sectors::new(8))
            .unwrap()
            .is_none()
    );
    fs::write(&period, [3; 100]).unwrap();
    Changes::resume(directory.path(), capacity()).unwrap_err();
    fs::remove_file(&period).unwrap();
    Changes::resume(directory.path(), capacity()).unwrap_err();
    fs::remove_file(directory.path().join("map")).unwrap();
    assert!(Changes::resume(directory.path(), capacity()).unwrap().is_none());
}

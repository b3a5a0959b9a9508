//! Task: what goes on at once with others, in steps; and reads of images.

use std::collections::{HashMap, HashSet};

use super::{SECTOR, SMALL, Token, World, sectors};
use crate::choices::Choices;
use crate::cow::{BufferId, ChunkRange, Job, Piece, Place, SnapshotKey};

/// A task in steps.
pub(super) enum Task {
    Write {
        parts: Vec<ChunkRange>,
        token: Token,
        step: WriteStep,
    },
    Read {
        snapshot: SnapshotKey,
        offset: u64,
        pieces: Vec<Piece>,
        next: usize,
        looked_again: bool,
        got: Vec<Token>,
        allowed: Vec<HashSet<Token>>,
    },
    ImageWrite {
        snapshot: SnapshotKey,
        parts: Vec<ChunkRange>,
        token: Token,
        step: WriteStep,
    },
    Store {
        snapshot: SnapshotKey,
        chunk: u64,
        buffer: BufferId,
        job: Option<Job>,
    },
}

pub(super) enum WriteStep {
    Ask,
    /// Old data was not read yet.
    Read(Job),
    /// It was, and goes to its places.
    Keep(Job, HashMap<u64, Token>),
    /// Sectors that are still to be written.
    Land(Option<Job>, Vec<u64>),
}

/// Lets `task`, if it is a read, see what `other` writes, if it writes to the same image.
pub(super) fn allow(task: &mut Task, other: &Task) {
    let Task::Read {
        snapshot,
        offset,
        allowed,
        ..
    } = task
    else {
        return;
    };
    if let Task::ImageWrite {
        snapshot: written,
        parts,
        token,
        ..
    } = other
        && written == snapshot
    {
        let first = usize::try_from(*offset / SECTOR).expect(SMALL);
        for at in parts.iter().flat_map(|part| sectors(part.offset, part.length)) {
            if let Some(allowed) = at.checked_sub(first).and_then(|n| allowed.get_mut(n)) {
                allowed.insert(*token);
            }
        }
    }
}

impl<C: Choices> World<C> {
    pub(super) fn advance_read(&mut self, task: Task) -> Option<Task> {
        let Task::Read {
            snapshot,
            offset,
            mut pieces,
            next,
            looked_again,
            mut got,
            allowed,
        } = task
        else {
            unreachable!("the other tasks have their own steps");
        };
        if let Some(piece) = pieces.get(next).copied() {
            let known = self.snapshots.get(&snapshot);
            for (n, at) in sectors(piece.range.offset, piece.range.length).enumerate() {
                let n = n as u64;
                let value = match piece.place {
                    Place::Origin => self.origin[at],
                    Place::Memory { buffer, .. } => {
                        self.seen.from_memory += 1;
                        self.buffers[&buffer][&(at as u64)]
                    }
                    // A snapshot that was destroyed meanwhile: the read fails below.
                    Place::Storage { region, offset } => known
                        .and_then(|known| known.storage.get(&(region, offset / SECTOR + n)))
                        .copied()
                        .unwrap_or(Token::MAX),
                };
                got[at - usize::try_from(offset / SECTOR).expect(SMALL)] = value;
            }
            return Some(Task::Read {
                snapshot,
                offset,
                pieces,
                next: next + 1,
                looked_again,
                got,
                allowed,
            });
        }
        // Destroyed or broken: the read is an error.
        let moved = self.hold.recheck(snapshot, &pieces).ok()?;
        if !looked_again && !moved.is_empty() {
            self.seen.rechecked += 1;
            pieces = moved;
            return Some(Task::Read {
                snapshot,
                offset,
                pieces,
                next: 0,
                looked_again: true,
                got,
                allowed,
            });
        }
        for (n, (value, allowed)) in got.iter().zip(&allowed).enumerate() {
            assert!(
                allowed.contains(value),
                "sector {} of the image of {snapshot:?}: {value}, not one of {allowed:?}",
                offset / SECTOR + n as u64
            );
        }
        None
    }
}

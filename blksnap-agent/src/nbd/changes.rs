//! Changes: what an export's contexts `qemu:dirty-bitmap:…` tell.
//!
//! | context | dirty is what changed |
//! |---|---|
//! | `qemu:dirty-bitmap:last` | between the snapshot before this one and this one |
//! | `qemu:dirty-bitmap:since-GENERATION-NUMBER` | since the take NUMBER of that generation of the change map |
//!
//! # Never clean when in doubt
//! A context exists only while its answer is known to be right: not for another generation, not for a map of another
//! size than the export, not once the map became doubtful. A client that asks for such a context by its name is
//! refused with the reason; a client that has it gets errors from the moment of the doubt on, also in the middle of
//! an answer.
//!
//! # Work for one answer
//! A pass over the map from the place that was asked for, a byte for each tracking block, until enough extents are
//! found.

use std::sync::Arc;

use super::proto::context::{DIRTY_BITMAP_LAST, DIRTY_BITMAP_PREFIX};
use super::proto::wire::BitmapState;
use super::proto::{ContextName, StatusExtent};
use crate::cbt::{Base, FullNeeded, ReadMap};
use crate::units::{Extent, Generation};

/// What follows [`DIRTY_BITMAP_PREFIX`] in contexts that name a base.
const SINCE: &str = "since-";

/// Why a context can't be answered for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangesError {
    /// Everything has to be copied.
    #[error(transparent)]
    Full(#[from] FullNeeded),
    /// The map is of a device of another size.
    #[error("full copy needed: the change map covers {map} bytes, the export has {export}")]
    Size {
        /// Bytes that the map covers.
        map: u64,
        /// Bytes of the export.
        export: u64,
    },
    /// The context's name is none of those above.
    #[error("a context of changes is {DIRTY_BITMAP_LAST} or {DIRTY_BITMAP_PREFIX}since-GENERATION-NUMBER")]
    Name,
}

/// What is known of the changes of an export.
#[derive(Clone, Debug)]
pub struct Changes {
    known: Known,
    /// Size of the export in bytes.
    size: u64,
}

#[derive(Clone, Debug)]
enum Known {
    /// Of the last period only: ascending extents without overlaps.
    Last(Arc<[Extent]>),
    /// Of all periods of a generation.
    Map(Arc<ReadMap>),
}

impl Changes {
    /// Only what changed last is known: `extents`, ascending, without overlaps.
    #[must_use]
    pub fn last(extents: impl Into<Arc<[Extent]>>, size: u64) -> Self {
        Self {
            known: Known::Last(extents.into()),
            size,
        }
    }

    /// All that the map of an instant tells; the export is the device at that instant, of `size` bytes.
    #[must_use]
    pub const fn of(map: Arc<ReadMap>, size: u64) -> Self {
        Self {
            known: Known::Map(map),
            size,
        }
    }

    /// Bytes of the export were written: they are dirty from now on.
    pub fn mark(&mut self, offset: u64, length: u64) {
        // What changed last alone is told only of exports that nobody writes to.
        if let Known::Map(map) = &mut self.known {
            Arc::make_mut(map).mark(offset, length);
        }
    }

    /// The contexts that can be answered for now.
    #[must_use]
    pub fn contexts(&self) -> Vec<ContextName> {
        let mut contexts = Vec::new();
        if self.check().is_ok() {
            contexts.push(ContextName::dirty_bitmap_last());
            if let Known::Map(map) = &self.known {
                // Newest first: the ones that are asked for most.
                contexts.extend((0..=map.number()).rev().filter_map(|number| {
                    let generation = map.generation();
                    ContextName::new(&since(Base { generation, number })).ok()
                }));
            }
        }
        contexts
    }

    /// Why a client that asks for `query` must be refused: it names changes that can't be told. `None` if it asks for
    /// something else or can be answered.
    #[must_use]
    pub fn refusal(&self, query: &str) -> Option<ChangesError> {
        let leaf = query.strip_prefix(DIRTY_BITMAP_PREFIX)?;
        if query != DIRTY_BITMAP_LAST && !leaf.starts_with(SINCE) {
            return None;
        }
        self.extents(query).err()
    }

    /// What `context` tells about `offset` to `end`, from `offset` on without gaps: at most `most` extents.
    ///
    /// # Errors
    /// The context does not exist, or no longer.
    pub fn status(
        &self,
        context: &str,
        offset: u64,
        end: u64,
        most: usize,
    ) -> Result<Vec<StatusExtent>, ChangesError> {
        let status = match self.extents(context)? {
            Found::Last(extents) => {
                let first = extents.partition_point(|extent| extent.end() <= offset);
                dirty_status(extents[first..].iter().copied(), offset, end, most)
            }
            Found::Changed(changed) => dirty_status(changed.skip_to(offset), offset, end, most),
        };
        // The doubt may have come while the map was read.
        self.check()?;
        Ok(status)
    }

    /// Whether the map can be relied on.
    fn check(&self) -> Result<(), ChangesError> {
        let Known::Map(map) = &self.known else {
            return Ok(());
        };
        map.changed_in_last()?;
        let covered = map.capacity().bytes();
        if covered == self.size {
            Ok(())
        } else {
            Err(ChangesError::Size {
                map: covered,
                export: self.size,
            })
        }
    }

    /// The changes that `context` names.
    fn extents(&self, context: &str) -> Result<Found<'_>, ChangesError> {
        self.check()?;
        let base = base(context);
        match (&self.known, base) {
            (Known::Last(extents), None) if context == DIRTY_BITMAP_LAST => Ok(Found::Last(extents)),
            (Known::Map(map), None) if context == DIRTY_BITMAP_LAST => {
                Ok(Found::Changed(map.changed_in_last()?))
            }
            (Known::Map(map), Some(base)) => Ok(Found::Changed(map.changed_since(&base)?)),
            _ => Err(ChangesError::Name),
        }
    }
}

enum Found<'a> {
    Last(&'a [Extent]),
    Changed(crate::cbt::ChangedExtents),
}

/// The name of the context of what changed since `base`.
fn since(base: Base) -> String {
    format!("{DIRTY_BITMAP_PREFIX}{SINCE}{}-{}", base.generation, base.number)
}

/// The base in a context's name; `None` unless it is written exactly as [`since`] does.
fn base(context: &str) -> Option<Base> {
    let (generation, number) = context
        .strip_prefix(DIRTY_BITMAP_PREFIX)?
        .strip_prefix(SINCE)?
        .rsplit_once('-')?;
    let base = Base {
        generation: generation.parse::<Generation>().ok()?,
        number: number.parse().ok()?,
    };
    (since(base) == context).then_some(base)
}

/// The range from `offset` to `end` as dirty and clean extents, at most `most`. `dirty` ascends and leaves out nothing
/// behind `offset`.
fn dirty_status(
    dirty: impl Iterator<Item = Extent>,
    offset: u64,
    end: u64,
    most: usize,
) -> Vec<StatusExtent> {
    let mut extents = Vec::new();
    let mut position = offset;
    let mut push = |until: u64, flags: BitmapState, position: &mut u64| {
        if until > *position {
            extents.push(StatusExtent {
                length: until - *position,
                flags: flags.bits(),
            });
            *position = until;
        }
        extents.len() < most
    };
    for extent in dirty {
        if extent.offset >= end
            || !push(extent.offset, BitmapState::empty(), &mut position)
            || !push(extent.end().min(end), BitmapState::DIRTY, &mut position)
        {
            break;
        }
    }
    push(end, BitmapState::empty(), &mut position);
    extents.truncate(most);
    extents
}

#[cfg(test)]
mod tests;

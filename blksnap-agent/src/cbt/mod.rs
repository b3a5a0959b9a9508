//! Change map: which blocks changed since when. Part of the core.
//!
//! A [`CbtMap`] holds a byte per tracking block: the number of the period in which the block last changed. A
//! *take* closes the period and freezes the map as a [`ReadMap`], whose [`Taken::number`] together with the
//! generation names that instant. Given an older such name (a [`Base`]) the read map answers which extents
//! changed since, or [`FullNeeded`] with a reason; it never answers with extents that might be too few.
//!
//! # Numbers
//! The first period of a generation has number 1, and so the first take is number 1 and the next period 2. After
//! take 254 the period is 255. The next take can't be given a number that leaves one for the period after it: the
//! map starts over with a new generation, of which that take is the first (number 1), and everything that named
//! the older generation is answered [`FullNeeded`]. The same happens at the take after the map was found to be
//! wrong ([`CbtMap::corrupt`]) and after the device changed its size.
//!
//! # Base number 0
//! No take has number 0: it stands for the beginning of the generation. "Changed since 0" is every block marked in
//! this generation, which is right for a copy read wholly after the generation began, and is *not* the whole
//! device. Who has no copy has no base and needs a full one; there is no number that means "everything".
//!
//! # Locking
//! The map is plain data; the tracker keeps it behind a mutex. What is long (walking the extents, sending or saving
//! the bytes) works with no lock, on a read map or a copy, which share their pieces with the map ([`Blocks`]), so that
//! making one takes microseconds. Doubt that arises later reaches read maps already handed out, see
//! [`ReadMap::changed_since`].

mod answer;
mod blocks;
mod extents;
mod heat;
mod map;
mod params;
mod read_map;
mod reason;
mod saved;
mod stream;

pub use answer::{ChangedAnswer, ChangedReport, FullAnswer};
pub use blocks::Blocks;
pub(crate) use blocks::MARK_WORDS;
pub use extents::ChangedExtents;
pub use heat::{Age, Bucket, Heat, MAX_BUCKETS};
pub use map::{CbtInfo, CbtMap, MapError, Taken};
pub use params::{ParamsError, TrackingParams};
pub use read_map::{Base, ReadMap};
pub use reason::{FullNeeded, FullReason, ResetReason};
pub use saved::{RestoreError, SavedHeader, SavedMap};
pub use stream::{ChangedForm, ChangedHead, ChangedLine, ChangedParts, ChangedTotals};

//! Keep: what is left of a device when the agent is killed at any moment, and why that is enough.
//!
//! Three things outlive the agent: the open bitmap, which the programs go on writing to; bitmaps of *pending*
//! blocks, pinned too; and the *document*, a file with the change map. At every moment
//!
//! > document, plus pending blocks, plus pinned bitmaps, contain every block that the change map has marked
//!
//! and the next agent marks all of these blocks in the document's map under its open number. Marking a block that
//! was marked before, or too late a number, only makes a backup larger. Hence the order of steps:
//!
//! - *Close*: the next bitmap is pinned, then put in place; the closed one's blocks go into the pending ones; only
//!   then its pin is removed.
//! - *Save*: a new pending bitmap takes what comes from here on; the map is copied; the document replaces the one
//!   before (as [`statefile`] does it, whole or not at all); only then the pending bitmaps before go.
//! - *Take*: nobody learns the number of a take before a document has it. A number that is lost with the agent was
//!   never anybody's base.
//! - *Attach*: the document is the last step, and the first that *detach* removes. A slot without one is not
//!   tracked, whatever else is left of it.
//!
//! [`statefile`]: crate::statefile

use std::path::{Path, PathBuf};

use super::TrackerError;
use super::bitmap::Bitmap;
use super::pins::{self, PinError, Pins};

/// Pins and document of one slot.
#[derive(Debug)]
pub(super) struct Keep {
    directory: PathBuf,
    document: PathBuf,
    slot: u32,
    blocks: u64,
    pending: Bitmap,
    number: u64,
    /// Pins whose blocks the next document has.
    covered: Vec<PathBuf>,
}

/// What an agent before left of a slot.
pub(super) struct Found {
    pub(super) keep: Keep,
    /// Number of the open bitmap's period, if it is pinned.
    pub(super) period: Option<u64>,
    /// Bitmaps of pending blocks, and those pinned and not merged.
    pub(super) blocks: Vec<Bitmap>,
}

impl Keep {
    /// A place for a slot that nothing is kept of.
    pub(super) fn create(
        pins: &Pins,
        documents: &Path,
        slot: u32,
        blocks: u64,
    ) -> Result<Self, TrackerError> {
        let directory = pins.slot(slot);
        let document = document_of(documents, slot);
        pins::remove_tree(&document)?;
        pins::remove_tree(&directory)?;
        pins::make(&directory)?;
        Ok(Self {
            pending: Bitmap::new(slot, blocks)?.pinned(directory.join("p0"))?,
            number: 0,
            covered: Vec::new(),
            directory,
            document,
            slot,
            blocks,
        })
    }

    /// What is there of a slot whose open bitmap has the kernel's number `open`. All that is found is covered by the
    /// next document, but the open bitmap.
    pub(super) fn find(
        pins: &Pins,
        documents: &Path,
        slot: u32,
        blocks: u64,
        open: u32,
    ) -> Result<(Found, Option<PathBuf>), TrackerError> {
        let directory = pins.slot(slot);
        let mut found = Vec::new();
        let mut covered = Vec::new();
        let mut open_pin = None;
        let mut number = 0;
        for path in pins::entries(&directory)? {
            let bitmap = Bitmap::open(pins::open_map(&path)?, slot, blocks)?;
            if bitmap.id()? == open {
                open_pin = Some(path);
                continue;
            }
            if let Some(n) = number_of(&path, 'p') {
                number = number.max(n + 1);
            }
            covered.push(path.clone());
            found.push(bitmap);
        }
        let keep = Self {
            pending: Bitmap::new(slot, blocks)?.pinned(directory.join(format!("p{number}")))?,
            number,
            covered,
            directory,
            document: document_of(documents, slot),
            slot,
            blocks,
        };
        let period = open_pin.as_deref().and_then(|path| number_of(path, 'b'));
        let found = Found {
            keep,
            period,
            blocks: found,
        };
        Ok((found, open_pin))
    }

    /// The document.
    pub(super) fn document(&self) -> &Path {
        &self.document
    }

    /// A clear bitmap for period `period`, pinned.
    pub(super) fn bitmap(&self, period: u64) -> Result<Bitmap, TrackerError> {
        let path = self.directory.join(format!("b{period}"));
        // One that a close made in vain.
        pins::remove_tree(&path)?;
        Ok(Bitmap::new(self.slot, self.blocks)?.pinned(path)?)
    }

    /// Keeps blocks that are marked outside the open bitmap, as words of bits from word `first` on.
    pub(super) fn add(&self, first: usize, words: &[u64]) {
        self.pending.add(first, words);
    }

    /// Keeps the blocks `first..=last`.
    pub(super) fn add_blocks(&self, first: u64, last: u64) {
        self.pending.add_blocks(first, last);
    }

    /// From here on, blocks go where a document that is made now need not have them.
    pub(super) fn begin_save(&mut self) -> Result<(), TrackerError> {
        let number = self.number + 1;
        let path = self.directory.join(format!("p{number}"));
        pins::remove_tree(&path)?;
        let next = Bitmap::new(self.slot, self.blocks)?.pinned(path)?;
        let before = std::mem::replace(&mut self.pending, next);
        self.number = number;
        self.covered.extend(before.pin().map(Path::to_owned));
        Ok(())
    }

    /// Takes the pins that the document being made covers.
    pub(super) fn take_covered(&mut self) -> Vec<PathBuf> {
        std::mem::take(&mut self.covered)
    }

    /// Gives them back: the document was not written.
    pub(super) fn give_back(&mut self, covered: Vec<PathBuf>) {
        self.covered.extend(covered);
    }

    /// Removes the document: from here on the slot is not tracked, for any agent to come.
    pub(super) fn forget(&self) -> Result<(), PinError> {
        pins::remove_tree(&self.document)
    }

    /// Removes the pins.
    pub(super) fn remove(&self) -> Result<(), PinError> {
        pins::remove_tree(&self.directory)
    }
}

/// Where the document of a slot is.
pub(super) fn document_of(documents: &Path, slot: u32) -> PathBuf {
    documents.join(format!("slot-{slot}"))
}

fn number_of(path: &Path, kind: char) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix(kind)?.parse().ok()
}

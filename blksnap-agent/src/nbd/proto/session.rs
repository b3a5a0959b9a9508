//! Session: what was agreed in the handshake and holds for the transmission.

use super::catalog::BlockSizes;
use super::context::SelectedContext;
use super::limits::MAX_EXTENTS;
use super::wire::{BlockDescriptor, ExtendedBlockDescriptor, TransmissionFlags};

/// Form of requests and replies, as negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// Simple replies.
    Simple,
    /// Structured replies (`NBD_OPT_STRUCTURED_REPLY`).
    Structured,
    /// Extended requests and replies (`NBD_OPT_EXTENDED_HEADERS`).
    Extended,
}

impl Framing {
    /// Whether replies are chunks.
    #[must_use]
    pub const fn has_chunks(self) -> bool {
        matches!(self, Self::Structured | Self::Extended)
    }
}

/// What was agreed in the handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// Form of the replies.
    pub framing: Framing,
    /// Size of the export in bytes.
    pub size: u64,
    /// Block sizes of the export.
    pub block_sizes: BlockSizes,
    /// Flags that were shown to the client: what it may use.
    pub flags: TransmissionFlags,
    /// Selected metadata contexts.
    pub contexts: Vec<SelectedContext>,
}

impl Session {
    /// Most extents in a status chunk, so that it keeps the largest payload.
    #[must_use]
    pub fn most_extents(&self) -> usize {
        let size = if self.framing == Framing::Extended {
            size_of::<ExtendedBlockDescriptor>()
        } else {
            size_of::<BlockDescriptor>()
        };
        MAX_EXTENTS.min(self.block_sizes.maximum() as usize / size)
    }
}

//! Catalog: what the handshake must know of the exports.
//!
//! The facts of an export are taken once, when it is looked up; the handle beside them is the caller's, so that
//! what enters transmission is what was looked up, even if another export took its name meanwhile.

use super::context::ContextName;
use super::limits::MAX_PAYLOAD;

/// Block sizes of an export in bytes ("Size constraints").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    minimum: u32,
    preferred: u32,
    maximum: u32,
}

/// Block sizes that the specification does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "block sizes {minimum}, {preferred}, {maximum} are not valid for nbd: powers of two that grow, the first at most 64 KiB"
)]
pub struct BlockSizeError {
    minimum: u32,
    preferred: u32,
    maximum: u32,
}

impl BlockSizes {
    /// What holds when nothing is negotiated: 1, 4096 and 32 MiB.
    pub const DEFAULT: Self = Self {
        minimum: 1,
        preferred: 4096,
        maximum: MAX_PAYLOAD,
    };

    /// Sizes in bytes; `maximum` is cut to the server's limit of 32 MiB.
    ///
    /// # Errors
    /// `minimum` is no power of two up to 64 KiB, `preferred` no power of two of at least 512 and `minimum`, or
    /// `maximum` is below `preferred`.
    pub fn new(minimum: u32, preferred: u32, maximum: u32) -> Result<Self, BlockSizeError> {
        let valid = minimum.is_power_of_two()
            && minimum <= 1 << 16
            && preferred.is_power_of_two()
            && preferred >= minimum.max(512)
            && preferred <= MAX_PAYLOAD
            && maximum >= preferred;
        if valid {
            Ok(Self {
                minimum,
                preferred,
                maximum: maximum.min(MAX_PAYLOAD),
            })
        } else {
            Err(BlockSizeError {
                minimum,
                preferred,
                maximum,
            })
        }
    }

    /// Every offset and length is a multiple of this.
    #[must_use]
    pub const fn minimum(self) -> u32 {
        self.minimum
    }

    /// Efficient requests are multiples of this.
    #[must_use]
    pub const fn preferred(self) -> u32 {
        self.preferred
    }

    /// Largest payload.
    #[must_use]
    pub const fn maximum(self) -> u32 {
        self.maximum
    }
}

/// What the handshake must know of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportFacts {
    /// Canonical name.
    pub name: String,
    /// Sentence for people; may be empty.
    pub description: String,
    /// Size in bytes.
    pub size: u64,
    /// Block sizes.
    pub block_sizes: BlockSizes,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether the medium rotates.
    pub rotational: bool,
    /// Whether several connections see one state.
    pub multi_conn: bool,
    /// Metadata contexts that can be selected.
    pub contexts: Vec<ContextName>,
}

/// An entry of the list of exports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Canonical name.
    pub name: String,
    /// Sentence for people; may be empty.
    pub description: String,
}

/// An export that was looked up: facts, and the caller's own handle of it.
#[derive(Clone, Debug)]
pub struct Found<E> {
    /// Facts at the time of the look-up.
    pub facts: ExportFacts,
    /// The caller's handle.
    pub export: E,
}

/// The exports, as the handshake sees them. Calls must not block.
pub trait Catalog {
    /// Handle of an export.
    type Export;

    /// All exports, in the order to list them.
    fn list(&self) -> Vec<Listed>;

    /// Looks up the export `name`; the empty name is the default export.
    fn find(&self, name: &str) -> Option<Found<Self::Export>>;

    /// Why a client that selects the context `query`, which the export does not have, must be refused; `None` where
    /// the query is just ignored.
    fn refuse_context(&self, export: &Self::Export, query: &str) -> Option<String>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes_follow_the_specification() {
        for (minimum, preferred, maximum) in [
            (1, 512, 512),
            (512, 4096, u32::MAX),
            (1 << 16, 1 << 16, 1 << 16),
            (1, 4096, 32 << 20),
        ] {
            let sizes = BlockSizes::new(minimum, preferred, maximum).unwrap();
            assert_eq!((sizes.minimum(), sizes.preferred()), (minimum, preferred));
            assert!(sizes.maximum() <= MAX_PAYLOAD);
        }
        for (minimum, preferred, maximum) in [
            (0, 4096, 4096),
            (3, 4096, 4096),
            (1 << 17, 1 << 17, 1 << 20),
            (1, 256, 4096),
            (4096, 512, 4096),
            (1, 5000, 8192),
            (1, 4096, 4095),
            (1, 64 << 20, 64 << 20),
        ] {
            assert!(
                BlockSizes::new(minimum, preferred, maximum).is_err(),
                "{minimum} {preferred} {maximum}"
            );
        }
    }
}

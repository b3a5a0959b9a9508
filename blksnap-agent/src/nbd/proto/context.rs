//! Context: names of metadata contexts, and which of them a query means.
//!
//! A name is a namespace, a colon and a leaf ("Metadata querying"). `base:allocation` is the specification's,
//! `qemu:dirty-bitmap:NAME` is qemu's, where NAME is `last` for what changed between the previous snapshot and
//! this one. A query is the name itself, or, in `NBD_OPT_LIST_META_CONTEXT` only, a prefix of it that ends in a
//! colon: `base:`, `qemu:`, `qemu:dirty-bitmap:`. Anything else selects nothing, which is no error.

use super::limits::{MAX_CONTEXTS, MAX_STRING};

/// Which parts are holes or read as zeroes.
#[doc(alias = "NBD_META_ID_BASE_ALLOCATION")]
pub const BASE_ALLOCATION: &str = "base:allocation";

/// What changed between the previous snapshot and this one.
pub const DIRTY_BITMAP_LAST: &str = "qemu:dirty-bitmap:last";

/// Prefix of every context that tells changed parts.
pub const DIRTY_BITMAP_PREFIX: &str = "qemu:dirty-bitmap:";

/// A metadata context's name, valid by construction.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ContextName(String);

/// The text is no name of a metadata context.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not a metadata context name of the form namespace:leaf")]
pub struct ContextNameError(String);

impl ContextName {
    /// Checks `name`: a printable namespace without white space, a colon, a leaf, at most [`MAX_STRING`] bytes.
    ///
    /// # Errors
    /// The name breaks one of these rules.
    pub fn new(name: &str) -> Result<Self, ContextNameError> {
        let valid = name.len() <= MAX_STRING
            && !name.contains('\0')
            && name.split_once(':').is_some_and(|(space, leaf)| {
                !space.is_empty()
                    && !leaf.is_empty()
                    && !space.chars().any(|c| c.is_whitespace() || c.is_control())
            });
        if valid {
            Ok(Self(name.to_owned()))
        } else {
            Err(ContextNameError(name.chars().take(64).collect()))
        }
    }

    /// `base:allocation`.
    #[must_use]
    pub fn base_allocation() -> Self {
        Self(BASE_ALLOCATION.to_owned())
    }

    /// `qemu:dirty-bitmap:last`.
    #[must_use]
    pub fn dirty_bitmap_last() -> Self {
        Self(DIRTY_BITMAP_LAST.to_owned())
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether a query of `NBD_OPT_SET_META_CONTEXT` selects this context: only its whole name does.
    #[must_use]
    pub fn is_selected_by(&self, query: &[u8]) -> bool {
        self.0.as_bytes() == query
    }

    /// Whether a query of `NBD_OPT_LIST_META_CONTEXT` asks for this context: its name, or a prefix with a colon at
    /// its end.
    #[must_use]
    pub fn is_listed_by(&self, query: &[u8]) -> bool {
        self.is_selected_by(query) || (query.ends_with(b":") && self.0.as_bytes().starts_with(query))
    }
}

/// A context that the client selected, with the identifier it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SelectedContext {
    /// Identifier in the status chunks.
    pub id: u32,
    /// Its name.
    pub name: ContextName,
}

/// Some of a session's contexts, by their place in [`super::Session::contexts`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContextSet(u32);

const _: () = assert!(MAX_CONTEXTS < 32, "a set has a bit for each context");

impl ContextSet {
    /// None.
    pub const EMPTY: Self = Self(0);

    /// The first `count` ones, at most [`MAX_CONTEXTS`].
    #[must_use]
    pub const fn first(count: usize) -> Self {
        let count = if count < MAX_CONTEXTS { count } else { MAX_CONTEXTS };
        Self((1 << count) - 1)
    }

    /// Adds a place below [`MAX_CONTEXTS`]; false if it was there.
    pub fn insert(&mut self, place: usize) -> bool {
        let bit = 1_u32
            .checked_shl(u32::try_from(place).unwrap_or(u32::MAX))
            .unwrap_or(0);
        let fresh = self.0 & bit == 0;
        self.0 |= bit;
        fresh
    }

    /// Whether the place is in the set.
    #[must_use]
    pub const fn contains(self, place: usize) -> bool {
        place < MAX_CONTEXTS && self.0 & (1 << place) != 0
    }

    /// Number of contexts.
    #[must_use]
    pub const fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_match_names_and_prefixes() {
        let allocation = ContextName::base_allocation();
        let last = ContextName::dirty_bitmap_last();
        for (query, lists_allocation, lists_last) in [
            ("base:allocation", true, false),
            ("base:", true, false),
            ("base:alloc", false, false),
            ("qemu:", false, true),
            ("qemu:dirty-bitmap:", false, true),
            ("qemu:dirty-bitmap:last", false, true),
            ("qemu:dirty-bitmap:la", false, false),
            ("qemu:dirty-bitmap", false, false),
            ("base", false, false),
            (":", false, false),
            ("", false, false),
            ("x-own:", false, false),
        ] {
            assert_eq!(
                allocation.is_listed_by(query.as_bytes()),
                lists_allocation,
                "{query}"
            );
            assert_eq!(last.is_listed_by(query.as_bytes()), lists_last, "{query}");
            assert_eq!(
                allocation.is_selected_by(query.as_bytes()),
                query == BASE_ALLOCATION,
                "{query}"
            );
            assert_eq!(
                last.is_selected_by(query.as_bytes()),
                query == DIRTY_BITMAP_LAST,
                "{query}"
            );
        }
    }

    #[test]
    fn names_are_checked() {
        for name in [
            "base:allocation",
            "qemu:dirty-bitmap:since-1-2",
            "x-own:leaf with space",
        ] {
            assert_eq!(ContextName::new(name).unwrap().as_str(), name);
        }
        for name in [
            "",
            "base",
            "base:",
            ":leaf",
            "ba se:leaf",
            "a:\0",
            &format!("a:{}", "b".repeat(MAX_STRING)),
        ] {
            assert!(ContextName::new(name).is_err(), "{name}");
        }
    }
}

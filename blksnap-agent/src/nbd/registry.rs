//! Registry: the exports that a server offers now.
//!
//! Exports come and go while the server runs. A connection holds an [`Entry`], not the export: once removed, the
//! entry is empty, every later request is answered with `NBD_ESHUTDOWN`, and the export itself is dropped as soon
//! as the requests in flight are done, however long clients stay connected.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::ahead::Ahead;
use super::export::Export;
use super::proto::limits::MAX_STRING;
use super::proto::{Catalog, ExportFacts, Found, Listed};
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{PoisonError, RwLock};

/// An export can't be added.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// The name is taken.
    #[error("cannot export \"{0}\": an export of this name exists, remove it first")]
    Exists(String),
    /// The name is no string of the protocol.
    #[error("cannot export \"{0}\": a name has 1 to 4096 bytes without NUL")]
    Name(String),
    /// No client could reach the last bytes.
    #[error(
        "cannot export \"{name}\": its size {size} is no multiple of its smallest block of {block} bytes"
    )]
    Size {
        /// The export.
        name: String,
        /// Its size in bytes.
        size: u64,
        /// Its smallest block in bytes.
        block: u32,
    },
    /// The description is no string of the protocol.
    #[error("cannot export \"{0}\": its description is longer than 4096 bytes or contains NUL")]
    Description(String),
}

/// An export as connections hold it.
pub struct Entry {
    export: RwLock<Option<Arc<dyn Export>>>,
    clients: AtomicUsize,
    ahead: Arc<Ahead>,
}

impl Entry {
    /// The export, unless it was removed.
    #[must_use]
    pub fn export(&self) -> Option<Arc<dyn Export>> {
        self.export.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What is read ahead for its clients.
    pub(super) const fn ahead(&self) -> &Arc<Ahead> {
        &self.ahead
    }

    /// Counts a client until the guard is dropped.
    pub(super) fn client(self: &Arc<Self>) -> ClientGuard {
        self.clients.fetch_add(1, Ordering::Relaxed);
        ClientGuard(Arc::clone(self))
    }
}

/// A client in transmission on an entry.
pub(super) struct ClientGuard(Arc<Entry>);

impl Drop for ClientGuard {
    fn drop(&mut self) {
        if self.0.clients.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.ahead.forget();
        }
    }
}

/// The exports by name.
#[derive(Default)]
pub struct Exports {
    entries: RwLock<BTreeMap<String, Arc<Entry>>>,
}

impl Exports {
    /// No exports.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Offers `export` from now on.
    ///
    /// # Errors
    /// Its name is taken or not allowed, or its description or size is not allowed.
    pub fn add(&self, export: Arc<dyn Export>) -> Result<(), RegistryError> {
        let name = export.name().to_owned();
        if name.is_empty() || name.len() > MAX_STRING || name.contains('\0') {
            return Err(RegistryError::Name(name.chars().take(64).collect()));
        }
        let description = export.description();
        if description.len() > MAX_STRING || description.contains('\0') {
            return Err(RegistryError::Description(name));
        }
        let (size, block) = (export.size(), export.block_sizes().minimum());
        if !size.is_multiple_of(block.into()) {
            return Err(RegistryError::Size { name, size, block });
        }
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        if entries.contains_key(&name) {
            return Err(RegistryError::Exists(name));
        }
        let entry = Entry {
            export: RwLock::new(Some(export)),
            clients: AtomicUsize::new(0),
            ahead: Arc::default(),
        };
        entries.insert(name, Arc::new(entry));
        Ok(())
    }

    /// Withdraws the export `name`; false if there is none. Connected clients get `NBD_ESHUTDOWN` from now on.
    pub fn remove(&self, name: &str) -> bool {
        let entry = self
            .entries
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(name);
        match entry {
            Some(entry) => {
                *entry.export.write().unwrap_or_else(PoisonError::into_inner) = None;
                entry.ahead.close();
                true
            }
            None => false,
        }
    }

    /// Opens the export `name`; the empty name is the only export, if there is just one.
    #[must_use]
    pub fn open(&self, name: &str) -> Option<Arc<Entry>> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        if name.is_empty() && entries.len() == 1 {
            entries.values().next().cloned()
        } else {
            entries.get(name).cloned()
        }
    }

    /// Names of all exports, ascending.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.entries
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .keys()
            .cloned()
            .collect()
    }

    /// Number of connections in transmission on the export `name`.
    #[must_use]
    pub fn clients(&self, name: &str) -> usize {
        self.entries
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
            .map_or(0, |entry| entry.clients.load(Ordering::Relaxed))
    }
}

impl Catalog for Exports {
    type Export = Arc<Entry>;

    fn list(&self) -> Vec<Listed> {
        let entries: Vec<_> = self
            .entries
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect();
        entries
            .iter()
            .filter_map(|entry| entry.export())
            .map(|export| Listed {
                name: export.name().to_owned(),
                description: export.description().to_owned(),
            })
            .collect()
    }

    fn find(&self, name: &str) -> Option<Found<Arc<Entry>>> {
        let entry = self.open(name)?;
        let export = entry.export()?;
        let facts = ExportFacts {
            name: export.name().to_owned(),
            description: export.description().to_owned(),
            size: export.size(),
            block_sizes: export.block_sizes(),
            read_only: export.read_only(),
            rotational: export.rotational(),
            multi_conn: export.can_multi_conn(),
            contexts: export.contexts(),
        };
        Some(Found { facts, export: entry })
    }

    fn refuse_context(&self, export: &Arc<Entry>, query: &str) -> Option<String> {
        export.export()?.refuse_context(query)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Ones;
    use super::*;

    #[test]
    fn exports_come_and_go() {
        let exports = Exports::new();
        assert!(exports.open("").is_none());
        exports.add(Arc::new(Ones::new("b"))).unwrap();
        assert!(exports.find("").is_some_and(|found| found.facts.name == "b"));
        exports.add(Arc::new(Ones::new("a"))).unwrap();
        assert_eq!(exports.names(), ["a", "b"]);
        assert!(exports.open("").is_none(), "two exports have no default");
        assert_eq!(
            exports.add(Arc::new(Ones::new("a"))),
            Err(RegistryError::Exists("a".into()))
        );
        assert_eq!(
            exports.add(Arc::new(Ones::new(""))),
            Err(RegistryError::Name(String::new()))
        );
        assert!(exports.remove("a"));
        assert!(!exports.remove("a"));
        assert_eq!(exports.list().len(), 1);
    }

    #[test]
    fn a_size_of_half_blocks_is_refused() {
        let exports = Exports::new();
        let coarse = |size| Ones {
            name: "coarse",
            size,
            block: 4096,
        };
        assert!(matches!(
            exports.add(Arc::new(coarse(4096 * 3 + 512))),
            Err(RegistryError::Size { block: 4096, .. })
        ));
        exports.add(Arc::new(coarse(4096 * 3))).unwrap();
    }

    #[test]
    fn a_removed_export_is_dropped_though_a_client_stays() {
        let exports = Exports::new();
        let export: Arc<dyn Export> = Arc::new(Ones::new("a"));
        let watch = Arc::downgrade(&export);
        exports.add(export).unwrap();
        let entry = exports.open("a").unwrap();
        let client = entry.client();
        assert_eq!(exports.clients("a"), 1);
        assert!(exports.remove("a"));
        assert!(entry.export().is_none());
        assert!(watch.upgrade().is_none());
        drop(client);

        exports.add(Arc::new(Ones::new("a"))).unwrap();
        assert!(
            entry.export().is_none(),
            "a new export of the name is another one"
        );
    }
}

//! Document: what is written down of a snapshot whose writes are held, so that the next agent can go on with it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::FilterKind;
use crate::engine::cow::Promise;
use crate::statefile::{self, Format, StateFileError};
use crate::storage::StorageSpec;
use crate::units::{Extent, Generation, SnapshotId};

const FORMAT: Format = Format {
    name: "blksnap-held-snapshot",
    version: 2,
};
const NAME: &str = "snapshot";

/// A device of the snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MemberDocument {
    /// Name under which it is served.
    pub(super) name: String,
    /// The file or device.
    pub(super) path: PathBuf,
    /// Bytes.
    pub(super) size: u64,
    /// Bytes of a chunk.
    pub(super) chunk: u64,
    /// Generation and number of the take.
    pub(super) generation: Generation,
    pub(super) number: u8,
    /// The time that the device was served in which it was held last.
    pub(super) session: Uuid,
    /// The time before that, if it was held then, too: an agent that ended before it took a write left that one.
    pub(super) session_before: Option<Uuid>,
    /// What was nobody's at the instant and may become difference storage: the longest ranges.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) free: Vec<Extent>,
}

impl MemberDocument {
    /// Whether the snapshot was held in this session, the last one in which writes may have come.
    pub(super) fn was_held(&self, session: Option<Uuid>) -> bool {
        session.is_some_and(|session| session == self.session || Some(session) == self.session_before)
    }
}

/// A snapshot that is held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Document {
    pub(super) id: SnapshotId,
    /// Seconds since 1970.
    pub(super) created: u64,
    pub(super) taken: u64,
    /// The boot in which it was held last.
    pub(super) boot: String,
    /// The agent has flushed everything and ended.
    pub(super) stopped: bool,
    /// What held its writes. One that is not `served` has ended with its agent.
    #[serde(default = "FilterKind::served", skip_serializing_if = "FilterKind::is_served")]
    pub(super) filter: FilterKind,
    pub(super) promise: Promise,
    /// `diff_storage_minimum`, in bytes.
    pub(super) minimum: u64,
    pub(super) autogrow: bool,
    pub(super) storage: Vec<StorageSpec>,
    /// In the order of their journals.
    pub(super) members: Vec<MemberDocument>,
}

impl Document {
    /// Writes it to the snapshot's directory.
    pub(super) fn write(&self, directory: &Path) -> Result<(), StateFileError> {
        statefile::write(&directory.join(NAME), FORMAT, self)
    }

    /// The document in a snapshot's directory, if there is one.
    pub(super) fn read(directory: &Path) -> Result<Option<Self>, StateFileError> {
        statefile::read(&directory.join(NAME), FORMAT)
    }
}

/// The journal of a member.
pub(super) fn journal_path(directory: &Path, member: usize) -> PathBuf {
    directory.join(format!("journal-{member}"))
}

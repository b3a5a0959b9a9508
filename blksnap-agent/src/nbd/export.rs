//! Export: something that is served over NBD.
//!
//! An export answers blocking calls, several at once, from threads of the server. The server has checked every
//! range against [`Export::size`] and [`Export::block_sizes`] before it calls; an export must still not panic on
//! others. Name, size, block sizes and contexts never change while the export lives.

use std::io;

use super::proto::{BlockSizes, ContextName, ErrorCode, StatusExtent};

/// A request to an export failed.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// Input or output failed.
    #[error("export \"{name}\": {action} at {offset}")]
    Io {
        /// The export.
        name: String,
        /// What was tried, e.g. `read`.
        action: &'static str,
        /// Where, in bytes.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// The image lost its content, e.g. because the difference storage overflowed. Every request fails.
    #[error("export \"{name}\" is corrupted: {reason}")]
    Corrupted {
        /// The export.
        name: String,
        /// Why.
        reason: String,
    },
    /// The export is going away.
    #[error("export \"{0}\" is being removed")]
    Removed(String),
    /// The export has no such metadata context.
    #[error("export \"{name}\" has no metadata context {context}")]
    NoContext {
        /// The export.
        name: String,
        /// The context.
        context: String,
    },
}

impl ExportError {
    /// The error to answer with ("Error values": `EDQUOT` and `EFBIG` count as no space, `EROFS` as not permitted).
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        use nix::errno::Errno;
        match self {
            Self::Io { source, .. } => match source.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EPERM | Errno::EACCES | Errno::EROFS) => ErrorCode::NotPermitted,
                Some(Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG) => ErrorCode::NoSpace,
                Some(Errno::ENOMEM) => ErrorCode::NoMemory,
                _ => ErrorCode::Io,
            },
            Self::Corrupted { .. } => ErrorCode::Io,
            Self::Removed(_) => ErrorCode::Shutdown,
            Self::NoContext { .. } => ErrorCode::Invalid,
        }
    }
}

/// Something that is served over NBD. For now it is read; writes of every kind are refused by the server.
pub trait Export: Send + Sync {
    /// Name by which clients open it: a string of the protocol, not empty.
    fn name(&self) -> &str;

    /// A sentence for people; may be empty.
    fn description(&self) -> &str {
        ""
    }

    /// Size in bytes.
    fn size(&self) -> u64;

    /// Block sizes.
    fn block_sizes(&self) -> BlockSizes {
        BlockSizes::DEFAULT
    }

    /// Whether the flag `NBD_FLAG_READ_ONLY` is shown.
    fn read_only(&self) -> bool {
        true
    }

    /// Fills `buffer` with the bytes from `offset`, all of them.
    ///
    /// # Errors
    /// The bytes can't be had. A part of the buffer may have been filled; nothing of it is sent.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), ExportError>;

    /// Metadata contexts that [`Export::block_status`] answers for.
    fn contexts(&self) -> Vec<ContextName> {
        Vec::new()
    }

    /// What `context` tells about the `length` bytes from `offset`: extents without gaps from `offset` on. They may
    /// end before the request does, if at least one is given, or behind it; at most `most` are used.
    ///
    /// # Errors
    /// The status can't be had, or the context is not one of [`Export::contexts`].
    fn block_status(
        &self,
        context: &ContextName,
        offset: u64,
        length: u64,
        most: usize,
    ) -> Result<Vec<StatusExtent>, ExportError>;

    /// Makes acknowledged writes durable; on return they are, for every connection.
    ///
    /// # Errors
    /// They are not.
    fn flush(&self) -> Result<(), ExportError> {
        Ok(())
    }

    /// Hints that the range will be read soon.
    ///
    /// # Errors
    /// The hint can't be followed.
    fn cache(&self, _offset: u64, _length: u64) -> Result<(), ExportError> {
        Ok(())
    }
}

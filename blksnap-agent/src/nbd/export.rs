//! Export: something that is served over NBD.
//!
//! An export answers blocking calls, several at once, from threads of the server. The server has checked every
//! range against [`Export::size`] and [`Export::block_sizes`] before it calls; an export must still not panic on
//! others. Name, size, block sizes and contexts never change while the export lives.

use std::fs::File;
use std::io;
use std::sync::Arc;

use bytes::Bytes;

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
    /// What changed can't be told, or no longer. Other requests are served.
    #[error("export \"{name}\": {reason}")]
    Changes {
        /// The export.
        name: String,
        /// Why.
        reason: String,
    },
    /// The export takes no writes of any kind.
    #[error("export \"{0}\" is read-only")]
    ReadOnly(String),
    /// Zeroes can't be written faster than other bytes here.
    #[error("export \"{name}\": zeroes at {offset} are not faster than a write")]
    NotFast {
        /// The export.
        name: String,
        /// Where, in bytes.
        offset: u64,
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
            Self::Corrupted { .. } | Self::Changes { .. } => ErrorCode::Io,
            Self::ReadOnly(_) => ErrorCode::NotPermitted,
            Self::NotFast { .. } => ErrorCode::NotSupported,
            Self::Removed(_) => ErrorCode::Shutdown,
            Self::NoContext { .. } => ErrorCode::Invalid,
        }
    }
}

/// How zeroes are to be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroOptions {
    /// The range stays allocated (`NBD_CMD_FLAG_NO_HOLE`): later writes to it need no new space.
    pub no_hole: bool,
    /// Fail at once with [`ExportError::NotFast`] unless this is quicker than writing the bytes
    /// (`NBD_CMD_FLAG_FAST_ZERO`).
    pub fast: bool,
    /// The zeroes are durable on return (`NBD_CMD_FLAG_FUA`).
    pub fua: bool,
}

/// How the server reads ahead for clients that read in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PrefetchBy {
    /// By [`Export::cache`]: the export keeps what it reads.
    #[default]
    Hint,
    /// By [`Export::read_at`], before clients ask, and by keeping the bytes for a moment. For exports that are
    /// read-only and whose bytes never change, as those of an image: what was read once is right for ever. Not done for
    /// others.
    Keeping,
}

/// Something that is served over NBD.
///
/// # Durability
/// A write, a trim or zeroes with `fua` are durable on return. A flush makes everything durable that was acknowledged
/// before it began, whoever sent it: all connections share one export, which is why several are allowed
/// (`NBD_FLAG_CAN_MULTI_CONN`).
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

    /// Whether the flag `NBD_FLAG_READ_ONLY` is shown, and every kind of write refused before it gets here.
    fn read_only(&self) -> bool {
        true
    }

    /// Whether the medium rotates (`NBD_FLAG_ROTATIONAL`).
    fn rotational(&self) -> bool {
        false
    }

    /// Whether several connections see one state, and a flush of one covers all (`NBD_FLAG_CAN_MULTI_CONN`).
    fn can_multi_conn(&self) -> bool {
        true
    }

    /// The file whose byte N is byte N of the export, if there is one: the server may then read from and write to it
    /// by other means than the calls below, with the same outcome. It stays the same while the export lives.
    fn file(&self) -> Option<&Arc<File>> {
        None
    }

    /// How the server reads ahead. It stays the same while the export lives.
    fn prefetch_by(&self) -> PrefetchBy {
        PrefetchBy::Hint
    }

    /// Fills `buffer` with the bytes from `offset`, all of them.
    ///
    /// # Errors
    /// The bytes can't be had. A part of the buffer may have been filled; nothing of it is sent.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), ExportError>;

    /// Writes `data` at `offset`, all of it. The buffer is the one that was received into; an export may keep it.
    ///
    /// # Errors
    /// A part of the data may have been written.
    fn write_at(&self, _data: Bytes, _offset: u64, _fua: bool) -> Result<(), ExportError> {
        Err(ExportError::ReadOnly(self.name().to_owned()))
    }

    /// Hints that the range is no longer needed; its content is anything from now on.
    ///
    /// # Errors
    /// The storage failed. That the hint can't be followed is no error.
    fn trim(&self, _offset: u64, _length: u64, _fua: bool) -> Result<(), ExportError> {
        Err(ExportError::ReadOnly(self.name().to_owned()))
    }

    /// Makes the range read as zeroes.
    ///
    /// # Errors
    /// A part of the range may have been zeroed, but nothing with [`ExportError::NotFast`], which only comes where
    /// `options.fast` is set.
    fn write_zeroes(&self, _offset: u64, _length: u64, _options: ZeroOptions) -> Result<(), ExportError> {
        Err(ExportError::ReadOnly(self.name().to_owned()))
    }

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

    /// Metadata contexts that [`Export::block_status`] answers for.
    fn contexts(&self) -> Vec<ContextName> {
        Vec::new()
    }

    /// Why a client that asks for the context `query`, which is not one of [`Export::contexts`], must be told so
    /// rather than get nothing: one that could be misread as "nothing changed". `None` where nothing is right.
    fn refuse_context(&self, _query: &str) -> Option<String> {
        None
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
}

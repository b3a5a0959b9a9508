//! Mapped: images of devices of device-mapper, as exports.

use std::io;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use bytes::Bytes;

use super::changes::Changes;
use super::export::{Export, ExportError, ZeroOptions};
use super::proto::context::BASE_ALLOCATION;
use super::proto::{BlockSizes, ContextName, StatusExtent};
use crate::cbt::ReadMap;
use crate::filter::dm::{MappedError, MappedImage};

/// What zeroes are written in pieces of, in bytes.
const PIECE: u64 = 1 << 20;

/// An image that is a snapshot device.
#[derive(Debug)]
pub struct MappedExport {
    name: String,
    description: String,
    image: MappedImage,
    sizes: BlockSizes,
    /// With what was written to the image.
    changes: Option<RwLock<Changes>>,
}

impl MappedExport {
    /// The image as `name`.
    #[must_use]
    pub fn new(name: impl Into<String>, description: impl Into<String>, image: MappedImage) -> Self {
        Self {
            name: name.into(),
            description: description.into(),
            image,
            sizes: BlockSizes::new(1, 4096, 32 << 20).unwrap_or(BlockSizes::DEFAULT),
            changes: None,
        }
    }

    /// With the contexts of all changes that `map`, which is of the same instant, knows of.
    #[must_use]
    pub fn with_changes(mut self, map: Arc<ReadMap>) -> Self {
        self.changes = Some(RwLock::new(Changes::of(map, self.image.size())));
        self
    }

    fn changes(&self) -> Option<RwLockReadGuard<'_, Changes>> {
        let changes = self.changes.as_ref()?;
        Some(changes.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write(&self, data: &[u8], offset: u64) -> Result<(), ExportError> {
        if let Some(changes) = &self.changes {
            let mut changes = changes.write().unwrap_or_else(PoisonError::into_inner);
            changes.mark(offset, data.len() as u64);
        }
        self.image
            .write_at(data, offset)
            .map_err(self.failed("write", offset))
    }

    fn failed(&self, action: &'static str, offset: u64) -> impl Fn(MappedError) -> ExportError {
        let name = self.name.clone();
        move |error| match error {
            MappedError::Lost(condition) => ExportError::Corrupted {
                name: name.clone(),
                reason: condition.why().to_owned(),
            },
            other => ExportError::Io {
                name: name.clone(),
                action,
                offset,
                source: io::Error::from_raw_os_error(other.errno()),
            },
        }
    }
}

impl Export for MappedExport {
    fn name(&self) -> &str {
        &self.name
    }

    fn description(&self) -> &str {
        &self.description
    }

    fn size(&self) -> u64 {
        self.image.size()
    }

    fn block_sizes(&self) -> BlockSizes {
        self.sizes
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), ExportError> {
        self.image
            .read_at(buffer, offset)
            .map_err(self.failed("read", offset))
    }

    fn write_at(&self, data: Bytes, offset: u64, fua: bool) -> Result<(), ExportError> {
        self.write(&data, offset)?;
        if fua { self.flush() } else { Ok(()) }
    }

    fn trim(&self, _offset: u64, _length: u64, fua: bool) -> Result<(), ExportError> {
        // What is not needed any more stays as it is: that is always right.
        if fua { self.flush() } else { Ok(()) }
    }

    fn write_zeroes(&self, offset: u64, length: u64, options: ZeroOptions) -> Result<(), ExportError> {
        if options.fast {
            return Err(ExportError::NotFast {
                name: self.name.clone(),
                offset,
            });
        }
        let zeroes = vec![0; usize::try_from(PIECE.min(length)).unwrap_or_default()];
        let end = offset.saturating_add(length);
        let mut at = offset;
        while at < end {
            let piece = usize::try_from(PIECE.min(end - at)).unwrap_or_default();
            self.write(&zeroes[..piece], at)?;
            at += piece as u64;
        }
        if options.fua { self.flush() } else { Ok(()) }
    }

    fn flush(&self) -> Result<(), ExportError> {
        self.image.flush().map_err(self.failed("make durable", 0))
    }

    fn contexts(&self) -> Vec<ContextName> {
        let mut contexts = vec![ContextName::base_allocation()];
        contexts.extend(self.changes().iter().flat_map(|changes| changes.contexts()));
        contexts
    }

    fn refuse_context(&self, query: &str) -> Option<String> {
        Some(self.changes()?.refusal(query)?.to_string())
    }

    fn block_status(
        &self,
        context: &ContextName,
        offset: u64,
        length: u64,
        most: usize,
    ) -> Result<Vec<StatusExtent>, ExportError> {
        let end = offset.saturating_add(length).min(self.size());
        match (context.as_str(), self.changes()) {
            // Device-mapper does not tell of holes.
            (BASE_ALLOCATION, _) => Ok(vec![StatusExtent {
                length: end.saturating_sub(offset),
                flags: 0,
            }]),
            (context, Some(changes)) => {
                changes
                    .status(context, offset, end, most)
                    .map_err(|error| ExportError::Changes {
                        name: self.name.clone(),
                        reason: error.to_string(),
                    })
            }
            _ => Err(ExportError::NoContext {
                name: self.name.clone(),
                context: context.as_str().to_owned(),
            }),
        }
    }
}

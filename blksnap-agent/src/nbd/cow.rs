//! Copy-on-write exports: devices that the agent serves, and images of snapshots that are held.
//!
//! Both are read and written through calls, not through a file: a write to the device waits until its old data is
//! kept, and an image is made of several places.

use std::io;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use bytes::Bytes;
use nix::errno::Errno;

use super::changes::Changes;
use super::export::{Export, ExportError, ZeroOptions};
use super::proto::context::BASE_ALLOCATION;
use super::proto::wire::AllocationState;
use super::proto::{BlockSizes, ContextName, StatusExtent};
use crate::cbt::ReadMap;
use crate::disk::{Allocation, Zero};
use crate::engine::cow::ImageError;
use crate::engine::cow::Origin;
use crate::filter::held::HeldImage;
use crate::filter::served::Served;

/// Most extents in one answer about allocation.
const MOST: usize = 1 << 12;

/// A device that the agent serves.
#[derive(Debug)]
pub struct ServedExport {
    name: String,
    description: String,
    served: Arc<Served>,
    sizes: BlockSizes,
}

/// The block sizes of a device: what a client need not keep to, and what is best.
fn block_sizes(origin: &Origin) -> BlockSizes {
    let disk = origin.disk();
    let preferred = disk.minimum_io().max(4096);
    // A size that is no multiple of the logical block, as files may have, is reached by bytes.
    BlockSizes::new(1, preferred, 32 << 20).unwrap_or(BlockSizes::DEFAULT)
}

impl ServedExport {
    /// The device under its own name.
    #[must_use]
    pub fn new(served: Arc<Served>) -> Self {
        Self {
            name: served.name().to_owned(),
            description: format!("{}, served", served.path().display()),
            sizes: block_sizes(served.origin()),
            served,
        }
    }

    fn failed(&self, action: &'static str, offset: u64) -> impl FnOnce(io::Error) -> ExportError {
        let name = self.name.clone();
        move |source| ExportError::Io {
            name,
            action,
            offset,
            source,
        }
    }
}

impl Export for ServedExport {
    fn name(&self) -> &str {
        &self.name
    }

    fn description(&self) -> &str {
        &self.description
    }

    fn size(&self) -> u64 {
        self.served.size()
    }

    fn block_sizes(&self) -> BlockSizes {
        self.sizes
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), ExportError> {
        self.served
            .read_at(buffer, offset)
            .map_err(self.failed("read", offset))
    }

    fn write_at(&self, data: Bytes, offset: u64, fua: bool) -> Result<(), ExportError> {
        self.served
            .write_at(&data, offset, fua)
            .map_err(self.failed("write", offset))
    }

    fn trim(&self, offset: u64, length: u64, fua: bool) -> Result<(), ExportError> {
        self.served
            .discard_at(offset, length, fua)
            .map_err(self.failed("discard", offset))
    }

    fn write_zeroes(&self, offset: u64, length: u64, options: ZeroOptions) -> Result<(), ExportError> {
        let done = self
            .served
            .zero_at(offset, length, zero_of(options), options.fast, options.fua);
        match done {
            Err(error) if options.fast && error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => {
                Err(ExportError::NotFast {
                    name: self.name.clone(),
                    offset,
                })
            }
            done => done.map_err(self.failed("write zeroes", offset)),
        }
    }

    fn flush(&self) -> Result<(), ExportError> {
        self.served.flush().map_err(self.failed("make durable", 0))
    }

    fn contexts(&self) -> Vec<ContextName> {
        vec![ContextName::base_allocation()]
    }

    fn block_status(
        &self,
        context: &ContextName,
        offset: u64,
        length: u64,
        most: usize,
    ) -> Result<Vec<StatusExtent>, ExportError> {
        if context.as_str() != BASE_ALLOCATION {
            return Err(no_context(&self.name, context));
        }
        let end = offset.saturating_add(length).min(self.size());
        self.served
            .allocation(offset, end - offset, most.min(MOST))
            .map(|known| status(&known))
            .map_err(self.failed("look for holes", offset))
    }
}

/// An image of a device whose writes are held.
#[derive(Debug)]
pub struct HeldExport {
    name: String,
    description: String,
    image: HeldImage,
    sizes: BlockSizes,
    /// With what was written to the image.
    changes: Option<RwLock<Changes>>,
}

impl HeldExport {
    /// The image as `name`.
    #[must_use]
    pub fn new(name: impl Into<String>, description: impl Into<String>, image: HeldImage) -> Self {
        Self {
            name: name.into(),
            description: description.into(),
            sizes: block_sizes(image.origin()),
            image,
            changes: None,
        }
    }

    /// With the contexts of all changes that `map`, which is of the same instant, knows of.
    #[must_use]
    pub fn with_changes(mut self, map: Arc<ReadMap>) -> Self {
        self.changes = Some(RwLock::new(Changes::of(map, self.image.image().size())));
        self
    }

    fn changes(&self) -> Option<RwLockReadGuard<'_, Changes>> {
        let changes = self.changes.as_ref()?;
        Some(changes.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Bytes of the image are about to be written.
    fn mark(&self, offset: u64, length: u64) {
        if let Some(changes) = &self.changes {
            let mut changes = changes.write().unwrap_or_else(PoisonError::into_inner);
            changes.mark(offset, length);
        }
    }

    fn failed(&self, action: &'static str, offset: u64) -> impl FnOnce(ImageError) -> ExportError {
        let name = self.name.clone();
        move |error| match error {
            ImageError::Gone => ExportError::Removed(name),
            ImageError::Broken(errno) => ExportError::Corrupted {
                name,
                reason: format!(
                    "the snapshot lost what it kept: {}",
                    io::Error::from_raw_os_error(errno)
                ),
            },
            other => ExportError::Io {
                name,
                action,
                offset,
                source: io::Error::from_raw_os_error(other.errno()),
            },
        }
    }
}

impl Export for HeldExport {
    fn name(&self) -> &str {
        &self.name
    }

    fn description(&self) -> &str {
        &self.description
    }

    fn size(&self) -> u64 {
        self.image.image().size()
    }

    fn block_sizes(&self) -> BlockSizes {
        self.sizes
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), ExportError> {
        let image = self.image.image();
        image.read_at(buffer, offset).map_err(self.failed("read", offset))
    }

    fn write_at(&self, data: Bytes, offset: u64, fua: bool) -> Result<(), ExportError> {
        self.mark(offset, data.len() as u64);
        self.image
            .write_at(&data, offset)
            .map_err(self.failed("write", offset))?;
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
        self.mark(offset, length);
        self.image
            .zero_at(offset, length, zero_of(options))
            .map_err(self.failed("write zeroes", offset))?;
        if options.fua { self.flush() } else { Ok(()) }
    }

    fn flush(&self) -> Result<(), ExportError> {
        self.image.image().flush().map_err(self.failed("make durable", 0))
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
            (BASE_ALLOCATION, _) => self
                .image
                .image()
                .allocation(offset, end - offset, most.min(MOST))
                .map(|known| status(&known))
                .map_err(self.failed("look for holes", offset)),
            (context, Some(changes)) => {
                changes
                    .status(context, offset, end, most)
                    .map_err(|error| ExportError::Changes {
                        name: self.name.clone(),
                        reason: error.to_string(),
                    })
            }
            _ => Err(no_context(&self.name, context)),
        }
    }
}

fn no_context(name: &str, context: &ContextName) -> ExportError {
    ExportError::NoContext {
        name: name.to_owned(),
        context: context.as_str().to_owned(),
    }
}

const fn zero_of(options: ZeroOptions) -> Zero {
    if options.no_hole {
        Zero::Keep
    } else {
        Zero::Deallocate
    }
}

fn status(known: &[Allocation]) -> Vec<StatusExtent> {
    let hole = AllocationState::HOLE | AllocationState::ZERO;
    known
        .iter()
        .map(|part| StatusExtent {
            length: part.length,
            flags: if part.hole { hole.bits() } else { 0 },
        })
        .collect()
}

//! Testing: an export of which nothing matters but its name and its sizes.

use super::export::{Export, ExportError};
use super::proto::{BlockSizes, ContextName, StatusExtent};

/// Reads as bytes of 1.
#[derive(Debug)]
pub(super) struct Ones {
    pub(super) name: &'static str,
    /// Bytes.
    pub(super) size: u64,
    /// Smallest block.
    pub(super) block: u32,
}

impl Ones {
    /// 4096 bytes with this name.
    pub(super) const fn new(name: &'static str) -> Self {
        Self {
            name,
            size: 4096,
            block: 1,
        }
    }
}

impl Export for Ones {
    fn name(&self) -> &str {
        self.name
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn block_sizes(&self) -> BlockSizes {
        BlockSizes::new(self.block, 4096, 1 << 20).unwrap()
    }

    fn read_at(&self, buffer: &mut [u8], _offset: u64) -> Result<(), ExportError> {
        buffer.fill(1);
        Ok(())
    }

    fn block_status(
        &self,
        _: &ContextName,
        _: u64,
        length: u64,
        _: usize,
    ) -> Result<Vec<StatusExtent>, ExportError> {
        Ok(vec![StatusExtent { length, flags: 0 }])
    }
}

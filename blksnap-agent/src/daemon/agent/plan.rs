//! Plan: how a device would be tracked, and what that takes.

use super::Agent;
use crate::cbt::{CbtMap, TrackingParams};
use crate::control::api;
use crate::control::error::{ApiError, Code};
use crate::disk::BlockDevice;
use crate::tracker::Granularity;
use crate::units::BlockSize;

impl Agent {
    /// What the attach of a request would do.
    pub(super) fn plan_attach(&self, request: &api::Attach) -> Result<api::AttachPlan, ApiError> {
        let path = &request.device;
        let action = format!("plan to attach {path}");
        let device = Self::open(path, "plan to attach")?;
        let granularity = self.granularity(request, &action)?;
        let (block_size, memory) = self.check_memory(&device, granularity, &action)?;
        Ok(api::AttachPlan {
            capacity: device.capacity.bytes(),
            block_size: block_size.bytes(),
            block_count: block_size.blocks_in(device.capacity),
            memory,
            attached: self
                .tracker
                .device(device.id)
                .is_some_and(|tracked| tracked.lost().is_none()),
            device: device.path.display().to_string(),
        })
    }

    /// The block size that a request asks for, or the parameters that choose it.
    pub(super) fn granularity(&self, request: &api::Attach, action: &str) -> Result<Granularity, ApiError> {
        let parameters = (
            request.tracking_block_minimum_shift,
            request.tracking_block_maximum_count,
            request.tracking_block_maximum_shift,
        );
        let invalid = |error: &dyn std::error::Error| ApiError::of(Code::InvalidRequest, action, error);
        match (request.block_size, parameters) {
            (None, (minimum, count, maximum)) => TrackingParams::new(
                minimum.unwrap_or(self.parameters.minimum_shift()),
                count.unwrap_or(self.parameters.maximum_count()),
                maximum.unwrap_or(self.parameters.maximum_shift()),
            )
            .map(Granularity::Adaptive)
            .map_err(|error| invalid(&error)),
            (Some(bytes), (None, None, None)) => BlockSize::from_bytes(bytes)
                .map(Granularity::Fixed)
                .map_err(|error| invalid(&error)),
            (Some(_), _) => Err(ApiError::new(
                Code::InvalidRequest,
                format!("{action}: a block size and parameters that choose one"),
                "give one of the two",
            )),
        }
    }

    /// The size of a block, and the memory that tracking in such blocks takes, if it may take that much.
    pub(super) fn check_memory(
        &self,
        device: &BlockDevice,
        granularity: Granularity,
        action: &str,
    ) -> Result<(BlockSize, api::Memory), ApiError> {
        let block_size = granularity.block_size(device);
        let blocks = block_size.blocks_in(device.capacity);
        let memory = self.memory(blocks);
        if blocks > CbtMap::MAX_BLOCKS || memory.total() > self.memory_limit {
            return Err(ApiError::new(
                Code::MemoryLimit,
                format!(
                    "{action}: {blocks} blocks of {} bytes take {} bytes of memory, and {} are allowed",
                    block_size.bytes(),
                    memory.total(),
                    self.memory_limit
                ),
                "choose larger blocks, or raise --memory-limit of the daemon",
            ));
        }
        Ok((block_size, memory))
    }

    /// What tracking in `blocks` blocks takes.
    pub(super) fn memory(&self, blocks: u64) -> api::Memory {
        api::Memory {
            map_bytes: blocks.saturating_mul(2),
            bitmap_bytes: self.tracker.bitmap_bytes(blocks),
        }
    }
}

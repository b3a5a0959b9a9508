//! Marks: ranges and files that count as changed because somebody says so.

use std::path::Path;
use std::sync::Arc;

use super::super::errors::Tell as _;
use super::Agent;
use crate::control::api;
use crate::control::error::{ApiError, Code};
use crate::disk::extents;
use crate::filter::served::Served;
use crate::tracker::{MarkError, TrackedDevice};
use crate::units::{Extent, SECTOR_BYTES, Sectors};

/// Whose map is marked.
enum Subject {
    Served(Arc<Served>),
    Tracked(Arc<TrackedDevice>),
}

impl Agent {
    pub(super) fn mark(&self, request: &api::Mark) -> Result<api::Marked, ApiError> {
        let action = format!("mark ranges of {}", request.device);
        let subject = match self.served.find(&request.device) {
            Some(served) => Subject::Served(served),
            None => Subject::Tracked(self.tracked(&request.device, "mark ranges of")?),
        };
        let capacity = match &subject {
            Subject::Served(served) => served.size(),
            Subject::Tracked(device) => device.device().capacity.bytes(),
        };
        let mut ranges = Vec::with_capacity(request.ranges.len());
        for range in &request.ranges {
            let end = range.offset.checked_add(range.length);
            let Some(end) = end.filter(|end| range.length > 0 && *end <= capacity) else {
                return Err(ApiError::new(
                    Code::OutOfRange,
                    format!(
                        "{action}: {}:{} is empty or ends past its {capacity} bytes",
                        range.offset, range.length,
                    ),
                    "give OFFSET:LENGTH within the device; nothing was marked",
                ));
            };
            let offset = range.offset / SECTOR_BYTES * SECTOR_BYTES;
            ranges.push(Extent {
                offset,
                length: end.next_multiple_of(SECTOR_BYTES) - offset,
            });
        }
        for file in &request.files {
            let Subject::Tracked(device) = &subject else {
                return Err(ApiError::new(
                    Code::Unsupported,
                    format!("{action}: nobody here knows the files in it"),
                    "give ranges",
                ));
            };
            if !file.starts_with('/') {
                return Err(ApiError::new(
                    Code::InvalidRequest,
                    format!("{action}: {file} is not an absolute path"),
                    "give the whole path of a file",
                ));
            }
            let found = extents::of_file(device.device(), Path::new(file)).map_err(|e| e.tell(&action))?;
            ranges.extend(found);
        }
        let ranges = extents::joined(ranges);
        let sectors: Vec<_> = ranges
            .iter()
            .map(|range| {
                (
                    Sectors::new(range.offset / SECTOR_BYTES),
                    Sectors::new(range.length / SECTOR_BYTES),
                )
            })
            .collect();
        let block = match &subject {
            Subject::Served(served) => {
                for range in &ranges {
                    served.changes().mark_both(range.offset, range.length);
                }
                served.changes().block_size()
            }
            Subject::Tracked(device) => {
                device.mark_both(&sectors).map_err(|error| match error {
                    MarkError::Range(error) => ApiError::of(Code::OutOfRange, &action, &error),
                    MarkError::Save(error) => error.tell(&action),
                })?;
                device.block_size()
            }
        };
        Ok(api::Marked {
            blocks: blocks(&ranges, block.bytes()),
            ranges: ranges.len() as u64,
            bytes: ranges.iter().map(|range| range.length).sum(),
        })
    }
}

/// Blocks that ascending ranges touch, each counted once.
fn blocks(ranges: &[Extent], block: u64) -> u64 {
    let mut next = 0;
    let mut count = 0;
    for range in ranges {
        let first = (range.offset / block).max(next);
        let end = range.end().div_ceil(block);
        count += end.saturating_sub(first);
        next = next.max(end);
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(offset: u64, length: u64) -> Extent {
        Extent { offset, length }
    }

    #[test]
    fn every_block_is_counted_once() {
        let ranges = extents::joined(vec![
            extent(8192, 512),
            extent(0, 512),
            extent(1024, 512),
            extent(4096, 4096),
            extent(8704, 512),
        ]);
        assert_eq!(ranges, [extent(0, 512), extent(1024, 512), extent(4096, 5120)]);
        assert_eq!(blocks(&ranges, 4096), 3);
        assert_eq!(blocks(&ranges, 65536), 1);
        assert_eq!(blocks(&[], 4096), 0);
        assert_eq!(blocks(&[extent(4095, 2)], 4096), 2);
    }
}

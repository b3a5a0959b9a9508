//! Buffers: memory for data on its way, used again and again.
//!
//! Fresh memory costs a page fault and zeroes for every page, more than the copy that it is for. Buffers of a few
//! sizes are kept, up to a bound; larger ones come and go. What a buffer held before is still in it: whoever sends
//! from it sends only what it has written.

use std::sync::{Arc, Mutex, PoisonError};

use crate::sys::AlignedBuffer;

/// Sizes that are kept, in bytes.
const SIZES: [usize; 3] = [64 << 10, 256 << 10, 1 << 20];
/// Most bytes that are kept of each size.
const KEPT: usize = 16 << 20;

#[derive(Debug, Default)]
struct Shelves([Mutex<Vec<AlignedBuffer>>; SIZES.len()]);

/// Memory that is lent out.
#[derive(Clone, Debug, Default)]
pub(super) struct Buffers(Arc<Shelves>);

impl Buffers {
    /// A buffer of at least `length` bytes, of which the first `length` are shown. Its content is arbitrary.
    pub(super) fn take(&self, length: usize) -> Buffer {
        let shelf = SIZES.iter().position(|size| length <= *size);
        let kept = shelf.and_then(|index| {
            self.0.0[index]
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .pop()
        });
        let memory =
            kept.unwrap_or_else(|| AlignedBuffer::zeroed(shelf.map_or(length, |index| SIZES[index]).max(1)));
        Buffer {
            memory: Some(memory),
            length,
            home: shelf.map(|index| (Arc::clone(&self.0), index)),
        }
    }
}

/// A lent buffer.
#[derive(Debug)]
pub(super) struct Buffer {
    /// Taken when it is dropped.
    memory: Option<AlignedBuffer>,
    length: usize,
    home: Option<(Arc<Shelves>, usize)>,
}

impl Buffer {
    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        let length = self.length;
        self.memory
            .as_mut()
            .map_or(&mut [], |memory| &mut memory.as_mut_slice()[..length])
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self.memory
            .as_ref()
            .map_or(&[], |memory| &memory.as_slice()[..self.length])
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let (Some(memory), Some((shelves, index))) = (self.memory.take(), self.home.take()) {
            let mut shelf = shelves.0[index].lock().unwrap_or_else(PoisonError::into_inner);
            if shelf.len() < KEPT / SIZES[index] {
                shelf.push(memory);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_and_large_ones_go() {
        let buffers = Buffers::default();
        let mut buffer = buffers.take(100);
        assert_eq!(buffer.as_ref().len(), 100);
        buffer.as_mut_slice().fill(7);
        let address = buffer.as_ref().as_ptr();
        drop(buffer);
        let again = buffers.take(64 << 10);
        assert_eq!(again.as_ref().as_ptr(), address);
        assert_eq!(again.as_ref().len(), 64 << 10);
        let other = buffers.take(1 << 20);
        assert_ne!(other.as_ref().as_ptr(), address);
        let large = buffers.take((1 << 20) + 1);
        assert_eq!(large.as_ref().len(), (1 << 20) + 1);
        drop((again, other, large));
        assert!(buffers.0.0.iter().all(|shelf| shelf.lock().unwrap().len() <= 1));
        assert_eq!(buffers.take(0).as_ref(), b"");
    }

    #[test]
    fn no_more_is_kept_than_the_bound() {
        let buffers = Buffers::default();
        let many: Vec<Buffer> = (0..100).map(|_| buffers.take(1 << 20)).collect();
        drop(many);
        assert_eq!(buffers.0.0[2].lock().unwrap().len(), KEPT >> 20);
    }
}

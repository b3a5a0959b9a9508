//! Aligned buffer: memory that direct I/O accepts.

use std::alloc::{self, Layout};
use std::ptr::NonNull;

/// Bytes in zeroed memory whose address is a multiple of [`AlignedBuffer::ALIGNMENT`]. `O_DIRECT` wants the
/// logical block size or less; no disk has one above 4096, except with blocks larger than a page, for which the
/// kernel still asks memory to be aligned to no more than a page.
#[derive(Debug)]
pub struct AlignedBuffer {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the memory belongs to this value alone, as that of a `Box<[u8]>`.
unsafe impl Send for AlignedBuffer {}
// SAFETY: shared references give read access only.
unsafe impl Sync for AlignedBuffer {}

impl AlignedBuffer {
    /// Alignment of the address in bytes.
    pub const ALIGNMENT: usize = 4096;

    /// `length` bytes of zeroes; `length` is rounded up to a multiple of the alignment.
    ///
    /// # Panics
    /// `length` is 0 or above `isize::MAX`, or there is no memory.
    #[must_use]
    pub fn zeroed(length: usize) -> Self {
        let length = length.next_multiple_of(Self::ALIGNMENT);
        let layout = Self::layout(length);
        assert!(length > 0, "an aligned buffer has at least one byte");
        // SAFETY: the layout's size is not 0.
        let start = unsafe { alloc::alloc_zeroed(layout) };
        match NonNull::new(start) {
            Some(start) => Self { start, length },
            None => alloc::handle_alloc_error(layout),
        }
    }

    fn layout(length: usize) -> Layout {
        Layout::from_size_align(length, Self::ALIGNMENT).expect("length of a buffer is below isize::MAX")
    }

    /// Length in bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub const fn len(&self) -> usize {
        self.length
    }

    /// The bytes.
    #[must_use]
    pub const fn as_slice(&self) -> &[u8] {
        // SAFETY: `start` points to `length` initialised bytes that this value owns.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }

    /// The bytes, to be changed.
    #[must_use]
    pub const fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }

    /// The address, for the kernel.
    pub(super) const fn address(&self) -> *mut u8 {
        self.start.as_ptr()
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: `start` came from `alloc_zeroed` with the same layout, and is freed once.
        unsafe { alloc::dealloc(self.start.as_ptr(), Self::layout(self.length)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_aligned_zeroed_and_rounded_up() {
        let mut buffer = AlignedBuffer::zeroed(5000);
        assert_eq!(buffer.len(), 8192);
        assert_eq!(buffer.as_slice().as_ptr().addr() % AlignedBuffer::ALIGNMENT, 0);
        assert!(buffer.as_slice().iter().all(|byte| *byte == 0));
        buffer.as_mut_slice()[8191] = 1;
        assert_eq!(buffer.as_slice()[8191], 1);
    }
}

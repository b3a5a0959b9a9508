//! Atomic operations on map values that the target's `core::sync::atomic` lacks.

use core::arch::asm;

/// Sets the bits of `mask` in `*word`.
///
/// # Safety
/// `word` points to an aligned word of a map value.
#[inline(always)]
pub unsafe fn or(word: *mut u64, mask: u64) {
    // SAFETY: the caller's contract; the verifier checks it again.
    unsafe {
        asm!("lock *(u64 *)({word} + 0) |= {mask}", word = in(reg) word, mask = in(reg) mask, options(nostack));
    }
}

/// Adds `n` to `*word`.
///
/// # Safety
/// `word` points to an aligned word of a map value.
#[inline(always)]
pub unsafe fn add(word: *mut u64, n: u64) {
    // SAFETY: the caller's contract; the verifier checks it again.
    unsafe {
        asm!("lock *(u64 *)({word} + 0) += {n}", word = in(reg) word, n = in(reg) n, options(nostack));
    }
}

/// Subtracts `n` from `*word` and gives the value before.
///
/// # Safety
/// `word` points to an aligned word of a map value.
#[inline(always)]
pub unsafe fn subtract(word: *mut u64, n: u64) -> u64 {
    let mut value = n.wrapping_neg();
    // SAFETY: the caller's contract; the verifier checks it again.
    unsafe {
        asm!("{value} = atomic_fetch_add((u64 *)({word} + 0), {value})", word = in(reg) word, value = inout(reg) value, options(nostack));
    }
    value
}

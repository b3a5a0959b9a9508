//! What the objects of this package share. The agent's build script depends on the package through this library, so
//! that cargo rebuilds the programs when they change. The programs are in `main.rs` and `gate/main.rs`, their
//! arithmetic in `blksnap-common`.
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
#![cfg_attr(
    target_arch = "bpf",
    expect(unstable_features, reason = "inline assembly for the BPF target")
)]
#![no_std]

#[cfg(target_arch = "bpf")]
pub mod atomic;

use blksnap_common::blockrange::{REQ_OP_MASK, kind_table};

/// What each operation code does.
static KINDS: [u8; 256] = kind_table();

/// What the operation of `opf` does, as the code of an `OpKind` or `NO_KIND`.
#[inline(always)]
#[must_use]
pub fn kind_of(opf: u32) -> u8 {
    // SAFETY: a load of a static; volatile, so that the compiler makes no branches of it again.
    unsafe { core::ptr::read_volatile(&raw const KINDS[(opf & REQ_OP_MASK) as usize]) }
}

//! eBPF programs of blksnap: what the block layer says about writes.
//!
//! Five BTF tracepoint programs, each a few lines that call into the modules:
//!
//! - `block_bio_queue` sees every bio once, on the device it was submitted to, with absolute sectors;
//! - `block_bio_remap` sees a bio that a stacking driver (md linear and raid0, NVMe multipath) redirects to a
//!   lower disk, where `block_bio_queue` does not fire a second time;
//! - `block_rq_issue` sees requests go to the driver, and counts commands past the block layer's writes;
//! - `block_rq_complete` and `block_bio_complete`, attached only while a copy is under way, see writes end.
//!
//! # What is true when
//! A bit is set before the bio goes on to the driver, so a closed bitmap holds every write that was submitted
//! before it was swapped out (replacing an element of a map in a map waits for running programs). The data
//! lands later: [`ledger`] marks a write again when it completes, for readers that can't stop the writers.
//!
//! # Offsets
//! Rust emits no CO-RE relocations. The agent looks the offsets of struct bio and struct block_device up in the
//! kernel's BTF and passes them as frozen globals ([`layout`]); the verifier treats them as constants.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]
#![cfg_attr(
    target_arch = "bpf",
    expect(unstable_features, reason = "inline assembly for the BPF target")
)]
#![cfg_attr(
    target_arch = "bpf",
    expect(
        clippy::cast_possible_truncation,
        reason = "slots and words are counted in 32 bits, a bio has less than 2^23 sectors, addresses have 64 bits"
    )
)]

#[cfg(target_arch = "bpf")]
mod layout;
#[cfg(target_arch = "bpf")]
mod ledger;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod mark;
#[cfg(target_arch = "bpf")]
mod passthrough;

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::macros::btf_tracepoint;
    use aya_ebpf::programs::BtfTracePointContext;

    use crate::layout::Bio;
    use crate::{ledger, mark, passthrough};

    /// `block_bio_queue(struct bio *)`.
    #[btf_tracepoint(function = "block_bio_queue")]
    pub(crate) fn block_bio_queue(ctx: BtfTracePointContext) -> i32 {
        mark::submitted(&ctx, &Bio::of_queue(&ctx), false);
        0
    }

    /// `block_bio_remap(struct bio *, dev_t, sector_t)`: counts where `block_bio_queue` fired already for an
    /// upper device and will not fire again. A partition's bio is remapped before it is queued, a clone of
    /// device-mapper is queued after: both are left to `block_bio_queue`.
    #[btf_tracepoint(function = "block_bio_remap")]
    pub(crate) fn block_bio_remap(ctx: BtfTracePointContext) -> i32 {
        let bio = Bio::of_queue(&ctx);
        if bio.is_traced() {
            mark::submitted(&ctx, &bio, true);
        }
        0
    }

    /// `block_rq_issue(struct request *)`.
    #[btf_tracepoint(function = "block_rq_issue")]
    pub(crate) fn block_rq_issue(ctx: BtfTracePointContext) -> i32 {
        passthrough::issued(&ctx);
        0
    }

    /// `block_bio_complete(struct request_queue *, struct bio *)`.
    #[btf_tracepoint(function = "block_bio_complete")]
    pub(crate) fn block_bio_complete(ctx: BtfTracePointContext) -> i32 {
        ledger::bio_completed(&Bio::of_complete(&ctx));
        0
    }

    /// `block_rq_complete(struct request *, blk_status_t, unsigned int)`.
    #[btf_tracepoint(function = "block_rq_complete")]
    pub(crate) fn block_rq_complete(ctx: BtfTracePointContext) -> i32 {
        ledger::request_completed(&ctx);
        0
    }

    /// Does nothing: what the hook itself costs. Only the benchmark loads it.
    #[btf_tracepoint(function = "block_bio_queue")]
    pub(crate) fn bench_empty(_ctx: BtfTracePointContext) -> i32 {
        0
    }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// License of the object: the helpers used are open to GPL-compatible programs only.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(target_arch = "bpf"))]
fn main() {}

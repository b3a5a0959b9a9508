//! Gate: programs that make the first write to a unit wait until its old data is kept.
//!
//! - `wait_0` to `wait_31`, one program many times over, on entry of `submit_bio_noacct`: process context, and the
//!   bio has gone nowhere yet. See [`hold`] for how they wait, and why there are many.
//! - `park_0` to `park_31`, in their place where the kernel has function error injection: sleepable programs on entry of
//!   `should_fail_bio`, which `submit_bio_noacct` calls. See [`park`].
//! - `audit_queue` and `audit_remap`, at `block_bio_queue` and `block_bio_remap`: every write comes by here, and one
//!   that gets here with old data not kept breaks the gate, in the same instant and before it reaches the driver.
//!
//! That images are right rests on the auditors alone: whatever the others miss, is late, or is switched off, shows.
//!
//! # Offsets
//! As in the tracking programs: found by the agent in the kernel's type information, and passed as frozen globals.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]
#![cfg_attr(
    target_arch = "bpf",
    expect(unstable_features, reason = "inline assembly for the BPF target")
)]
#![cfg_attr(
    target_arch = "bpf",
    expect(
        clippy::cast_possible_truncation,
        reason = "gates and words are counted in 32 bits, a bio has less than 2^23 sectors"
    )
)]

#[cfg(target_arch = "bpf")]
mod bio;
#[cfg(target_arch = "bpf")]
mod hold;
#[cfg(target_arch = "bpf")]
mod look;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod park;

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::macros::{btf_tracepoint, fentry};
    use aya_ebpf::programs::{BtfTracePointContext, FEntryContext};

    use crate::bio::Bio;
    use crate::look;

    /// Copies of the waiting program. Each has its own number as a constant.
    macro_rules! copies {
        ($($name:ident $number:literal),* $(,)?) => {$(
            /// `submit_bio_noacct(struct bio *)`.
            #[fentry(function = "submit_bio_noacct")]
            pub(crate) fn $name(ctx: FEntryContext) -> i32 {
                look::submitted(&Bio::first_argument(&ctx), $number);
                0
            }
        )*};
    }

    copies!(
        wait_0 0, wait_1 1, wait_2 2, wait_3 3, wait_4 4, wait_5 5, wait_6 6, wait_7 7,
        wait_8 8, wait_9 9, wait_10 10, wait_11 11, wait_12 12, wait_13 13, wait_14 14, wait_15 15,
        wait_16 16, wait_17 17, wait_18 18, wait_19 19, wait_20 20, wait_21 21, wait_22 22, wait_23 23,
        wait_24 24, wait_25 25, wait_26 26, wait_27 27, wait_28 28, wait_29 29, wait_30 30, wait_31 31,
    );

    /// Copies of the program that sleeps.
    macro_rules! sleeping_copies {
        ($($name:ident $number:literal),* $(,)?) => {$(
            /// `should_fail_bio(struct bio *)`.
            #[fentry(sleepable, function = "should_fail_bio")]
            pub(crate) fn $name(ctx: FEntryContext) -> i32 {
                look::submitted_to_sleep(&Bio::first_argument(&ctx), $number);
                0
            }
        )*};
    }

    sleeping_copies!(
        park_0 0, park_1 1, park_2 2, park_3 3, park_4 4, park_5 5, park_6 6, park_7 7,
        park_8 8, park_9 9, park_10 10, park_11 11, park_12 12, park_13 13, park_14 14, park_15 15,
        park_16 16, park_17 17, park_18 18, park_19 19, park_20 20, park_21 21, park_22 22, park_23 23,
        park_24 24, park_25 25, park_26 26, park_27 27, park_28 28, park_29 29, park_30 30, park_31 31,
    );

    /// `block_bio_queue(struct bio *)`.
    #[btf_tracepoint(function = "block_bio_queue")]
    pub(crate) fn audit_queue(ctx: BtfTracePointContext) -> i32 {
        look::audited(&Bio::first_argument(&ctx));
        0
    }

    /// `block_bio_remap(struct bio *, dev_t, sector_t)`: where `block_bio_queue` does not fire a second time, as for
    /// the tracking programs.
    #[btf_tracepoint(function = "block_bio_remap")]
    pub(crate) fn audit_remap(ctx: BtfTracePointContext) -> i32 {
        let bio = Bio::first_argument(&ctx);
        if bio.is_traced() {
            look::audited(&bio);
        }
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

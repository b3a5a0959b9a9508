//! Bio: what the gate's programs read of one, by offsets found at load time.

use core::arch::asm;
use core::ptr::read_volatile;

use aya_ebpf::{EbpfContext, Global};

/// Value of a global before the loader sets it; no other constant of the programs has it.
const UNSET: u32 = 0xb10c_0ff5;

/// Offset of `bio.bi_bdev` in bytes; so are the ones below.
#[unsafe(no_mangle)]
static BIO_BDEV: Global<u32> = Global::new(UNSET);
/// `bio.bi_opf`.
#[unsafe(no_mangle)]
static BIO_OPF: Global<u32> = Global::new(UNSET);
/// `bio.bi_flags`, 16 bits.
#[unsafe(no_mangle)]
static BIO_FLAGS: Global<u32> = Global::new(UNSET);
/// `bio.bi_iter.bi_sector`.
#[unsafe(no_mangle)]
static BIO_SECTOR: Global<u32> = Global::new(UNSET);
/// `bio.bi_iter.bi_size`.
#[unsafe(no_mangle)]
static BIO_SIZE: Global<u32> = Global::new(UNSET);
/// `block_device.bd_disk`.
#[unsafe(no_mangle)]
static BDEV_DISK: Global<u32> = Global::new(UNSET);
/// `block_device.bd_dev`.
#[unsafe(no_mangle)]
static BDEV_DEV: Global<u32> = Global::new(UNSET);
/// `block_device.bd_start_sect`.
#[unsafe(no_mangle)]
static BDEV_START: Global<u32> = Global::new(UNSET);
/// `gendisk.part0`.
#[unsafe(no_mangle)]
static DISK_PART0: Global<u32> = Global::new(UNSET);
/// Bit number of `BIO_TRACE_COMPLETION` in `bi_flags`.
#[unsafe(no_mangle)]
static TRACE_COMPLETION_BIT: Global<u32> = Global::new(UNSET);
/// Bit number of `BIO_REMAPPED` in `bi_flags`.
#[unsafe(no_mangle)]
static REMAPPED_BIT: Global<u32> = Global::new(UNSET);

/// The field of type `T` at `offset` of the kernel object at `base`.
///
/// # Safety
/// `base` is a pointer that the verifier knows as one to a kernel type; it rejects a wrong offset, and a bad address
/// reads as 0.
#[inline(always)]
unsafe fn field<T: Copy>(base: *const u8, offset: &Global<u32>) -> T {
    // SAFETY: the caller's contract.
    unsafe { read_volatile(base.add(offset.load() as usize).cast::<T>()) }
}

/// A bio, borrowed from the hook.
pub(crate) struct Bio {
    address: *const u8,
}

impl Bio {
    /// The bio that is the first argument of the hook. The context may only be read at constant offsets, so the load
    /// is an instruction of its own.
    #[inline(always)]
    pub(crate) fn first_argument(ctx: &impl EbpfContext) -> Self {
        let address: *const u8;
        // SAFETY: the context of these hooks is an array of 64-bit arguments.
        unsafe { asm!("{to} = *(u64 *)({ctx} + 0)", to = out(reg) address, ctx = in(reg) ctx.as_ptr()) };
        Self { address }
    }

    /// `bi_opf`.
    #[inline(always)]
    pub(crate) fn opf(&self) -> u32 {
        // SAFETY: `address` is an argument of the hook.
        unsafe { field(self.address, &BIO_OPF) }
    }

    /// `bi_flags`.
    #[inline(always)]
    pub(crate) fn flags(&self) -> u16 {
        // SAFETY: as above.
        unsafe { field(self.address, &BIO_FLAGS) }
    }

    /// `bi_iter.bi_sector`: on the device, or on the disk if the bio was remapped.
    #[inline(always)]
    pub(crate) fn sector(&self) -> u64 {
        // SAFETY: as above.
        unsafe { field(self.address, &BIO_SECTOR) }
    }

    /// Length in bytes.
    #[inline(always)]
    pub(crate) fn size(&self) -> u32 {
        // SAFETY: as above.
        unsafe { field(self.address, &BIO_SIZE) }
    }

    /// The block device.
    #[inline(always)]
    pub(crate) fn device(&self) -> Device {
        Device {
            // SAFETY: as above.
            address: unsafe { field(self.address, &BIO_BDEV) },
        }
    }

    /// Whether its sector counts from the disk's beginning already (`BIO_REMAPPED`).
    #[inline(always)]
    pub(crate) fn is_remapped(&self) -> bool {
        u32::from(self.flags()) >> (REMAPPED_BIT.load() & 15) & 1 == 1
    }

    /// Whether `block_bio_queue` fired for this bio (`BIO_TRACE_COMPLETION`).
    #[inline(always)]
    pub(crate) fn is_traced(&self) -> bool {
        u32::from(self.flags()) >> (TRACE_COMPLETION_BIT.load() & 15) & 1 == 1
    }
}

/// A block device: a disk or a partition.
pub(crate) struct Device {
    address: *const u8,
}

impl Device {
    /// The address.
    #[inline(always)]
    pub(crate) fn key(&self) -> u64 {
        self.address as u64
    }

    /// First sector on the disk.
    #[inline(always)]
    pub(crate) fn start(&self) -> u64 {
        // SAFETY: the address comes from a field of that type; a null one reads as 0.
        unsafe { field(self.address, &BDEV_START) }
    }

    /// The whole disk's `dev_t` as the kernel keeps it.
    #[inline(always)]
    pub(crate) fn disk(&self) -> u32 {
        // SAFETY: as above.
        unsafe {
            let disk: *const u8 = field(self.address, &BDEV_DISK);
            let part0: *const u8 = field(disk, &DISK_PART0);
            field(part0, &BDEV_DEV)
        }
    }
}

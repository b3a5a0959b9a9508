//! Layout: the kernel structs that the programs read, by offsets found at load time.

use core::arch::asm;
use core::ptr::read_volatile;

use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::programs::BtfTracePointContext;
use aya_ebpf::{EbpfContext, Global};
use blksnap_common::blockrange::REQ_OP_MASK;
use blksnap_common::passthrough::{COMMAND_BYTES, Direction};

/// Value of a global before the loader sets it. No other constant of the programs has it: the compiler may
/// give equal constants one address, and would then read a key of 0 from a global that the loader changed.
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
/// `gendisk.part0`.
#[unsafe(no_mangle)]
static DISK_PART0: Global<u32> = Global::new(UNSET);
/// `bio.bi_next`.
#[unsafe(no_mangle)]
static BIO_NEXT: Global<u32> = Global::new(UNSET);
/// `bio.bi_private`.
#[unsafe(no_mangle)]
static BIO_PRIVATE: Global<u32> = Global::new(UNSET);
/// `request.bio`.
#[unsafe(no_mangle)]
static REQUEST_BIO: Global<u32> = Global::new(UNSET);
/// Bit number of `BIO_TRACE_COMPLETION` in `bi_flags`.
#[unsafe(no_mangle)]
static TRACE_COMPLETION_BIT: Global<u32> = Global::new(UNSET);
/// `request.cmd_flags`.
#[unsafe(no_mangle)]
static REQUEST_FLAGS: Global<u32> = Global::new(UNSET);
/// `request.__data_len`.
#[unsafe(no_mangle)]
static REQUEST_BYTES: Global<u32> = Global::new(UNSET);
/// `request.q`.
#[unsafe(no_mangle)]
static REQUEST_QUEUE: Global<u32> = Global::new(UNSET);
/// `request_queue.disk`.
#[unsafe(no_mangle)]
static QUEUE_DISK: Global<u32> = Global::new(UNSET);
/// `gendisk.flags`.
#[unsafe(no_mangle)]
static DISK_GENHD_FLAGS: Global<u32> = Global::new(UNSET);
/// `GENHD_FL_HIDDEN`.
#[unsafe(no_mangle)]
static HIDDEN_FLAG: Global<u32> = Global::new(UNSET);
/// `REQ_OP_DRV_IN`.
#[unsafe(no_mangle)]
static OP_DRV_IN: Global<u32> = Global::new(UNSET);
/// `REQ_OP_DRV_OUT`.
#[unsafe(no_mangle)]
static OP_DRV_OUT: Global<u32> = Global::new(UNSET);
/// From a request to the CDB in the driver's part behind it.
#[unsafe(no_mangle)]
static SCSI_CDB: Global<u32> = Global::new(UNSET);
/// From a request to the pointer to an NVMe command in the driver's part behind it.
#[unsafe(no_mangle)]
static NVME_COMMAND: Global<u32> = Global::new(UNSET);
/// Index of the bio among the arguments of `block_bio_complete`.
#[unsafe(no_mangle)]
static COMPLETE_BIO_ARG: Global<u32> = Global::new(UNSET);

/// The field of type `T` at `offset` of the kernel object at `base`.
///
/// # Safety
/// `base` is a pointer that the verifier knows as one to a kernel type; it rejects a wrong offset, and a bad
/// address reads as 0.
#[inline(always)]
unsafe fn field<T: Copy>(base: *const u8, offset: &Global<u32>) -> T {
    // SAFETY: the caller's contract.
    unsafe { read_volatile(base.add(offset.load() as usize).cast::<T>()) }
}

/// A bio, borrowed from the tracepoint.
pub(crate) struct Bio {
    address: *const u8,
}

impl Bio {
    /// The bio of `block_bio_queue` and `block_bio_remap`.
    #[inline(always)]
    pub(crate) fn of_queue(ctx: &BtfTracePointContext) -> Self {
        Self {
            address: first_argument(ctx),
        }
    }

    /// The bio of `block_bio_complete`.
    #[inline(always)]
    pub(crate) fn of_complete(ctx: &BtfTracePointContext) -> Self {
        if COMPLETE_BIO_ARG.load() == 0 {
            Self {
                address: first_argument(ctx),
            }
        } else {
            Self {
                address: second_argument(ctx),
            }
        }
    }

    /// The address, which names the bio while it is in flight.
    #[inline(always)]
    pub(crate) fn key(&self) -> u64 {
        self.address as u64
    }

    /// `bi_opf`.
    #[inline(always)]
    pub(crate) fn opf(&self) -> u32 {
        // SAFETY: `address` is an argument of the tracepoint.
        unsafe { field(self.address, &BIO_OPF) }
    }

    /// First sector, absolute on the disk at both hooks.
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

    /// The whole disk's `dev_t` as the kernel keeps it.
    #[inline(always)]
    pub(crate) fn disk(&self) -> u32 {
        // SAFETY: each pointer comes from a field of that type; a null one reads as 0.
        unsafe {
            let bdev: *const u8 = field(self.address, &BIO_BDEV);
            let disk: *const u8 = field(bdev, &BDEV_DISK);
            let part0: *const u8 = field(disk, &DISK_PART0);
            field(part0, &BDEV_DEV)
        }
    }

    /// Whether `block_bio_queue` fired for this bio (`BIO_TRACE_COMPLETION`).
    #[inline(always)]
    pub(crate) fn is_traced(&self) -> bool {
        // SAFETY: as above.
        let flags: u16 = unsafe { field(self.address, &BIO_FLAGS) };
        u32::from(flags) >> (TRACE_COMPLETION_BIT.load() & 15) & 1 == 1
    }
}

/// A bio by its address alone, as found in a list: read field by field, a bad address reads as 0.
#[derive(Clone, Copy)]
pub(crate) struct ListedBio(u64);

impl ListedBio {
    /// The first bio of the request that `block_rq_complete` tells of; the tracepoint fires before any of them
    /// is advanced (`blk_update_request`, `blk_complete_request`).
    #[inline(always)]
    pub(crate) fn first_of_request(ctx: &BtfTracePointContext) -> Self {
        // SAFETY: the first argument is a `struct request *`.
        let bio: *const u8 = unsafe { field(first_argument(ctx), &REQUEST_BIO) };
        Self(bio as u64)
    }

    /// The bio at `address`.
    #[inline(always)]
    pub(crate) const fn at(address: u64) -> Self {
        Self(address)
    }

    /// The address; 0 at the end of a list.
    #[inline(always)]
    pub(crate) const fn key(self) -> u64 {
        self.0
    }

    /// `bi_next`.
    #[inline(always)]
    pub(crate) fn next(self) -> Self {
        Self(peek(self.0, &BIO_NEXT))
    }

    /// `bi_private`: the address of the parent, for a part that the block layer split off (`bio_chain`).
    #[inline(always)]
    pub(crate) fn private(self) -> u64 {
        peek(self.0, &BIO_PRIVATE)
    }

    /// `bi_opf`.
    #[inline(always)]
    pub(crate) fn opf(self) -> u32 {
        peek(self.0, &BIO_OPF)
    }

    /// First sector on the disk that is still to be done.
    #[inline(always)]
    pub(crate) fn sector(self) -> u64 {
        peek(self.0, &BIO_SECTOR)
    }

    /// Bytes that are still to be done.
    #[inline(always)]
    pub(crate) fn size(self) -> u32 {
        peek(self.0, &BIO_SIZE)
    }

    /// The whole disk's `dev_t` as the kernel keeps it.
    #[inline(always)]
    pub(crate) fn disk(self) -> u32 {
        let bdev: u64 = peek(self.0, &BIO_BDEV);
        let disk: u64 = peek(bdev, &BDEV_DISK);
        let part0: u64 = peek(disk, &DISK_PART0);
        peek(part0, &BDEV_DEV)
    }
}

/// A request, borrowed from `block_rq_issue`.
pub(crate) struct Request {
    address: *const u8,
}

impl Request {
    /// The request of the tracepoint.
    #[inline(always)]
    pub(crate) fn of_issue(ctx: &BtfTracePointContext) -> Self {
        Self {
            address: first_argument(ctx),
        }
    }

    /// The address.
    #[inline(always)]
    pub(crate) fn key(&self) -> u64 {
        self.address as u64
    }

    /// The direction of a passthrough request; `None` for every other one.
    #[inline(always)]
    pub(crate) fn passthrough(&self) -> Option<Direction> {
        // SAFETY: `address` is an argument of the tracepoint.
        let flags: u32 = unsafe { field(self.address, &REQUEST_FLAGS) };
        let op = flags & REQ_OP_MASK;
        if op == OP_DRV_OUT.load() {
            Some(Direction::Out)
        } else if op == OP_DRV_IN.load() {
            Some(Direction::In)
        } else {
            None
        }
    }

    /// Bytes of data.
    #[inline(always)]
    pub(crate) fn bytes(&self) -> u32 {
        peek(self.key(), &REQUEST_BYTES)
    }

    /// The disk of the queue as the kernel's `dev_t`, 0 if it has none, and whether it is hidden.
    #[inline(always)]
    pub(crate) fn disk(&self) -> (u32, bool) {
        let queue: u64 = peek(self.key(), &REQUEST_QUEUE);
        let disk: u64 = peek(queue, &QUEUE_DISK);
        if disk == 0 {
            return (0, false);
        }
        let flags: u32 = peek(disk, &DISK_GENHD_FLAGS);
        let part0: u64 = peek(disk, &DISK_PART0);
        (peek(part0, &BDEV_DEV), flags & HIDDEN_FLAG.load() != 0)
    }
}

/// The CDB of a SCSI request at `request`.
#[inline(always)]
pub(crate) fn scsi_command(request: u64) -> Option<[u8; COMMAND_BYTES]> {
    read(request + u64::from(SCSI_CDB.load()))
}

/// The beginning of the command of an NVMe request at `request`.
#[inline(always)]
pub(crate) fn nvme_command(request: u64) -> Option<[u8; COMMAND_BYTES]> {
    let command: u64 = read(request + u64::from(NVME_COMMAND.load()))?;
    read(command)
}

/// The field of type `T` at `offset` of the kernel object at `base`, or zeroes.
#[inline(always)]
fn peek<T: Copy + Default>(base: u64, offset: &Global<u32>) -> T {
    read(base + u64::from(offset.load())).unwrap_or_default()
}

/// What the kernel has at `address`.
#[inline(always)]
fn read<T>(address: u64) -> Option<T> {
    // SAFETY: the helper checks the address and fails where it can't be read.
    unsafe { bpf_probe_read_kernel(address as *const T) }.ok()
}

/// Bytes completed now, the third argument of `block_rq_complete`.
#[inline(always)]
pub(crate) fn completed_bytes(ctx: &BtfTracePointContext) -> u32 {
    let argument: u64;
    // SAFETY: the context of a BTF tracepoint is an array of 64-bit arguments.
    unsafe { asm!("{to} = *(u64 *)({ctx} + 16)", to = out(reg) argument, ctx = in(reg) ctx.as_ptr()) };
    argument as u32
}

/// First argument of the tracepoint. The context may only be read at constant offsets, so the loads are
/// instructions of their own, which the compiler does not merge into one at a computed offset.
#[inline(always)]
fn first_argument(ctx: &BtfTracePointContext) -> *const u8 {
    let argument: *const u8;
    // SAFETY: the context of a BTF tracepoint is an array of 64-bit arguments.
    unsafe { asm!("{to} = *(u64 *)({ctx} + 0)", to = out(reg) argument, ctx = in(reg) ctx.as_ptr()) };
    argument
}

/// Second argument of the tracepoint.
#[inline(always)]
fn second_argument(ctx: &BtfTracePointContext) -> *const u8 {
    let argument: *const u8;
    // SAFETY: as above.
    unsafe { asm!("{to} = *(u64 *)({ctx} + 8)", to = out(reg) argument, ctx = in(reg) ctx.as_ptr()) };
    argument
}

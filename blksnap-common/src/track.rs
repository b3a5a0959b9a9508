//! Tracking ABI: maps, records and counters shared by the tracking programs and the agent.

/// Version of everything in this module. An agent never adopts maps of another version.
pub const ABI_VERSION: u32 = 2;

/// Number of slots: tracked (disk, first sector, last sector) ranges over all disks.
pub const MAX_SLOTS: u32 = 256;

/// Entries of the disk table.
pub const DISK_TABLE: u32 = 256;

/// Entries that a disk may have its place in, from [`disk_entry`] on.
pub const DISK_PROBES: u32 = 4;

/// [`DiskSlots::disk`] of an entry without a disk.
pub const NO_DISK: u32 = u32::MAX;

/// First entry of the disk table in which `disk`, a `dev_t` of the kernel, is looked for. A table looked up by
/// number costs a program a few instructions, a hash map a call.
#[inline(always)]
#[must_use]
pub const fn disk_entry(disk: u32) -> u32 {
    // Fibonacci hashing: minors of one driver differ by 1 or 16.
    disk.wrapping_mul(0x9e37_79b1) >> 24
}

/// Slots of one disk: the whole disk and its partitions.
pub const SLOTS_PER_DISK: usize = 16;

/// Writes in flight that the ledger holds at a time; past that [`SlotState::ledger_lost`] rises.
pub const LEDGER_ENTRIES: u32 = 65_536;

/// Default size of the event ring in bytes (a power of two, a multiple of the page size).
pub const RING_BYTES: u32 = 256 * 1024;

/// Slot flag: writes are entered in the ledger and marked again when they complete.
pub const SLOT_LEDGER: u32 = 1;

/// Disk flag: the driver works on requests (blk-mq), so that writes end at `block_rq_complete`, piece by piece;
/// otherwise they end at `block_bio_complete`, whole.
pub const DISK_REQUESTS: u32 = 1;

/// Disk flag: a slot of the disk has [`SLOT_LEDGER`].
pub const DISK_LEDGER: u32 = 2;

/// One tracked range of a disk. In its bitmap the bit of block `b` is bit `b % 64` of word `b / 64`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Slot {
    /// First sector of the range on the disk.
    pub first_sector: u64,
    /// Sector after the last one.
    pub end_sector: u64,
    /// Index in the bitmap, state and counter maps, below [`MAX_SLOTS`].
    pub id: u32,
    /// log2 of the tracking block size in sectors.
    pub block_shift: u32,
    /// [`SLOT_LEDGER`].
    pub flags: u32,
    /// Always 0.
    pub reserved: u32,
}

/// All slots of one disk: an entry of the disk table (map `DISKS`), replaced as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct DiskSlots {
    /// How many of `slots` are in use, from the first one on.
    pub count: u32,
    /// Sectors in a zone of a zoned disk (a power of two), 0 for other disks.
    pub zone_sectors: u32,
    /// [`DISK_REQUESTS`], [`DISK_LEDGER`].
    pub flags: u32,
    /// The disk, as the kernel's `dev_t`, or [`NO_DISK`].
    pub disk: u32,
    /// The entry itself.
    pub entry: u32,
    /// Always 0.
    pub reserved: u32,
    /// The slots.
    pub slots: [Slot; SLOTS_PER_DISK],
}

impl DiskSlots {
    /// A disk without slots.
    pub const EMPTY: Self = Self {
        count: 0,
        zone_sectors: 0,
        flags: 0,
        disk: NO_DISK,
        entry: 0,
        reserved: 0,
        slots: [Slot {
            first_sector: 0,
            end_sector: 0,
            id: 0,
            block_shift: 0,
            flags: 0,
            reserved: 0,
        }; SLOTS_PER_DISK],
    };
}

/// What a write-type operation does, as counted and reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum OpKind {
    /// `REQ_OP_WRITE`.
    Write = 0,
    /// `REQ_OP_DISCARD`.
    Discard = 1,
    /// `REQ_OP_SECURE_ERASE`.
    SecureErase = 2,
    /// `REQ_OP_WRITE_ZEROES`.
    WriteZeroes = 3,
    /// Zone append, reset, finish, open, close: the whole zone counts as changed.
    Zone = 4,
    /// Anything else that is not a read and has a length.
    Other = 5,
}

/// Number of [`OpKind`]s.
pub const OP_KINDS: usize = 6;

/// Bytes of a [`Record`].
pub const RECORD_BYTES: u32 = 32;

/// Length of the arrays by kind: a power of two, so that the verifier sees a masked index stay inside.
pub const KIND_ENTRIES: usize = 8;

impl OpKind {
    /// All kinds, in the order of their numbers.
    pub const ALL: [Self; OP_KINDS] = [
        Self::Write,
        Self::Discard,
        Self::SecureErase,
        Self::WriteZeroes,
        Self::Zone,
        Self::Other,
    ];

    /// The number in records and tables.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// The label used in metrics and JSON.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Discard => "discard",
            Self::SecureErase => "secure_erase",
            Self::WriteZeroes => "write_zeroes",
            Self::Zone => "zone",
            Self::Other => "other",
        }
    }
}

/// Ring record: a write made at least one block of a slot dirty that was clean in this period.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Record {
    /// Number of the bitmap's period.
    pub period: u64,
    /// First block that the write touches.
    pub first_block: u64,
    /// Last block that the write touches.
    pub last_block: u64,
    /// Slot id.
    pub slot: u32,
    /// [`OpKind`] as a number.
    pub kind: u32,
}

/// Operations and bytes of one kind, side by side: a write touches one cache line of counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct KindCounters {
    /// Operations.
    pub ops: u64,
    /// Bytes.
    pub bytes: u64,
}

/// Counters of a slot, one copy per CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SlotCounters {
    /// By [`OpKind`].
    pub kinds: [KindCounters; KIND_ENTRIES],
    /// Reads seen; the self test looks for these.
    pub reads: u64,
    /// Ring records written.
    pub records: u64,
}

/// Rare events of a slot: shared by all CPUs, changed with atomic operations, mapped by the agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SlotState {
    /// Records that found the ring full. The bitmap has their blocks.
    pub ring_full: u64,
    /// Operations on the whole device without a length (`REQ_OP_ZONE_RESET_ALL`).
    pub whole_device: u64,
    /// Map look-ups that failed although they can't: the map is no longer right.
    pub errors: u64,
    /// Writes that found no room in the ledger.
    pub ledger_lost: u64,
    /// Writes that completed under [`SLOT_LEDGER`] without an entry: they were submitted before it was set.
    pub unknown_completions: u64,
    /// Commands past the block layer's writes ([`crate::passthrough`]) that may have changed the device.
    pub passthrough: u64,
    /// Number of the open period, which records carry. Written by the agent when no program uses the bitmap before
    /// any more, so that a block of a closed period never comes with the number of a later one.
    pub period: u64,
}

/// Entries of the `GUARDS` map.
pub const GUARDS: u32 = 1024;

/// [`Guard::disk`] of an entry that is not in use.
pub const GUARD_FREE: u32 = 0;

/// [`Guard::disk`] of an entry for every disk without a node of its own (`GENHD_FL_HIDDEN`): the paths of an NVMe
/// multipath disk.
pub const GUARD_HIDDEN: u32 = u32::MAX - 1;

/// [`Guard::disk`] of an entry for queues without a disk: the admin queue of an NVMe controller.
pub const GUARD_CONTROLLER: u32 = u32::MAX - 2;

/// A slot that wants to know of passthrough commands to a disk: its own, or one beneath it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Guard {
    /// The disk, as the kernel's `dev_t`, or one of the values above.
    pub disk: u32,
    /// Slot id.
    pub slot: u32,
    /// [`crate::passthrough::Commands`] that the disk takes, as a number.
    pub commands: u32,
    /// Always 0.
    pub reserved: u32,
}

/// A range of a disk in the ledger.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct LedgerRange {
    /// First sector on the disk.
    pub sector: u64,
    /// Sectors; at most 2^23 (a bio has less than 4 GiB).
    pub sectors: u32,
    /// The disk, as the kernel's `dev_t`.
    pub disk: u32,
}

/// A write in flight: the value of the `LEDGER` map, whose key is the address of the bio.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct LedgerEntry {
    /// The range on the disk that the write was last sent to, then the one on the upper disk that redirected it,
    /// or one without sectors.
    pub ranges: [LedgerRange; 2],
    /// Sectors of `ranges[0]` that have not completed yet.
    pub remaining: u64,
}

const _: () = {
    assert!(size_of::<Slot>() == 32);
    assert!(size_of::<DiskSlots>() == 24 + 32 * SLOTS_PER_DISK);
    assert!(size_of::<Record>() == RECORD_BYTES as usize);
    assert!(size_of::<SlotCounters>() == 8 * (2 * KIND_ENTRIES + 2));
    assert!(size_of::<SlotState>() == 56);
    assert!(size_of::<Guard>() == 16);
    assert!(size_of::<LedgerEntry>() == 40);
    assert!(OP_KINDS <= KIND_ENTRIES && KIND_ENTRIES.is_power_of_two());
};

#[cfg(feature = "user")]
mod user {
    use super::{DiskSlots, Guard, LedgerEntry, Record, SlotCounters, SlotState};

    // SAFETY: repr(C), no padding (sizes asserted above), every bit pattern is a value.
    unsafe impl aya::Pod for DiskSlots {}
    // SAFETY: as above.
    unsafe impl aya::Pod for SlotCounters {}
    // SAFETY: as above.
    unsafe impl aya::Pod for SlotState {}
    // SAFETY: as above.
    unsafe impl aya::Pod for LedgerEntry {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Guard {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Record {}
}

//! uapi: the names, numbers and layouts of the original's control interface.
//!
//! These are the structs that a client of `blksnap-control` and of the block device filter exchanges with the
//! kernel module, with the padding that the C layout implies as fields of its own. Pointers of user space are plain
//! 64-bit numbers. All integers have the byte order of the machine.

/// Type of the control device's ioctls.
#[doc(alias = "BLKSNAP")]
pub const IOCTL_TYPE: u8 = b'V';

/// Name of the control device under `/dev`.
#[doc(alias = "BLKSNAP_CTL")]
pub const CONTROL_NAME: &str = "blksnap-control";

/// Name of the filter that is attached to a block device.
#[doc(alias = "BLKSNAP_FILTER_NAME")]
pub const FILTER_NAME: &str = "blksnap";

/// Prefix of an image's name; `major:minor` of the origin follows.
#[doc(alias = "BLKSNAP_IMAGE_NAME")]
pub const IMAGE_PREFIX: &str = "blksnap-image_";

/// Bytes of a device's path or an image's name, with the zero at its end.
#[doc(alias = "IMAGE_DISK_NAME_LEN")]
pub const IMAGE_NAME_LEN: usize = 32;

/// Bytes of [`SnapshotEvent::data`].
pub const EVENT_DATA_LEN: usize = 4096 - 32;

/// Numbers of the control device's ioctls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ControlCommand {
    /// Gives [`Version`].
    Version = 0,
    /// Gives the new snapshot's [`Uuid`].
    SnapshotCreate = 1,
    /// Takes a [`Uuid`].
    SnapshotDestroy = 2,
    /// Takes [`SnapshotAppendStorage`].
    SnapshotAppendStorage = 3,
    /// Takes a [`Uuid`].
    SnapshotTake = 4,
    /// Fills [`SnapshotCollect`].
    SnapshotCollect = 5,
    /// Fills [`SnapshotEvent`].
    SnapshotWaitEvent = 6,
}

/// Commands of the filter on a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum FilterCommand {
    /// Gives [`CbtInfo`].
    CbtInfo = 0,
    /// Fills the buffer of [`CbtMap`].
    CbtMap = 1,
    /// Takes [`CbtDirty`].
    CbtDirty = 2,
    /// Takes [`SnapshotAdd`].
    SnapshotAdd = 3,
    /// Gives [`SnapshotInfo`].
    SnapshotInfo = 4,
}

/// Codes of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum EventCode {
    /// [`EventLowFreeSpace`].
    LowFreeSpace = 0,
    /// [`EventCorrupted`].
    Corrupted = 1,
}

/// Identifier of a snapshot or a generation, in the order of its text.
#[doc(alias = "blksnap_uuid")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Uuid {
    /// The 16 bytes.
    pub b: [u8; 16],
}

/// Version of the module.
#[doc(alias = "blksnap_version")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Version {
    /// Incompatible changes.
    pub major: u16,
    /// Compatible additions.
    pub minor: u16,
    /// Repairs.
    pub revision: u16,
    /// Number of the build.
    pub build: u16,
}

/// A range of sectors.
#[doc(alias = "blksnap_sectors")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SectorRange {
    /// First sector.
    pub offset: u64,
    /// Number of sectors.
    pub count: u64,
}

/// Difference storage for a snapshot.
#[doc(alias = "blksnap_snapshot_append_storage")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SnapshotAppendStorage {
    /// The snapshot.
    pub id: Uuid,
    /// Address of the block device's path.
    pub bdev_path: u64,
    /// Bytes of the path.
    pub bdev_path_size: u32,
    /// Number of ranges.
    pub count: u32,
    /// Address of `count` [`SectorRange`]s.
    pub ranges: u64,
}

/// All snapshots.
#[doc(alias = "blksnap_snapshot_collect")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SnapshotCollect {
    /// Room for identifiers, then how many there are.
    pub count: u32,
    /// Padding.
    pub reserved: u32,
    /// Address of `count` [`Uuid`]s.
    pub ids: u64,
}

/// An event of a snapshot.
#[doc(alias = "blksnap_snapshot_event")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct SnapshotEvent {
    /// The snapshot.
    pub id: Uuid,
    /// How long to wait, in milliseconds.
    pub timeout_ms: u32,
    /// [`EventCode`] as a number.
    pub code: u32,
    /// When it happened, in nanoseconds.
    pub time_label: i64,
    /// One of the `Event*` structs at its beginning.
    pub data: [u8; EVENT_DATA_LEN],
}

/// The difference storage is running low.
#[doc(alias = "blksnap_event_low_free_space")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EventLowFreeSpace {
    /// Sectors that should be added.
    pub requested_nr_sect: u64,
}

/// The snapshot is lost.
#[doc(alias = "blksnap_event_corrupted")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EventCorrupted {
    /// Major number of the origin.
    pub dev_id_mj: u32,
    /// Minor number of the origin.
    pub dev_id_mn: u32,
    /// What went wrong, as a negative errno.
    pub err_code: i32,
}

/// The facts about a change map.
#[doc(alias = "blksnap_cbtinfo")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct CbtInfo {
    /// Bytes of the device.
    pub device_capacity: u64,
    /// Bytes of a tracking block.
    pub block_size: u32,
    /// Number of tracking blocks.
    pub block_count: u32,
    /// Generation of the map.
    pub generation_id: Uuid,
    /// Number of the last take.
    pub changes_number: u8,
    /// Padding.
    pub reserved: [u8; 7],
}

/// A part of the read map, a byte per block.
#[doc(alias = "blksnap_cbtmap")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct CbtMap {
    /// First byte.
    pub offset: u32,
    /// Number of bytes.
    pub length: u32,
    /// Address of the buffer.
    pub buffer: u64,
}

/// Ranges to be marked as changed.
#[doc(alias = "blksnap_cbtdirty")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct CbtDirty {
    /// Number of ranges.
    pub count: u32,
    /// Padding.
    pub reserved: u32,
    /// Address of `count` [`SectorRange`]s.
    pub dirty_sectors: u64,
}

/// The snapshot that the device joins.
#[doc(alias = "blksnap_snapshotadd")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SnapshotAdd {
    /// The snapshot.
    pub id: Uuid,
}

/// State of a device's image.
#[doc(alias = "blksnap_snapshotinfo")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SnapshotInfo {
    /// 0, or why the image is lost, as a negative errno.
    pub error_code: i32,
    /// Name of the image's disk, ended by a zero.
    pub image: [u8; IMAGE_NAME_LEN],
}

/// Asserts size, alignment and the offset of each field.
macro_rules! layout {
    ($name:ident: $size:literal, align $align:literal $(, $field:ident $offset:literal)*) => {
        const _: () = {
            assert!(size_of::<$name>() == $size);
            assert!(align_of::<$name>() == $align);
            $(assert!(core::mem::offset_of!($name, $field) == $offset);)*
        };
    };
}

layout!(Uuid: 16, align 1, b 0);
layout!(Version: 8, align 2, major 0, minor 2, revision 4, build 6);
layout!(SectorRange: 16, align 8, offset 0, count 8);
layout!(SnapshotAppendStorage: 40, align 8, id 0, bdev_path 16, bdev_path_size 24, count 28, ranges 32);
layout!(SnapshotCollect: 16, align 8, count 0, reserved 4, ids 8);
layout!(SnapshotEvent: 4096, align 8, id 0, timeout_ms 16, code 20, time_label 24, data 32);
layout!(EventLowFreeSpace: 8, align 8, requested_nr_sect 0);
layout!(EventCorrupted: 12, align 4, dev_id_mj 0, dev_id_mn 4, err_code 8);
layout!(CbtInfo: 40, align 8, device_capacity 0, block_size 8, block_count 12, generation_id 16, changes_number 32, reserved 33);
layout!(CbtMap: 16, align 8, offset 0, length 4, buffer 8);
layout!(CbtDirty: 16, align 8, count 0, reserved 4, dirty_sectors 8);
layout!(SnapshotAdd: 16, align 1, id 0);
layout!(SnapshotInfo: 36, align 4, error_code 0, image 4);

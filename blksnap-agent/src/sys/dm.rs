//! Dm: the ioctls of device-mapper (`linux/dm-ioctl.h`, interface 4.0 and later), one function for each.
//!
//! [`Control::suspend`], [`Control::resume`] and [`Control::info`] use no heap, so that they can be called while the file
//! system is suspended that memory would be paged to.

use std::ffi::c_ulong;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::path::Path;

use nix::errno::Errno;
use zerocopy::{FromBytes, FromZeros as _, Immutable, IntoBytes, KnownLayout};

use crate::units::DeviceId;

/// The node of [`Control`]; `DM_DIR`, `DM_CONTROL_NODE`.
pub const NODE: &str = "/dev/mapper/control";

/// Longest name in bytes; `DM_NAME_LEN` less the end.
#[doc(alias = "DM_NAME_LEN")]
pub const MAX_NAME: usize = 127;

/// Longest uuid in bytes; `DM_UUID_LEN` less the end.
#[doc(alias = "DM_UUID_LEN")]
pub const MAX_UUID: usize = 128;

/// What is asked of udev for a device that nobody else is to look at: its node, and no scanning, no links by what is on
/// it (`DM_UDEV_DISABLE_SUBSYSTEM_RULES_FLAG`, `_DISK_RULES_`, `_OTHER_RULES_`, `DM_UDEV_PRIMARY_SOURCE_FLAG` of
/// libdevmapper, in the upper half of the cookie). Nobody waits: the lower half, a semaphore, is 0.
pub const PRIVATE: u32 = (0x02 | 0x04 | 0x08 | 0x40) << 16;

bitflags::bitflags! {
    /// Flags of a call, and what a device says of itself.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Flags: u32 {
        /// `DM_READONLY_FLAG`.
        const READ_ONLY = 1;
        /// `DM_SUSPEND_FLAG`.
        const SUSPEND = 1 << 1;
        /// `DM_STATUS_TABLE_FLAG`: the table, not the status.
        const STATUS_TABLE = 1 << 4;
        /// `DM_ACTIVE_PRESENT_FLAG`.
        const ACTIVE = 1 << 5;
        /// `DM_INACTIVE_PRESENT_FLAG`.
        const INACTIVE = 1 << 6;
        /// `DM_BUFFER_FULL_FLAG`.
        const BUFFER_FULL = 1 << 8;
        /// `DM_SKIP_LOCKFS_FLAG`: no file system is frozen.
        const SKIP_LOCKFS = 1 << 10;
        /// `DM_NOFLUSH_FLAG`: what is under way is not waited for, and a thin pool not committed.
        const NOFLUSH = 1 << 11;
        /// `DM_QUERY_INACTIVE_TABLE_FLAG`.
        const QUERY_INACTIVE = 1 << 12;
        /// `DM_SECURE_DATA_FLAG`: the kernel wipes its copies; a table of dm-crypt comes with its key all the same.
        const SECURE_DATA = 1 << 15;
        /// `DM_DEFERRED_REMOVE`: removed when nobody has it open.
        const DEFERRED_REMOVE = 1 << 17;
        const _ = !0;
    }
}

/// Commands; the numbers of `dm-ioctl.h`.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Command {
    ListDevices = 2,
    Create = 3,
    Remove = 4,
    Suspend = 6,
    Info = 7,
    Load = 9,
    Clear = 10,
    Deps = 11,
    Table = 12,
    ListVersions = 13,
}

/// `struct dm_ioctl`.
#[derive(Clone, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Header {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_nr: u32,
    padding: u32,
    dev: u64,
    name: [u8; MAX_NAME + 1],
    uuid: [u8; MAX_UUID + 1],
    data: [u8; 7],
}

const HEADER: usize = size_of::<Header>();
const _: () = assert!(HEADER == 312);
/// The same, as the header has it.
const HEADER_BYTES: u32 = 312;

/// `struct dm_target_spec`.
#[derive(Clone, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Spec {
    sector_start: u64,
    length: u64,
    status: i32,
    next: u32,
    kind: [u8; 16],
}

const SPEC: usize = size_of::<Spec>();
const _: () = assert!(SPEC == 40);

/// How a device is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which<'a> {
    /// By its number.
    Device(DeviceId),
    /// By its uuid.
    Uuid(&'a str),
}

/// A line of a table, or of a status.
#[derive(Clone, PartialEq, Eq)]
pub struct Target {
    /// First sector.
    pub start: u64,
    /// Number of sectors.
    pub length: u64,
    /// Name of the target.
    pub kind: String,
    /// Its parameters, or its status. Those of a table may have a key.
    pub parameters: String,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.start, self.length, self.kind)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.parameters).into_bytes();
        wipe(&mut bytes);
    }
}

/// Overwrites what may be a key.
fn wipe(bytes: &mut [u8]) {
    bytes.fill(0);
    std::hint::black_box(bytes);
}

/// A device, as [`Control::info`] tells of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// Its number.
    pub device: DeviceId,
    /// Whether it is suspended, and which tables it has.
    pub flags: Flags,
    /// How often it is open.
    pub open_count: i32,
    /// Number of its last event.
    pub event: u32,
}

/// The control device.
#[derive(Debug)]
pub struct Control {
    file: File,
}

impl Control {
    /// Opens [`NODE`].
    ///
    /// # Errors
    /// The kernel has no device-mapper, or its module is not loaded.
    pub fn open() -> io::Result<Self> {
        Self::open_at(Path::new(NODE))
    }

    fn open_at(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        Ok(Self { file })
    }

    /// The descriptor.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// `DM_DEV_CREATE`: a device without a table.
    ///
    /// # Errors
    /// `EBUSY`: there is one of this name or uuid. `EINVAL`: one of them is too long or has a slash.
    pub fn create(&self, name: &str, uuid: &str) -> Result<DeviceId, Errno> {
        let mut header = header(Which::Uuid(uuid), Flags::empty())?;
        put(&mut header.name, name)?;
        self.short(Command::Create, &mut header)?;
        Ok(decode(header.dev))
    }

    /// `DM_DEV_REMOVE`: now, or `deferred` until nobody has it open. True if it is gone.
    ///
    /// # Errors
    /// `EBUSY`: somebody has it open. `ENXIO`: there is none.
    pub fn remove(&self, which: Which<'_>, deferred: bool) -> Result<bool, Errno> {
        let flags = if deferred {
            Flags::DEFERRED_REMOVE
        } else {
            Flags::empty()
        };
        let mut header = header(which, flags)?;
        header.event_nr = PRIVATE;
        self.short(Command::Remove, &mut header)?;
        Ok(!Flags::from_bits_retain(header.flags).contains(Flags::DEFERRED_REMOVE))
    }

    /// `DM_DEV_SUSPEND`: waits for what is under way and makes what comes later wait. `flags` are those of
    /// [`Flags::SKIP_LOCKFS`] and [`Flags::NOFLUSH`].
    ///
    /// # Errors
    /// `EINVAL`: it is suspended. `ENXIO`: there is none. `EBUSY`: its file system is frozen.
    pub fn suspend(&self, which: Which<'_>, flags: Flags) -> Result<(), Errno> {
        let mut header = header(which, flags | Flags::SUSPEND)?;
        self.short(Command::Suspend, &mut header)
    }

    /// `DM_DEV_SUSPEND` without its flag: makes the table that was loaded the active one, if there is one, and lets all
    /// go on. `cookie` is for udev, 0 for what it was told before.
    ///
    /// # Errors
    /// `EINVAL`: the table does not fit, and the old one stays. `ENXIO`: there is no such device.
    pub fn resume(&self, which: Which<'_>, cookie: u32) -> Result<(), Errno> {
        let mut header = header(which, Flags::empty())?;
        header.event_nr = cookie;
        self.short(Command::Suspend, &mut header)
    }

    /// `DM_DEV_STATUS`.
    ///
    /// # Errors
    /// `ENXIO`: there is no such device.
    pub fn info(&self, which: Which<'_>) -> Result<Info, Errno> {
        let mut header = header(which, Flags::NOFLUSH)?;
        self.short(Command::Info, &mut header)?;
        Ok(Info {
            device: decode(header.dev),
            flags: Flags::from_bits_retain(header.flags),
            open_count: header.open_count,
            event: header.event_nr,
        })
    }

    /// Name and uuid; the latter may be empty.
    ///
    /// # Errors
    /// `ENXIO`: there is no such device.
    pub fn names(&self, which: Which<'_>) -> Result<(String, String), Errno> {
        let mut header = header(which, Flags::NOFLUSH)?;
        self.short(Command::Info, &mut header)?;
        Ok((text(&header.name), text(&header.uuid)))
    }

    /// `DM_TABLE_LOAD`: an inactive table, in place of the one there is.
    ///
    /// # Errors
    /// What the target says; `EINVAL` also where the device is of another type, or the kernel lacks the target.
    pub fn load(&self, which: Which<'_>, table: &[Target], read_only: bool) -> Result<(), Errno> {
        let mut payload = Vec::new();
        for target in table {
            let mut spec = Spec::new_zeroed();
            spec.sector_start = target.start;
            spec.length = target.length;
            put(&mut spec.kind, &target.kind)?;
            // With the end of the text, to a multiple of 8.
            let length = (target.parameters.len() + 1).next_multiple_of(8);
            spec.next = u32::try_from(SPEC + length).map_err(|_| Errno::E2BIG)?;
            payload.extend_from_slice(spec.as_bytes());
            let end = payload.len() + length;
            payload.extend_from_slice(target.parameters.as_bytes());
            payload.resize(end, 0);
        }
        let mut flags = Flags::SECURE_DATA;
        flags.set(Flags::READ_ONLY, read_only);
        let mut header = header(which, flags)?;
        header.target_count = u32::try_from(table.len()).map_err(|_| Errno::E2BIG)?;
        let loaded = self.long(Command::Load, &header, &payload, 0).map(drop);
        wipe(&mut payload);
        loaded
    }

    /// `DM_TABLE_CLEAR`: removes the inactive table.
    ///
    /// # Errors
    /// `ENXIO`: there is no such device.
    pub fn clear(&self, which: Which<'_>) -> Result<(), Errno> {
        let mut header = header(which, Flags::empty())?;
        self.short(Command::Clear, &mut header)
    }

    /// `DM_TABLE_STATUS` with `DM_STATUS_TABLE_FLAG`: the active table with its keys.
    ///
    /// # Errors
    /// `ENXIO`: there is no such device.
    pub fn table(&self, which: Which<'_>) -> Result<Vec<Target>, Errno> {
        self.targets(which, Flags::STATUS_TABLE | Flags::NOFLUSH | Flags::SECURE_DATA)
    }

    /// As [`Control::table`], of the table that was loaded; empty if there is none.
    ///
    /// # Errors
    /// `ENXIO`: there is no such device.
    pub fn inactive_table(&self, which: Which<'_>) -> Result<Vec<Target>, Errno> {
        if !self.info(which)?.flags.contains(Flags::INACTIVE) {
            return Ok(Vec::new());
        }
        self.targets(
            which,
            Flags::STATUS_TABLE | Flags::NOFLUSH | Flags::SECURE_DATA | Flags::QUERY_INACTIVE,
        )
    }

    /// `DM_TABLE_STATUS`: what the targets say of themselves. Nothing is flushed for it.
    ///
    /// # Errors
    /// `ENXIO`: there is no such device.
    pub fn status(&self, which: Which<'_>) -> Result<Vec<Target>, Errno> {
        self.targets(which, Flags::NOFLUSH)
    }

    fn targets(&self, which: Which<'_>, flags: Flags) -> Result<Vec<Target>, Errno> {
        let mut reply = self.long(Command::Table, &header(which, flags)?, &[], 1 << 14)?;
        let (header, data) = reply.parts()?;
        let mut found = Vec::new();
        let mut at = 0_usize;
        for _ in 0..header.target_count {
            let (spec, rest) = data
                .get(at..)
                .and_then(|rest| Spec::read_from_prefix(rest).ok())
                .ok_or(Errno::EPROTO)?;
            found.push(Target {
                start: spec.sector_start,
                length: spec.length,
                kind: text(&spec.kind),
                parameters: text(rest),
            });
            at = spec.next as usize;
        }
        wipe(&mut reply.bytes);
        Ok(found)
    }

    /// `DM_TABLE_DEPS`: the devices that the active table stands on.
    ///
    /// # Errors
    /// `ENXIO`: there is no such device.
    pub fn deps(&self, which: Which<'_>) -> Result<Vec<DeviceId>, Errno> {
        let reply = self.long(Command::Deps, &header(which, Flags::NOFLUSH)?, &[], 1 << 12)?;
        let (_, data) = reply.parts()?;
        let (count, _) = u32::read_from_prefix(data).map_err(|_| Errno::EPROTO)?;
        let numbers = data.get(8..).ok_or(Errno::EPROTO)?.chunks_exact(8);
        let numbers = numbers.filter_map(|bytes| u64::read_from_bytes(bytes).ok());
        Ok(numbers.take(count as usize).map(decode).collect())
    }

    /// `DM_LIST_DEVICES`: numbers and names of all devices.
    ///
    /// # Errors
    /// The kernel's own.
    pub fn list(&self) -> Result<Vec<(DeviceId, String)>, Errno> {
        let nothing = bare(Flags::empty());
        let reply = self.long(Command::ListDevices, &nothing, &[], 1 << 14)?;
        let (_, data) = reply.parts()?;
        let mut found = Vec::new();
        let mut at = 0_usize;
        loop {
            let rest = data.get(at..).ok_or(Errno::EPROTO)?;
            let (dev, rest) = u64::read_from_prefix(rest).map_err(|_| Errno::EPROTO)?;
            let (next, rest) = u32::read_from_prefix(rest).map_err(|_| Errno::EPROTO)?;
            if dev == 0 {
                // What the kernel says of none.
                return Ok(found);
            }
            found.push((decode(dev), text(rest)));
            if next == 0 {
                return Ok(found);
            }
            at += next as usize;
        }
    }

    /// `DM_LIST_VERSIONS`: names of the targets that the kernel has loaded.
    ///
    /// # Errors
    /// The kernel's own.
    pub fn target_kinds(&self) -> Result<Vec<String>, Errno> {
        let reply = self.long(Command::ListVersions, &bare(Flags::empty()), &[], 1 << 13)?;
        let (_, data) = reply.parts()?;
        let mut found = Vec::new();
        let mut at = 0_usize;
        loop {
            let rest = data.get(at..).ok_or(Errno::EPROTO)?;
            let (next, _) = u32::read_from_prefix(rest).map_err(|_| Errno::EPROTO)?;
            found.push(text(rest.get(16..).ok_or(Errno::EPROTO)?));
            if next == 0 {
                return Ok(found);
            }
            at += next as usize;
        }
    }

    /// A call that has nothing but the header.
    fn short(&self, command: Command, header: &mut Header) -> Result<(), Errno> {
        header.data_size = HEADER_BYTES;
        header.data_start = HEADER_BYTES;
        self.ioctl(command, header.as_mut_bytes())
    }

    /// A call with data after the header, in either direction: it is repeated with more room until the answer fits.
    fn long(&self, command: Command, header: &Header, payload: &[u8], room: usize) -> Result<Reply, Errno> {
        let mut room = room.max(payload.len()).next_multiple_of(8);
        loop {
            let size = HEADER + room;
            let mut header = header.clone();
            header.data_size = u32::try_from(size).map_err(|_| Errno::E2BIG)?;
            header.data_start = HEADER_BYTES;
            // Words, for the alignment that the kernel's structures want.
            let mut bytes = vec![0_u64; size / 8];
            let raw = bytes.as_mut_slice().as_mut_bytes();
            raw[..HEADER].copy_from_slice(header.as_bytes());
            raw[HEADER..HEADER + payload.len()].copy_from_slice(payload);
            self.ioctl(command, raw)?;
            let full = Header::read_from_prefix(raw)
                .is_ok_and(|(header, _)| Flags::from_bits_retain(header.flags).contains(Flags::BUFFER_FULL));
            let reply = Reply { bytes: raw.to_vec() };
            wipe(raw);
            if !full {
                return Ok(reply);
            }
            room = room
                .checked_mul(4)
                .filter(|room| *room < 1 << 28)
                .ok_or(Errno::E2BIG)?;
        }
    }

    fn ioctl(&self, command: Command, bytes: &mut [u8]) -> Result<(), Errno> {
        let request: c_ulong = nix::request_code_readwrite!(0xfd, command as u8, HEADER);
        debug_assert!(bytes.len() >= HEADER);
        // SAFETY: the descriptor is open for the call, and the kernel reads and writes at most `data_size` bytes, which
        // every caller sets to the length of `bytes`.
        Errno::result(unsafe { libc::ioctl(self.file.as_raw_fd(), request, bytes.as_mut_ptr()) })?;
        Ok(())
    }
}

/// What a long call answered.
struct Reply {
    bytes: Vec<u8>,
}

impl Reply {
    fn parts(&self) -> Result<(Header, &[u8]), Errno> {
        let (header, _) = Header::read_from_prefix(&self.bytes).map_err(|_| Errno::EPROTO)?;
        let data = self
            .bytes
            .get(header.data_start as usize..)
            .ok_or(Errno::EPROTO)?;
        Ok((header, data))
    }
}

fn bare(flags: Flags) -> Header {
    let mut header = Header::new_zeroed();
    header.version = [4, 0, 0];
    header.flags = flags.bits();
    header
}

fn header(which: Which<'_>, flags: Flags) -> Result<Header, Errno> {
    let mut header = bare(flags);
    match which {
        Which::Device(id) => header.dev = encode(id),
        Which::Uuid(uuid) => put(&mut header.uuid, uuid)?,
    }
    Ok(header)
}

/// Text with a zero after it.
fn put(field: &mut [u8], text: &str) -> Result<(), Errno> {
    if text.len() >= field.len() || text.bytes().any(|byte| byte == 0) {
        return Err(Errno::ENAMETOOLONG);
    }
    field[..text.len()].copy_from_slice(text.as_bytes());
    Ok(())
}

/// Text up to a zero.
fn text(field: &[u8]) -> String {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

/// `huge_encode_dev`.
fn encode(id: DeviceId) -> u64 {
    u64::from(id.minor & 0xff) | u64::from(id.major) << 8 | u64::from(id.minor & !0xff) << 12
}

/// `huge_decode_dev`.
fn decode(dev: u64) -> DeviceId {
    let part = |bits: u64| u32::try_from(bits).unwrap_or(u32::MAX);
    DeviceId {
        major: part((dev >> 8) & 0xfff),
        minor: part((dev & 0xff) | ((dev >> 12) & 0xf_ff00)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_kernel() {
        for (major, minor, dev) in [
            (253, 0, 0xfd00),
            (253, 255, 0xfdff),
            (253, 256, 0x10_fd00),
            (4095, 0xf_ffff, 0xffff_ffff),
        ] {
            let id = DeviceId { major, minor };
            assert_eq!(encode(id), dev, "{id}");
            assert_eq!(decode(dev), id);
        }
    }

    #[test]
    fn names_that_do_not_fit_are_refused() {
        let mut field = [0; 4];
        assert_eq!(put(&mut field, "abc"), Ok(()));
        assert_eq!(text(&field), "abc");
        assert_eq!(put(&mut field, "abcd"), Err(Errno::ENAMETOOLONG));
        assert_eq!(put(&mut field, "a\0"), Err(Errno::ENAMETOOLONG));
    }

    #[test]
    fn a_key_is_not_shown() {
        let target = Target {
            start: 0,
            length: 8,
            kind: "crypt".to_owned(),
            parameters: "aes 0123456789abcdef 0 7:0 0".to_owned(),
        };
        assert_eq!(format!("{target:?}"), "0 8 crypt");
    }
}

//! Identity: what tells a device from every other one, over reboots and renames.
//!
//! Names and numbers of devices change with each boot. What stays is what the hardware, the hypervisor, the
//! device mapper or the partition table say. It is read from sysfs below a root that is given, so that a test can
//! show one of its own; only the UUID of a partition is read from the disk where the kernel does not tell it
//! (before 6.11).
//!
//! An identity says that two readings are of the same device. It does not say that nobody wrote to it in between,
//! and it can't tell a clone or an older state of a virtual disk that its hypervisor shows under the same serial
//! number.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{BlockDevice, DiskError};
use crate::units::{DeviceId, Sectors};

/// Longest attribute that is read, in bytes: a page, as long as the kernel makes them.
const MAX_ATTRIBUTE: u64 = 4096;

/// Most entries of a partition table that are looked at.
const MAX_ENTRIES: u64 = 4096;

/// A partition on its disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartitionIdentity {
    /// Its number in the table.
    pub number: u32,
    /// Where it begins on the disk.
    pub start: Sectors,
    /// UUID of the partition, or signature of the disk and number for an MBR.
    pub uuid: Option<String>,
}

/// What identifies a device. Every field is of the whole disk but `partition` and `capacity`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceIdentity {
    /// World-wide identifier (SCSI, NVMe).
    pub wwid: Option<String>,
    /// Serial number.
    pub serial: Option<String>,
    /// Model, which alone identifies nothing.
    pub model: Option<String>,
    /// UUID of a device-mapper device.
    pub dm_uuid: Option<String>,
    /// UUID of an md array.
    pub md_uuid: Option<String>,
    /// The file of a loop device, which alone identifies nothing.
    pub backing_file: Option<String>,
    /// The partition, if it is one.
    pub partition: Option<PartitionIdentity>,
    /// Length of the device.
    pub capacity: Sectors,
    /// Logical block size in bytes.
    pub logical_block: u32,
}

/// Why two identities are not known to be of one device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Difference {
    /// Nothing in it is told by no other device.
    #[error("it has neither serial number, world-wide identifier nor UUID")]
    Unidentified,
    /// Something is told by one of them only.
    #[error("its {what} is {is}, but was {was}", is = Shown(is), was = Shown(was))]
    Unknown {
        /// What.
        what: &'static str,
        /// Before.
        was: Option<String>,
        /// Now.
        is: Option<String>,
    },
    /// Something differs.
    #[error("its {what} is {is}, but was {was}")]
    Other {
        /// What.
        what: &'static str,
        /// Before.
        was: String,
        /// Now.
        is: String,
    },
    /// The device has another length.
    #[error("it has {is} sectors, but had {was}")]
    Capacity {
        /// Sectors before.
        was: u64,
        /// Sectors now.
        is: u64,
    },
}

struct Shown<'a>(&'a Option<String>);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_deref().unwrap_or("not told"))
    }
}

impl DeviceIdentity {
    /// Reads what `sysfs` (`/sys`) tells of the device with this number.
    ///
    /// # Errors
    /// There is no such device, or its length or place can't be read. What else can't be read is `None`.
    pub fn of(sysfs: &Path, id: DeviceId) -> Result<Self, DiskError> {
        let name = sysfs.join("dev/block").join(id.to_string());
        let failed = |what: &str, source: io::Error| DiskError::attribute(&name, what, source);
        let place = name
            .canonicalize()
            .map_err(|source| failed("the place", source))?;
        let number = |directory: &Path, attribute: &str| {
            let text = read(&directory.join(attribute)).map_err(|source| failed(attribute, source))?;
            text.parse::<u64>().map_err(|_| {
                let why = format!("unexpected content {text:?}");
                failed(attribute, io::Error::new(io::ErrorKind::InvalidData, why))
            })
        };
        let narrow = |what: &'static str, value: u64| {
            u32::try_from(value).map_err(|_| failed(what, io::ErrorKind::InvalidData.into()))
        };
        let disk: PathBuf = if place.join("partition").exists() {
            place.parent().unwrap_or(&place).to_owned()
        } else {
            place.clone()
        };
        let partition = if disk == place {
            None
        } else {
            Some(PartitionIdentity {
                number: narrow("partition", number(&place, "partition")?)?,
                start: Sectors::new(number(&place, "start")?),
                uuid: text(&place, "uevent").and_then(|uevent| partuuid_of_uevent(&uevent)),
            })
        };
        Ok(Self {
            wwid: text(&disk, "wwid").or_else(|| text(&disk, "device/wwid")),
            serial: text(&disk, "serial")
                .or_else(|| text(&disk, "device/serial"))
                .or_else(|| unit_serial(&disk.join("device/vpd_pg80"))),
            model: text(&disk, "device/model"),
            dm_uuid: text(&disk, "dm/uuid"),
            md_uuid: text(&disk, "md/uuid"),
            backing_file: text(&disk, "loop/backing_file"),
            partition,
            capacity: Sectors::new(number(&place, "size")?),
            logical_block: narrow(
                "queue/logical_block_size",
                number(&disk, "queue/logical_block_size")?,
            )?,
        })
    }

    /// As [`DeviceIdentity::of`]; the UUID of a partition is read from its disk where sysfs does not tell it.
    ///
    /// # Errors
    /// As [`DeviceIdentity::of`].
    pub fn read(sysfs: &Path, device: &BlockDevice) -> Result<Self, DiskError> {
        let mut identity = Self::of(sysfs, device.id)?;
        if let Some(partition) = &mut identity.partition
            && partition.uuid.is_none()
        {
            partition.uuid = File::open(&device.disk_path)
                .and_then(|disk| partuuid_of_table(&disk, identity.logical_block, partition))
                .unwrap_or_else(|error| {
                    tracing::debug!(disk = %device.disk_path.display(), %error, "no partition table");
                    None
                });
        }
        Ok(identity)
    }

    /// Whether something in it is told by no other device.
    #[must_use]
    pub const fn is_unique(&self) -> bool {
        let by_table = match &self.partition {
            Some(partition) => partition.uuid.is_some(),
            None => false,
        };
        self.wwid.is_some()
            || self.serial.is_some()
            || self.dm_uuid.is_some()
            || self.md_uuid.is_some()
            || by_table
    }

    /// Whether what sysfs told ([`DeviceIdentity::of`]) may be the device that this was. The UUID of a partition, which
    /// older kernels don't tell there, is left out where it is missing.
    #[must_use]
    pub fn may_be(&self, seen: &Self) -> bool {
        let mut was = self.clone();
        if let (Some(was), Some(seen)) = (&mut was.partition, &seen.partition)
            && seen.uuid.is_none()
        {
            was.uuid = None;
        }
        !matches!(
            was.same_device(seen),
            Err(Difference::Other { .. } | Difference::Unknown { .. })
        )
    }

    /// Whether `now` is the device that this was, whatever its length is.
    ///
    /// # Errors
    /// The first difference. What was told and is no more, or the other way round, is one, too.
    pub fn same_device(&self, now: &Self) -> Result<(), Difference> {
        let partition = |identity: &Self, get: fn(&PartitionIdentity) -> Option<String>| {
            identity.partition.as_ref().and_then(get)
        };
        let number: fn(&PartitionIdentity) -> Option<String> = |p| Some(p.number.to_string());
        let start: fn(&PartitionIdentity) -> Option<String> = |p| Some(p.start.count().to_string());
        let uuid: fn(&PartitionIdentity) -> Option<String> = |p| p.uuid.clone();
        for (what, was, is) in [
            ("world-wide identifier", self.wwid.clone(), now.wwid.clone()),
            ("serial number", self.serial.clone(), now.serial.clone()),
            ("device-mapper UUID", self.dm_uuid.clone(), now.dm_uuid.clone()),
            ("array UUID", self.md_uuid.clone(), now.md_uuid.clone()),
            ("partition UUID", partition(self, uuid), partition(now, uuid)),
            (
                "partition number",
                partition(self, number),
                partition(now, number),
            ),
            ("first sector", partition(self, start), partition(now, start)),
            ("model", self.model.clone(), now.model.clone()),
            (
                "backing file",
                self.backing_file.clone(),
                now.backing_file.clone(),
            ),
            (
                "logical block size",
                Some(self.logical_block.to_string()),
                Some(now.logical_block.to_string()),
            ),
        ] {
            match (was, is) {
                (was, is) if was == is => {}
                (Some(was), Some(is)) => return Err(Difference::Other { what, was, is }),
                (was, is) => return Err(Difference::Unknown { what, was, is }),
            }
        }
        if self.is_unique() {
            Ok(())
        } else {
            Err(Difference::Unidentified)
        }
    }

    /// Whether `now` is the device that this was, and as long.
    ///
    /// # Errors
    /// The first difference.
    pub fn same_as(&self, now: &Self) -> Result<(), Difference> {
        self.same_device(now)?;
        if self.capacity == now.capacity {
            Ok(())
        } else {
            Err(Difference::Capacity {
                was: self.capacity.count(),
                is: now.capacity.count(),
            })
        }
    }
}

fn read(path: &Path) -> io::Result<String> {
    let bytes = read_bytes(path)?;
    let text = String::from_utf8_lossy(&bytes);
    Ok(text
        .trim_matches(|c: char| c.is_whitespace() || c == '\0')
        .to_owned())
}

fn read_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?
        .take(MAX_ATTRIBUTE)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The content of an attribute, if there is one and it says something.
fn text(directory: &Path, attribute: &str) -> Option<String> {
    let text = read(&directory.join(attribute)).ok()?;
    (!text.is_empty()).then_some(text)
}

/// The unit serial number page (SPC-4, 7.8.17): the page's code at byte 1, its length at 2, then text.
fn unit_serial(path: &Path) -> Option<String> {
    let page = read_bytes(path).ok()?;
    let length = usize::from(u16::from_be_bytes([*page.get(2)?, *page.get(3)?]));
    let serial = page.get(4..4 + length).filter(|_| page.get(1) == Some(&0x80))?;
    let serial = String::from_utf8_lossy(serial)
        .trim_matches(|c: char| c.is_whitespace() || c == '\0')
        .to_owned();
    (!serial.is_empty()).then_some(serial)
}

fn partuuid_of_uevent(uevent: &str) -> Option<String> {
    let uuid = uevent.lines().find_map(|line| line.strip_prefix("PARTUUID="))?;
    (!uuid.is_empty()).then(|| uuid.to_ascii_lowercase())
}

/// The UUID of a partition from the table on `disk`, in the kernel's form; `None` if the table does not have it.
fn partuuid_of_table(
    disk: &File,
    logical_block: u32,
    partition: &PartitionIdentity,
) -> io::Result<Option<String>> {
    let block = u64::from(logical_block);
    let mut header = [0; 92];
    disk.read_exact_at(&mut header, block)?;
    if header[..8] == *b"EFI PART" {
        return partuuid_of_gpt(disk, block, &header, partition.start);
    }
    let mut first = [0; 512];
    disk.read_exact_at(&mut first, 0)?;
    let signature = u32::from_le_bytes([first[440], first[441], first[442], first[443]]);
    let is_table = first[510..] == [0x55, 0xaa] && signature != 0;
    Ok(is_table.then(|| format!("{signature:08x}-{:02x}", partition.number)))
}

fn partuuid_of_gpt(disk: &File, block: u64, header: &[u8; 92], start: Sectors) -> io::Result<Option<String>> {
    let long = |bytes: &[u8], at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(word)
    };
    let short = |at: usize| {
        u64::from(u32::from_le_bytes([
            header[at],
            header[at + 1],
            header[at + 2],
            header[at + 3],
        ]))
    };
    let (table, count, size) = (long(header, 72), short(80), short(84));
    if !(128..=4096).contains(&size) {
        return Ok(None);
    }
    for number in 0..count.min(MAX_ENTRIES) {
        // Type, UUID of the partition, first block, last block.
        let mut entry = [0; 48];
        let Some(offset) = table
            .checked_mul(block)
            .and_then(|at| at.checked_add(number * size))
        else {
            return Ok(None);
        };
        disk.read_exact_at(&mut entry, offset)?;
        if entry[..16] != [0; 16] && long(&entry, 32).checked_mul(block) == Some(start.bytes()) {
            let mut uuid = [0; 16];
            uuid.copy_from_slice(&entry[16..32]);
            return Ok(Some(uuid::Uuid::from_bytes_le(uuid).to_string()));
        }
    }
    Ok(None)
}

#[cfg(test)]
pub(crate) mod tests;

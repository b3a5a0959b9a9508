//! Log: a block device that records what is written to it (dm-log-writes), and a replay of any beginning of the record.
//!
//! The record is a device of its own: a superblock, then entries of one sector, each with its data behind it
//! (Documentation/admin-guide/device-mapper/log-writes.rst, drivers/md/dm-log-writes.c). Numbers are little-endian. A
//! write is recorded before the first flush that came after its completion, so what is in the record up to a flush is
//! what a disk must have kept that lost everything else.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::{LoopDevice, complain, run};
use nix::fcntl::{FallocateFlags, fallocate};

#[doc(alias = "WRITE_LOG_MAGIC")]
const MAGIC: u64 = 0x006a_7366_7773_6872;
#[doc(alias = "LOG_FLUSH_FLAG")]
const FLUSH: u64 = 1;
#[doc(alias = "LOG_FUA_FLAG")]
const FUA: u64 = 2;
#[doc(alias = "LOG_DISCARD_FLAG")]
const DISCARD: u64 = 4;
#[doc(alias = "LOG_MARK_FLAG")]
const MARK: u64 = 8;
/// Bytes of `struct log_write_entry`.
const ENTRY: u64 = 32;

/// What was recorded at a place of the record.
#[derive(Clone, Debug)]
pub(crate) enum Entry {
    /// Bytes that were written.
    Write { offset: u64, at: u64, length: u64 },
    /// Bytes that are zeroes from then on, as far as anybody may know.
    Discard { offset: u64, length: u64 },
    /// Everything before is durable.
    Flushed,
    /// What the test did then.
    Mark(String),
}

/// A device whose writes are recorded.
pub(crate) struct Recorded {
    name: String,
    data: LoopDevice,
    record: LoopDevice,
    ended: bool,
}

impl Recorded {
    pub(crate) fn new(bytes: u64) -> Result<Self> {
        let _ = std::process::Command::new("modprobe")
            .args(["-q", "dm-log-writes"])
            .status();
        let targets = run("dmsetup", ["targets"])?;
        ensure!(
            targets.contains("log-writes"),
            "not on this kernel: dm-log-writes"
        );
        let mut recorded = Self {
            name: format!("blksnap-record-{}", std::process::id()),
            data: LoopDevice::new(bytes)?,
            record: LoopDevice::new(bytes * 16)?,
            ended: true,
        };
        let table = format!(
            "0 {} log-writes {} {}",
            bytes / 512,
            recorded.data.path().display(),
            recorded.record.path().display()
        );
        run("dmsetup", ["create", &recorded.name, "--table", &table])?;
        recorded.ended = false;
        Ok(recorded)
    }

    pub(crate) fn node(&self) -> PathBuf {
        PathBuf::from("/dev/mapper").join(&self.name)
    }

    /// Notes what is done from here on.
    pub(crate) fn mark(&self, what: &str) -> Result<()> {
        run("dmsetup", ["message", &self.name, "0", "mark", what]).map(drop)
    }

    /// Ends the record and reads it.
    pub(crate) fn end(mut self) -> Result<Record> {
        run("dmsetup", ["remove", "--retry", &self.name])?;
        self.ended = true;
        run("blockdev", ["--flushbufs".as_ref(), self.record.path()])?;
        // The file stays as long as it is open.
        Record::read(File::open(self.record.image())?)
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        if !self.ended
            && let Err(error) = run("dmsetup", ["remove", "--retry", "--force", &self.name])
        {
            complain(format_args!("{error:#}"));
        }
    }
}

/// What was recorded.
pub(crate) struct Record {
    file: File,
    pub(crate) entries: Vec<Entry>,
}

fn number(bytes: &[u8], at: usize) -> Result<u64> {
    Ok(u64::from_le_bytes(bytes[at..at + 8].try_into()?))
}

impl Record {
    fn read(file: File) -> Result<Self> {
        let mut head = [0; 28];
        file.read_exact_at(&mut head, 0)?;
        ensure!(number(&head, 0)? == MAGIC, "no record");
        let count = number(&head, 16)?;
        let sector = u64::from(u32::from_le_bytes(head[24..28].try_into()?));
        ensure!(
            sector.is_power_of_two() && sector >= 512,
            "sectors of {sector} bytes"
        );
        let mut entries = Vec::new();
        let mut at = sector;
        for _ in 0..count {
            let mut bytes = [0; 32];
            file.read_exact_at(&mut bytes, at)?;
            let offset = number(&bytes, 0)? * sector;
            let length = number(&bytes, 8)? * sector;
            let (flags, inline) = (number(&bytes, 16)?, number(&bytes, 24)?);
            if flags & MARK != 0 {
                let mut text = vec![0; usize::try_from(inline.min(sector - ENTRY))?];
                file.read_exact_at(&mut text, at + ENTRY)?;
                let text = String::from_utf8_lossy(&text);
                entries.push(Entry::Mark(text.trim_end_matches('\0').to_owned()));
            } else if flags & DISCARD != 0 {
                entries.push(Entry::Discard { offset, length });
            } else if length > 0 {
                let data = at + sector;
                entries.push(Entry::Write {
                    offset,
                    at: data,
                    length,
                });
            }
            if flags & (FLUSH | FUA) != 0 {
                entries.push(Entry::Flushed);
            }
            at += sector;
            if flags & DISCARD == 0 {
                at += length;
            }
        }
        Ok(Self { file, entries })
    }

    /// Does to `disk` what entry `number` did.
    pub(crate) fn replay(&self, number: usize, disk: &File) -> Result<()> {
        match self.entries.get(number).context("an entry")? {
            Entry::Write { offset, at, length } => {
                let mut bytes = vec![0; usize::try_from(*length)?];
                self.file.read_exact_at(&mut bytes, *at)?;
                disk.write_all_at(&bytes, *offset)?;
            }
            Entry::Discard { offset, length } => {
                let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                fallocate(disk, flags, offset.cast_signed(), length.cast_signed())?;
            }
            Entry::Flushed | Entry::Mark(_) => {}
        }
        Ok(())
    }
}

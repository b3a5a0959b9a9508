//! Zram: a disk in memory, so fast that the cost of tracking shows. Its driver works on bios, not on requests.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::{complain, run};

const CONTROL: &str = "/sys/class/zram-control";

/// A zram device of our own, removed when dropped.
#[derive(Debug)]
pub struct Zram {
    number: u32,
}

impl Zram {
    /// A device of `bytes` bytes.
    ///
    /// # Errors
    /// The kernel has no zram, or no memory for another one.
    pub fn new(bytes: u64) -> Result<Self> {
        if !Path::new(CONTROL).is_dir() {
            // A kernel that has it built in knows no such module.
            let _ = run("modprobe", ["zram", "num_devices=0"]);
        }
        // Reading it makes a device.
        let number = fs::read_to_string(format!("{CONTROL}/hot_add"))
            .context("this kernel has no zram")?
            .trim()
            .parse()?;
        let device = Self { number };
        device.set_size(bytes)?;
        Ok(device)
    }

    fn set_size(&self, bytes: u64) -> Result<()> {
        let number = self.number;
        fs::write(format!("/sys/block/zram{number}/disksize"), format!("{bytes}\n"))
            .with_context(|| format!("set the size of zram{number}"))
    }

    /// Forgets the content and the size, and gives it a size again: the same disk to the kernel.
    ///
    /// # Errors
    /// Somebody has it open.
    pub fn reset(&self, bytes: u64) -> Result<()> {
        fs::write(format!("/sys/block/zram{}/reset", self.number), "1\n")?;
        self.set_size(bytes)
    }

    /// Removes the device, and makes another one; says whether that has the same number.
    ///
    /// # Errors
    /// Somebody has it open.
    pub fn replace(&mut self, bytes: u64) -> Result<bool> {
        let before = self.number;
        fs::write(format!("/sys/block/zram{before}/reset"), "1\n")?;
        fs::write(format!("{CONTROL}/hot_remove"), format!("{before}\n"))?;
        self.number = fs::read_to_string(format!("{CONTROL}/hot_add"))?.trim().parse()?;
        self.set_size(bytes)?;
        Ok(self.number == before)
    }

    /// The node.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/zram{}", self.number))
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        let number = self.number;
        let removed = fs::write(format!("/sys/block/zram{number}/reset"), "1\n")
            .and_then(|()| fs::write(format!("{CONTROL}/hot_remove"), format!("{number}\n")));
        if let Err(error) = removed {
            complain(format_args!("/dev/zram{number} stays: {error}"));
        }
    }
}

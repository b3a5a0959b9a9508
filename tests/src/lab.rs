//! Lab: what a test finds in a guest with another kernel (`cargo xtask test --vm`, docs/lab.md), and how it says what
//! the kernel lacks.
//!
//! The disks are the guest's own scratch disks; nothing here gives one outside of a guest.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::run;

/// How the error of a test begins that has nothing to do on this kernel: it is reported so, and not as passed.
pub const ABSENT: &str = "not on this kernel: ";

/// Ends the test: the kernel lacks something.
///
/// # Errors
/// Always.
pub fn absent<T>(what: impl std::fmt::Display) -> Result<T> {
    bail!("{ABSENT}{what}")
}

/// Makes sure that this is a guest, in which every disk but the root is for tests.
///
/// # Errors
/// It is none.
pub fn inside() -> Result<()> {
    ensure!(
        std::env::var_os("BLKSNAP_LAB").is_some(),
        "this writes to disks of a guest of the lab: cargo xtask test --vm KERNEL"
    );
    Ok(())
}

/// Loads a module with parameters. A kernel that has it built in knows no such module, so this is no proof of anything.
pub fn load(module: &str, parameters: &[&str]) {
    // What is missing shows when it is used.
    let _ = Command::new("modprobe")
        .args(["-q", module])
        .args(parameters)
        .status();
}

/// Makes sure that device-mapper has `target`.
///
/// # Errors
/// It has not.
pub fn target(target: &str, module: &str) -> Result<()> {
    load("dm_mod", &[]);
    load(module, &[]);
    let targets = run("dmsetup", ["targets"]).unwrap_or_default();
    let is_there = targets
        .lines()
        .any(|line| line.split_whitespace().next() == Some(target));
    if is_there {
        Ok(())
    } else {
        absent(format_args!("device-mapper has no target {target}"))
    }
}

/// The guest's NVMe disk, by one controller or by two.
///
/// # Errors
/// The kernel has none such.
pub fn nvme(multipath: bool) -> Result<PathBuf> {
    inside()?;
    load("nvme", &[]);
    let mut several = Vec::new();
    for entry in fs::read_dir("/sys/class/nvme-subsystem").into_iter().flatten() {
        let names = names(&entry?.path())?;
        let is_controller = |name: &&String| {
            name.strip_prefix("nvme")
                .is_some_and(|rest| rest.parse::<u32>().is_ok())
        };
        if names.iter().filter(is_controller).count() > 1 {
            several.extend(
                names
                    .into_iter()
                    .filter(|name| Path::new("/dev").join(name).exists() && name.contains('n')),
            );
        }
    }
    // The paths to a disk have names as well, but no nodes.
    let mut disks: Vec<PathBuf> = names(Path::new("/sys/block"))?
        .into_iter()
        .filter(|name| name.starts_with("nvme") && several.contains(name) == multipath)
        .map(|name| Path::new("/dev").join(name))
        .filter(|node| node.exists())
        .collect();
    disks.sort();
    match disks.into_iter().next() {
        Some(disk) => Ok(disk),
        None if multipath => absent("NVMe with several paths to a disk"),
        None => absent("NVMe"),
    }
}

/// The names in a folder.
fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    Ok(entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect())
}

/// The guest's virtio disk `number`, from 0 on.
///
/// # Errors
/// It has none.
pub fn virtio(number: u8) -> Result<PathBuf> {
    inside()?;
    let disk = PathBuf::from(format!("/dev/vd{}", char::from(b'a' + number)));
    ensure!(disk.exists(), "the guest has no {}", disk.display());
    Ok(disk)
}

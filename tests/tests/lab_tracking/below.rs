//! Below: drivers that put a device together of others and are not device-mapper: md and bcache.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use blksnap_agent::disk::BlockDevice;
use blksnap_agent::disk::bcache::unseen_above;
use blksnap_tests::{complain, lab, run};

use crate::{disks, every_operation, nodes, subject};

/// An array, stopped when dropped.
struct Array {
    node: PathBuf,
}

impl Array {
    fn new(number: u32, level: &str, module: &str, members: &[&Path]) -> Result<Self> {
        lab::load("md_mod", &[]);
        lab::load(module, &[]);
        let known = fs::read_to_string("/proc/mdstat").unwrap_or_default();
        if !known.contains(&format!("[{level}]")) {
            return lab::absent(format_args!("md has no level {level}"));
        }
        let node = PathBuf::from(format!("/dev/md{number}"));
        let mut arguments = vec![
            "--create".to_owned(),
            node.display().to_string(),
            "--run".to_owned(),
            "--assume-clean".to_owned(),
            "--metadata=1.2".to_owned(),
            format!("--level={level}"),
            format!("--raid-devices={}", members.len()),
        ];
        arguments.extend(members.iter().map(|member| member.display().to_string()));
        run("mdadm", arguments)?;
        Ok(Self { node })
    }
}

impl Drop for Array {
    fn drop(&mut self) {
        if let Err(error) = run("mdadm", ["--stop".as_ref(), self.node.as_os_str()]) {
            complain(format_args!("{} stays: {error:#}", self.node.display()));
        }
    }
}

#[test]
#[ignore = "needs md: cargo xtask test --vm 6.12"]
fn md_raid0() -> Result<()> {
    let disks = disks(2, 16)?;
    let array = Array::new(100, "raid0", "raid0", &nodes(&disks))?;
    every_operation(&array.node, &nodes(&disks))
}

#[test]
#[ignore = "needs md: cargo xtask test --vm 6.12"]
fn md_raid1() -> Result<()> {
    let disks = disks(2, 16)?;
    let array = Array::new(101, "raid1", "raid1", &nodes(&disks))?;
    every_operation(&array.node, &nodes(&disks))
}

#[test]
#[ignore = "needs md: cargo xtask test --vm 6.12"]
fn md_raid5() -> Result<()> {
    let disks = disks(3, 16)?;
    let array = Array::new(102, "raid5", "raid456", &nodes(&disks));
    let array = match array {
        // One module has them all, and only says so of those that it is asked for.
        Err(error) if format!("{error:#}").contains("no level raid5") => return Err(error),
        array => array?,
    };
    every_operation(&array.node, &nodes(&disks))
}

/// A kernel that does not tell of writes below bcache: the backing device is not tracked, and the remedy is said.
fn is_refused(backing: &Path) -> Result<()> {
    let error = subject(&[backing]).err().context("it was attached")?;
    let error = format!("{error:#}");
    ensure!(error.contains("; track bcache"), "{error}");
    Ok(())
}

#[test]
#[ignore = "needs bcache: cargo xtask test --vm 6.12"]
fn bcache() -> Result<()> {
    bcache_of(true)
}

#[test]
#[ignore = "needs bcache: cargo xtask test --vm 6.12"]
fn bcache_without_a_cache() -> Result<()> {
    bcache_of(false)
}

fn bcache_of(cached: bool) -> Result<()> {
    lab::load("bcache", &[]);
    let register = Path::new("/sys/fs/bcache/register");
    if !register.exists() {
        return lab::absent("bcache");
    }
    let disks = disks(2, 64)?;
    let (backing, cache) = (disks[0].path(), disks[1].path());
    let words = ["--wipe-bcache", "--bucket", "64k", "-B"].map(std::ffi::OsStr::new);
    let mut devices = vec![backing.as_os_str()];
    if cached {
        devices.extend(["-C".as_ref(), cache.as_os_str()]);
    }
    run("make-bcache", words.into_iter().chain(devices))?;
    for disk in [cache, backing].iter().skip(usize::from(!cached)) {
        // It may have been seen already.
        let _ = fs::write(register, format!("{}\n", disk.display()));
    }
    let name = disks[0].name();
    let holder = format!("/sys/block/{name}/bcache/dev");
    let state = format!("/sys/block/{name}/bcache/state");
    let is_there = || {
        let state = fs::read_to_string(&state).unwrap_or_default();
        Path::new(&holder).exists() && (state.trim() != "no cache") == cached
    };
    let mut waited = 0;
    while !is_there() && waited < 100 {
        thread::sleep(Duration::from_millis(100));
        waited += 1;
    }
    ensure!(is_there(), "with a cache: {cached}; {state} does not say so");
    let device = fs::read_link(&holder).with_context(|| format!("read {holder}"))?;
    let node = Path::new("/dev").join(device.file_name().context("a name")?);
    // Written through: the data is on the backing device when the write ends.
    let outcome = match unseen_above(BlockDevice::open(backing)?.id) {
        None => every_operation(&node, &[backing]),
        Some(_) => is_refused(backing).and_then(|()| every_operation(&node, &[])),
    };
    let stop = format!("/sys/block/{name}/bcache/stop");
    fs::write(&stop, "1\n").with_context(|| format!("write {stop}"))?;
    for set in fs::read_dir("/sys/fs/bcache")? {
        let stop = set?.path().join("stop");
        if stop.exists() {
            fs::write(&stop, "1\n").with_context(|| format!("write {}", stop.display()))?;
        }
    }
    let mut waited = 0;
    while node.exists() && waited < 100 {
        thread::sleep(Duration::from_millis(100));
        waited += 1;
    }
    ensure!(!node.exists(), "{} does not go away", node.display());
    outcome
}

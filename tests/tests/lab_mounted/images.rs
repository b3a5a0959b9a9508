//! Images of file systems, mounted beside their origin: the files of the instant are there, the file system is clean,
//! and the origin does not notice.

use std::ffi::OsStr;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::{LoopDevice, LoopOptions, Writer, run, seed};

use super::scene::{
    Attached, FILE_SYSTEMS, Files, Mounted, check_file_system, daemon, export, nobody_hangs,
    read_only_options, snapshot, writable_options,
};

const FILES: usize = 30;

/// A disk in use that is tracked: its image is a copy that the take froze.
fn tracked(kind: &str, bytes: u64) -> Result<()> {
    let seed = seed(&format!("tracked {kind}"));
    let daemon = daemon()?;
    let mut disk = LoopDevice::new(bytes)?;
    disk.mkfs(kind)?;
    let root = disk.mount()?;
    let files = Files::write(&root, "before", FILES, seed)?;
    std::fs::create_dir(root.join("busy"))?;
    daemon.run(["attach".as_ref(), disk.path().as_os_str()])?;
    let writer = Writer::files(&root.join("busy"), seed);
    writer.wait_for(20);
    let taken = snapshot(&daemon, &[disk.path()], &[])?;
    writer.wait_for(20);
    drop(writer);
    Files::write(&root, "after", FILES, seed ^ 1)?;
    std::fs::remove_dir_all(root.join("before"))?;

    let mut device = Attached::new(&daemon, export(&taken, 0)?, &[])?;
    ensure!(device.sysfs("ro")? == "1");
    // It was frozen: there is nothing to replay, and nothing to repair. XFS leaves a record in its log even so, for
    // files that were open and had no name any more; it is replayed in a copy.
    if kind == "xfs" {
        let copy = daemon.scratch().join("copy");
        run(
            "cp",
            [
                OsStr::new("--sparse=always"),
                device.node.as_os_str(),
                copy.as_os_str(),
            ],
        )?;
        let copy = LoopDevice::on(&copy, &LoopOptions::default())?;
        let replayed = Mounted::new(copy.path(), writable_options(kind))?;
        files.check(replayed.path())?;
        replayed.unmount()?;
        check_file_system(kind, copy.path())?;
    } else {
        check_file_system(kind, &device.node)?;
    }
    let image = Mounted::new(&device.node, read_only_options(kind))?;
    files.check(image.path())?;
    ensure!(!image.path().join("after").exists(), "of after the instant");
    let refused = daemon.try_run(["nbd".as_ref(), "disconnect".as_ref(), device.node.as_os_str()])?;
    ensure!(
        refused.code == 1 && refused.stderr.contains("unmount"),
        "{refused:?}"
    );
    files.check(image.path())?;
    image.unmount()?;
    device.disconnect(&daemon, &[])?;
    disk.unmount()?;
    check_file_system(kind, disk.path())?;
    nobody_hangs()
}

/// A disk that the agent serves to this kernel: its image is held, and takes writes.
fn held(kind: &str, bytes: u64) -> Result<()> {
    let seed = seed(&format!("held {kind}"));
    let daemon = daemon()?;
    let path: PathBuf = daemon.scratch().join(format!("{kind}.img"));
    std::fs::File::create(&path)?.set_len(bytes)?;
    daemon.run(["serve".as_ref(), path.as_os_str()])?;
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .context("a name")?;
    let mut origin = Attached::new(&daemon, name, &[])?;
    LoopDevice::mkfs_on(&origin.node, kind)?;
    let root = Mounted::new(&origin.node, "rw")?;
    let files = Files::write(root.path(), "before", FILES, seed)?;
    std::fs::create_dir(root.path().join("busy"))?;
    let writer = Writer::files(&root.path().join("busy"), seed);
    writer.wait_for(20);
    let taken = snapshot(&daemon, &[&path], &[])?;
    writer.wait_for(20);
    drop(writer);
    std::fs::remove_dir_all(root.path().join("before"))?;
    let later = Files::write(root.path(), "after", FILES, seed ^ 1)?;

    // As after a power cut: the log is replayed, into the image.
    let mut device = Attached::new(&daemon, export(&taken, 0)?, &[])?;
    ensure!(device.sysfs("ro")? == "0");
    let image = Mounted::new(&device.node, writable_options(kind))?;
    files.check(image.path())?;
    ensure!(!image.path().join("after").exists(), "of after the instant");
    let own = Files::write(image.path(), "written to the image", FILES, seed ^ 2)?;
    image.unmount()?;
    check_file_system(kind, &device.node)?;
    let image = Mounted::new(&device.node, read_only_options(kind))?;
    files.check(image.path())?;
    own.check(image.path())?;
    image.unmount()?;
    device.disconnect(&daemon, &[])?;

    later.check(root.path())?;
    ensure!(!root.path().join("written to the image").exists());
    root.unmount()?;
    check_file_system(kind, &origin.node)?;
    origin.disconnect(&daemon, &[])?;
    nobody_hangs()
}

/// The size of a disk for this file system, where two copies of one can be mounted at the same time.
fn bytes(kind: &str) -> Result<u64> {
    if kind == "btrfs" {
        // A module, perhaps, that says what it can do only when it is there.
        let _ = std::process::Command::new("modprobe").args(["-q", kind]).status();
        ensure!(
            std::path::Path::new("/sys/fs/btrfs/features/temp_fsid").exists(),
            "not on this kernel: btrfs with one UUID mounted twice (6.7)"
        );
    }
    let known = FILE_SYSTEMS.iter().find(|(name, _)| *name == kind);
    Ok(known.context("a file system")?.1)
}

#[test]
#[ignore = "needs a kernel with nbd: cargo xtask test --vm fei"]
fn ext4_of_a_tracked_disk() -> Result<()> {
    tracked("ext4", bytes("ext4")?)
}

#[test]
#[ignore = "needs a kernel with nbd: cargo xtask test --vm fei"]
fn xfs_of_a_tracked_disk() -> Result<()> {
    tracked("xfs", bytes("xfs")?)
}

#[test]
#[ignore = "needs a kernel with nbd: cargo xtask test --vm fei"]
fn btrfs_of_a_tracked_disk() -> Result<()> {
    tracked("btrfs", bytes("btrfs")?)
}

#[test]
#[ignore = "needs a kernel with nbd: cargo xtask test --vm fei"]
fn ext4_of_a_served_disk() -> Result<()> {
    held("ext4", bytes("ext4")?)
}

#[test]
#[ignore = "needs a kernel with nbd: cargo xtask test --vm fei"]
fn xfs_of_a_served_disk() -> Result<()> {
    held("xfs", bytes("xfs")?)
}

#[test]
#[ignore = "needs a kernel with nbd: cargo xtask test --vm fei"]
fn btrfs_of_a_served_disk() -> Result<()> {
    held("btrfs", bytes("btrfs")?)
}

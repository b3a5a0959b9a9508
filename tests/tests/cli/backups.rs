//! Backups: full, incremental, given up.

use std::os::unix::fs::FileExt as _;
use std::process::Stdio;

use blksnap_tests::{Daemon, LoopDevice};

use crate::{MIB, fill, path, refused, slow_hook, tracked};

#[test]
fn a_backup_is_the_device_and_an_incremental_one_copies_less() {
    let daemon = Daemon::start().unwrap();
    let device = LoopDevice::new(32 * MIB).unwrap();
    let node = path(device.path());
    fill(device.path(), 7, 16 * MIB);
    let target = daemon.scratch().join("disk.img");
    let equal = || std::fs::read(device.path()).unwrap() == std::fs::read(&target).unwrap();

    let text = daemon.run(["backup", node, path(&target)]).unwrap();
    assert!(
        text.contains("full backup") && text.contains("crash consistent"),
        "{text}"
    );
    assert!(equal());
    let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&target).unwrap());
    assert!(
        blocks * 512 < 20 * MIB,
        "the zeroes are no holes: {blocks} blocks"
    );

    fill(device.path(), 8, MIB);
    let result = daemon
        .json(["backup", "--incremental", node, path(&target)])
        .unwrap();
    assert_eq!(result["kind"], "incremental", "{result}");
    assert!(result["copied_bytes"].as_u64().unwrap() <= 2 * MIB, "{result}");
    assert!(equal());

    // A file that somebody touched is no base.
    std::fs::OpenOptions::new()
        .write(true)
        .open(&target)
        .unwrap()
        .write_all_at(b"touched", 5 * MIB)
        .unwrap();
    let result = daemon
        .json(["backup", "--incremental", node, path(&target)])
        .unwrap();
    assert_eq!(result["kind"], "full", "{result}");
    assert!(
        result["message"].as_str().is_some_and(|why| !why.is_empty()),
        "{result}"
    );
    assert!(equal());

    // From a snapshot: as it was then.
    let then = std::fs::read(device.path()).unwrap();
    let snapshot = daemon.json(["snapshot", "create", node]).unwrap();
    fill(device.path(), 9, 2 * MIB);
    let id = snapshot["id"].as_str().unwrap();
    let result = daemon
        .json(["backup", "--incremental", "--snapshot", id, node, path(&target)])
        .unwrap();
    assert_eq!(result["kind"], "incremental", "{result}");
    assert!(std::fs::read(&target).unwrap() == then);
    let result = daemon
        .json(["backup", "--incremental", node, path(&target)])
        .unwrap();
    assert_eq!(result["kind"], "incremental", "{result}");
    assert!(equal());
}

#[test]
fn a_backup_whose_client_is_gone_ends() {
    let daemon = Daemon::start().unwrap();
    let device = LoopDevice::new(32 * MIB).unwrap();
    let node = path(device.path()).to_owned();
    fill(device.path(), 5, 32 * MIB);
    let (hook, began) = slow_hook(&daemon, "freeze", 10);
    let target = daemon.scratch().join("disk.img");
    let mut client = daemon
        .command([
            "backup",
            &node,
            path(&target),
            "--freeze-limit=60000",
            "--freeze-hook",
            path(&hook),
        ])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while !began.exists() {
        assert!(client.try_wait().unwrap().is_none(), "the backup ended");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let busy = daemon.try_run(["detach", &node]).unwrap();
    refused(&busy, &[&node, "a backup of it is being made"]);
    // Not by an interrupt, which whoever starts the tests in the background may have it ignore.
    client.kill().unwrap();
    client.wait().unwrap();
    // The claim goes with the backup, and with it the attach that was made for it.
    let asked = std::time::Instant::now();
    while !tracked(&daemon).is_empty() {
        assert!(
            asked.elapsed().as_secs() < 120,
            "the attach made for the backup stays"
        );
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert!(!target.exists(), "a part of an image stays");
    daemon.run(["backup", &node, path(&target)]).unwrap();
}

//! Snapshots: created, listed, destroyed, refused.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use blksnap_tests::{Daemon, LoopDevice, run};

use crate::{MIB, fill, path, refused, tracked};

/// A file system of its own, `size` bytes large.
struct SmallDirectory(PathBuf);

impl SmallDirectory {
    fn new(parent: &Path, size: u64) -> Self {
        let path = parent.join("small");
        std::fs::create_dir(&path).unwrap();
        let options = format!("-osize={size}");
        run(
            "mount",
            ["-t", "tmpfs", &options, "tmpfs", path.to_str().unwrap()],
        )
        .unwrap();
        Self(path)
    }

    fn free(&self) -> u64 {
        let status = nix::sys::statvfs::statvfs(&self.0).unwrap();
        status.blocks_free()
    }
}

impl Drop for SmallDirectory {
    fn drop(&mut self) {
        run("umount", [&self.0]).unwrap();
    }
}

#[test]
fn a_full_difference_directory_is_said_and_leaves_nothing() {
    let daemon = Daemon::start().unwrap();
    let mut device = LoopDevice::new(64 * MIB).unwrap();
    device.mkfs("ext4").unwrap();
    let mountpoint = device.mount().unwrap();
    std::fs::write(mountpoint.join("file"), vec![0x5a; 16 << 20]).unwrap();
    let small = SmallDirectory::new(daemon.scratch(), 4 * MIB);
    let free = small.free();
    for attached in [false, true] {
        if attached {
            daemon.run(["attach", path(device.path())]).unwrap();
        }
        let answer = daemon
            .try_run([
                "snapshot",
                "create",
                path(device.path()),
                "--storage",
                path(&small.0),
            ])
            .unwrap();
        println!("{}", answer.stderr.trim());
        refused(&answer, &[path(&small.0), "No space left"]);
        assert_eq!(small.free(), free, "the storage is not free again");
        assert_eq!(tracked(&daemon).len(), usize::from(attached));
        assert_eq!(
            daemon.json(["snapshot", "list"]).unwrap()["snapshots"],
            serde_json::json!([])
        );
        // Not frozen, and the next one works.
        std::fs::write(mountpoint.join("after"), b"x").unwrap();
        run("sync", ["-f", path(&mountpoint)]).unwrap();
    }
    daemon.run(["snapshot", "create", path(device.path())]).unwrap();
    // A target without space is as bad.
    let answer = daemon
        .try_run(["backup", path(device.path()), path(&small.0.join("x.img"))])
        .unwrap();
    println!("{}", answer.stderr.trim());
    refused(&answer, &["No space left"]);
    assert_eq!(small.free(), free);
}

#[test]
fn a_snapshot_goes_its_way() {
    let daemon = Daemon::start().unwrap();
    let devices = [
        LoopDevice::new(8 * MIB).unwrap(),
        LoopDevice::new(8 * MIB).unwrap(),
    ];
    for (device, seed) in devices.iter().zip(1..) {
        fill(device.path(), seed, 8 * MIB);
    }
    let nodes = devices.each_ref().map(|device| path(device.path()));
    let before = devices
        .each_ref()
        .map(|device| std::fs::read(device.path()).unwrap());

    // In steps.
    let id = daemon.run(["snapshot", "create"]).unwrap();
    let id = id.trim();
    refused(
        &daemon.try_run(["snapshot", "take", id]).unwrap(),
        &[id, "no device"],
    );
    daemon.run(["snapshot", "add", id, nodes[0]]).unwrap();
    refused(
        &daemon.try_run(["snapshot", "add", id, nodes[0]]).unwrap(),
        &[nodes[0], "already"],
    );
    daemon.run(["snapshot", "add", id, nodes[1]]).unwrap();
    let taken = daemon.run(["snapshot", "take", id]).unwrap();
    assert!(
        taken.contains("crash consistent") && taken.contains("nbd+unix://"),
        "{taken}"
    );
    refused(
        &daemon.try_run(["snapshot", "take", id]).unwrap(),
        &[id, "taken already"],
    );
    let third = LoopDevice::new(8 * MIB).unwrap();
    refused(
        &daemon
            .try_run(["snapshot", "add", id, path(third.path())])
            .unwrap(),
        &[id, "taken already"],
    );

    for (device, seed) in devices.iter().zip(11..) {
        fill(device.path(), seed, 4 * MIB);
    }
    let info = daemon.json(["snapshot", "info", id]).unwrap();
    assert_eq!(info["state"], "taken");
    for (at, before) in before.iter().enumerate() {
        let device = &info["devices"][at];
        assert_eq!(device["device"], nodes[at]);
        assert_eq!(device["image"]["export"], format!("{id}/{}", devices[at].name()));
        let copy = daemon.scratch().join("copy.img");
        run("nbdcopy", [device["image"]["uri"].as_str().unwrap(), path(&copy)]).unwrap();
        assert!(
            std::fs::read(&copy).unwrap() == *before,
            "the image is not the device"
        );
    }

    // And at once.
    let both = daemon.json(["snapshot", "create", nodes[0], nodes[1]]).unwrap();
    assert_eq!(both["devices"][1]["image"]["consistency"], "crash");
    let text = daemon.run(["snapshot", "list"]).unwrap();
    assert!(
        text.contains(id) && text.contains(both["id"].as_str().unwrap()),
        "{text}"
    );
    daemon
        .run(["snapshot", "destroy", id, both["id"].as_str().unwrap()])
        .unwrap();
    refused(&daemon.try_run(["snapshot", "info", id]).unwrap(), &[id]);
    assert_eq!(tracked(&daemon).len(), 2, "tracking goes on");
    assert!(run("nbdinfo", ["--list", &daemon.nbd_uri("")]).map_or(true, |list| !list.contains(id)));
}

#[test]
fn takes_of_one_file_system_at_the_same_time_all_succeed() {
    let daemon = Daemon::start().unwrap();
    let mut device = LoopDevice::new(64 * MIB).unwrap();
    device.mkfs("ext4").unwrap();
    let mountpoint = device.mount().unwrap();
    let node = path(device.path());
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut round = 0_u8;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                round = round.wrapping_add(1);
                std::fs::write(
                    mountpoint.join(format!("file{}", round % 8)),
                    vec![round; 1 << 20],
                )
                .unwrap();
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        });
        let all = std::panic::catch_unwind(|| {
            for _ in 0..3 {
                let targets = [1, 2].map(|n| daemon.scratch().join(format!("{n}.img")));
                let mut takes: Vec<_> = targets
                    .iter()
                    .map(|target| daemon.command(["backup", "--incremental", node, path(target)]))
                    .chain([daemon.command(["snapshot", "create", node])])
                    .map(|mut take| take.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap())
                    .collect();
                for take in takes.drain(..) {
                    let output = take.wait_with_output().unwrap();
                    assert!(
                        output.status.success(),
                        "{}",
                        String::from_utf8_lossy(&output.stderr)
                    );
                }
                for target in &targets {
                    run("e2fsck", ["-fn", path(target)]).unwrap();
                }
            }
        });
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        all.unwrap();
    });
}

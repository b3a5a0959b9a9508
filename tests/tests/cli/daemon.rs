//! Daemon: one for a directory; how it ends.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;

use blksnap_tests::{Daemon, DaemonOptions, LoopDevice, run};

use crate::{MIB, path, refused, slow_hook, tracked};

#[test]
fn two_daemons_of_one_directory_refuse_each_other() {
    let daemon = Daemon::start().unwrap();
    let second = daemon
        .try_run(["daemon", "--runtime-dir", path(&daemon.runtime_dir())])
        .unwrap();
    refused(
        &second,
        &[path(&daemon.runtime_dir()), "another one uses", "--runtime-dir"],
    );
    // The first one did not notice.
    daemon.run(["status"]).unwrap();
}

#[test]
fn a_daemon_ends_in_order_and_starts_again() {
    let mut daemon = Daemon::start().unwrap();
    let device = LoopDevice::new(16 * MIB).unwrap();
    for socket in [daemon.control_socket(), daemon.nbd_socket()] {
        let mode = std::fs::symlink_metadata(&socket).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", socket.display());
    }
    daemon.run(["snapshot", "create", path(device.path())]).unwrap();
    assert_eq!(daemon.stop().unwrap(), 0);
    // What is kept of the tracked device, and nothing else.
    let left: Vec<_> = std::fs::read_dir(daemon.runtime_dir())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["devices"]);
    assert_eq!(std::fs::read_dir(daemon.storage()).unwrap().count(), 0);
    // After a kill, too, although the sockets stay.
    for _ in 0..2 {
        daemon.launch(&DaemonOptions::default()).unwrap();
        assert_eq!(tracked(&daemon), [path(device.path())]);
        daemon.kill().unwrap();
        assert!(daemon.control_socket().exists());
    }
    let [bpffs, runtime, state] = [daemon.bpffs(), daemon.runtime_dir(), daemon.state_dir()];
    let purge = [
        "daemon",
        "--purge",
        "--state-dir",
        path(&state),
        "--bpffs",
        path(&bpffs),
        "--runtime-dir",
        path(&runtime),
    ];
    assert!(daemon.run(purge).unwrap().contains("tracking has ended"));
    assert!(daemon.run(purge).unwrap().contains("nothing was kept"));
    daemon.launch(&DaemonOptions::default()).unwrap();
    assert!(tracked(&daemon).is_empty());
}

#[test]
fn stopping_the_daemon_in_a_freeze_thaws_and_tells_the_client() {
    let mut daemon = Daemon::start().unwrap();
    let mut device = LoopDevice::new(32 * MIB).unwrap();
    device.mkfs("ext4").unwrap();
    let mountpoint = device.mount().unwrap();
    std::fs::write(mountpoint.join("before"), b"x").unwrap();
    let (hook, began) = slow_hook(&daemon, "frozen", 2);
    let client = daemon
        .command([
            "snapshot",
            "create",
            path(device.path()),
            "--freeze-limit=30000",
            "--freeze-hook",
            path(&hook),
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while !began.exists() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert_eq!(daemon.stop().unwrap(), 0, "{}", daemon.log());
    let output = client.wait_with_output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("cancelled"), "{error}");
    std::fs::write(mountpoint.join("after"), b"x").unwrap();
    run("sync", ["-f", path(&mountpoint)]).unwrap();
    assert_eq!(std::fs::read_dir(daemon.storage()).unwrap().count(), 0);
}

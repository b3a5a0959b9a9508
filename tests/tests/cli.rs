//! The commands, from outside: what a person types, and what comes back.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do, by a panic")]

use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use blksnap_agent::control::client::Client;
use blksnap_tests::{Answer, Daemon, DaemonOptions, LoopDevice, agent_binary, run};
use serde_json::Value;

const MIB: u64 = 1 << 20;

fn agent(arguments: &[&str]) -> Answer {
    answer(Command::new(agent_binary().unwrap()).args(arguments))
}

fn answer(command: &mut Command) -> Answer {
    let output = command.stdin(Stdio::null()).output().unwrap();
    Answer {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// An error is one line of ours on standard error, nothing on standard output, and an exit code that is not 0.
#[track_caller]
fn refused(answer: &Answer, expected: &[&str]) {
    assert!(answer.code > 0, "{answer:?}");
    assert_eq!(answer.stdout, "", "{answer:?}");
    assert_eq!(answer.stderr.lines().count(), 1, "{answer:?}");
    assert!(answer.stderr.starts_with("blksnap-agent: "), "{answer:?}");
    for text in expected {
        assert!(answer.stderr.contains(text), "no {text:?} in {answer:?}");
    }
}

/// Fills a device with what no two blocks have in common.
fn fill(device: &Path, seed: u64, bytes: u64) {
    let file = std::fs::OpenOptions::new().write(true).open(device).unwrap();
    let mut state = seed | 1;
    let mut block = vec![0; 65_536];
    for offset in (0..bytes).step_by(block.len()) {
        for word in block.chunks_exact_mut(8) {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all_at(&block, offset).unwrap();
    }
    file.sync_all().unwrap();
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn tracked(daemon: &Daemon) -> Vec<String> {
    daemon.json(["status"]).unwrap()["devices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|device| device["device"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn help_completions_and_manual_need_nothing() {
    for arguments in [&["--help"][..], &["--version"], &["snapshot", "create", "--help"]] {
        let answer = agent(arguments);
        assert_eq!((answer.code, &*answer.stderr), (0, ""), "{arguments:?}");
        assert!(answer.stdout.contains("blksnap-agent"));
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = agent(&["completions", shell]).ok().unwrap();
        assert!(
            script.contains("blksnap-agent") && script.contains("snapshot"),
            "{shell}"
        );
    }
    assert!(agent(&["man"]).ok().unwrap().contains(".TH blksnap-agent 1"));
    let pages = tempfile::tempdir().unwrap();
    agent(&["man", path(pages.path())]).ok().unwrap();
    let snapshot_take = pages.path().join("blksnap-agent-snapshot-take.1");
    assert!(
        std::fs::read_to_string(snapshot_take)
            .unwrap()
            .contains("max\\-seconds")
    );
}

#[test]
fn a_wrong_command_line_is_one_line_and_code_2() {
    for arguments in [
        &["attach"][..],
        &["attach", "--block-size", "3X", "/dev/loop0"],
        &["frobnicate"],
        &["cbt", "extents", "/dev/loop0", "--since", "yesterday"],
        &["cbt", "mark", "/dev/loop0", "--range", "1"],
        &["snapshot", "info", "a/b"],
        &["status", "--output", "xml"],
    ] {
        let answer = agent(arguments);
        refused(&answer, &["--help"]);
        assert_eq!(answer.code, 2, "{arguments:?}");
    }
}

#[test]
fn without_a_daemon_the_remedy_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("control.sock");
    let answer = agent(&["--socket", path(&socket), "status"]);
    refused(&answer, &["not running", "`blksnap-agent daemon`"]);
    // A socket that a daemon left behind.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    refused(&agent(&["--socket", path(&socket), "status"]), &["not running"]);
}

#[test]
fn a_command_waits_for_a_daemon_that_is_starting() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("run/control.sock");
    let mut daemon = Command::new(agent_binary().unwrap())
        .args(["daemon", "--no-pins", "--socket", path(&socket), "--storage"])
        .arg(directory.path().join("storage"))
        .arg("--state-dir")
        .arg(directory.path().join("state"))
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while !socket.with_file_name("daemon.lock").exists() {
        assert!(daemon.try_wait().unwrap().is_none());
    }
    let answer = agent(&["--socket", path(&socket), "status"]);
    let pid = nix::unistd::Pid::from_raw(i32::try_from(daemon.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(daemon.wait().unwrap().success());
    answer.ok().unwrap();
}

#[test]
fn without_privileges_every_command_says_so() {
    let daemon = Daemon::start().unwrap();
    // Where somebody without privileges can run it.
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let binary = directory.path().join("blksnap-agent");
    std::fs::copy(agent_binary().unwrap(), &binary).unwrap();
    let unprivileged = |arguments: &[&str]| {
        answer(
            Command::new("setpriv")
                .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"])
                .arg(&binary)
                .args(arguments)
                .env("BLKSNAP_SOCKET", daemon.control_socket()),
        )
    };
    for arguments in [
        &["status"][..],
        &["attach", "/dev/loop0"],
        &["snapshot", "create", "/dev/loop0"],
        &["backup", "/dev/loop0", "/tmp/none.img"],
        &["daemon"],
    ] {
        refused(&unprivileged(arguments), &["needs root", "sudo"]);
    }
    let doctor = unprivileged(&["doctor", "--output", "json"]);
    assert_eq!(doctor.code, 1);
    let report: Value = serde_json::from_str(&doctor.stdout).unwrap();
    let privileges = report["checks"]
        .as_array()
        .unwrap()
        .iter()
        .find(|check| check["name"] == "privileges")
        .unwrap()
        .clone();
    assert_eq!(privileges["state"], "failed");
    assert!(privileges["remedy"].as_str().unwrap().contains("sudo"));
    assert!(unprivileged(&["--help"]).ok().is_ok());
}

#[test]
fn without_type_information_nothing_starts_and_nothing_stays() {
    let directory = tempfile::tempdir().unwrap();
    let (runtime, storage) = (directory.path().join("run"), directory.path().join("storage"));
    for wrong in ["/nonexistent/btf", "/proc/version"] {
        let answer = agent(&[
            "daemon",
            "--btf",
            wrong,
            "--runtime-dir",
            path(&runtime),
            "--storage",
            path(&storage),
            "--state-dir",
            path(&directory.path().join("state")),
        ]);
        refused(&answer, &["CONFIG_DEBUG_INFO_BTF"]);
        assert!(!runtime.exists() && !storage.exists());
        let doctor = agent(&["doctor", "--btf", wrong]);
        assert_eq!(doctor.code, 1);
        assert!(
            doctor.stdout.contains("CONFIG_DEBUG_INFO_BTF=y"),
            "{}",
            doctor.stdout
        );
    }
}

#[test]
fn doctor_finds_this_machine_able() {
    let answer = agent(&["doctor"]);
    assert_eq!(answer.code, 0, "{answer:?}");
    let report: Value = serde_json::from_str(&agent(&["doctor", "--output", "json"]).ok().unwrap()).unwrap();
    assert_eq!(report["ok"], true);
    for name in [
        "kernel",
        "btf",
        "privileges",
        "bpffs",
        "tracking programs",
        "io_uring",
    ] {
        assert!(
            report["checks"]
                .as_array()
                .unwrap()
                .iter()
                .any(|check| check["name"] == name),
            "{name}"
        );
    }
}

#[test]
fn a_device_is_attached_seen_and_detached() {
    let daemon = Daemon::start().unwrap();
    let device = LoopDevice::new(64 * MIB).unwrap();
    let node = path(device.path());
    assert!(daemon.run(["status"]).unwrap().contains("no device is tracked"));
    let attached = daemon.json(["attach", node, "--block-size", "4K"]).unwrap();
    assert_eq!(attached["devices"][0]["cbt"]["block_size"], 4096);
    assert_eq!(attached["devices"][0]["cbt"]["block_count"], 16_384);
    assert_eq!(attached["devices"][0]["name"], device.name());

    fill(device.path(), 1, MIB);
    let status = daemon.json(["status", node]).unwrap();
    assert_eq!(status["devices"][0]["cbt"]["dirty_blocks"], 256);
    let counters = &status["devices"][0]["counters"];
    assert!(counters["bytes"]["write"].as_u64().unwrap() >= MIB, "{status}");
    assert_eq!(counters["run_misses"], 0);
    let text = daemon.run(["status"]).unwrap();
    assert!(
        text.contains(node) && text.contains("64 MiB") && text.contains("4 KiB"),
        "{text}"
    );

    daemon.run(["detach", node]).unwrap();
    assert!(tracked(&daemon).is_empty());
    refused(
        &daemon.try_run(["detach", node]).unwrap(),
        &[node, "not tracked", "attach"],
    );
}

#[test]
fn bad_input_is_one_line_with_the_remedy_and_leaves_nothing() {
    let daemon = Daemon::start().unwrap();
    let device = LoopDevice::new(16 * MIB).unwrap();
    let node = path(device.path());
    let scratch = daemon.scratch();
    let file = scratch.join("file");
    std::fs::write(&file, b"no device").unwrap();
    let (file, target) = (path(&file), scratch.join("target.img"));
    let target = path(&target);
    let unknown = "01234567-89ab-cdef-0123-456789abcdef";
    let base = format!("{unknown}:1");
    let cases: &[(&[&str], &[&str])] = &[
        (
            &["attach", "/dev/no-such-device"],
            &["/dev/no-such-device", "lsblk"],
        ),
        (&["attach", "name/with/a/slash"], &["name/with/a/slash", "lsblk"]),
        (&["attach", file], &[file, "not a block device"]),
        (&["attach", "/dev/null"], &["/dev/null", "not a block device"]),
        (&["attach", "/dev"], &["/dev", "not a block device"]),
        (
            &["attach", node, "--block-size", "5000"],
            &["5000", "power of two"],
        ),
        (&["attach", node, "--block-size", "128M"], &["power of two"]),
        (&["detach", node], &[node, "not tracked", "attach"]),
        (&["status", node], &[node, "not tracked", "attach"]),
        (&["cbt", "info", node], &[node, "not tracked"]),
        (
            &["cbt", "extents", node, "--since", &base],
            &[node, "not tracked"],
        ),
        (&["cbt", "map", node], &[node, "not tracked"]),
        (&["cbt", "mark", node, "--range", "0:4K"], &[node, "not tracked"]),
        (&["snapshot", "info", unknown], &[unknown, "snapshot list"]),
        (&["snapshot", "take", unknown], &[unknown, "snapshot list"]),
        (&["snapshot", "destroy", unknown], &[unknown, "snapshot list"]),
        (&["snapshot", "add", unknown, node], &[unknown, "snapshot list"]),
        (
            &["snapshot", "create", "/dev/no-such-device"],
            &["/dev/no-such-device"],
        ),
        (&["snapshot", "create", file], &[file, "not a block device"]),
        (&["snapshot", "create", node, "--storage", file], &[file]),
        (
            &["snapshot", "create", node, "--freeze-hook", "/nonexistent/hook"],
            &["/nonexistent/hook"],
        ),
        (
            &["backup", "/dev/no-such-device", target],
            &["/dev/no-such-device"],
        ),
        (&["backup", file, target], &[file, "not a block device"]),
        (&["backup", node, "/nonexistent/dir/x.img"], &["/nonexistent/dir"]),
        (&["backup", node, "/dev"], &["/dev"]),
        (&["backup", node, node], &[node]),
        (
            &["backup", "--snapshot", unknown, node, target],
            &[unknown, "snapshot list"],
        ),
    ];
    for (arguments, expected) in cases {
        println!("{arguments:?}");
        let answer = daemon.try_run(*arguments).unwrap();
        println!("  {}", answer.stderr.trim());
        refused(&answer, expected);
        assert!(
            tracked(&daemon).is_empty(),
            "{arguments:?} left a device attached"
        );
        assert!(!Path::new(target).exists());
    }
    assert_eq!(
        daemon.json(["snapshot", "list"]).unwrap()["snapshots"],
        serde_json::json!([])
    );

    daemon.run(["attach", node]).unwrap();
    let twice = daemon.try_run(["attach", node]).unwrap();
    refused(&twice, &[node, "attached already", "status"]);
    // By another name of the same device, too.
    let link = scratch.join("link");
    std::os::unix::fs::symlink(device.path(), &link).unwrap();
    refused(
        &daemon.try_run(["attach", path(&link)]).unwrap(),
        &["attached already"],
    );
    for range in ["16M:1", "0:17M", "16777215:2"] {
        let answer = daemon.try_run(["cbt", "mark", node, "--range", range]).unwrap();
        refused(&answer, &[node, "past"]);
    }
    refused(&daemon.try_run(["cbt", "map", node]).unwrap(), &[node, "take"]);
    assert_eq!(tracked(&daemon), [node]);
}

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
fn changes_are_listed_marked_and_summed_up() {
    let daemon = Daemon::start().unwrap();
    let device = LoopDevice::new(8 * MIB).unwrap();
    let node = path(device.path());
    daemon.run(["attach", node]).unwrap();
    let take = || {
        let snapshot = daemon.json(["snapshot", "create", node]).unwrap();
        let image = snapshot["devices"][0]["image"].clone();
        daemon
            .run(["snapshot", "destroy", snapshot["id"].as_str().unwrap()])
            .unwrap();
        format!(
            "{}:{}",
            image["generation"].as_str().unwrap(),
            image["number"].as_u64().unwrap()
        )
    };
    let extents = |base: &str| daemon.json(["cbt", "extents", node, "--since", base]).unwrap();
    let first = take();
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(device.path())
        .unwrap();
    file.write_all_at(&[1; 4096], 65_536 * 3).unwrap();
    file.sync_all().unwrap();
    let second = take();
    let block = |at: u64, count: u64| serde_json::json!({"offset": at * 65_536, "length": count * 65_536});
    assert_eq!(extents(&first)["extents"], serde_json::json!([block(3, 1)]));
    assert_eq!(extents(&second)["extents"], serde_json::json!([]));

    // Marked ranges count at once and at the next take; each one of the list.
    let marked = daemon
        .json(["cbt", "mark", node, "--range", "0:1", "--range", "1M:65537"])
        .unwrap();
    assert_eq!(marked["blocks"], 3);
    let want = serde_json::json!([block(0, 1), block(3, 1), block(16, 2)]);
    assert_eq!(extents(&first)["extents"], want);
    take();
    assert_eq!(
        extents(&second)["extents"],
        serde_json::json!([block(0, 1), block(16, 2)])
    );

    let map = daemon.scratch().join("map");
    daemon.run(["cbt", "map", node, "--file", path(&map)]).unwrap();
    let bytes = std::fs::read(&map).unwrap();
    assert_eq!(bytes.len(), 128);
    assert_eq!(
        (bytes[0], bytes[3], bytes[16], bytes[17], bytes[18]),
        (3, 2, 3, 3, 0)
    );
    let summary = daemon.json(["cbt", "map", node]).unwrap();
    assert_eq!(
        summary["periods"][0],
        serde_json::json!({"number": 0, "blocks": 124})
    );

    let stale = format!("{}:1", "01234567-89ab-cdef-0123-456789abcdef");
    assert_eq!(extents(&stale)["full_needed"]["reason"], "generation_ended");
    let text = daemon.run(["cbt", "extents", node, "--since", &stale]).unwrap();
    assert!(text.starts_with("full needed"), "{text}");
}

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

#[tokio::test]
async fn metrics_are_served_on_the_socket_and_on_loopback() {
    let port = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let options = DaemonOptions {
        arguments: vec![format!("--metrics-listen=127.0.0.1:{port}").into()],
        ..DaemonOptions::default()
    };
    let daemon = Daemon::with_options(&options).unwrap();
    let device = LoopDevice::new(16 * MIB).unwrap();
    daemon.run(["attach", path(device.path())]).unwrap();
    fill(device.path(), 3, MIB);
    let id = daemon.run(["snapshot", "create", path(device.path())]).unwrap();
    let export = format!("{}/{}", id.lines().next().unwrap(), device.name());
    run("nbdcopy", [&daemon.nbd_uri(&export), "null:"]).unwrap();

    let client = Client::new(&daemon.control_socket());
    let text = String::from_utf8(client.get_bytes("/metrics").await.unwrap().to_vec()).unwrap();
    let name = device.name();
    let value = |series: &str| -> f64 {
        text.lines()
            .find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))
            .unwrap_or_else(|| panic!("no {series} in\n{text}"))
            .parse()
            .unwrap()
    };
    let written = format!("blksnap_device_written_bytes_total{{device=\"{name}\",operation=\"write\"}}");
    assert!(value(&written) >= MIB as f64);
    for zero in [
        format!("blksnap_device_ring_full_total{{device=\"{name}\"}}"),
        format!("blksnap_device_run_misses_total{{device=\"{name}\"}}"),
        format!("blksnap_device_generation_resets_total{{device=\"{name}\",reason=\"run_missed\"}}"),
        "blksnap_takes_total{result=\"failed\"}".to_owned(),
        "blksnap_nbd_errors_total{error=\"eio\"}".to_owned(),
    ] {
        assert_eq!(value(&zero), 0.0, "{zero}");
    }
    assert_eq!(value("blksnap_snapshots{state=\"taken\"}"), 1.0);
    assert_eq!(value("blksnap_takes_total{result=\"succeeded\"}"), 1.0);
    assert!(value("blksnap_difference_storage_bytes") >= MIB as f64);
    assert!(value("blksnap_nbd_requests_total{command=\"read\"}") >= 1.0);
    assert!(value("blksnap_nbd_read_bytes_total") >= MIB as f64);
    assert!(text.ends_with("# EOF\n"));

    // Over TCP there are the metrics and nothing else.
    let get = |path: &str| {
        use std::io::{Read as _, Write as _};
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let answer = get("/metrics");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("application/openmetrics-text"));
    assert!(answer.contains("blksnap_build_info"));
    assert!(get("/v1/devices").starts_with("HTTP/1.1 404"));

    let answer = daemon
        .try_run([
            "daemon",
            "--metrics-listen=0.0.0.0:9911",
            "--runtime-dir",
            "/nonexistent/run",
        ])
        .unwrap();
    refused(&answer, &["loopback", "127.0.0.1"]);
}

/// A hook that says with a file that it began `stage`, and takes some seconds then.
fn slow_hook(daemon: &Daemon, stage: &str, seconds: u32) -> (PathBuf, PathBuf) {
    let (hook, began) = (daemon.scratch().join("hook"), daemon.scratch().join("began"));
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = {stage} ] && touch {} && sleep {seconds}\nexit 0\n",
        began.display()
    );
    std::fs::write(&hook, script).unwrap();
    std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o755)).unwrap();
    (hook, began)
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
    let pid = i32::try_from(client.id()).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGINT).unwrap();
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

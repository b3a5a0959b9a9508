//! Commands: help, errors and what they say where no daemon is.

use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};

use blksnap_tests::{Daemon, agent_binary};
use serde_json::Value;

use crate::{agent, answer, path, refused};

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

//! The commands, from outside: what a person types, and what comes back.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do, by a panic")]

mod backups;
mod commands;
mod daemon;
mod devices;
mod snapshots;

use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use blksnap_tests::{Answer, Daemon, agent_binary};

pub(crate) const MIB: u64 = 1 << 20;

pub(crate) fn agent(arguments: &[&str]) -> Answer {
    answer(Command::new(agent_binary().unwrap()).args(arguments))
}

pub(crate) fn answer(command: &mut Command) -> Answer {
    let output = command.stdin(Stdio::null()).output().unwrap();
    Answer {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// An error is one line of ours on standard error, nothing on standard output, and an exit code that is not 0.
#[track_caller]
pub(crate) fn refused(answer: &Answer, expected: &[&str]) {
    assert!(answer.code > 0, "{answer:?}");
    assert_eq!(answer.stdout, "", "{answer:?}");
    assert_eq!(answer.stderr.lines().count(), 1, "{answer:?}");
    assert!(answer.stderr.starts_with("blksnap-agent: "), "{answer:?}");
    for text in expected {
        assert!(answer.stderr.contains(text), "no {text:?} in {answer:?}");
    }
}

/// Fills a device with what no two blocks have in common.
pub(crate) fn fill(device: &Path, seed: u64, bytes: u64) {
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

pub(crate) fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub(crate) fn tracked(daemon: &Daemon) -> Vec<String> {
    daemon.json(["status"]).unwrap()["devices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|device| device["device"].as_str().unwrap().to_owned())
        .collect()
}

/// A hook that says with a file that it began `stage`, and takes some seconds then.
pub(crate) fn slow_hook(daemon: &Daemon, stage: &str, seconds: u32) -> (PathBuf, PathBuf) {
    let (hook, began) = (daemon.scratch().join("hook"), daemon.scratch().join("began"));
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = {stage} ] && touch {} && sleep {seconds}\nexit 0\n",
        began.display()
    );
    std::fs::write(&hook, script).unwrap();
    std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o755)).unwrap();
    (hook, began)
}

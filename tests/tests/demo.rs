//! Demonstration: what a new user runs first works, and leaves nothing behind, whenever it is stopped.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::{agent_binary, run, seed};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tempfile::TempDir;

/// Lines that say what was done: a device, the daemon, the attach, the snapshot and so on.
const STEPS: usize = 12;

/// The demonstration, with everything it makes in a directory of its own.
struct Demo {
    child: Child,
    directory: TempDir,
}

impl Demo {
    fn start() -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("blksnap-demo-").tempdir()?;
        let child = Command::new(env!("CARGO_BIN_EXE_blksnap-demo"))
            .env("TMPDIR", directory.path())
            .env("BLKSNAP_AGENT", agent_binary()?)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // As in a terminal: it and what it starts are one group.
            .process_group(0)
            .spawn()?;
        Ok(Self { child, directory })
    }

    /// Reads until `steps` steps are done, or to the end; gives the text.
    fn read(&mut self, steps: usize) -> Result<String> {
        let output = self.child.stdout.as_mut().context("it is read once")?;
        let mut text = String::new();
        let mut done = 0;
        for line in BufReader::new(output).lines() {
            let line = line?;
            done += usize::from(line.starts_with('['));
            text.push_str(&line);
            text.push('\n');
            if done == steps {
                break;
            }
        }
        Ok(text)
    }

    /// Waits for the end and makes sure that nothing is left.
    fn end(self) -> Result<(i32, String)> {
        let output = self.child.wait_with_output()?;
        let messages = String::from_utf8_lossy(&output.stderr).into_owned();
        nothing_is_left(self.directory.path()).with_context(|| format!("it said: {messages}"))?;
        Ok((output.status.code().unwrap_or(-1), messages))
    }
}

/// Everything that the demonstration makes has the directory in its name, or in its environment.
fn nothing_is_left(directory: &Path) -> Result<()> {
    let name = directory.to_str().context("the directory's name is text")?;
    let left: Vec<_> = fs::read_dir(directory)?.collect::<Result<_, _>>()?;
    ensure!(left.is_empty(), "files are left: {left:?}");
    let devices = run(
        "losetup",
        ["--list", "--noheadings", "--output", "NAME,BACK-FILE"],
    )?;
    ensure!(!devices.contains(name), "loop devices are left: {devices}");
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(!mounts.contains(name), "mounts are left: {mounts}");
    for process in fs::read_dir("/proc")? {
        let process = process?.path();
        // Processes end while this reads; kernel threads have no environment.
        let Ok(environment) = fs::read(process.join("environ")) else {
            continue;
        };
        let inherited = environment
            .split(|byte| *byte == 0)
            .any(|entry| entry.strip_prefix(b"TMPDIR=") == Some(name.as_bytes()));
        if inherited {
            let command = fs::read(process.join("cmdline")).unwrap_or_default();
            anyhow::bail!(
                "process {} is left: {}",
                process.display(),
                String::from_utf8_lossy(&command)
            );
        }
    }
    Ok(())
}

#[test]
fn the_demonstration_works_and_leaves_nothing() -> Result<()> {
    let mut demo = Demo::start()?;
    let text = demo.read(usize::MAX)?;
    let (code, messages) = demo.end()?;
    ensure!(code == 0 && messages.is_empty(), "{code}: {messages}\n{text}");
    ensure!(
        text.lines().filter(|line| line.starts_with('[')).count() == STEPS,
        "{text}"
    );
    for part in [
        "e2fsck -f -n: clean",
        "xfs_repair -n: clean",
        "one instant",
        "BLOCKS REPORTED",
        "Next,",
    ] {
        ensure!(text.contains(part), "{part} is missing:\n{text}");
    }
    Ok(())
}

#[test]
fn a_demonstration_that_is_stopped_leaves_nothing() -> Result<()> {
    let mut random = StdRng::seed_from_u64(seed("a_demonstration_that_is_stopped_leaves_nothing"));
    // Ctrl-C in a terminal reaches the whole group; a process manager knows the one process.
    for (signal, group) in [
        (Signal::SIGINT, true),
        (Signal::SIGINT, false),
        (Signal::SIGTERM, false),
    ] {
        let mut demo = Demo::start()?;
        let step = random.random_range(1..STEPS);
        let text = demo.read(step)?;
        // Not right at the beginning of the next step.
        std::thread::sleep(std::time::Duration::from_millis(random.random_range(0..500)));
        let pid = i32::try_from(demo.child.id())?;
        kill(Pid::from_raw(if group { -pid } else { pid }), signal)?;
        let (code, messages) = demo.end().with_context(|| format!("{signal} after:\n{text}"))?;
        // At the end of the last step it may have been too late.
        ensure!(
            (code == 130 && messages.contains("interrupted")) || (code == 0 && step == STEPS - 1),
            "{signal} after {step} steps: code {code}: {messages}"
        );
    }
    Ok(())
}

#[test]
fn a_demonstration_that_nobody_reads_leaves_nothing() -> Result<()> {
    let mut demo = Demo::start()?;
    demo.read(2)?;
    // As `cargo xtask run | head`, or a terminal that is closed.
    demo.child.stdout = None;
    demo.child.stderr = None;
    let (code, _) = demo.end()?;
    ensure!(code == 1, "{code}");
    Ok(())
}

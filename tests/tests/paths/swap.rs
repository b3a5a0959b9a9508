//! Swap: pages that the kernel writes by itself.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::{LoopDevice, LoopOptions, Zram, complain, run};

use crate::{KIB, MIB};
use blksnap_tests::path::Subject;

/// What a program may keep in memory, and how much it has.
const LIMIT: u64 = 24 * MIB;
const USED: usize = 48 << 20;

/// A group of processes of our own with little memory.
struct Group(PathBuf);

impl Group {
    fn new(name: &str) -> Result<Self> {
        // Version 1 has a hierarchy for memory, version 2 one for all.
        let v1 = Path::new("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists();
        let root = Path::new(if v1 {
            "/sys/fs/cgroup/memory"
        } else {
            "/sys/fs/cgroup"
        });
        let group = Self(root.join(format!("blksnap-test-{}-{name}", std::process::id())));
        if !v1 {
            fs::write(root.join("cgroup.subtree_control"), "+memory")?;
        }
        fs::create_dir(&group.0).with_context(|| format!("make {}", group.0.display()))?;
        let limit = if v1 { "memory.limit_in_bytes" } else { "memory.max" };
        fs::write(group.0.join(limit), LIMIT.to_string())?;
        Ok(group)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            complain(format_args!("{} stays: {error}", self.0.display()));
        }
    }
}

/// Swap on a device, until it is dropped.
struct Swap(PathBuf);

impl Drop for Swap {
    fn drop(&mut self) {
        if let Err(error) = run("swapoff", [&self.0]) {
            complain(format_args!("{error:#}"));
        }
    }
}

/// A program in the group holds more than it may; what it holds comes back unharmed.
fn swap_out(group: &Group) -> Result<()> {
    // `tail` keeps the end of its input; the shell enters the group before it becomes it.
    let mut child = Command::new("sh")
        .arg("-c")
        .arg("echo $$ > \"$0/cgroup.procs\" && exec tail --bytes=$1")
        .arg(&group.0)
        .arg(USED.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut input = child.stdin.take().context("a pipe")?;
    // Nothing that compresses, and every page another one.
    let mut state = rand::random::<u64>() | 1;
    let sent: Vec<u8> = (0..USED / 8)
        .flat_map(|_| {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .collect();
    let copy = sent.clone();
    let writer = std::thread::spawn(move || input.write_all(&copy));
    let output = child.wait_with_output()?;
    writer.join().expect("the writer panicked")?;
    ensure!(output.status.success(), "{}", output.status);
    ensure!(
        output.stdout.len() > USED / 2,
        "{} bytes came back",
        output.stdout.len()
    );
    Ok(())
}

/// `forgets`: the device frees what is no longer used of it, so that nothing is left to compare.
fn swap_on(node: &Path, name: &str, forgets: bool) -> Result<()> {
    let mut subject = Subject::new([(node, 4 * KIB)])?;
    let (_, seen) = subject.observe(|| {
        run("mkswap", [node])?;
        run("sync", [node])?;
        Ok(())
    })?;
    ensure!(!seen[0].changed.is_empty(), "mkswap changed nothing");
    let group = Group::new(name)?;
    let (_, seen) = subject.observe(|| {
        run(
            "swapon",
            ["--priority".as_ref(), "32000".as_ref(), node.as_os_str()],
        )?;
        let swap = Swap(node.to_owned());
        swap_out(&group)?;
        drop(swap);
        Ok(())
    })?;
    let written = seen[0].operations[0];
    println!(
        "{}: {} sectors changed, {written} writes",
        node.display(),
        seen[0].changed.len()
    );
    let reported: u64 = seen[0].reported.iter().map(|(_, length)| length).sum();
    ensure!(
        written > 1000 && reported > MIB,
        "hardly anything was swapped out"
    );
    ensure!(
        forgets || seen[0].changed.len() > 1000,
        "what was swapped out is gone"
    );
    Ok(())
}

#[test]
fn swap_on_zram_and_on_a_partition() -> Result<()> {
    // One after the other: the kernel chooses among all swap there is.
    let zram = Zram::new(96 * MIB)?;
    swap_on(&zram.path(), "zram", true)?;
    let disk = LoopDevice::with_options(
        104 * MIB,
        &LoopOptions {
            partitions: vec![("2056s".to_owned(), "200000s".to_owned())],
            ..LoopOptions::default()
        },
    )?;
    swap_on(&disk.partition(1), "partition", false)
}

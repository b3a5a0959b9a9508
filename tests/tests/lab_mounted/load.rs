//! Devices that are ended while they are written to and read.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, anyhow, ensure};
use blksnap_agent::sys::AlignedBuffer;
use blksnap_tests::{Daemon, LoopDevice, Writer, read_device, seed};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::Value;

use super::scene::{Attached, Files, MIB, Mounted, check_file_system, daemon, nobody_hangs, wait_until};

const SIZE: u64 = 16 * MIB;

/// Reads and writes a device in several threads until the first error of each.
struct Load {
    requests: Arc<AtomicU64>,
    threads: Vec<JoinHandle<std::io::Error>>,
}

impl Load {
    fn start(node: &Path, seed: u64) -> Result<Self> {
        let requests = Arc::new(AtomicU64::new(0));
        let threads = (0..4).map(|number| {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_DIRECT)
                .open(node)?;
            let counter = Arc::clone(&requests);
            let mut random = StdRng::seed_from_u64(seed ^ number);
            Ok(std::thread::spawn(move || {
                let mut buffer = AlignedBuffer::zeroed(64 << 10);
                loop {
                    let offset = random.random_range(0..(SIZE - (64 << 10)) / 4096) * 4096;
                    let done = if random.random_bool(0.5) {
                        file.write_all_at(buffer.as_slice(), offset)
                    } else {
                        file.read_exact_at(buffer.as_mut_slice(), offset)
                    };
                    if let Err(error) = done {
                        return error;
                    }
                    counter.fetch_add(1, Ordering::SeqCst);
                }
            }))
        });
        let threads = threads.collect::<Result<_>>()?;
        Ok(Self { requests, threads })
    }

    fn wait_for(&self, count: u64) -> Result<()> {
        let due = self.requests.load(Ordering::SeqCst) + count;
        wait_until("the load goes on", || {
            Ok(self.requests.load(Ordering::SeqCst) >= due)
        })
    }

    /// All of it has failed.
    fn fails(self) -> Result<()> {
        wait_until("the load fails", || {
            Ok(self.threads.iter().all(JoinHandle::is_finished))
        })?;
        for thread in self.threads {
            thread.join().map_err(|_| anyhow!("a thread panicked"))?;
        }
        Ok(())
    }
}

fn served(daemon: &Daemon, name: &str, bytes: u64) -> Result<PathBuf> {
    let path = daemon.scratch().join(name);
    File::create(&path)?.set_len(bytes)?;
    daemon.run(["serve".as_ref(), path.as_os_str()])?;
    Ok(path)
}

#[test]
#[ignore = "needs a kernel with nbd: cargo xtask test --vm fei"]
fn a_device_is_ended_and_made_again_under_load() -> Result<()> {
    let daemon = daemon()?;
    let seed = seed("ended");
    served(&daemon, "loaded", SIZE)?;
    for round in 0..6 {
        let mut device = Attached::new(&daemon, "loaded", &[])?;
        let load = Load::start(&device.node, seed ^ round)?;
        load.wait_for(20)?;
        device.disconnect(&daemon, if round % 2 == 0 { &[] } else { &["--force"] })?;
        load.fails()?;
        ensure!(
            device
                .links()
                .iter()
                .all(|link| fs::symlink_metadata(link).is_err())
        );
        nobody_hangs()?;
    }
    let mut device = Attached::new(&daemon, "loaded", &[])?;
    ensure!(read_device(&device.node)?.len() as u64 == SIZE);
    device.disconnect(&daemon, &[])?;
    nobody_hangs()
}

#[test]
#[ignore = "needs a kernel with nbd: cargo xtask test --vm fei"]
fn a_mounted_device_is_ended_by_force_only() -> Result<()> {
    let daemon = daemon()?;
    let seed = seed("forced");
    let path = served(&daemon, "forced", 48 * MIB)?;
    let mut device = Attached::new(&daemon, "forced", &[])?;
    LoopDevice::mkfs_on(&device.node, "ext4")?;
    let root = Mounted::new(&device.node, "rw")?;
    let files = Files::write(root.path(), "synced", 10, seed)?;
    fs::create_dir(root.path().join("busy"))?;
    let writer = Writer::files(&root.path().join("busy"), seed);
    writer.wait_for(20);
    let refused = daemon.try_run(["nbd".as_ref(), "disconnect".as_ref(), device.node.as_os_str()])?;
    ensure!(
        refused.code == 1 && refused.stderr.contains("--force"),
        "{refused:?}"
    );
    writer.wait_for(20);
    device.disconnect(&daemon, &["--force"])?;
    // Every step fails, none hangs.
    writer.wait_for(20);
    drop(writer);
    let list = daemon.json(["nbd", "list"])?;
    let listed = list["devices"].as_array().context("devices")?;
    let ended = |found: &&Value| found["export"] == "forced";
    let found = listed.iter().find(ended).context("a device that is mounted")?;
    ensure!(found["ended"] == true, "{list}");
    ensure!(
        device
            .links()
            .iter()
            .all(|link| fs::symlink_metadata(link).is_err())
    );
    // Its export can be connected already.
    let mut again = Attached::new(&daemon, "forced", &["--read-only"])?;
    ensure!(again.node != device.node);
    again.disconnect(&daemon, &[])?;
    root.unmount()?;
    wait_until("the device goes with the mount", || {
        Ok(device.sysfs("pid").is_err())
    })?;

    let mut device = Attached::new(&daemon, "forced", &[])?;
    let root = Mounted::new(&device.node, "rw")?;
    files.check(root.path())?;
    root.unmount()?;
    check_file_system("ext4", &device.node)?;
    device.disconnect(&daemon, &[])?;
    check_file_system("ext4", &path)?;
    nobody_hangs()
}

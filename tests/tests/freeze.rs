//! Freezing: file systems on loop devices stop, go on, and never stay frozen when the agent dies.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do, by a panic")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use blksnap_agent::disk::{BlockDevice, DirectReader, FileSystems, FreezeError, Freezer, WatchdogCommand};
use blksnap_agent::sys::{AlignedBuffer, ioctl};
use blksnap_tests::{Daemon, DaemonOptions, LoopDevice, LoopOptions, agent_binary, run};
use nix::errno::Errno;

/// Bound against hanging for ever, not a measurement.
const PATIENCE: Duration = Duration::from_secs(30);

/// Set in a process that plays the agent: the devices that it freezes.
const ROLE: &str = "BLKSNAP_TEST_FREEZE";

fn watchdog() -> WatchdogCommand {
    WatchdogCommand {
        program: agent_binary().unwrap(),
        arguments: vec!["thaw-watchdog".into()],
    }
}

fn open(path: &Path) -> BlockDevice {
    BlockDevice::open(path).unwrap()
}

fn freezer(devices: &[&BlockDevice]) -> Freezer {
    Freezer::new(FileSystems::on(devices).unwrap(), watchdog())
}

/// Writes a file in another thread; the receiver gets an item when that is done.
fn write_in_background(directory: &Path) -> mpsc::Receiver<()> {
    let (sender, receiver) = mpsc::channel();
    let path = directory.join("written");
    std::thread::spawn(move || {
        fs::write(path, b"content").unwrap();
        // Nobody waits any more if the test is over.
        let _ = sender.send(());
    });
    receiver
}

fn is_frozen(mountpoint: &Path) -> bool {
    let file = File::open(mountpoint).unwrap();
    match ioctl::fifreeze(&file) {
        Err(Errno::EBUSY) => true,
        Ok(()) => {
            ioctl::fithaw(&file).unwrap();
            false
        }
        Err(errno) => panic!("{}: {errno}", mountpoint.display()),
    }
}

fn mounted(kind: &str, bytes: u64) -> (LoopDevice, PathBuf) {
    let mut device = LoopDevice::new(bytes).unwrap();
    device.mkfs(kind).unwrap();
    let mountpoint = device.mount().unwrap();
    (device, mountpoint)
}

#[test]
fn a_frozen_file_system_goes_on_after_the_thaw() {
    for (kind, bytes) in [("ext4", 64 << 20), ("xfs", 512 << 20), ("btrfs", 256 << 20)] {
        let (device, mountpoint) = mounted(kind, bytes);
        let device = open(device.path());
        let mut freezer = freezer(&[&device]);
        freezer.freeze(PATIENCE).unwrap();
        assert!(is_frozen(&mountpoint), "{kind}");
        let written = write_in_background(&mountpoint);
        assert!(
            written.recv_timeout(Duration::from_millis(100)).is_err(),
            "{kind}"
        );
        assert!(freezer.froze(device.id));
        freezer.thaw().unwrap();
        written.recv_timeout(PATIENCE).unwrap();
        // And once more with the same freezer.
        freezer.freeze(PATIENCE).unwrap();
        assert!(is_frozen(&mountpoint), "{kind}");
        drop(freezer);
        assert!(!is_frozen(&mountpoint), "{kind}");
    }
}

#[test]
fn a_file_system_frozen_by_others_is_refused() {
    let (first, first_mount) = mounted("ext4", 64 << 20);
    let (second, second_mount) = mounted("ext4", 64 << 20);
    let other = File::open(&second_mount).unwrap();
    ioctl::fifreeze(&other).unwrap();
    let (first, second) = (open(first.path()), open(second.path()));
    let mut freezer = freezer(&[&first, &second]);
    let error = freezer.freeze(PATIENCE).unwrap_err();
    assert!(matches!(error, FreezeError::Frozen { .. }), "{error}");
    assert!(error.to_string().contains("fsfreeze --unfreeze"), "{error}");
    assert!(is_frozen(&second_mount), "the freeze of somebody else was ended");
    ioctl::fithaw(&other).unwrap();
    assert!(!is_frozen(&first_mount));
}

#[test]
fn stacked_file_systems_freeze_from_the_top_and_thaw_from_the_bottom() {
    let (lower, lower_mount) = mounted("ext4", 128 << 20);
    let image = lower_mount.join("upper.img");
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let node = run(
        "losetup",
        ["--find".as_ref(), "--show".as_ref(), image.as_os_str()],
    )
    .unwrap();
    let upper = Stacked::mount(node.trim(), &lower_mount);
    let devices = [open(lower.path()), open(Path::new(node.trim()))];
    for order in [[0, 1], [1, 0]] {
        let mut freezer = freezer(&[&devices[order[0]], &devices[order[1]]]);
        fs::write(upper.mountpoint.join("dirty"), vec![1; 1 << 20]).unwrap();
        // In the wrong order this would sleep until the deadline, and then fail.
        freezer.freeze(PATIENCE).unwrap();
        freezer.thaw().unwrap();
    }
    let only_lower = FileSystems::on(&[&devices[0]]).unwrap();
    let on_upper = File::create(upper.mountpoint.join("storage")).unwrap();
    assert_eq!(only_lower.hold(&on_upper).unwrap(), Some(lower_mount.clone()));
    let on_lower = File::create(lower_mount.join("storage")).unwrap();
    assert_eq!(only_lower.hold(&on_lower).unwrap(), Some(lower_mount.clone()));
    let only_upper = FileSystems::on(&[&devices[1]]).unwrap();
    assert_eq!(only_upper.hold(&on_lower).unwrap(), None);
    assert_eq!(only_upper.hold(tempfile::tempfile().unwrap()).unwrap(), None);
}

/// A file system on a loop device made by hand.
struct Stacked {
    node: String,
    mountpoint: PathBuf,
}

impl Stacked {
    fn mount(node: &str, beside: &Path) -> Self {
        let this = Self {
            node: node.to_owned(),
            mountpoint: beside.join("upper"),
        };
        LoopDevice::mkfs_on(Path::new(node), "ext4").unwrap();
        fs::create_dir(&this.mountpoint).unwrap();
        run("mount", [Path::new(node), &this.mountpoint]).unwrap();
        this
    }
}

impl Drop for Stacked {
    fn drop(&mut self) {
        let _ = run("umount", [&self.mountpoint]);
        let _ = run("losetup", ["--detach", &self.node]);
    }
}

#[test]
fn the_watchdog_thaws_at_its_deadline() {
    let (device, mountpoint) = mounted("ext4", 64 << 20);
    let device = open(device.path());
    let mut freezer = freezer(&[&device]);
    freezer.freeze(Duration::from_millis(200)).unwrap();
    write_in_background(&mountpoint).recv_timeout(PATIENCE).unwrap();
    let error = freezer.thaw().unwrap_err();
    assert!(matches!(error, FreezeError::ThawedEarly { .. }), "{error}");
    assert!(!is_frozen(&mountpoint));
}

/// Not a test by itself: the body of a process that freezes and then hangs.
#[test]
fn role_of_an_agent_that_hangs() {
    let Some(nodes) = std::env::var_os(ROLE) else {
        return;
    };
    let devices: Vec<BlockDevice> = std::env::split_paths(&nodes).map(|node| open(&node)).collect();
    let mut freezer = freezer(&devices.iter().collect::<Vec<_>>());
    freezer.freeze(Duration::from_secs(3600)).unwrap();
    println!("\nfrozen");
    loop {
        std::thread::park();
    }
}

struct Agent(Child);

impl Agent {
    /// Starts this executable as an agent that freezes, and waits until it has.
    fn frozen(nodes: &[&Path]) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "role_of_an_agent_that_hangs", "--nocapture"])
            .env(ROLE, std::env::join_paths(nodes).unwrap())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = child.stdout.take().unwrap();
        let agent = Self(child);
        let frozen = BufReader::new(output)
            .lines()
            .map_while(Result::ok)
            .any(|line| line == "frozen");
        assert!(frozen, "the process that freezes has failed");
        agent
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_killed_agent_leaves_nothing_frozen() {
    let (first, first_mount) = mounted("ext4", 64 << 20);
    let (second, second_mount) = mounted("btrfs", 256 << 20);
    let agent = Agent::frozen(&[first.path(), second.path()]);
    assert!(is_frozen(&first_mount) && is_frozen(&second_mount));
    let writers = [&first_mount, &second_mount].map(|mountpoint| write_in_background(mountpoint));
    // SIGKILL: nothing of the process's own code runs any more.
    drop(agent);
    for written in writers {
        written.recv_timeout(PATIENCE).unwrap();
    }
    assert!(!is_frozen(&first_mount) && !is_frozen(&second_mount));
}

#[test]
fn a_daemon_killed_in_the_window_of_a_take_leaves_nothing_frozen() {
    let (first, first_mount) = mounted("ext4", 64 << 20);
    let (second, second_mount) = mounted("xfs", 512 << 20);
    let mut daemon = Daemon::start().unwrap();
    let nodes = [first.path(), second.path()].map(|path| path.to_str().unwrap());
    for node in nodes {
        daemon.run(["attach", node]).unwrap();
    }
    let hook = daemon.scratch().join("hook");
    let script = "#!/bin/sh\nif [ \"$1\" = frozen ]; then kill -9 $PPID; fi\n";
    fs::write(&hook, script).unwrap();
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o700)).unwrap();
    let hook = hook.to_str().unwrap();
    let answer = daemon
        .try_run(["snapshot", "create", nodes[0], nodes[1], "--freeze-hook", hook])
        .unwrap();
    assert_ne!(answer.code, 0, "the hook did not kill the daemon: {answer:?}");
    for mountpoint in [&first_mount, &second_mount] {
        write_in_background(mountpoint).recv_timeout(PATIENCE).unwrap();
        assert!(!is_frozen(mountpoint));
    }
    daemon.kill().unwrap();
    // And the next one goes on with it.
    daemon.launch(&DaemonOptions::default()).unwrap();
    daemon.run(["snapshot", "create", nodes[0]]).unwrap();
}

#[test]
fn no_watchdog_no_freeze() {
    let (device, mountpoint) = mounted("ext4", 64 << 20);
    let device = open(device.path());
    for program in ["/no/such/program", "/bin/false"] {
        let command = WatchdogCommand {
            program: program.into(),
            arguments: Vec::new(),
        };
        let mut freezer = Freezer::new(FileSystems::on(&[&device]).unwrap(), command);
        let error = freezer.freeze(PATIENCE).unwrap_err();
        assert!(error.to_string().contains("nothing was frozen"), "{error}");
        assert!(!is_frozen(&mountpoint));
    }
}

#[test]
fn mounts_of_disks_and_partitions_are_found() {
    let partitions = [("1MiB", "65MiB"), ("65MiB", "100%")];
    let mut disk = LoopDevice::with_options(
        400 << 20,
        &LoopOptions {
            partitions: partitions
                .map(|(start, end)| (start.to_owned(), end.to_owned()))
                .to_vec(),
            ..LoopOptions::default()
        },
    )
    .unwrap();
    LoopDevice::mkfs_on(&disk.partition(1), "ext4").unwrap();
    LoopDevice::mkfs_on(&disk.partition(2), "btrfs").unwrap();
    let first = disk.mount_partition(1).unwrap();
    let second = disk.mount_partition(2).unwrap();
    let of = |path: &Path| -> Vec<PathBuf> {
        let mounts = open(path).mounts().unwrap();
        mounts.into_iter().map(|mount| mount.mountpoint).collect()
    };
    assert_eq!(of(&disk.partition(1)), std::slice::from_ref(&first));
    assert_eq!(of(&disk.partition(2)), std::slice::from_ref(&second));
    assert_eq!(of(disk.path()), [first, second]);
    let (whole, part) = (open(disk.path()), open(&disk.partition(2)));
    assert!(whole.is_whole_disk() && !part.is_whole_disk());
    assert_eq!((part.disk_id, &part.disk_name), (whole.id, &whole.name));
    assert_eq!(
        (part.first_sector.bytes(), whole.first_sector.count()),
        (65 << 20, 0)
    );
    assert_eq!(whole.capacity.bytes(), 400 << 20);
    assert!(part.diskseq.is_some() && part.diskseq == whole.diskseq);

    // Through the disk, at the partition's place.
    let reader = DirectReader::open(&part).unwrap();
    let mut buffer = AlignedBuffer::zeroed(1 << 20);
    reader.read(&mut buffer, 64 << 10, 4096).unwrap();
    assert_eq!(&buffer.as_slice()[64..72], b"_BHRfS_M");
    assert!(reader.read(&mut buffer, reader.length() - 512, 1024).is_err());
    let gone = open(disk.path());
    drop((reader, disk));
    // It goes when its last opener has, who may be anybody that looks at all devices.
    while DirectReader::open(&gone).is_ok() {
        std::thread::yield_now();
    }
}

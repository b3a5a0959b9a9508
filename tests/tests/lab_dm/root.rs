//! Root: an agent whose program, libraries, state, control socket and log are on the volume that it takes, as on a
//! machine whose root is on LVM. Only the old data is elsewhere.
//!
//! A guest's root is no disk, so a small root is copied to a volume and the agent is started in it by `chroot`. What it
//! has in the page cache is dropped before each take: what it would have to read while the volume is suspended it would
//! wait for. It says something at the instant (`--log=debug`), and so does its hook while the volume is frozen: its log
//! can't take either before the volume goes on.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::{LoopDevice, Writer, agent_binary, complain, lab, read_device, run, seed, unmount};
use serde_json::Value;

use crate::scene::{Group, MIB, ours, table};

/// Bound against a hang.
const PATIENCE: Duration = Duration::from_secs(180);
/// MiB of the volume.
const SIZE: u64 = 256;

/// Copies the device while it is frozen, past its page cache: what the image has to be. It is on the volume itself, and
/// so is its shell.
const HOOK: &str = "#!/bin/busybox sh
[ \"$1\" = frozen ] || exit 0
/bin/busybox dd if=$BLKSNAP_DEVICES of=/oracle/copy bs=1M iflag=direct
";

/// A root on a volume, with what is mounted in it.
struct Root {
    at: PathBuf,
    mounts: Vec<PathBuf>,
}

impl Root {
    fn new(volume: &Path, storage: &Path) -> Result<Self> {
        LoopDevice::mkfs_on(volume, "ext4")?;
        let at = PathBuf::from("/run/dmroot");
        fs::create_dir_all(&at)?;
        run("mount", [volume, &at])?;
        let mut root = Self {
            at,
            mounts: Vec::new(),
        };
        root.mounts.push(root.at.clone());
        root.fill(storage)?;
        Ok(root)
    }

    fn fill(&mut self, storage: &Path) -> Result<()> {
        for name in [
            "bin", "tmp", "proc", "sys", "dev", "storage", "oracle", "state", "bpf", "socket", "data",
        ] {
            fs::create_dir(self.at.join(name))?;
        }
        let agent = agent_binary()?;
        let stripped = self.at.join("bin/agent");
        let words = [
            "-S".as_ref(),
            "-o".as_ref(),
            stripped.as_os_str(),
            agent.as_os_str(),
        ];
        run("strip", words)?;
        fs::copy("/bin/busybox", self.at.join("bin/busybox"))?;
        for line in run("ldd", [&agent])?.lines() {
            let Some(library) = line.split_whitespace().find(|word| word.starts_with('/')) else {
                continue;
            };
            let to = self.at.join(library.trim_start_matches('/'));
            fs::create_dir_all(to.parent().context("a folder")?)?;
            fs::copy(library, to)?;
        }
        let hook = self.at.join("bin/hook");
        fs::write(&hook, HOOK)?;
        run("chmod", ["0755".as_ref(), hook.as_os_str()])?;
        for name in ["proc", "sys", "dev"] {
            self.mount(&["--rbind".as_ref(), Path::new("/").join(name).as_ref()], name)?;
        }
        self.mount(&[storage], "storage")?;
        self.mount(&["-ttmpfs".as_ref(), "tmpfs".as_ref()], "oracle")
    }

    fn mount(&mut self, words: &[&Path], name: &str) -> Result<()> {
        let at = self.at.join(name);
        run("mount", words.iter().copied().chain([at.as_path()]))?;
        self.mounts.push(at);
        Ok(())
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let bpf = self.at.join("bpf");
        let _ = run("umount", ["-l".as_ref(), bpf.as_os_str()]);
        for at in self.mounts.drain(..).rev() {
            let is_bound = ["proc", "sys", "dev"].iter().any(|name| at.ends_with(name));
            let unmounted = if is_bound {
                run("mount", ["--make-rslave".as_ref(), at.as_os_str()])
                    .and_then(|_| run("umount", ["-R".as_ref(), at.as_os_str()]))
                    .map(drop)
            } else {
                unmount(&at)
            };
            if let Err(error) = unmounted {
                complain(format_args!("{error:#}"));
            }
        }
    }
}

/// The agent in that root.
struct Agent<'a> {
    root: &'a Root,
    child: Child,
}

impl<'a> Agent<'a> {
    fn start(root: &'a Root) -> Result<Self> {
        let log = File::create(root.at.join("agent.log"))?;
        let child = Command::new("chroot")
            .arg(&root.at)
            .args([
                "/bin/agent",
                "daemon",
                "--runtime-dir=/socket",
                "--state-dir=/state",
            ])
            .args(["--bpffs=/bpf", "--storage=/storage", "--log=debug"])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let mut agent = Self { root, child };
        let begun = Instant::now();
        while agent.json(&["snapshot", "list"]).is_err() {
            ensure!(agent.child.try_wait()?.is_none(), "it ended: {}", agent.log());
            ensure!(begun.elapsed() < PATIENCE, "it does not begin: {}", agent.log());
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(agent)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.root.at.join("agent.log")).unwrap_or_default()
    }

    fn json(&self, words: &[&str]) -> Result<Value> {
        let output = Command::new("timeout")
            .arg(PATIENCE.as_secs().to_string())
            .arg(agent_binary()?)
            .args(words)
            .arg("--output=json")
            .env("BLKSNAP_SOCKET", self.root.at.join("socket/control.sock"))
            .stdin(Stdio::null())
            .output()?;
        ensure!(
            output.status.success(),
            "{words:?}: {}; {}",
            String::from_utf8_lossy(&output.stderr),
            self.log()
        );
        Ok(serde_json::from_slice(&output.stdout)?)
    }
}

impl Drop for Agent<'_> {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM);
        }
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "needs a kernel with device mapper: cargo xtask test --vm 6.12"]
fn the_agent_is_on_the_volume_that_it_takes() -> Result<()> {
    lab::inside()?;
    lab::target("snapshot", "dm_snapshot")?;
    let disk = LoopDevice::new((SIZE + 8) * MIB)?;
    let place = LoopDevice::new(400 * MIB)?;
    let group = Group::over("dmroot", &[disk.path(), place.path()])?;
    let on = |disk: &LoopDevice| disk.path().display().to_string();
    let volume = group.thick_on("root", SIZE, &[&on(&disk)])?;
    let storage = group.thick_on("storage", 380, &[&on(&place)])?;
    LoopDevice::mkfs_on(&storage, "ext4")?;
    let before = table(&volume)?;
    let root = Root::new(&volume, &storage)?;
    let agent = Agent::start(&root)?;
    let writer = Writer::files(
        &root.at.join("data"),
        seed("the_agent_is_on_the_volume_that_it_takes"),
    );
    let node = volume.display().to_string();
    for round in 0..3 {
        run("sync", [&root.at])?;
        fs::write("/proc/sys/vm/drop_caches", "3")?;
        let begun = Instant::now();
        let taken = agent.json(&[
            "snapshot",
            "create",
            &node,
            "--filter=dm",
            "--storage=/storage",
            "--minimum=128M",
            "--freeze-hook=/bin/hook",
            "--freeze-limit=60000",
        ])?;
        let image = &taken["devices"][0]["image"];
        println!(
            "round {round}: {:?}, suspended for {} s, frozen for {} s",
            begun.elapsed(),
            image["suspended_seconds"],
            image["frozen_seconds"]
        );
        ensure!(
            taken["state"] == "taken" && image["consistency"] == "file_system",
            "{taken}"
        );
        // The take was not late: the watchdog had nothing to do, though it is on the volume as well.
        ensure!(
            image["suspended_seconds"]
                .as_f64()
                .is_some_and(|seconds| seconds < 2.0),
            "{taken}"
        );
        std::thread::sleep(Duration::from_secs(1));
        let export = image["export"].as_str().context("an export")?;
        let uri = format!(
            "nbd+unix:///{export}?socket={}",
            root.at.join("socket/nbd.sock").display()
        );
        let file = Path::new("/run/dmroot.image");
        run("nbdcopy", [uri.as_ref(), file.as_os_str()])?;
        let (image, copy) = (fs::read(file)?, fs::read(root.at.join("oracle/copy"))?);
        fs::remove_file(file)?;
        let wrong = image
            .chunks(4096)
            .zip(copy.chunks(4096))
            .filter(|(one, other)| one != other);
        let wrong = wrong.count();
        ensure!(
            image.len() == copy.len() && wrong == 0,
            "{wrong} blocks of the image are not what they were"
        );
        let id = taken["id"].as_str().context("an id")?;
        agent.json(&["snapshot", "destroy", id])?;
        ensure!(ours()?.is_empty() && table(&volume)? == before, "{:?}", ours()?);
    }
    ensure!(writer.writes() > 10, "nothing was written meanwhile");
    let log = agent.log();
    let times = |words| log.matches(words).count();
    ensure!(
        times("the change map is taken") == 3 && times("records out") == 3,
        "{log}"
    );
    drop(writer);
    drop(agent);
    drop(root);
    run("e2fsck", ["-f".as_ref(), "-n".as_ref(), volume.as_os_str()])?;
    ensure!(!read_device(&volume)?.is_empty());
    Ok(())
}

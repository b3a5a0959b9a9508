//! Root: the agent lives on the file system that it takes: its program, libraries, sockets, state and log are all
//! there, and only old data is elsewhere.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::Read as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::nbd::{Client, Framing};
use blksnap_tests::{Daemon, DaemonOptions, Writer, agent_binary, complain, lab, run, seed, unmount};
use serde_json::Value;
use tempfile::TempDir;

use super::agent::{daemon_options, id, nothing_is_left, prepare, take_on};
use super::scene::{MIB, partition};

const SIZE: u64 = 200 * MIB;

/// A small root with the agent, entered by a program of its own.
struct Root {
    directory: TempDir,
    enter: PathBuf,
}

impl Root {
    fn new(node: &Path) -> Result<Self> {
        run("mkfs.ext4", [OsStr::new("-q"), "-F".as_ref(), node.as_os_str()])?;
        let directory = tempfile::Builder::new().prefix("blksnap-root-").tempdir()?;
        run("mount", [node.as_os_str(), directory.path().as_os_str()])?;
        let enter = directory.path().with_extension("enter");
        let root = Self { directory, enter };
        for (program, name) in [
            (agent_binary()?, "agent"),
            ("/bin/sh".into(), "sh"),
            ("/bin/dd".into(), "dd"),
        ] {
            root.install(&program, name)?;
        }
        for bound in ["dev", "proc", "sys"] {
            let at = root.path().join(bound);
            fs::create_dir(&at)?;
            run(
                "mount",
                [
                    OsStr::new("--rbind"),
                    Path::new("/").join(bound).as_os_str(),
                    at.as_os_str(),
                ],
            )?;
        }
        fs::create_dir(root.path().join("tmp"))?;
        // A path says the same within and without.
        let same = root.path().join(root.path().strip_prefix("/")?);
        fs::create_dir_all(same.parent().context("a folder")?)?;
        symlink("/", &same)?;
        let script = format!(
            "#!/bin/sh\nexec chroot {} /bin/agent \"$@\"\n",
            root.path().display()
        );
        fs::write(&root.enter, script)?;
        fs::set_permissions(&root.enter, Permissions::from_mode(0o755))?;
        Ok(root)
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Copies a program and its libraries.
    fn install(&self, program: &Path, name: &str) -> Result<()> {
        let bin = self.path().join("bin");
        fs::create_dir_all(&bin)?;
        let to = bin.join(name);
        fs::copy(program, &to).with_context(|| format!("copy {}", program.display()))?;
        // Names of lines take most of it.
        let _ = run("strip", [&to]);
        for word in run("ldd", [program])?.split_whitespace() {
            let Ok(library) = Path::new(word).strip_prefix("/") else {
                continue;
            };
            let to = self.path().join(library);
            fs::create_dir_all(to.parent().context("a folder")?)?;
            fs::copy(Path::new("/").join(library), to)?;
        }
        Ok(())
    }

    fn leave(&self) -> Result<()> {
        for bound in ["dev", "proc", "sys"] {
            run(
                "umount",
                [
                    OsStr::new("-R"),
                    "-l".as_ref(),
                    self.path().join(bound).as_os_str(),
                ],
            )?;
        }
        unmount(self.path())
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.enter);
        if let Err(error) = self.leave() {
            // A test that ended well has left it.
            complain(format_args!("{error:#}"));
        }
    }
}

#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn the_file_system_that_the_agent_lives_on() -> Result<()> {
    prepare()?;
    let seed = seed("gate root");
    let part = partition(SIZE)?;
    let copy = lab::virtio(1)?;
    let root = Root::new(&part)?;
    let daemon = Daemon::with_options(&DaemonOptions {
        binary: Some(root.enter.clone()),
        parent: Some(root.path().join("tmp")),
        ..daemon_options()
    })?;
    let hook = root.path().join("bin/hook");
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = frozen ] || exit 0\nexec /bin/dd if=$BLKSNAP_DEVICES of={} bs=1M iflag=direct oflag=direct\n",
        copy.display()
    );
    fs::write(&hook, script)?;
    fs::set_permissions(&hook, Permissions::from_mode(0o755))?;
    let files = root.path().join("files");
    fs::create_dir(&files)?;
    let writer = Writer::files(&files, seed);
    writer.wait_for(10);
    let hooked: [&OsStr; 4] = [
        "--freeze-hook".as_ref(),
        "/bin/hook".as_ref(),
        "--freeze-limit".as_ref(),
        "120000".as_ref(),
    ];
    let taken = take_on(&daemon, &[&part], "memory:400M", &hooked)?;
    writer.wait_for(80);
    compare(&daemon, &taken, &copy)?;
    daemon.run(["snapshot", "destroy", id(&taken)?])?;
    nothing_is_left(Path::new("/nonexistent"))?;
    writer.wait_for(5);
    drop(writer);
    drop(daemon);
    drop(root);
    run("fsck.ext4", [OsStr::new("-fn"), part.as_os_str()]).map(drop)
}

/// The image has what was copied while the file system was frozen.
fn compare(daemon: &Daemon, taken: &Value, copy: &Path) -> Result<()> {
    let export = taken["devices"][0]["image"]["export"]
        .as_str()
        .context("an export")?;
    let mut client = Client::connect(&daemon.nbd_socket(), export, Framing::Structured, &[])?;
    let mut copy = File::open(copy)?;
    let mut expected = vec![0; usize::try_from(MIB)?];
    for offset in (0..SIZE).step_by(usize::try_from(MIB)?) {
        copy.read_exact(&mut expected)?;
        ensure!(
            client.read(offset, MIB)? == expected,
            "a wrong byte in the MiB at {offset}"
        );
    }
    client.disconnect()?;
    Ok(())
}

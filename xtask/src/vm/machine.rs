//! Machine: one run of a command in a guest: QEMU's arguments, its life, and what came out of it.
//!
//! The guest's root is the host's, read-only over 9p, under an overlay in memory: it sees every program and file of the
//! host, and what it writes is gone with it. What the command prints comes through two ports that QEMU writes to pipes,
//! its exit code through a third one. The console goes to a file, of which the end is shown when something failed.
//!
//! QEMU ends with whoever runs it, also when that one is killed: `setpriv` sees to it.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use super::initramfs;
use super::kernels::Kernel;
use crate::{process, workspace};

/// How often is looked whether the guest has ended.
const LOOK: Duration = Duration::from_millis(20);

/// Lines of the console that are shown when something failed.
const TAIL: usize = 30;

/// How often a guest is started whose kernel does not come as far as the command.
const BOOTS: u32 = 3;

/// How long a kernel may take until the command begins.
const BOOT: Duration = Duration::from_secs(240);

/// What the guest writes to the port of the exit code before the command begins.
const BEGUN: &str = "begun";

/// What the kernel says on its console when something is wrong with it.
const COMPLAINTS: [&str; 7] = [
    "WARNING:",
    "BUG:",
    "Oops",
    "Kernel panic",
    "blocked for more than",
    "soft lockup",
    "general protection fault",
];

/// A disk of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Disk {
    /// How the guest sees it.
    pub(crate) bus: Bus,
    /// What it is made of.
    pub(crate) content: Content,
}

/// How a guest sees a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bus {
    /// `/dev/vda`, `/dev/vdb` …
    Virtio,
    /// `/dev/nvme0n1` …
    Nvme,
    /// The same, by two controllers.
    NvmeMultipath,
    /// An NVMe disk with zones of 8 MiB.
    NvmeZoned,
}

/// What a disk is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// A sparse file of that many bytes, gone afterwards.
    Scratch(u64),
    /// A file that stays.
    File(PathBuf),
}

/// A guest to be.
pub(crate) struct Machine {
    pub(crate) kernel: Kernel,
    pub(crate) cpus: u32,
    pub(crate) memory_mib: u32,
    pub(crate) disks: Vec<Disk>,
    /// Folders of the host that the guest may write to, at the same path.
    pub(crate) shares: Vec<PathBuf>,
    /// More of the kernel's command line.
    pub(crate) append: Vec<String>,
    /// Modules to load before the command, with their parameters.
    pub(crate) modules: Vec<String>,
    pub(crate) environment: Vec<(String, String)>,
    pub(crate) timeout: Duration,
    /// Show the console while the guest runs, on standard error.
    pub(crate) console: bool,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The command ended with this code.
    Exited(u8),
    /// The time was over.
    TimedOut,
    /// The caller wanted it killed.
    Cut,
    /// The guest ended before the command did.
    Died,
}

/// What came out of a run.
pub(crate) struct Outcome {
    pub(crate) end: End,
    /// The end of the console.
    pub(crate) tail: Vec<String>,
    /// Lines of the console by which the kernel complains of itself.
    pub(crate) complaints: Vec<String>,
}

/// One boot.
struct Run {
    outcome: Outcome,
    /// Whether the command began.
    begun: bool,
}

impl Machine {
    /// Starts the guest, runs `command`, a script of bash, in it as root, and passes on what it prints.
    pub(crate) fn run(
        &self,
        command: &str,
        out: &mut (dyn Write + Send),
        err: &mut (dyn Write + Send),
    ) -> Result<Outcome> {
        self.run_until(command, out, err, &|| false)
    }

    /// As [`Machine::run`], but kills the guest as soon as `cut` says so: the power goes.
    ///
    /// Emulated processors that change their own code at boot crash now and then (an `int3` that was patched away a
    /// moment ago), or hang. A guest that ends before the command began is started again; nothing of ours ran in it.
    pub(crate) fn run_until(
        &self,
        command: &str,
        out: &mut (dyn Write + Send),
        err: &mut (dyn Write + Send),
        cut: &dyn Fn() -> bool,
    ) -> Result<Outcome> {
        for boot in 1..BOOTS {
            let run = self.boot(command, out, err, cut)?;
            if run.begun {
                return Ok(run.outcome);
            }
            eprintln!(
                "lab: boot {boot} of at most {BOOTS}: the kernel {} before the command began:",
                match run.outcome.end {
                    End::TimedOut => "hung",
                    _ => "ended",
                }
            );
            for line in &run.outcome.tail {
                eprintln!("    {line}");
            }
        }
        Ok(self.boot(command, out, err, cut)?.outcome)
    }

    fn boot(
        &self,
        command: &str,
        out: &mut (dyn Write + Send),
        err: &mut (dyn Write + Send),
        cut: &dyn Fn() -> bool,
    ) -> Result<Run> {
        let folder = folder()?;
        let at = |name: &str| folder.path().join(name);
        let archive = initramfs::build(&self.kernel, &self.shares, &self.script(command)?)?;
        fs::write(at("initramfs"), archive).context("writing the initramfs failed")?;
        fs::write(at("console"), "").context("writing the console failed")?;
        let mut qemu = self.qemu(folder.path())?;
        let mut child = qemu
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting `{}` failed", process::line(&qemu)))?;
        let from_out = child.stdout.take().context("no pipe")?;
        let from_err = child.stderr.take().context("no pipe")?;
        let (end, begin) = (Instant::now() + self.timeout, Instant::now() + BOOT);
        let mut begun = false;
        let (status, killed) = thread::scope(|scope| -> Result<(ExitStatus, Option<End>)> {
            scope.spawn(move || pass(from_out, out));
            scope.spawn(move || pass(from_err, err));
            let mut console = self.console.then(|| Live::new(at("console")));
            loop {
                if let Some(console) = &mut console {
                    console.show();
                }
                if let Some(status) = child.try_wait().context("waiting for QEMU failed")? {
                    return Ok((status, None));
                }
                begun = begun || has_begun(&at("code"));
                let now = Instant::now();
                let why = if cut() {
                    Some(End::Cut)
                } else {
                    (now >= end || (!begun && now >= begin)).then_some(End::TimedOut)
                };
                if why.is_some() {
                    child.kill().context("killing QEMU failed")?;
                    return Ok((child.wait().context("waiting for QEMU failed")?, why));
                }
                thread::sleep(LOOK);
            }
        })?;
        let console = fs::read(at("console")).context("reading the console failed")?;
        let console = String::from_utf8_lossy(&console);
        let lines: Vec<&str> = console
            .lines()
            .map(str::trim_end)
            .filter(|line| !line.is_empty())
            .collect();
        let begun = begun || has_begun(&at("code"));
        let code = fs::read_to_string(at("code")).unwrap_or_default();
        let code = code.lines().last().unwrap_or_default();
        let end = match (code.trim().parse(), killed) {
            (Ok(code), _) => End::Exited(code),
            (_, Some(why)) => why,
            // QEMU itself failed: it has said why.
            (_, None) if lines.is_empty() => {
                bail!("QEMU ended with {status} before the kernel said anything")
            }
            (_, None) => End::Died,
        };
        let owned = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect();
        let outcome = Outcome {
            end,
            tail: owned(lines.get(lines.len().saturating_sub(TAIL)..).unwrap_or_default()),
            complaints: lines
                .iter()
                .filter(|line| COMPLAINTS.iter().any(|complaint| line.contains(complaint)))
                .map(|line| (*line).to_owned())
                .collect(),
        };
        Ok(Run { outcome, begun })
    }

    /// The script that the guest runs: the environment, the folder, the modules, the command.
    fn script(&self, command: &str) -> Result<String> {
        // Not the PATH of the host: what is in front of it may be slow to start, which a guest makes slower.
        let mut script =
            "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root USER=root \
                          LANG=C.UTF-8 TERM=dumb\n"
                .to_owned();
        // Nobody answers for udev in a guest: dmsetup would make no nodes.
        script += &format!(
            "export DM_DISABLE_UDEV=1 BLKSNAP_LAB={}\n",
            quote(&self.kernel.name)
        );
        for (name, value) in &self.environment {
            script += &format!("export {name}={}\n", quote(value));
        }
        let folder = std::env::current_dir().context("there is no current folder")?;
        script += &format!(
            "cd {} 2>/dev/null || cd /root\n",
            quote(&folder.display().to_string())
        );
        // Nobody loads drivers for what is there, either. A kernel may have a driver built in.
        let nvme = self.disks.iter().filter(|disk| disk.bus != Bus::Virtio).count();
        if nvme > 0 {
            script += &format!(
                "modprobe -q nvme; for i in {{1..100}}; do [ $(ls /dev/nvme*n1 2>/dev/null | wc -l) -ge {nvme} ] && break; \
                 sleep 0.1; done\n"
            );
        }
        for module in &self.modules {
            let name = module.split(' ').next().unwrap_or_default();
            script += &format!(
                "modprobe -q {module} || [ -e /sys/module/{name} ] || {{ echo lab: no module {name} >&2; exit 126; }}\n"
            );
        }
        Ok(script + command + "\n")
    }

    fn qemu(&self, folder: &Path) -> Result<Command> {
        let at = |name: &str| folder.join(name).display().to_string();
        let mut command = process::command("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"]);
        let mut add = |arguments: &[&str]| {
            command.args(arguments);
        };
        add(&["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        add(&[
            "-machine",
            "pc",
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max,la57=off",
        ]);
        add(&["-smp", &self.cpus.to_string(), "-m", &self.memory_mib.to_string()]);
        add(&["-kernel", &self.kernel.image.display().to_string()]);
        add(&["-initrd", &at("initramfs")]);
        add(&["-serial", &format!("file:{}", at("console"))]);
        add(&["-device", "virtio-serial-pci"]);
        let ports = [
            ("out", "/dev/stdout".to_owned()),
            ("err", "/dev/stderr".to_owned()),
            ("code", at("code")),
        ];
        for (number, (name, path)) in (1..).zip(ports) {
            add(&["-chardev", &format!("file,id={name},path={path}")]);
            add(&[
                "-device",
                &format!("virtserialport,chardev={name},name={name},nr={number}"),
            ]);
        }
        let root = ("root".to_owned(), PathBuf::from("/"), ",readonly=on");
        let shares = self.shares.iter().zip(0..);
        let shares = shares.map(|(path, number)| (format!("share{number}"), path.clone(), ""));
        for (tag, path, more) in [root].into_iter().chain(shares) {
            let path = path.display().to_string().replace(',', ",,");
            add(&[
                "-fsdev",
                &format!("local,id={tag},path={path},security_model=passthrough,multidevs=remap{more}"),
            ]);
            add(&["-device", &format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}")]);
        }
        for (disk, number) in self.disks.iter().zip(0..) {
            let path = disk
                .file(folder, number)?
                .display()
                .to_string()
                .replace(',', ",,");
            add(&[
                "-drive",
                &format!(
                    "file={path},if=none,id=d{number},format=raw,cache=unsafe,discard=unmap,detect-zeroes=off"
                ),
            ]);
            for device in disk.devices(number) {
                add(&["-device", &device]);
            }
        }
        let mut line = format!(
            "console=ttyS0 panic=-1 oops=panic no_timer_check tsc=reliable mitigations=off nokaslr net.ifnames=0 \
             loglevel={}",
            if self.console { 7 } else { 5 }
        );
        if let Some(khz) = tsc_khz() {
            line += &format!(" tsc_early_khz={khz}");
        }
        for more in self.append.iter().chain([&self.kernel.append]) {
            line += " ";
            line += more;
        }
        add(&["-append", &line]);
        Ok(command)
    }
}

impl Disk {
    /// The file that it is made of.
    fn file(&self, folder: &Path, number: u32) -> Result<PathBuf> {
        match &self.content {
            Content::File(path) => path
                .canonicalize()
                .with_context(|| format!("there is no disk file {}", path.display())),
            Content::Scratch(bytes) => {
                let path = folder.join(format!("disk{number}"));
                let file =
                    fs::File::create(&path).with_context(|| format!("creating {} failed", path.display()))?;
                file.set_len(*bytes)
                    .with_context(|| format!("making {} {bytes} bytes long failed", path.display()))?;
                Ok(path)
            }
        }
    }

    /// QEMU's devices for the drive `d<number>`.
    fn devices(&self, number: u32) -> Vec<String> {
        let drive = format!("drive=d{number}");
        let subsystem = format!("nvme-subsys,id=s{number},nqn=lab{number}");
        let controller = |name: &str| format!("nvme,id=n{number}{name},serial=lab{number},subsys=s{number}");
        match self.bus {
            Bus::Virtio => vec![format!("virtio-blk-pci,{drive},serial=lab{number}")],
            Bus::Nvme => vec![format!("nvme,{drive},serial=lab{number}")],
            Bus::NvmeMultipath => vec![
                subsystem,
                controller("a"),
                controller("b"),
                format!("nvme-ns,{drive},bus=n{number}a,nsid=1,shared=on"),
            ],
            Bus::NvmeZoned => vec![
                subsystem,
                controller("a"),
                format!("nvme-ns,{drive},bus=n{number}a,nsid=1,zoned=on,zoned.zone_size=8M"),
            ],
        }
    }
}

/// How fast this machine's counter of time is, which a guest sees as its own. A guest measures it at boot; on a busy
/// machine a kernel found a fourteenth of it, and its clock ran as much too fast. Where the frequency of processors
/// changes, what the kernel says of them is not that of the counter, and the guest measures.
fn tsc_khz() -> Option<u64> {
    if Path::new("/sys/devices/system/cpu/cpu0/cpufreq").exists() {
        return None;
    }
    khz_of(&fs::read_to_string("/proc/cpuinfo").ok()?)
}

/// From the text of /proc/cpuinfo.
fn khz_of(text: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with("cpu MHz"))?;
    let (whole, part) = line.split_once(':')?.1.trim().split_once('.')?;
    let part = part.get(..3)?.parse::<u64>().ok()?;
    Some(whole.parse::<u64>().ok()? * 1000 + part).filter(|khz| *khz > 0)
}

/// Whether the guest wrote to the port of the exit code.
fn has_begun(port: &Path) -> bool {
    fs::read_to_string(port).is_ok_and(|text| text.starts_with(BEGUN))
}

/// A folder for one run. What runs left behind that were killed is removed.
fn folder() -> Result<TempDir> {
    let parent = workspace::target().join("lab");
    fs::create_dir_all(&parent).with_context(|| format!("creating {} failed", parent.display()))?;
    for entry in fs::read_dir(&parent).context("reading the lab's folder failed")? {
        let Ok(entry) = entry else { continue };
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix("run-").and_then(|rest| rest.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Another one may be removing it, too.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    tempfile::Builder::new()
        .prefix(&format!("run-{}-", std::process::id()))
        .tempdir_in(&parent)
        .context("creating a folder for the run failed")
}

/// Copies what comes through a pipe, at once. Who does not want it any more does not stop the guest.
fn pass(mut from: impl Read, to: &mut (dyn Write + Send)) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                let _ = buffer
                    .get(..length)
                    .map_or(Ok(()), |bytes| to.write_all(bytes))
                    .and_then(|()| to.flush());
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// The console while it grows.
struct Live {
    path: PathBuf,
    shown: usize,
}

impl Live {
    fn new(path: PathBuf) -> Self {
        Self { path, shown: 0 }
    }

    fn show(&mut self) {
        let content = fs::read(&self.path).unwrap_or_default();
        if let Some(new) = content.get(self.shown..) {
            let _ = io::stderr().write_all(new);
            self.shown = content.len();
        }
    }
}

/// `text` as one word of a shell.
pub(crate) fn quote(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./=:,+@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// A size such as `512M` or `8G`, in bytes.
pub(crate) fn size(text: &str) -> Result<u64> {
    let (number, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let bytes = number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .with_context(|| format!("`{text}` is no size: write 512M or 8G"))?;
    ensure!(bytes > 0, "a disk of no bytes is none");
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("512M").unwrap(), 512 << 20);
        assert_eq!(size("1G").unwrap(), 1 << 30);
        assert_eq!(size("4096").unwrap(), 4096);
        for bad in ["", "G", "1T1", "0", "99999999999999G"] {
            size(bad).unwrap_err();
        }
    }

    #[test]
    fn the_counter_of_time_is_as_fast_as_the_processor_says() {
        assert_eq!(khz_of("a : 1\ncpu MHz\t\t: 2596.148\n"), Some(2_596_148));
        assert_eq!(khz_of("cpu MHz : 0.000\n"), None);
        assert_eq!(khz_of("BogoMIPS : 48.00\n"), None);
    }

    #[test]
    fn words_are_quoted_for_the_shell() {
        assert_eq!(quote("a/b.c"), "a/b.c");
        assert_eq!(quote("it's $x"), r"'it'\''s $x'");
        assert_eq!(quote(""), "''");
    }

    #[test]
    fn a_disk_of_two_paths_has_two_controllers() {
        let disk = Disk {
            bus: Bus::NvmeMultipath,
            content: Content::Scratch(1),
        };
        let devices = disk.devices(3);
        let controllers = devices.iter().filter(|device| device.starts_with("nvme,"));
        assert_eq!(controllers.count(), 2);
        assert!(devices.iter().all(|device| device.contains('3')));
    }
}

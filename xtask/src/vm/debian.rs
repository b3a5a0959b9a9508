//! Debian: its kernels, from their packages. They are unpacked into a folder; nothing is installed.
//!
//! Of the modules only those of block devices, file systems and what a guest needs to start are kept, and they are
//! decompressed: that saves time in every guest.

use std::env;
use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Component, Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::elf;
use super::kernels::{self, IMAGE, RECORD, Record};
use crate::apt::{self, Place, Private};
use crate::process;

/// A series of kernels, and where it is.
pub(crate) struct Series {
    name: &'static str,
    /// Archives, beside `debian` on the same mirror, and their suites, in the order in which they are asked.
    suites: &'static [(&'static str, &'static str)],
    /// What the packages are named before the version; each of them is needed.
    packages: &'static [&'static str],
    /// How the version begins.
    version: &'static str,
}

/// The series of the matrix. Unstable has one kernel at a time, and is what comes next.
const SERIES: [Series; 3] = [
    Series {
        name: "6.1",
        suites: &[("debian-security", "bookworm-security"), ("debian", "bookworm")],
        packages: &["linux-image-"],
        version: "6.1.",
    },
    Series {
        name: "6.12",
        suites: &[("debian", "trixie"), ("debian-security", "trixie-security")],
        packages: &["linux-image-"],
        version: "6.12.",
    },
    Series {
        name: "7.2",
        suites: &[("debian", "sid")],
        packages: &["linux-binary-", "linux-base-", "linux-modules-"],
        version: "7.",
    },
];

/// Variable with the address of a mirror of Debian, for who has none configured: another distribution.
const MIRROR: &str = "BLKSNAP_DEBIAN_MIRROR";

/// How often a mirror is asked, beyond what apt itself does, and what is waited for in between.
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_secs(5);

/// Folders below `kernel/` of the modules that are kept, and below `kernel/drivers/` those of which there are many.
const KEPT: [&str; 7] = ["arch", "block", "crypto", "fs", "lib", "mm", "drivers"];
const KEPT_DRIVERS: [&str; 10] = [
    "ata", "block", "char", "crypto", "dax", "md", "nvdimm", "nvme", "scsi", "virtio",
];

/// The series of that name.
pub(crate) fn series(name: &str) -> Option<&'static Series> {
    SERIES.iter().find(|series| series.name == name)
}

/// The names of all series.
pub(crate) fn names() -> Vec<&'static str> {
    SERIES.iter().map(|series| series.name).collect()
}

/// Fetches the newest kernel of `series`, and puts it into `folder`, in place of what is there.
pub(crate) fn install(series: &Series, folder: &Path) -> Result<()> {
    ensure!(
        cfg!(target_arch = "x86_64"),
        "the lab's kernels are for x86_64, and this machine is not"
    );
    let parent = folder.parent().context("the folder has no parent")?;
    let scratch = tempfile::Builder::new()
        .prefix("new-")
        .tempdir_in(parent)
        .with_context(|| format!("creating a folder in {} failed", parent.display()))?;
    eprintln!("lab: fetching kernel {}", series.name);
    let packages =
        fetch(series, scratch.path()).with_context(|| format!("kernel {} can't be fetched", series.name))?;
    let new = scratch.path().join("kernel");
    fs::create_dir(&new).context("creating a folder failed")?;
    let record =
        unpack(&packages, &new).with_context(|| format!("kernel {} can't be unpacked", series.name))?;
    eprintln!("lab: kernel {} is {}", series.name, record.release);
    if folder.exists() {
        fs::rename(folder, scratch.path().join("old")).context("removing the old kernel failed")?;
    }
    fs::rename(&new, folder).with_context(|| format!("keeping {} failed", folder.display()))
}

/// Downloads one package that `choose` picks among those of the names that begin with `prefix`, from the first place in
/// `suites` that has it.
pub(crate) fn fetch_one(
    suites: &[(&str, &str)],
    folder: &Path,
    prefixes: &[&str],
    choose: impl Fn(&[String], &str) -> Option<String>,
) -> Result<Vec<PathBuf>> {
    let mirror = mirror()?;
    let mut refusals = Vec::new();
    for (archive, suite) in suites {
        let place = Place {
            uri: beside(&mirror, archive),
            suite: (*suite).to_owned(),
            distribution: "debian",
        };
        let outcome = || -> Result<Vec<PathBuf>> {
            let apt = Private::new(folder, &place)?;
            apt.update()?;
            let mut files = Vec::new();
            for prefix in prefixes {
                let listed = apt.cache(&["pkgnames", prefix])?;
                let names: Vec<String> = listed.lines().map(str::to_owned).collect();
                let name = choose(&names, prefix).with_context(|| format!("it has no {prefix}…"))?;
                files.push(apt.download(&name)?);
            }
            Ok(files)
        };
        match repeatedly(suite, outcome) {
            Ok(files) => return Ok(files),
            Err(error) => refusals.push(format!("{suite}: {error:#}")),
        }
    }
    bail!("no mirror has it ({})", refusals.join("; "))
}

/// Does it again when it fails: a mirror may be slow, or be in the middle of its own update.
fn repeatedly<T>(suite: &str, attempt: impl Fn() -> Result<T>) -> Result<T> {
    for _ in 1..ATTEMPTS {
        match attempt() {
            Err(error) => eprintln!("lab: {suite}: {error:#}; trying again"),
            done => return done,
        }
        thread::sleep(PAUSE);
    }
    attempt()
}

fn fetch(series: &Series, folder: &Path) -> Result<Vec<PathBuf>> {
    fetch_one(series.suites, folder, series.packages, |names, prefix| {
        newest(names, prefix, series.version)
    })
}

/// The mirror of Debian that the machine is configured for, or that [`MIRROR`] names.
fn mirror() -> Result<String> {
    let configured = apt::configured()?
        .into_iter()
        .find(|place| place.distribution == "debian");
    match configured {
        Some(place) => Ok(place.uri),
        None => env::var(MIRROR).ok().with_context(|| {
            format!("apt has no mirror of Debian configured, and the kernels are Debian's; set {MIRROR} to the address of one")
        }),
    }
}

/// The address of another archive on the same mirror.
fn beside(mirror: &str, archive: &str) -> String {
    let mirror = mirror.trim_end_matches('/');
    let parent = mirror.rsplit_once('/').map_or(mirror, |(parent, _)| parent);
    format!("{parent}/{archive}/")
}

/// The package of the newest version: its name is `prefix`, then a version, then `-amd64`, and nothing that tells of
/// another flavour.
fn newest(names: &[String], prefix: &str, version: &str) -> Option<String> {
    let numbers = |name: &str| -> Option<Vec<u64>> {
        let middle = name.strip_prefix(prefix)?.strip_suffix("-amd64")?;
        middle
            .starts_with(version)
            .then(|| middle.replace("deb", ""))?
            .split(['.', '-', '+'])
            .map(|number| number.parse().ok())
            .collect()
    };
    names
        .iter()
        .filter_map(|name| Some((numbers(name)?, name)))
        .max()
        .map(|(_, name)| name.clone())
}

/// Unpacks packages into `folder`, and makes everything of a [`Record`].
fn unpack(packages: &[PathBuf], folder: &Path) -> Result<Record> {
    let mut record = Record {
        release: String::new(),
        packages: Vec::new(),
        image: String::new(),
    };
    for package in packages {
        let name = package
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        record.packages.push((name, kernels::sum(package)?));
        let mut child = process::command("dpkg-deb")
            .arg("--fsys-tarfile")
            .arg(package)
            .stdout(Stdio::piped())
            .spawn()
            .context("starting dpkg-deb failed")?;
        let mut output = BufReader::new(child.stdout.take().context("dpkg-deb has no output")?);
        let outcome = take(&mut output, folder);
        // What follows the end mark must be read too, or the program is killed by a signal.
        std::io::copy(&mut output, &mut std::io::sink()).context("reading the package's end failed")?;
        let status = child.wait().context("waiting for dpkg-deb failed")?;
        outcome?;
        ensure!(
            status.success(),
            "dpkg-deb could not read {}: {status}",
            package.display()
        );
    }
    let modules = folder.join("usr/lib/modules");
    record.release = releases(&modules)?
        .into_iter()
        .next()
        .context("the packages have no modules")?;
    // Which of the two depends on how modprobe was built.
    std::os::unix::fs::symlink("usr/lib", folder.join("lib")).context("linking a folder failed")?;
    decompress(&modules)?;
    process::output(
        process::command("depmod")
            .arg("-b")
            .arg(folder)
            .arg(&record.release),
    )?;
    let compressed = folder.join("vmlinuz");
    elf::extract(&compressed, &folder.join(IMAGE))?;
    fs::remove_file(&compressed).context("removing the compressed image failed")?;
    record.image = kernels::sum(&folder.join(IMAGE))?;
    let file = File::create(folder.join(RECORD)).context("writing the record failed")?;
    serde_json::to_writer_pretty(file, &record).context("writing the record failed")?;
    Ok(record)
}

/// The names of the folders in `modules`.
fn releases(modules: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(modules).with_context(|| format!("reading {} failed", modules.display()))?;
    Ok(entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect())
}

/// Takes what is wanted out of the tar stream of a package.
fn take(reader: &mut impl std::io::Read, folder: &Path) -> Result<()> {
    let mut archive = tar::Archive::new(reader);
    for entry in archive.entries().context("reading the package failed")? {
        let mut entry = entry.context("reading the package failed")?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let path = entry
            .path()
            .context("the package has an unreadable name")?
            .into_owned();
        let Some(to) = place_of(&path) else { continue };
        let to = folder.join(to);
        let parent = to.parent().context("a file has no folder")?;
        fs::create_dir_all(parent).with_context(|| format!("creating {} failed", parent.display()))?;
        entry
            .unpack(&to)
            .with_context(|| format!("unpacking {} failed", path.display()))?;
    }
    Ok(())
}

/// Where a file of a package goes, if it is wanted.
fn place_of(path: &Path) -> Option<PathBuf> {
    let parts: Vec<&str> = path
        .components()
        .filter_map(|part| match part {
            Component::Normal(part) => part.to_str(),
            _ => None,
        })
        .collect();
    if path.components().any(|part| part == Component::ParentDir) {
        return None;
    }
    match parts.as_slice() {
        ["boot", file] if file.starts_with("vmlinuz-") => Some("vmlinuz".into()),
        ["boot", file] if file.starts_with("config-") => Some("config".into()),
        ["usr", "lib", "modules", _, "vmlinuz"] => Some("vmlinuz".into()),
        ["usr", "lib", "modules", _, "config"] => Some("config".into()),
        ["lib" | "usr", rest @ ..] => {
            let rest = rest.strip_prefix(&["lib"]).unwrap_or(rest);
            let ["modules", release, below @ ..] = rest else {
                return None;
            };
            kept(below).then(|| {
                let mut to = PathBuf::from("usr/lib/modules");
                to.push(release);
                to.extend(below);
                to
            })
        }
        _ => None,
    }
}

/// Whether a file below the folder of a release is kept.
fn kept(below: &[&str]) -> bool {
    match below {
        [file] => file.starts_with("modules."),
        ["kernel", "drivers", "net", file] => {
            file.starts_with("virtio_net") || file.starts_with("net_failover")
        }
        ["kernel", "net", part, ..] => ["9p", "core"].contains(part),
        ["kernel", "drivers", part, ..] => KEPT_DRIVERS.contains(part),
        ["kernel", part, ..] => KEPT.contains(part),
        _ => false,
    }
}

/// Decompresses every module below `folder`, many with one program.
fn decompress(folder: &Path) -> Result<()> {
    let (mut xz, mut zstd, mut folders) = (Vec::new(), Vec::new(), vec![folder.to_owned()]);
    while let Some(folder) = folders.pop() {
        let entries =
            fs::read_dir(&folder).with_context(|| format!("reading {} failed", folder.display()))?;
        for entry in entries {
            let path = entry.context("reading a folder failed")?.path();
            match path.extension().and_then(|extension| extension.to_str()) {
                _ if path.is_dir() => folders.push(path),
                Some("xz") => xz.push(path),
                Some("zst") => zstd.push(path),
                _ => {}
            }
        }
    }
    for (program, arguments, files) in [("xz", &["-dq"][..], xz), ("zstd", &["-dq", "--rm"], zstd)] {
        for files in files.chunks(200) {
            process::output(process::command(program).args(arguments).arg("--").args(files))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_plain_kernel_is_chosen() {
        let names = [
            "linux-image-6.12.94+deb13-amd64",
            "linux-image-6.12.107+deb13-amd64",
            "linux-image-6.12.107+deb13.1-amd64",
            "linux-image-6.12.200+deb13-cloud-amd64",
            "linux-image-6.12.200+deb13-rt-amd64",
            "linux-image-6.12.200+deb13-amd64-dbg",
            "linux-image-6.1.0-56-amd64",
            "linux-image-amd64",
        ]
        .map(str::to_owned);
        assert_eq!(
            newest(&names, "linux-image-", "6.12.").as_deref(),
            Some("linux-image-6.12.107+deb13.1-amd64")
        );
        assert_eq!(
            newest(&names, "linux-image-", "6.1.").as_deref(),
            Some("linux-image-6.1.0-56-amd64")
        );
        assert_eq!(newest(&names, "linux-image-", "5."), None);
    }

    #[test]
    fn of_a_package_the_kernel_and_the_modules_of_block_devices_are_taken() {
        let place = |path: &str| place_of(Path::new(path)).map(|to| to.display().to_string());
        assert_eq!(place("./boot/vmlinuz-6.1").as_deref(), Some("vmlinuz"));
        assert_eq!(place("./usr/lib/modules/7.2/vmlinuz").as_deref(), Some("vmlinuz"));
        let module = "lib/modules/6.1/kernel/drivers/block/nbd.ko.xz";
        assert_eq!(place(&format!("./{module}")), Some(format!("usr/{module}")));
        assert_eq!(place(&format!("./usr/{module}")), Some(format!("usr/{module}")));
        for not in [
            "./lib/modules/6.1/kernel/drivers/gpu/drm/drm.ko.xz",
            "./lib/modules/6.1/kernel/sound/core/snd.ko.xz",
            "./usr/share/doc/linux/copyright",
            "./lib/modules/../../etc/passwd",
        ] {
            assert_eq!(place(not), None, "{not}");
        }
    }

    #[test]
    fn a_mirror_that_answers_late_is_asked_again() {
        let asked = std::cell::Cell::new(0);
        let answer = repeatedly("sid", || {
            asked.set(asked.get() + 1);
            ensure!(asked.get() == 2, "no answer");
            Ok(7)
        });
        assert_eq!((answer.unwrap(), asked.get()), (7, 2));
    }

    #[test]
    fn archives_are_beside_each_other() {
        assert_eq!(
            beside("http://mirror.example/debian/", "debian-security"),
            "http://mirror.example/debian-security/"
        );
    }
}

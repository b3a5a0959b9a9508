//! Fei: the kernel with function error injection, which Debian's kernels lack: Debian's sources of 6.12 with the fragment
//! of configuration in `xtask/lab`.
//!
//! A ready-made image in `../shared/lab`, beside the project, is taken when there is one. Otherwise it is built, which
//! takes some 20 minutes with two processors, and kept by the sum of the fragment.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result, ensure};

use super::{debian, kernels};
use crate::{process, workspace};

/// What is added to the default configuration, relative to the workspace.
const FRAGMENT: &str = "xtask/lab/kernel-fragment.config";
/// The package of the sources, and where it is.
const SOURCES: &str = "linux-source-6.12";
const SUITES: [(&str, &str); 2] = [("debian-security", "trixie-security"), ("debian", "trixie")];
/// Programs that building needs, each with the package that has it; libraries are told by their header.
const NEEDED: [(&str, &str); 6] = [
    ("make", "make"),
    ("gcc", "gcc"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("pahole", "pahole"),
];
const HEADERS: [(&str, &str); 2] = [
    ("/usr/include/libelf.h", "libelf-dev"),
    ("/usr/include/openssl/opensslv.h", "libssl-dev"),
];

/// The image, built if need be.
pub(crate) fn image() -> Result<PathBuf> {
    if let Some(ready) = ready_made() {
        return Ok(ready);
    }
    let fragment = workspace::root().join(FRAGMENT);
    let sum = kernels::sum(&fragment)?;
    let folder = kernels::folder("fei")?.join(sum.get(..16).unwrap_or(&sum));
    let image = folder.join("bzImage");
    if !image.is_file() {
        build(&fragment, &folder, &image).context("building kernel fei failed")?;
    }
    Ok(image)
}

/// The newest `bzImage-*-fei` beside the project, or beside the repository that this is a work tree of.
fn ready_made() -> Option<PathBuf> {
    let root = workspace::root();
    let common = process::output(process::command("git").current_dir(root).args([
        "rev-parse",
        "--path-format=absolute",
        "--git-common-dir",
    ]));
    let repository = common
        .ok()
        .and_then(|folder| Some(Path::new(folder.trim()).parent()?.to_owned()));
    [Some(root.to_owned()), repository]
        .into_iter()
        .flatten()
        .find_map(|root| {
            let entries = fs::read_dir(root.join("../shared/lab")).ok()?;
            entries
                .filter_map(|entry| Some(entry.ok()?.path()))
                .filter(|path| {
                    let name = path.file_name().unwrap_or_default().to_string_lossy();
                    name.starts_with("bzImage-") && name.ends_with("-fei")
                })
                .max()
        })
}

fn build(fragment: &Path, folder: &Path, image: &Path) -> Result<()> {
    let programs = NEEDED
        .iter()
        .filter(|(program, _)| process::find(program).is_none());
    let headers = HEADERS.iter().filter(|(header, _)| !Path::new(header).is_file());
    let missing: Vec<&str> = programs.chain(headers).map(|(_, package)| *package).collect();
    ensure!(
        missing.is_empty(),
        "packages are missing: run as root: apt-get install {}",
        missing.join(" ")
    );
    fs::create_dir_all(folder).with_context(|| format!("creating {} failed", folder.display()))?;
    let scratch = tempfile::Builder::new()
        .prefix("build-")
        .tempdir_in(folder)
        .context("creating a folder failed")?;
    eprintln!("lab: building kernel fei from {SOURCES}, once: some 20 minutes");
    let packages = debian::fetch_one(&SUITES, scratch.path(), &[SOURCES], |names, wanted| {
        names.iter().find(|name| *name == wanted).cloned()
    })?;
    let package = packages.first().context("no package was downloaded")?;
    process::output(
        process::command("dpkg-deb")
            .arg("-x")
            .arg(package)
            .arg(scratch.path()),
    )?;
    let archive = scratch.path().join("usr/src").join(format!("{SOURCES}.tar.xz"));
    process::output(
        process::command("tar")
            .arg("-xf")
            .arg(&archive)
            .arg("-C")
            .arg(scratch.path()),
    )?;
    let tree = scratch.path().join(SOURCES);
    let make = |arguments: &[&str]| {
        let mut command = process::command("make");
        command
            .current_dir(&tree)
            .args(arguments)
            .env_remove("MAKEFLAGS")
            .env_remove("CARGO_MAKEFLAGS");
        process::output(&mut command).map(drop)
    };
    make(&["defconfig", "kvm_guest.config"])?;
    process::output(
        process::command("scripts/kconfig/merge_config.sh")
            .current_dir(&tree)
            .args(["-m", ".config"])
            .arg(fragment),
    )?;
    make(&["olddefconfig"])?;
    let jobs = thread::available_parallelism().map_or(1, std::num::NonZero::get);
    make(&["-s", &format!("-j{jobs}"), "bzImage"])?;
    let partial = image.with_extension("partial");
    fs::copy(tree.join("arch/x86/boot/bzImage"), &partial).context("keeping the image failed")?;
    fs::rename(&partial, image).context("keeping the image failed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fragment_has_what_the_kernel_is_for() {
        let fragment = fs::read_to_string(workspace::root().join(FRAGMENT)).unwrap();
        for option in [
            "FUNCTION_ERROR_INJECTION",
            "BLK_DEV_NBD",
            "NET_9P_VIRTIO",
            "OVERLAY_FS",
        ] {
            assert!(
                fragment.lines().any(|line| line == format!("CONFIG_{option}=y")),
                "{option}"
            );
        }
    }
}

//! Packages: programs of the distribution that the tests, the demonstration, the benchmark and the lab's guests run,
//! and the C++ compiler that builds the fuzzer.

use std::env;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::unistd::Uid;

use crate::process;

/// A program, and the package of Debian and Ubuntu that has it.
const NEEDED: [(&str, &str); 38] = [
    ("nbdinfo", "libnbd-bin"),
    ("nbdcopy", "libnbd-bin"),
    ("nbdfuse", "libnbd-bin"),
    ("nbdsh", "python3-libnbd"),
    ("nbdkit", "nbdkit"),
    ("fio", "fio"),
    ("qemu-img", "qemu-utils"),
    ("qemu-io", "qemu-utils"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-storage-daemon", "qemu-system-common"),
    ("mkfs.ext4", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
    ("xfs_repair", "xfsprogs"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("parted", "parted"),
    ("sgdisk", "gdisk"),
    ("losetup", "mount"),
    ("blkdiscard", "util-linux"),
    ("fstrim", "util-linux"),
    ("strace", "strace"),
    ("c++", "g++"),
    (LIBCLANG, "libclang-dev"),
    // Guests, their kernels, and what they try.
    (DEBIANS_KEYS, "debian-archive-keyring"),
    ("busybox", "busybox-static"),
    ("modprobe", "kmod"),
    ("setpriv", "util-linux"),
    ("xz", "xz-utils"),
    ("lsblk", "util-linux"),
    ("dmsetup", "dmsetup"),
    ("lvm", "lvm2"),
    ("thin_check", "thin-provisioning-tools"),
    ("cryptsetup", "cryptsetup-bin"),
    ("mdadm", "mdadm"),
    ("make-bcache", "bcache-tools"),
    ("nvme", "nvme-cli"),
    ("sg_dd", "sg3-utils"),
    ("nbd-client", "nbd-client"),
];

/// No program but a library: the feature `ublk` reads a header of the kernel with it when it is built.
const LIBCLANG: &str = "libclang";

/// No program but the keys by which Debian's kernels are known, which Ubuntu may lack. Which of two endings the file has
/// depends on the release.
const DEBIANS_KEYS: &str = "/usr/share/keyrings/debian-archive-keyring";

/// Whether a program, the library or the keys are there.
fn is_there(program: &str) -> bool {
    if program == DEBIANS_KEYS {
        return ["gpg", "pgp"]
            .iter()
            .any(|ending| Path::new(program).with_extension(ending).is_file());
    }
    if program == LIBCLANG {
        return env::var_os("LIBCLANG_PATH").is_some() || has_libclang(Path::new("/usr"));
    }
    process::find(program).is_some()
}

/// Whether the library is where distributions put it.
fn has_libclang(usr: &Path) -> bool {
    let entries = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten();
    let libraries = |folder: &Path| {
        entries(folder).any(|file| {
            let name = file.file_name().to_string_lossy().into_owned();
            name.starts_with("libclang.so")
                || (name.starts_with("libclang-") && name[9..].starts_with(|c: char| c.is_ascii_digit()))
        })
    };
    let below = entries(&usr.join("lib")).map(|folder| folder.path());
    [usr.join("lib64"), usr.join("lib")]
        .into_iter()
        .chain(below.flat_map(|folder| [folder.join("lib"), folder]))
        .any(|folder| libraries(&folder))
}

/// Makes sure that every program is there: installs its package when this is root on Debian or Ubuntu, otherwise
/// names all that are missing.
pub(crate) fn set_up() -> Result<()> {
    let missing = missing(is_there);
    if missing.is_empty() {
        eprintln!("setup: distribution packages: all there");
        return Ok(());
    }
    let names = missing.join(" ");
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    if !is_debian(&release) {
        bail!("programs are missing: install the packages that Debian calls {names}");
    }
    if !Uid::effective().is_root() {
        bail!("distribution packages are missing: run as root: apt-get install {names}");
    }
    eprintln!("setup: installing {names}");
    let apt = || {
        let mut command = process::command("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").args([
            "--quiet",
            "-o",
            "Acquire::Retries=4",
            "-o",
            "Acquire::http::Timeout=60",
        ]);
        command
    };
    process::output(apt().arg("update")).context("apt-get has no current lists")?;
    process::output(
        apt()
            .args(["install", "--yes", "--no-install-recommends"])
            .args(&missing),
    )
    .with_context(|| format!("installing {names} failed"))?;
    Ok(())
}

/// The packages of the programs that are not there, each once.
fn missing(is_there: impl Fn(&str) -> bool) -> Vec<&'static str> {
    let mut packages: Vec<&str> = NEEDED
        .into_iter()
        .filter(|(program, _)| !is_there(program))
        .map(|(_, package)| package)
        .collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

/// Whether /etc/os-release is of Debian or something made from it.
fn is_debian(release: &str) -> bool {
    release
        .lines()
        .filter_map(|line| line.strip_prefix("ID=").or_else(|| line.strip_prefix("ID_LIKE=")))
        .flat_map(|value| value.trim_matches('"').split(' '))
        .any(|id| id == "debian" || id == "ubuntu")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_package_is_named_once() {
        assert_eq!(missing(|program| !program.ends_with("fs.ext4")), ["e2fsprogs"]);
        assert_eq!(
            missing(|program| !program.starts_with("qemu")),
            ["qemu-system-common", "qemu-system-x86", "qemu-utils"]
        );
        assert!(missing(|_| true).is_empty());
    }

    #[test]
    fn the_library_is_found_where_distributions_put_it() {
        let usr = tempfile::tempdir().unwrap();
        let add = |path: &str| {
            let path = usr.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        };
        add("lib/llvm-14/lib/libclang-cpp.so.14");
        add("lib/x86_64-linux-gnu/libclang_rt.so");
        assert!(!has_libclang(usr.path()));
        add("lib/llvm-14/lib/libclang-14.so.14.0.6");
        assert!(has_libclang(usr.path()));
    }

    #[test]
    fn debian_and_its_children_are_known() {
        assert!(is_debian("NAME=x\nID=debian\n"));
        assert!(is_debian("ID=mint\nID_LIKE=\"ubuntu debian\"\n"));
        assert!(!is_debian("ID=fedora\nID_LIKE=\"rhel\"\n"));
    }
}

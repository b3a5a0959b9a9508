//! Initramfs: what a guest has in memory when it starts: busybox, two scripts, the modules that reach the host's root,
//! and the command.
//!
//! The archive is a cpio of the form `newc` (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::kernels::{Kernel, Modules};
use crate::process;

/// The first process.
const INIT: &str = include_str!("../../lab/init");
/// What goes on in the host's user land.
const STAGE2: &str = include_str!("../../lab/stage2");

/// What a guest loads before it has a root.
const EARLY: [&str; 7] = [
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
    "virtio_blk",
    "configfs",
];

/// Type and permission bits of a file and of a folder.
const FILE: u32 = 0o100_755;
const FOLDER: u32 = 0o040_755;

/// The archive for one run of `command`, a script of bash, with `shares` mounted at their own paths.
pub(crate) fn build(kernel: &Kernel, shares: &[PathBuf], command: &str) -> Result<Vec<u8>> {
    let busybox = process::find("busybox").context("busybox is missing: `cargo xtask setup` installs it")?;
    let busybox = fs::read(&busybox).with_context(|| format!("reading {} failed", busybox.display()))?;
    let mut archive = Archive::default();
    archive.add("busybox", FILE, &busybox)?;
    archive.add("init", FILE, INIT.as_bytes())?;
    archive.add("stage2", FILE, STAGE2.as_bytes())?;
    archive.add("command", FILE, command.as_bytes())?;
    let shares: String = shares
        .iter()
        .map(|share| format!("{}\n", share.display()))
        .collect();
    archive.add("shares", FILE, shares.as_bytes())?;
    archive.add("modules", FOLDER, b"")?;
    let folder = kernel
        .modules
        .as_ref()
        .map_or_else(String::new, |modules| modules.folder.display().to_string());
    archive.add("kernel", FILE, folder.as_bytes())?;
    if let Some(modules) = &kernel.modules {
        for (number, path) in early(modules)?.iter().enumerate() {
            let content = fs::read(path).with_context(|| format!("reading {} failed", path.display()))?;
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            archive.add(&format!("modules/{number:03}-{name}"), FILE, &content)?;
        }
    }
    archive.finish()
}

/// The files of [`EARLY`] and of what they need, in the order in which they can be loaded.
fn early(modules: &Modules) -> Result<Vec<PathBuf>> {
    let folder = modules.tree();
    let read = |name: &str| {
        let path = folder.join(name);
        fs::read_to_string(&path).with_context(|| format!("reading {} failed", path.display()))
    };
    let (dependencies, builtin) = (read("modules.dep")?, read("modules.builtin")?);
    let names = in_order(&dependencies, &builtin, &EARLY)?;
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

/// From the text of `modules.dep`: the files of `wanted` and their dependencies, each once.
fn in_order(dependencies: &str, builtin: &str, wanted: &[&str]) -> Result<Vec<String>> {
    let mut order: Vec<String> = Vec::new();
    for module in wanted {
        let line = dependencies
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(path, _)| name_of(path) == *module);
        let Some((path, needs)) = line else {
            let is_builtin = builtin.lines().any(|path| name_of(path) == *module);
            anyhow::ensure!(is_builtin, "the kernel has no module {module}");
            continue;
        };
        // The last one is needed by the ones before it.
        for file in needs.split_whitespace().rev().chain([path]) {
            if !order.iter().any(|known| known == file) {
                order.push(file.to_owned());
            }
        }
    }
    Ok(order)
}

/// The name of the module in a file: `kernel/net/9p/9pnet-virtio.ko` is `9pnet_virtio`.
fn name_of(path: &str) -> String {
    let file = Path::new(path).file_name().unwrap_or_default().to_string_lossy();
    file.split('.').next().unwrap_or_default().replace('-', "_")
}

/// A cpio archive that grows.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.entries += 1;
        let size = u32::try_from(content.len()).with_context(|| format!("{name} is too long"))?;
        let name_size = name.len() + 1;
        // Inode, mode, user, group, links, time, size, device (4), length of the name, checksum.
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(format!("{name_size:08x}{:08x}", 0).bytes());
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        let length = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(length, 0);
    }

    fn finish(mut self) -> Result<Vec<u8>> {
        self.add("TRAILER!!!", 0, b"")?;
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need() {
        let dependencies = "kernel/fs/9p/9p.ko: kernel/net/9p/9pnet.ko kernel/fs/netfs/netfs.ko\n\
                            kernel/net/9p/9pnet_virtio.ko: kernel/net/9p/9pnet.ko\nkernel/fs/netfs/netfs.ko:\n\
                            kernel/net/9p/9pnet.ko:\n";
        let order = in_order(
            dependencies,
            "kernel/fs/overlay-fs.ko\n",
            &["9pnet_virtio", "9p", "overlay_fs"],
        )
        .unwrap();
        assert_eq!(
            order,
            [
                "kernel/net/9p/9pnet.ko",
                "kernel/net/9p/9pnet_virtio.ko",
                "kernel/fs/netfs/netfs.ko",
                "kernel/fs/9p/9p.ko"
            ]
        );
        in_order(dependencies, "", &["virtio_pci"]).unwrap_err();
    }

    #[test]
    fn the_archive_is_what_cpio_reads() {
        let mut archive = Archive::default();
        archive.add("folder", FOLDER, b"").unwrap();
        archive.add("folder/file", FILE, b"hello").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(text.matches("070701").count(), 3);
        // The header has 110 bytes, and name and content begin at multiples of four.
        let file = text.find("folder/file").unwrap();
        assert_eq!(file % 4, 110 % 4);
        assert_eq!(text.find("hello").unwrap() % 4, 0);
    }
}

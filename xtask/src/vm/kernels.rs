//! Kernels: what a name of a kernel stands for, and where its files are.
//!
//! Everything is in the folder `lab` of the cache: a folder for each of Debian's kernels, made by [`super::debian`] in
//! one step, and kernels by the sum of the image that they are from. A kernel that is there is taken without a
//! network, after its sum was compared.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::{debian, elf, fei};
use crate::process;
use crate::toolchain::locate;

/// A kernel that can be started.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    /// As it was asked for.
    pub(crate) name: String,
    /// ELF file or bzImage.
    pub(crate) image: PathBuf,
    /// Its modules, unless everything is built in.
    pub(crate) modules: Option<Modules>,
    /// More of the command line, by the name's own suffix.
    pub(crate) append: String,
    /// Processors, by a suffix such as `+4cpus`.
    pub(crate) cpus: Option<u32>,
    /// Memory in MiB, by a suffix such as `+512m`.
    pub(crate) memory_mib: Option<u32>,
}

/// What the suffixes of a kernel's name say of its guest.
#[derive(Debug, Default, PartialEq, Eq)]
struct Suffixes {
    append: String,
    cpus: Option<u32>,
    memory_mib: Option<u32>,
}

impl Suffixes {
    /// Takes one in; `false` if it is none.
    fn add(&mut self, suffix: &str) -> bool {
        let number = |unit: &str| suffix.strip_suffix(unit)?.parse::<u32>().ok().filter(|n| *n > 0);
        if ["full", "lazy", "voluntary", "none"].contains(&suffix) {
            self.append = format!("preempt={suffix}");
        } else if let Some(cpus) = number("cpus").or_else(|| number("cpu")) {
            self.cpus = Some(cpus);
        } else if let Some(memory) = number("m") {
            self.memory_mib = Some(memory);
        } else {
            return false;
        }
        true
    }

    /// The name without them.
    fn of(wanted: &str) -> (&str, Self) {
        let (mut name, mut suffixes) = (wanted, Self::default());
        while let Some((rest, suffix)) = name.rsplit_once('+') {
            if !suffixes.add(suffix) {
                break;
            }
            name = rest;
        }
        (name, suffixes)
    }
}

/// Modules of a kernel, unpacked.
#[derive(Clone, Debug)]
pub(crate) struct Modules {
    /// The folder with `config` and `usr/lib/modules/RELEASE`.
    pub(crate) folder: PathBuf,
    /// What `uname -r` says.
    pub(crate) release: String,
}

impl Modules {
    /// The folder of this release.
    pub(crate) fn tree(&self) -> PathBuf {
        self.folder.join("usr/lib/modules").join(&self.release)
    }
}

/// What is known of an unpacked kernel: `kernel.json` in its folder.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    /// What `uname -r` says.
    pub(crate) release: String,
    /// The packages that it is from, with their SHA-256 sums.
    pub(crate) packages: Vec<(String, String)>,
    /// The SHA-256 sum of the image.
    pub(crate) image: String,
}

/// The record's file.
pub(crate) const RECORD: &str = "kernel.json";
/// The image's file, ELF.
pub(crate) const IMAGE: &str = "vmlinux";

/// Finds the kernel `wanted`, and fetches or builds it if need be: a series of Debian, `fei`, or a path. `NAME+full`,
/// `NAME+lazy`, `NAME+voluntary` and `NAME+none` say how the kernel is to be preempted. With `update` the mirror is asked
/// for a newer one. `+1cpu`, `+4cpus` and `+512m` say how many processors and how many MiB the guest has.
pub(crate) fn find(wanted: &str, update: bool) -> Result<Kernel> {
    let (name, suffixes) = Suffixes::of(wanted);
    let kernel = |image, modules| Kernel {
        name: wanted.to_owned(),
        image,
        modules,
        append: suffixes.append,
        cpus: suffixes.cpus,
        memory_mib: suffixes.memory_mib,
    };
    if let Some(series) = debian::series(name) {
        let _lock = lock()?;
        let folder = folder("kernels")?.join(name);
        let known = read(&folder);
        let record = match known {
            Ok(record) if !update => record,
            _ => {
                debian::install(series, &folder)?;
                read(&folder)?
            }
        };
        let modules = Modules {
            release: record.release,
            folder: folder.clone(),
        };
        return Ok(kernel(folder.join(IMAGE), Some(modules)));
    }
    if name == "fei" {
        let _lock = lock()?;
        return Ok(kernel(by_sum(&fei::image()?)?, None));
    }
    let path = Path::new(name);
    ensure!(
        path.is_file(),
        "there is no kernel {name}: name {}, fei, or the path of a bzImage",
        debian::names().join(", ")
    );
    let path = path
        .canonicalize()
        .with_context(|| format!("finding {name} failed"))?;
    let _lock = lock()?;
    Ok(kernel(by_sum(&path)?, None))
}

/// A folder of the lab in the cache.
pub(crate) fn folder(name: &str) -> Result<PathBuf> {
    let cache = locate::cache_folder().map_err(|error| anyhow::anyhow!(error))?;
    let folder = cache.join("lab").join(name);
    fs::create_dir_all(&folder).with_context(|| format!("creating {} failed", folder.display()))?;
    Ok(folder)
}

/// Keeps others from making the same kernel, until it is dropped.
fn lock() -> Result<File> {
    let path = folder("")?.join("lock");
    let file = File::create(&path).with_context(|| format!("creating {} failed", path.display()))?;
    file.lock()
        .with_context(|| format!("locking {} failed", path.display()))?;
    Ok(file)
}

/// The record of an unpacked kernel whose image is what it was.
fn read(folder: &Path) -> Result<Record> {
    let path = folder.join(RECORD);
    let text = fs::read(&path).with_context(|| format!("reading {} failed", path.display()))?;
    let record: Record =
        serde_json::from_slice(&text).with_context(|| format!("{} is damaged", path.display()))?;
    if sum(&folder.join(IMAGE))? != record.image {
        bail!("the image in {} is not what was unpacked", folder.display());
    }
    Ok(record)
}

/// The ELF kernel of an image, taken out once; the image itself where that can't be done.
fn by_sum(image: &Path) -> Result<PathBuf> {
    let elf = folder("elf")?.join(sum(image)?);
    let has_none = elf.with_extension("none");
    if has_none.exists() {
        return Ok(image.to_owned());
    }
    if !elf.exists() {
        let partial = elf.with_extension("partial");
        if let Err(error) = elf::extract(image, &partial) {
            eprintln!("lab: {} is started as it is: {error:#}", image.display());
            fs::write(&has_none, "").with_context(|| format!("writing {} failed", has_none.display()))?;
            return Ok(image.to_owned());
        }
        fs::rename(&partial, &elf).with_context(|| format!("keeping {} failed", elf.display()))?;
    }
    Ok(elf)
}

/// The SHA-256 sum of a file, in hexadecimal digits.
pub(crate) fn sum(path: &Path) -> Result<String> {
    let said = process::output(process::command("sha256sum").arg("--").arg(path))?;
    let sum = said.split_whitespace().next().unwrap_or_default();
    ensure!(
        sum.len() == 64,
        "sha256sum did not say a sum of {}",
        path.display()
    );
    Ok(sum.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_kernel_is_an_error_that_names_the_known_ones() {
        let error = format!("{:#}", find("5.10", false).unwrap_err());
        assert!(
            error.contains("5.10") && error.contains("6.12") && error.contains("fei"),
            "{error}"
        );
    }

    #[test]
    fn suffixes_say_what_the_guest_is_like() {
        let (name, suffixes) = Suffixes::of("6.1+full+4cpus+512m");
        assert_eq!(name, "6.1");
        assert_eq!(suffixes.append, "preempt=full");
        assert_eq!((suffixes.cpus, suffixes.memory_mib), (Some(4), Some(512)));
        assert_eq!(Suffixes::of("7.2"), ("7.2", Suffixes::default()));
        assert_eq!(Suffixes::of("7.2+1cpu").1.cpus, Some(1));
        for none in ["a+b", "7.2+0cpus", "7.2+m"] {
            assert_eq!(Suffixes::of(none), (none, Suffixes::default()));
        }
    }

    #[test]
    fn an_image_that_changed_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join(IMAGE);
        fs::write(&image, "a").unwrap();
        let record = Record {
            release: "1".to_owned(),
            packages: Vec::new(),
            image: sum(&image).unwrap(),
        };
        fs::write(folder.path().join(RECORD), serde_json::to_vec(&record).unwrap()).unwrap();
        assert_eq!(read(folder.path()).unwrap().release, "1");
        fs::write(&image, "b").unwrap();
        read(folder.path()).unwrap_err();
    }
}

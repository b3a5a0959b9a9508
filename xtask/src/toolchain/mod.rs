//! Toolchain: what the eBPF build needs and a Rust installation may lack.
//!
//! `-Z build-std=core` compiles `core` from the library sources of exactly the compiler in use. They are taken
//! from the first place that has them:
//! 1. the toolchain itself, or our cache;
//! 2. an archive that `BLKSNAP_RUST_SRC_ARCHIVE` names;
//! 3. `rustup component add rust-src`;
//! 4. the package rust-src of the machine's Debian or Ubuntu mirror, unpacked into our cache.
//!
//! bpf-linker is taken from PATH or the cache, else installed into the cache with cargo. Outside the cache only
//! rustup changes anything.

mod archive;
mod debian;
pub(crate) mod locate;

use std::env;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::ValueEnum;

use self::locate::{Compiler, Toolchain};
use crate::process;

/// Names an archive with the folder `library` of the Rust sources.
const ARCHIVE_VARIABLE: &str = "BLKSNAP_RUST_SRC_ARCHIVE";

/// A place that may have the library sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Source {
    /// The archive that BLKSNAP_RUST_SRC_ARCHIVE names (tar with zstd, xz or gzip)
    Archive,
    /// `rustup component add rust-src`
    Rustup,
    /// The package rust-src of the machine's Debian or Ubuntu mirror
    Debian,
}

/// What this machine offers.
struct Offers {
    archive: Option<PathBuf>,
    rustup: bool,
    apt: bool,
}

impl Offers {
    fn look() -> Self {
        Self {
            archive: env::var_os(ARCHIVE_VARIABLE)
                .filter(|name| !name.is_empty())
                .map(PathBuf::from),
            rustup: locate::on_path("rustup").is_some(),
            apt: locate::on_path("apt-get").is_some() && locate::on_path("dpkg-deb").is_some(),
        }
    }

    /// The places to try, in order; only `wanted` when that is given.
    fn sources(&self, wanted: Option<Source>) -> Vec<Source> {
        let offered = |source: &Source| match source {
            Source::Archive => self.archive.is_some(),
            Source::Rustup => self.rustup,
            Source::Debian => self.apt,
        };
        match wanted {
            Some(source) => vec![source],
            None => [Source::Archive, Source::Rustup, Source::Debian]
                .into_iter()
                .filter(offered)
                .collect(),
        }
    }
}

/// Makes sure that a plain `cargo build` works: library sources and linker.
/// With `wanted` the sources are taken from there, even if they are present.
pub(crate) fn set_up(wanted: Option<Source>) -> Result<()> {
    let toolchain = Toolchain::from_environment();
    let compiler = Compiler::query(&toolchain).map_err(|error| anyhow!(error))?;
    let cache = locate::cache_folder().map_err(|error| anyhow!(error))?;
    set_up_sources(&toolchain, &compiler, &cache, wanted)?;
    set_up_linker(&toolchain, &cache)
}

fn set_up_sources(
    toolchain: &Toolchain,
    compiler: &Compiler,
    cache: &Path,
    wanted: Option<Source>,
) -> Result<()> {
    if wanted.is_none()
        && let Some(library) = compiler.library(cache)
    {
        eprintln!(
            "setup: library sources of Rust {}: {}",
            compiler.release,
            library.display()
        );
        return Ok(());
    }
    let offers = Offers::look();
    let mut refusals = Vec::new();
    for source in offers.sources(wanted) {
        let outcome = match source {
            Source::Archive => from_archive(offers.archive.as_deref(), compiler, cache),
            Source::Rustup => from_rustup(toolchain, compiler, cache),
            Source::Debian => from_debian(compiler, cache),
        };
        match outcome {
            Ok(library) => {
                eprintln!(
                    "setup: library sources of Rust {}: {}",
                    compiler.release,
                    library.display()
                );
                return Ok(());
            }
            Err(error) => refusals.push(format!("{error:#}")),
        }
    }
    if refusals.is_empty() {
        refusals.push("neither rustup nor apt is here".to_owned());
    }
    bail!(
        "no library sources of Rust {release} found ({}): add the component rust-src to the toolchain, install \
         the distribution's package rust-src {release}, or name an archive with the folder `library` of \
         rust-src {release} (.tar.zst, .tar.xz, .tar.gz) in {ARCHIVE_VARIABLE}",
        refusals.join("; "),
        release = compiler.release
    );
}

fn from_archive(archive: Option<&Path>, compiler: &Compiler, cache: &Path) -> Result<PathBuf> {
    let archive = archive.with_context(|| format!("{ARCHIVE_VARIABLE} names no archive"))?;
    install(compiler, cache, |folder| archive::unpack_file(archive, folder))
        .with_context(|| format!("taking the library sources from {} failed", archive.display()))
}

fn from_rustup(toolchain: &Toolchain, compiler: &Compiler, cache: &Path) -> Result<PathBuf> {
    process::output(Command::new("rustup").args([
        "component",
        "add",
        "rust-src",
        "--toolchain",
        toolchain.name(),
    ]))?;
    compiler
        .library(cache)
        .context("rustup added rust-src, but the toolchain still has no library sources")
}

fn from_debian(compiler: &Compiler, cache: &Path) -> Result<PathBuf> {
    ensure!(
        !compiler.release.contains('-'),
        "a mirror has no sources of Rust {}",
        compiler.release
    );
    install(compiler, cache, |folder| {
        let package = debian::download(&compiler.release, folder)?;
        archive::unpack_package(&package, folder)
    })
}

/// Lets `unpack` fill a temporary folder of the cache, checks the library sources found in it and moves them to
/// their place in one step, so that an interrupted set-up leaves nothing that looks complete.
fn install(compiler: &Compiler, cache: &Path, unpack: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let sources = locate::sources_folder(cache);
    fs::create_dir_all(&sources).with_context(|| format!("creating {} failed", sources.display()))?;
    let temporary = tempfile::Builder::new()
        .prefix(".unpack-")
        .tempdir_in(&sources)
        .with_context(|| format!("creating a folder in {} failed", sources.display()))?;
    unpack(temporary.path())?;
    let library = archive::find_library(temporary.path())?;
    archive::check_release(&library, &compiler.release)?;

    let place = sources.join(compiler.cache_key());
    let target = place.join("library");
    fs::create_dir_all(&place).with_context(|| format!("creating {} failed", place.display()))?;
    if target.exists() && !locate::is_library(&target) {
        fs::remove_dir_all(&target).with_context(|| format!("removing {} failed", target.display()))?;
    }
    match fs::rename(&library, &target) {
        // Another set-up was faster; its result is the same.
        Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty && locate::is_library(&target) => {}
        outcome => outcome.with_context(|| format!("moving the sources to {} failed", target.display()))?,
    }
    Ok(target)
}

/// Finds or installs bpf-linker.
fn set_up_linker(toolchain: &Toolchain, cache: &Path) -> Result<()> {
    let version = locate::BPF_LINKER_VERSION;
    if locate::linker(cache).is_none() {
        eprintln!("setup: installing bpf-linker {version} (a minute or two)");
        let root = locate::linker_root(cache);
        process::run(
            toolchain
                .command("cargo")
                .args(["install", "--quiet", "bpf-linker", "--version", version, "--locked", "--root"])
                .arg(&root),
        )
        .with_context(|| {
            format!("bpf-linker {version} is missing: `cargo install bpf-linker --version {version} --locked` must work")
        })?;
    }
    let linker = locate::linker(cache).with_context(|| {
        format!("bpf-linker {version} was installed but does not run: does its LLVM load?")
    })?;
    eprintln!("setup: bpf-linker {version}: {}", linker.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offers(archive: bool, rustup: bool, apt: bool) -> Offers {
        Offers {
            archive: archive.then(|| PathBuf::from("library.tar.zst")),
            rustup,
            apt,
        }
    }

    #[test]
    fn an_archive_goes_before_rustup_and_rustup_before_the_mirror() {
        assert_eq!(
            offers(true, true, true).sources(None),
            [Source::Archive, Source::Rustup, Source::Debian]
        );
        assert_eq!(
            offers(false, true, true).sources(None),
            [Source::Rustup, Source::Debian]
        );
        assert_eq!(offers(false, false, true).sources(None), [Source::Debian]);
        assert!(offers(false, false, false).sources(None).is_empty());
    }

    #[test]
    fn a_wanted_source_is_the_only_one() {
        assert_eq!(
            offers(true, true, true).sources(Some(Source::Debian)),
            [Source::Debian]
        );
        assert_eq!(
            offers(false, false, false).sources(Some(Source::Archive)),
            [Source::Archive]
        );
    }
}
